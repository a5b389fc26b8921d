"""Training of the bundled small Switch Transformer: `python -m data.pretrain`."""
