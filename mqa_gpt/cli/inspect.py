"""`mqa-gpt inspect`: show what a checkpoint holds and check its files."""

from __future__ import annotations

from typing import Annotated

import typer

from mqa_gpt.checkpoints import inspect as inspection
from mqa_gpt.cli.options import CheckpointOptions, Json, Preset
from mqa_gpt.cli.output import (
    CHECK_FAILED,
    print_hashes,
    print_inspection,
    print_json,
    print_non_finite,
)
from mqa_gpt.errors import InputError


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
    as_json: Json = False,
) -> None:
    """Show a checkpoint's sizes, check its files.

    Parameters, bytes, KV cache per token as MQA and as MHA, and tensors. Only headers are read,
    unless a check asks for more. Exits with 1 if a check fails.

    \b
    Examples:
      mqa-gpt inspect
      mqa-gpt inspect --preset starcoderbase-7b
      mqa-gpt inspect --model bigcode/starcoderbase-1b --check-finite --hash
    """
    if preset is not None:
        if checkpoint != CheckpointOptions() or check_finite or hash_files:
            raise InputError(
                "--preset describes a model without files: leave out --model, --revision, "
                "--check-finite and --hash"
            )
        found = inspection.inspect_shape(preset)
    else:
        found = inspection.inspect_checkpoint(checkpoint.model, revision=checkpoint.revision)
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
    if as_json:
        print_json(report)
    if failed:
        raise typer.Exit(CHECK_FAILED)
