"""Switch Transformers: layout of the MoE layers (`layout`), models (`switch`), single tensors of a file (`weights`)."""
