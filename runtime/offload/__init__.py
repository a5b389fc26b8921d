"""Experts that do not fit: tiers of memory, a cache over them, and prefetch by forecasts."""
