"""Look at single kernels with NVIDIA's tools: `ncu` (what limits them) and `compute-sanitizer`.

    PYTHONPATH=.:kernels python3 scripts/gpu_tools.py --out tools
    PYTHONPATH=.:kernels python3 scripts/gpu_tools.py --out tools --tool memcheck --kernel dq_kernel

Writes what each tool prints about all kernels to `<tool>.txt`, and a line per run to the terminal.
Says so where a tool is not installed, or may not read the counters. The exit status is 1 if a
kernel has an error or was not looked at, or no tool ran.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOUND_ERRORS = 9  # the exit status that we ask compute-sanitizer for
KERNELS = (
    "forward_kernel",
    "combine_kernel",
    "dq_kernel",
    "dkv_kernel",
    "linear_kernel",
    "norm_kernel",
    "qkv_kernel",
    "argmax_kernel",
    "choose_kernel",
)
# Its program and options, {} for the kernel. Left to itself, ncu would slow the GPU's clocks.
TOOLS = {
    "ncu": "ncu --set full --clock-control none --kernel-name regex:^{}$ --launch-skip 1 "
    "--launch-count 1",
    "memcheck": f"compute-sanitizer --tool memcheck --error-exitcode {FOUND_ERRORS} "
    "--kernel-name kernel_substring={}",
    "racecheck": f"compute-sanitizer --tool racecheck --error-exitcode {FOUND_ERRORS} "
    "--kernel-name kernel_substring={}",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the tools' output")
    parser.add_argument("--tool", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--limit", type=float, default=60, help="seconds of one run")
    parser.add_argument("--run", choices=KERNELS, help="only launch this kernel, for a tool")
    options = parser.parse_args(arguments)
    if options.run:
        launch(options.run)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    verdicts = []
    for tool in options.tool:
        program = find_program(TOOLS[tool].split()[0])
        if program is None:
            print(f"{tool}: {TOOLS[tool].split()[0]} is not installed here", flush=True)
            continue
        path = options.out / f"{tool}.txt"
        path.unlink(missing_ok=True)
        for kernel in options.kernel:
            verdicts.append(inspect(tool, program, kernel, path, options.limit))
            print(f"{tool} {kernel}: {verdicts[-1]}", flush=True)
    return 0 if verdicts and all(verdict == "done" for verdict in verdicts) else 1


def find_program(name: str) -> str | None:
    """Where it is: on the path, or in a folder of the CUDA toolkit."""
    places = [Path(path) for pattern in ("cuda*/bin", "cuda*/compute-sanitizer", "cuda*/nsight*")
              for path in Path("/usr/local").glob(pattern)]  # fmt: skip
    places += Path("/opt/nvidia").glob("nsight-compute/*")
    found = [place / name for place in places if (place / name).is_file()]
    return shutil.which(name) or (str(found[-1]) if found else None)


def inspect(tool: str, program: str, kernel: str, path: Path, limit: float) -> str:
    """Run a kernel in a tool, whose output is appended to a file: "done", or what went wrong."""
    command = [program, *TOOLS[tool].format(kernel).split()[1:]]
    command += [sys.executable, str(Path(__file__).resolve()), "--run", kernel]
    # Memory that PyTorch keeps would hide what lies outside of a tensor.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with path.open("a+", errors="replace") as file:
        begin = file.tell()
        try:
            status = subprocess.run(
                command, env=environment, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                timeout=limit, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:g} s; see {path}"
        file.seek(begin)
        text = file.read()
    if "ERR_NVGPUCTRPERM" in text:
        return "this user may not read the GPU's performance counters"
    if "No kernels were profiled" in text:
        return f"no kernel was profiled; see {path}"
    if status == FOUND_ERRORS:
        return f"errors found; see {path}"
    return "done" if status == 0 else f"exit status {status}; see {path}"


def launch(kernel: str) -> None:
    """Launch a kernel twice, on a GPU or under the interpreter: the first compiles it."""
    sys.path[:0] = [str(ROOT / folder) for folder in (".", "kernels", "scripts")]
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    from gpu_autotune import (
        argmax_call,
        backward_call,
        decode_call,
        forward_call,
        linear_call,
        qkv_call,
    )

    gpu = device.type == "cuda"
    T, S, C, V = (1024, 16_384, 4096, 49_152) if gpu else (5, 600, 32, 48)
    calls: dict[str, Callable[[torch.device], Callable[[], Any]]] = {
        "forward_kernel": partial(forward_call, T),
        "combine_kernel": partial(decode_call, 1, S),
        "dq_kernel": partial(backward_call, T),
        "dkv_kernel": partial(backward_call, T),
        "linear_kernel": partial(linear_call, 1, C, 4 * C),
        "norm_kernel": partial(linear_call, 33, C, 4 * C),
        "qkv_kernel": partial(qkv_call, 1, C),
        "argmax_kernel": partial(argmax_call, 1, C, V),
        "choose_kernel": partial(argmax_call, 1, C, V),
    }
    call = calls[kernel](device)
    for _ in range(2):
        call()
    if gpu:
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
