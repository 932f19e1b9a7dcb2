"""Every technique on every path: equal to the definition, or an error that says why not.

The definition is a loop without a cache, batch or fast path: the reference backend reads each
prompt and what was generated so far from the beginning, for every new token, with the same patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from mqa_gpt import GPT, LLM, DraftModel, InputError, PromptLookup, generate
from mqa_gpt.fast.int8 import is_quantized, quantize
from mqa_gpt.generation import batching
from mqa_gpt.generation.loop import greedy_steps
from mqa_gpt.model import MultiQueryAttention
from mqa_gpt.research import add, edit, patch, record, replace, zero
from tests.fake_cuda import TapedGraph
from tests.helpers import engine_tokens, error, random_prompts, tiny_config, tiny_model

CONFIG = tiny_config()
NEW = 6
PROMPTS = random_prompts(CONFIG, [7, 3, 5])
C, H, D = CONFIG.n_embd, CONFIG.n_head, CONFIG.head_dim

RECORDS = [
    "transformer.wte",
    "transformer.h.*.resid_pre",
    "transformer.h.*.ln_1",
    "transformer.h.*.attn.q",
    "transformer.h.*.attn.k",
    "transformer.h.*.attn.v",
    "transformer.h.*.attn.k_read",
    "transformer.h.*.attn.v_read",
    "transformer.h.*.attn.scores",
    "transformer.h.*.attn.probs",
    "transformer.h.*.attn.z",
    "transformer.h.*.attn.result",
    "transformer.h.*.attn",
    "transformer.h.*.resid_mid",
    "transformer.h.*.mlp.pre",
    "transformer.h.*.mlp.post",
    "transformer.h.*.mlp",
    "transformer.h.*",
    "transformer.ln_f",
    "logits",
]

VECTOR = torch.linspace(-2, 2, C)

PATCHES: dict[str, dict[str, Any]] = {
    "zero a head": {"transformer.h.1.attn.z": zero(heads=2)},
    "zero a head of all layers": {"transformer.h.*.attn.result": zero(heads=0)},
    "zero positions": {"transformer.h.0.mlp": zero(positions=[1, 4, 8])},
    "zero a slice of positions": {"transformer.h.1.attn.q": zero(positions=slice(2, None, 3))},
    "zero keys": {"transformer.h.0.attn.k": zero(positions=1)},
    "zero values of one row": {"transformer.h.0.attn.v": zero(rows=1)},
    "zero for one reading head": {"transformer.h.1.attn.v_read": zero(heads=1, positions=[0, 2])},
    "keys for one reading head": {"transformer.h.0.attn.k_read": edit(lambda k: -k, heads=0)},
    "steer": {"transformer.h.0": add(VECTOR)},
    "steer between the sublayers": {
        "transformer.h.1.resid_mid": add(VECTOR, positions=slice(3, 9))
    },
    "steer the input": {"transformer.h.1.resid_pre": add(3 * VECTOR, rows=[0, 2])},
    "replace by a vector": {"transformer.h.0.mlp.post": replace(torch.ones(CONFIG.inner_size))},
    "where a token is fed": {"transformer.wte": zero(tokens=PROMPTS[0][2])},
    "scores by a function": {"transformer.h.0.attn.scores": edit(lambda s: s / 2, heads=[0, 1])},
    "knock out a key": {
        "transformer.h.*.attn.probs": edit(lambda p: p.index_fill(-1, torch.tensor([1]), 0.0))
    },
    "ban tokens": {"logits": edit(lambda x: x.index_fill(-1, torch.arange(40), -torch.inf))},
    "a neuron": {
        "transformer.h.1.mlp.pre": edit(lambda x: x.index_fill(-1, torch.tensor([5]), 9.0))
    },
    "several": {
        "transformer.h.0.ln_1": lambda x: x * 1.5,
        "transformer.h.1.ln_2": [add(0.5, positions=2), zero(positions=3)],
    },
}


# ------------------------------------------------------------------------------- the paths


def direct(model: GPT, prompts: Sequence[list[int]]) -> list[list[int]]:
    """The plain loop with a padded prefill and a cache."""
    ids = torch.stack([ids for ids, _ in greedy_steps(model, prompts, NEW)], 1)
    return ids.tolist()


def engine(model: GPT, prompts: Sequence[list[int]]) -> list[list[int]]:
    return generate(model, prompts, NEW)


def engine_with_slots(model: GPT, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Rows wait for slots, leave and move; prompts are read in chunks."""
    rows: list[list[int]] = [[] for _ in prompts]
    for token in engine_tokens(model, prompts, NEW, slots=2, prefill_chunk=2):
        rows[token.row].append(token.id)
    return rows


def lookup(model: GPT, prompts: Sequence[list[int]]) -> list[list[int]]:
    return generate(model, prompts, NEW, draft=PromptLookup((1,)))


def draft(model: GPT, prompts: Sequence[list[int]]) -> list[list[int]]:
    """A draft model that is mostly wrong."""
    return generate(model, prompts, NEW, draft=DraftModel(DRAFT))


DRAFT = tiny_model(n_layer=1)
Path = Callable[[GPT, Sequence[list[int]]], list[list[int]]]


def with_backend(name: str) -> Callable[[], GPT]:
    return lambda: tiny_model(name)


def with_triton() -> GPT:
    """The kernels, which the interpreter runs here; `set_backend` would ask for a GPU."""
    kernels = pytest.importorskip("mqa_kernels", reason="Triton is not available")
    model = tiny_model()
    for module in model.modules():
        if isinstance(module, MultiQueryAttention):
            module.attend = kernels.attention
    return model


def in_int8() -> GPT:
    model = tiny_model()
    quantize(model)
    return model


PATHS: dict[str, tuple[Callable[[], GPT], Path]] = {
    "reference, cache": (with_backend("reference"), direct),
    "sdpa, ragged batch with cache": (with_backend("sdpa"), direct),
    "triton": (with_triton, direct),
    "generation": (with_backend("auto"), engine),
    "batching": (with_backend("auto"), engine_with_slots),
    "prompt lookup": (with_backend("auto"), lookup),
    "draft model": (with_backend("auto"), draft),
    "int8": (in_int8, engine),
    "graph steps": (with_backend("auto"), engine),
}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> tuple[GPT, Path, GPT]:
    """A model, how it generates, and the model of the definition."""
    make, run = PATHS[request.param]
    if request.param == "graph steps":  # while patched they are called, not replayed
        request.getfixturevalue("replayed")
    model = make()
    definition = in_int8() if request.param == "int8" else tiny_model()
    definition.set_backend("reference")
    return model, run, definition


@torch.no_grad()
def defined(model: GPT, prompts: Sequence[list[int]], edits: dict[str, Any]) -> list[list[int]]:
    """New tokens by reading everything again for each of them, row by row."""
    rows = []
    for number, prompt in enumerate(prompts):
        ids = list(prompt)
        for _ in range(NEW):
            with patched(model, of_row(edits, number)):
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        rows.append(ids[len(prompt) :])
    return rows


@cache
def expected_tokens(technique: str, int8: bool) -> list[list[int]]:
    model = in_int8() if int8 else tiny_model()
    model.set_backend("reference")
    return defined(model, PROMPTS, PATCHES[technique])


def of_row(edits: dict[str, Any], number: int) -> dict[str, Any]:
    """The edits for a row that runs by itself, as row 0."""
    mine = {}
    for name, one in edits.items():
        rows = getattr(one, "rows", None)
        if rows is None:
            mine[name] = one
        elif number in (rows if isinstance(rows, list) else [rows]):
            mine[name] = add(one.values) if one.kind == "add" else zero()
    return mine


@contextmanager
def patched(model: GPT, edits: dict[str, Any]) -> Iterator[None]:
    """`patch`, without its complaint about positions that a short text does not reach."""
    try:
        with patch(model, edits) if edits else nullcontext():
            yield
    except InputError as problem:
        if "never applied" not in str(problem):
            raise


# ------------------------------------------------------------------------------- the table


@pytest.mark.slow
def test_what_is_recorded_is_what_a_solo_run_records(path: tuple[GPT, Path, GPT]) -> None:
    model, run, definition = path
    plain = run(model, PROMPTS)
    with record(model, RECORDS) as acts:
        assert run(model, PROMPTS) == plain
    for row, prompt in enumerate(PROMPTS):
        text = [*prompt, *plain[row]][:-1]
        with torch.no_grad(), record(definition, RECORDS) as alone:
            definition(torch.tensor([text]))
        for name in RECORDS:
            check(name, of(acts[name], row), of(alone[name], 0))


def of(value: Any, row: int) -> Tensor:
    """One row of a recorded value with a wildcard or without."""
    if isinstance(value, list):
        return value[row]
    return value[:, row] if value.shape[0] == CONFIG.n_layer and value.ndim > 3 else value[row]


def check(name: str, ours: Tensor, reference: Tensor) -> None:
    assert ours.shape == reference.shape, name
    finite = reference.isfinite()
    assert torch.equal(ours.isfinite(), finite), name
    scale = max(1.0, reference[finite].abs().max().item())
    assert error(ours[finite], reference[finite]) < 2e-4 * scale, name


@pytest.mark.slow
def test_steps_that_are_recorded_are_replayed_as_graphs_all_the_same(
    graphs: list[TapedGraph],
) -> None:
    model = tiny_model()
    names = [*RECORDS, "transformer.h.1.attn.scores"]
    with record(model, names) as acts:
        tokens = generate(model, PROMPTS, 12)
    assert [graph.replays for graph in graphs] == [10]  # of 11 steps; the first compiles kernels
    with record(model, "logits") as again:  # another context has a graph of its own
        assert generate(model, PROMPTS, 12) == tokens
    assert len(graphs) == 2
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad(), record(model, names) as alone:
            model(torch.tensor([[*prompt, *tokens[row]][:-1]]))
        for name in names:
            check(name, of(acts[name], row), of(alone[name], 0))
        check("logits", again["logits"][row], alone["logits"][0])


@pytest.mark.slow
def test_two_contexts_record_the_same_replays_also_when_rows_leave(
    graphs: list[TapedGraph],
) -> None:
    model = tiny_model()
    end = generate(model, PROMPTS, 12)[0][4]
    plain = generate(model, PROMPTS, 12, eos_token_id=end)
    assert len({len(row) for row in plain}) > 1  # so that fewer slots get a graph of their own
    before = len(graphs)
    with record(model, "transformer.h.*") as acts, record(model, "transformer.h.1.mlp") as others:
        assert generate(model, PROMPTS, 12, eos_token_id=end) == plain
    assert len(graphs) > before + 1
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad(), record(model, ["transformer.h.*", "transformer.h.1.mlp"]) as alone:
            model(torch.tensor([[*prompt, *plain[row]][:-1]]))
        check("h", of(acts["transformer.h.*"], row), of(alone["transformer.h.*"], 0))
        check("mlp", others["transformer.h.1.mlp"][row], alone["transformer.h.1.mlp"][0])


@pytest.mark.slow
def test_graphs_of_a_context_go_with_it_and_a_patch_is_not_replayed(
    graphs: list[TapedGraph],
) -> None:
    model = tiny_model()
    expected = engine(model, PROMPTS[:1])
    made, contexts = [], {2: record(model, "transformer.h.0"), 4: patch(model, {"lm_head": zero()})}
    with ExitStack() as stack:
        for token in engine_tokens(model, PROMPTS[:1], NEW):
            made.append(token.id)
            if len(made) in contexts:
                stack.close()
                stack.enter_context(contexts[len(made)])
    assert made[:4] == expected[0][:4]
    assert made[-1] == 0  # of logits that are all zero, the first is taken


@pytest.mark.slow
def test_two_generations_of_an_llm_in_one_context_are_an_error_with_graphs_too(
    graphs: list[TapedGraph],
) -> None:
    llm = LLM.load()
    llm.generate("a = 1", max_new_tokens=6)  # leaves an engine with graphs
    with record(llm.model, "transformer.h.0") as acts:
        llm.generate("a = 1", max_new_tokens=6)
        llm.generate("b = 2", max_new_tokens=6)
    with pytest.raises(InputError, match="2 runs were recorded"):
        acts["transformer.h.0"]


@pytest.mark.slow
@pytest.mark.parametrize("technique", PATCHES)
def test_a_patch_does_what_it_does_in_the_definition(
    path: tuple[GPT, Path, GPT], technique: str
) -> None:
    model, run, definition = path
    edits = PATCHES[technique]
    expected = expected_tokens(technique, is_quantized(definition))
    with patch(model, edits), record(model, "transformer.h.*") as acts:
        assert run(model, PROMPTS) == expected
    for row, prompt in enumerate(PROMPTS):
        text = torch.tensor([[*prompt, *expected[row]][:-1]])
        with (
            torch.no_grad(),
            record(definition, "transformer.h.*") as alone,
            patched(definition, of_row(edits, row)),
        ):
            definition(text)
        check(technique, of(acts["transformer.h.*"], row), of(alone["transformer.h.*"], 0))
    assert run(model, PROMPTS) == run(model, PROMPTS)


@pytest.mark.slow
def test_the_patches_of_the_table_are_not_without_effect() -> None:
    model = tiny_model("reference")
    plain = defined(model, PROMPTS, {})
    same = [name for name, edits in PATCHES.items() if defined(model, PROMPTS, edits) == plain]
    assert same == []


@pytest.mark.slow
def test_a_patch_entered_between_steps_applies_from_then_on(path: tuple[GPT, Path, GPT]) -> None:
    """Also where a step does not call the modules by itself: compiled or as a graph."""
    model, run, definition = path
    if run not in (engine, engine_with_slots):
        pytest.skip("the loop and speculation run by themselves to the end")

    def turned(positions: slice | None) -> dict[str, Any]:
        return {"transformer.h.1": edit(lambda x: x.roll(1, -1) * 2, positions=positions)}

    made: list[int] = []
    with ExitStack() as stack:
        for token in engine_tokens(model, [PROMPTS[0]], NEW):
            made.append(token.id)
            if len(made) == 2:
                stack.enter_context(patch(model, turned(None)))
    # The second new token is fed next; where steps are graphs, it has been fed by then.
    first = len(PROMPTS[0]) + 1 + batching.can_replay(model)
    ids = list(PROMPTS[0])
    with torch.no_grad():
        for _ in range(NEW):
            with patched(definition, turned(slice(first, None))):
                ids.append(int(definition(torch.tensor([ids]))[0, -1].argmax()))
    assert ids[len(PROMPTS[0]) :] == made
    assert made != run(model, PROMPTS)[0]
