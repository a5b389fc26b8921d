"""Runs a model with replicated experts: load, run, generate; the controller works one batch ahead."""
