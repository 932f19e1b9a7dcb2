"""`attention` against float64, on a GPU if there is one, else under Triton's interpreter.

Errors are judged by FlashAttention's rule: at most twice (for gradients three times) those of plain
PyTorch in the same dtype, plus 1e-5. Slots after a row's end hold NaN.
"""

import pytest
import torch

from mqa_gpt import GPT, GPTConfig, generate
from mqa_gpt.attention import reference_attention, select_attention

pytest.importorskip("triton", reason="Triton is not available on this platform")

from mqa_kernels import attention, launch, reference, tuning
from tests.kernels.error_rule import DEVICE, DTYPES, assert_as_accurate

pytestmark = pytest.mark.slow

# B, T, S, H, G, D, start: sizes at the edges of blocks; H and D that are no powers of two.
SHAPES = [
    (2, 1, 1, 1, 1, 16, [0, 0]),
    (1, 63, 63, 3, 1, 32, [0]),
    (2, 64, 65, 2, 2, 64, [0, 1]),
    (1, 65, 111, 3, 3, 80, [46]),
    (3, 1, 128, 12, 1, 96, [127, 0, 64]),
    (1, 1, 1000, 16, 1, 128, [999]),
    (2, 4, 300, 22, 2, 24, [17, 296]),
    (1, 2, 64, 32, 1, 256, [62]),
    (1, 4, 111, 48, 1, 16, [107]),
    (2, 1, 200, 48, 1, 128, [199, 40]),
    (2, 3, 20, 4, 2, 5, [0, 9]),
    (2, 9, 4, 6, 1, 16, [0, 30]),  # queries after the last slot see all slots
]
NAMES = ["B{}-T{}-S{}-H{}-G{}-D{}".format(*shape[:6]) for shape in SHAPES]


def make_inputs(B, T, S, H, G, D, start, dtype, seed=0):
    """q (B, T, H, D), k and v (B, S, G, D) as views of fused projections, and start (B,).

    Slots that no query sees hold NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(B, T, (H + 2) * D, generator=generator)
    q = qkv.to(DEVICE, dtype)[..., : H * D].view(B, T, H, D)
    kv = torch.randn(B, S, G, 2 * D, generator=generator).to(DEVICE, dtype)
    for b, first in enumerate(start):
        kv[b, first + T :] = float("nan")
    k, v = kv.chunk(2, dim=-1)
    return q, k, v, torch.tensor(start, device=DEVICE)


def without_nan(*tensors):
    return [tensor.nan_to_num(0.0) for tensor in tensors]


def exact_attention(q, k, v, start, scale):
    """Attention in float64 throughout (the model's softmax is float32)."""
    q, k, v = q.double(), k.double(), v.double()
    return reference.attention(q, k, v, reference.visible_slots(q, k, start), scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=NAMES)
def test_forward_is_as_accurate_as_plain_pytorch(shape, dtype):
    q, k, v, start = make_inputs(*shape, dtype)
    scale = shape[5] ** -0.5
    out, lse = attention(q, k, v, start, return_lse=True)

    k, v = without_nan(k, v)
    plain = reference_attention(q, k, v, start, scale)
    assert_as_accurate(out, plain, exact_attention(q, k, v, start, scale))
    visible = reference.visible_slots(q, k, start)
    exact_lse = reference.log_sum_exp(q.double(), k.double(), visible, scale)
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=1e-5)


def test_an_int_start_equals_the_same_start_in_a_tensor():
    q, k, v, start = make_inputs(2, 5, 40, 4, 1, 16, [9, 9], torch.float32)
    assert torch.equal(attention(q, k, v, 9), attention(q, k, v, start))


def test_scale_multiplies_the_scores():
    q, k, v, _ = make_inputs(1, 7, 7, 4, 1, 16, [0], torch.float32)
    assert_as_accurate(
        attention(q, k, v, 0, 0.7),
        reference_attention(q, k, v, 0, 0.7),
        exact_attention(q, k, v, 0, 0.7),
    )


def test_tokens_beyond_a_rows_length_get_zeros_and_influence_nothing():
    q, k, v, _ = make_inputs(3, 40, 40, 4, 1, 16, [0, 0, 0], torch.float32)
    q, k, v = q.clone(), k.clone(), v.clone()
    lengths = [40, 17, 1]
    for b, length in enumerate(lengths):
        q[b, length:] = k[b, length:] = v[b, length:] = float("nan")
    out = attention(q, k, v, lengths=torch.tensor(lengths, device=DEVICE))
    for b, length in enumerate(lengths):
        solo = attention(*(x[b : b + 1, :length] for x in (q, k, v)))
        torch.testing.assert_close(out[b : b + 1, :length], solo, atol=1e-6, rtol=1e-6)
        assert (out[b, length:] == 0).all()


@pytest.mark.parametrize("splits", [2, 3, 7])
def test_splitting_the_keys_gives_the_same_attention(splits, monkeypatch):
    q, k, v, start = make_inputs(2, 2, 150, 6, 2, 32, [3, 148], torch.float32)
    whole, whole_lse = attention(q, k, v, start, return_lse=True)
    monkeypatch.setattr("mqa_kernels.forward.key_splits", lambda *_: splits)
    out, lse = attention(q, k, v, start, return_lse=True)  # some splits of row 0 are empty
    torch.testing.assert_close(out, whole, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse, whole_lse, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_query_makes_its_own_row_nan_and_no_other(value, splits, monkeypatch):
    monkeypatch.setattr("mqa_kernels.forward.key_splits", lambda *_: splits)
    q, k, v, _ = make_inputs(1, 3, 200, 2, 1, 16, [197], torch.float32)
    q = q.clone()
    q[0, 1, 1, 4] = value
    out, lse = attention(q, k, v, 197, return_lse=True)
    expected = torch.zeros(1, 3, 2, dtype=torch.bool, device=DEVICE)
    expected[0, 1, 1] = True
    assert torch.equal(out.isnan().all(-1), expected)
    assert torch.equal(lse.isnan(), expected)


@pytest.mark.parametrize(("B", "T", "S"), [(0, 3, 3), (2, 0, 5), (2, 3, 0)])
def test_empty_inputs_give_empty_or_zero_outputs_and_gradients(B, T, S):
    q, k, v = (torch.randn(B, n, heads, 16) for n, heads in ((T, 4), (S, 1), (S, 1)))
    q, k, v = (x.to(DEVICE).requires_grad_() for x in (q, k, v))
    out = attention(q, k, v)
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(q))
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in (q, k, v))


BACKWARD_SHAPES = [
    (1, 63, 63, 3, 1, 32, [0]),
    (2, 17, 40, 4, 2, 24, [23, 0]),
    (1, 70, 70, 2, 2, 16, [0]),
    (1, 33, 33, 5, 1, 80, [0]),
    (1, 12, 12, 22, 1, 128, [0]),
    (1, 5, 5, 4, 1, 256, [0]),
    (2, 9, 4, 6, 1, 16, [0, 30]),
]


def out_and_gradients(attend, q, k, v, do):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, do)


def gradients(attend, q, k, v, do):
    return out_and_gradients(attend, q, k, v, do)[1:]


def check_gradients(shape, dtype):
    """Judge the gradients of one shape by the error rule."""
    q, k, v, start = make_inputs(*shape, dtype)
    do = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    scale = shape[5] ** -0.5
    ours = gradients(lambda *x: attention(*x, start), q, k, v, do)

    k, v = without_nan(k, v)
    plain = gradients(lambda *x: reference_attention(*x, start, scale), q, k, v, do)
    wide = [x.double() for x in (q, k, v, do)]
    exact = gradients(lambda *x: exact_attention(*x, start, scale), *wide)
    for one, other, truth in zip(ours, plain, exact, strict=True):
        assert_as_accurate(one, other, truth, factor=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", BACKWARD_SHAPES, ids="B{0[0]}-T{0[1]}-S{0[2]}".format)
def test_gradients_are_as_accurate_as_plain_pytorchs(shape, dtype):
    check_gradients(shape, dtype)


def test_head_strides_may_exceed_32_bits():
    """As in a view of a larger tensor; the memory in between is never touched."""
    q, k, v, _ = make_inputs(1, 5, 5, 3, 1, 16, [0], torch.bfloat16)
    far = torch.empty_strided(q.shape, (80, 16, 2**30 + 8, 1), dtype=q.dtype, device=DEVICE)
    far.copy_(q)
    do = torch.randn(q.shape).to(DEVICE, q.dtype)
    near = gradients(attention, q, k, v, do)
    leaves = [far.requires_grad_(), *(x.detach().requires_grad_() for x in (k, v))]
    grads = torch.autograd.grad(attention(*leaves), leaves, do)
    for one, other in zip(grads, near, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("architecture", [80, 90])
def test_gradients_are_as_accurate_with_the_tiles_of_every_gpu(architecture, monkeypatch):
    monkeypatch.setattr(
        "mqa_kernels.backward.key_tiles",
        lambda dtype, D, dropout, _: tuning.key_tiles(dtype, D, dropout, architecture),
    )
    for shape in ((1, 40, 150, 4, 1, 128, [110]), (1, 33, 33, 3, 1, 80, [0])):
        check_gradients(shape, torch.bfloat16)


def test_kernels_overlap_from_sm_90_on_unless_switched_off(monkeypatch):
    gpu = torch.device("cuda", 0)
    for capability, overlaps in (((8, 9), False), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        launch.architecture.cache_clear()
        assert launch.overlap(gpu)["OVERLAP"] is overlaps
        assert launch.architecture(gpu) == 10 * capability[0] + capability[1]
    monkeypatch.setenv("MQA_KERNELS_PDL", "0")
    assert launch.overlap(gpu) == {"OVERLAP": False}
    monkeypatch.setenv("MQA_KERNELS_PDL", "off")
    with pytest.raises(ValueError, match="MQA_KERNELS_PDL is 'off': it must be 0 or 1"):
        launch.overlap(gpu)
    launch.architecture.cache_clear()


def test_the_backward_formulas_are_the_derivative_of_attention():
    q, k, v, _ = make_inputs(2, 6, 9, 6, 2, 8, [3, 3], torch.float32)
    q, k, v = q.double(), k.double(), v.double()
    do = torch.randn_like(q)
    out = exact_attention(q, k, v, 3, 0.4)
    ours = reference.attention_backward(do, q, k, v, out, 3, 0.4)
    exact = gradients(lambda *x: exact_attention(*x, 3, 0.4), q, k, v, do)
    for one, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, truth)


@pytest.mark.parametrize("splits", [2, 3])
def test_splitting_the_rows_gives_the_same_key_gradients(splits, monkeypatch):
    q, k, v, _ = make_inputs(1, 45, 45, 4, 1, 16, [0], torch.float32)
    do = torch.randn_like(q)
    whole = gradients(attention, q, k, v, do)
    monkeypatch.setattr("mqa_kernels.backward.row_splits", lambda *_: splits)
    for one, other in zip(gradients(attention, q, k, v, do), whole, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_more_key_blocks_than_cuda_can_start_are_refused():
    q = torch.randn(1, 1, 2, 16, device=DEVICE, requires_grad=True)
    k = torch.randn(1, 1, 1, 16, device=DEVICE).expand(-1, 65_535 * 32 + 1, -1, -1)
    with pytest.raises(ValueError, match="S is 2097121: the backward kernels take at most 2097120"):
        attention(q, k, k).sum().backward()


def test_gradients_are_the_same_bits_in_every_run():
    q, k, v, _ = make_inputs(1, 40, 40, 6, 1, 16, [0], torch.bfloat16)
    do = torch.randn_like(q)
    first, second = (gradients(attention, q, k, v, do) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_tokens_beyond_a_rows_length_get_no_gradient():
    q, k, v, _ = make_inputs(2, 20, 20, 4, 1, 16, [0, 0], torch.float32)
    lengths = torch.tensor([20, 6], device=DEVICE)
    dq, dk, dv = gradients(lambda *x: attention(*x, lengths=lengths), q, k, v, torch.randn_like(q))
    assert all((x[1, 6:] == 0).all() and (x[1, :6] != 0).any() for x in (dq, dk, dv))


@pytest.mark.parametrize(("splits", "dropout_p"), [(1, 0.0), (3, 0.2)])
def test_left_padded_rows_equal_their_solo_runs(splits, dropout_p, monkeypatch):
    # 75 slots, the last 20 of them new. Padding: none, up to the middle of a block, into the new
    # tokens, everything.
    monkeypatch.setattr("mqa_kernels.forward.key_splits", lambda *_: splits)
    monkeypatch.setattr("mqa_kernels.backward.row_splits", lambda *_: splits)
    B, T, S, padding = 4, 20, 75, [0, 37, 63, 75]
    q, k, v, _ = make_inputs(B, T, S, 4, 2, 24, [S - T] * B, torch.float32)
    do = torch.randn_like(q)
    k, v = k.clone(), v.clone()
    for b, left in enumerate(padding):
        k[b, :left] = v[b, :left] = float("nan")
    left_padding = torch.tensor(padding, device=DEVICE)
    left_padding[0] = -3  # counts as none
    seed = torch.tensor([7], device=DEVICE) if dropout_p else None

    def padded(q, k, v):
        return attention(q, k, v, S - T, None, dropout_p, seed=seed, left_padding=left_padding)

    ours = out_and_gradients(padded, q, k, v, do)
    for b, left in enumerate(padding):
        new = max(0, left - (S - T))  # padding among the new tokens
        assert all((x[b, :new] == 0).all() for x in ours[:2])
        assert all((x[b, :left] == 0).all() for x in ours[2:])
        if left == S or (new and dropout_p):  # dropout numbers the queries, padding included
            continue
        start = max(0, S - T - left)

        def solo(q, k, v, start=start, b=b):
            # At the same index of a batch, on which dropout depends.
            rows = [torch.cat([torch.zeros_like(x)] * b + [x]) for x in (q, k, v)]
            return attention(*rows, start, None, dropout_p, seed=seed)[b:]

        one = q[b : b + 1, new:], k[b : b + 1, left:], v[b : b + 1, left:]
        theirs = out_and_gradients(solo, *one, do[b : b + 1, new:])
        for mine, other, first in zip(ours, theirs, (new, new, left, left), strict=True):
            torch.testing.assert_close(mine[b : b + 1, first:], other, atol=1e-5, rtol=1e-5)


class TestDropout:
    def inputs(self):
        q, k, v, _ = make_inputs(2, 20, 20, 4, 2, 16, [0, 0], torch.float32)
        return q, k, v

    def kept(self, p, seed, B=2, T=20, S=20, H=4, G=2):
        """Which probabilities are kept, (B, T, H, S), read off attention over one-hot values."""
        D = 32
        q = torch.zeros(B, T, H, D, device=DEVICE)
        k = torch.zeros(B, S, G, D, device=DEVICE)
        v = torch.eye(S, D, device=DEVICE)[None, :, None].expand(B, S, G, D).contiguous()
        out = attention(q, k, v, S - 1, dropout_p=p, seed=seed)[..., :S]
        return out > 0

    def test_drops_the_requested_share(self):
        kept = self.kept(0.3, torch.tensor([5], device=DEVICE))
        assert kept.float().mean().item() == pytest.approx(0.7, abs=0.03)  # 3,200 draws

    def test_draws_differ_between_rows_heads_queries_and_seeds(self):
        kept = self.kept(0.5, torch.tensor([5], device=DEVICE))
        other = self.kept(0.5, torch.tensor([6], device=DEVICE))
        for one, two in [
            (kept[0], kept[1]),
            (kept[:, :, 0], kept[:, :, 2]),
            (kept[:, :, 0], kept[:, :, 1]),
            (kept[:, 0], kept[:, 1]),
            (kept, other),
        ]:
            assert (one == two).float().mean().item() == pytest.approx(0.5, abs=0.15)

    def test_multiplies_the_probabilities_by_the_kept_mask(self):
        q, k, v = self.inputs()
        seed = torch.tensor([11], device=DEVICE)
        kept = self.kept(0.4, seed).double()  # (B, T, H, S)
        do = torch.randn_like(q)

        def exact(q, k, v):
            return reference.attention(q, k, v, reference.visible_slots(q, k), 0.25, kept / 0.6)

        ours = gradients(lambda *x: attention(*x, 0, 0.25, 0.4, seed=seed), q, k, v, do)
        wide = gradients(exact, q.double(), k.double(), v.double(), do.double())
        for one, truth in zip(ours, wide, strict=True):
            torch.testing.assert_close(one.double(), truth, atol=2e-5, rtol=2e-5)

    def test_seeds_come_from_pytorchs_generator(self):
        q, k, v = self.inputs()
        outs = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            outs.append(attention(q, k, v, dropout_p=0.5))
        assert torch.equal(outs[0], outs[1])
        assert not torch.equal(outs[0], outs[2])


class TestOperators:
    def test_opcheck_accepts_the_forward_and_its_gradient(self):
        q, k, v, start = make_inputs(2, 3, 9, 4, 1, 16, [1, 6], torch.float32)
        k, v = without_nan(k, v)
        arguments = tuple(x.clone().requires_grad_() for x in (q, k, v))
        arguments += (start, 0, None, None, 0.25, 0.0, None)
        torch.library.opcheck(torch.ops.mqa_kernels.attention_forward, arguments)

    def test_torch_compile_keeps_it_in_one_graph(self):
        q, k, v, _ = make_inputs(1, 4, 4, 4, 1, 16, [0], torch.float32)
        compiled = torch.compile(lambda *x: attention(*x) * 2, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(q, k, v), attention(q, k, v) * 2)


@pytest.mark.parametrize("multi_query", [True, False], ids=["MQA", "MHA"])
def test_a_model_generates_the_same_tokens_with_the_kernels_as_with_the_reference(multi_query):
    config = GPTConfig(
        vocab_size=61, n_positions=40, n_embd=60, n_layer=2, n_head=3, n_inner=40,
        multi_query=multi_query, initializer_range=0.5,
    )  # fmt: skip
    model = GPT(config, backend="reference").to(DEVICE).eval()
    prompts = [[5, 9, 33, 2, 7], [8], [4, 4, 17]]
    expected = generate(model, prompts, 8, prefill_chunk=3)
    model.set_backend("triton")
    assert generate(model, prompts, 8, prefill_chunk=3) == expected


def test_the_kernels_refuse_a_cpu_without_the_interpreter(monkeypatch):
    monkeypatch.setattr("mqa_kernels.launch.INTERPRETED", False)
    with pytest.raises(ValueError, match="'triton' cannot run on cpu"):
        select_attention("triton", torch.device("cpu"))
    with pytest.raises(ValueError, match="run on a CUDA device"):
        attention(*(torch.randn(1, 2, 1, 16) for _ in range(3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), "q must be"),
        (lambda q, k, v: (q, k[:, :, :, :8], v), "do not match"),
        (lambda q, k, v: (q[:, :, :3], k, v), "G must divide H"),
        (lambda q, k, v: (q.double(), k.double(), v.double()), "float32, bfloat16 or float16"),
        (lambda q, k, v: (q, k.half(), v), "the same for all three"),
        (lambda q, k, v: (q.mT.contiguous().mT, k, v), "contiguous along D"),
    ],
    ids=["ndim", "head dim", "groups", "dtype", "mixed dtypes", "strides"],
)
def test_mismatched_inputs_are_refused(change, message):
    q, k, v = (torch.randn(1, 4, heads, 16, device=DEVICE) for heads in (4, 2, 2))
    with pytest.raises(ValueError, match=message):
        attention(*change(q, k, v))


def test_unusable_starts_seeds_dropout_and_scales_are_refused():
    q, k, v = (torch.randn(2, 4, heads, 16, device=DEVICE) for heads in (4, 1, 1))
    with pytest.raises(ValueError, match="one integer per row"):
        attention(q, k, v, torch.tensor([1, 2, 3], device=DEVICE))
    with pytest.raises(ValueError, match=r"float32: it must be int64 or int32"):
        attention(q, k, v, torch.tensor([0.7, 1.0], device=DEVICE))
    for seed in (torch.tensor([5.0]), torch.tensor([5, 6]), torch.tensor([5], dtype=torch.int32)):
        with pytest.raises(ValueError, match="it must be one int64"):
            attention(q, k, v, dropout_p=0.5, seed=seed.to(DEVICE))
    with pytest.raises(ValueError, match="at most 65535 "):
        attention(*(x[:1].expand(70_000, -1, -1, -1) for x in (q, k, v)))
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        attention(q, k, v, dropout_p=1.0)
    for scale in (0.0, -1.0, 1e-46, 3e38, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be above 1e-30 and below 1e30"):
            attention(q, k, v, scale=scale)
