"""The analyses: sums that must come out, heads that are known, and pictures that are drawn."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mqa_gpt import GPT, InputError, Tokenizer
from mqa_gpt.checkpoints.load import DEMO_DIR
from mqa_gpt.cli.app import app
from mqa_gpt.fast.int8 import quantize
from mqa_gpt.fim import infill_prompt
from mqa_gpt.generation.score import Score, score_texts
from mqa_gpt.research import heads, patch, pictures, replace
from mqa_gpt.research.heads import (
    attention_patterns,
    effective_rank,
    hole_shares,
    induction_scores,
    kv_sharing,
    previous_token_scores,
)
from mqa_gpt.research.lens import logit_attribution, logit_lens
from mqa_gpt.research.patching import (
    Patching,
    agreement,
    attribute_positions,
    logit_difference,
    patch_positions,
)
from tests.helpers import error, random_ids, tiny_config, tiny_model

CONFIG = tiny_config()
LENS = "def copy(source, target):\n    for item in"
OTHER = LENS.replace("source", "names")


@pytest.fixture(scope="module")
def model() -> GPT:
    return tiny_model()


@pytest.fixture(scope="module")
def demo() -> tuple[GPT, Tokenizer]:
    return GPT.from_pretrained(DEMO_DIR, dtype="float32"), Tokenizer.from_pretrained(DEMO_DIR)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return random_ids(CONFIG, 11).tolist()


def test_the_lens_ends_at_the_models_own_distribution(model: GPT, ids: list[int]) -> None:
    lens = logit_lens(model, ids)
    with torch.no_grad():
        probabilities = model(torch.tensor([ids]))[0].softmax(-1)
        embedding = model.transformer.drop(
            model.transformer.wte(torch.tensor(ids)) + model.transformer.wpe.weight[: len(ids)]
        )
        first = model.lm_head(model.transformer.ln_f(embedding)).softmax(-1)
    assert torch.equal(lens.top_ids[-1], probabilities.argmax(-1))
    assert error(lens.probability[-1], probabilities.amax(-1)) < 1e-5
    assert lens.divergence[-1].abs().max() < 1e-5
    assert torch.equal(lens.top_ids[0], first.argmax(-1))
    expected = (probabilities * (probabilities / first).log()).sum(-1)
    assert error(lens.divergence[0], expected) < 1e-3


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("against", [None, 12])
@pytest.mark.parametrize("position", [-1, 3])
def test_the_parts_of_a_logit_add_up_to_it(ids: list[int], int8, against, position) -> None:
    model = tiny_model(tie_word_embeddings=False)
    if int8:
        quantize(model)
    found = logit_attribution(model, ids, 5, against=against, position=position)
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, position]
    expected = logits[5] - (0 if against is None else logits[against])
    assert found.total == pytest.approx(expected.item(), abs=1e-4)
    assert found.heads.shape == (CONFIG.n_layer, CONFIG.n_head)


def test_the_demos_circuit_is_found(demo: tuple[GPT, Tokenizer]) -> None:
    """The one that mqa_gpt/training/induction.py has built."""
    model, tokenizer = demo
    previous = previous_token_scores(attention_patterns(model, tokenizer.encode(LENS * 3)))
    assert previous.argmax() == 0
    assert previous[0, 0] > 0.9
    induction = induction_scores(model)
    assert induction.argmax() == 1 * model.config.n_head
    assert induction[1, 0] > 0.5
    assert induction[0].max() < 0.05


def test_induction_is_measured_at_the_token_after_the_first_occurrence() -> None:
    """On patterns that are made: all attention length - 1 back."""
    model = tiny_model()
    put = torch.zeros(1, 1, 12, 12)
    for t in range(12):
        put[..., t, max(t - 5, 0)] = 1.0
    shape = (2, CONFIG.n_head, 12, 12)
    with patch(model, {"transformer.h.1.attn.probs": replace(put.expand(shape))}):
        scores = induction_scores(model, length=6, rows=2)
    assert torch.allclose(scores[1], torch.ones(CONFIG.n_head))
    assert scores[0].max() < 1


@pytest.mark.parametrize("mode", ["psm", "spm"])
def test_shares_of_an_infill_add_up_and_are_of_its_parts(demo, mode: str) -> None:
    model, tokenizer = demo
    prefix, middle, suffix = "def add(a, b):\n    return ", "a + b", "\n\nprint(add(1, 2))\n"
    shares = hole_shares(model, tokenizer, prefix, middle, suffix, mode)
    assert torch.allclose(sum(shares.values()), torch.ones(6, 4), atol=1e-5)
    prompt = infill_prompt(tokenizer, prefix, suffix, mode=mode)
    written = tokenizer.encode(middle, special_tokens=False)
    patterns = attention_patterns(model, [*prompt, *written])[:, :, len(prompt) - 1 : -1].mean(2)
    before = len(tokenizer.encode(prefix, special_tokens=False))
    after = len(tokenizer.encode(suffix, special_tokens=False))
    start = {"psm": 1 + before + 1, "spm": 2}[mode]
    assert torch.allclose(shares["suffix"], patterns[..., start : start + after].sum(-1))
    start = {"psm": 1, "spm": 2 + after + 1}[mode]
    assert torch.allclose(shares["prefix"], patterns[..., start : start + before].sum(-1))


def test_the_effective_rank_is_that_of_known_matrices() -> None:
    q, _ = torch.linalg.qr(torch.randn(50, 7))
    centred = q - q.mean(0)
    assert 6 < effective_rank(torch.linalg.qr(centred)[0]).item() <= 7 + 1e-4
    assert effective_rank(torch.randn(50, 1) @ torch.randn(1, 7)).item() == pytest.approx(1, 1e-3)


@pytest.mark.parametrize("multi_query", [True, False])
def test_sharing_is_measured_for_one_head_and_for_many(ids: list[int], multi_query: bool) -> None:
    model = tiny_model(multi_query=multi_query)
    found = kv_sharing(model, ids)
    G, H = model.config.n_kv_head, CONFIG.n_head
    assert found.key_rank.shape == found.value_rank.shape == (CONFIG.n_layer, G)
    assert found.overlap.shape == (CONFIG.n_layer, H, H)
    assert torch.allclose(found.overlap.diagonal(dim1=1, dim2=2), torch.ones(CONFIG.n_layer, H))
    assert torch.allclose(found.overlap, found.overlap.mT)
    assert 0 < found.overlap.min() < 1
    assert (found.all_key_rank >= found.key_rank.amax(1) - 1e-4).all()


# -------------------------------------------------------------------------------- patching


def test_patching_all_of_the_difference_restores_the_answer(model: GPT, ids: list[int]) -> None:
    other = [*ids[:4], (ids[4] + 1) % CONFIG.vocab_size, *ids[5:]]
    metric = logit_difference(3, 8)
    found = patch_positions(model, ids, other, metric, batch_size=4)
    assert found.restored.shape == (CONFIG.n_layer, len(ids))
    assert found.restored[0, 4].item() == pytest.approx(1, abs=1e-4)  # all that differs
    assert found.restored[:, :4].abs().max() < 1e-4  # positions before see no difference
    assert found.restored[0, 5:].abs().max() < 1e-4  # nor does the embedding of others
    last = patch_positions(model, ids, other, metric, "transformer.h.*")
    assert last.restored[-1, -1].item() == pytest.approx(1, abs=1e-4)
    assert found.clean != found.corrupted


@pytest.mark.parametrize("point", ["resid_pre", "attn", "mlp"])
def test_attribution_patching_agrees_with_patching_on_the_demo(demo, point: str) -> None:
    model, tokenizer = demo
    clean, corrupted = tokenizer.encode(LENS), tokenizer.encode(OTHER)
    answers = (tokenizer.encode(name)[0] for name in (" source", " names"))
    metric, name = logit_difference(*answers), f"transformer.h.*.{point}"
    true = patch_positions(model, clean, corrupted, metric, name).restored.flatten()
    for steps, least in ((1, 0.95), (4, 0.99)):
        estimate = attribute_positions(model, clean, corrupted, metric, name, steps=steps)
        pair = torch.stack([true, estimate.restored.flatten()])
        assert torch.corrcoef(pair)[0, 1] >= least
    assert all(parameter.grad is None for parameter in model.parameters())


def test_attribution_is_exact_for_what_is_linear(model: GPT, ids: list[int]) -> None:
    """For a metric of the last residual stream before its normalisation: here many small steps."""
    other = [*ids[:-1], (ids[-1] + 1) % CONFIG.vocab_size]
    metric = logit_difference(3, 8)
    found = attribute_positions(model, ids, other, metric, steps=200)
    assert found.restored[0].sum().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corrupted": [1, 2]}, "equally long"),
        ({"corrupted": "clean"}, "nothing to restore"),
        ({"point": "transformer.h.*.attn.z"}, "not of shape"),
    ],
)
def test_what_cannot_be_patched_is_an_error(model: GPT, ids, change, message: str) -> None:
    corrupted = change.get("corrupted", ids[::-1])
    corrupted = ids if corrupted == "clean" else corrupted
    point = change.get("point", "transformer.h.*.resid_pre")
    for function in (patch_positions, attribute_positions):
        with pytest.raises(InputError, match=message):
            function(model, ids, corrupted, logit_difference(3, 8), point)


# ------------------------------------------------------------------- the command and its pictures


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["research", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


COMMANDS = {
    "logit-lens": ["logit-lens", LENS],
    "attribution": ["attribution", LENS, "--against", " names"],
    "attention": ["attention", LENS],
    "infill": ["attention", "--prefix", "x = ", "--middle", "a", "--suffix", " + b"],
    "patch": ["patch", LENS, OTHER],
    "loss": ["loss", "tests/research/test_studies.py"],
    "sharing": ["sharing", LENS],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_prints_a_table_and_json_and_draws(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="an extra")
    table = run(*COMMANDS[name], "--picture", str(tmp_path / "picture.png"))
    assert len(table.splitlines()) > 5
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(run(*COMMANDS[name], "--json"))
    assert report["model"] == "demo"
    assert len(report) > 1


def test_the_patch_command_says_how_well_the_estimate_agrees() -> None:
    report = json.loads(run("patch", LENS, OTHER, "--json"))
    assert report["correlation"] > 0.95
    assert report["tokens"][3] == "source"


@pytest.mark.parametrize("point", ["transformer.h.*.resid_pre", "transformer.h.*.resid_mid"])
def test_prompts_of_one_token_have_no_correlation_in_the_residual_stream(point: str) -> None:
    arguments = ["patch", " x", " y", "--answer", " a", "--against", " b", "--point", point]
    report = json.loads(run(*arguments, "--json"))
    assert report["correlation"] is None
    assert report["activation patching"]["restored"] == [[1.0]] * 6
    printed = CliRunner().invoke(app, ["research", *arguments])
    assert printed.output.endswith("(1 steps): none\n")


def test_the_agreement_of_two_patchings_is_pearsons_correlation() -> None:
    values = torch.tensor([[[0.1, 0.7], [0.4, 0.2]], [[0.2, 0.9], [0.3, 0.3]]])
    truth, estimate = (Patching(restored, 1.0, 0.0) for restored in values)
    expected = statistics.correlation(values[0].flatten().tolist(), values[1].flatten().tolist())
    assert agreement(truth, estimate) == pytest.approx(expected, abs=1e-6)
    rounded = Patching(torch.tensor([[1.0, 1.0], [1 - 1e-6, 1.0]]), 1.0, 0.0)
    assert agreement(rounded, estimate) is None
    assert agreement(truth, rounded) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention"], "give a TEXT"),
        (["attention", "--prefix", "x"], "give a TEXT"),
        (["attention", "a"], "expected at least 2"),
        (["sharing", "a"], "the text has 1 tokens: expected 2 to"),
        (["logit-lens", "a", "--last", "0"], "Invalid value for '--last'"),
        (["attribution", "x = ", "--token", "a b c d"], "tokens: give a text that is one"),
        (["patch", "x = 1", "x = 1"], "both answers are"),
        (["logit-lens", "x", "--picture", "nowhere/at/all.png"], "cannot write the picture"),
        (["loss", "no-such-file.py"], "cannot read"),
    ],
)
def test_a_mistake_is_a_message(arguments: list[str], message: str) -> None:
    if "--picture" in arguments:
        pytest.importorskip("matplotlib", reason="matplotlib, an extra, draws the pictures")
    result = CliRunner().invoke(app, ["research", *arguments])
    assert result.exit_code == 2
    assert message in result.output


def test_a_listing_keeps_lines_and_columns() -> None:
    places, lines = pictures._layout(["ab", " c\n\n", "x" * 101, "\ny"])
    text = {(line, column): letter for _, line, column, letter in places}
    assert "".join(text[0, x] for x in range(4)) == "ab c"
    assert text[0, 4] == text[1, 0] == "⏎"
    assert text[2, 99] == "x"
    assert text[3, 0] == "x"
    assert text[4, 0] == "y"
    assert lines == 5


def test_the_score_of_a_listing_is_that_of_its_tokens(demo) -> None:
    pytest.importorskip("matplotlib", reason="an extra")
    model, tokenizer = demo
    (score,) = score_texts(model, tokenizer, ["x = 1\ny = 2\n"])
    tokens = [tokenizer.decode([id_]) for id_ in score.token_ids]
    figure = pictures.loss_picture(score, tokens, "a listing")
    letters = [text.get_text() for text in figure.axes[0].texts]
    assert "".join(letters).replace("⏎", "\n") == "x = 1\ny = 2\n"


@pytest.mark.parametrize("lines", [1, 300])
def test_the_scale_of_a_listing_has_one_size_whatever_its_length(demo, lines: int) -> None:
    pytest.importorskip("matplotlib", reason="an extra")
    _, tokenizer = demo
    ids = tokenizer.encode("x = 1\n" * lines)
    score = Score(ids, [-1.0] * len(ids), [True] * len(ids), len(ids))
    tokens = [tokenizer.decode([id_]) for id_ in ids]
    figure = pictures.loss_picture(score, tokens, "a listing")
    listing, scale = figure.axes
    width, height = figure.get_size_inches()
    assert scale.get_position().width * width == pytest.approx(0.3 * 8.8)
    assert scale.get_position().height * height == pytest.approx(0.13)
    assert listing.get_position().height * height == pytest.approx(0.17 * (lines + 1))
    assert listing.get_position().y1 < scale.get_position().y0


def test_a_rank_is_bounded_by_the_tokens_too() -> None:
    config = tiny_config(multi_query=True)
    assert heads.most_rank(config, 5) == 4
    assert heads.most_rank(config, 10_000) == config.head_dim
    model = tiny_model()
    found = heads.kv_sharing(model, [1, 2, 3, 4, 5])
    assert (found.all_key_rank <= 4 + 1e-4).all()
