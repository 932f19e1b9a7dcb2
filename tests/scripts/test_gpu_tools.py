"""gpu_tools.py with stand-ins for NVIDIA's tools."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not available on this platform")

import gpu_tools

from tests.scripts.marks import WITHOUT_GPU

ROOT = Path(__file__).parents[2]

pytestmark = WITHOUT_GPU


FAKE_TOOL = """#!/bin/sh
echo "$0 $*"
while [ "$1" != "{python}" ]; do shift; done
test "$4" = dkv_kernel && exit 9
test "$4" = dq_kernel && echo "==WARNING== No kernels were profiled." && exit
exec "$@"
"""


def test_tools_run_on_single_kernels_and_missing_ones_are_named(tmp_path, monkeypatch, capsys):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(FAKE_TOOL.format(python=sys.executable))
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_tools.shutil, "which", {"compute-sanitizer": str(tool)}.get)
    kernels = ["linear_kernel", "dkv_kernel", "dq_kernel"]
    arguments = ["--out", str(tmp_path), "--tool", "ncu", "memcheck", "--kernel", *kernels]
    monkeypatch.setattr(gpu_tools, "Path", FolderWithoutTools)
    assert gpu_tools.main([*arguments, "--limit", "600"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "ncu: ncu is not installed here",
        "memcheck linear_kernel: done",
        f"memcheck dkv_kernel: errors found; see {tmp_path}/memcheck.txt",
        f"memcheck dq_kernel: no kernel was profiled; see {tmp_path}/memcheck.txt",
    ]
    printed = (tmp_path / "memcheck.txt").read_text()
    for kernel in kernels:
        command = f"--tool memcheck --error-exitcode 9 --kernel-name kernel_substring={kernel} "
        assert printed.count(command) == 1
    assert gpu_tools.main([*arguments[:4], "--kernel", "linear_kernel"]) == 1  # no tool ran


def test_ncu_leaves_the_clocks_of_the_gpu_as_they_are():
    assert "--clock-control none" in gpu_tools.TOOLS["ncu"]


class FolderWithoutTools(type(Path())):
    """A path with nothing of the CUDA toolkit below."""

    def glob(self, pattern: str) -> Iterator[Path]:
        return iter(())


@pytest.mark.parametrize("kernel", gpu_tools.KERNELS)
def test_every_kernel_that_tools_look_at_is_launched(kernel, tmp_path):
    program = (
        "import sys, triton\n"
        "sys.path.insert(0, 'scripts')\n"
        "import gpu_tools\n"
        "from triton.runtime.interpreter import GridExecutor\n"
        "launched = []\n"
        "call = GridExecutor.__call__\n"
        "GridExecutor.__call__ = lambda self, *a, **k: (launched.append(self.fn.__name__), "
        "call(self, *a, **k))\n"
        f"gpu_tools.main(['--run', {kernel!r}])\n"
        f"assert launched.count({kernel!r}) >= 2, launched\n"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True)
