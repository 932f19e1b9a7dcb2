"""The trainer: a model, its optimizers and its data, and what one step does with them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mqa_gpt.model import GPT
from mqa_gpt.training import checkpoints
from mqa_gpt.training.averaging import WeightAverage
from mqa_gpt.training.checkpoints import RunState
from mqa_gpt.training.config import LoopConfig, RunConfig
from mqa_gpt.training.objective import Objective, add_gradients, mean_losses
from mqa_gpt.training.optimizers import make_optimizers, set_rates
from mqa_gpt.training.parallel import World, clip_gradients, require_shared_batch, shard
from mqa_gpt.training.samples import Batch, Samples
from mqa_gpt.training.tensor_parallel import divide, fused, tensor_parallel

SPIKE_WINDOW = 64  # good steps whose gradient norms say what is usual


@dataclass(frozen=True)
class Step:
    """What one step was like.

    Attributes:
        loss: mean over the batch before the step, in nats per token.
        grad_norm: of the gradient before it was clipped.
        lr: the learning rate.
        tokens: predicted.
        seconds: of this step.
        problem: why the gradient was not used; "" if it was.
    """

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    seconds: float
    problem: str


class Trainer:
    """Everything that a step changes or reads.

    Args:
        config: what to compute.
        model: the weights that training starts from, on this rank's device.
        training: the samples to train on.
        held_out: those of other documents, or None.
        world: the ranks.

    Attributes:
        state: how far the run is.

    Raises:
        ConfigError: the ranks cannot share the batch equally.
    """

    def __init__(
        self,
        config: RunConfig,
        model: GPT,
        training: Samples,
        held_out: Samples | None,
        world: World,
    ) -> None:
        run = config.run
        self.config, self.model, self.world = config, model, world
        self.training, self.held_out = training, held_out
        require_shared_batch(run, world)
        self.ordered = run.reduce == "ordered"
        if world.tensor_mesh is not None:
            tensor_parallel(model, world.tensor_mesh)
        prepare_blocks(model, run)
        no_end = None if config.data.infilling.end_in_context else training.end
        self.objective = Objective(model, run.dtype, config.data.within_documents, no_end)
        shard(self.objective, world, self.ordered)
        self.optimizers = make_optimizers(model, config.optimizer, not self.ordered)
        initialise(self.optimizers)
        decay = config.averaging.decay
        self.average = WeightAverage(model, decay) if decay else None
        self.state = RunState()

    def batches(self) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each step that is left; the next is made meanwhile."""
        steps = range(self.state.step, self.config.run.steps)
        if not steps:
            return
        with ThreadPoolExecutor(1) as worker:
            ahead = worker.submit(self._read, self.training, steps.start)
            for step in steps:
                batches = ahead.result()
                if step + 1 < steps.stop:
                    ahead = worker.submit(self._read, self.training, step + 1)
                yield [batch.to(self.world.device) for batch in batches]

    def _read(self, samples: Samples, step: int) -> list[Batch]:
        """This rank's micro-batches of a step.

        Step s reads the samples s B to (s + 1) B - 1, whatever ranks and micro-batches there are.
        The ranks take turns: micro-batch i is that of rank i modulo their number.
        """
        size, batch_size = self.config.run.micro_batch_size, self.config.run.batch_size
        if samples is self.training and self.config.run.repeat_batch:
            step = 0
        first, turn = step * batch_size, size * self.world.size
        starts = range(first + self.world.rank * size, first + batch_size, turn)
        return [samples.rows(range(start, start + size)) for start in starts]

    def step(self, batches: list[Batch]) -> Step:
        """Take one step.

        Raises:
            FloatingPointError: the loss or the gradient is not finite, or the gradient is a spike,
                and the run is to stop there; the weights are those before the step.
        """
        begin = time.perf_counter()
        state, run, config = self.state, self.config.run, self.config
        factor = set_rates(self.optimizers, config.schedule, state.step, run.steps)
        self.objective.train()
        seeds = [self._dropout_seed(i) for i in range(len(batches))]
        loss, tokens = add_gradients(self.objective, batches, seeds, self.world, self.ordered)
        grad_norm = clip_gradients(self.model, run.clip, self.ordered)
        problem = self._problem(loss, grad_norm)
        if not problem:
            for optimizer in self.optimizers:
                optimizer.step()
            if self.average is not None:
                self.average.update(self.model)
            state.grad_norms = [*state.grad_norms, grad_norm][-SPIKE_WINDOW:]
        elif run.on_bad_step == "skip":
            state.skipped += 1
        self.model.zero_grad()
        if problem and run.on_bad_step == "stop":
            raise FloatingPointError(
                f"step {state.step + 1}: {problem}; set run.on_bad_step to skip and resume, or go "
                "on in another folder (--from) with a lower optimizer.lr"
            )
        state.step += 1
        state.tokens += tokens
        seconds = time.perf_counter() - begin
        state.seconds += seconds
        return Step(loss, grad_norm, factor * config.optimizer.lr, tokens, seconds, problem)

    def evaluate(self) -> dict[str, float | None]:
        """The held-out losses, see `mean_losses`, of the averaged weights if there are any."""
        assert self.held_out is not None
        run = self.config.run
        steps = math.ceil(run.evaluate_samples / run.batch_size)
        batches = (batch for step in range(steps) for batch in self._read(self.held_out, step))
        self.objective.eval()
        with self.averaged():
            losses = mean_losses(self.objective, batches, self.world)
        if losses["loss"] is not None:
            self.state.held_out = (self.state.step, losses["loss"])
        return losses

    def averaged(self) -> AbstractContextManager[None]:
        """The model has the averaged weights inside the block, if any are kept."""
        return nullcontext() if self.average is None else self.average.applied(self.model)

    # ------------------------------------------------------------------------------- checkpoints

    def save(self, folder: Path) -> Path:
        """Write a checkpoint of the run in `folder`; see `checkpoints.save`."""
        tensors = fused(self.tensors(), self.model.config)
        return checkpoints.save(folder, self.state, tensors, self.config.run.keep)

    def load(self, checkpoint: Path) -> None:
        """Continue from a checkpoint; see `checkpoints.load`."""
        tensors = self.tensors()
        joined = fused(tensors, self.model.config)
        self.state = checkpoints.load(checkpoint, joined)
        divide(joined, tensors, self.model.config)
        if self.average is not None:
            self.average.updates = self.state.step - self.state.skipped

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the run by name: weights, moments, the average; each is the live one."""
        names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        tensors = {f"model.{name}": parameter.detach() for parameter, name in names.items()}
        for optimizer in self.optimizers:
            for parameter, moments in optimizer.state.items():
                tensors |= {f"{key}.{names[parameter]}": value for key, value in moments.items()}
        if self.average is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in self.average.weights.items()}
        return tensors

    # ------------------------------------------------------------------------------------- parts

    def _dropout_seed(self, micro_batch: int) -> int:
        """Another one for each micro-batch of the run, whichever rank has it."""
        run, own = self.config.run, micro_batch * self.world.size + self.world.rank
        return ((run.seed << 40) + (self.state.step << 16) + own) % 2**63

    def _problem(self, loss: float, grad_norm: float) -> str:
        """Why a gradient is not to be used, or ""."""
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            return f"the loss is {loss:.4g} and the gradient's norm {grad_norm:.4g}"
        norms, factor = self.state.grad_norms, self.config.run.spike_factor
        if factor and len(norms) == SPIKE_WINDOW and grad_norm > factor * statistics.median(norms):
            return (
                f"the gradient's norm is {grad_norm:.4g}, more than {factor:g} times the median "
                f"{statistics.median(norms):.4g} of the {SPIKE_WINDOW} steps before"
            )
        return ""


def prepare_blocks(model: GPT, run: LoopConfig) -> None:
    """Recompute activations or compile, block by block, as a run is configured to."""
    for block in model.transformer.h:
        if run.recompute:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if run.compile:
            block.compile()


def initialise(optimizers: list[torch.optim.Optimizer]) -> None:
    """Let optimizers make their moments now, all zero, so that a checkpoint can be read into them.

    A step with gradients of zero and a learning rate of zero makes them and changes no weight.
    """
    for optimizer in optimizers:
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for moments in optimizer.state.values():
            for tensor in moments.values():
                tensor.zero_()
