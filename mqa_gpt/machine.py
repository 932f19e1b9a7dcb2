"""What this process runs on: versions, processor, memory, GPUs and the attention backends."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from mqa_gpt.attention import BACKENDS, select_attention
from mqa_gpt.config import GPTConfig

PACKAGES = (
    "mqa-gpt",
    "torch",
    "triton",
    "transformers",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "numba",
    "ctranslate2",
    "openvino",
)

# Models of fewer parameters decode fastest with one thread: what a second one saves on so short a
# step is less than what it costs to wait for it.
ONE_THREAD_PARAMETERS = 10_000_000

# Install a checkout with what makes it fast on a CPU, with the programs it is compared with too, as
# the README says, and with what evaluations need.
INSTALL_NUMBA = ".venv/bin/pip install -c constraints.txt -e '.[cpu]'"
INSTALL_PEERS = ".venv/bin/pip install -c constraints.txt -e '.[bench]'"
INSTALL_EVAL = ".venv/bin/pip install -c constraints.txt -e '.[eval]'"

# The threads of OpenMP (libgomp) do not survive a fork, and the next product would wait for them
# forever; with one thread a child process needs none of them.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def version(package: str) -> str | None:
    """The version of an installed package, found without importing it; None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """Everything about this machine that a bug report needs, ready for JSON.

    Returns:
        "versions": package -> version or None; "system"; "cpu": its name, how many cores there
        are and how many threads torch uses; "memory": total and available bytes, or None; "cuda":
        the version torch is built with; "gpus": one entry each; "backends": device type -> the
        attention backends that run on it.
    """
    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions |= {package: version(package) for package in PACKAGES}
    versions["torch"] = str(torch.__version__)  # with its build, as +cu130, which may be missing
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            gpus.append(
                {
                    "name": gpu.name,
                    "compute_capability": f"{gpu.major}.{gpu.minor}",
                    "memory_bytes": gpu.total_memory,
                }
            )
    return {
        "versions": versions,
        "system": platform.platform(),
        "cpu": {
            "name": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "memory": {
            "total_bytes": _total_memory(),
            "available_bytes": available_memory(torch.device("cpu")),
        },
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "backends": {name: _backends(name) for name in (["cpu", "cuda"] if gpus else ["cpu"])},
    }


def threads_for(config: GPTConfig) -> int:
    """How many CPU threads a model of this size generates fastest with.

    The number that PyTorch has chosen, or the user by `OMP_NUM_THREADS`, but one for a small model.
    """
    if config.parameters < ONE_THREAD_PARAMETERS and "OMP_NUM_THREADS" not in os.environ:
        return 1
    return torch.get_num_threads()


def command_line() -> str:
    """The command that started this process, quoted for a shell: program and arguments."""
    program = Path(sys.argv[0]).name
    return shlex.join(["mqa-gpt" if program == "__main__.py" else program, *sys.argv[1:]])


def available_memory(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that can still be allocated on a device; None if the system does not tell.

    On Linux that is what the machine has available or, if less, what the limits of this process's
    control groups (containers, batch systems; cgroup v2) leave. Memory that only caches files
    counts as available in both.

    Args:
        device: the CPU or an accelerator.
        root: where `proc` and `sys` are.
    """
    if device.type == "cuda":
        # What PyTorch keeps for reuse is free to it, though not to the system.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type != "cpu":
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    rooms = [] if found is None else [int(found[1]) * 1024]
    group = re.search(r"^0::/(.*)$", _read(root / "proc/self/cgroup"), re.MULTILINE)
    if group is not None:
        top = root / "sys/fs/cgroup"
        folder = top / group[1]
        while folder.is_relative_to(top):
            rooms += _room_in(folder)
            folder = folder.parent
    return min(rooms, default=None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed; on a CPU torch has no type for it."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def peak_memory(device: torch.device | str = "cpu") -> int | None:
    """The peak memory of this process so far, in bytes: the GPU's if `device` is one.

    On a CPU this is resident memory, so pages of a memory-mapped checkpoint count while they are
    mapped. None if the system does not tell (Windows).
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose getrusage begins with the peak of the parent process
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cpu_name() -> str:
    """The processor's product name, if the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


def _total_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # no sysconf on Windows
        return None


def _backends(device: str) -> list[str]:
    """The attention backends that run on a device."""
    found = []
    for backend in BACKENDS:
        if backend == "auto":
            continue
        try:
            select_attention(backend, torch.device(device))
        except ValueError:
            continue
        found.append(backend)
    return found


def _room_in(group: Path) -> list[int]:
    """The bytes that the limit of one control group leaves; [] if it has no limit."""
    limit, used = _read(group / "memory.max"), _read(group / "memory.current")
    if not limit.strip().isdigit() or not used.strip().isdigit():  # "max", or no such file
        return []
    cached = re.findall(r"^(?:in)?active_file (\d+)$", _read(group / "memory.stat"), re.MULTILINE)
    return [max(0, int(limit) - int(used) + sum(map(int, cached)))]


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
