"""`mqa-gpt inspect`: show what a checkpoint holds and check its files."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from mqa_gpt.bench.anatomy import Anatomy
from mqa_gpt.bench.devices import DEVICES, measured_device
from mqa_gpt.checkpoints import inspect as inspection
from mqa_gpt.checkpoints.placement import as_device, as_dtype, fast_dtype
from mqa_gpt.cli.explain import print_anatomy
from mqa_gpt.cli.options import CheckpointOptions, Json, Preset
from mqa_gpt.cli.output import (
    CHECK_FAILED,
    print_hashes,
    print_inspection,
    print_json,
    print_non_finite,
)
from mqa_gpt.errors import InputError
from mqa_gpt.fast.int8 import says_quantized

DEFAULT_BATCH, DEFAULT_CONTEXT = 1, 1024


def inspect(
    *,
    checkpoint: CheckpointOptions,
    preset: Preset = None,
    check_finite: Annotated[
        bool,
        typer.Option("--check-finite", help="Read every weight and look for NaN and infinity."),
    ] = False,
    hash_files: Annotated[
        bool,
        typer.Option(
            "--hash", help="Compute each weight file's SHA-256 and compare it with the hub's."
        ),
    ] = False,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Take a forward pass apart: tensors, work and bytes by part, rooflines of GPUs "
            "and of this machine, what fits into memory.",
        ),
    ] = False,
    batch: Annotated[
        int | None, typer.Option("--batch", "-b", metavar="N", help="Rows of that pass.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=f"Tokens of its prompts. Default: {DEFAULT_CONTEXT:,}, or the model's context.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Its dtype. Default: the checkpoint's, or bfloat16."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a checkpoint: sizes, tensors, files, forward pass.

    Parameters, bytes, KV cache per token as MQA and as MHA, and tensors. Only headers are read,
    unless a check asks for more. Exits with 1 if a check fails.

    \b
    Examples:
      mqa-gpt inspect
      mqa-gpt inspect --preset starcoderbase-7b
      mqa-gpt inspect --preset starcoderbase-7b --explain --batch 8 --context 8192
      mqa-gpt inspect --model bigcode/starcoderbase-1b --check-finite --hash
    """
    if not explain and (batch, context, dtype) != (None, None, None):
        raise InputError("--batch, --context and --dtype are of --explain: add it")
    asked = None if dtype is None else as_dtype(dtype)
    if preset is not None:
        if checkpoint != CheckpointOptions() or check_finite or hash_files:
            raise InputError(
                "--preset describes a model without files: leave out --model, --revision, "
                "--check-finite and --hash"
            )
        found = inspection.inspect_shape(preset)
    else:
        found = inspection.inspect_checkpoint(checkpoint.model, revision=checkpoint.revision)
    anatomy = None
    if explain:
        anatomy = Anatomy(
            found.config,
            DEFAULT_BATCH if batch is None else batch,
            min(DEFAULT_CONTEXT, found.config.n_positions) if context is None else context,
            asked or found.dtype or torch.bfloat16,
            int8=says_quantized(found.config),
        )
    report = found.to_dict()
    failed = False
    if not as_json:
        print_inspection(found)
    if check_finite:
        bad = inspection.check_finite(found)
        failed |= bool(bad)
        report["non_finite"] = [tensor._asdict() for tensor in bad]
        if not as_json:
            print_non_finite(bad, len(found.tensors))
    if hash_files:
        hashes = inspection.hash_files(found)
        failed |= any(file.differs for file in hashes)
        report["hashes"] = [file._asdict() for file in hashes]
        if not as_json:
            print_hashes(hashes)
    if anatomy is not None:
        here = as_device(None)
        kind, _ = fast_dtype(anatomy.dtype, here, 0)  # in which this machine would run it
        devices = [*DEVICES, measured_device(here, kind)]
        report["explain"] = anatomy.to_dict(devices)
        if not as_json:
            print_anatomy(anatomy, devices)
    if as_json:
        print_json(report)
    if failed:
        raise typer.Exit(CHECK_FAILED)
