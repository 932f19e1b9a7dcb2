from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mqa_gpt.attention import (
    acting_backend,
    auto_attention,
    causal_mask,
    positions_from,
    reference_attention,
    sdpa_attention,
    select_attention,
)

BACKENDS = [reference_attention, sdpa_attention]
CPU = torch.device("cpu")

# B, T, S, G, H, D: all different where they can be, with T = 1, T = S, and T < S
SHAPES = [
    (2, 7, 7, 1, 3, 20),
    (1, 1, 1, 1, 1, 8),
    (3, 1, 9, 1, 5, 17),
    (3, 1, 9, 5, 5, 17),
    (2, 4, 11, 1, 6, 33),
    (2, 4, 11, 6, 6, 33),
    (2, 5, 13, 2, 6, 24),  # grouped-query: the definition covers it, though no checkpoint has it
    (2, 1, 13, 2, 6, 24),
    (1, 19, 19, 3, 3, 80),
    (4, 3, 70, 1, 7, 96),
]


def inputs(B: int, T: int, S: int, G: int, H: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and keys and values as the cache gives them: two halves of one wider tensor."""
    q = torch.randn(B, T, H, D)
    k, v = torch.randn(B, S + 4, G, 2 * D)[:, :S].chunk(2, dim=-1)
    return q, k, v


def naive(q: Tensor, k: Tensor, v: Tensor, start: list[int], scale: float) -> Tensor:
    """Attention one row, query and head at a time, over the visible slots alone, in float64."""
    B, T, H, D = q.shape
    q, k, v = q.double(), k.double(), v.double()
    outputs = []
    for b in range(B):
        for t in range(T):
            for h in range(H):
                g = h * k.shape[2] // H  # consecutive query heads share a K/V head
                end = start[b] + t + 1
                weights = (k[b, :end, g] @ q[b, t, h] * scale).exp()
                outputs.append((weights / weights.sum()) @ v[b, :end, g])
    return torch.stack(outputs).view(B, T, H, D)


@pytest.mark.parametrize("attend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_a_softmax_over_the_keys_up_to_each_query(
    attend: Callable[..., Tensor], shape: tuple[int, ...]
) -> None:
    B, T, S, _, H, D = shape
    q, k, v = inputs(*shape)
    for scale in (D**-0.5, 1.0):
        y = attend(q, k, v, S - T, scale, 0.0)
        assert y.shape == (B, T, H, D)
        torch.testing.assert_close(
            y.double(), naive(q, k, v, [S - T] * B, scale), atol=2e-5, rtol=0
        )


@pytest.mark.parametrize("attend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_may_stand_at_different_positions(
    attend: Callable[..., Tensor], shape: tuple[int, ...]
) -> None:
    B, T, S, _, _, D = shape
    q, k, v = inputs(*shape)
    start = [(S - T) * (b + 1) // B for b in range(B)]
    y = attend(q, k, v, torch.tensor(start), D**-0.5, 0.0)
    torch.testing.assert_close(y.double(), naive(q, k, v, start, D**-0.5), atol=2e-5, rtol=0)


@pytest.mark.parametrize("attend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_start_for_all_rows_equals_the_same_start_given_per_row(
    attend: Callable[..., Tensor], shape: tuple[int, ...]
) -> None:
    B, T, S, _, _, D = shape
    q, k, v = inputs(*shape)
    together = attend(q, k, v, S - T, D**-0.5, 0.0)
    per_row = attend(q, k, v, torch.full((B,), S - T), D**-0.5, 0.0)
    torch.testing.assert_close(together, per_row, atol=2e-6, rtol=0)


@pytest.mark.parametrize("attend", BACKENDS)
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slots_behind_a_query_have_no_influence_at_all(
    attend: Callable[..., Tensor], T: int, dtype: torch.dtype
) -> None:
    start = torch.tensor([4, 0, 2])
    q, k, v = (x.to(dtype) for x in inputs(3, T, 4 + T, 1, 5, 24))
    expected = attend(q, k, v, start, 24**-0.5, 0.0)
    for b in range(3):
        k[b, start[b] + T :] = torch.finfo(dtype).max / 1e3
        v[b, start[b] + T :] = -torch.finfo(dtype).max / 1e3
    assert torch.equal(attend(q, k, v, start, 24**-0.5, 0.0), expected)


def test_a_query_does_not_see_later_queries_of_the_same_call() -> None:
    q, k, v = inputs(2, 6, 9, 1, 3, 20)
    for attend in BACKENDS:
        before = attend(q, k, v, 3, 0.2, 0.0)
        changed_k, changed_v = k.clone(), v.clone()
        changed_k[:, 7], changed_v[:, 7] = 50.0, -50.0  # the key of query 4
        after = attend(q, changed_k, changed_v, 3, 0.2, 0.0)
        assert torch.equal(after[:, :4], before[:, :4])
        assert not torch.isclose(after[:, 4:], before[:, 4:]).any()


@given(
    B=st.integers(1, 3),
    T=st.integers(1, 5),
    past=st.integers(0, 6),
    heads=st.sampled_from([(1, 1), (1, 2), (1, 7), (3, 3), (2, 4)]),
    D=st.integers(1, 40),
    ragged=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_both_backends_agree_on_any_shape(
    B: int, T: int, past: int, heads: tuple[int, int], D: int, ragged: bool, seed: int
) -> None:
    generator = torch.manual_seed(seed)
    q, k, v = inputs(B, T, past + T, *heads, D)
    start = torch.randint(past + 1, (B,), generator=generator) if ragged else past
    ours = sdpa_attention(q, k, v, start, D**-0.5)
    torch.testing.assert_close(
        ours, reference_attention(q, k, v, start, D**-0.5), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_low_precision_attention_is_as_close_to_float32_as_the_reference(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    _, T, S, _, _, D = shape
    q, k, v = (x.to(dtype) for x in inputs(16, *shape[1:]))
    exact = reference_attention(q.float(), k.float(), v.float(), S - T, D**-0.5)
    reference = (reference_attention(q, k, v, S - T, D**-0.5).float() - exact).abs().max()
    y = sdpa_attention(q, k, v, S - T, D**-0.5)
    assert y.dtype == dtype
    assert (y.float() - exact).abs().max() <= 2 * reference


@pytest.mark.parametrize("attend", BACKENDS)
def test_the_softmax_is_float32_in_low_precision(attend: Callable[..., Tensor]) -> None:
    """Uniform attention over 1,000 keys: a bfloat16 sum of the weights would stop at 256."""
    q, k = torch.zeros(1, 1, 3, 16, dtype=torch.bfloat16), torch.zeros(1, 1000, 1, 16)
    v = torch.ones(1, 1000, 1, 16, dtype=torch.bfloat16)
    y = attend(q, k.bfloat16(), v, 999, 0.25, 0.0)
    torch.testing.assert_close(y.float(), torch.ones(1, 1, 3, 16), atol=0.01, rtol=0)


@pytest.mark.parametrize("attend", BACKENDS)
def test_gradients_equal_those_of_the_naive_loop(attend: Callable[..., Tensor]) -> None:
    q, k, v = inputs(2, 4, 6, 1, 3, 5)
    weights = torch.randn(2, 4, 3, 5)
    gradients = []
    for function in (attend, lambda *a: naive(*a[:3], [2, 2], a[4])):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        (function(*leaves, 2, 0.4, 0.0) * weights).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attend", BACKENDS)
@pytest.mark.parametrize("T", [1, 4])
def test_dropout_drops_probabilities_and_keeps_their_mean(
    attend: Callable[..., Tensor], T: int
) -> None:
    q, k, v = torch.zeros(1, T, 2, 8), torch.randn(1, 4, 1, 8), torch.ones(1, 4, 1, 8)
    y = torch.cat([attend(q, k, v, 4 - T, 1.0, 0.5) for _ in range(2000)])
    assert y.std() > 0.1
    torch.testing.assert_close(y.mean(), torch.tensor(1.0), atol=0.05, rtol=0)


class Largest(TorchDispatchMode):
    """Records the largest storage, in elements, that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for output in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(output, Tensor):
                storage = output.untyped_storage().nbytes() // output.element_size()
                self.elements = max(self.elements, storage)
        return result


@pytest.mark.parametrize("attend", BACKENDS)
@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize("ragged", [False, True])
def test_multi_query_keys_and_values_are_never_repeated(
    attend: Callable[..., Tensor], T: int, ragged: bool
) -> None:
    B, S, H, D = 2, 300, 12, 64
    q, k, v = inputs(B, T, S, 1, H, D)
    start = torch.tensor([S - T, S - T - 1]) if ragged else S - T
    with Largest() as largest:
        attend(q, k, v, start, D**-0.5, 0.0)
    one_key_value_pair = k.untyped_storage().nbytes() // 4
    assert largest.elements <= one_key_value_pair < B * S * H * D


def test_positions_and_mask_start_where_each_row_stands() -> None:
    assert positions_from(3, 2, CPU).tolist() == [[3, 4]]
    assert positions_from(torch.tensor([3, 0]), 2, CPU).tolist() == [[3, 4], [0, 1]]
    assert causal_mask(1, 2, 4, CPU).int().tolist() == [[[1, 1, 0, 0], [1, 1, 1, 0]]]
    assert causal_mask(torch.tensor([0, 2]), 1, 4, CPU).int().tolist() == [
        [[1, 0, 0, 0]],
        [[1, 1, 1, 0]],
    ]


def test_slots_behind_the_last_query_are_not_seen_whatever_the_backend() -> None:
    for T in (1, 3):
        q, k, v = inputs(2, T, 9, 1, 4, 8)
        for start in (0, 2, 6):
            full = [attend(q, k, v, start, 0.5) for attend in BACKENDS]
            cut = sdpa_attention(q, k[:, : start + T], v[:, : start + T], start, 0.5)
            for one in full:
                torch.testing.assert_close(one, cut)


def test_backends_are_chosen_by_name() -> None:
    assert select_attention("reference", CPU) is reference_attention
    assert select_attention("sdpa", CPU) is sdpa_attention
    assert select_attention("auto", CPU) is auto_attention


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "fused"),
    [
        ("cuda", torch.bfloat16, 128, True),
        ("cuda", torch.float32, 256, True),
        ("cuda", torch.float32, 257, False),
        ("cuda", torch.float64, 64, False),
        ("cpu", torch.float32, 64, False),
    ],
)
def test_auto_is_the_fused_kernels_for_what_they_take_on_a_gpu_and_sdpa_for_all_else(
    device: str, dtype: torch.dtype, head_dim: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (3, 0.5, 0.1)
    monkeypatch.setattr("mqa_kernels.attention", lambda *given: ("fused", given[3:]))
    monkeypatch.setattr("mqa_gpt.attention.sdpa_attention", lambda *given: ("sdpa", given[3:]))
    with FakeTensorMode():  # tensors without memory, and so on a GPU that need not be there
        q, k, v = (torch.empty(1, 2, h, head_dim, dtype=dtype, device=device) for h in (4, 1, 1))
        chosen = auto_attention(q, k, v, *arguments)
    assert chosen == ("fused" if fused else "sdpa", arguments)
    acting = acting_backend("auto", torch.device(device), dtype, head_dim)
    assert acting == ("triton" if fused else "sdpa")
    assert acting_backend("reference", torch.device(device), dtype, head_dim) == "reference"


def test_an_unknown_backend_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'flash'.*reference, sdpa, triton, auto"):
        select_attention("flash", CPU)


def test_a_backend_that_cannot_run_is_an_error_and_not_a_silent_fallback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mqa_kernels.launch.INTERPRETED", False)  # it runs anywhere, for tests
    with pytest.raises(ValueError, match="'triton' cannot run"):
        select_attention("triton", CPU)
