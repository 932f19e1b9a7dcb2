"""How a step runs fast: 8-bit weights, a compiled CPU pass, CUDA graphs, fused kernels."""
