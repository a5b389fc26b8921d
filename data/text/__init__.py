"""Text as batches: the offline `corpus`, the user's own text (`source`), `batching`, `corpus_stream`, masked spans."""
