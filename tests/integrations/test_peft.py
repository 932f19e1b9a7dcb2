"""LoRA by an unmodified peft on the hand-written model: trained, merged, exported, refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPTBigCodeForCausalLM

from mqa_gpt import GPT, generate
from mqa_gpt.errors import CheckpointError, InputError
from mqa_gpt.training.loss import next_token_loss
from mqa_gpt.training.optimizers import OptimizerConfig, make_optimizers
from tests.helpers import error, random_ids, reference_model, tiny_config, tiny_model

peft = pytest.importorskip("peft", reason="peft is not installed")

TARGETS = ["c_attn", "c_proj", "c_fc"]


def adapted(model: GPT) -> peft.PeftModel:
    """The model with an adapter that changes its logits (by default a new one does not)."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def loss_of(model: GPT, ids: Tensor) -> Tensor:
    hidden = model.transformer(ids[:, :-1])
    return next_token_loss(hidden, model.lm_head.weight, ids[:, 1:]).sum


def test_training_changes_the_adapter_only_and_lowers_the_loss() -> None:
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=TARGETS))
    optimizers = make_optimizers(model, OptimizerConfig(lr=1e-2))
    ids = random_ids(model.config, 2, 20)
    losses = []
    for _ in range(10):
        loss = loss_of(model, ids)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer.", ".")]), name
    trained = sum(
        p.numel() for optimizer in optimizers for p in optimizer.param_groups[0]["params"]
    )
    assert trained == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)


@torch.no_grad()
def test_merged_it_has_the_same_logits_and_is_a_plain_model_again(tmp_path: Path) -> None:
    wrapped = adapted(tiny_model())
    ids = random_ids(tiny_config(), 2, 20)
    plain, expected = tiny_model()(ids), wrapped(ids)
    assert error(plain, expected) > 1
    merged = wrapped.merge_and_unload()
    assert type(merged) is GPT
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert error(merged(ids), expected) < 1e-4
    merged.save_pretrained(tmp_path)
    assert torch.equal(GPT.from_pretrained(tmp_path)(ids), merged(ids))
    theirs = GPTBigCodeForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert error(theirs(ids).logits, expected) < 1e-4


@torch.no_grad()
def test_an_adapter_trained_here_works_on_transformers_model_and_back(tmp_path: Path) -> None:
    config, ids = tiny_config(), random_ids(tiny_config(), 2, 20)
    ours = adapted(tiny_model())
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(reference_model(config), tmp_path).eval()
    assert error(theirs(input_ids=ids).logits, ours(ids)) < 1e-4
    theirs.save_pretrained(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "again").eval()
    assert torch.equal(again(ids), ours(ids))


def test_an_unmerged_model_generates_what_the_merged_one_does() -> None:
    model = tiny_model()
    wrapped = adapted(model)
    tokens = generate(model, [[1, 2, 3]], max_new_tokens=8)
    assert tokens != generate(tiny_model(), [[1, 2, 3]], max_new_tokens=8)
    assert generate(wrapped.merge_and_unload(), [[1, 2, 3]], max_new_tokens=8) == tokens


def test_an_unmerged_model_is_not_saved_as_a_checkpoint(tmp_path: Path) -> None:
    wrapped = adapted(tiny_model())
    with pytest.raises(InputError, match="has a peft adapter: merge it with peft's merge_and_unl"):
        wrapped.get_base_model().save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_loading_an_adapter_folder_names_its_base_and_says_how_to_merge_it(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_model().save_pretrained(base)
    wrapped = adapted(GPT.from_pretrained(base))
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(adapter, save_embedding_layers=False)  # "auto" asks transformers
    expected = f"{adapter} holds a peft adapter for {str(base)!r}, not a model: .* merge"
    with pytest.raises(CheckpointError, match=expected):
        GPT.from_pretrained(adapter)

    merged = peft.PeftModel.from_pretrained(GPT.from_pretrained(base), adapter).merge_and_unload()
    ids = random_ids(merged.config, 2, 20)
    assert torch.equal(merged(ids), adapted(tiny_model()).merge_and_unload()(ids))
