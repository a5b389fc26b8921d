"""What each batch took, for Prometheus, JSON lines and Weights & Biases."""
