"""Train the demo checkpoint: a small multi-query model of the Python standard library's sources.

    python scripts/demo/train_demo.py --out demo-run             # about an hour on two cores
    python scripts/demo/train_demo.py --out demo-run --resume    # after an interruption
    python scripts/demo/evaluate_demo.py demo-run                # figures and model card

The data and its packing are in corpus.py. The result in `--out` is an ordinary checkpoint;
`--resume` reads `state.pt` in the same folder.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from corpus import batches, read_corpus, train_tokenizer
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from mqa_gpt.checkpoints.placement import as_device
from mqa_gpt.config import GPTConfig
from mqa_gpt.errors import InputError
from mqa_gpt.fim import infill_prompt
from mqa_gpt.generation.loop import generate
from mqa_gpt.machine import is_out_of_memory
from mqa_gpt.model import GPT
from mqa_gpt.tokenizer import Tokenizer
from mqa_gpt.training.induction import start_from_induction

CONFIG = GPTConfig(
    vocab_size=4096,
    n_positions=1024,
    n_embd=256,
    n_layer=6,
    n_head=4,
    n_inner=1024,
    initializer_range=0.05,  # about n_embd^-0.5, as in StarCoderBase
    # Fewer than three passes over the data do not overfit.
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=0,
    eos_token_id=0,
)
# (rows, window) of two steps in three, and of the third. In a short run many small steps learn more
# than few large ones, and short windows teach the basics sooner.
SHORT_BATCH, LONG_BATCH = (8, 256), (2, CONFIG.n_positions)
TOKENS_PER_STEP = 2048
STEPS = 6000
PEAK_LR = 1.5e-3
WARMUP_STEPS = 200
SEED = 0

EVALUATE_EVERY = 400
SUBSET_CHARACTERS = 4000  # of each held-out module, for the loss during training

SAMPLE_PROMPTS = ("def read_lines(path):\n", "class Stack:\n    def __init__(self")
SAMPLE_HOLE = ("def area(width, height):\n    return ", "\n\n\nprint(area(3, 4))\n")


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to zero."""
    if step < WARMUP_STEPS:
        return PEAK_LR * (step + 1) / WARMUP_STEPS
    return PEAK_LR * (steps - step) / (steps - WARMUP_STEPS)


def make_optimizer(model: GPT) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and embeddings only.

    beta2 is above the customary 0.95 because gradients of so small a batch are noisy.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.99), fused=True)


def loss_of(model: GPT, batch: Tensor) -> Tensor:
    """Mean loss over every position of a batch (B, T + 1), in nats per token."""
    cuda = model.device.type == "cuda"
    with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
        logits = model(batch[:, :-1])  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def mixed_batches(texts: list[str], tokenizer: Tokenizer) -> Iterator[Tensor]:
    """Endless training batches: two of short windows, then one of long windows."""
    short, long = (
        batches(texts, tokenizer, batch_size=rows, length=length, seed=SEED + rows)
        for rows, length in (SHORT_BATCH, LONG_BATCH)
    )
    while True:
        yield next(short)
        yield next(short)
        yield next(long)


@torch.no_grad()
def bits_per_byte(model: GPT, tokenizer: Tokenizer, texts: list[str]) -> float:
    """Bits per byte of the texts, each from a new `<|endoftext|>`.

    The window slides by half a context, so every token after the first half context is predicted
    from at least that many tokens.
    """
    context = model.config.n_positions
    nats = 0.0
    for text in texts:
        ids = [tokenizer.end_of_text_id, *tokenizer.encode(text, special_tokens=False)]
        done = 0  # tokens predicted so far
        while done < len(ids) - 1:
            start = max(0, done - context // 2)
            window = torch.tensor([ids[start : start + context + 1]], device=model.device)
            logits = model(window[:, :-1])[0, done - start :]  # (new, V)
            labels = window[0, 1 + done - start :]
            nats += F.cross_entropy(logits.float(), labels, reduction="sum").item()
            done += len(labels)
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def show_samples(model: GPT, tokenizer: Tokenizer) -> None:
    prompts = [tokenizer.encode(text, special_tokens=False) for text in SAMPLE_PROMPTS]
    prompts.append(infill_prompt(tokenizer, *SAMPLE_HOLE))
    *completions, middle = generate(
        model, prompts, 48, eos_token_id=tokenizer.end_of_text_id, temperature=0.4, seed=SEED
    )
    for text, ids in zip(SAMPLE_PROMPTS, completions, strict=True):
        tqdm.write(f"| {(text + tokenizer.decode(ids))!r}")
    tqdm.write(f"| {SAMPLE_HOLE[0]!r} [{tokenizer.decode(middle)!r}] {SAMPLE_HOLE[1]!r}")


def write_atomically(path: Path, save: Callable[[Path], object]) -> None:
    """Let `save(temporary path)` write a file, which gets its name once it is complete."""
    temporary = path.with_name(path.name + ".part")
    save(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def load_tokenizer(out: Path, texts: list[str], resume: bool) -> Tokenizer:
    """The tokenizer that a resumed run started with, or a newly trained one."""
    if not resume:
        trained = train_tokenizer(texts, CONFIG.vocab_size)
        write_atomically(out / "tokenizer.json", lambda temporary: trained.save(str(temporary)))
    return Tokenizer.from_pretrained(out)


def load_state(path: Path, model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load an interrupted run's weights and moments; returns the rest of its state."""
    try:
        state: dict[str, Any] = torch.load(path, map_location=model.device, weights_only=True)
        model.load_state_dict(state.pop("model"))
        optimizer.load_state_dict(state.pop("optimizer"))
        if state.keys() != new_state().keys():
            raise ValueError(f"it holds {', '.join(state)}")
    except Exception as error:  # of a damaged file torch raises many kinds
        if isinstance(error, OSError) or is_out_of_memory(error):  # not the file's fault
            raise
        raise InputError(
            f"{path} is not the state of a run of this script: omit --resume to start again"
        ) from error
    return state


def new_state() -> dict[str, Any]:
    """All state that does not follow from the seed and the number of steps taken."""
    return {"step": 0, "seconds": [], "cpu_seconds": 0.0, "held_out": []}


def train(out: Path, device: torch.device, steps: int, resume: bool) -> None:
    state_path = out / "state.pt"
    if resume and not state_path.exists():
        raise InputError(f"{state_path} does not exist: there is no run to resume; omit --resume")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is not a folder: name another for the run")
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs; no effect on the CPU

    corpus = read_corpus()
    texts = list(corpus.training.values())
    tokenizer = load_tokenizer(out, texts, resume)
    subset = [text[:SUBSET_CHARACTERS] for text in corpus.held_out.values()]
    model = GPT(CONFIG)
    start_from_induction(model)
    model.to(device)
    optimizer = make_optimizer(model)
    state = load_state(state_path, model, optimizer) if resume else new_state()
    if state["step"] > steps:
        raise InputError(f"the run in {out} has taken {state['step']} steps: ask for more --steps")
    print(
        f"{len(texts)} training modules, {sum(map(len, texts)) / 1e6:.1f} million characters; "
        f"{len(subset)} held out; {sum(p.numel() for p in model.parameters()):,} parameters; "
        f"step {state['step']} of {steps} on {device}",
        flush=True,
    )

    def evaluate_and_save() -> None:
        model.eval()
        bits = bits_per_byte(model, tokenizer, subset)
        state["held_out"].append([state["step"], bits])
        bar.write(f"step {state['step']}: {bits:.3f} bits per byte on parts of held-out modules")
        show_samples(model, tokenizer)
        model.train()
        everything = {**state, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        write_atomically(state_path, lambda temporary: torch.save(everything, temporary))

    stream = mixed_batches(texts, tokenizer)
    bar = tqdm(total=steps, initial=state["step"], unit="step", mininterval=5, dynamic_ncols=True)
    model.train()
    cpu_started = time.process_time() - state["cpu_seconds"]
    for batch in islice(stream, state["step"], steps):
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state["step"], steps)
        loss = loss_of(model, batch.to(device))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        nats = loss.item()  # waits for the device
        if not math.isfinite(nats):
            raise SystemExit(f"the loss is {nats} at step {state['step']}: lower PEAK_LR")
        state["step"] += 1
        state["seconds"].append(time.perf_counter() - started)
        state["cpu_seconds"] = time.process_time() - cpu_started
        speed = TOKENS_PER_STEP / statistics.mean(state["seconds"][-30:])
        bar.set_postfix_str(f"loss {nats:.3f}, {speed:.0f} tok/s", refresh=False)
        bar.update()
        if state["step"] % EVALUATE_EVERY == 0 or state["step"] == steps:
            evaluate_and_save()
    bar.close()

    model.eval().half().save_pretrained(out)
    facts = {
        "steps": steps,
        "tokens_per_step": TOKENS_PER_STEP,
        "peak_lr": PEAK_LR,
        "warmup_steps": WARMUP_STEPS,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "seconds": sum(state["seconds"]),
        "median_step_seconds": statistics.median(state["seconds"]),
        "cpu_seconds": state["cpu_seconds"],
        "held_out_parts_bits_per_byte": state["held_out"],
    }
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"checkpoint in {out}; next: python scripts/demo/evaluate_demo.py {out}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"default {STEPS}")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--resume", action="store_true", help="continue from the folder's state.pt")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}: it must be at least 1")
    try:
        train(options.out, as_device(options.device), options.steps, options.resume)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
