"""`mqa-gpt batch`: a file of prompts in, a file of results out, whatever happens in between."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from mqa_gpt import GPT, LLM
from mqa_gpt.cli import jsonl
from mqa_gpt.cli.jsonl import read_items
from tests.cli.test_app import (
    CONTEXT,
    SHORT_CONTEXT,
    environment,
    invoke,
    refusal,
    spelling_checkpoint,
)

PROMPTS: list[dict[str, Any]] = [
    {"id": "long", "prompt": "0"},  # counts up to the limit; the others end with z, or at 9
    {"id": 7, "prompt": "uvw"},
    {"id": "7", "prompt": ""},
    {"id": "é\ud800", "prompt": "w" * 30},
    {"id": -1, "prefix": "x = ", "suffix": "\n"},
    {"id": "", "prompt": "y"},
]
RESULT: dict[str, Any] = {"prompt_hash": "", "options": {}, "completions": []}
TEXTS = ["123456789012", "xyz", "abcdefghijkl", "xyz", "mnopqrstuvwx", "z"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(spelling_checkpoint(tmp_path_factory.mktemp("batch") / "checkpoint"))


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(spelling_checkpoint(tmp_path_factory.mktemp("batch") / "short", SHORT_CONTEXT))


@pytest.fixture(scope="module")
def loaded(folder: str) -> LLM:
    return LLM.load(folder)


@pytest.fixture
def run(loaded: LLM, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line for `PROMPTS`, two at a time, into `out` of the test's folder."""
    monkeypatch.setattr(LLM, "load", lambda *args, **options: loaded)
    write_lines(tmp_path / "in", PROMPTS)
    files = [str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    return ["batch", *files, "-m", folder, "--batch-size", "2", "--max-new-tokens", "12"]


@pytest.fixture
def short_run(run: list[str], short: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The same with a model of a short context."""
    monkeypatch.undo()  # of LLM.load: this model is loaded
    return [short if part == run[run.index("-m") + 1] else part for part in run]


def write_lines(path: Path, entries: list[Any]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def with_prompt(i: int, prompt: dict[str, str]) -> list[dict[str, Any]]:
    """`PROMPTS` with another one under the id of the i-th."""
    return [PROMPTS[j] if j != i else {"id": PROMPTS[i]["id"]} | prompt for j in range(6)]


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_line_of_the_output_is_the_result_of_that_line_of_the_input(
    run: list[str], tmp_path: Path
):
    result = invoke(*run)
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.startswith(
        f"6 of 6 results in {tmp_path / 'out'}: 0 were there, 6 are new"
    )
    found = results(tmp_path / "out")
    assert [entry["id"] for entry in found] == [entry["id"] for entry in PROMPTS]
    assert [entry["completions"][0]["text"] for entry in found] == TEXTS
    assert found[0] == {
        "id": "long",
        "prompt_hash": hashlib.sha256(b'"0"').hexdigest()[:16],
        "prompt_tokens": 1,
        "options": {
            "model": run[5],
            "max_new_tokens": 12,
            "temperature": 0.0,
            "n": 1,
            "special_tokens": True,
        },
        "completions": [{"text": TEXTS[0], "finish_reason": "length", "new_tokens": 12}],
    }
    assert found[1]["completions"][0] == {"text": "xyz", "finish_reason": "stop", "new_tokens": 4}
    assert [entry["prompt_tokens"] for entry in found] == [1, 3, 1, 30, 8, 1]
    assert found[4]["prompt_hash"] == hashlib.sha256(rb'["x = ", "\n"]').hexdigest()[:16]
    assert len({entry["prompt_hash"] for entry in found}) == 6
    assert (tmp_path / "out").read_bytes().isascii()


def test_samples_of_a_prompt_are_in_its_line(run: list[str], tmp_path: Path):
    options = ["--n", "3", "--temperature", "15", "--seed", "1"]
    assert invoke(*run, *options).exit_code == 0
    for entry, found in zip(PROMPTS[:2], results(tmp_path / "out"), strict=False):
        alone = invoke("generate", entry["prompt"], "--max-new-tokens", "12", "--json", *options)
        texts = [completion["text"] for completion in json.loads(alone.stdout)["completions"]]
        assert [completion["text"] for completion in found["completions"]] == texts
        assert len(set(texts)) > 1


def test_the_next_run_completes_what_a_killed_one_left_to_the_same_file(
    run: list[str], loaded: LLM, tmp_path: Path
):
    out = tmp_path / "out"
    invoke(*run)
    whole = out.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    cuts = [0, 1, 9, ends[0] - 1, ends[0], ends[0] + 1, ends[2] - 20, ends[3], len(whole) - 1]
    for cut in [*cuts, len(whole)]:
        out.write_bytes(whole[:cut])
        before = sum(end - 1 <= cut for end in ends)  # a line without its newline is whole
        begin = mock.Mock(side_effect=loaded.begin)
        with mock.patch.object(loaded, "begin", begin):
            result = invoke(*run)
        assert out.read_bytes() == whole
        assert f"{before} were there, {6 - before} are new" in result.stderr
        # What was there is not computed again.
        calls = [len(call.args[0]) for call in begin.call_args_list]
        assert calls == [6 - before] * (before < 6)


def test_results_are_found_by_their_ids_wherever_they_are_and_new_ones_are_added_at_the_end(
    run: list[str], tmp_path: Path
):
    invoke(*run)
    whole = (tmp_path / "out").read_bytes().splitlines(keepends=True)
    (tmp_path / "out").write_bytes(whole[4] + whole[1])
    invoke(*run)
    order = [4, 1, 0, 2, 3, 5]
    assert (tmp_path / "out").read_bytes().splitlines(keepends=True) == [whole[i] for i in order]


def test_prompts_that_are_added_to_the_input_are_completed_by_the_next_run(
    run: list[str], tmp_path: Path
):
    write_lines(tmp_path / "in", PROMPTS[:2])
    invoke(*run)
    write_lines(tmp_path / "in", PROMPTS)
    invoke(*run)
    assert [entry["completions"][0]["text"] for entry in results(tmp_path / "out")] == TEXTS


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_keeps_what_is_done_and_the_next_run_continues(
    run: list[str], tmp_path: Path, as_json: bool
):
    invoke(*run)
    whole = (tmp_path / "out").read_bytes()
    (tmp_path / "out").unlink()
    forward, calls = GPT.forward, iter(range(100))

    def interrupted(self: GPT, *arguments: object, **options: object) -> torch.Tensor:
        if next(calls) == 16:
            raise KeyboardInterrupt
        return forward(self, *arguments, **options)

    with mock.patch.object(GPT, "forward", interrupted):
        result = invoke(*run, *["--json"] * as_json)
    assert result.exit_code == 130
    kept = (tmp_path / "out").read_bytes()
    done = kept.count(b"\n")
    assert 0 < done < 6
    assert whole.startswith(kept)
    assert kept.endswith(b"\n")
    if as_json:
        report = json.loads(result.stdout)
        assert (report["interrupted"], report["written"], report["prompts"]) == (True, done, 6)
    else:
        assert f"{done} of 6 results" in result.stderr
        assert result.stderr.endswith("repeat the command to continue\ninterrupted\n")
    invoke(*run)
    assert (tmp_path / "out").read_bytes() == whole


@pytest.mark.slow
def test_a_run_that_is_killed_has_written_what_was_finished(folder: str, tmp_path: Path):
    write_lines(tmp_path / "in", [{"id": i, "prompt": "y" if i < 3 else "0"} for i in range(4)])
    command = ["batch", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "-m", folder]
    process = subprocess.Popen(
        [sys.executable, "-m", "mqa_gpt", *command, "--max-new-tokens", str(CONTEXT - 1)],
        env=environment(),
    )
    while not (tmp_path / "out").exists() or (tmp_path / "out").read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [entry["completions"][0]["text"] for entry in results(tmp_path / "out")] == ["z"] * 3
    again = invoke(*command, "--max-new-tokens", "5", "--force")
    assert "3 were there, 1 are new" in again.stderr


@pytest.mark.fuzz
@pytest.mark.slow
def test_fifty_kills_lose_nothing(run: list[str], tmp_path: Path):
    lines = [PROMPTS[i % 6] | {"id": i} for i in range(200)]
    write_lines(tmp_path / "in", lines)
    invoke(*run)
    whole = (tmp_path / "out").read_bytes()
    (tmp_path / "out").unlink()
    rng = random.Random(0)
    kills, longest = 0, 0
    while kills < 50:
        process = os.fork()  # which spares the import of torch
        if process == 0:
            try:
                invoke(*run)
            finally:
                os._exit(0)
        goal = longest + rng.randrange(800)  # of bytes
        while os.waitpid(process, os.WNOHANG) == (0, 0):
            size = (tmp_path / "out").stat().st_size if (tmp_path / "out").exists() else 0
            if size >= goal:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                kills += 1
                break
        kept = (tmp_path / "out").read_bytes()
        complete = kept[: kept.rfind(b"\n") + 1]
        assert whole.startswith(complete)
        assert len(complete) >= longest
        longest = len(complete)
        if kept == whole:  # on to the next round
            (tmp_path / "out").unlink()
            longest = 0
        elif rng.random() < 0.3:  # as a kill within a write leaves it
            (tmp_path / "out").write_bytes(kept + whole[len(kept) :][: rng.randrange(100)])
    invoke(*run)
    assert (tmp_path / "out").read_bytes() == whole


def test_json_sums_up(run: list[str], tmp_path: Path):
    report = json.loads(invoke(*run, "--json").stdout)
    assert report["output"] == str(tmp_path / "out")
    assert (report["prompts"], report["found"], report["written"]) == (6, 0, 6)
    stats, entries = report["stats"], results(tmp_path / "out")
    assert stats["new_tokens"] == sum(e["completions"][0]["new_tokens"] for e in entries)
    assert stats["prompt_tokens"] == sum(e["prompt_tokens"] for e in entries)
    assert stats["tokens_per_second"] == pytest.approx(stats["new_tokens"] / stats["total_seconds"])
    again = json.loads(invoke(*run, "--json").stdout)
    assert (again["found"], again["written"], again["interrupted"]) == (6, 0, False)
    assert again["stats"]["tokens_per_second"] is None
    assert invoke(*run).stderr.endswith("6 were there, 0 are new\n")


def test_every_option_reaches_the_library(run: list[str]):
    options: dict[str, Any] = {
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "seed": 7,
        "n": 2,
        "mode": "spm",
        "batch_size": 9,
    }
    flags = [part for k, v in options.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    with mock.patch.object(LLM, "begin", side_effect=KeyboardInterrupt) as begin:
        invoke(*run, *flags, "--no-special-tokens", "--stop", r"\n", "--stop", "b")
    assert begin.call_args.args[1] == 12
    expected = options | {"special_tokens": False, "stop": ["\n", "b"]}
    assert begin.call_args.kwargs.items() >= expected.items()


def test_the_input_may_be_standard_input_with_empty_lines(run: list[str], tmp_path: Path):
    lines = "\n\n".join(map(json.dumps, PROMPTS))
    assert invoke(run[0], "-", *run[2:], stdin=lines).exit_code == 0
    assert [entry["completions"][0]["text"] for entry in results(tmp_path / "out")] == TEXTS
    assert [item.line for item in read_items(str(tmp_path / "in"))[0]] == [1, 2, 3, 4, 5, 6]


def test_the_input_may_begin_with_a_byte_order_mark(tmp_path: Path):
    (tmp_path / "in").write_text('{"id": 1, "prompt": "a"}\n', encoding="utf-8-sig")
    assert [item.prompt for item in read_items(str(tmp_path / "in"))[0]] == ["a"]


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2 of {} is not JSON: Expecting"),
        ("[" * 100_000, "line 2 of {} is not JSON"),
        ('{"id": ' + "9" * 5000 + "}", "line 2 of {} is not JSON"),
        ('"def f(x):"', "line 2 of {} is 'def f(x):': it must be a JSON object"),
        ('{"prompt": "a"}', "line 2 of {} has no id"),
        ('{"id": null, "prompt": "a"}', "line 2 of {} has the id None: it must be a text"),
        ('{"id": true, "prompt": "a"}', "line 2 of {} has the id True"),
        ('{"id": 1.0, "prompt": "a"}', "line 2 of {} has the id 1.0"),
        ('{"id": "a", "prompt": "a"}', "line 2 of {} has the id 'a' of line 1"),
        ('{"id": 1}', "line 2 of {} holds nothing to complete"),
        ('{"id": 1, "prefix": "a"}', "line 2 of {} holds prefix: it must"),
        ('{"id": 1, "prompt": "a", "prefix": "b"}', "line 2 of {} holds prompt and prefix"),
        ('{"task_id": 1.5, "prompt": "a"}', "line 2 of {} has the task_id 1.5: it must be"),
        ('{"id": 1, "prompt": "a", "n": 2}', "line 2 of {} sets n, which only --n can set"),
        ('{"id": 1, "prompt": "a", "temperature": -1}', "line 2 (id 1): temperature is -1"),
        ('{"id": 1, "prompt": "a", "temperature": "1"}', "line 2 (id 1): temperature is '1'"),
        ('{"id": 1, "prompt": "a", "max_new_tokens": -1}', "line 2 (id 1): --max-new-tokens is -1"),
        ('{"id": 1, "prompt": "a", "stop": 5}', "line 2 (id 1): stop is 5"),
        ('{"id": 1, "prompt": "a", "stop": ["a", ""]}', "line 2 (id 1): stop is ['a', '']"),
        ('{"id": 1, "prompt": "a", "ignore_eos": 1}', "line 2 (id 1): --ignore-eos is 1"),
        ('{"id": 1, "prompt": 5}', "line 2 of {} has the prompt 5: it must be a text"),
        ('{"id": 1, "prefix": "a", "suffix": 3}', "line 2 of {} has the suffix 3: it must be a"),
        ('{"id": 1, "prompt": "a", "prompt": "b"}', "line 2 of {} has the key 'prompt' more than"),
        ('{"id": 1, "id": 2, "prompt": "a"}', "line 2 of {} has the key 'id' more than once"),
        ('{"id": 1, "prompt": "a", "x": [{"y": 1, "y": 2}]}', "line 2 of {} has the key 'y' more"),
        ('{"id": 1, "prompt": "\\ud800"}', "line 2 (id 1): text holds a lone surrogate"),
        ('{"id": 1, "prompt": ["a", "b"]}', "line 2 of {} has the prompt ['a', 'b']: it must"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(run: list[str], tmp_path: Path, line: str, says: str):
    (tmp_path / "in").write_text('{"id": "a", "prompt": "b"}\n' + line)
    assert refusal(*run).startswith(says.format(repr(str(tmp_path / "in"))))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("as_json", [False, True])
def test_prompts_that_are_too_long_are_left_out_and_named(
    short_run: list[str], tmp_path: Path, as_json: bool
):
    long = "a" * (SHORT_CONTEXT - 11)
    lines = [PROMPTS[0], *({"id": i, "prompt": long} for i in range(20, 32)), PROMPTS[1]]
    lines += [{"id": "fits", "prompt": long[1:]}, {"id": "hole", "prefix": "", "suffix": long[3:]}]
    write_lines(tmp_path / "in", lines)
    result = invoke(*short_run, *["--json"] * as_json)
    assert result.exit_code == 2
    assert [entry["id"] for entry in results(tmp_path / "out")] == ["long", 7, "fits"]
    why = "leave no room for 12 new ones in the context of 500"
    told = result.stderr.splitlines()
    assert f"left out: line 2 (id 20): 489 tokens {why}" in told
    assert sum(line.startswith("left out: ") for line in told) == 10
    assert told[-1] == "13 in all; --truncate cuts prompts that are too long"
    if as_json:
        report = json.loads(result.stdout)
        assert (report["prompts"], report["written"], len(report["left_out"])) == (16, 3, 13)
        assert report["left_out"]["line 16 (id 'hole')"] == f"489 tokens {why}"
    else:
        assert any(line.startswith("3 of 16 results") for line in told)


def test_a_model_is_not_loaded_where_every_prompt_is_too_long(
    short_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(LLM, "load", mock.Mock(side_effect=AssertionError))
    write_lines(tmp_path / "in", [{"id": 1, "prompt": "a" * SHORT_CONTEXT}])
    result = invoke(*short_run)
    assert result.exit_code == 2
    assert "left out: line 1 (id 1): 500 tokens" in result.stderr


def test_lines_of_benchmarks_are_taken_and_keys_without_effect_are_named(
    run: list[str], tmp_path: Path
):
    human_eval = {"entry_point": "f", "canonical_solution": "", "test": "", "\x1b[1m": 1}
    lines = [
        {"task_id": "HumanEval/0", "prompt": "uvw", **human_eval},
        {"task_id": "SingleLineInfilling/1", "prompt": "x = ", "suffix": "\n", "entry_point": ""},
        {"id": 3, "task_id": "the id is first", "prompt": "y"},
    ]
    write_lines(tmp_path / "in", lines)
    result = invoke(*run)
    assert result.stderr.splitlines()[0] == (
        r"note: keys without effect: '\x1b[1m', 'canonical_solution', 'entry_point', 'test'"
    )
    found = results(tmp_path / "out")
    assert [entry["id"] for entry in found] == ["HumanEval/0", "SingleLineInfilling/1", 3]
    assert [e["completions"][0]["text"] for e in found] == ["xyz", "mnopqrstuvwx", "z"]


def test_options_of_a_line_reach_the_library_and_stand_in_its_result(
    run: list[str], loaded: LLM, tmp_path: Path
):
    own: dict[str, Any] = {
        "max_new_tokens": 3,
        "min_new_tokens": 1,
        "ignore_eos": True,
        "stop": ["b"],
        "temperature": 0.5,
        "top_k": 2,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "seed": 7,
    }
    lines = [{"id": 1, "prompt": "a"} | own, {"id": 2, "prompt": "b", "seed": None}]
    write_lines(tmp_path / "in", lines)
    with mock.patch.object(LLM, "begin", side_effect=KeyboardInterrupt) as begin:
        invoke(*run, "--truncate")
    assert begin.call_args.kwargs["per_prompt"] == [own, {}]
    assert begin.call_args.kwargs["truncate"] is True


def test_a_line_may_have_options_of_its_own(run: list[str], tmp_path: Path):
    lines = [PROMPTS[0], PROMPTS[0] | {"id": 1, "max_new_tokens": 3}, {"id": 2, "prompt": "y"}]
    lines += [PROMPTS[0] | {"id": 3, "stop": "4"}, PROMPTS[2] | {"id": 4, "ignore_eos": True}]
    write_lines(tmp_path / "in", lines)
    assert invoke(*run).exit_code == 0
    found = results(tmp_path / "out")
    assert [e["completions"][0]["text"] for e in found][:4] == [TEXTS[0], "123", "z", "123"]
    assert [e["options"]["max_new_tokens"] for e in found] == [12, 3, 12, 12, 12]
    assert found[3]["options"]["stop"] == "4"
    assert invoke(*run).exit_code == 0  # nothing differs


@pytest.mark.slow
def test_a_prompt_that_is_too_long_is_cut_when_asked_and_a_later_run_completes_it(
    short_run: list[str], tmp_path: Path
):
    write_lines(tmp_path / "in", [PROMPTS[1], {"id": "long", "prompt": "0" + "w" * SHORT_CONTEXT}])
    assert invoke(*short_run).exit_code == 2
    assert invoke(*short_run, "--truncate").exit_code == 0
    found = results(tmp_path / "out")
    assert found[1]["completions"][0]["text"] == "xyz"
    assert found[1]["prompt_tokens"] == SHORT_CONTEXT - 12
    assert [entry.get("truncated") for entry in found] == [None, True]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("print('important')\n", "line 1 of {} is not JSON"),
        ("important", "line 1 of {} is not JSON"),
        ('{"id": "long", "prompt": "0"}\n', "line 1 of {} is not a result of this command"),
        ('{"id": "long", "prompt": "0"}', "line 1 of {} is not a result of this command"),
        ('{"id": 7}', "line 1 of {} is not a result of this command"),
        ('{"id": 7, "completions": []}', "line 1 of {} is not a result of this command"),
        (json.dumps(RESULT | {"id": 7, "options": 1}), "line 1 of {} is not a result of this"),
        (
            json.dumps({"id": "b"} | RESULT),
            "line 1 of {} has the id 'b', which the input does",
        ),
        (
            json.dumps({"id": "b"} | RESULT) + "\n",
            "line 1 of {} has the id 'b', which the input does",
        ),
        (
            (json.dumps({"id": 7} | RESULT) + "\n") * 2,
            "line 2 of {} has the id 7 of line 1",
        ),
        (
            json.dumps({"id": 7} | RESULT) + "\n\n",
            "line 2 of {} is not JSON",
        ),
        (
            '{"id": 7, "comple\n' + json.dumps({"id": "7"} | RESULT) + "\n",
            "line 1 of {} is not JSON",
        ),
        ("\xff\xfe\n", "line 1 of {} is not JSON"),
    ],
)
def test_an_output_that_holds_something_else_is_refused_and_left_alone(
    run: list[str], tmp_path: Path, text: str, says: str
):
    (tmp_path / "out").write_text(text, encoding="latin-1")
    message = refusal(*run)
    assert message.startswith(says.format(f"the output {str(tmp_path / 'out')!r}"))
    assert (tmp_path / "out").read_text(encoding="latin-1") == text


def test_the_input_is_not_taken_for_the_output(run: list[str], tmp_path: Path):
    # As lines that are results and prompts at once, nothing else would tell them apart.
    write_lines(tmp_path / "in", [RESULT | {"id": 1, "prompt": "a"}])
    (tmp_path / "link").symlink_to(tmp_path / "in")
    before = (tmp_path / "in").read_bytes()
    for output in (run[1], str(tmp_path / "link")):
        assert "is the input too" in refusal(*run, "--output", output)
        assert (tmp_path / "in").read_bytes() == before


def test_a_second_run_on_the_same_output_is_refused_while_the_first_goes_on(
    run: list[str], loaded: LLM, tmp_path: Path
):
    refusals = []

    def begin(*arguments: Any, **options: Any) -> Any:
        size = (tmp_path / "out").stat().st_size
        refusals.append(refusal(*run))
        assert (tmp_path / "out").stat().st_size == size  # nothing of the first run's was removed
        return LLM.begin(loaded, *arguments, **options)

    with mock.patch.object(loaded, "begin", begin):
        assert invoke(*run).exit_code == 0
    assert len(refusals) == 1
    assert refusals[0].startswith(f"another run is writing the output {str(tmp_path / 'out')!r}")
    assert [entry["completions"][0]["text"] for entry in results(tmp_path / "out")] == TEXTS
    assert "6 were there" in invoke(*run).stderr


def test_batch_works_where_files_cannot_be_locked(
    run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mqa_gpt.cli.jsonl.fcntl", None)
    assert invoke(*run).exit_code == 0
    assert len(results(tmp_path / "out")) == 6


def test_an_output_that_its_last_user_removes_before_it_is_locked_gets_no_results(
    run: list[str], tmp_path: Path
):
    lock = jsonl.fcntl.flock

    def remove_and_lock(*arguments: Any) -> None:
        (tmp_path / "out").unlink()
        lock(*arguments)

    with mock.patch.object(jsonl.fcntl, "flock", remove_and_lock):
        assert refusal(*run).startswith("another run is writing the output")
    assert invoke(*run).exit_code == 0
    assert len(results(tmp_path / "out")) == 6


def test_a_model_is_not_loaded_for_what_is_done_or_cannot_be_written(
    run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    invoke(*run)
    monkeypatch.setattr(LLM, "load", mock.Mock(side_effect=AssertionError))
    assert "6 were there, 0 are new" in invoke(*run).stderr
    open_file = Path.open

    def denied(path: Path, mode: str = "r", **options: Any) -> Any:
        if mode == "ab+":
            raise PermissionError(errno.EACCES, "Permission denied")
        return open_file(path, mode, **options)

    for output in ("out", "new"):
        with mock.patch.object(Path, "open", denied):
            message = refusal(*run, "--output", str(tmp_path / output))
        assert message == f"cannot write the output {str(tmp_path / output)!r}: Permission denied"
    assert not (tmp_path / "new").exists()


def test_a_refused_run_leaves_no_file_where_none_was_and_the_one_that_was(
    run: list[str], tmp_path: Path
):
    for existed in (False, True):
        refusal(*run, "--batch-size", "0")
        assert (tmp_path / "out").exists() == existed
        (tmp_path / "out").touch()


@pytest.mark.parametrize("all_done", [True, False])
def test_results_of_another_prompt_or_of_other_options_are_refused_before_the_model_is_loaded(
    run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, all_done: bool
):
    invoke(*run)
    whole = (tmp_path / "out").read_bytes()
    if not all_done:
        (tmp_path / "out").write_bytes(whole[: whole.rindex(b'{"id"') + 12])
    before = (tmp_path / "out").read_bytes()
    monkeypatch.setattr(LLM, "load", mock.Mock(side_effect=AssertionError))
    where = f"line {{}} of the output {str(tmp_path / 'out')!r} (id {{}}) "
    for flags, was, is_now in (
        (["--temperature", "1"], "temperature=0.0", "1.0"),
        (["--n", "2", "--temperature", "1"], "n=1", "2"),
        (["--max-new-tokens", "13"], "--max-new-tokens=12", "13"),
        (["--stop", "x"], "stop=None", "['x']"),
        (["--dtype", "bf16"], "dtype=None", "'bfloat16'"),
        (["--seed", "1"], "seed=None", "1"),
        (["--quantize", "int8"], "quantize=None", "'int8'"),
        (["--no-special-tokens"], "special_tokens=True", "False"),
    ):
        message = refusal(*run, *flags)
        assert message.startswith(where.format(1, "'long'") + f"was written with {was} and this ")
        assert f"this run has {is_now}: continue with the same options, add --force" in message
    assert "(id -1) was written with --mode='psm'" in refusal(*run, "--mode", "spm").replace(
        " mode=", " --mode="
    )
    for i, prompt in (
        (1, {"prompt": "xyz"}),  # of as many tokens
        (1, {"prompt": "uvwx"}),
        (4, {"prefix": "x ", "suffix": "=\n"}),
    ):
        write_lines(tmp_path / "in", with_prompt(i, prompt))
        old = json.loads(before.splitlines()[i])["prompt_hash"]
        (item,) = (item for item in read_items(run[1])[0] if item.id == PROMPTS[i]["id"])
        assert refusal(*run).startswith(
            where.format(i + 1, PROMPTS[i]["id"])
            + f"has the prompt_hash {old!r} where that of the input's prompt is "
            f"{item.prompt_hash!r}: continue with the same input"
        )
        assert "prompt_hash" in refusal(*run, "--force")
    assert (tmp_path / "out").read_bytes() == before


def test_other_options_are_mixed_only_when_forced_and_each_line_says_its_own(
    run: list[str], tmp_path: Path
):
    invoke(*run)
    whole = (tmp_path / "out").read_bytes().splitlines(keepends=True)
    (tmp_path / "out").write_bytes(b"".join(whole[:4]))
    assert "continue with the same options" in refusal(*run, "--max-new-tokens", "3")
    assert "4 were there, 2 are new" in invoke(*run, "--max-new-tokens", "3", "--force").stderr
    found = results(tmp_path / "out")
    assert [entry["options"]["max_new_tokens"] for entry in found] == [12] * 4 + [3] * 2
    assert "(id -1) was written with --max-new-tokens=3 and this run has 12" in refusal(*run)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--temperature", "-1"], "--temperature is -1"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--device", "toaster"], "toaster"),
        (["--dtype", "float12"], "float12"),
        (["--backend", "fast"], "reference"),
        (["--quantize", "int4"], "int4"),
        (["--cache-dtype", "int4"], "int4"),
        (["--mode", "bogus"], "--mode is 'bogus'"),
        (["--n", "0"], "--n is 0"),
        (["--top-k", "-5", "--temperature", "1"], "--top-k is -5"),
    ],
)
def test_options_are_checked_even_if_nothing_is_left_to_do(
    run: list[str], tmp_path: Path, flags: list[str], says: str
):
    invoke(*run)
    for force in ([], ["--force"]):
        assert says in refusal(*run, *flags, *force)


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("-", "the output is -: name a file"),
        ("", "cannot write the output: the file name is empty"),
        (".", "is not a file"),
        (os.devnull, "is not a file"),
        ("no/such/folder/out", "is in a folder that does not exist"),
        ("a\0b", "null"),
        ("\ud800", "surrogate"),
        ("x" * 5000, "name too long"),
    ],
)
def test_an_output_that_cannot_be_a_file_is_refused(run: list[str], output: str, says: str):
    assert says in refusal(*run, "--output", output)


def test_a_full_disk_is_an_error_of_one_line_that_names_the_output(run: list[str], tmp_path: Path):
    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch("mqa_gpt.cli.batch.result_line", side_effect=full):
        assert refusal(*run) == f"cannot write {tmp_path / 'out'}: No space left on device"


# The limit comes after the imports: some of what may be installed writes files then.
LIMITED = """
import resource, sys
import torch
import mqa_gpt.cli.app
from mqa_gpt.__main__ import main
size = 512 * int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [0, 1])  # of 512 bytes
def test_a_disk_that_is_full_keeps_whole_results_and_no_empty_file(
    folder: str, tmp_path: Path, blocks: int
):
    write_lines(tmp_path / "in", [{"id": i, "prompt": "w"} for i in range(20)])
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, str(blocks), "batch", "in", "-o", "out", "-m", folder],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr == "error: cannot write out: File too large\n"
    if blocks == 0:
        assert not (tmp_path / "out").exists()
    else:
        *whole, _ = (tmp_path / "out").read_text().split("\n")
        assert whole
        assert [json.loads(line)["id"] for line in whole] == list(range(len(whole)))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--n", "2"], "--n is 2 but temperature is 0"),
        (["--mode", "pms"], "--mode is 'pms': expected one of psm, spm"),
        (["--stop", ""], "--stop is ''"),
    ],
)
def test_an_option_out_of_range_is_bad_input(run: list[str], flags: list[str], says: str):
    assert says in refusal(*run, *flags)


def test_an_unknown_mode_is_bad_input_even_without_a_hole(run: list[str], tmp_path: Path):
    write_lines(tmp_path / "in", PROMPTS[:2])
    assert "--mode is 'bogus'" in refusal(*run, "--mode", "bogus")


def test_the_help_and_the_guide_list_the_options_of_a_line():
    guide = Path(__file__).parents[2] / "docs/cli.md"
    for text in (invoke("batch", "--help").stdout, guide.read_text()):
        (listed,) = re.findall(r"line alone:(.*?)\. Other keys", " ".join(text.split()))
        assert sorted(re.findall(r"\w+", listed)) == sorted(jsonl.LINE_OPTIONS)


def test_a_missing_input_is_bad_input(run: list[str]):
    assert "no-such-file" in refusal(run[0], "no-such-file", *run[2:])
    assert refusal(run[0], "", *run[2:]) == "cannot read '': the file name is empty"


@pytest.mark.slow
def test_a_terminal_sees_a_progress_bar_with_the_speed(folder: str, tmp_path: Path):
    write_lines(tmp_path / "in", PROMPTS)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    command = ["batch", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "-m", folder]
    process = subprocess.Popen(
        [sys.executable, "-m", "mqa_gpt", *command, "--max-new-tokens", "5"],
        env=environment() | {"TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 1000):
            shown += piece
    except OSError:  # how Linux reports that the other side is closed
        pass
    os.close(ours)
    assert process.wait(timeout=60) == 0
    assert process.stdout is not None
    assert process.stdout.read() == b""
    assert b"6/6" in shown
    assert shown.count(b"tok/s") > 1
