"""Text: where it comes from, and how it becomes batches."""
