"""`mqa_gpt.training.averaging` against torch's own average and its formula."""

from __future__ import annotations

import torch

from mqa_gpt import GPT
from mqa_gpt.training.averaging import WeightAverage
from tests.helpers import error, tiny_model


def change(model: GPT, seed: int) -> None:
    """Move every weight, as a training step would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_it_is_the_weighted_mean_of_the_weights_seen() -> None:
    model, decay = tiny_model(), 0.7
    average = WeightAverage(model, decay)
    seen = []
    for seed in range(5):
        change(model, seed)
        average.update(model)
        seen.append(model.transformer.wpe.weight.detach().double())
    shares = torch.tensor([decay ** (4 - k) for k in range(5)], dtype=torch.float64)
    expected = (torch.stack(seen) * (shares / shares.sum())[:, None, None]).sum(0)
    assert error(average.weights["transformer.wpe.weight"], expected) < 1e-6


def test_after_many_steps_it_is_torchs_exponential_average() -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model, decay = tiny_model(n_layer=1), 0.5
    average = WeightAverage(model, decay)
    torchs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    for seed in range(30):  # 2^-30: how much the start still counts
        change(model, seed)
        average.update(model)
        torchs.update_parameters(model)
    for name, parameter in torchs.module.named_parameters():
        assert error(average.weights[name], parameter) < 1e-6


def test_the_model_has_the_average_inside_the_block_and_its_own_weights_after_it() -> None:
    model = tiny_model()
    average = WeightAverage(model, 0.9)
    for seed in range(2):
        change(model, seed)
        average.update(model)
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    mean = {name: weight.clone() for name, weight in average.weights.items()}
    with average.applied(model):
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, mean[name])
            assert not torch.equal(parameter, own[name])
        assert model.lm_head.weight is model.transformer.wte.weight
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, own[name])
        assert torch.equal(average.weights[name], mean[name])


def test_a_tied_embedding_is_kept_once() -> None:
    assert "lm_head.weight" not in WeightAverage(tiny_model(), 0.9).weights
