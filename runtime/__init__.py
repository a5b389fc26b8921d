"""Expert replication at inference, driven by load forecasts; the model's answers never change."""
