"""What do the loss and its gradient cost at a vocabulary of 49,152, by way of computing them?

    python -m benchmarks.training.loss                                        # CPU, some minutes
    python -m benchmarks.training.loss --device cuda --dtype bfloat16 --tokens 16384

Each way runs in a process of its own, so that its peak memory is its own: what the process held at
most during forward and backward above what it held before, gradients of hidden states and weights
included. Times are the best of `--repeats`; on a CPU, the processor's time of one thread, which
leaves out the turns of other programs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import (
    device_name,
    make_parser,
    nothing_measured,
    positive,
    refuse_bad_input,
    result_path,
    write_result,
)
from mqa_gpt.checkpoints.placement import as_device, as_dtype
from mqa_gpt.training.loss import next_token_loss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def all_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As nanoGPT and transformers do: all logits, in float32."""
    return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")


def torchs(**options: Any) -> Loss:
    """`torch.nn.functional.linear_cross_entropy` in chunks, of torch 2.13 and later."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.linear_cross_entropy(
            hidden, weight, labels, reduction="sum",
            options=torch.nn.LinearCrossEntropyOptions(**options),
        )  # fmt: skip

    return loss


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """This package's."""
    return next_token_loss(hidden, weight, labels).sum


WAYS: dict[str, Loss] = {
    "all logits": all_logits,
    "linear_cross_entropy, its own chunks": torchs(),
    "linear_cross_entropy, chunks of 128": torchs(batch_chunk_size=128),
    "next_token_loss": ours,
}


def measure(name: str, options: argparse.Namespace, answer: Any) -> None:
    """One way: its loss, seconds and peak bytes."""
    device, dtype = as_device(options.device), as_dtype(options.dtype)
    torch.set_num_threads(1 if device.type == "cpu" else torch.get_num_threads())
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(options.tokens, options.width, generator=generator)
    weight = torch.randn(options.vocabulary, options.width, generator=generator)
    labels = torch.randint(options.vocabulary, (options.tokens,), generator=generator).to(device)
    hidden = hidden.to(device, dtype).requires_grad_()
    weight = weight.mul_(options.width**-0.5).to(device, dtype).requires_grad_()
    before = peak_bytes(device)
    seconds = []
    for _ in range(options.repeats):
        hidden.grad = weight.grad = None
        begin = now(device)
        loss = WAYS[name](hidden, weight, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        seconds.append(now(device) - begin)
    answer.put(
        {
            "loss": loss.item() / options.tokens,
            "seconds": min(seconds),
            "peak_bytes": peak_bytes(device) - before,
        }
    )


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def now(device: torch.device) -> float:
    """Seconds of the processor, or of the wall once the GPU is done."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


@refuse_bad_input
def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "training_loss_*.json")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=positive, default=2048)
    parser.add_argument("--width", type=positive, default=768)
    parser.add_argument("--vocabulary", type=positive, default=49152)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--note", help="kept with the result: what else this machine was doing")
    options = parser.parse_args(arguments)
    device = as_device(options.device)
    name = f"training_loss_{options.dtype}_{device_name(device)}.json"
    output = result_path(options.output, name)
    context = multiprocessing.get_context("spawn")
    figures = {}
    for way in WAYS:
        if way.startswith("linear") and not hasattr(F, "linear_cross_entropy"):
            continue
        answer: Any = context.Queue()
        process = context.Process(target=measure, args=(way, options, answer))
        process.start()
        process.join()
        if process.exitcode:
            return nothing_measured()
        found = figures[way] = answer.get()
        print(
            f"{way:38}{found['loss']:10.5f} nats{found['seconds']:8.2f} s"
            f"{found['peak_bytes'] / 1e6:8.0f} MB",
            flush=True,
        )
    return write_result(output, __file__, __doc__, options, figures)


if __name__ == "__main__":
    sys.exit(main())
