"""Trains the bundled small Switch Transformer."""
