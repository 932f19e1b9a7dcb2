"""What is minimised: the loss of the next token, its gradient, its value on held-out data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from mqa_gpt.model import GPT
from mqa_gpt.training.attention import attend_inside_documents
from mqa_gpt.training.loss import IGNORED, TokenLoss, next_token_loss
from mqa_gpt.training.ordered import TreeSum
from mqa_gpt.training.packing import CONTEXT, LEFT_TO_RIGHT, MIDDLE
from mqa_gpt.training.parallel import World, reshard, sum_gradients_after_next
from mqa_gpt.training.samples import Batch


class Objective(nn.Module):
    """The model with its loss, as one module: nothing ever holds all logits, and FSDP gathers the
    weights of embedding and head around both.

    Args:
        model: whose parameters are trained.
        dtype: "float32" or "bfloat16", of matrix products.
        within_documents: hide the other documents of a sequence from attention.
        no_end: the id of `<|endoftext|>` if it is no choice in the prefix and the suffix of holes
            (see `InfillingConfig.end_in_context`), else None.
    """

    def __init__(
        self, model: GPT, dtype: str, within_documents: bool, no_end: int | None = None
    ) -> None:
        super().__init__()
        self.no_end = no_end
        self.model, self.dtype = model, dtype
        self.attend = attend_inside_documents(model) if within_documents else None

    def forward(self, batch: Batch) -> TokenLoss:
        """The loss in nats: its sum over the tokens that count, and each token's."""
        if self.attend is not None:
            self.attend.documents = batch.documents
        excluded = None
        if self.no_end is not None:
            is_context = batch.kinds == CONTEXT
            excluded = batch.labels.new_full(is_context.shape, IGNORED)
            excluded.masked_fill_(is_context, self.no_end)
        with self._autocast():
            hidden = self.model.transformer(batch.ids)  # (B, T, C)
            return next_token_loss(hidden, self.model.lm_head.weight, batch.labels, excluded)

    def _autocast(self) -> AbstractContextManager[object]:
        """Matrix products in bfloat16 if so configured; weights and sums stay float32."""
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.model.device.type, torch.bfloat16)


def add_gradients(
    objective: nn.Module,
    batches: Sequence[Batch],
    seeds: Sequence[int],
    world: World,
    ordered: bool = False,
) -> tuple[float, int]:
    """Make the gradient of a step's mean loss that of the parameters, which have none.

    Args:
        batches: this rank's micro-batches.
        seeds: of each one's dropout, so that it depends on neither ranks nor earlier steps.
        ordered: add up in the order of the micro-batches (see `mqa_gpt.training.ordered`).

    Returns:
        The mean loss over all ranks, in nats per token, and how many tokens it is of.
    """
    counted = torch.stack([(batch.labels != IGNORED).sum() for batch in batches]).sum()
    tokens = int(world.sum(counted))
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    losses, gradients = [], TreeSum()
    for i, (batch, seed) in enumerate(zip(batches, seeds, strict=True)):
        sum_gradients_after_next(objective, ordered or i == len(batches) - 1)
        torch.manual_seed(seed)
        share = objective(batch).sum / max(tokens, 1)  # of the mean
        share.backward()
        losses.append(share.detach())
        if ordered:
            gradients.add([_taken_gradient(parameter) for parameter in parameters])
    if ordered:
        for parameter, gradient in zip(parameters, gradients.total(), strict=True):
            parameter.grad = gradient
    # In the order of the micro-batches, on any number of ranks.
    return float(world.gather(torch.stack(losses)).T.reshape(-1).sum()), tokens


def _taken_gradient(parameter: Tensor) -> Tensor:
    """The gradient, which the parameter has no longer."""
    gradient, parameter.grad = parameter.grad, None
    return torch.zeros_like(parameter) if gradient is None else gradient


@torch.no_grad()
def mean_losses(
    objective: nn.Module, batches: Iterable[Batch], world: World
) -> dict[str, float | None]:
    """The mean loss of all tokens, of documents read left to right, and of the middles of holes.

    Args:
        batches: of this rank; all ranks have equally many.

    Returns:
        "loss", "left_to_right" and "infilling" in nats per token; None where there is no token.
    """
    names = ("loss", "left_to_right", "infilling")
    sums = []  # of each batch, by name: nats and tokens
    for batch in batches:
        batch = batch.to(world.device)
        nats = objective(batch).per_token.double()  # (B, T)
        counts = batch.labels != IGNORED  # (B, T)
        chosen = [counts, *(counts & (batch.kinds == kind) for kind in (LEFT_TO_RIGHT, MIDDLE))]
        sums.append(torch.stack([torch.stack([nats[c].sum(), c.sum().double()]) for c in chosen]))
    reshard(objective)
    # (ranks, batches, 3, 2), added up in the order of the batches on any number of ranks.
    everything = world.gather(torch.stack(sums)).transpose(0, 1).flatten(0, 1).sum(0)  # (3, 2)
    rows = zip(names, everything.tolist(), strict=True)
    return {name: nats / tokens if tokens else None for name, (nats, tokens) in rows}
