"""The whole model as one function that numba compiles for the processor at hand.

Read in this order: `simd` (vectors), `tiles` (products in registers), `team` (threads), `rows`,
`linear`, `attention`, `forward`; `program` calls it with a model's tensors.
"""
