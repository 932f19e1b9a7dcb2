"""Options that several commands share: their flags and help, and how the library takes them.

A group of options is a dataclass whose fields are typer options. A command that takes a group as a
keyword argument gets each of its fields as an option (`with_groups`).
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, cast, get_type_hints

import torch
import typer

from mqa_gpt.attention import select_attention
from mqa_gpt.checkpoints.headers import read_config
from mqa_gpt.checkpoints.hub import resolve
from mqa_gpt.checkpoints.load import DEMO_DIR
from mqa_gpt.checkpoints.placement import as_device, as_dtype
from mqa_gpt.cli.input import unescape
from mqa_gpt.cli.output import note
from mqa_gpt.config import MAX_SIZE, GPTConfig
from mqa_gpt.errors import InputError, shown
from mqa_gpt.fast.int8 import check_method
from mqa_gpt.fast.int8_cache import cache_class
from mqa_gpt.generation.prompts import Options, request_options
from mqa_gpt.generation.speculative import Drafter, DraftModel, PromptLookup
from mqa_gpt.llm import LLM
from mqa_gpt.machine import threads_for

FIT = "fit"

# With the largest vocabulary there can be: an option that this refuses, every model refuses.
ANY_MODEL = GPTConfig(vocab_size=MAX_SIZE)


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each field of the dataclasses among its parameters' types."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {
        name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)
    }
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in groups:
            options = [*inspect.signature(groups[name]).parameters.values()]
            types = get_type_hints(groups[name], include_extras=True)
        else:
            options, types = [parameter], hints
        parameters += [o.replace(kind=o.KEYWORD_ONLY, annotation=types[o.name]) for o in options]

    @wraps(command)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            names = [field.name for field in dataclasses.fields(group)]
            values[name] = group(**{option: values.pop(option) for option in names})
        command(**values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _count_or_fit(text: object) -> int | None:
    """An option's number of tokens; None for "fit"."""
    if text is None or text == FIT:
        return None
    try:
        return int(str(text))
    except ValueError:
        raise typer.BadParameter(f"{shown(text)} is neither a number nor {FIT}") from None


# ---------------------------------------------------------------------------------- single options

Prompts = Annotated[list[str] | None, typer.Argument(metavar="PROMPT", hidden=True)]
PromptFile = Annotated[
    list[str] | None,
    typer.Option(
        "--file",
        "-f",
        metavar="PATH",
        help="Read a prompt from a file; may be given several times.",
    ),
]
NoSpecialTokens = Annotated[
    bool,
    typer.Option(
        "--no-special-tokens",
        help="Treat <fim_prefix>, <|endoftext|> and the like in a prompt as plain text.",
    ),
]
Mode = Annotated[
    str,
    typer.Option(
        metavar="psm|spm",
        help="Which part of an infill the model reads first: the prefix (psm) or the suffix (spm).",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Instead of a checkpoint: a published model's sizes, such as starcoderbase-1b; "
        "nothing is downloaded.",
    ),
]
Statistics = Annotated[bool, typer.Option("--stats", help="Report times, speeds and memory.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


# ------------------------------------------------------------------------------- groups of options


@dataclass(frozen=True)
class CheckpointOptions:
    """Which checkpoint."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME|FOLDER",
            help="A checkpoint: its name on the Hugging Face hub, or a folder. "
            "Default: the demo checkpoint that comes with the package.",
        ),
    ] = None
    revision: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Branch, tag or commit of a checkpoint on the hub."),
    ] = None

    @property
    def name(self) -> str:
        """What reports call the checkpoint."""
        return "demo" if self.model is None else self.model

    @property
    def name_or_dir(self) -> str | Path:
        """What the library loads."""
        return DEMO_DIR if self.model is None else self.model


@dataclass(frozen=True)
class ModelOptions(CheckpointOptions):
    """Which model, and how and where it runs."""

    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="cpu, cuda, cuda:1, ... Default: the GPU if there is one."
        ),
    ] = None
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="float32, bfloat16 (bf16), float16 (fp16, half) or float64. "
            "Default: the checkpoint's own.",
        ),
    ] = None
    backend: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Attention: reference, sdpa, triton, or auto for the fastest that runs here.",
        ),
    ] = "auto"
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="int8",
            help="Round the weights to 8 bits: less to read, so faster, but approximate.",
        ),
    ] = None
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=4 * (os.cpu_count() or 1),  # far more of them crash the process
            help="CPU threads. Default: 1 for small models, else PyTorch's choice.",
        ),
    ] = None

    @property
    def settings(self) -> dict[str, Any]:
        """How and where it runs, as the library takes it."""
        names = ("device", "dtype", "backend", "quantize")
        return {name: getattr(self, name) for name in names}

    def check(self) -> None:
        """Raise InputError for an unknown value, without touching the checkpoint."""
        device = as_device(self.device)
        as_dtype(self.dtype or torch.float32)
        select_attention(self.backend, device)
        check_method(self.quantize)

    def set_threads(self, config: GPTConfig | None = None) -> None:
        """Use as many CPU threads as `--threads` says, or as suit the model's size.

        Args:
            config: of the model; the checkpoint's if None.
        """
        if config is None:
            config = read_config(resolve(self.name_or_dir, self.revision))
        torch.set_num_threads(self.threads or threads_for(config))


@dataclass(frozen=True)
class CachedModelOptions(ModelOptions):
    """The same, and how keys and values are cached."""

    cache_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="int8",
            help="Cache keys and values in 8 bits: half the memory of 16, but approximate.",
        ),
    ] = None

    def check(self) -> None:
        """Raise InputError for an unknown value, without touching the checkpoint."""
        super().check()
        cache_class(self.cache_dtype)

    def load(self, draft: str | None = None) -> tuple[LLM, float]:
        """The loaded checkpoint, and the seconds that loading took.

        Args:
            draft: what `load_drafter` loads next; a name that cannot be found is an error before
                anything is loaded.
        """
        begin = time.perf_counter()
        if draft is not None and draft != "prompt":
            resolve(draft)
        folder = resolve(self.name_or_dir, self.revision)
        self.set_threads(read_config(folder))
        llm = LLM.load(folder, cache_dtype=self.cache_dtype, **self.settings)
        for text in llm.notes:
            note(f"note: {text}")
        return llm, time.perf_counter() - begin

    def load_drafter(self, draft: str | None, llm: LLM) -> Drafter | None:
        """What `--draft` names, for this model.

        Raises:
            InputError: a model with another tokenizer.
        """
        if draft is None:
            return None
        if draft == "prompt":
            return PromptLookup()
        small = LLM.load(draft, device=self.device, dtype=self.dtype, backend=self.backend)
        if not llm.tokenizer.same_vocabulary(small.tokenizer):
            raise InputError(
                f"--draft {shown(draft)} has another tokenizer than {self.name}: draft with a "
                "model of the same family"
            )
        return DraftModel(small.model)


@dataclass(frozen=True)
class GenerationOptions:
    """How much is written, and how each token is chosen."""

    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar=f"N|{FIT}",
            parser=_count_or_fit,
            help=f"Write at most N tokens, or with {FIT} as many as fit into the context.",
        ),
    ] = 64  # None: as many as fit
    min_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Generate at least N tokens.")
    ] = 0
    ignore_eos: Annotated[
        bool,
        typer.Option("--ignore-eos", help="Continue after end-of-text."),
    ] = False
    truncate: Annotated[
        bool,
        typer.Option(
            "--truncate",
            help="If a text is too long, cut it: a prompt at its beginning, an infill at the "
            "ends far from the hole.",
        ),
    ] = False
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help=r"End before this text; may be given several times. \n, \t, \r and \\ stand for "
            "newline, tab, carriage return and backslash.",
        ),
    ] = None
    temperature: Annotated[
        float,
        typer.Option(
            metavar="T",
            help="0 always takes the likeliest token (greedy); above 0 samples, the higher the "
            "more freely.",
        ),
    ] = 0.0
    top_k: Annotated[
        int | None,
        typer.Option(metavar="K", help="Sample from the K likeliest tokens; 0 from all."),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            help="Sample from the likeliest tokens that together reach probability P.",
        ),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(metavar="P", help="Drop tokens less likely than P times the likeliest."),
    ] = None
    repetition_penalty: Annotated[
        float,
        typer.Option(metavar="X", help="Above 1: tokens that occurred before become less likely."),
    ] = 1.0
    seed: Annotated[int | None, typer.Option(metavar="N", help="Make sampling repeatable.")] = None
    n: Annotated[int, typer.Option("--n", metavar="N", help="Write N samples per prompt.")] = 1

    def for_library(self) -> Options:
        """The options of a single prompt as `LLM` takes them, its maximum of tokens apart.

        Raises:
            PromptError: one that no model takes.
        """
        names = Options.__annotations__.keys() - {"draft"}  # which is loaded after the model
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name in names}
        given["stop"] = [unescape(text) for text in self.stop or []]
        options = cast(Options, given)
        common = {**options, "max_new_tokens": self.max_new_tokens}
        request_options(ANY_MODEL, None, common, n=self.n)
        filters = ("top_k", "top_p", "min_p")
        idle = [name for name in filters if getattr(self, name) is not None]
        if self.temperature == 0 and idle:
            flags = " and ".join("--" + name.replace("_", "-") for name in idle)
            note(f"note: at a temperature of 0, {flags} has no effect")
        return options


@dataclass(frozen=True)
class ReportedOptions(GenerationOptions):
    """The same, for commands that print what they write."""

    draft: Annotated[
        str | None,
        typer.Option(
            metavar="prompt|NAME|FOLDER",
            help="Guess ahead, to write the same tokens faster: from the text itself (prompt), or "
            "with a smaller model that has the same tokenizer.",
        ),
    ] = None
    logprobs: Annotated[
        int | None,
        typer.Option(
            metavar="K", help="Report each token's log-probability, and the K likeliest tokens."
        ),
    ] = None
