"""Mixture-of-Experts models: layout of the MoE layers (`layout`), loading (`model`), single tensors (`weights`)."""
