from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mqa_gpt import GPT, KVCache, PromptError
from mqa_gpt.cache import cache_bytes
from mqa_gpt.fast.int8_cache import Int8KVCache
from mqa_gpt.generation import batching
from mqa_gpt.generation.batching import Engine
from mqa_gpt.generation.request import make_requests
from mqa_gpt.machine import available_memory, is_out_of_memory
from mqa_gpt.sampling import GREEDY
from tests.helpers import tiny_config

CPU = torch.device("cpu")
MEMINFO = "MemTotal:       2000 kB\nMemFree:         100 kB\nMemAvailable:    1000 kB\n"


def machine(root: Path, meminfo: str = MEMINFO, cgroup: str = "0::/a/b\n") -> Path:
    """A made-up /proc, and control groups without limits."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(meminfo)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "sys/fs/cgroup/a/b").mkdir(parents=True)
    for group in ("a", "a/b"):
        limit(root, group, "max", 0)
    return root


def limit(root: Path, group: str, maximum: str | int, used: int, cached: int = 0) -> None:
    folder = root / "sys/fs/cgroup" / group
    (folder / "memory.max").write_text(f"{maximum}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(
        f"anon 1\ninactive_file {cached // 2}\nactive_file {cached - cached // 2}\nfile 9999999\n"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says")
def test_this_machine_has_some_of_its_memory_available() -> None:
    available = available_memory(CPU)
    assert available is not None
    assert 0 < available < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_without_limits_it_is_what_the_machine_has_available(tmp_path: Path) -> None:
    assert available_memory(CPU, machine(tmp_path)) == 1000 * 1024


@pytest.mark.parametrize("group", ["a", "a/b"])
def test_the_limit_of_a_control_group_or_of_one_above_it_counts(tmp_path: Path, group: str) -> None:
    machine(tmp_path)
    limit(tmp_path, group, 500_000, used=300_000, cached=70_001)
    assert available_memory(CPU, tmp_path) == 270_001
    limit(tmp_path, group, 500_000, used=600_000)
    assert available_memory(CPU, tmp_path) == 0
    limit(tmp_path, group, 5_000_000, used=300_000)
    assert available_memory(CPU, tmp_path) == 1000 * 1024


def test_the_limit_of_a_container_stands_at_the_top(tmp_path: Path) -> None:
    machine(tmp_path, cgroup="0::/\n")
    limit(tmp_path, "", 500_000, used=100_000)
    assert available_memory(CPU, tmp_path) == 400_000


@pytest.mark.parametrize("cgroup", ["", "4:memory:/a\n", "0::/gone\n", "0::/../a\n"])
def test_groups_of_another_kind_are_no_limit(tmp_path: Path, cgroup: str) -> None:
    assert available_memory(CPU, machine(tmp_path, cgroup=cgroup)) == 1000 * 1024


def test_a_system_that_does_not_say_gives_none(tmp_path: Path) -> None:
    assert available_memory(CPU, tmp_path) is None
    assert available_memory(torch.device("meta"), machine(tmp_path)) is None


@pytest.mark.parametrize("multi_query", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_takes_the_bytes_that_are_counted_for_it(
    multi_query: bool, dtype: torch.dtype
) -> None:
    config = tiny_config(multi_query=multi_query)
    assert cache_bytes(config, dtype, 3, 40) == KVCache(config, 3, 40, dtype=dtype).kv.nbytes


def test_a_cache_that_does_not_fit_is_refused_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(tiny_config())
    requests = make_requests(model.config, [[1] * 20] * 10**3, 30, GREEDY)
    needed = cache_bytes(model.config, torch.float32, 10**3, 50)
    for room in (None, needed):
        monkeypatch.setattr(batching, "available_memory", lambda device, room=room: room)
        Engine.for_requests(model, requests)
    monkeypatch.setattr(batching, "available_memory", lambda device: needed - 1)
    with pytest.raises(PromptError, match=r"1,000 completions of 50 tokens need 0\.02 GB"):
        Engine.for_requests(model, requests)
    Engine.for_requests(model, requests, slots=999)
    model.cache_class = Int8KVCache
    Engine.for_requests(model, requests)


def test_an_allocation_that_failed_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as too_large:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(too_large.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("the size of tensor a must match"))
    assert not is_out_of_memory(ValueError())


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_generates_too(tmp_path: Path) -> None:
    """With the threads of its parent, which do not exist there, it would wait forever."""
    script = """if True:
        import os, torch
        torch.set_num_threads(2)
        from mqa_gpt import GPT, GPTConfig, generate
        model = GPT(GPTConfig(512, n_embd=512, n_layer=1, n_head=8, n_positions=256)).eval()
        generate(model, [[1] * 200], 2)
        child = os.fork()
        if child == 0:
            generate(model, [[1] * 200], 2)
            os._exit(0)
        print(os.waitpid(child, 0)[1])
    """
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=100,
        start_new_session=True,
    )
    assert (run.stdout, run.stderr) == ("0\n", "")
