"""Device functions that the kernels share: early launch, folded rows, masked loads, products,
dropout. Dimensions as in `forward.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from mqa_kernels import launch

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)

# Triton's interpreter gets bfloat16 wrong in two places: it rounds towards zero, and `tl.dot`
# returns garbage. `round_to` and `dot` work around both.
INTERPRETED: tl.constexpr = tl.constexpr(launch.INTERPRETED)


@triton.jit
def launch_dependents(OVERLAP: tl.constexpr):
    """Let the next kernel start as soon as all programs of this one have started."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def await_inputs(OVERLAP: tl.constexpr):
    """Wait until all earlier kernels have ended and their writes are visible.

    Before it, a kernel must neither read nor write: earlier kernels may still do both. It may
    prefetch: the L2 cache sees all writes.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(ptr, first, last, PREFETCH: tl.constexpr):
    """Ask the L2 cache for the elements from `first` to before `last`, at most PREFETCH bytes of
    them, without waiting. They go by lines of 128 bytes."""
    if PREFETCH > 0:
        LINE: tl.constexpr = 1024 // ptr.dtype.element_ty.primitive_bitwidth  # elements
        elements = first + tl.arange(0, PREFETCH // 128) * LINE
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [ptr + tl.minimum(elements, last - 1)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def dot(a, b, acc):
    """acc + a @ b with float32 accumulation; float32 operands are not rounded to TF32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Convert float32 to `dtype`, rounding to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(x == x, (bits & 0xFFFF0000).to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def load_rows(
    pointers, row_mask, channels, D: tl.constexpr, PADDED_D: tl.constexpr, MASKED: tl.constexpr
):
    """A tile (rows, PADDED_D); zero where `row_mask` is false and beyond D, whatever is in memory.

    With MASKED false all rows are known to be valid, and `row_mask` is ignored.
    """
    if MASKED:
        if D == PADDED_D:
            tile = tl.load(pointers, mask=row_mask[:, None], other=0.0)
        else:
            tile = tl.load(pointers, mask=row_mask[:, None] & (channels[None, :] < D), other=0.0)
    else:
        if D == PADDED_D:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=channels[None, :] < D, other=0.0)
    return tile


@triton.jit
def row_offsets(rows, channels, stride_t, stride_h, HEADS: tl.constexpr):
    """Offsets (M, PADDED_D) of folded rows, row = t * HEADS + h, from row 0 of their group."""
    offsets = (rows // HEADS).to(tl.int64) * stride_t + (rows % HEADS).to(tl.int64) * stride_h
    return offsets[:, None] + channels[None, :]


@triton.jit
def group_offset(b, g, stride_b, stride_g):
    """Offset of group g in row b of the batch."""
    return b.to(tl.int64) * stride_b + g.to(tl.int64) * stride_g


@triton.jit
def slot_pointer(ptr, b, slot, g, stride_b, stride_s, stride_g):
    """Address of one slot's key or value in group g of row b."""
    return (
        ptr + b.to(tl.int64) * stride_b + g.to(tl.int64) * stride_g + slot.to(tl.int64) * stride_s
    )


@triton.jit
def first_position(start_ptr, offset, b):
    """Position of row b's first new token."""
    if start_ptr is None:
        start = offset
    else:
        start = offset + tl.load(start_ptr + b).to(tl.int32)
    return start


@triton.jit
def left_padding_of(left_ptr, b):
    """How many of row b's first slots are padding."""
    if left_ptr is None:
        left = tl.full((), 0, tl.int32)
    else:
        left = tl.maximum(tl.load(left_ptr + b).to(tl.int32), 0)
    return left


@triton.jit
def new_tokens_of(lengths_ptr, T, b):
    """How many of row b's T new tokens are valid."""
    if lengths_ptr is None:
        new = T
    else:
        new = tl.minimum(tl.load(lengths_ptr + b).to(tl.int32), T)
    return new


@triton.jit
def visible_keys(tile, start, new, size, M: tl.constexpr, HEADS: tl.constexpr):
    """Two bounds of the causal mask for a tile of M rows: every row of it sees the keys below the
    first, and no row sees any key from the second on. Keys count from the end of the padding.

    A query that is padding has a negative position and sees nothing.
    """
    first_t = tile * M // HEADS
    last_t = tl.minimum((tile * M + M - 1) // HEADS, new - 1)
    end = tl.where(first_t < new, tl.maximum(tl.minimum(start + last_t + 1, size), 0), 0)
    return tl.maximum(tl.minimum(start + first_t + 1, end), 0), end


@triton.jit
def load_seed(seed_ptr):
    """The dropout seed, or 0 without dropout."""
    if seed_ptr is None:
        seed = 0
    else:
        seed = tl.load(seed_ptr)
    return seed


@triton.jit
def dropout_keeps(seed, b, g, rows, keys, dropout_p, G: tl.constexpr, HEADS: tl.constexpr):
    """Which probabilities are kept, for rows (M, 1) and keys (1, N), or (1, M) and (N, 1).

    Depends only on the seed, row of the batch, head, query and key, so that forward and backward
    agree whatever their tile sizes are.
    """
    zero = (rows + keys) * 0
    batch_head = zero + b * (G * HEADS) + g * HEADS + rows % HEADS
    query = zero + rows // HEADS
    bits, _, _, _ = tl.philox(seed, zero + keys, query, batch_head, zero)
    return tl.random.uint_to_uniform_float(bits) >= dropout_p
