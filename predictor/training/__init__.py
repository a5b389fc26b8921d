"""Training of a load predictor with Lightning: module, losses, calibration, resuming, W&B logging, export."""
