"""Forecasters that a learned predictor has to beat."""
