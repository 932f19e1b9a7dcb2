"""How a step runs fast: 8-bit weights, packed and flat CPU steps, CUDA graphs, fused kernels."""
