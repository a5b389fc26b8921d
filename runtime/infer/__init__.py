"""The command that runs a model over text, verifies every output and reports."""
