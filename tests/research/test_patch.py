"""patch: values, places, and mistakes; that it works on every path is in test_paths.py."""

from __future__ import annotations

import pytest
import torch

from mqa_gpt import GPT, InputError, KVCache, generate
from mqa_gpt.research import add, edit, mean, patch, record, replace, zero
from tests.helpers import error, random_ids, random_prompts, relative_error, tiny_config, tiny_model

CONFIG = tiny_config()
NAME = "transformer.h.1.resid_mid"
PROBS = "transformer.h.1.attn.probs"


@pytest.fixture(scope="module")
def model() -> GPT:
    return tiny_model()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return random_ids(CONFIG, 2, 9)


@torch.no_grad()
def recorded(model: GPT, ids: torch.Tensor, name: str) -> torch.Tensor:
    with record(model, name) as acts:
        model(ids)
    return acts[name]


@torch.no_grad()
def patched(model: GPT, ids: torch.Tensor, name: str, one: object) -> torch.Tensor:
    """What is recorded at a point whose patch this is."""
    with record(model, name) as acts, patch(model, {name: one}):
        model(ids)
    return acts[name]


POINTS = [
    "transformer.wte", "transformer.h.1", NAME, "transformer.h.0.resid_pre", "transformer.h.1.ln_1",
    "transformer.h.0.attn.q", "transformer.h.0.attn.k", "transformer.h.0.attn.v",
    "transformer.h.0.attn.k_read", "transformer.h.0.attn.v_read", "transformer.h.0.attn.scores",
    "transformer.h.0.attn.probs", "transformer.h.0.attn.z", "transformer.h.0.attn.result",
    "transformer.h.0.attn", "transformer.h.0.mlp.pre", "transformer.h.0.mlp.post", "logits",
]  # fmt: skip


@pytest.mark.parametrize("name", POINTS)
def test_what_was_recorded_put_back_changes_nothing(model: GPT, ids, name: str) -> None:
    with torch.no_grad():
        plain = model(ids)
        with record(model, name) as acts:
            model(ids)
        with patch(model, {name: replace(acts[name])}):
            again = model(ids)
    assert relative_error(again, plain) < 1e-5
    other = random_ids(CONFIG, 2, 9, seed=1)
    assert torch.equal(patched(model, other, name, replace(acts[name])), acts[name])


@pytest.mark.parametrize("name", POINTS)
def test_a_place_is_changed_and_no_other(model: GPT, ids: torch.Tensor, name: str) -> None:
    plain = recorded(model, ids, name)
    new = patched(model, ids, name, edit(lambda x: x - 3, positions=[2, 5], rows=1))
    axis = 2 if name.endswith(("scores", "probs")) else 1
    places = torch.zeros(plain.shape, dtype=torch.bool)
    places[1].index_fill_(axis - 1, torch.tensor([2, 5]), 1)
    finite = plain.isfinite()
    assert torch.equal(new[~places & finite], plain[~places & finite])
    assert error(new[places & finite], plain[places & finite] - 3) < 1e-5


def test_heads_are_those_of_the_points_axis(model: GPT, ids: torch.Tensor) -> None:
    for name, axis in (("z", 2), ("q", 2), ("result", 2), ("k_read", 2), ("probs", 1)):
        new = patched(model, ids, f"transformer.h.1.attn.{name}", zero(heads=[0, 2]))
        sizes = new.abs().amax([i for i in range(4) if i != axis])
        assert sizes[0] == sizes[2] == 0
        assert sizes[1] > 0
    many = tiny_model(multi_query=False)
    new = patched(many, ids, "transformer.h.1.attn.k", zero(heads=1))
    assert (new.abs().amax((0, 1, 3)) == 0).tolist() == [False, True, False]


def test_values_of_every_form_fit(model: GPT, ids: torch.Tensor) -> None:
    before = recorded(model, ids, NAME)  # (B, T, C)
    vector, series = torch.randn(CONFIG.n_embd), torch.randn(9, CONFIG.n_embd)
    for values, expected in (
        (2.0, torch.full_like(before, 2)),
        (vector, vector.expand_as(before)),
        (series, series.expand_as(before)),
        (series[None], series.expand_as(before)),
        (before.flip(0), before.flip(0)),
        (vector.double(), vector.expand_as(before)),
    ):
        assert torch.equal(patched(model, ids, NAME, replace(values)), expected)
        assert error(patched(model, ids, NAME, add(values)), before + expected) < 1e-5
    heads = torch.randn(CONFIG.n_head, CONFIG.head_dim)
    new = patched(model, ids, "transformer.h.1.attn.z", replace(heads))
    assert torch.equal(new, heads.expand_as(new))
    assert torch.equal(patched(model, ids, NAME, before.flip(0)), before.flip(0))
    assert error(patched(model, ids, NAME, lambda x: x * 2), before * 2) == 0


def test_the_mean_is_over_rows_and_positions(model: GPT, ids: torch.Tensor) -> None:
    name = "transformer.h.1.attn.z"
    values = recorded(model, ids, name)  # (B, T, H, D)
    middle = values.mean((0, 1))  # (H, D)
    assert error(patched(model, ids, name, mean(values)), middle.expand_as(values)) < 1e-6
    rows = [values[0, :4], values[1]]
    expected = torch.cat(rows).mean(0)
    assert error(patched(model, ids, name, mean(rows))[0, 0], expected) < 1e-6
    with torch.no_grad(), record(model, "transformer.h.*") as acts:
        model(ids)
    stacked = acts["transformer.h.*"]
    after = patched(model, ids, "transformer.h.*", mean(stacked))
    for layer, got in enumerate(after):
        assert error(got, stacked[layer].mean((0, 1)).expand_as(got)) < 1e-6


def test_stacked_values_go_to_their_layers(model: GPT, ids: torch.Tensor) -> None:
    other = random_ids(CONFIG, 2, 9, seed=5)
    plain = recorded(model, ids, "transformer.h.*.attn.z")
    again = patched(model, other, "transformer.h.*.attn.z", replace(plain))
    assert torch.equal(again, plain)


def test_values_are_taken_at_absolute_positions(model: GPT, ids: torch.Tensor) -> None:
    series = torch.randn(9, CONFIG.n_embd)
    with torch.no_grad(), patch(model, {"transformer.h.0": replace(series)}):
        whole = model(ids)
        cache = KVCache(CONFIG, 2, 9)
        parts = [model(ids[:, :4], cache=cache), model(ids[:, 4:], cache=cache)]
    assert error(torch.cat(parts, 1), whole) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", POINTS)
def test_an_empty_list_of_edits_changes_no_bit(ids: torch.Tensor, name: str) -> None:
    model = tiny_model()
    model.set_backend("sdpa")  # which computes attention in another way than a patch of its inside
    plain = model(ids)
    with patch(model, {name: []}):
        assert torch.equal(model(ids), plain)


def test_a_recording_of_one_position_is_not_spread_over_all(model: GPT, ids: torch.Tensor) -> None:
    first = torch.randn(2, 1, CONFIG.n_embd)
    expected = recorded(model, ids, NAME)
    expected[:, 0] = first[:, 0]
    assert torch.equal(patched(model, ids, NAME, replace(first, positions=0)), expected)


def test_patches_nest_in_the_order_in_which_they_were_entered(model: GPT, ids) -> None:
    before = recorded(model, ids, NAME)
    first, second = {NAME: add(1.0)}, {NAME: [lambda x: x * 2, add(0.5)]}
    with torch.no_grad(), record(model, NAME) as acts, patch(model, first), patch(model, second):
        model(ids)
    assert error(acts[NAME], (before + 1) * 2 + 0.5) < 1e-5


def test_a_function_may_write_to_what_it_gets(model: GPT, ids: torch.Tensor) -> None:
    before = recorded(model, ids, NAME)

    def halve(x: torch.Tensor) -> torch.Tensor:
        x[:, 3] /= 2
        return x

    for name in (NAME, "transformer.h.1.resid_pre", "transformer.h.1.attn.q"):
        before = recorded(model, ids, name)
        expected = before.clone()
        expected[:, 3] /= 2
        assert torch.equal(patched(model, ids, name, halve), expected)


def test_gradients_pass_through_a_patch(model: GPT, ids: torch.Tensor) -> None:
    vector = torch.zeros(CONFIG.n_embd, requires_grad=True)
    with record(model, NAME) as acts, patch(model, {NAME: add(vector, positions=4)}):
        model(ids).square().sum().backward()
    assert vector.grad is not None
    gradient = acts.grad[NAME][:, 4].sum(0)
    assert error(vector.grad, gradient) < 1e-4 * gradient.abs().max().item()
    model.zero_grad()


def test_tokens_choose_the_positions_where_they_are_fed(model: GPT, ids: torch.Tensor) -> None:
    token = int(ids[0, 2])
    new = patched(model, ids, "transformer.h.0", zero(tokens=[token]))
    assert torch.equal(new.abs().amax(-1) == 0, ids == token)


def test_rows_are_the_numbers_of_completions(model: GPT) -> None:
    prompts = random_prompts(CONFIG, [3, 6, 4])
    plain = generate(model, prompts, 5)
    with patch(model, {"transformer.h.1": edit(lambda x: -x, rows=2)}):
        new = generate(model, prompts, 5)
    assert new[:2] == plain[:2]
    assert new[2] != plain[2]
    ragged = patch(model, {"transformer.h.1": zero(rows=1)})
    with pytest.raises(InputError, match="samples of one prompt share"), ragged:
        generate(model, prompts, 5, n=2, temperature=1.0, seed=0)


# -------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({}, "names are"),
        ({"transformer.h.9": zero()}, "not in this model"),
        ({NAME: "zero"}, "expected zero"),
        ({NAME: None}, "expected zero"),
        ([zero()], "expected a dictionary"),
        ({NAME: zero(heads=0)}, "has no heads"),
        ({"transformer.h.1.attn.z": zero(heads=3)}, r"heads is 3: .* has 3"),
        ({NAME: replace(torch.zeros(7))}, "do not fit"),
        ({NAME: replace(torch.zeros(2, 9, 61))}, "do not fit"),
        ({NAME: replace(torch.zeros(3, 9, 60))}, "do not fit"),
        ({NAME: replace(torch.zeros(1, 1, 1, 9, 60))}, "do not fit"),
        ({NAME: replace(torch.zeros(5, 60))}, "end at position 4"),
        ({NAME: replace(torch.zeros(1, 60))}, "end at position 0"),
        ({NAME: replace(torch.zeros(2, 1, 60))}, "end at position 0"),
        ({"transformer.h.1.attn.k_read": add(torch.zeros(1, 3, 20))}, "end at position 0"),
        ({NAME: replace(torch.zeros(2, 9, 1))}, "do not fit"),
        ({PROBS: replace(torch.ones(2, 3, 1, 1), positions=0)}, "do not fit"),
        ({"transformer.h.*": replace(torch.zeros(3, 2, 9, 60))}, "of 3 layers"),
        ({NAME: lambda x: x[:, :3]}, "the function for"),
        ({NAME: lambda x: None}, "the function for"),
        ({NAME: lambda x: x.double()}, "the function for"),
        ({NAME: mean(torch.zeros(60))}, "mean of"),
        ({NAME: mean([])}, "mean of"),
        ({"transformer.h.1.attn.probs": mean(torch.zeros(2, 3, 9, 9))}, "mean of"),
        ({"transformer.h.1.attn.k_read": zero(tokens=1)}, "tokens are not known"),
        ({NAME: zero(positions=50)}, "was never applied"),
        ({NAME: zero(rows=2)}, "was never applied"),
    ],
)
def test_what_does_not_fit_is_an_error(model: GPT, ids, edits, message: str) -> None:
    with torch.no_grad(), pytest.raises(InputError, match=message), patch(model, edits):
        model(ids)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("name", ["positions", "rows", "heads", "tokens"])
@pytest.mark.parametrize("value", [-1, [1, -2], "all", 1.5, slice(-3, None), [None]])
def test_places_are_counted_from_zero(name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{name} is"):
        zero(**{name: value})


def test_a_patch_that_nothing_ran_in_is_an_error(model: GPT) -> None:
    with pytest.raises(InputError, match="nothing was patched"), patch(model, {NAME: zero()}):
        pass
    with pytest.raises(ZeroDivisionError), patch(model, {NAME: zero()}):
        raise ZeroDivisionError
