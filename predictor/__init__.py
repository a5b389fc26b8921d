"""Forecasts of the next batch's expert load: the networks, their rivals, metrics and training."""
