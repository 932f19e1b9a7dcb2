"""`mqa-gpt convert`: multi-head to multi-query attention and back, GPT-2 to this architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mqa_gpt.cache import cache_bytes
from mqa_gpt.cli.input import read_text
from mqa_gpt.cli.options import CheckpointOptions, Json
from mqa_gpt.cli.output import new_table, note, print_json, print_table, size_text
from mqa_gpt.errors import CheckpointError, InputError, shown
from mqa_gpt.tokenizer import Tokenizer


def convert(
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FOLDER", help="Where the converted model is written."),
    ],
    to: Annotated[
        str,
        typer.Option(
            metavar="mqa|mha",
            help="One key/value head for all query heads, or one for each.",
        ),
    ] = "mqa",
    method: Annotated[
        str,
        typer.Option(
            metavar="aligned|mean|first",
            help="What the one key/value head is: the best one for all when each may change its "
            "basis, their mean, or the first.",
        ),
    ] = "aligned",
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            "-t",
            metavar="FILE",
            help="Typical text, some 50 kB or more: losses on it are reported, and the aligned "
            "head is the best one for it. May be given several times.",
        ),
    ] = None,
    *,
    checkpoint: CheckpointOptions,
    as_json: Json = False,
) -> None:
    """Turn multi-head into multi-query attention, or back.

    From one head to many the model stays the same. From many to one it changes, and is meant to be
    trained on for some 5% of its training. A GPT-2 checkpoint is read too: it becomes a model of
    this architecture with the same logits (--to mha), which can be converted further (--to mqa).

    \b
    Examples:
      mqa-gpt convert --model gpt2 --to mha --out gpt2-as-bigcode
      mqa-gpt convert --model mha-model --out mqa-model --text a.py --text b.py
      mqa-gpt convert --to mha --out demo-with-all-heads
    """
    from mqa_gpt.checkpoints.headers import read_config
    from mqa_gpt.checkpoints.hub import resolve
    from mqa_gpt.checkpoints.load import load_model
    from mqa_gpt.checkpoints.save import save_model
    from mqa_gpt.training.conversion import METHODS, mean_loss, text_batches, to_mha, to_mqa
    from mqa_gpt.training.export import require_empty
    from mqa_gpt.training.gpt2 import is_gpt2, load_gpt2

    if to not in ("mqa", "mha"):
        raise InputError(f"--to is {shown(to)}: expected mqa or mha")
    if method not in METHODS:
        raise InputError(f"--method is {shown(method)}: expected one of {', '.join(METHODS)}")
    texts = [read_text(file) for file in text or []]
    require_empty(out)
    folder = resolve(checkpoint.name_or_dir, checkpoint.revision)
    if not is_gpt2(folder) and read_config(folder).multi_query == (to == "mqa"):
        heads, other = ("one key/value head", "mha") if to == "mqa" else ("all heads", "mqa")
        raise InputError(
            f"{checkpoint.name} has {heads} already, so there is nothing to convert: pass "
            f"--to {other} for the other way"
        )
    model = load_gpt2(folder) if is_gpt2(folder) else load_model(folder, device="cpu")
    tokenizer = None
    try:
        tokenizer = Tokenizer.from_pretrained(folder)
    except CheckpointError as error:
        if texts:
            raise
        note(f"no tokenizer is written: {error}")
    batches = [] if tokenizer is None else text_batches(texts, tokenizer, model.config)
    stored_dtype = model.dtype
    if stored_dtype.itemsize == 2:
        model.float()  # to compute with; rounded again below
    fitted_to = batches if method == "aligned" else []
    converted = to_mha(model) if to == "mha" else to_mqa(model, method, fitted_to)
    losses = [mean_loss(which, batches) for which in (model, converted) if batches]
    save_model(converted.to(stored_dtype), out, tokenizer=tokenizer)

    report: dict[str, Any] = {"model": checkpoint.name, "out": str(out), "method": None}
    if model.config.n_kv_head != converted.config.n_kv_head and to == "mqa":
        report["method"] = method
    for i, (name, which) in enumerate((("before", model), ("after", converted))):
        report[name] = {
            "key_value_heads": which.config.n_kv_head,
            "parameters": which.config.parameters,
            "cache_bytes_per_token": cache_bytes(which.config, stored_dtype),
        }
        if losses:
            report[name]["loss"] = losses[i]
    if as_json:
        print_json(report)
        return
    table = new_table("", ">before", ">after")
    for key, label, show in (
        ("key_value_heads", "key/value heads", str),
        ("parameters", "parameters", "{:,}".format),
        ("cache_bytes_per_token", "KV cache per token", size_text),
        ("loss", "loss on the text, nats per token", "{:.4f}".format),
    ):
        if key in report["before"]:
            table.add_row(label, show(report["before"][key]), show(report["after"][key]))
    print_table(table)
    note(f"the converted model is in {out}")
