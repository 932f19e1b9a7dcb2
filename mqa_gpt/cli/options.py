"""The options that several commands share: their types, flags and help."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME|FOLDER",
        help="A checkpoint: its name on the Hugging Face hub, or a folder. "
        "Default: the demo checkpoint that comes with the package.",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Branch, tag or commit of a checkpoint on the hub."),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, ... Default: the GPU if there is one."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="float32, bfloat16, float16 or float64. Default: the checkpoint's own.",
    ),
]
Backend = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Attention: reference, sdpa, triton, or auto for the fastest that runs here.",
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        metavar="int8",
        help="Round the weights to 8 bits: less to read, so faster, and not quite the same.",
    ),
]
CacheDtype = Annotated[
    str | None,
    typer.Option(
        metavar="int8",
        help="Keep keys and values as 8 bits: half the memory of 16, and not quite the same.",
    ),
]
PromptFile = Annotated[
    list[str] | None,
    typer.Option(
        "--file",
        "-f",
        metavar="PATH",
        help="Read a prompt from a file; may be given several times.",
    ),
]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="Write at most N tokens.")]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help=r"End before this text; may be given several times. \n, \t, \r and \\ stand for "
        "newline, tab, carriage return and backslash.",
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        metavar="T",
        help="0 always takes the likeliest token (greedy); above 0 draws, more freely the higher.",
    ),
]
TopK = Annotated[int | None, typer.Option(metavar="K", help="Draw among the K likeliest tokens.")]
TopP = Annotated[
    float | None,
    typer.Option(
        metavar="P", help="Draw among the likeliest tokens that together reach probability P."
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(metavar="P", help="Drop tokens less likely than P times the likeliest."),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(metavar="X", help="Above 1: tokens that occurred before become less likely."),
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Make the draws repeatable.")]
NoSpecialTokens = Annotated[
    bool,
    typer.Option(
        "--no-special-tokens",
        help="Take <fim_prefix>, <|endoftext|> and the like in a prompt as plain text.",
    ),
]
Mode = Annotated[
    str,
    typer.Option(
        metavar="psm|spm",
        help="What the model reads first: the prefix (psm) or the suffix (spm).",
    ),
]
Samples = Annotated[int, typer.Option("--n", metavar="N", help="Write N samples per prompt.")]
Logprobs = Annotated[
    int | None,
    typer.Option(
        metavar="K", help="Report each token's log-probability, and the K likeliest in its place."
    ),
]
Drafts = Annotated[
    str | None,
    typer.Option(
        "--draft",
        metavar="prompt|NAME|FOLDER",
        help="Guess ahead, to write the same tokens faster: what followed the last ones before, or "
        "what a smaller model with the same tokenizer writes.",
    ),
]
Statistics = Annotated[bool, typer.Option("--stats", help="Report times, speeds and memory.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
