"""AdamW with the published recipe, and Muon for the hidden matrices.

Muon (Jordan et al. 2024) replaces the momentum of a matrix by the nearest orthogonal one, so that
the update changes all directions equally. The matrix has to be one map: `c_attn` is three (queries,
keys, values), so these are taken apart first. Embeddings, biases and norms are no maps from hidden
states to hidden states and stay with AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import ConfigError, require_number
from mqa_gpt.model import GPT
from mqa_gpt.training.qkv import join_qkv, split_qkv
from mqa_gpt.training.schedules import ScheduleConfig


@dataclass(frozen=True)
class OptimizerConfig:
    """Which optimizer, and its rates at their peak; the defaults are StarCoder's AdamW.

    Attributes:
        name: "adamw" for everything, or "muon" for the hidden matrices and AdamW for the rest.
        lr: peak learning rate. StarCoderBase's: 1B 4e-4, 3B 5e-4, 7B and 15.5B 3e-4.
        betas: of AdamW, for the means of the gradient and of its square.
        eps: of AdamW.
        weight_decay: decoupled, so what a step takes is this times the learning rate; of matrices
            and embeddings, not of biases and norms.
        momentum: of Muon.
        muon_lr: peak learning rate of Muon's matrices; None for `lr`. Their updates are scaled to
            the usual size of AdamW's (Liu et al. 2025, "Muon is scalable for LLM training"), so the
            two rates are of one order.
        split_qkv: whether Muon takes `c_attn` apart.

    Raises:
        ConfigError: a number out of range.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 4e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    momentum: float = 0.95
    muon_lr: float | None = None
    split_qkv: bool = True

    def __post_init__(self) -> None:
        for value in (*self.betas, self.momentum):
            require_number(
                ConfigError, "a beta or momentum", value, "from 0 to below 1", lambda x: 0 <= x < 1
            )
        for key in ("lr", "eps", *(["muon_lr"] if self.muon_lr is not None else [])):
            require_number(ConfigError, key, getattr(self, key), "above 0", lambda x: x > 0)
        require_number(
            ConfigError, "weight_decay", self.weight_decay, "0 or above", lambda x: x >= 0
        )


def make_optimizers(
    model: GPT, config: OptimizerConfig, fused_adamw: bool = True
) -> list[torch.optim.Optimizer]:
    """The optimizers of a model: each parameter that requires a gradient is in one of them.

    Each group keeps its rates of the peak as "peak_lr" and "peak_weight_decay"; `set_rates` makes
    "lr" and "weight_decay" of them before a step. For a sharded model, call this after sharding.

    Args:
        fused_adamw: update each parameter in one pass, which is faster. On a CPU this rounds the
            last few elements of a tensor otherwise than the rest, so the bits of a sharded
            parameter depend on the number of ranks.
    """
    hidden: list[Tensor] = []
    fused: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_hidden = config.name == "muon" and ".h." in name and parameter.ndim == 2
            is_fused = is_hidden and name.endswith("c_attn.weight") and config.split_qkv
            (fused if is_fused else hidden if is_hidden else rest).append(parameter)

    optimizers: list[torch.optim.Optimizer] = []
    if hidden or fused:
        muon_lr = config.lr if config.muon_lr is None else config.muon_lr
        groups = [
            *_group(hidden, muon_lr, config.weight_decay, is_qkv=False),
            *_group(fused, muon_lr, config.weight_decay, is_qkv=True),
        ]
        optimizers.append(Muon(groups, model.config, momentum=config.momentum))
    groups = [
        *_group([p for p in rest if p.ndim >= 2], config.lr, config.weight_decay),
        *_group([p for p in rest if p.ndim < 2], config.lr, 0.0),
    ]
    if groups:
        adamw = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=fused_adamw)
        optimizers.append(adamw)
    return optimizers


def set_rates(
    optimizers: Iterable[torch.optim.Optimizer], schedule: ScheduleConfig, step: int, steps: int
) -> float:
    """Set each group's learning rate and weight decay for step `step` (from 0) of `steps`.

    Returns:
        What the peak learning rate was multiplied by.
    """
    factor, decay = schedule.learning_rate(step, steps), schedule.weight_decay(step, steps)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
            group["weight_decay"] = group["peak_weight_decay"] * decay
    return factor


def _group(
    parameters: list[Tensor], lr: float, weight_decay: float, **more: object
) -> list[dict[str, Any]]:
    """The parameters as a list of one group, or of none if there are none."""
    group = {"params": parameters, "lr": lr, "weight_decay": weight_decay, **more}
    return [group | {"peak_lr": lr, "peak_weight_decay": weight_decay}] if parameters else []


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` for matrices that are stored as one, and for sharded ones.

    State and options are its own, with `adjust_lr_fn="match_rms_adamw"`. A group whose "is_qkv" is
    true holds weights of `c_attn`, whose queries, keys and values are orthogonalised apart. A
    sharded momentum is gathered first, and every rank orthogonalises the whole matrix, which makes
    the result independent of the number of ranks.

    Args:
        params: groups of matrices.
        config: sizes of the model whose `c_attn` it is.
        options: of `torch.optim.Muon`.
    """

    def __init__(self, params: Sequence[dict[str, Any]], config: GPTConfig, **options: Any) -> None:
        super().__init__(params, adjust_lr_fn="match_rms_adamw", **options)
        self.config = config

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; returns the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Momentum, orthogonalisation, weight decay and step of one matrix."""
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        momentum = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        direction = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        whole = direction.full_tensor() if isinstance(direction, DTensor) else direction
        if group["is_qkv"]:
            q, k, v = (self._orthogonal(part, group) for part in split_qkv(whole, self.config))
            update = join_qkv(q, k, v, self.config)
        else:
            update = self._orthogonal(whole, group)
        if isinstance(parameter, DTensor):  # each rank holds the whole: none sends anything
            update = distribute_tensor(
                update, parameter.device_mesh, parameter.placements, src_data_rank=None
            )
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"])

    def _orthogonal(self, matrix: Tensor, group: dict[str, Any]) -> Tensor:
        """The nearest orthogonal matrix, scaled so that its elements are about 0.2 (RMS).

        The elements of an orthogonal (m, n) matrix have the RMS max(m, n)^-0.5; those of AdamW's
        updates are 0.2 to 0.4 in practice (Liu et al. 2025, equation 4).
        """
        orthogonal = orthogonalise(
            matrix, group["ns_coefficients"], group["ns_steps"], group["eps"]
        )
        return orthogonal.to(matrix.dtype) * (0.2 * math.sqrt(max(matrix.shape)))


def orthogonalise(
    matrix: Tensor,
    coefficients: tuple[float, float, float],
    steps: int,
    eps: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """About U V^T of a matrix U S V^T, by a Newton-Schulz iteration (Jordan et al. 2024).

    x <- a x + b (x x^T) x + c (x x^T)^2 x maps each singular value s to a s + b s^3 + c s^5. With
    torch's coefficients five steps bring all but the smallest into 0.7 to 1.2.

    Args:
        matrix: (m, n).
        dtype: of the products; None for bfloat16 on a GPU, as is usual, and float32 on a CPU, where
            bfloat16 is seldom faster.
    """
    a, b, c = coefficients
    dtype = dtype or (torch.float32 if matrix.device.type == "cpu" else torch.bfloat16)
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if is_tall else matrix).to(dtype)  # (min, max): the product x x^T is small
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
