"""The compiled forward pass is the model's, and a row has the numbers of its solo run."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("numba", reason="numba, the extra 'cpu', is not installed")

from mqa_gpt import GPT, LLM, generate
from mqa_gpt.attention import reference_attention, sdpa_attention
from mqa_gpt.fast import compiled
from mqa_gpt.fast.compiled import CompiledForward, compiled_forward, step_forward
from mqa_gpt.fast.int8 import quantize
from mqa_gpt.fast.int8_cache import Int8KVCache
from mqa_gpt.generation.prefill import prefill
from mqa_gpt.generation.speculative import DraftModel, PromptLookup
from mqa_kernels.cpu.program import cache_folder
from tests.helpers import (
    engine_tokens,
    error,
    random_ids,
    random_prompts,
    relative_error,
    tiny_model,
)

TOLERANCE = 2e-5  # float32, of the largest value
LENGTHS = [300, 1, 17, 64]  # more keys than a block has, and fewer


@pytest.fixture
def model() -> GPT:
    return tiny_model(n_positions=400)


def of(model: GPT) -> CompiledForward:
    forward = compiled_forward(model)
    assert forward is not None
    return forward


@torch.inference_mode()
def read_and_step(model: GPT, T: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits after prompts and after T more tokens, of the compiled pass and of the modules."""
    prompts = random_prompts(model.config, LENGTHS)
    ids = random_ids(model.config, len(prompts), T)
    cache = model.new_cache(len(prompts), max(LENGTHS) + T)
    read = of(model).read(prompts, cache)
    stepped = of(model)(ids, cache)
    assert cache.lengths.tolist() == [length + T for length in LENGTHS]
    expected_read, expected_stepped = [], []
    for prompt, more in zip(prompts, ids, strict=True):
        logits = model(torch.cat((torch.tensor(prompt), more))[None])[0].float()
        expected_read.append(logits[len(prompt) - 1])
        expected_stepped.append(logits[len(prompt) :])
    return read, stepped, torch.stack(expected_read), torch.stack(expected_stepped)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"multi_query": False},
        {"tie_word_embeddings": False},
        {"scale_attn_weights": False},
        {"activation_function": "relu"},
        {"activation_function": "gelu"},
        {"n_embd": 256, "n_head": 4, "n_inner": 192, "initializer_range": 0.2},  # whole vectors
        {"n_embd": 78, "n_head": 13, "n_inner": 50, "vocab_size": 101},  # tiles of all sizes
    ],
    ids=str,
)
def test_it_gives_the_models_logits(changes: dict[str, Any]):
    read, stepped, expected_read, expected_stepped = read_and_step(
        tiny_model(n_positions=400, **changes)
    )
    assert relative_error(read, expected_read) <= TOLERANCE
    assert relative_error(stepped, expected_stepped) <= TOLERANCE


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
def test_weights_of_16_bits_are_computed_with_in_float32(dtype: torch.dtype):
    model = tiny_model(n_positions=400).to(dtype)
    exact = copy.deepcopy(model).float()
    read, stepped, theirs_read, theirs_stepped = read_and_step(model)
    _, _, exact_read, exact_stepped = read_and_step(exact)
    # Only keys and values are rounded, so the errors are smaller than those of 16-bit modules.
    for ours, theirs, expected in (
        (read, theirs_read, exact_read),
        (stepped, theirs_stepped, exact_stepped),
    ):
        assert error(ours, expected) <= 2 * error(theirs, expected)
        assert (ours - expected).abs().mean() <= (theirs - expected).abs().mean()


@pytest.mark.parametrize(
    "changes",
    [{}, {"n_embd": 64, "n_head": 4, "n_inner": 192}],  # sizes in which rows of prompts are rounded
    ids=str,
)
def test_8_bit_weights_are_multiplied_as_they_are_by_rows_that_are_not_rounded(changes):
    model = tiny_model(**changes)
    quantize(model)
    ids = random_ids(model.config, 2, 16)
    with torch.inference_mode():
        logits = of(model)(ids, model.new_cache(2, 16))
        assert relative_error(logits, model(ids)) <= TOLERANCE


def test_rows_of_a_prompt_may_be_rounded_to_8_bits():
    """With products of 8-bit integers; elsewhere they are not rounded."""
    model = tiny_model(n_positions=400, n_embd=64, n_head=4, n_inner=192, initializer_range=0.2)
    quantize(model)
    read, stepped, expected_read, _ = read_and_step(model)
    assert relative_error(read, expected_read) <= 0.1
    assert stepped.isfinite().all()


def test_the_8_bit_cache_is_that_of_the_modules(model):
    model.cache_class = Int8KVCache
    ids = random_ids(model.config, 2, 40)
    ours, theirs = (model.new_cache(2, 41) for _ in range(2))
    with torch.inference_mode():
        forward = of(model)
        for part in (ids[:, :30], ids[:, 30:39], ids[:, 39:]):
            logits, expected = forward(part, ours), model(part, cache=theirs)
            # An integer of the cache may tip where float32 sums run in another order.
            assert relative_error(logits, expected) <= 0.02
        assert (ours.kv.float() - theirs.kv.float()).abs().max() <= 1
        assert (ours.kv != theirs.kv).float().mean() < 0.01
        assert relative_error(ours.scales, theirs.scales) <= TOLERANCE


# ------------------------------------------------------------------------- a row's own numbers


FORMS: list[Callable[[GPT], object]] = [
    lambda model: None,
    quantize,
    GPT.bfloat16,
    lambda model: setattr(model, "cache_class", Int8KVCache),
]


@pytest.mark.parametrize("form", FORMS, ids=["float32", "int8", "bfloat16", "int8 cache"])
@pytest.mark.parametrize("multi_query", [True, False])
@torch.inference_mode()
def test_a_rows_numbers_are_those_of_its_solo_run_bit_for_bit(form, multi_query):
    model = tiny_model(n_positions=400, n_embd=128, n_head=4, n_inner=192, multi_query=multi_query)
    form(model)
    forward = of(model)
    lengths = [300, 1, 17, 64, 2, 3, 40, 8, 9, 5, 260, 6, 7, 4, 30, 12]
    prompts = random_prompts(model.config, lengths)
    more = random_ids(model.config, len(prompts), 8)
    alone = []
    for prompt, ids in zip(prompts, more, strict=True):
        cache = model.new_cache(1, len(prompt) + 8)
        first = forward.read([prompt], cache)
        alone.append(torch.cat([first, *(forward(i[None, None], cache)[0] for i in ids)]))
    for B in (2, 3, 4, 5, 7, 8, 16):
        for T in (1, 2, 8):
            cache = model.new_cache(B, 320)
            logits = [forward.read(prompts[:B], cache)[:, None]]
            logits += [forward(more[:B, t : t + T], cache) for t in range(0, 8, T)]
            for row, own in zip(torch.cat(logits, dim=1), alone, strict=False):
                assert torch.equal(row, own)


@torch.inference_mode()
def test_how_prompts_are_cut_and_how_many_threads_there_are_changes_no_bit(model):
    prompts, forward = random_prompts(model.config, LENGTHS), of(model)
    results = []
    for size, threads in ((None, 1), (1, 1), (7, 3), (64, 2), (1000, 4)):
        torch.set_num_threads(threads)
        cache = model.new_cache(len(prompts), max(LENGTHS))
        results.append((forward.read(prompts, cache, size), cache.kv))
    torch.set_num_threads(1)
    for logits, kv in results[1:]:
        assert torch.equal(logits, results[0][0])
        assert torch.equal(kv, results[0][1])


@pytest.mark.parametrize("form", FORMS[:2], ids=["float32", "int8"])
def test_tokens_are_the_same_alone_in_batches_in_slots_and_with_drafts(form):
    model = tiny_model(n_positions=400, n_embd=64, n_head=4, n_inner=192)
    form(model)
    prompts = random_prompts(model.config, [9, 40, 1, 17, 5, 60])
    sampling = {"temperature": 0.8, "seed": 3}
    alone = [generate(model, [prompt], 24)[0] for prompt in prompts]
    assert generate(model, prompts, 24) == alone
    assert generate(model, prompts, 24, draft=PromptLookup()) == alone
    assert generate(model, prompts, 24, draft=DraftModel(tiny_model(n_positions=400))) == alone
    assert generate(model, prompts, 24, prefill_chunk=3) == alone
    for slots in (2, 5):
        rows: list[list[int]] = [[] for _ in prompts]
        for token in engine_tokens(model, prompts, 24, slots=slots):
            rows[token.row].append(token.id)
        assert rows == alone
    sampled = generate(model, [prompts[0]], 24, n=5, **sampling)
    assert sampled == generate(model, [prompts[0]], 24, n=5, draft=PromptLookup(), **sampling)
    assert sampled[:2] == generate(model, [prompts[0]], 24, n=2, **sampling)


# ------------------------------------------------------------------------------- weights in place


@torch.inference_mode()
def test_changes_of_weights_are_seen_and_the_model_stays_as_it_was(model):
    forward, ids = of(model), torch.tensor([[1, 2, 3]])
    before = {name: x.clone() for name, x in model.state_dict().items()}
    first = forward(ids, model.new_cache(1, 3))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    model.transformer.h[0].mlp.c_fc.weight.mul_(2)
    changed = forward(ids, model.new_cache(1, 3))
    assert not torch.equal(first, changed)
    assert relative_error(changed, model(ids)) <= TOLERANCE


@torch.inference_mode()
def test_tensors_that_were_replaced_are_used_by_the_next_generation(model):
    prompts = random_prompts(model.config, [5, 9])
    old, forward = generate(model, prompts, 12), of(model)
    other = tiny_model(n_positions=400)
    for parameter in other.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    model.load_state_dict(other.state_dict(), assign=True)
    forward(torch.tensor([[1]]), model.new_cache(1, 1))  # still has what it was made of
    assert generate(model, prompts, 12) == generate(other, prompts, 12) != old


@torch.inference_mode()
def test_it_does_not_depend_on_torchs_defaults(model):
    ids = torch.tensor([[1, 2, 3]])
    expected = of(model)(ids, model.new_cache(1, 3))
    cache = model.new_cache(1, 3)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            logits = of(model)(ids, cache)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(logits, expected)


@torch.inference_mode()
def test_layers_may_be_left_out_and_change_places(model):
    blocks = model.transformer.h
    blocks[0], blocks[1] = blocks[1], blocks[0]
    for _ in range(2):
        read, stepped, expected_read, expected_stepped = read_and_step(model)
        assert relative_error(read, expected_read) <= TOLERANCE
        assert relative_error(stepped, expected_stepped) <= TOLERANCE
        del blocks[0]


def add_hook(model: GPT) -> None:
    model.transformer.h[1].mlp.register_forward_hook(lambda *call: None)


def compile_the_model(model: GPT) -> None:
    model.compile(backend="eager")


def compile_a_block(model: GPT) -> None:
    model.transformer.h[1].compile(backend="eager")


def resize_a_layer(model: GPT) -> None:
    model.transformer.h[1].mlp.c_fc = nn.Linear(60, 137).eval()


def transpose_a_weight(model: GPT) -> None:
    layer = model.transformer.h[0].attn.c_proj
    layer.weight.data = layer.weight.data.T.contiguous().T


def mix_dtypes(model: GPT) -> None:
    model.transformer.h[0].mlp.c_fc.bfloat16()


def give_the_head_a_bias(model: GPT) -> None:
    model.lm_head = nn.Linear(60, 97).eval()


def leave_a_norm_without_weight(model: GPT) -> None:
    model.transformer.h[0].ln_1 = nn.LayerNorm(60, elementwise_affine=False).eval()


def choose_another_activation(model: GPT) -> None:
    model.transformer.h[0].mlp.activation = "relu"


def ask_for_the_reference(model: GPT) -> None:
    model.set_backend("reference")


@pytest.mark.parametrize(
    "change",
    [
        *(add_hook, GPT.train, GPT.double, compile_the_model, compile_a_block, resize_a_layer),
        *(transpose_a_weight, mix_dtypes, give_the_head_a_bias, leave_a_norm_without_weight),
        *(choose_another_activation, ask_for_the_reference),
    ],
)
def test_a_model_that_it_would_not_compute_runs_its_modules(model, change):
    change(model)
    assert compiled_forward(model) is None


def test_a_model_of_another_class_runs_its_modules(model):
    class Other(GPT):
        pass

    assert compiled_forward(Other(model.config).eval()) is None


@pytest.mark.parametrize("attend", [reference_attention, sdpa_attention])
def test_an_attention_that_was_asked_for_is_the_one_that_runs(model, attend):
    model.transformer.h[1].attn.attend = attend
    assert compiled_forward(model) is None


def test_it_refuses_what_the_model_refuses(model):
    forward, cache = of(model), model.new_cache(1, 4)
    with pytest.raises(ValueError, match="5 more do not fit"):
        forward(random_ids(model.config, 1, 5), cache)
    for id_ in (-1, 97):
        with pytest.raises(IndexError, match="from 0 to 96"):
            forward(torch.tensor([[id_]]), cache)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["c_attn", "c_proj"])
@torch.inference_mode()
def test_numbers_that_are_not_finite_stay_so(model, bad: float, name: str):
    getattr(model.transformer.h[0].attn, name).weight[-1, 3] = bad
    forward, cache = of(model), model.new_cache(1, 4)
    assert not forward(torch.tensor([[1, 2, 3]]), cache).isfinite().all()
    with pytest.raises(FloatingPointError, match="not finite"):
        generate(model, [[1, 2, 3]], 3)


@torch.inference_mode()
def test_what_a_slot_held_before_has_no_influence(model):
    prompts = random_prompts(model.config, [5, 9])
    caches = [model.new_cache(2, 20) for _ in range(2)]
    caches[1].kv.fill_(float("nan"))
    ids = random_ids(model.config, 2, 2)
    results = [(of(model).read(prompts, cache), of(model)(ids, cache)) for cache in caches]
    assert all(map(torch.equal, *results))


# ------------------------------------------------------------------------------------- who uses it


@contextmanager
def counted_calls() -> Iterator[list[GPT]]:
    """The models whose modules are called inside, in order."""
    calls: list[GPT] = []

    def counting(self: GPT, *arguments: Any, **options: Any) -> Tensor:
        calls.append(self)
        return nn.Module.__call__(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT, "__call__", counting)
        yield calls


@pytest.mark.parametrize("draft", [None, PromptLookup(), "model"])
def test_prefill_and_steps_are_compiled_and_those_of_a_hooked_model_are_not(model, draft):
    if draft == "model":
        draft = DraftModel(copy.deepcopy(model))
    prompts = random_prompts(model.config, [5, 9])
    with counted_calls() as calls:
        tokens = generate(model, prompts, 12, draft=draft)
    assert model not in calls
    block, seen = model.transformer.h[1], []
    block.register_forward_hook(lambda *call: seen.append(call))
    with counted_calls() as calls:
        assert generate(model, prompts, 12, draft=draft) == tokens
    assert len(seen) == calls.count(model) > 2


def test_without_numba_the_modules_run(model, monkeypatch):
    prompts = random_prompts(model.config, [5, 9])
    tokens = generate(model, prompts, 12)
    monkeypatch.setattr(compiled, "HAS_NUMBA", False)
    with counted_calls() as calls:
        assert generate(model, prompts, 12) == tokens
    assert calls
    with counted_calls() as calls, torch.inference_mode():
        step_forward(model)(torch.tensor([[1], [2]]), model.new_cache(2, 9))
        prefill(model, model.new_cache(2, 9), prompts)
    assert len(calls) == 2


@pytest.mark.parametrize("broken", ["numba", "llvmlite"])
def test_with_a_broken_numba_the_modules_run_and_one_warning_says_so(broken: str, tmp_path: Path):
    """Such as one without llvmlite, or whose library the system cannot load."""
    (tmp_path / broken).mkdir()
    (tmp_path / broken / "__init__.py").write_text("raise ImportError('lib is\\nnot there')\n")
    script = SCRIPT.replace("import sys", "import warnings; warnings.simplefilter('always')")
    script += "LLM.load(dtype='float32').generate('def f(', 4)\n"
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{root}:{root / 'kernels'}"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == run_script()
    assert result.stderr.count("RuntimeWarning") == 1
    assert "numba is installed but cannot be used (ImportError: lib is" in result.stderr


# ------------------------------------------------------------------------- threads and processes


def test_generations_in_several_threads_do_not_mix(model):
    prompts = random_prompts(model.config, [5, 9, 30, 2])
    torch.set_num_threads(2)
    expected = [generate(model, [prompt], 30)[0] for prompt in prompts]
    found: dict[int, list[list[int]]] = {}

    def run(i: int) -> None:
        torch.set_num_threads(2)
        found[i] = [generate(model, [prompts[i]], 30)[0] for _ in range(5)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(1)
    assert found == {i: [ids] * 5 for i, ids in enumerate(expected)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_generates_too(model):
    torch.set_num_threads(2)
    expected = generate(model, [[1, 2, 3]], 9)
    child = os.fork()
    if child == 0:
        os._exit(0 if generate(model, [[1, 2, 3]], 9) == expected else 1)
    _, status = os.waitpid(child, 0)
    torch.set_num_threads(1)
    assert os.waitstatus_to_exitcode(status) == 0


SCRIPT = """
import sys
from mqa_gpt import LLM
print(LLM.load(dtype="float32").generate("def f(", 4).token_ids)
"""


def run_script(**environment: str) -> str:
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"PYTHONPATH": f"{root}:{root / 'kernels'}"} | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_compiled_code_is_kept_and_damaged_code_is_made_again(tmp_path: Path):
    expected = f"{LLM.load(dtype='float32').generate('def f(', 4).token_ids}\n"
    kept = tmp_path / "mqa-gpt" / cache_folder().name
    # Without what another process is writing.
    shutil.copytree(cache_folder(), kept, ignore=lambda _, names: [n for n in names if "tmp" in n])
    files = list(kept.iterdir())
    assert {file.suffix for file in files} == {".nbc", ".nbi"}
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    assert run_script(XDG_CACHE_HOME=str(tmp_path)) == expected
    dates = {file: file.stat().st_mtime_ns for file in kept.iterdir()}
    old, recent = (tmp_path / f"mqa-gpt/compiled-{name}" for name in ("old", "recent"))
    for folder, days in ((old, 31), (recent, 29)):
        folder.mkdir()
        (folder / "code.nbc").touch()
        date = time.time() - days * 24 * 3600
        os.utime(folder, (date, date))
    os.utime(kept, (0, 0))
    assert run_script(XDG_CACHE_HOME=str(tmp_path)) == expected
    assert {file: file.stat().st_mtime_ns for file in kept.iterdir()} == dates  # read
    assert sorted((tmp_path / "mqa-gpt").iterdir()) == sorted([kept, recent])
    assert time.time() - kept.stat().st_mtime < 3600  # used, so it stays
