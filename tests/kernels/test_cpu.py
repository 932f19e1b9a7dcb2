"""The parts of the compiled forward pass, each against torch or exact arithmetic."""

from __future__ import annotations

import os
import tempfile
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("numba", reason="numba, the extra 'cpu', is not installed")

from numba.core.caching import IndexDataCacheFile

from mqa_kernels.cpu import linear, program, rows
from mqa_kernels.cpu.simd import (
    HAS_VNNI,
    LANES,
    at,
    kernel,
    largest,
    load,
    pointer,
    splat,
    store,
    total,
)
from mqa_kernels.cpu.team import Team, finish, new_counters, take, wait

FLOATS = np.empty(0, np.float32)
HALVES = {torch.bfloat16: np.empty(0, np.uint16), torch.float16: np.empty(0, np.int16)}


@kernel
def apply(x: int, out: int, n: int, what: int, floats: Any) -> None:
    """out = e^x, or an activation of x, for n numbers."""
    x, out = pointer(x, floats), pointer(out, floats)
    for i in range(0, n, LANES):
        y = rows.exp(load(x, i, n)) if what == 0 else rows.activate(load(x, i, n), what)
        store(out, i, y, n)


def applied(x: torch.Tensor, what: int) -> torch.Tensor:
    out = torch.full_like(x, float("nan"))
    apply(x.data_ptr(), out.data_ptr(), len(x), what, FLOATS)
    return out


def test_exp_is_within_two_units_in_the_last_place():
    x = torch.linspace(-86, 87, 10_007)
    exact = x.double().exp()
    assert ((applied(x, 0) - exact).abs() / exact).max() <= 2 * 2**-24 * 1.5
    ends = applied(torch.tensor([0.0, -1e30, float("-inf"), float("nan")]), 0)
    assert ends[0] == 1
    assert (ends[1:3] <= 2e-38).all()
    assert ends[3].isnan()


@pytest.mark.parametrize(
    ("what", "reference"),
    [
        (rows.RELU, F.relu),
        (rows.GELU, F.gelu),
        (rows.GELU_TANH, lambda x: F.gelu(x, approximate="tanh")),
    ],
)
def test_activations_are_torchs(what, reference):
    x = torch.cat((torch.linspace(-12, 12, 9_001), torch.tensor([-1e4, 1e4, 0.0])))
    exact = reference(x.double())
    assert ((applied(x, what) - exact).abs() <= 4e-7 * (1 + exact.abs())).all()
    assert applied(torch.tensor([float("nan")] * 3), what).isnan().all()


@kernel
def norm(x: int, w: int, b: int, out: int, n: int, floats: Any) -> None:
    floats_at = pointer(x, floats), pointer(w, floats), pointer(b, floats), pointer(out, floats)
    rows.layer_norm(floats_at[0], floats_at[1], floats_at[2], floats_at[3], n, 1e-5)


@pytest.mark.parametrize("n", [1, 7, LANES, 60, 256])
def test_layer_norm_is_torchs_and_writes_no_further(n):
    x, w, b = torch.randn(3, n) + 3
    out = torch.full((n + 2 * LANES,), 9.0)
    norm(x.data_ptr(), w.data_ptr(), b.data_ptr(), out.data_ptr(), n, FLOATS)
    assert torch.allclose(out[:n], F.layer_norm(x, (n,), w, b), rtol=1e-5, atol=1e-5)
    assert (out[n:] == 9).all()


@kernel
def round_to(x: int, out: int, n: int, floats: Any, halves: Any) -> None:
    for i in range(0, n, LANES):
        store(pointer(out, halves), i, load(pointer(x, floats), i, n), n)


@kernel
def widen(x: int, out: int, n: int, floats: Any, halves: Any) -> None:
    for i in range(0, n, LANES):
        store(pointer(out, floats), i, load(pointer(x, halves), i, n), n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_and_widened_as_torch_does(dtype):
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 0.0, -0.0, 1e30])
    x = torch.cat((torch.randn(1_001) * 10, ties))
    out, back = torch.empty_like(x, dtype=dtype), torch.empty_like(x)
    round_to(x.data_ptr(), out.data_ptr(), len(x), FLOATS, HALVES[dtype])
    assert torch.equal(out, x.to(dtype))
    widen(out.data_ptr(), back.data_ptr(), len(x), FLOATS, HALVES[dtype])
    assert torch.equal(back, out.float())
    x[0] = float("nan")
    round_to(x.data_ptr(), out.data_ptr(), 1, FLOATS, HALVES[dtype])
    assert out[0].isnan()


@kernel
def reduce(x: int, out: int, floats: Any) -> None:
    v = load(pointer(x, floats), 0, LANES) + splat(0.0)
    pointer(out, floats)[0] = total(v)
    pointer(out, floats)[1] = largest(v)


def test_the_lanes_of_a_vector_are_added_and_compared():
    x, out = torch.arange(LANES) - 3.0, torch.empty(2)
    reduce(x.data_ptr(), out.data_ptr(), FLOATS)
    assert out.tolist() == [x.sum(), LANES - 4]


@kernel
def multiply(
    x: int, w: int, out: int, K: int, R: int, N: int, block: int, floats: Any, weights: Any
) -> None:
    linear.dots(
        pointer(x, floats), K, pointer(w, weights), K, K, block, pointer(out, floats), N, R, N
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.bfloat16])
@pytest.mark.parametrize("K", [1, 20, 64, 1024, 1100, 2060])
def test_a_product_has_the_same_bits_in_tiles_of_all_sizes(dtype, K):
    weights = {torch.float32: FLOATS, torch.int8: np.empty(0, np.int8)} | HALVES
    R, N = 31, 13
    x, w = torch.randn(R, K), (torch.randn(N, K) * 30).to(dtype)

    def product(x: torch.Tensor, columns: slice) -> torch.Tensor:
        part = w[columns].clone()
        out = torch.full((len(x), len(part)), float("nan"))
        arguments = x.clone(), part, out
        sizes = K, len(x), len(part), linear.BLOCK
        multiply(*(a.data_ptr() for a in arguments), *sizes, FLOATS, weights[dtype])
        return out

    whole = product(x, slice(None))
    exact = x.double() @ w.double().T
    assert ((whole - exact).abs() <= 1e-6 * (x.double().abs() @ w.double().abs().T)).all()
    for rows_ in (1, 2, 3, 4, 5, 6, 7, 13, 24, 25):
        assert torch.equal(product(x[:rows_], slice(None)), whole[:rows_])
    for columns in (slice(0, 1), slice(5, 9), slice(6, 13)):
        assert torch.equal(product(x, columns), whole[:, columns])


@kernel
def round_and_multiply(
    counters: Any, x: int, w: int, own: int, rounded: int, out: int, K: int, R: int, N: int,
    scale: int, kinds: Any,
) -> None:  # fmt: skip
    team = pointer(counters.ctypes.data, counters)
    x, out = pointer(x, kinds.floats), pointer(out, kinds.floats)
    linear.linear(
        team, 0, x, K, linear.Linear(w, scale, 0), out, N,
        R, 0, False, pointer(rounded, kinds.integers), True, pointer(own, kinds.floats), kinds,
    )  # fmt: skip


@pytest.mark.skipif(not HAS_VNNI, reason="no products of 8-bit integers on this processor")
@pytest.mark.parametrize("K", [64, 4096, 4224])
def test_rows_in_8_bits_are_multiplied_exactly(K):
    R, N = 9, 21
    x = torch.randn(R, K) * torch.logspace(-3, 3, R)[:, None]
    x[3] = 0
    w, scale = torch.randint(-127, 128, (N, K), dtype=torch.int8), torch.rand(N)
    step = x.abs().amax(1, keepdim=True) / 127
    integers = torch.where(step > 0, x / step, 0).round()
    expected = integers.double() @ w.double().T * step * scale
    out, own = torch.empty(R, N), torch.empty(linear.PANEL * linear.WIDTH)
    rounded = torch.empty(R, K + linear.ROW_END, dtype=torch.int8)
    bytes_ = np.empty(0, np.int8)
    kinds = linear.Kinds(bytes_, FLOATS, FLOATS, FLOATS, bytes_, np.empty(0, np.int32))
    places = [a.data_ptr() for a in (x, w, own, rounded, out)]
    round_and_multiply(new_counters(2), *places, K, R, N, scale.data_ptr(), kinds)
    # A number in the middle of two integers may go either way.
    assert ((out - expected).abs() <= 2e-3 * expected.abs().amax(1, keepdim=True)).all()
    assert (out[3] == 0).all()
    x[2, 5] = float("nan")
    round_and_multiply(new_counters(2), *places, K, R, N, scale.data_ptr(), kinds)
    assert out.isfinite().all(1).tolist() == [i != 2 for i in range(R)]


# ------------------------------------------------------------------------------------------ threads


@kernel
def count(counters: Any, out: Any, phases: int, items: int, thread: int) -> None:
    """Each phase adds 1 to what the phase before left in every place."""
    team = pointer(counters.ctypes.data, counters)
    for phase in range(phases):
        while True:
            i = take(team, phase)
            if i >= items:
                break
            out[phase + 1, i] = out[phase, items - 1 - i] + 1
            finish(team, phase)
        wait(team, phase, items)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_phase_begins_when_the_one_before_has_ended(threads):
    team = Team()
    for _ in range(20):
        out = np.zeros((51, 17), dtype=np.int64)
        team.run(count, (new_counters(50), out, 50, 17), threads)
        assert (out == np.arange(51)[:, None]).all()


def test_the_caller_needs_no_helper_and_waits_for_those_that_came():
    team, begun, left = Team(), threading.Event(), []

    def work(number: int) -> None:
        if number == 0:
            begun.wait(10)
            return
        begun.set()
        time.sleep(0.2)
        left.append(number)

    team.run(work, (), 2)
    assert left == [1]
    begun.set()
    pool = team._pool(1)
    pool.submit(time.sleep, 0.5)  # the only helper is busy
    started = time.perf_counter()
    team.run(lambda number: None, (), 2)
    assert time.perf_counter() - started < 0.4


def test_an_error_waits_for_the_helpers_too():
    team, left = Team(), []

    def work(number: int) -> None:
        if number == 0:
            time.sleep(0.1)  # until the helper has begun
            raise KeyboardInterrupt
        time.sleep(0.3)
        left.append(number)

    with pytest.raises(KeyboardInterrupt):
        team.run(work, (), 2)
    assert left == [1]


def test_an_interrupt_while_helpers_are_asked_leaves_none_without_its_memory(monkeypatch):
    class Owner:
        pass

    team, owner, ended, alive = Team(), Owner(), threading.Event(), []
    watched = weakref.ref(owner)

    def work(number: int) -> None:
        time.sleep(0.2)
        alive.append(watched() is not None)
        ended.set()

    def submit(pool: ThreadPoolExecutor, *arguments: Any) -> None:
        ask(pool, *arguments)
        raise KeyboardInterrupt

    ask = ThreadPoolExecutor.submit
    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
    with pytest.raises(KeyboardInterrupt):
        team.run(work, (), 2, owners=(owner,))
    del owner
    assert ended.wait(10)
    assert alive == [True]


def test_a_caller_that_gets_no_thread_works_alone(monkeypatch):
    def submit(*arguments: Any) -> None:
        raise RuntimeError("can't start new thread")

    numbers: list[int] = []
    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
    Team().run(numbers.append, (), 4)
    assert numbers == [0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_gets_helpers_of_its_own():
    team = Team()

    def is_helped() -> bool:
        came = threading.Event()
        team.run(lambda number: came.set() if number else came.wait(10), (), 2)
        return came.is_set()

    assert is_helped()
    child = os.fork()
    if child == 0:
        os._exit(0 if is_helped() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_place_may_be_counted_from_another():
    @kernel
    def second(x: Any, floats: Any) -> float:
        return at(pointer(x.ctypes.data, floats), 1)[0]

    assert second(np.array([3, 5], dtype=np.float32), FLOATS) == 5


def test_compiled_code_that_is_long_unused_is_removed_and_so_are_the_leavings_of_a_killed_process(
    tmp_path,
):
    names = ("compiled-own", "compiled-recent", "compiled-old", "unused-1-compiled-older", "other")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "code.nbc").touch()
    for name in ("compiled-own", "compiled-old"):
        os.utime(tmp_path / name, (0, 0))
    program.keep_used(tmp_path / "compiled-own")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"compiled-own", "compiled-recent", "other"}
    assert (tmp_path / "compiled-own").stat().st_mtime > 0


def test_another_processor_numba_or_source_has_compiled_code_of_its_own(monkeypatch, tmp_path):
    folders = [program.cache_folder()]
    changes: list[tuple[Any, str, Any]] = [
        (program, "PROCESSOR", ("another", "processor", "")),
        (numba, "__version__", "0"),
        (program, "__file__", str(tmp_path / "program.py")),
    ]
    for owner, name, value in changes:
        with monkeypatch.context() as change:
            change.setattr(owner, name, value)
            folders.append(program.cache_folder())
    assert len(set(folders)) == 4
    assert len({folder.parent for folder in folders}) == 1
    assert program.cache_folder() == folders[0]


@pytest.fixture
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder for compiled code."""
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path))
    return program.cache_folder()


def double(x: Any) -> Any:
    return x + x


def with_cache() -> Any:
    """`double` as a new process compiles or finds it."""
    dispatcher = kernel(double)
    dispatcher._cache = program._Cache(double)
    return dispatcher


def test_a_folder_that_cannot_be_written_to_is_read(own_folder, monkeypatch):
    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError

    with_cache()(1)
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)  # root may write anywhere
    monkeypatch.setattr(IndexDataCacheFile, "save", refuse)
    found = with_cache()
    assert (found(2), found(0.5)) == (4, 1.0)
    assert (found.stats.cache_hits.total(), found.stats.cache_misses.total()) == (1, 1)


def test_two_processes_that_keep_code_under_one_name_do_not_run_each_others(own_folder):
    for number in (1, 0.5):
        with_cache()(number)
    first, second = sorted(own_folder.glob("*.nbc"))
    second.write_bytes(first.read_bytes())
    found = with_cache()
    assert (found(2), found(0.5)) == (4, 1.0)
    assert (found.stats.cache_hits.total(), found.stats.cache_misses.total()) == (1, 1)
