from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mqa_gpt.model
from mqa_gpt import GPT, GPTConfig, KVCache, PromptError
from mqa_gpt.checkpoints.load import empty_model
from mqa_gpt.model import MultiQueryAttention
from tests.helpers import (
    error,
    left_padded,
    our_model,
    random_ids,
    random_prompts,
    reference_model,
    relative_error,
    tiny_config,
)

KINDS = [True, False]  # multi_query


def random_model(config: GPTConfig, backend: str = "auto") -> GPT:
    return our_model(reference_model(config), config, backend)


# ------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("multi_query", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_parameter_names_and_shapes_are_those_of_transformers(
    multi_query: bool, tied: bool
) -> None:
    config = tiny_config(multi_query=multi_query, tie_word_embeddings=tied)
    reference = reference_model(config)
    ours, theirs = GPT(config), reference
    assert [(n, p.shape) for n, p in ours.state_dict().items()] == [
        (n, p.shape) for n, p in theirs.state_dict().items()
    ]
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]


def test_tied_embeddings_are_one_tensor_and_stay_one() -> None:
    model = GPT(tiny_config())
    assert model.lm_head.weight is model.transformer.wte.weight
    model = model.to(torch.bfloat16)
    assert model.lm_head.weight is model.transformer.wte.weight
    model.load_state_dict(model.state_dict())
    assert model.lm_head.weight is model.transformer.wte.weight


def test_untied_embeddings_are_two_tensors() -> None:
    model = GPT(tiny_config(tie_word_embeddings=False))
    assert model.lm_head.weight.data_ptr() != model.transformer.wte.weight.data_ptr()


def test_official_shapes_have_the_published_parameter_counts() -> None:
    counts = {
        "bigcode/tiny_starcoder_py": 164_144_128,
        "bigcode/gpt_bigcode-santacoder": 1_124_886_528,
        "bigcode/starcoderbase-1b": 1_137_207_296,
        "bigcode/starcoderbase-3b": 3_043_311_104,
        "bigcode/starcoderbase-7b": 7_327_263_232,
        "bigcode/starcoder": 15_517_456_384,
    }
    for name, count in counts.items():
        model = empty_model(GPTConfig.preset(name))
        assert sum(p.numel() for p in model.parameters()) == count, name


@pytest.mark.parametrize("multi_query", KINDS)
def test_weights_start_from_gpt2s_distribution(multi_query: bool) -> None:
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=400, n_positions=300, n_embd=192, n_layer=5, n_head=3, n_inner=700,
        initializer_range=0.03, multi_query=multi_query, tie_word_embeddings=False,
    )  # fmt: skip
    for name, parameter in GPT(config).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "ln_" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.03 / math.sqrt(2 * 5) if "c_proj" in name else 0.03
            assert parameter.std().item() == pytest.approx(std, rel=0.02), name
            assert abs(parameter.mean().item()) < std / 50, name


def test_every_weight_matters() -> None:
    """Logits change with each single parameter tensor: none is left out of the forward."""
    config = tiny_config(tie_word_embeddings=False)
    model, ids = random_model(config), random_ids(config, 1, 9)
    before = model(ids)
    for name, parameter in model.named_parameters():
        saved = parameter.detach().clone()
        with torch.no_grad():
            parameter += torch.randn_like(parameter) * 0.1
            assert not torch.allclose(model(ids), before, atol=1e-4), name
            parameter.copy_(saved)


# ---------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("is_training", [True, False])
def test_multi_head_attention_with_equal_heads_is_multi_query_attention(is_training: bool) -> None:
    mqa_config, mha_config = tiny_config(), tiny_config(multi_query=False)
    mqa = random_model(mqa_config)
    state = dict(mqa.state_dict())
    H, D, C = mqa_config.n_head, mqa_config.head_dim, mqa_config.n_embd
    for name, value in state.items():
        if "c_attn" in name:
            rest = value.shape[1:]
            q = value[:C].view(H, D, *rest)
            kv = value[C:].view(1, 2 * D, *rest).expand(H, 2 * D, *rest)
            state[name] = torch.cat([q, kv], dim=1).flatten(0, 1)
    mha = GPT(mha_config)
    mha.load_state_dict(state)
    mqa.train(is_training)
    mha.train(is_training)
    ids = random_ids(mqa_config, 3, 17)
    assert relative_error(mha(ids), mqa(ids)) < 5e-6


@pytest.mark.parametrize("multi_query", KINDS)
@pytest.mark.parametrize("new", [1, 3])
def test_cached_equals_uncached(multi_query: bool, new: int) -> None:
    config = tiny_config(multi_query=multi_query)
    model, ids = random_model(config), random_ids(config, 4, 7 + new)
    cache = KVCache(config, 4, 7 + new)
    with torch.no_grad():
        expected = model(ids)
        assert relative_error(model(ids[:, :7], cache=cache), expected[:, :7]) < 5e-6
        assert cache.lengths.tolist() == [7] * 4
        assert relative_error(model(ids[:, 7:], cache=cache), expected[:, 7:]) < 5e-6


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_what_stands_in_the_padding_does_not_matter(backend: str) -> None:
    config = tiny_config()
    model = random_model(config, backend)
    ids, next_ids = random_ids(config, 3, 8), random_ids(config, 3, 2, seed=1)
    lengths = torch.tensor([8, 2, 5])
    results = []
    for seed in (2, 3):
        padded = torch.where(
            torch.arange(8) < lengths[:, None], ids, random_ids(config, 3, 8, seed=seed)
        )
        cache = KVCache(config, 3, 10)
        with torch.no_grad():
            first = model(padded, cache=cache, logits_at=lengths - 1)
            cache.set_lengths(lengths.tolist())
            results.append((first, model(next_ids, cache=cache)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_a_left_padded_transformers_batch_gives_the_same_logits(backend: str) -> None:
    config = tiny_config()
    reference, prompts = reference_model(config), random_prompts(config, [9, 1, 5])
    batch = left_padded(prompts)
    with torch.no_grad():
        expected = reference(**batch).logits[:, -1]
        ids = torch.tensor([[*p, *[3] * (9 - len(p))] for p in prompts])
        at = torch.tensor([8, 0, 4])
        logits = our_model(reference, config, backend)(ids, logits_at=at)
    assert relative_error(logits, expected) < 5e-6


def test_a_long_prompt_in_chunks_equals_the_prompt_at_once() -> None:
    config = tiny_config(n_positions=700, n_layer=1)
    model, ids = random_model(config), random_ids(config, 2, 700)
    cache = KVCache(config, 2, 700)
    with torch.no_grad():
        chunks = [model(chunk, cache=cache) for chunk in ids.split(233, 1)]
        assert relative_error(torch.cat(chunks, 1), model(ids)) < 1e-5


def test_logits_at_gives_the_rows_of_the_full_logits() -> None:
    config = tiny_config()
    model, ids = random_model(config), random_ids(config, 3, 6)
    at = torch.tensor([5, 0, 3])
    with torch.no_grad():
        full, some = model(ids), model(ids, logits_at=at)
    assert some.shape == (3, config.vocab_size)
    assert relative_error(some, full[torch.arange(3), at]) < 1e-6


def test_an_empty_logits_at_gives_no_logits_and_fills_the_cache() -> None:
    config = tiny_config()
    model, ids = our_model(reference_model(config), config), random_ids(config, 2, 7)
    caches = [KVCache(config, 2, 9) for _ in range(2)]
    with torch.inference_mode():
        model(ids, cache=caches[0])
        logits = model(ids, cache=caches[1], logits_at=torch.tensor([], dtype=torch.int64))
    assert logits.shape == (0, config.vocab_size)
    assert caches[1].end == 7
    assert torch.equal(caches[1].kv, caches[0].kv)


def test_a_tokens_logits_do_not_depend_on_later_tokens_or_other_rows() -> None:
    config = tiny_config()
    model, ids = random_model(config), random_ids(config, 2, 8)
    changed = ids.clone()
    changed[0, 5:] = (ids[0, 5:] + 1) % config.vocab_size
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before[0, :5], after[0, :5])
    assert torch.equal(before[1], after[1])
    assert not torch.isclose(before[0, 5:], after[0, 5:]).all(-1).any()


@pytest.mark.parametrize("kind", [torch.inference_mode, torch.no_grad])
def test_prefill_and_decoding_work_without_gradients(kind: type) -> None:
    config = tiny_config()
    model, ids = random_model(config), random_ids(config, 2, 5)
    expected = model(ids).detach()
    with kind():
        cache = KVCache(config, 2, 5)
        parts = [model(part, cache=cache) for part in ids.split([3, 1, 1], 1)]
    assert relative_error(torch.cat(parts, 1), expected) < 5e-6


@pytest.mark.parametrize("id_", [-1, 97])
def test_a_token_outside_the_vocabulary_is_an_index_error(id_: int) -> None:
    with pytest.raises(IndexError):
        GPT(tiny_config(vocab_size=97))(torch.tensor([[id_]]))


def test_the_backend_can_be_changed_and_an_unknown_one_is_an_error() -> None:
    config = tiny_config()
    model, ids = random_model(config, "reference"), random_ids(config, 2, 9)
    before = model(ids)
    model.set_backend("sdpa")
    attends = {m.attend.__name__ for m in model.modules() if isinstance(m, MultiQueryAttention)}
    assert attends == {"sdpa_attention"}
    assert relative_error(model(ids), before) < 5e-6
    with pytest.raises(ValueError, match="backend is 'fast'"):
        model.set_backend("fast")
    with pytest.raises(ValueError, match="backend is 'fast'"):
        GPT(config, backend="fast")


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ("def f():", r"'def f\(\):'"),
        ([[1, 2]], r"\[\[1, 2\]\]"),
        (torch.tensor([1, 2, 3]), r"\[3\]"),
        (torch.tensor([[1.0, 2.0]]), r"torch.float32 \[1, 2\]"),
        (torch.zeros(1, 113, dtype=torch.int64), r"\[1, 113\].* at most 112"),
    ],
)
def test_what_is_no_batch_of_ids_is_refused_in_our_words(ids: Any, words: str) -> None:
    with pytest.raises(PromptError, match=rf"ids are .*{words}"):
        GPT(tiny_config())(ids)


def test_dtype_and_device_are_the_parameters() -> None:
    model = GPT(tiny_config()).to(torch.bfloat16)
    assert (model.dtype, model.device) == (torch.bfloat16, torch.device("cpu"))


# --------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("multi_query", KINDS)
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_loss_and_gradients_are_those_of_transformers(multi_query: bool, backend: str) -> None:
    config = tiny_config(multi_query=multi_query, initializer_range=0.2)
    reference = reference_model(config)
    model = our_model(reference, config, backend)
    ids = random_ids(config, 3, 11)
    labels = ids.clone()
    labels[0, :4] = labels[2, 7:] = -100
    loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected = reference(ids, labels=labels).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert theirs[name].grad.abs().max() > 0, name
        assert relative_error(parameter.grad, theirs[name].grad) < 2e-5, name


DROPOUTS = ["embd_pdrop", "attn_pdrop", "resid_pdrop"]


@pytest.mark.parametrize("switched_on", [*[[name] for name in DROPOUTS], DROPOUTS])
@pytest.mark.parametrize("multi_query", KINDS)
def test_dropout_drops_what_transformers_drops(multi_query: bool, switched_on: list[str]) -> None:
    """From one seed both draw the same masks, so even the training-mode logits are equal."""
    config = tiny_config(multi_query=multi_query, **dict.fromkeys(switched_on, 0.3))
    reference = reference_model(config)
    model = our_model(reference, config, "reference").train()
    ids = random_ids(config, 2, 9)
    outputs: list[Tensor] = []
    for forward in (model, lambda ids: reference.train()(ids).logits):
        torch.manual_seed(5)
        outputs.append(forward(ids))
    assert relative_error(*outputs) < 5e-6
    assert relative_error(model.eval()(ids), outputs[1]) > 0.01


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_is_on_in_training_and_off_in_evaluation(backend: str, name: str) -> None:
    config = tiny_config(**{name: 0.5})
    model, ids = random_model(config, backend), random_ids(config, 2, 9)
    model.train()
    assert error(model(ids), model(ids)) > 0.1
    model.eval()
    assert error(model(ids), model(ids)) == 0


def test_the_model_stays_a_page_to_read() -> None:
    assert len(Path(mqa_gpt.model.__file__).read_text().splitlines()) < 260
