"""`mqa_gpt.training.conversion`: what is exact is exact, and what is fitted is the best fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPTBigCodeForCausalLM

from mqa_gpt import GPT
from mqa_gpt.errors import InputError
from mqa_gpt.fast.int8 import quantize
from mqa_gpt.training.conversion import (
    Heads,
    attention_layers,
    measure_moments,
    merge,
    read_heads,
    shared_head,
    to_mha,
    to_mqa,
    write_heads,
)
from tests.helpers import error, random_ids, relative_error, tiny_config, tiny_model


def mha(**changes: object) -> GPT:
    return tiny_model(multi_query=False, **changes).double()


def batches(count: int = 3) -> list[Tensor]:
    return [random_ids(tiny_config(), 16, 40, seed=10 + i) for i in range(count)]


@torch.no_grad()
def rewrite(model: GPT, layer: int, heads: Heads) -> None:
    """Give a layer other weights, in place."""
    attention = attention_layers(model)[layer]
    attention.load_state_dict(write_heads(heads, model.config))


@torch.no_grad()
def change_bases(model: GPT, layer: int, to_k: Tensor, to_v: Tensor) -> None:
    """Write each head's keys and values in another basis, and what reads them too, in place.

    Args:
        to_k, to_v: (H, D, D) invertible: old keys from new ones, old values from new ones.
    """
    heads = read_heads(attention_layers(model)[layer], model.config)
    rewrite(
        model,
        layer,
        heads._replace(
            q=to_k.mT @ heads.q,
            k=torch.linalg.solve(to_k, heads.k),
            v=torch.linalg.solve(to_v, heads.v),
            o=heads.o @ to_v,
        ),
    )


@torch.no_grad()
def test_aligned_heads_leave_the_logits_unchanged() -> None:
    model, aligned = mha(), mha()
    ids = random_ids(model.config, 2, 30)
    moments = measure_moments(model, batches())
    for layer, attention in enumerate(attention_layers(model)):
        heads, covariance = read_heads(attention, model.config), moments[layer].covariance
        importance = heads.q @ heads.q.mT
        _, to_k = shared_head(heads.k[..., :-1], importance, covariance)
        _, to_v = shared_head(heads.v[..., :-1], heads.o.mT @ heads.o, covariance)
        change_bases(aligned, layer, to_k, to_v)
        assert error(attention_layers(aligned)[layer].c_attn.weight, attention.c_attn.weight) > 0.1
    assert relative_error(aligned(ids), model(ids)) < 1e-9


@torch.no_grad()
def test_aligning_finds_a_shared_head_in_whatever_bases_its_copies_are() -> None:
    original = tiny_model().double()
    hidden = to_mha(original)
    H, D = original.config.n_head, original.config.head_dim
    for layer in range(original.config.n_layer):
        change_bases(hidden, layer, *torch.randn(2, H, D, D, dtype=torch.float64))
    ids = random_ids(original.config, 2, 30)
    assert relative_error(hidden(ids), original(ids)) < 1e-8
    assert relative_error(to_mqa(hidden)(ids), original(ids)) < 1e-8
    # With text, the ridge of `fit_outputs` draws to weights that are right already.
    assert relative_error(to_mqa(hidden, batches=batches())(ids), original(ids)) < 1e-8
    for method in ("mean", "first"):
        assert relative_error(to_mqa(hidden, method)(ids), original(ids)) > 0.1


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_for_each_query_head_computes_the_same_here_and_in_transformers(
    tied: bool, tmp_path: Path
) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    converted = to_mha(model)
    ids = random_ids(model.config, 2, 30)
    assert not converted.config.multi_query
    assert relative_error(converted(ids), model(ids)) < 1e-5
    assert (converted.lm_head.weight is converted.transformer.wte.weight) == tied
    converted.save_pretrained(tmp_path)
    theirs = GPTBigCodeForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert relative_error(theirs(ids).logits, model(ids)) < 1e-5


@torch.no_grad()
def test_mean_and_first_are_those_of_the_papers_matrices() -> None:
    model = mha()
    H, D, C = model.config.n_head, model.config.head_dim, model.config.n_embd
    for method in ("mean", "first"):
        converted = to_mqa(model, method)
        assert converted.config.multi_query
        for ours, its in zip(attention_layers(converted), attention_layers(model), strict=True):
            q, k, v = its.c_attn.weight.view(H, 3, D, C).unbind(1)  # (H, D, C) each
            pooled = [part.mean(0) if method == "mean" else part[0] for part in (k, v)]
            expected = torch.cat([q.reshape(C, C), *pooled])
            assert error(ours.c_attn.weight, expected) < 1e-12
            assert torch.equal(ours.c_proj.weight, its.c_proj.weight)


def lost(heads: Tensor, importance: Tensor, covariance: Tensor, shared: Tensor) -> Tensor:
    """What `shared_head` makes smallest, for a shared map, each R_h being the best one for it."""
    to_shared = heads @ covariance @ shared.T @ torch.inverse(shared @ covariance @ shared.T)
    left = heads - to_shared @ shared
    return (importance @ left @ covariance @ left.mT).diagonal(dim1=1, dim2=2).sum()


def test_no_other_shared_head_loses_less() -> None:
    H, D, C = 3, 4, 11
    heads = torch.randn(H, D, C, dtype=torch.float64)
    roots = torch.randn(H, D, 7, dtype=torch.float64)
    importance = roots @ roots.mT
    samples = torch.randn(C, 50, dtype=torch.float64)
    covariance = samples @ samples.T / 50
    shared, to_shared = shared_head(heads, importance, covariance)
    least = lost(heads, importance, covariance, shared)
    left = heads - to_shared @ shared
    own = (importance @ left @ covariance @ left.mT).diagonal(dim1=1, dim2=2).sum()
    assert relative_error(own, least) < 1e-4

    guess = heads.mean(0).clone().requires_grad_()
    optimizer = torch.optim.LBFGS([guess], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = lost(heads, importance, covariance, guess)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[arg-type]
    found = lost(heads, importance, covariance, guess.detach())
    assert least < 0.7 * lost(heads, importance, covariance, heads.mean(0))
    assert abs(found / least - 1) < 1e-2  # the ridge moves the closed solution a little


@torch.no_grad()
def test_the_measured_moments_are_those_of_the_attentions_input() -> None:
    model = mha()
    seen: list[Tensor] = []
    norm = model.transformer.h[1].ln_1
    hook = norm.register_forward_hook(lambda *arguments: seen.append(arguments[2].flatten(0, 1)))
    moments = measure_moments(model, batches())[1]
    hook.remove()
    x = torch.cat(seen)
    assert error(moments.mean, x.mean(0)) < 1e-9
    assert error(moments.covariance, x.T.cov(correction=0)) < 1e-9


@torch.no_grad()
def test_a_constant_value_is_kept_when_heads_are_merged() -> None:
    model = mha()
    attention = attention_layers(model)[0]
    moments = measure_moments(model, batches())[0]
    merged = to_mqa(model)
    rewrite(merged, 0, merge(read_heads(attention, model.config), moments))
    x = moments.mean.expand(1, 5, -1)  # every position reads the mean: attention cannot choose
    assert relative_error(attention_layers(merged)[0](x, 0, None), attention(x, 0, None)) < 1e-9


@torch.no_grad()
def test_aligned_is_nearer_than_mean_and_nearer_still_with_text() -> None:
    model = mha()
    ids = random_ids(model.config, 4, 40)
    expected = model(ids).log_softmax(-1)

    def divergence(converted: GPT) -> float:
        ours = converted(ids).log_softmax(-1)
        return (expected.exp() * (expected - ours)).sum(-1).mean().item()

    mean = divergence(to_mqa(model, "mean"))
    aligned = divergence(to_mqa(model))
    with_text = divergence(to_mqa(model, batches=batches()))
    assert with_text < aligned < 0.9 * mean


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_and_tie_are_kept_and_the_original_is_untouched(dtype: torch.dtype) -> None:
    model = tiny_model(multi_query=False).to(dtype).train()
    before = [p.detach().clone() for p in model.parameters()]
    converted = to_mqa(model, batches=batches(1))
    assert converted.dtype == dtype
    assert not converted.training
    copy = to_mha(model)
    assert model.training
    assert converted.lm_head.weight is converted.transformer.wte.weight
    for parameter, its in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, its)
    for parameter in (*converted.parameters(), *copy.parameters()):
        assert all(parameter.data_ptr() != its.data_ptr() for its in model.parameters())


def test_what_cannot_be_converted_is_refused() -> None:
    model = tiny_model(multi_query=False)
    with pytest.raises(InputError, match="method is 'mean', which reads no text"):
        to_mqa(model, "mean", batches(1))
    few = [random_ids(model.config, 1, 599)]
    with pytest.raises(InputError, match="599 tokens are too few for n_embd 60: give at least 600"):
        to_mqa(model, batches=few)
    quantize(model)
    with pytest.raises(InputError, match="8-bit integers"):
        to_mqa(model)


@torch.no_grad()
def test_a_model_of_one_layer_is_converted_with_text() -> None:
    original = tiny_model(n_layer=1).double()
    ids = random_ids(original.config, 2, 30)
    converted = to_mqa(to_mha(original), batches=batches(1))
    assert relative_error(converted(ids), original(ids)) < 1e-8
