"""What the kernels share: starting early, folded rows, loads at the edges, products, dropout."""

from __future__ import annotations

import triton
import triton.language as tl

from mqa_kernels import launch

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)

# The interpreter gets two things wrong about bfloat16, and no others: products, and rounding, which
# it does towards zero.
INTERPRETED: tl.constexpr = tl.constexpr(launch.INTERPRETED)


@triton.jit
def let_next_start(OVERLAP: tl.constexpr):
    """Allow the next kernel's programs onto the device once all of this one's are there."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def await_inputs(OVERLAP: tl.constexpr):
    """Wait until all that earlier kernels write is written: x, residual, cache and lengths.

    Only weights may be read before. Nothing may be written before, as others may still read it.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def dot(a, b, acc):
    """acc + a @ b, summed in float32; float32 operands keep all their bits (no TF32)."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Round float32 to a dtype, to the nearest and ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(x == x, (bits & 0xFFFF0000).to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def load_rows(
    pointers, inside, channels, D: tl.constexpr, PADDED_D: tl.constexpr, EDGE: tl.constexpr
):
    """A tile (rows, PADDED_D); what is not `inside`, or beyond D, is zero, whatever lies there.

    With EDGE false all rows are known to be inside.
    """
    if EDGE:
        if D == PADDED_D:
            tile = tl.load(pointers, mask=inside[:, None], other=0.0)
        else:
            tile = tl.load(pointers, mask=inside[:, None] & (channels[None, :] < D), other=0.0)
    else:
        if D == PADDED_D:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=channels[None, :] < D, other=0.0)
    return tile


@triton.jit
def row_offsets(rows, channels, stride_t, stride_h, R: tl.constexpr):
    """Offsets (M, PADDED_D) of folded rows, row = t * R + h, from row 0 of their group."""
    at = (rows // R).to(tl.int64) * stride_t + (rows % R).to(tl.int64) * stride_h
    return at[:, None] + channels[None, :]


@triton.jit
def group_offset(b, g, stride_b, stride_g):
    """Offset of group g in row b of the batch."""
    return b.to(tl.int64) * stride_b + g.to(tl.int64) * stride_g


@triton.jit
def first_position(start_ptr, offset, b):
    """Position of row b's first new token."""
    if start_ptr is None:
        start = offset
    else:
        start = offset + tl.load(start_ptr + b).to(tl.int32)
    return start


@triton.jit
def count_of_padding(left_ptr, b):
    """How many of row b's first slots are padding."""
    if left_ptr is None:
        left = tl.full((), 0, tl.int32)
    else:
        left = tl.maximum(tl.load(left_ptr + b).to(tl.int32), 0)
    return left


@triton.jit
def count_of_new(lengths_ptr, T, b):
    """How many of row b's T new tokens are real."""
    if lengths_ptr is None:
        new = T
    else:
        new = tl.minimum(tl.load(lengths_ptr + b).to(tl.int32), T)
    return new


@triton.jit
def load_seed(seed_ptr):
    """The seed of dropout, 0 where there is none."""
    if seed_ptr is None:
        seed = 0
    else:
        seed = tl.load(seed_ptr)
    return seed


@triton.jit
def dropout_keeps(seed, b, g, rows, keys, dropout_p, G: tl.constexpr, R: tl.constexpr):
    """Which probabilities of folded rows (M, 1) and keys (1, N), or (1, M) and (N, 1), are kept.

    A function of seed, row of the batch, head, query and key alone, so that forward and backward
    agree whatever their tiles are.
    """
    zero = (rows + keys) * 0
    batch_head = zero + b * (G * R) + g * R + rows % R
    query = zero + rows // R
    bits, _, _, _ = tl.philox(seed, zero + keys, query, batch_head, zero)
    return tl.random.uint_to_uniform_float(bits) >= dropout_p
