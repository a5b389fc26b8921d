"""Switch Transformers: their layout, their weights, and how they are loaded."""
