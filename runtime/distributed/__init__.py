"""Ranks, their heartbeat, and the device each one computes on."""
