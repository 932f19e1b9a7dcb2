"""Measure the demo checkpoint on the held-out modules and write its model card.

    mqa-gpt train configs/demo.toml --out demo-run
    python scripts/demo/evaluate_demo.py demo-run
    mqa-gpt train configs/demo-2.toml --out demo-run-2
    python scripts/demo/evaluate_demo.py demo-run-2

Reads the model, config and log of a run; writes `figures.json` and `README.md` (from `card.md`)
next to the model. Settings and losses of an earlier run are read from the `figures.json` next to
the model that this run started from. Computes in float32.
"""

from __future__ import annotations

import argparse
import ast
import json
import lzma
import math
import platform
import random
import sys
import textwrap
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from python_source import (
    Signature,
    function_body,
    one_line_statements,
    parsed_body,
    signatures,
)
from tqdm import tqdm  # type: ignore[import-untyped]

from mqa_gpt import LLM
from mqa_gpt.checkpoints.inspect import inspect_checkpoint
from mqa_gpt.errors import InputError
from mqa_gpt.evaluation import Task, complete, solution_bits
from mqa_gpt.fim import MODES
from mqa_gpt.generation.loop import generate
from mqa_gpt.generation.score import score_ids
from mqa_gpt.machine import describe
from mqa_gpt.model import GPT
from mqa_gpt.tokenizer import Tokenizer
from mqa_gpt.training import checkpoints
from mqa_gpt.training.config import RunConfig, read_run_config
from mqa_gpt.training.documents import Report
from mqa_gpt.training.log import read_log
from mqa_gpt.training.prepare import held_out_documents, training_documents

CARD = Path(__file__).with_name("card.md")  # with the names of the figures in braces
COMMANDS = (  # one after the other
    "mqa-gpt train configs/demo.toml --out demo-run",
    "mqa-gpt train configs/demo-2.toml --out demo-run-2",
)
fill = partial(textwrap.fill, width=100, break_on_hyphens=False)

SEED = 0
FUNCTIONS = 50
FUNCTION_TOKENS = 200
SAMPLING = {"temperature": 0.2, "top_p": 0.95}  # customary for code models
HOLES = 200
HOLE_PROMPT_TOKENS = 256
HOLE_TOKENS = 48
BATCH = 10


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="the --out of mqa-gpt train")
    parser.add_argument("--device", help="default: the GPU if there is one")
    options = parser.parse_args(arguments)
    try:
        evaluate(options.run, options.device)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def evaluate(run: Path, device: str | None) -> None:
    """Measure a run's model and write the figures and the card to its folder."""
    folder = run / "model"
    config = read_run_config(run / "config.toml")
    llm = LLM.load(folder, device=device, dtype="float32")
    held_out = {d.name: d.text for d in held_out_documents(config.data)}
    report = Report()
    for _ in training_documents(config.data, held_out_documents(config.data), report):
        pass
    training = [*earlier_training(config), training_facts(run, config)]
    figures = {
        "command": "; ".join(
            f"{train}; python scripts/demo/evaluate_demo.py {train.split()[-1]}"
            for train in COMMANDS[: len(training)]
        ),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": describe(),
        "python": platform.python_version(),
        "training_modules": report.documents,
        "training_characters": report.characters,
        "parameters": inspect_checkpoint(folder).config.parameters,
        "training": training,
        "compression": compare_with_xz(llm, held_out),
        "completion": complete_functions(llm, held_out),
        "infilling": fill_holes(llm, held_out),
        "card": card_texts(llm, training),
    }
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    (folder / "README.md").write_text(card(llm, figures), "utf-8")
    print(json.dumps(figures, indent=2))


def earlier_training(config: RunConfig) -> list[dict[str, Any]]:
    """The facts of the runs that made the weights from which this run went on, if it did."""
    if config.model.pretrained is None:
        return []
    file = Path(config.model.pretrained) / "figures.json"
    if not file.is_file():
        raise InputError(f"{file} is missing: evaluate the run that made this model first")
    return list(json.loads(file.read_text("utf-8"))["training"])


def training_facts(run: Path, config: RunConfig) -> dict[str, Any]:
    """What the log and the last checkpoint say about the training."""
    records = read_log(run)
    starts = [record for record in records if record["kind"] == "start"]
    done = checkpoints.complete(run)
    if not done or not starts:
        raise InputError(f"{run} holds no checkpoint of a run: train it first")
    state = checkpoints.read_state(done[-1])
    kinds = ("loss", "left_to_right", "infilling")
    return {
        "config": config.to_dict(),
        "steps": state.step,
        "tokens": state.tokens,
        "seconds": state.seconds,
        "started": [{k: v for k, v in record.items() if k != "kind"} for record in starts],
        "held_out": [
            {key: record[key] for key in ("step", *kinds)}
            for record in records
            if record["kind"] == "held_out"
        ],
    }


def card_texts(llm: LLM, training: list[dict[str, Any]]) -> dict[str, str]:
    """The paragraphs of the card that depend on how this model was trained."""
    model = llm.model.config
    sizes = (
        f"{model.n_layer} layers, {model.n_head} query heads and one key/value head of width "
        f"{model.head_dim}, width {model.n_embd}, MLP width {model.inner_size}, context "
        f"{model.n_positions}, vocabulary {model.vocab_size}, tied embeddings, dropout "
        f"{model.resid_pdrop:g}. Trained on the CPU by"
    )
    parts = [
        f"    {command}\n\n{fill(run_text(facts))}"
        for command, facts in zip(COMMANDS[: len(training)], training, strict=True)
    ]
    return {"settings": "\n\n".join([fill(sizes), *parts])}


def run_text(facts: dict[str, Any]) -> str:
    """How one run trained the model, in sentences."""
    config = RunConfig.from_dict(facts["config"])
    holes, optimizer = config.data.infilling, config.optimizer
    total = sum(holes.shares)
    kinds = (f"{share / total:.0%} of the holes {what}" for share, what in zip(
        holes.shares, ("lie anywhere", "are one to three lines", "are nodes of the syntax tree"),
        strict=True,
    ) if share)  # fmt: skip
    rates = f"{holes.rate:.0%}"
    if holes.late_rate is not None:
        rates += f" (from epoch {holes.late_epoch + 1} on {holes.late_rate:.0%})"
    name = {"muon": "Muon for the hidden matrices, AdamW for the rest", "adamw": "AdamW"}
    last = facts["started"][-1]
    threads = "1 thread" if last["threads"] == 1 else f"{last['threads']} threads"
    return (
        "The initial weights hold an induction circuit (`mqa_gpt/training/induction.py`). "
        * config.model.induction
        + f"{rates} of the documents are rearranged for infilling ({holes.spm_rate:.0%} of these "
        f"in SPM order): {', '.join(kinds)}. "
        + "In prefixes and suffixes `<|endoftext|>` is left out of the loss (`end_in_context = "
        "false`). "
        * (not holes.end_in_context)
        + f"{name[optimizer.name]}; {config.schedule.warmup_steps} warm-up steps to "
        f"{optimizer.lr:g}, then a {config.schedule.name} schedule; weight decay "
        f"{optimizer.weight_decay:g}; the exported weights are an average (decay "
        f"{config.averaging.decay:g}). {facts['steps']:,} steps, "
        f"{facts['tokens'] / 1e6:,.1f} million tokens in sequences of {config.data.length}; "
        f"{config.run.dtype} on {last['device']} ({threads}), "
        f"{facts['seconds'] / 60:,.0f} minutes. Stored in {config.run.export_dtype}."
    )


def bits_per_byte(model: GPT, tokenizer: Tokenizer, texts: list[str]) -> float:
    """Bits per byte of the texts, each from a new `<|endoftext|>`.

    The window slides by half a context, so every token after the first half context is predicted
    from at least that many tokens. (`LLM.score` would move a text's last window back.)
    """
    context = model.config.n_positions
    windows = []
    for text in texts:
        ids = [tokenizer.end_of_text_id or 0, *tokenizer.encode(text, special_tokens=False)]
        done = 0  # tokens predicted so far
        while done < len(ids) - 1:
            start = max(0, done - context // 2)
            windows.append((ids[start : done + 1], ids[done + 1 : start + context + 1]))
            done = min(start + context, len(ids) - 1)
    rows = score_ids(model, windows, batch_size=1)
    bits = -sum(logprob for row in rows for logprob, _ in row) / math.log(2)
    return bits / sum(len(text.encode()) for text in texts)


def compare_with_xz(llm: LLM, modules: dict[str, str]) -> dict[str, object]:
    """Bits per byte of the model and of xz, over all modules and module by module."""
    table = {}
    model_bits, one_by_one = 0.0, 0
    for name, text in tqdm(modules.items(), desc="held-out loss", leave=False):
        size = len(text.encode())
        packed = len(lzma.compress(text.encode(), preset=9))
        bits = bits_per_byte(llm.model, llm.tokenizer, [text])
        table[name] = {"bytes": size, "model": bits, "xz": 8 * packed / size}
        model_bits += bits * size
        one_by_one += packed
    everything = "".join(modules.values()).encode()
    return {
        "bytes": len(everything),
        "model": model_bits / len(everything),
        # In one file xz finds repetitions between modules, which the model does not see.
        "xz_of_all_in_one": 8 * len(lzma.compress(everything, preset=9)) / len(everything),
        "xz_one_by_one": 8 * one_by_one / len(everything),
        "modules": table,
    }


def complete_functions(llm: LLM, modules: dict[str, str]) -> dict[str, Any]:
    """Write functions from their signatures, greedily and by sampling, and count those that parse.

    The prompt is the module up to the end of the signature, cut on the left to fit. The line break
    is left to the model, since one token holds it together with the indentation. The function ends
    before the first line indented no deeper than its `def`. If the tokens run out first, the
    unfinished last line is dropped.
    """
    tokenizer = llm.tokenizer
    everything = [s for text in modules.values() for s in signatures(text)]
    chosen = random.Random(SEED).sample(everything, FUNCTIONS)
    start = tokenizer.end_of_text_id
    assert start is not None
    room = llm.model.config.n_positions - FUNCTION_TOKENS
    prompts = [
        [start, *tokenizer.encode(s.before.removesuffix("\n"), special_tokens=False)][-room:]
        for s in chosen
    ]
    greedy = write(llm, prompts, FUNCTION_TOKENS, "functions")
    sampled = write(llm, prompts, FUNCTION_TOKENS, "functions, sampled", seed=SEED, **SAMPLING)
    return {
        "functions": FUNCTIONS,
        "greedy": count_functions(chosen, greedy),
        "sampled": {**SAMPLING, **count_functions(chosen, sampled)},
    }


def count_functions(
    signatures: list[Signature], completions: list[tuple[str, bool]]
) -> dict[str, int]:
    """How many functions parse as far as they go, hold more than a docstring, reach their end, and
    do all three."""
    counts = {"parse": 0, "parse_beyond_docstring": 0, "finished": 0, "whole": 0}
    for signature, (text, ended) in zip(signatures, completions, strict=True):
        rest, newline, text = text.partition("\n")  # a comment may follow the signature
        if not newline and not ended:
            rest = ""
        body, finished = function_body(signature.text, text, ended)
        statements = parsed_body(signature.text.removesuffix("\n") + rest + newline + body)
        first = statements[0] if statements else None
        docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        beyond = len(statements) > docstring
        counts["parse"] += bool(statements)
        counts["parse_beyond_docstring"] += beyond
        counts["finished"] += finished
        counts["whole"] += beyond and finished
    return counts


def fill_holes(llm: LLM, modules: dict[str, str]) -> dict[str, Any]:
    """Take lines out of the modules: how many bits they cost, and how many the model restores.

    A hole is a one-line statement with the white space before it. It is filled in both infilling
    orders, and by plain continuation without the suffix. A line counts as "restored" if the output
    begins with exactly that line, as "ended" if the model ended the filling, and as "one_line" if
    it ended after one line.
    """
    tokenizer = llm.tokenizer
    start = tokenizer.end_of_text_id
    assert start is not None
    everything = [hole for text in modules.values() for hole in one_line_statements(text)]
    tasks = []
    for i, (before, statement, after) in enumerate(random.Random(SEED).sample(everything, HOLES)):
        cut = len(before.rstrip())
        tasks.append(Task(i, before[:cut], after, before[cut:] + statement))
    lines = [str(task.solution) for task in tasks]
    # Infilling gives each side half of the prompt.
    half = HOLE_PROMPT_TOKENS // 2
    prompts = [
        [start, *tokenizer.encode(task.prefix, special_tokens=False)[-half:]] for task in tasks
    ]
    ids = [tokenizer.encode(line, special_tokens=False) for line in lines]
    scores = score_ids(llm.model, list(zip(prompts, ids, strict=True)), batch_size=BATCH)
    bits = [-sum(logprob for logprob, _ in row) / math.log(2) for row in scores]
    texts = write(llm, prompts, HOLE_TOKENS, "holes (without suffix)")
    figures = {"holes": HOLES, "without_suffix": count_fillings(lines, bits, texts)}
    for mode in MODES:
        options: dict[str, Any] = {"mode": mode, "prompt_tokens": HOLE_PROMPT_TOKENS}
        bits = solution_bits(llm, tasks, HOLE_TOKENS, **options)
        fillings = complete(llm, tasks, HOLE_TOKENS, **options)
        bar = tqdm(fillings, desc=f"holes ({mode})", total=HOLES, leave=False)
        texts = [(filling.text, filling.finish_reason == "stop") for (filling,) in bar]
        figures[mode] = count_fillings(lines, bits, texts)
    return figures


def count_fillings(
    lines: list[str], bits: list[float], fillings: list[tuple[str, bool]]
) -> dict[str, float]:
    """Bits per byte of the lines, and how many fillings restore one, end, and end after one."""
    return {
        "bits_per_byte": sum(bits) / sum(len(line.encode()) for line in lines),
        "restored": sum(
            (text + "\n" * ended).startswith(f"{line}\n")
            for (text, ended), line in zip(fillings, lines, strict=True)
        ),
        "ended": sum(ended for _, ended in fillings),
        "one_line": sum(ended and len(text.split("\n")) == 2 for text, ended in fillings),
    }


def write(
    llm: LLM, prompts: list[list[int]], new_tokens: int, what: str, **sampling: Any
) -> list[tuple[str, bool]]:
    """The text after each prompt, and whether the model wrote an end token."""
    end = llm.tokenizer.end_of_text_id
    results = []
    for i in tqdm(range(0, len(prompts), BATCH), desc=what, leave=False):
        batch = prompts[i : i + BATCH]
        for ids in generate(llm.model, batch, new_tokens, eos_token_id=end, **sampling):
            results.append((llm.tokenizer.decode(ids), ids[-1] == end))
    return results


def card(llm: LLM, figures: dict[str, Any]) -> str:
    """The model card; every number is from the figures or from the code that made them."""
    config = llm.model.config
    compression, completion = figures["compression"], figures["completion"]
    infilling = figures["infilling"]
    rows = (
        f"| `{name}` | {row['bytes']:,} | {row['model']:.3f} | {row['xz']:.3f} |"
        for name, row in compression["modules"].items()
    )
    return CARD.read_text("utf-8").format(
        millions=figures["parameters"] / 1e6,
        held_out=len(compression["modules"]),
        held_out_bytes=compression["bytes"],
        model=compression["model"],
        xz_all=compression["xz_of_all_in_one"],
        xz_each=compression["xz_one_by_one"],
        functions=completion["functions"],
        greedy=completion["greedy"],
        sampled=completion["sampled"],
        **SAMPLING,
        function_tokens=FUNCTION_TOKENS,
        holes=infilling["holes"],
        bits_without=infilling["without_suffix"]["bits_per_byte"],
        without=infilling["without_suffix"],
        bits_spm=infilling["spm"]["bits_per_byte"],
        spm=infilling["spm"],
        bits_psm=infilling["psm"]["bits_per_byte"],
        psm=infilling["psm"],
        hole_tokens=HOLE_PROMPT_TOKENS,
        filling_tokens=HOLE_TOKENS,
        half=config.n_positions // 2,
        context=config.n_positions,
        modules="\n".join(rows),
        python=figures["python"],
        training_modules=figures["training_modules"],
        characters=figures["training_characters"] / 1e6,
        card=figures["card"],
    )


if __name__ == "__main__":
    sys.exit(main())
