"""What is said about the machine, field by field."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch

from mqa_gpt import machine as environment
from mqa_gpt.machine import command_line, describe, peak_memory, version

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_every_field_is_there_on_a_machine_without_gpu(without_gpu: None):
    found = json.loads(json.dumps(describe()))
    assert found.keys() == {"versions", "system", "cpu", "memory", "cuda", "gpus", "backends"}
    assert found["system"] == platform.platform()
    assert found["cpu"].keys() == {"name", "cores", "threads", "capability"}
    assert found["cpu"]["name"].strip()
    assert found["cpu"]["cores"] == os.cpu_count()
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert found["cpu"]["capability"] == torch.backends.cpu.get_cpu_capability()
    assert found["cuda"] == torch.version.cuda
    assert found["gpus"] == []
    assert list(found["backends"]) == ["cpu"]
    assert found["backends"]["cpu"][:2] == ["reference", "sdpa"]


def test_versions_are_those_of_the_imported_packages():
    versions = describe()["versions"]
    assert list(versions) == ["python", *environment.PACKAGES]
    assert versions["python"] == platform.python_version()
    assert versions["torch"] == torch.__version__
    assert versions["tokenizers"] == tokenizers.__version__
    assert versions["numba"] == version("numba")


def test_a_package_that_is_not_there_has_no_version():
    assert version("no-such-package-anywhere") is None


@pytest.mark.parametrize("program", ["/usr/bin/mqa-gpt", "/usr/lib/mqa_gpt/__main__.py"])
def test_the_command_line_can_be_given_to_a_shell(program: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", [program, "bench", "--model", "my models/1B"])
    assert command_line() == "mqa-gpt bench --model 'my models/1B'"


@LINUX
def test_available_memory_is_a_part_of_the_whole():
    memory = describe()["memory"]
    assert 0 < memory["available_bytes"] < memory["total_bytes"]


def test_a_system_that_does_not_tell_its_memory_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "sysconf")
    assert describe()["memory"]["total_bytes"] is None


def test_each_gpu_is_listed_with_its_name_capability_and_memory(monkeypatch: pytest.MonkeyPatch):
    gpus = [
        SimpleNamespace(name="first", major=9, minor=0, total_memory=150),
        SimpleNamespace(name="second", major=8, minor=6, total_memory=20),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    monkeypatch.setattr(environment, "_backends", lambda device: [device])
    found = describe()
    assert found["gpus"] == [
        {"name": "first", "compute_capability": "9.0", "memory_bytes": 150},
        {"name": "second", "compute_capability": "8.6", "memory_bytes": 20},
    ]
    assert found["backends"] == {"cpu": ["cpu"], "cuda": ["cuda"]}


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (
            "processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\nmodel name\t: other\n",
            "Some CPU @ 3 GHz",
        ),
        ("processor\t: 0\nCPU part\t: 0xd40\n", platform.machine()),  # as on ARM
        (None, platform.processor() or platform.machine()),
    ],
)
def test_the_processor_has_a_name_on_every_system(
    monkeypatch: pytest.MonkeyPatch, cpuinfo: str | None, name: str
):
    def read_text(file: Path) -> str:
        if cpuinfo is None:
            raise FileNotFoundError(file)
        return cpuinfo

    monkeypatch.setattr(Path, "read_text", read_text)
    assert environment.cpu_name() == name


@pytest.mark.slow
@LINUX
def test_peak_memory_rises_with_a_large_allocation_and_does_not_fall_with_its_end():
    # In a new process: this one's peak may be far above what it holds now.
    code = (
        "from mqa_gpt.machine import peak_memory\n"
        "peaks = [peak_memory()]\n"
        "data = bytearray(b'x') * 300_000_000\n"
        "peaks.append(peak_memory('cpu'))\n"
        "del data\n"
        "print(*peaks, peak_memory())\n"
    )
    root = str(Path(__file__).parents[1])
    output = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        check=True,
    )
    before, during, after = map(int, output.stdout.split())
    assert 300_000_000 - 30_000_000 < during - before < 400_000_000
    assert after > during - 30_000_000  # Linux counts it to some pages per thread


def test_the_peak_on_a_gpu_is_the_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: (str(device), 7))
    assert peak_memory("cuda:1") == ("cuda:1", 7)


@pytest.mark.parametrize(("system", "unit"), [("darwin", 1), ("freebsd", 1024)])
def test_other_systems_tell_the_peak_by_getrusage(
    monkeypatch: pytest.MonkeyPatch, system: str, unit: int
):
    resource = SimpleNamespace(
        RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=5_000 + who)
    )
    monkeypatch.setattr(Path, "exists", lambda file: False)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setitem(sys.modules, "resource", resource)
    assert peak_memory() == 5_000 * unit
    monkeypatch.setitem(sys.modules, "resource", None)  # Windows has none
    assert peak_memory() is None
