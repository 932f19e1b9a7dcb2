"""verify's report: its verdicts, its JSON and its table."""

from __future__ import annotations

import json
import math

import pytest

from mqa_gpt.verify.report import Divergence, PromptReport, VerifyReport, format_report

NAN = float("nan")
DIVERGENCE = Divergence(
    position=3, ours=7, reference=8, ours_text=" a", reference_text="\n", margin=0.25
)


def prompt(**changes: object) -> PromptReport:
    values = {
        "name": "def f():",
        "prompt_tokens": 4,
        "new_tokens": 10,
        "equal_tokens": 10,
        "divergence": None,
        "absolute_error": [1e-6, 3e-6, 2e-6],
        "relative_error": [4e-7, 1e-7, 2e-7],
    }
    return PromptReport(**values | changes)


def report(*prompts: PromptReport, **changes: object) -> VerifyReport:
    values = {
        "model": "someone/model",
        "dtype": "float32",
        "device": "cpu",
        "backend": "sdpa",
        "asked_backend": "auto",
        "quantize": None,
        "cache_dtype": None,
        "reference": "transformers 5, eager; it read the checkpoint itself",
        "rule": "the rule in words",
        "logits_error": 1e-6,
        "logits_limit": 2e-5,
        "loss": 1.5,
        "reference_loss": 1.25,
        "tokens_must_be_equal": True,
        "prompts": list(prompts) or [prompt()],
    }
    return VerifyReport(**values | changes)


DIFFERENT = prompt(name="second", equal_tokens=3, divergence=DIVERGENCE)


@pytest.mark.parametrize(
    ("error", "passes"), [(0.0, True), (2e-5, True), (2.1e-5, False), (NAN, False), (1e9, False)]
)
def test_the_logits_pass_up_to_their_limit(error: float, passes: bool):
    found = report(logits_error=error)
    assert found.logits_passed is passes
    assert found.passed is passes


def test_a_limit_that_is_not_a_number_passes_nothing():
    assert not report(logits_limit=NAN).passed


def test_one_different_token_fails_all_prompts_where_tokens_must_be_equal():
    found = report(prompt(), DIFFERENT, prompt())
    assert found.logits_passed
    assert not found.tokens_passed
    assert not found.passed


def test_different_tokens_pass_where_they_need_not_be_equal():
    assert report(DIFFERENT, dtype="bfloat16", tokens_must_be_equal=False).passed


def test_the_json_holds_every_field_and_the_verdict():
    found = report(prompt(), DIFFERENT)
    parsed = json.loads(json.dumps(found.to_dict()))
    assert parsed.pop("passed") is False
    prompts = [
        PromptReport(**p | {"divergence": p["divergence"] and Divergence(**p["divergence"])})
        for p in parsed.pop("prompts")
    ]
    assert VerifyReport(**parsed, prompts=prompts) == found


def test_the_table_has_a_line_per_prompt_and_a_verdict_for_logits_and_tokens():
    assert format_report(report()).splitlines() == [
        "someone/model in float32 on cpu, backend auto (sdpa)",
        "against transformers 5, eager; it read the checkpoint itself",
        "",
        "tokens  max error  by position  equal new tokens  prompt",
        "     4   3.00e-06     4.00e-07          10 of 10  def f():",
        "by position: the error over the largest logit of the same position, at most",
        "",
        "logits  pass  1.00e-06, limit 2.00e-05: the rule in words",
        "loss    info  1.5000 nats per token of the prompts, 1.2500 in transformers",
        "tokens  pass  10 of 10 greedy tokens equal",
    ]


def test_the_table_says_where_tokens_part_and_how_clear_the_choice_was():
    lines = format_report(report(prompt(), DIFFERENT)).splitlines()
    assert (
        "second: new token 3 is 7 ' a' here and 8 '\\n' in transformers, whose two largest logits "
        "differ by 2.50e-01 there"
    ) in lines
    assert lines[-1] == "tokens  FAIL  13 of 20 greedy tokens equal"


def test_without_a_tokenizer_the_table_names_the_ids_alone():
    bare = Divergence(3, 7, 8, None, None, 0.25)
    text = format_report(report(prompt(divergence=bare)))
    assert "new token 3 is 7 here and 8 in transformers" in text


def test_tokens_that_need_not_be_equal_are_information():
    text = format_report(report(DIFFERENT, dtype="bfloat16", tokens_must_be_equal=False))
    assert text.endswith(
        "tokens  info  3 of 10 greedy tokens equal, which bfloat16 does not promise"
    )


def test_an_approximation_is_reported_without_a_limit_and_fails_only_with_nan():
    changes = {"quantize": "int8", "logits_limit": None, "tokens_must_be_equal": False}
    found = report(DIFFERENT, logits_error=0.02, **changes)
    assert found.passed
    text = format_report(found)
    assert "weights in int8" in text
    assert "logits  info  2.00e-02: the rule in words" in text
    assert text.endswith("greedy tokens equal, which int8 does not promise")
    broken = report(logits_error=NAN, **changes)
    assert not broken.passed
    assert "logits  FAIL  nan: the rule in words" in format_report(broken)


def test_the_losses_of_both_are_shown_where_there_are_any():
    assert "1.5000 nats per token of the prompts, 1.2500 in transformers" in format_report(report())
    assert "nats" not in format_report(report(loss=None, reference_loss=None))


def test_logits_beyond_the_limit_are_said_to_fail():
    assert "logits  FAIL  nan, limit 2.00e-05" in format_report(report(logits_error=NAN))


@pytest.mark.parametrize("at", range(3))
def test_an_error_that_is_not_a_number_is_shown_wherever_it_stands(at: int):
    errors = [1e-6, 2e-6, 3e-6]
    errors[at] = NAN
    found = report(prompt(absolute_error=errors, relative_error=errors))
    row = format_report(found).splitlines()[4]
    assert row.split()[1:3] == ["nan", "nan"]
    assert math.isnan(found.to_dict()["prompts"][0]["absolute_error"][at])


def test_a_prompt_takes_one_line_of_the_table_and_no_control_character():
    name = 'a\n\x1b[2J\t"' + "long" * 20
    row = format_report(report(prompt(name=name))).splitlines()[4]
    assert row.isprintable()
    shown = row.split("10 of 10  ")[1]
    assert shown.startswith("a\\n\\x1b[2J\\t")
    assert shown.endswith("...")
    assert len(shown) == 32


def test_in_60_columns_every_number_is_whole_and_in_the_first_line_of_its_row():
    row = format_report(report(prompt(name="long" * 20))).splitlines()[4]
    numbers, _, _ = row.partition("long")
    assert len(numbers) < 55
