"""The assemblers (ptxas) on this machine; kernels/README.md says why there may be several."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@cache
def assemblers() -> dict[str, Path]:
    """Version -> where: Triton's own, of installed packages, of the CUDA toolkit."""
    candidates = [Path(shutil.which("ptxas") or "")]
    triton = find_spec("triton")
    if triton is not None and triton.origin:
        tools = Path(triton.origin).parent / "backends/nvidia/bin"
        candidates = [tools / "ptxas", tools / "ptxas-blackwell", *candidates]
    candidates += Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/ptxas")
    candidates += ROOT.glob(".venv/ptxas-*/nvidia/*/bin/ptxas")  # of `make check-kernels`
    candidates += Path("/usr/local").glob("cuda*/bin/ptxas")
    found: dict[str, Path] = {}
    for path in candidates:
        if path.is_file():
            found.setdefault(ptxas_version(path), path.resolve())
    return found


def ptxas_version(path: Path | str) -> str:
    """Such as "12.8.93"; "0" if it does not say."""
    with suppress(OSError, subprocess.CalledProcessError):
        text = subprocess.check_output([path, "--version"], text=True)
        match = re.search(r" V(\d+(\.\d+)+)", text)
        if match:
            return match[1]
    return "0"


def newer_ptxas() -> Path | None:
    """The newest assembler here, if that is not the one that Triton uses for sm_90."""
    found = assemblers()
    newest = max(found, key=lambda version: [*map(int, version.split("."))], default="0")
    return found[newest] if newest not in ("0", *list(found)[:1]) else None
