"""Training a predictor with Lightning, and exporting it."""
