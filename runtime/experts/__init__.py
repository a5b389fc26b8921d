"""The MoE layer: slots with weights, dispatch and combine, grouped GEMM, weight transfer."""
