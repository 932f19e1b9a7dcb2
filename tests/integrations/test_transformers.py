"""transformers' own model with the kernels: same tokens, same gradients, clear errors."""

from __future__ import annotations

import pytest
import torch
from transformers import GPTBigCodeForCausalLM
from transformers.cache_utils import StaticCache

from tests.helpers import reference_model, tiny_config

pytest.importorskip("triton", reason="Triton is not available on this platform")

from mqa_gpt.integrations import transformers as integration

pytestmark = pytest.mark.slow

integration.register()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PADDED = torch.tensor([[0, 0, 0, 17, 5, 60, 44], [2, 9, 8, 7, 6, 5, 4], [0, 0, 0, 0, 0, 0, 33]])
MASK = (PADDED != 0).long()


def models(multi_query: bool = True) -> tuple[GPTBigCodeForCausalLM, GPTBigCodeForCausalLM]:
    """Two models with the same weights: on the kernels, and on transformers' eager attention."""
    config = tiny_config(multi_query=multi_query)
    return tuple(  # type: ignore[return-value]
        reference_model(config, attention=attention).to(DEVICE)
        for attention in ("mqa_triton", "eager")
    )


@pytest.mark.parametrize(
    ("multi_query", "cache"),
    [(True, "dynamic"), (True, "static"), (True, "none"), (False, "static")],
)
def test_left_padded_batches_generate_transformers_own_tokens(
    multi_query: bool, cache: str
) -> None:
    options = {"static": {"cache_implementation": "static"}, "none": {"use_cache": False}}
    ours, theirs = (
        model.generate(
            PADDED.to(DEVICE),
            attention_mask=MASK.to(DEVICE),
            max_new_tokens=4,
            do_sample=False,
            disable_compile=True,
            **options.get(cache, {}),
        )
        for model in models(multi_query)
    )
    assert torch.equal(ours, theirs)


def test_unused_slots_of_a_static_cache_are_not_seen() -> None:
    logits = []
    for model in models():
        cache = StaticCache(model.config, max_cache_len=30)
        first = model(PADDED[1:2].to(DEVICE), past_key_values=cache)
        for layer in cache.layers:
            layer.keys[:, :, 7:] = 1e4  # finite, as transformers multiplies them by 0
        second = model(torch.tensor([[12, 13]], device=DEVICE), past_key_values=cache)
        logits.append(torch.cat([first.logits, second.logits], 1))
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_training_batches_give_transformers_own_loss_and_gradients(side: str) -> None:
    ids, mask = (PADDED, MASK) if side == "left" else (PADDED.flip(1), MASK.flip(1))
    # A token after padding is no label: it would be predicted from padding.
    labels = ids.masked_fill(mask * torch.cat([mask[:, :1] * 0, mask[:, :-1]], 1) == 0, -100)
    gradients, losses = [], []
    for model in models():
        loss = model(ids.to(DEVICE), attention_mask=mask.to(DEVICE), labels=labels.to(DEVICE)).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.tensor([[1, 1, 0, 0, 1, 1, 1]])}, "padding between tokens"),
        ({"attention_mask": torch.tensor([[0, 1, 0, 1, 1, 1, 1]])}, "padding between tokens"),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])}, "packed sequences"),
        ({"attention_mask": torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()}, "full mask"),
    ],
)
def test_unsupported_masks_are_refused(arguments: dict[str, torch.Tensor], message: str) -> None:
    model, _ = models()
    on_device = {name: value.to(DEVICE) for name, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        model(PADDED[1:2].to(DEVICE), use_cache=False, **on_device)


def test_an_old_transformers_is_refused_when_registering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "eager_mask", lambda batch_size, cache_position: None)
    with pytest.raises(ImportError, match=r"transformers 5\.4 or later"):
        integration.register()
