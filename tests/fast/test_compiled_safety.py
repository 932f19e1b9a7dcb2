"""What the compiled forward pass must not do: hide what is not finite, ignore a changed module,
write outside a cache, or fail where the modules would run."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("numba", reason="numba, the extra 'cpu', is not installed")

from numba.core.caching import NullCache

from mqa_gpt import GPT, generate
from mqa_gpt.cache import KVCache
from mqa_gpt.fast import compiled
from mqa_gpt.fast.compiled import compiled_forward, step_forward
from mqa_gpt.fast.int8_cache import Int8KVCache
from mqa_gpt.generation.prefill import prefill
from mqa_kernels.cpu import program
from tests.helpers import random_ids, tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model() -> GPT:
    return tiny_model()


@pytest.mark.parametrize("cache_class", [KVCache, Int8KVCache])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("name", "row"),
    [
        *(("attn.c_attn", 0), ("attn.c_attn", 60), ("attn.c_attn", 80), ("attn.c_proj", 0)),
        *(("mlp.c_fc", 0), ("mlp.c_proj", 0)),  # 60 is a row of K, 80 one of V
    ],
)
@torch.inference_mode()
def test_what_is_not_finite_reaches_the_logits_from_everywhere(model, cache_class, bad, name, row):
    # Not compared with the modules: torch's SDPA hides scores that are NaN.
    model.cache_class = cache_class
    model.transformer.h[0].get_submodule(name).weight[row, 3] = bad
    ids = torch.tensor([[1, 2, 3]])
    forward = compiled_forward(model)
    assert forward is not None
    assert not forward(ids, model.new_cache(1, 3)).isfinite().all()


def scale_the_scores(model: GPT) -> None:
    model.transformer.h[1].attn.scale = 0.01


def change_an_epsilon(model: GPT) -> None:
    model.transformer.h[1].ln_2.eps = 1.0


def bound_an_embedding(model: GPT) -> None:
    model.transformer.wpe.max_norm = 1.0


def move_a_part(model: GPT) -> None:
    model.transformer.h[0].mlp.to("meta")


def shorten_a_norm(model: GPT) -> None:
    model.transformer.h[0].ln_1.weight = nn.Parameter(torch.ones(5))


def put_a_tensor_of_another_class(model: GPT) -> None:
    class Other(Tensor):
        pass

    layer = model.transformer.h[0].mlp.c_fc
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Other))


@pytest.mark.parametrize(
    "change",
    [
        *(scale_the_scores, change_an_epsilon, bound_an_embedding),
        *(move_a_part, shorten_a_norm, put_a_tensor_of_another_class),
    ],
)
def test_a_changed_module_runs_itself(model, change):
    change(model)
    assert compiled_forward(model) is None


def test_a_cache_of_another_class_is_written_by_its_own_methods(model):
    layers = []

    class Watched(KVCache):
        def store(self, layer: int, kv: Tensor) -> Tensor:
            layers.append(layer)
            return super().store(layer, kv)

    tokens = generate(model, [[1, 2, 3]], 4)
    model.cache_class = Watched
    assert generate(model, [[1, 2, 3]], 4) == tokens
    assert layers == [0, 1] * 4


@pytest.mark.parametrize(
    "make",
    [
        lambda model: model.new_cache(1, 9),
        lambda model: tiny_model(n_layer=1).new_cache(2, 9),
        lambda model: tiny_model(multi_query=False).new_cache(2, 9),
        lambda model: tiny_model(n_embd=30).new_cache(2, 9),
        lambda model: tiny_model().bfloat16().new_cache(2, 9),
    ],
    ids=["rows", "layers", "heads", "head dim", "dtype"],
)
@torch.inference_mode()
def test_a_cache_that_is_not_the_models_is_refused_and_stays_as_it_is(model, make):
    cache = make(model)
    with pytest.raises(ValueError, match="the cache"):
        step_forward(model)(random_ids(model.config, 2, 3), cache)
    assert (cache.kv == 0).all()
    assert cache.end == 0


@torch.inference_mode()
def test_tokens_beyond_the_cache_the_context_or_the_layers_are_refused(model):
    with pytest.raises(ValueError, match="5 more do not fit"):
        prefill(model, model.new_cache(1, 4), [[1] * 5])
    longer = tiny_model(n_positions=200).new_cache(1, 200)
    with pytest.raises(ValueError, match="112 positions at most"):
        prefill(model, longer, [[1] * 113])
    block = copy.deepcopy(model.transformer.h[1])
    block.attn.layer = 2
    model.transformer.h.append(block)
    with pytest.raises(ValueError, match="the cache"):
        step_forward(model)(torch.tensor([[1]]), model.new_cache(1, 4))


@torch.inference_mode()
def test_the_first_pass_of_each_kind_says_that_it_compiles(monkeypatch):
    said: list[str] = []

    @contextmanager
    def status() -> Iterator[Callable[[str], None]]:
        yield said.append

    def compute(program: object, ids: object, *others: object, **options: object) -> Tensor:
        return torch.zeros(1, 97)

    monkeypatch.setattr(compiled, "status", status)
    monkeypatch.setattr(compiled, "_READY", set())
    monkeypatch.setattr(program.Program, "__call__", compute)
    for model in (tiny_model(), tiny_model(), tiny_model().bfloat16()):
        for _ in range(2):
            step_forward(model)(torch.tensor([[1]]), model.new_cache(1, 4))
    assert said == ["compiling for this processor, once: about ten seconds"] * 2


@torch.inference_mode()
def test_as_many_threads_compute_as_torch_has(model, monkeypatch):
    asked: list[int] = []

    def run(function: object, arguments: object, threads: int, owners: object) -> None:
        asked.append(threads)

    monkeypatch.setattr(compiled, "_READY", set())
    monkeypatch.setattr(program._TEAM, "run", run)
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        step_forward(model)(torch.tensor([[1]]), model.new_cache(1, 4))
    torch.set_num_threads(before)
    assert asked == [1, 3]


GENERATE = """
import torch
from mqa_gpt import GPT, GPTConfig, generate
from mqa_gpt.fast.compiled import compiled_forward
config = GPTConfig(vocab_size=97, n_positions=40, n_embd=64, n_layer=1, n_head=4)
torch.manual_seed(0)
model = GPT(config).to(torch.{dtype}).eval()
torch.set_num_threads(2)
def work():
    torch.set_num_threads(2)
    print(compiled_forward(model) is not None, *generate(model, [[1, 2, 3]], 5)[0])
"""


def run_script(end: str, dtype: str = "float32", **environment: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", GENERATE.format(dtype=dtype) + end],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.split()


@cache
def tokens_of_the_modules(dtype: str = "float32") -> list[str]:
    compiled, *tokens = run_script("work()", dtype, NUMBA_DISABLE_JIT="1")
    assert compiled == "False"
    return tokens


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_processor_without_vectors_computes_the_same(tmp_path, dtype):
    told = {"NUMBA_CPU_NAME": "generic", "XDG_CACHE_HOME": str(tmp_path)}
    compiled, *tokens = run_script("work()", dtype, **told)
    assert compiled == "True" or dtype == "float16"  # which not every processor converts
    assert tokens == tokens_of_the_modules(dtype)


@pytest.mark.slow
def test_what_numba_is_told_about_the_processor_is_heeded():
    code = "from mqa_kernels.cpu import simd; print(simd.LANES, simd.HAS_VNNI)"
    told = {"NUMBA_ENABLE_AVX": "0", "PYTHONPATH": str(ROOT / "kernels")}
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, env=os.environ | told, capture_output=True, check=True).stdout
    assert said.split() == [b"8", b"False"]


@pytest.mark.slow
def test_a_thread_that_outlives_the_main_one_generates():
    late = "import threading, time\nthreading.Timer(1, work).start()"
    assert run_script(late) == ["True", *tokens_of_the_modules()]


@pytest.mark.slow
def test_without_a_folder_to_write_to_nothing_is_written_elsewhere(tmp_path):
    blocked = tmp_path / "blocked"
    blocked.touch()
    source = ROOT / "kernels"
    before = set(source.rglob("*.nb?"))
    told = {"XDG_CACHE_HOME": str(blocked)}
    assert run_script("work()", **told) == ["True", *tokens_of_the_modules()]
    assert set(source.rglob("*.nb?")) == before


def test_without_a_home_nothing_is_written(monkeypatch):
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert isinstance(program._compiled.__wrapped__()._cache, NullCache)
