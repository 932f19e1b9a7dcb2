"""`mqa_gpt.training.optimizers` against torch's own."""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch

from mqa_gpt import GPT
from mqa_gpt.errors import ConfigError
from mqa_gpt.training import optimizers
from mqa_gpt.training.loss import next_token_loss
from mqa_gpt.training.optimizers import (
    Muon,
    OptimizerConfig,
    make_optimizers,
    orthogonalise,
    set_rates,
)
from mqa_gpt.training.qkv import split_qkv
from mqa_gpt.training.schedules import ScheduleConfig
from tests.helpers import random_ids, relative_error, tiny_model

MUON = OptimizerConfig("muon", lr=1e-2)
TORCH_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def take_step(model: GPT, steppers: list[torch.optim.Optimizer], seed: int = 0) -> None:
    ids = random_ids(model.config, 2, 17, seed=seed)
    hidden = model.transformer(ids[:, :-1])
    next_token_loss(hidden, model.lm_head.weight, ids[:, 1:]).sum.backward()  # type: ignore[no-untyped-call]
    for stepper in steppers:
        stepper.step()
        stepper.zero_grad()


def names_by_optimizer(model: GPT, config: OptimizerConfig) -> dict[tuple[str, float], set[str]]:
    """Parameter names by the class of their optimizer and their weight decay."""
    names = {p: name for name, p in model.named_parameters()}
    found: dict[tuple[str, float], set[str]] = {}
    for optimizer in make_optimizers(model, config):
        for group in optimizer.param_groups:
            key = type(optimizer).__name__, group["weight_decay"]
            found.setdefault(key, set()).update(names[p] for p in group["params"])
    return found


def test_adamw_decays_matrices_and_embeddings_only() -> None:
    model = tiny_model()
    found = names_by_optimizer(model, OptimizerConfig())
    assert found.keys() == {("AdamW", 0.1), ("AdamW", 0.0)}
    assert found["AdamW", 0.1] == {n for n, p in model.named_parameters() if p.ndim == 2}
    assert found["AdamW", 0.0] == {n for n, p in model.named_parameters() if p.ndim == 1}


@pytest.mark.parametrize("tied", [True, False])
def test_muon_has_the_hidden_matrices_and_adamw_the_rest(tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    found = names_by_optimizer(model, MUON)
    matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert found["Muon", 0.1] == {
        f"transformer.h.{i}.{name}.weight" for i in range(2) for name in matrices
    }
    embeddings = {"transformer.wte.weight", "transformer.wpe.weight"}
    assert found["AdamW", 0.1] == embeddings | ({"lm_head.weight"} if not tied else set())
    everything = set().union(*found.values())
    assert everything == {name for name, _ in model.named_parameters()}


def test_a_frozen_parameter_is_in_no_optimizer() -> None:
    model = tiny_model()
    model.transformer.requires_grad_(False)
    assert make_optimizers(model, MUON) == []


def test_orthogonalising_in_bfloat16_is_torchs_bit_for_bit() -> None:
    from torch.optim._muon import _zeropower_via_newtonschulz

    for shape in [(12, 12), (20, 60), (136, 60)]:
        matrix = torch.randn(shape)
        expected = _zeropower_via_newtonschulz(matrix, TORCH_COEFFICIENTS, 5, 1e-7)
        ours = orthogonalise(matrix, TORCH_COEFFICIENTS, 5, 1e-7, torch.bfloat16)
        assert torch.equal(ours, expected)


def test_orthogonalising_keeps_the_directions_and_evens_out_the_sizes() -> None:
    matrix = torch.randn(40, 30, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    in_directions = u.T @ orthogonalise(matrix, TORCH_COEFFICIENTS, 5, 1e-7, torch.float64) @ vh.T
    sizes = in_directions.diagonal()
    assert s.max() / s.min() > 5
    assert torch.all((sizes > 0.6) & (sizes < 1.3))
    assert relative_error(in_directions, sizes.diag()) < 1e-6


def test_a_step_of_muon_is_torchs_on_the_parts_of_c_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        optimizers,
        "orthogonalise",
        lambda *arguments: orthogonalise(*arguments, dtype=torch.bfloat16),  # as torch
    )
    for multi_query in (True, False):
        model = tiny_model(multi_query=multi_query)
        muon, _ = make_optimizers(model, MUON)
        ours = model.transformer.h[1].attn.c_attn.weight
        other = model.transformer.h[1].mlp.c_fc.weight
        parts = [
            torch.nn.Parameter(part.clone())
            for part in (*split_qkv(ours.detach(), model.config), other.detach())
        ]
        its = torch.optim.Muon(parts, lr=1e-2, adjust_lr_fn="match_rms_adamw")
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            ours.grad = torch.randn(ours.shape, generator=generator)
            other.grad = torch.randn(other.shape, generator=generator)
            grads = (*split_qkv(ours.grad, model.config), other.grad)
            for part, grad in zip(parts, grads, strict=True):
                part.grad = grad.clone()
            muon.step()
            its.step()
        *expected, expected_other = parts
        for mine, theirs in zip(split_qkv(ours, model.config), expected, strict=True):
            assert relative_error(mine, theirs) < 1e-6
        assert relative_error(other, expected_other) < 1e-6


def test_the_update_of_every_part_is_of_adamws_size() -> None:
    model = tiny_model()
    muon, _ = make_optimizers(model, dataclasses.replace(MUON, weight_decay=0.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn(parameter.shape)
    muon.step()
    for name, parameter in model.named_parameters():
        change = parameter.detach() - before[name]
        if ".h." in name and parameter.ndim == 2:
            is_fused = ".c_attn." in name
            for part in split_qkv(change, model.config) if is_fused else [change]:
                rms = part.square().mean().sqrt() / MUON.lr  # of singular values 0.7 to 1.2
                assert 0.7 * 0.2 < rms < 1.2 * 0.2, name
        else:
            assert torch.all(change == 0), name


def test_splitting_c_attn_makes_a_difference() -> None:
    updated = []
    for split in (True, False):
        model = tiny_model()
        take_step(model, make_optimizers(model, dataclasses.replace(MUON, split_qkv=split)))
        updated.append(model.transformer.h[0].attn.c_attn.weight)
    assert not torch.equal(*updated)


def test_rates_follow_the_schedule_and_its_weight_decay() -> None:
    steppers = make_optimizers(tiny_model(), dataclasses.replace(MUON, muon_lr=3e-2))
    schedule = ScheduleConfig("linear", warmup_steps=0, final=0.0, weight_decay_final=0.5)
    assert set_rates(steppers, schedule, 50, 100) == 0.5
    muon, adamw = steppers
    assert {group["lr"] for group in muon.param_groups} == {1.5e-2}
    assert {group["lr"] for group in adamw.param_groups} == {0.5e-2}
    assert [group["weight_decay"] for group in adamw.param_groups] == pytest.approx([0.075, 0])
    set_rates(steppers, schedule, 0, 100)
    assert {group["lr"] for group in muon.param_groups} == {3e-2}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_run_that_is_saved_and_resumed_is_the_same_bit_for_bit(name: str) -> None:
    config = OptimizerConfig(name, lr=1e-2)  # type: ignore[arg-type]
    straight, resumed = tiny_model(), tiny_model()
    steppers = make_optimizers(straight, config)
    for seed in range(4):
        take_step(straight, steppers, seed)

    steppers = make_optimizers(resumed, config)
    for seed in range(2):
        take_step(resumed, steppers, seed)
    file = io.BytesIO()
    torch.save([stepper.state_dict() for stepper in steppers], file)
    file.seek(0)
    steppers = make_optimizers(resumed, config)
    for stepper, state in zip(steppers, torch.load(file, weights_only=True), strict=True):
        stepper.load_state_dict(state)
    for seed in range(2, 4):
        take_step(resumed, steppers, seed)
    for mine, its in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_muon_is_torchs_muon_with_its_state() -> None:
    model = tiny_model()
    muon, _ = make_optimizers(model, MUON)
    take_step(model, [muon])
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(muon, Muon)
    assert {key for state in muon.state.values() for key in state} == {"momentum_buffer"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0}, "lr is 0: it must be a number above 0"),
        ({"muon_lr": -1.0}, "muon_lr is -1.0"),
        ({"betas": (0.9, 1.0)}, "a beta or momentum is 1.0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
    ],
)
def test_a_number_out_of_range_is_an_error_that_names_it(
    values: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**values)  # type: ignore[arg-type]
