"""Text as batches: sources (`corpus`), `batching`, the default stream (`corpus_stream`), and `span_corruption`."""
