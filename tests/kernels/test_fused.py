"""The fused kernels for a few rows, each against its formula in float64.

On a GPU if there is one, else under Triton's interpreter; errors are judged as in
`test_kernels.py`. Newly allocated memory and empty cache slots hold NaN.
"""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not available on this platform")

from mqa_kernels import (
    int8_linear,
    launch,
    linear_residual,
    norm_argmax,
    norm_linear,
    norm_lm_head,
    norm_qkv_to_cache,
    reference,
    tuning,
)
from tests.kernels.error_rule import DEVICE, DTYPES, assert_as_accurate
from tests.kernels.fused_inputs import EPS, MARKS, cases, int8_weight, norm_inputs, randoms

pytestmark = MARKS


# Rows, C, N: widths that are no powers of two, N that no block divides, every padding of the rows,
# one and several chunks of the statistics, one and several steps along K.
@cases(
    [(1, 48, 70), (2, 80, 33), (3, 48, 16), (8, 768, 40), (9, 80, 7), (16, 768, 65)],
    [(17, 4200, 16), (32, 300, 70), (33, 48, 150)],
)
def test_norm_linear_is_as_accurate_as_plain_pytorch(shape, dtype):
    inputs, wide = norm_inputs(dtype, *shape)
    ours, plain = norm_linear(*inputs), reference.norm_linear(*inputs)
    assert_as_accurate(ours, plain, reference.norm_linear(*wide))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_activations_are_as_accurate_as_plain_pytorchs(activation, dtype):
    inputs, wide = norm_inputs(dtype, 2, 48, 90)
    ours = norm_linear(*inputs, activation)
    plain, exact = (reference.norm_linear(*x, activation) for x in (inputs, wide))
    assert_as_accurate(ours, plain, exact)


@cases(
    [(1, 3000, 20), (3, 48, 33), (8, 768, 16), (16, 80, 70)],
    [(17, 80, 33), (32, 600, 70), (64, 48, 150)],
)
def test_linear_residual_is_as_accurate_as_plain_pytorch(shape, dtype):
    rows, K, N = shape
    inputs, wide = randoms(dtype, (rows, K), (N, K), (N,), (rows, N))
    ours, plain = linear_residual(*inputs), reference.linear_residual(*inputs)
    assert_as_accurate(ours, plain, reference.linear_residual(*wide))


class TestInt8Weights:
    """Compared with plain PyTorch on the dequantized weights, rounded to the dtype."""

    @cases([(1, 80, 70), (3, 51, 33), (16, 768, 65)], [(17, 80, 70), (64, 300, 33)])
    def test_norm_linear_is_as_accurate(self, shape, dtype):
        _, C, N = shape
        (*norm, _, bias), (*wide_norm, _, wide_bias) = norm_inputs(dtype, *shape)
        (weight, scale), (_, wide_scale) = int8_weight(N, C)
        inputs = *norm, weight, bias, "gelu", scale
        exact = reference.norm_linear(*wide_norm, weight, wide_bias, "gelu", wide_scale)
        assert_as_accurate(norm_linear(*inputs), reference.norm_linear(*inputs), exact)

    @cases([(1, 2100, 20), (3, 51, 33), (16, 80, 70)], [(32, 51, 70)])
    def test_linear_residual_is_as_accurate(self, shape, dtype):
        rows, K, N = shape
        inputs, wide = randoms(dtype, (rows, K), (N,), (rows, N))
        (weight, scale), (_, wide_scale) = int8_weight(N, K)
        x, bias, residual = inputs
        ours = linear_residual(x, weight, bias, residual, scale)
        plain = reference.linear_residual(x, weight, bias, residual, scale)
        x, bias, residual = wide
        exact = reference.linear_residual(x, weight, bias, residual, wide_scale)
        assert_as_accurate(ours, plain, exact)

    # Rows, K, N: every padding of the rows, one and several steps along K, edges of all three.
    @cases([(1, 80, 70), (16, 80, 70)], [(17, 600, 70), (33, 600, 70), (64, 600, 70)])
    def test_int8_linear_is_as_accurate(self, shape, dtype):
        rows, K, N = shape
        (x, bias), (wide_x, wide_bias) = randoms(dtype, (rows, K), (N,))
        (weight, scale), (_, wide_scale) = int8_weight(N, K)
        plain = F.linear(x, reference.dequantized(weight, scale, dtype), bias)
        exact = F.linear(wide_x, weight * wide_scale[:, None], wide_bias)
        assert_as_accurate(int8_linear(x, weight, scale, bias), plain, exact)
        without = int8_linear(x, weight, scale)
        assert torch.equal(without, int8_linear(x, weight, scale, torch.zeros_like(bias)))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_queries_keys_and_values_are_as_accurate(self, dtype):
        (*norm, _, bias), (*wide_norm, _, wide_bias) = norm_inputs(dtype, 6, 60, 180)
        (weight, scale), (_, wide_scale) = int8_weight(180, 60)
        lengths = torch.tensor([0, 5], device=DEVICE)
        ours, plain, exact = (
            torch.zeros(2, 9, 3, 40, dtype=kind, device=DEVICE)
            for kind in (dtype, dtype, torch.float64)
        )
        assert_as_accurate(
            norm_qkv_to_cache(*norm, weight, bias, ours, lengths, scale),
            reference.norm_qkv_to_cache(*norm, weight, bias, plain, lengths, scale),
            reference.norm_qkv_to_cache(*wide_norm, weight, wide_bias, exact, lengths, wide_scale),
        )
        assert_as_accurate(ours, plain, exact)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_norm_argmax_is_the_argmax_of_the_logits(self, dtype):
        (*norm, _, _), _ = norm_inputs(dtype, 3, 51, 130)
        weight = int8_weight(130, 51)[0]
        ids, values = norm_argmax(*norm, *weight)
        logits = norm_lm_head(*norm, *weight)
        assert torch.equal(ids, logits.argmax(-1))
        assert torch.equal(values, logits.amax(-1).float())

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_int8_value_is_converted_exactly(self, dtype):
        integers = torch.arange(-128, 128, device=DEVICE).to(torch.int8)
        weight, scale = (
            integers[:, None].expand(-1, 16).contiguous(),
            torch.ones(256, device=DEVICE),
        )
        x = torch.zeros(1, 16, dtype=dtype, device=DEVICE)
        x[0, 3] = 1
        out = linear_residual(
            x, weight, None, torch.zeros_like(weight[None, :, 0], dtype=dtype), scale
        )
        assert torch.equal(out[0], integers.to(dtype))


@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("rows", [1, 8, 16])
def test_every_tile_shape_is_as_accurate(rows, block, monkeypatch):
    inputs, wide = norm_inputs(torch.float32, rows, 300, 100)
    tiles = tuning.linear_tiles(torch.float32, rows, 100, 300)
    tiles = tiles._replace(BLOCK_N=block, SPLIT_K=128 // block, BLOCK_K=16, CHUNK=64)
    monkeypatch.setattr("mqa_kernels.fused_ops.linear_tiles", lambda *_: tiles)
    exact = reference.norm_linear(*wide)
    assert_as_accurate(norm_linear(*inputs), reference.norm_linear(*inputs), exact)


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("rows", [17, 64])
def test_every_tile_shape_of_many_rows_is_as_accurate(rows, block, monkeypatch):
    inputs, wide = norm_inputs(torch.bfloat16, rows, 300, 100)
    tiles = tuning.linear_tiles(torch.bfloat16, rows, 100, 300)
    tiles = tiles._replace(BLOCK_N=block, BLOCK_K=64)
    monkeypatch.setattr("mqa_kernels.fused_ops.linear_tiles", lambda *_: tiles)
    exact = reference.norm_linear(*wide)
    assert_as_accurate(norm_linear(*inputs), reference.norm_linear(*inputs), exact)


@pytest.fixture
def many_float32_rows(monkeypatch):
    """The kernels of 17 to 64 rows take float32 too: they only are too slow for it."""
    monkeypatch.setitem(launch.MAX_ROWS, torch.float32, 64)


@pytest.mark.usefixtures("many_float32_rows")
@pytest.mark.parametrize("rows", [1, 16, 17])
def test_layer_norm_is_as_accurate_with_a_large_mean_and_outliers(rows):
    inputs, wide = norm_inputs(torch.float32, rows, 768, 16)
    for x in (inputs[0], wide[0]):
        x += 500  # far above the standard deviation
        x[:, :40] -= 3000  # so that the first chunk's mean is not the row's
    exact = reference.norm_linear(*wide)
    assert_as_accurate(norm_linear(*inputs), reference.norm_linear(*inputs), exact)


def test_biases_are_optional():
    (x, weight, residual), _ = randoms(torch.float32, (2, 48), (20, 48), (2, 20))
    zero = torch.zeros(20, device=DEVICE)
    expected = linear_residual(x, weight, zero, residual)
    assert torch.equal(linear_residual(x, weight, None, residual), expected)
    norm = torch.ones(48, device=DEVICE), torch.zeros(48, device=DEVICE), EPS
    assert torch.equal(norm_lm_head(x, *norm, weight), norm_linear(x, *norm, weight, zero))


@pytest.mark.parametrize("rows", [3, 17])
def test_nan_stays_in_its_row(rows):
    inputs, _ = norm_inputs(torch.float16, rows, 48, 20)
    inputs[0][1, 7] = float("nan")
    for activation in ("none", "gelu", "gelu_tanh", "relu"):
        out = norm_linear(*inputs, activation)
        assert out.isnan().all(-1).tolist() == [row == 1 for row in range(rows)]
        assert out[2:].isfinite().all()


# B, T, C, G, D, max_length, lengths. The last row of the third exceeds the cache.
CACHE_SHAPES = [
    (1, 1, 48, 1, 16, 5, [4]),
    (2, 3, 60, 3, 20, 9, [0, 5]),
    (3, 2, 80, 1, 40, 8, [0, 5, 7]),
    (16, 1, 48, 4, 12, 4, [3, 0, 1, 2] * 4),
    (2, 4, 192, 1, 32, 6, [1, 2]),
]
MANY_CACHE_SHAPES = [
    (17, 1, 48, 1, 16, 5, [4, 0, 2, *[1] * 14]),
    (11, 3, 60, 3, 20, 4, [*range(11)]),
]


@cases(CACHE_SHAPES, MANY_CACHE_SHAPES)
def test_queries_are_returned_and_keys_and_values_written_to_their_slots(shape, dtype):
    B, T, C, G, D, max_length, lengths = shape
    inputs, wide = norm_inputs(dtype, B * T, C, C + 2 * G * D)
    lengths = torch.tensor(lengths, device=DEVICE)
    caches = []
    for kind in (dtype, dtype, torch.float64):
        kv = torch.full((2, B, max_length, G, 2 * D), float("nan"), dtype=kind, device=DEVICE)
        caches.append(kv)
    ours = norm_qkv_to_cache(*inputs, caches[0][1], lengths)
    plain = reference.norm_qkv_to_cache(*inputs, caches[1][1], lengths)
    exact = reference.norm_qkv_to_cache(*wide, caches[2][1], lengths)
    assert ours.shape == (B, T, C // D, D)
    assert_as_accurate(ours, plain, exact)

    written = ~caches[2].isnan()
    assert torch.equal(~caches[0].isnan(), written)  # nothing else was written, nor the other layer
    assert_as_accurate(*(kv[written] for kv in caches))


def test_positions_outside_the_cache_are_not_written():
    inputs, _ = norm_inputs(torch.float32, 3, 48, 48 + 32)
    slots = torch.zeros(3, 4, 1, 32, device=DEVICE)
    norm_qkv_to_cache(*inputs, slots, torch.tensor([4, -1, 2**40], device=DEVICE))
    assert (slots == 0).all()


def test_slots_may_be_a_view_with_gaps():
    inputs, _ = norm_inputs(torch.float32, 2, 48, 48 + 32)
    lengths = torch.tensor([1, 0], device=DEVICE)
    whole = torch.zeros(4, 6, 3, 40, device=DEVICE)
    view, dense = whole[::2, 1:4, 1:2, 4:36], torch.zeros(2, 3, 1, 32, device=DEVICE)
    q = norm_qkv_to_cache(*inputs, view, lengths)
    assert torch.equal(norm_qkv_to_cache(*inputs, dense, lengths), q)
    assert torch.equal(view, dense)
    assert whole.count_nonzero() == dense.count_nonzero() == 64


class TestOperators:
    def test_opcheck_accepts_them(self):
        inputs, _ = norm_inputs(torch.float32, 4, 48, 48 + 32)
        ops = torch.ops.mqa_kernels
        x, *norm, weight, bias = inputs
        torch.library.opcheck(ops.linear, (x, weight, None, bias, None, *norm, "gelu"))
        torch.library.opcheck(ops.norm_argmax, (*inputs[:4], *int8_weight(80, 48)[0]))
        residual = torch.randn(4, 80, device=DEVICE)
        torch.library.opcheck(ops.linear, (x, weight, None, bias, residual))
        x = torch.randn(20, 48, dtype=torch.bfloat16, device=DEVICE)
        torch.library.opcheck(ops.linear, (x, *int8_weight(80, 48)[0], None))
        slots = torch.zeros(2, 5, 1, 32, device=DEVICE)
        lengths = torch.tensor([3, 0], device=DEVICE)
        torch.library.opcheck(ops.norm_qkv_to_cache, (*inputs, slots, lengths))

    def test_torch_compile_writes_the_cache_in_one_graph(self):
        inputs, _ = norm_inputs(torch.float32, 2, 48, 48 + 32)
        lengths = torch.tensor([3, 0], device=DEVICE)
        plain, slots = (torch.zeros(2, 5, 1, 32, device=DEVICE) for _ in range(2))

        @torch.compile(fullgraph=True, backend="aot_eager")
        def step(slots):
            return norm_qkv_to_cache(*inputs, slots, lengths) * 2

        assert torch.equal(step(slots), norm_qkv_to_cache(*inputs, plain, lengths) * 2)
        assert torch.equal(slots, plain)
        assert (slots != 0).any()


class TestRefusals:
    def inputs(self, rows=2, C=48, N=80):
        return norm_inputs(torch.float32, rows, C, N)[0]

    def test_an_argument_that_requires_a_gradient(self):
        inputs = self.inputs()
        inputs[4].requires_grad_()
        with pytest.raises(ValueError, match=r"weight requires a gradient.*no_grad"):
            norm_linear(*inputs)
        with torch.no_grad():
            norm_linear(*inputs)  # a parameter

    def test_too_many_rows(self):
        for dtype, most in ((torch.float32, 16), (torch.float16, 64)):
            inputs, _ = norm_inputs(dtype, most + 1, 48, 80)
            with pytest.raises(ValueError, match=f"x has {most + 1} rows: .* take 1 to {most};"):
                norm_linear(*inputs)
            with pytest.raises(ValueError, match=f"x has {most + 1} rows"):
                int8_linear(inputs[0], *int8_weight(80, 48)[0])

    def test_an_unknown_activation(self):
        with pytest.raises(ValueError, match="activation is 'silu'"):
            norm_linear(*self.inputs(), "silu")
        with pytest.raises(KeyError, match="silu"):
            reference.norm_linear(*self.inputs(), "silu")
        x, *norm, weight, bias = self.inputs()
        with pytest.raises(Exception, match="unknown activation"):  # of the compiler or interpreter
            torch.ops.mqa_kernels.linear(x, weight, None, bias, None, *norm, "silu")

    def test_an_unknown_dtype_for_int8_linear(self):
        x = torch.zeros(20, 48, dtype=torch.float64, device=DEVICE)
        with pytest.raises(ValueError, match=r"x is torch\.float64: the kernels take"):
            int8_linear(x, *int8_weight(80, 48)[0])

    @pytest.mark.parametrize(
        ("position", "change", "message"),
        [
            (0, lambda x: x[:, :40], "x must be"),
            (0, lambda x: x.double(), "float32, bfloat16 or float16"),
            (1, lambda x: x[:40], r"norm_weight is torch.float32 \(40,\)"),
            (4, lambda x: x.half(), "weight is torch.float16"),
            (4, lambda x: x.mT.contiguous().mT, "weight has strides"),
            (5, lambda x: x[:3], r"bias is torch.float32 \(3,\)"),
        ],
        ids=["widths", "dtype", "norm", "mixed dtypes", "strides", "bias"],
    )
    def test_mismatched_inputs(self, position, change, message):
        inputs = self.inputs()
        inputs[position] = change(inputs[position])
        with pytest.raises(ValueError, match=message):
            norm_linear(*inputs)

    def test_int8_without_scales_and_scales_without_int8(self):
        *norm, floats, bias = self.inputs()
        integers, scale = int8_weight(80, 48)[0]
        with pytest.raises(ValueError, match=r"weight is torch\.int8 and weight_scale None"):
            norm_linear(*norm, integers, bias)
        with pytest.raises(ValueError, match="no other weight takes one"):
            norm_linear(*norm, floats, bias, weight_scale=scale)
        with pytest.raises(ValueError, match=r"weight_scale is torch.float16 \(80,\)"):
            norm_argmax(*norm, integers, scale.half())
        with pytest.raises(ValueError, match=r"weight_scale is torch.float32 \(79,\)"):
            linear_residual(norm[0], integers, bias, torch.zeros(2, 80, device=DEVICE), scale[1:])

    def test_a_residual_of_another_shape(self):
        x, _, _, _, weight, bias = self.inputs()
        with pytest.raises(ValueError, match="residual is"):
            linear_residual(x, weight, bias, x)

    def test_a_mismatched_cache(self):
        inputs, lengths = self.inputs(), torch.zeros(2, dtype=torch.int64, device=DEVICE)
        slots = torch.zeros(2, 5, 1, 32, device=DEVICE)
        with pytest.raises(ValueError, match="do not match"):
            norm_qkv_to_cache(*inputs, slots[..., :24], lengths)
        with pytest.raises(ValueError, match="slots is torch"):
            norm_qkv_to_cache(*inputs, slots.half(), lengths)
        with pytest.raises(ValueError, match="contiguous along the last"):
            norm_qkv_to_cache(*inputs, slots.repeat(1, 1, 1, 2)[..., ::2], lengths)
        with pytest.raises(ValueError, match="lengths is torch"):
            norm_qkv_to_cache(*inputs, slots, lengths.int())
        with pytest.raises(ValueError, match=r"lengths is .* contiguous"):
            norm_qkv_to_cache(*inputs, slots, lengths[:1].expand(2))

    def test_a_cpu_without_the_interpreter(self, monkeypatch):
        monkeypatch.setattr("mqa_kernels.launch.INTERPRETED", False)
        with pytest.raises(ValueError, match="run on a CUDA device"):
            norm_linear(*(x.cpu() if torch.is_tensor(x) else x for x in self.inputs()))
