"""`mqa-gpt evaluate`: infilling, and tasks that are judged by running what the model wrote."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mqa_gpt.checkpoints.hub import resolve
from mqa_gpt.cli.input import numbers, unescape
from mqa_gpt.cli.options import CachedModelOptions, Json, Mode, with_groups
from mqa_gpt.cli.output import new_table, note, print_json, print_table, visible, write
from mqa_gpt.errors import InputError, shown
from mqa_gpt.evaluation.execution import PROTECTIONS, Limits
from mqa_gpt.evaluation.holes import KINDS, cut_holes, read_files
from mqa_gpt.evaluation.infilling import evaluate_infilling
from mqa_gpt.evaluation.metrics import edit_similarity, summarize_passes
from mqa_gpt.evaluation.records import checkpoint_digest, open_records
from mqa_gpt.evaluation.samples import FUNCTION_ENDS, read_samples, run_samples, write_samples
from mqa_gpt.evaluation.tasks import Task, read_tasks
from mqa_gpt.fim import MODES, check_mode
from mqa_gpt.llm import BATCH_SIZE, LLM
from mqa_gpt.progress import progress, status

SAMPLES = "samples"  # the file that `tasks` writes, without .jsonl

BatchSize = Annotated[
    int, typer.Option(metavar="N", help="Complete N at a time; more take more memory.")
]
PromptTokens = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Show the model at most N tokens, those nearest to the completion. "
        "Default: what fits into the context.",
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="End before this text; may be given several times."),
]

app = typer.Typer(
    name="evaluate",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure a model: infilling, and tasks by pass@k.",
)


def _command(function: Callable[..., None]) -> Callable[..., None]:
    app.command(name=function.__name__.replace("_", "-"))(with_groups(function))
    return function


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn."""

    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Write at most N tokens per sample.")
    ] = 256
    n: Annotated[int, typer.Option("--n", metavar="N", help="Write N samples per task.")] = 1
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0 takes the likeliest token; above 0 samples.")
    ] = 0.0
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="P", help="Sample from the likeliest tokens that reach probability P."
        ),
    ] = None
    seed: Annotated[int, typer.Option(metavar="N", help="Of sampling.")] = 0


@_command
def infilling(
    source: Annotated[str, typer.Argument(metavar="SOURCE", hidden=True)],
    *,
    holes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND",
            help=f"Cut {', '.join(KINDS)} holes; may be given several times. Default: all three.",
        ),
    ] = None,
    count: Annotated[
        int | None, typer.Option(metavar="N", help="Cut N holes of each kind. Default: 100.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Of where they are cut. Default: 0.")
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Files of the folder to cut, such as '*.py'; may be given several times. "
            "Default: every text file.",
        ),
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            metavar="psm|spm",
            help="Which part the model reads first: the prefix (psm) or the suffix (spm). "
            "Default: both ways.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Write at most N tokens per filling.")
    ] = 128,
    prompt_tokens: PromptTokens = None,
    stop: Stop = None,
    batch_size: BatchSize = BATCH_SIZE,
    out: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Write fillings and report; continue what is there."),
    ] = None,
    model: CachedModelOptions,
    as_json: Json = False,
) -> None:
    """Fill holes and compare: exact match and edit similarity.

    SOURCE is a folder of code, where holes are cut at random, or a file of HumanEval-Infilling.
    Fillings are greedy. White space at the ends of a filling does not count. Bits per byte say how
    likely the model finds what was taken out.

    \b
    Examples:
      mqa-gpt evaluate infilling YOURFOLDER --include '*.py'
      mqa-gpt evaluate infilling HumanEval-SingleLineInfilling.jsonl.gz --mode psm --out results
    """
    model.check()
    _check_folder(out)
    modes = tuple(dict.fromkeys(mode or MODES))
    for order in modes:
        check_mode(order)
    settings: dict[str, Any] = {"evaluation": "infilling"}
    if Path(source).is_dir():
        kinds = tuple(dict.fromkeys(holes or KINDS))
        patterns = tuple(include or ("*",))
        count, seed = 100 if count is None else count, seed or 0
        texts = read_files(source, patterns)
        tasks = [task for kind in kinds for task in cut_holes(texts, kind, count, seed)]
        settings |= {"holes": kinds, "count": count, "seed": seed, "include": patterns}
    elif holes or include or count is not None or seed is not None:
        raise InputError(
            f"--holes, --count, --seed and --include are for a folder, which {source!r} is not"
        )
    else:
        tasks = read_tasks(source)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "prompt_tokens": prompt_tokens}
    options["stop"] = [unescape(text) for text in stop or []]
    edit_similarity("", "")  # fail early where rapidfuzz is missing
    llm, about_model = _load(model, out)
    settings |= {"modes": modes, **options, "tasks": _digest(tasks), **about_model}
    with open_records(out, "fillings", settings) as records:
        with _progress(len(modes) * len(tasks), "filling", out) as advance:
            results = evaluate_infilling(
                llm,
                tasks,
                modes=modes,
                batch_size=batch_size,
                records=records,
                advance=advance,
                **options,
            )
        report = records.finish({"groups": results})
    if as_json:
        print_json({"model": model.name, **report})
        return
    table = new_table(
        "holes",
        "order",
        ">number",
        ">exact match",
        ">edit similarity",
        ">ended by itself",
        ">bits per byte",
    )
    for one in results:
        table.add_row(
            visible(one["kind"]),
            one["mode"].upper(),
            f"{one['holes']:,}",
            _share(one["exact_match"], one["exact_match_error"]),
            _share(one["edit_similarity"], one["edit_similarity_error"]),
            f"{one['ended']:.1%}",
            f"{one['bits_per_byte']:.3f}",
        )
    print_table(table)
    if out is not None:
        note(f"fillings and report are in {out}")


@_command
def tasks(
    file: Annotated[str, typer.Argument(metavar="FILE", hidden=True)],
    *,
    out: Annotated[
        str, typer.Option(metavar="FOLDER", help="Write samples; continue what is there.")
    ],
    mode: Mode = "psm",
    stop: Stop = None,
    prompt_tokens: PromptTokens = None,
    batch_size: BatchSize = BATCH_SIZE,
    sampling: Sampling,
    model: CachedModelOptions,
    as_json: Json = False,
) -> None:
    """Write samples for the tasks of a file, in the form that the public harnesses score.

    FILE is JSON Lines as HumanEval and HumanEval-Infilling have them, packed by gzip or not. The
    folder gets samples.jsonl, with a "task_id" and a "completion" per line. No code is run.

    A task without a suffix is continued up to the end of its function: without --stop, that is
    before \\nclass, \\ndef, \\n#, \\nif or \\nprint. A hole is filled until the model ends it.

    \b
    Examples:
      mqa-gpt evaluate tasks HumanEval.jsonl.gz --out humaneval
      mqa-gpt evaluate tasks tasks.jsonl --out sampled --n 20 --temperature 0.2
    """
    model.check()
    _check_folder(out)
    found = read_tasks(file)
    holes = sum(task.suffix is not None for task in found)
    if 0 < holes < len(found):
        raise InputError(f"{holes:,} of {len(found):,} tasks have a suffix: give them apart")
    stops = [unescape(text) for text in stop] if stop else [] if holes else list(FUNCTION_ENDS)
    options = {**asdict(sampling), "stop": stops, "prompt_tokens": prompt_tokens}
    options |= {"mode": mode} if holes else {}
    llm, about_model = _load(model, out)
    settings = {"evaluation": "tasks", **options, "tasks": _digest(found), **about_model}
    with open_records(out, SAMPLES, settings, group=sampling.n) as records:
        with _progress(sampling.n * len(found), "sample", out) as advance:
            samples = write_samples(
                llm, found, batch_size=batch_size, records=records, advance=advance, **options
            )
        cut = len({sample["task_id"] for sample in samples if any(sample["left_out"])})
        ended = sum(sample["finish_reason"] == "stop" for sample in samples)
        counts = {"tasks": len(found), "samples": len(samples), "ended": ended, "cut": cut}
        report = records.finish(counts)
    if cut:
        note(f"note: {cut:,} of {len(found):,} prompts did not fit and were cut")
    if as_json:
        print_json({"model": model.name, **report})
        return
    path = Path(out, f"{SAMPLES}.jsonl")
    write(f"{len(samples):,} samples of {len(found):,} tasks, {ended:,} ended: {path}\n")


@_command
def pass_at_k(
    samples: Annotated[str, typer.Argument(metavar="SAMPLES", hidden=True)],
    *,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The tasks with their tests, to run the samples."),
    ] = None,
    allow_code_execution: Annotated[
        bool,
        typer.Option(
            "--allow-code-execution",
            help="Run what the model wrote on this machine. Read docs/evaluation.md before.",
        ),
    ] = False,
    k: Annotated[str, typer.Option("--k", metavar="K,K,...", help="Of pass@k.")] = "1,10,100",
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="End a sample after so long.")
    ] = 3.0,
    memory: Annotated[
        int, typer.Option(metavar="MB", help="End a sample that takes more (in units of 2^20).")
    ] = 1024,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Run N at a time. Default: one per core.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Write results and report; continue what is there."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Estimate pass@k: the chance that one of k samples passes the tests.

    SAMPLES is a file of samples, or the folder that `tasks` has written. If a harness has run them,
    so that each line holds "passed", nothing is run. Otherwise give --tasks and
    --allow-code-execution: every sample runs in a process of its own with limits.

    \b
    Examples:
      mqa-gpt evaluate pass-at-k humaneval/samples.jsonl_results.jsonl
      mqa-gpt evaluate pass-at-k humaneval --tasks HumanEval.jsonl.gz --allow-code-execution
    """
    _check_folder(out)
    limits = Limits(timeout, memory)
    ks = sorted(set(numbers(k, "--k")))
    path = Path(samples, f"{SAMPLES}.jsonl") if Path(samples).is_dir() else Path(samples)
    found = read_samples(path)
    if tasks is None:
        if allow_code_execution:
            raise InputError("--allow-code-execution needs --tasks, the file with the tests")
        if any("passed" not in sample for sample in found):
            raise InputError(
                f"the samples of {path} have not been run: let a harness do it, or read "
                "docs/evaluation.md and add --tasks FILE and --allow-code-execution"
            )
    elif not allow_code_execution:
        raise InputError(
            "this runs code that a model wrote: read docs/evaluation.md, then add "
            "--allow-code-execution"
        )
    settings: dict[str, Any] = {"evaluation": "pass-at-k", "samples": _digest(found), "k": ks}
    if tasks is not None:
        collection = read_tasks(tasks)
        settings |= {"tasks": _digest(collection), **asdict(limits)}
    with open_records(out, "results", settings) as records:
        if tasks is not None:
            with _progress(len(found), "sample", out) as advance:
                found = run_samples(
                    collection,
                    found,
                    limits,
                    workers=_cores() if workers is None else workers,
                    records=records,
                    advance=advance,
                )
        passed: dict[Any, list[bool]] = {}
        for sample in found:
            passed.setdefault(sample["task_id"], []).append(sample["passed"])
        results = summarize_passes(passed, ks)
        if tasks is not None:
            active = set.intersection(*(set(sample["protections"]) for sample in found))
            results["protections"] = [name for name in PROTECTIONS if name in active]
            if missing := [name for name in PROTECTIONS if name not in active]:
                note(f"note: not restricted on this system: {', '.join(missing)}")
        report = records.finish(results)
    if as_json:
        print_json(report)
        return
    table = new_table("", ">mean over tasks")
    for number, value in results["pass_at_k"].items():
        table.add_row(f"pass@{number}", _share(value["mean"], value["error"]))
    print_table(table)
    fewest, most = results["samples_per_task"]
    each = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    note(
        f"{results['tasks']:,} tasks with {each} samples; "
        f"{results['passed']:,} of {results['samples']:,} samples passed"
    )


def _load(model: CachedModelOptions, out: str | None) -> tuple[LLM, dict[str, Any]]:
    """The model, and what of it decides a result; with a folder to continue, the checkpoint too."""
    llm, _ = model.load()
    settings: dict[str, Any] = {
        "dtype": str(llm.model.dtype).removeprefix("torch."),
        "quantize": model.quantize,
        "cache_dtype": model.cache_dtype,
        "device": llm.model.device.type,
    }
    if out is not None:
        with status() as say:
            say("computing the checkpoint's SHA-256")
            folder = resolve(model.name_or_dir, model.revision)
            settings["checkpoint"] = checkpoint_digest(folder)
    return llm, settings


def _check_folder(out: str | None) -> None:
    """Raise InputError, before the work, if `--out` is no folder; "" is not the current one."""
    if out is not None and (not out or (Path(out).exists() and not Path(out).is_dir())):
        raise InputError(f"cannot write to {shown(out)}: it is not a folder")


def _cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


def _digest(items: Sequence[Task | dict[str, Any]]) -> str:
    """SHA-256 of tasks or samples."""
    values = [asdict(item) if isinstance(item, Task) else item for item in items]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


@contextmanager
def _progress(total: int, unit: str, out: str | None) -> Iterator[Callable[[int, int], None]]:
    """A progress bar for `advance`; says after Ctrl-C how to go on."""
    try:
        with progress(total, unit) as show:
            yield lambda done, total: show(done, f"{done / total:.0%}")
    except KeyboardInterrupt:
        if out is not None:
            note("repeat the command to continue")
        raise


def _share(mean: float, error: float | None) -> str:
    return f"{mean:.1%}" if error is None else f"{mean:.1%} ± {error:.1%}"
