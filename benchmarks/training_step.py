"""How long does a training step take, and how much memory, next to transformers?

    python -m benchmarks.training_step

Forward pass, loss of the next token, backward pass, clipping and AdamW, on the same batch, with
random weights in the shape of an official checkpoint and without dropout. transformers runs its own
GPTBigCode with PyTorch's fused attention and computes its loss itself. Peak memory is measured in a
process of its own for each: what it holds at most, and what a step adds to weights, gradients and
moments.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.clock import Clock
from benchmarks.measure import (
    ROOT,
    add_model,
    make_parser,
    positive,
    ratio,
    read_device,
    refuse_bad_input,
    require_context,
    require_memory,
    result_path,
    several,
    write_result,
)
from mqa_gpt import GPT, GPTConfig
from mqa_gpt.errors import InputError
from mqa_gpt.machine import peak_memory
from mqa_gpt.training.config import LoopConfig
from mqa_gpt.training.loop import prepare_blocks
from mqa_gpt.training.objective import Objective
from mqa_gpt.training.packing import LEFT_TO_RIGHT
from mqa_gpt.training.samples import Batch

OURS, THEIRS = "mqa-gpt", "transformers"
BYTES_PER_PARAMETER = 16  # weight, gradient and two moments in float32

Step = Callable[[], float]


def make_step(
    name: str,
    config: GPTConfig,
    ids: Tensor,
    dtype: torch.dtype,
    *,
    backend: str = "auto",
    recompute: bool = False,
) -> Step:
    """A contender's training step, which returns its loss.

    Args:
        ids: (B, T + 1) int64 tokens.
        dtype: of matrix products; weights are float32.
        backend: our attention.
        recompute: compute our activations again in the backward pass.
    """
    torch.manual_seed(0)
    device = ids.device
    model = GPT(config).to(device)
    if name == OURS:
        model.set_backend(backend)
        prepare_blocks(model, LoopConfig(recompute=recompute))
        labels = ids[:, 1:].contiguous()
        kinds = torch.full_like(labels, LEFT_TO_RIGHT, dtype=torch.uint8)
        batch = Batch(ids[:, :-1].contiguous(), labels, kinds)
        objective = Objective(model, str(dtype).removeprefix("torch."), within_documents=False)
        return step_of(model, lambda: objective(batch).sum / labels.numel())

    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    reference: Any = GPTBigCodeForCausalLM._from_config(  # type: ignore[no-untyped-call]
        GPTBigCodeConfig(**config.to_dict()), attn_implementation="sdpa"
    ).to(device)
    reference.load_state_dict(model.state_dict())
    del model
    reference.train()
    # The last token is only a label. Dropping its logits would copy those of all others.
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}

    def loss() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            found: Tensor = reference(**inputs).loss
        return found

    return step_of(reference, loss)


def step_of(model: nn.Module, loss: Callable[[], Tensor]) -> Step:
    """A whole step with the optimizer that both get."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> float:
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return value.item()

    return step


def measured_memory(
    name: str, config: GPTConfig, ids: Tensor, dtype: torch.dtype, recompute: bool
) -> dict[str, int]:
    """Bytes that this process holds after a step, and at most in the next one."""
    step = make_step(name, config, ids, dtype, recompute=recompute)
    step()
    if ids.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ids.device)
        before = torch.cuda.memory_allocated(ids.device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on
        before = peak_memory() or 0
    step()
    peak = peak_memory(ids.device) or 0
    return {"held_bytes": before, "peak_bytes": peak, "added_bytes": peak - before}


def memory_of(name: str, options: argparse.Namespace) -> dict[str, int]:
    """`measured_memory` in a new process."""
    words = [sys.executable, "-m", "benchmarks.training_step", "--memory-of", name]
    for option in ("shape", "vocabulary", "device", "dtype", "batch", "tokens"):
        value = getattr(options, option)
        words += [] if value is None else [f"--{option}", str(value)]
    words += ["--one-thread"] if options.one_thread else []
    words += ["--recompute"] if options.recompute else []
    written = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: dict[str, int] = json.loads(written)
    return found


@refuse_bad_input
def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "training_step_*.json")
    add_model(parser)
    parser.add_argument("--batch", type=positive, default=4, help="sequences per step")
    parser.add_argument("--tokens", type=positive, default=512, help="per sequence")
    parser.add_argument("--vocabulary", type=positive, help="default: the shape's")
    parser.add_argument(
        "--recompute", action="store_true", help="as with run.recompute = true, in ours only"
    )
    parser.add_argument("--repeats", type=several, default=5, help="rounds, after one to warm up")
    parser.add_argument("--memory-of", choices=(OURS, THEIRS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device, dtype, where = read_device(options)
    if dtype not in (torch.float32, torch.bfloat16):
        raise InputError("--dtype is float32, or bfloat16 for autocast")
    config = dataclasses.replace(
        GPTConfig.preset(options.shape), resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    if options.vocabulary is not None:
        config = dataclasses.replace(
            config, vocab_size=options.vocabulary, bos_token_id=None, eos_token_id=None
        )
    require_context(config, options.tokens)
    require_memory(2 * BYTES_PER_PARAMETER * config.parameters, device)
    torch.manual_seed(1)
    ids = torch.randint(config.vocab_size, (options.batch, options.tokens + 1), device=device)
    if options.memory_of is not None:
        memory_now = measured_memory(options.memory_of, config, ids, dtype, options.recompute)
        print(json.dumps(memory_now))
        return 0

    dtype_name = str(dtype).removeprefix("torch.")
    name = f"training_step_{options.shape}_{dtype_name}_{where}"
    output = result_path(options.output, f"{name}{'_recompute' * options.recompute}.json")
    memory = {name: memory_of(name, options) for name in (OURS, THEIRS)}
    steps = {
        name: make_step(name, config, ids, dtype, recompute=options.recompute)
        for name in (OURS, THEIRS)
    }
    losses = {name: step() for name, step in steps.items()}
    times = Clock(device).times(steps, options.repeats, "training steps")
    figures: dict[str, Any] = {
        "parameters": config.parameters,
        "loss_of_first_step": losses,
        "times": times,
        "speedup": ratio(times[THEIRS]["median"], times[OURS]["median"]),
        "memory": memory,
        "peak_ratio": memory[OURS]["peak_bytes"] / memory[THEIRS]["peak_bytes"],
        "added_ratio": memory[OURS]["added_bytes"] / memory[THEIRS]["added_bytes"],
    }
    for name in steps:
        rate = options.batch * options.tokens / times[name]["median"]
        print(
            f"{name:14}{times[name]['median']:8.3f} s {rate:10,.0f} tok/s   loss {losses[name]:.5f}"
            f"   peak {memory[name]['peak_bytes'] / 1e9:.2f} GB, "
            f"{memory[name]['added_bytes'] / 1e9:.2f} GB more than held"
        )
    print(
        f"speed {figures['speedup']:.2f}, peak memory {figures['peak_ratio']:.2f}, "
        f"added memory {figures['added_ratio']:.2f} times that of {THEIRS}"
    )
    return write_result(output, __file__, __doc__, options, figures)


if __name__ == "__main__":
    sys.exit(main())
