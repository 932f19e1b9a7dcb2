"""The command line, as people and scripts see it: output, messages, exit statuses.

Most tests call the application in this process; those about signals, pipes, terminals and imports
start the real one.
"""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from mqa_gpt import GPT, LLM, GPTConfig, Tokenizer
from mqa_gpt.__main__ import main as start_command
from mqa_gpt.bench import ceilings
from mqa_gpt.checkpoints.load import DEMO_DIR
from mqa_gpt.cli import output
from mqa_gpt.cli.app import app, with_flags
from mqa_gpt.cli.output import visible
from mqa_gpt.machine import threads_for
from mqa_gpt.verify.report import PromptReport, VerifyReport
from tests.helpers import SPECIALS, byte_tokenizer

CONTEXT = 20_000  # long enough that Ctrl-C comes in time on a busy machine
SHORT_CONTEXT = 500  # for what reads or fills all of it


def spelling_checkpoint(folder: Path, context: int = CONTEXT) -> Path:
    """A model that knows what follows each byte, whatever was before: a to b to ... z to the end,
    0 to 1 to ... 9 to 0, é to €; the end of text to a, and what opens an infilling's middle to m.
    """
    tokenizer = byte_tokenizer(*SPECIALS)
    size = tokenizer.get_vocab_size()
    config = GPTConfig(
        vocab_size=size,
        n_positions=context,
        n_embd=size,
        n_inner=1,
        n_layer=1,
        n_head=1,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT(config)
    torch.nn.init.zeros_(model.transformer.wpe.weight)
    for name, parameter in model.named_parameters():
        if ".h." in name and ".ln_" not in name:
            torch.nn.init.zeros_(parameter)
    torch.nn.init.eye_(model.transformer.wte.weight)
    torch.nn.init.zeros_(model.lm_head.weight)
    chains = ["<|endoftext|>abcdefghijklmnopqrstuvwxyz<|endoftext|>", "01234567890", "é€"]
    for chain in [*chains, "<fim_middle>m"]:
        tokens = tokenizer.encode(chain).ids
        model.lm_head.weight.data[tokens[1:], tokens[:-1]] = 3.0
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = spelling_checkpoint(tmp_path_factory.mktemp("cli") / "checkpoint")
    LLM.load(path).generate("a", 2)  # compiles, once: the commands that are tested do not say so
    return str(path)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(spelling_checkpoint(tmp_path_factory.mktemp("cli") / "short", SHORT_CONTEXT))


def invoke(*arguments: str, stdin: str | bytes | None = None) -> Result:
    """Run the application in this process; an exception it should have handled fails the test."""
    result = CliRunner().invoke(app, arguments, stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refusal(*arguments: str, stdin: str | bytes | None = None) -> str:
    """The one line that bad input gets."""
    result = invoke(*arguments, stdin=stdin)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("error: ").strip()


def environment() -> dict[str, str]:
    root = Path(__file__).parents[2]
    path = os.pathsep.join((str(root), str(root / "kernels")))
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


# ------------------------------------------------------------------------------------- generate


def test_a_completion_in_a_pipe_is_the_completion_and_nothing_else(folder: str):
    result = invoke("generate", "-m", folder, "uvw")
    assert (result.stdout, result.stderr, result.exit_code) == ("xyz", "", 0)


def test_echo_prints_the_prompt_too(folder: str):
    assert invoke("generate", "-m", folder, "--echo", "uvw").stdout == "uvwxyz"


def test_prompts_come_from_arguments_files_and_standard_input(folder: str, tmp_path: Path):
    (tmp_path / "prompt").write_bytes(b"\xef\xbb\xbfline\r\nuvw")  # a byte order mark is not text
    run = ["generate", "-m", folder, "--echo"]
    assert invoke(*run, "-f", str(tmp_path / "prompt")).stdout_bytes == b"line\r\nuvwxyz"
    assert invoke(*run, "-", stdin="vw").stdout == "vwxyz"
    assert invoke(*run, "--file", "-", stdin="vw").stdout == "vwxyz"
    assert invoke(*run, stdin="vw").stdout == "vwxyz"


def test_several_completions_stand_under_headings_with_the_names_of_files(
    folder: str, tmp_path: Path
):
    (tmp_path / "a.py").write_text("y\n0")
    result = invoke(
        *("generate", "-m", folder, "uvw", "-f", str(tmp_path / "a.py"), "--max-new-tokens", "3")
    )
    assert result.stdout == f"==> prompt 0 <==\nxyz\n\n==> {tmp_path / 'a.py'} <==\n123\n\n"


def test_samples_are_headed_by_prompt_and_sample(folder: str):
    result = invoke(
        *("generate", "-m", folder, "w", "--n", "2", "--temperature", "0.01", "--seed", "1")
    )
    assert result.stdout == (
        "==> prompt 0, sample 0 <==\nxyz\n\n==> prompt 0, sample 1 <==\nxyz\n\n"
    )


def test_prompts_completed_together_give_the_same_text_as_alone(folder: str):
    run = ["generate", "-m", folder, "--json", "--max-new-tokens", "9"]
    together = json.loads(invoke(*run, "abc", "0", "").stdout)["completions"]
    for i, prompt in enumerate(["abc", "0", ""]):
        (alone,) = json.loads(invoke(*run, prompt).stdout)["completions"]
        assert alone | {"prompt": i} == together[i]


def test_json_holds_everything_about_a_completion(folder: str):
    result = invoke("generate", "-m", folder, "tuvw", "--json", "--logprobs", "2")
    report = json.loads(result.stdout)
    (completion,) = report["completions"]
    assert report["model"] == folder
    assert completion["text"] == "xyz"
    assert completion["finish_reason"] == "stop"
    assert completion["prompt_tokens"] == 4
    assert len(completion["token_ids"]) == 4  # the end token too
    assert completion["logprobs"] == pytest.approx([0.0] * 4, abs=1e-3)
    assert [len(top) for top in completion["top_logprobs"]] == [2] * 4
    stats = report["stats"]
    assert (stats["prompt_tokens"], stats["new_tokens"]) == (4, 4)
    assert all(stats[key] > 0 for key in ("load_seconds", "decode_tokens_per_second"))
    assert result.stderr == ""


def test_statistics_and_log_probabilities_go_to_standard_error(folder: str):
    result = invoke("generate", "-m", folder, "uvw", "--stats", "--logprobs", "1")
    assert result.stdout == "xyz"
    assert "'y'" in result.stderr
    line = result.stderr.splitlines()[-1]
    assert all(word in line for word in ("load", "prefill", "first token", "decode", "peak memory"))


def test_there_is_no_decode_rate_without_decoding(folder: str):
    run = ["generate", "-m", folder, "a", "--max-new-tokens", "1"]
    assert json.loads(invoke(*run, "--json").stdout)["stats"]["decode_tokens_per_second"] is None
    assert "decode" not in invoke(*run, "--stats").stderr


def test_there_is_no_rate_without_tokens(folder: str):
    run = ["generate", "-m", folder, "a", "--max-new-tokens", "0"]
    stats = json.loads(invoke(*run, "--json").stdout)["stats"]
    for key in ("prefill_tokens_per_second", "decode_tokens_per_second", "first_token_seconds"):
        assert stats[key] is None
    told = invoke(*run, "--stats").stderr
    assert [part.split()[0] for part in told.split(" | ")] == ["load", "peak"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "redirection", "start"),
    [("--stats", "2>&1", "load"), ("--logprobs 1", "> both 2>&1; cat both", "token")],
)
def test_a_report_in_the_same_file_begins_on_a_line_of_its_own(
    folder: str, tmp_path: Path, flags: str, redirection: str, start: str
):
    redirection = redirection.replace("both", str(tmp_path / "both"))
    shown = shell(f"generate -m {folder} uvw {flags} {redirection}").stdout
    first, second, *_ = shown.splitlines()
    assert first == "xyz"
    assert second.strip().startswith(start)


@pytest.mark.slow
def test_a_report_in_another_file_begins_with_its_first_line(folder: str):
    apart = shell(f"generate -m {folder} uvw --stats")
    assert apart.stdout == "xyz"
    assert apart.stderr.startswith("load")


@pytest.mark.parametrize(
    ("stop", "text"),
    [("gh", "def"), (r"\n", "defghijklmnopqrstuvwxyz"), ("x", "defghijklmnopqrstuvw")],
)
def test_a_stop_string_ends_the_completion_across_tokens(folder: str, stop: str, text: str):
    assert invoke("generate", "-m", folder, "abc", "--stop", stop).stdout == text


def test_a_note_says_that_a_completion_is_empty(folder: str):
    result = invoke("generate", "-m", folder, "abc", "--stop", "d")
    assert result.stdout == ""
    said = "note: the completion is empty: it ended before any text\n"
    assert result.stderr == said
    assert said not in invoke("generate", "-m", folder, "abc", "--stop", "e").stderr


def test_stop_strings_may_be_several_and_escaped(folder: str):
    with mock.patch.object(LLM, "begin", side_effect=KeyboardInterrupt) as begin:
        invoke("generate", "-m", folder, "a", "--stop", r"\n\tx", "--stop", r"a\\nb\d")
    assert begin.call_args.kwargs["stop"] == ["\n\tx", r"a\nb\d"]


def test_every_option_reaches_the_library(folder: str):
    options = {
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "seed": 7,
        "n": 2,
        "logprobs": 1,
    }
    flags = [part for k, v in options.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    for command in (["generate", "a"], ["infill", "--prefix", "a"]):
        begin = "begin" if command[0] == "generate" else "begin_infill"
        with mock.patch.object(LLM, begin, side_effect=KeyboardInterrupt) as called:
            invoke(*command, "-m", folder, "--max-new-tokens", "5", *flags)
        assert called.call_args.args[-1] == 5
        assert called.call_args.kwargs.items() >= options.items()


def test_length_options_reach_the_library(folder: str):
    flags = ["--max-new-tokens", "fit", "--min-new-tokens", "3", "--ignore-eos", "--truncate"]
    for command in (
        ["generate", "a"],
        ["infill", "--prefix", "a", "--filename", "a.py", "--repository", "b/c"],
    ):
        begin = "begin" if command[0] == "generate" else "begin_infill"
        with mock.patch.object(LLM, begin, side_effect=KeyboardInterrupt) as called:
            invoke(*command, "-m", folder, *flags)
        expected: dict[str, object] = {"min_new_tokens": 3, "ignore_eos": True, "truncate": True}
        if command[0] == "infill":
            expected |= {"file_name": "a.py", "repo_name": "b/c"}
        assert called.call_args.args[-1] is None
        assert called.call_args.kwargs.items() >= expected.items()


@pytest.mark.slow
def test_a_completion_may_fill_the_context_go_past_its_end_and_be_cut_to_it(short: str):
    run = ["generate", "-m", short, "--json"]
    (filled,) = json.loads(invoke(*run, "0", "--max-new-tokens", "fit").stdout)["completions"]
    assert len(filled["token_ids"]) == SHORT_CONTEXT - 1
    (longer,) = json.loads(invoke(*run, "y", "--min-new-tokens", "3").stdout)["completions"]
    assert len(longer["token_ids"]) >= 3
    (past,) = json.loads(invoke(*run, "y", "--ignore-eos").stdout)["completions"]
    assert (past["finish_reason"], len(past["token_ids"])) == ("length", 64)
    result = invoke(*run[:-1], "-", "--truncate", stdin="0" + "a" * SHORT_CONTEXT)
    assert (result.exit_code, result.stdout[:3]) == (0, "bcd")
    assert "note: cut the first 65 tokens of prompt 0" in result.stderr


def test_a_file_whose_prompt_is_too_long_is_named(folder: str, tmp_path: Path):
    (tmp_path / "long.py").write_text("a" * CONTEXT)
    assert refusal("generate", "-m", folder, "-f", str(tmp_path / "long.py")).startswith(
        f"{tmp_path / 'long.py'} has 20,000 tokens"
    )


def test_the_model_options_reach_the_library(folder: str):
    options = {"device": "cpu", "dtype": "float32", "backend": "sdpa"}
    options |= {"quantize": "int8", "cache_dtype": "int8"}
    flags = [
        part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", value)
    ]
    flags += ["--model", "someone/model", "--revision", "main"]
    for command in ("generate", "infill"):
        with (
            mock.patch("mqa_gpt.cli.options.resolve", return_value=Path(folder)) as resolve,
            mock.patch.object(LLM, "load", side_effect=KeyboardInterrupt) as load,
        ):
            invoke(command, *flags, *["--prefix=a"] * (command == "infill"))
        resolve.assert_called_once_with("someone/model", "main")
        load.assert_called_once_with(Path(folder), **options)


@pytest.mark.parametrize("command", [("generate", "a"), ("infill", "--prefix", "a")])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "--temperature is -1"),
        (["--top-p", "2", "--temperature", "1"], "--top-p is 2"),
        (["--n", "2"], "--n is 2 but temperature is 0"),
        (["--stop", ""], "--stop is ''"),
        (["--min-new-tokens", "100"], "--min-new-tokens is 100 and --max-new-tokens is 64"),
        (["--logprobs", "-1"], "--logprobs is -1"),
        (["--dtype", "int3"], "--dtype is 'int3'"),
        (["--cache-dtype", "int3"], "--cache-dtype is 'int3'"),
    ],
)
def test_options_are_checked_before_a_checkpoint_is_downloaded_or_loaded(
    command: tuple[str, ...], flags: list[str], message: str
):
    with mock.patch("mqa_gpt.cli.options.resolve") as resolve:
        says = refusal(*command, *flags, "-m", "someone/model")
    assert says.startswith(message)
    assert not resolve.called


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_model_options_are_checked_before_a_checkpoint_is_downloaded(command: str):
    with mock.patch("mqa_gpt.cli.options.resolve") as resolve:
        assert refusal(command, "--dtype", "int3", "-m", "a/b").startswith("--dtype is 'int3'")
    assert not resolve.called


def test_a_drafter_that_does_not_exist_is_an_error_before_the_model_is_loaded(folder: str):
    with mock.patch.object(LLM, "load") as load:
        says = refusal("generate", "-m", folder, "a", "--draft", "/no/such/folder")
    assert says.startswith("there is no folder '/no/such/folder'")
    assert not load.called


def test_threads_are_set_before_the_checkpoint_is_loaded(folder: str):
    calls = mock.Mock()
    calls.load.side_effect = KeyboardInterrupt
    with (
        mock.patch.object(torch, "set_num_threads", calls.threads),
        mock.patch.object(LLM, "load", calls.load),
    ):
        invoke("generate", "-m", folder, "a", "--threads", "3")
    assert [call[0] for call in calls.mock_calls] == ["threads", "load"]


def test_a_prompt_too_long_to_tokenize_as_a_whole_is_cut_with_a_note(folder: str):
    run = ["generate", "-m", folder, "-", "--truncate", "--max-new-tokens", str(CONTEXT - 10)]
    result = invoke(*run, stdin="a" * 20 * CONTEXT + "x")
    assert result.stdout == "yz"
    assert result.stderr == "note: cut prompt 0 to its last 10 tokens to fit the context\n"
    assert invoke(*run, stdin="aaaaaaaaax").stderr == ""
    short = invoke(*run, stdin="aaaaaaaaaax").stderr
    assert short == "note: cut the first 1 tokens of prompt 0 to fit the context\n"


def test_multi_byte_characters_arrive_whole(folder: str):
    result = invoke("generate", "-m", folder, "é", "--max-new-tokens", "3")
    assert result.stdout_bytes == "€".encode()


def test_control_tokens_in_a_prompt_act_unless_told_not_to(folder: str):
    run = ["generate", "-m", folder, "--json", "x<fim_middle>"]
    (acting,) = json.loads(invoke(*run).stdout)["completions"]
    assert (acting["prompt_tokens"], acting["text"][:2]) == (2, "mn")
    (plain,) = json.loads(invoke(*run, "--no-special-tokens").stdout)["completions"]
    assert plain["prompt_tokens"] == 1 + len("<fim_middle>")


def test_an_empty_prompt_starts_from_end_of_text(folder: str):
    assert invoke("generate", "-m", folder, "").stdout == "abcdefghijklmnopqrstuvwxyz"


def test_no_new_tokens_is_an_empty_completion(folder: str):
    assert invoke("generate", "-m", folder, "a", "--max-new-tokens", "0").stdout == ""


# --------------------------------------------------------------------------------------- infill


def test_two_strings_are_infilled(folder: str):
    run = ["infill", "-m", folder, "--prefix", "x = ", "--suffix", "\n"]
    assert invoke(*run).stdout == "mnopqrstuvwxyz"
    assert invoke(*run, "--whole").stdout == "x = mnopqrstuvwxyz\n"


def test_one_side_is_enough(folder: str):
    assert invoke("infill", "-m", folder, "--prefix", "x", "--whole").stdout[:2] == "xm"
    assert invoke("infill", "-m", folder, "--suffix", "x", "--whole").stdout[-2:] == "zx"


@pytest.mark.parametrize("flags", [[], ["--marker", "@@"], ["--at", "2:5"]])
def test_a_file_is_infilled_at_its_marker_or_position(
    folder: str, tmp_path: Path, flags: list[str]
):
    marker = {"--marker": "@@", "--at": ""}.get(flags[0] if flags else "", "<FILL>")
    file = tmp_path / "code.py"
    file.write_bytes(f"é = 1\r\nx = {marker}\r\n".encode())
    result = invoke("infill", "-m", folder, str(file), "--whole", "--stop", "o", *flags)
    assert result.stdout_bytes == "é = 1\r\nx = mn\r\n".encode()


@pytest.mark.parametrize(
    ("at", "whole"),
    [("1:1", "mab\n\ncd"), ("1:2", "amb\n\ncd"), ("1:3", "abm\n\ncd"), ("2:1", "ab\nm\ncd"),
     ("3:3", "ab\n\ncdm")],
)  # fmt: skip
def test_positions_count_from_one_and_a_line_has_an_end(folder: str, at: str, whole: str):
    run = ["infill", "-m", folder, "-", "--at", at, "--whole", "--max-new-tokens", "1"]
    assert invoke(*run, stdin="ab\n\ncd").stdout == whole


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_columns_count_characters_without_a_byte_order_mark(folder: str, mark: str):
    run = ["infill", "-m", folder, "-", "--at", "1:3", "--whole", "--max-new-tokens", "1"]
    assert invoke(*run, stdin=mark + "€é!").stdout == "€ém!"


@pytest.mark.parametrize("mode", ["psm", "spm"])
def test_control_tokens_in_an_infilling_are_plain_text(folder: str, mode: str):
    text = "<fim_middle><|endoftext|>"
    run = ["infill", "-m", folder, "--prefix", text, "--suffix", text, "--mode", mode, "--json"]
    (completion,) = json.loads(invoke(*run).stdout)["completions"]
    assert completion["prompt_tokens"] == 3 + 2 * len(text)


@pytest.mark.slow
def test_a_text_that_is_too_long_is_cut_only_when_asked_and_says_what(short: str):
    run = ["infill", "-m", short, "--prefix", "a" * SHORT_CONTEXT, "--suffix", "z" * 10]
    refused = refusal(*run)
    assert f"the context of {SHORT_CONTEXT:,} tokens" in refused
    assert "--truncate" in refused
    result = invoke(*run, "--truncate", "--max-new-tokens", "7")
    assert result.stdout == "mnopqrs"
    assert "cut 20 tokens at the beginning of the prefix and 0 at the end" in result.stderr
    report = json.loads(invoke(*run, "--truncate", "--max-new-tokens", "7", "--json").stdout)
    assert report["completions"][0]["cut"] == [20, 0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--prefix and --suffix"),
        (["-", "--prefix", "a"], "not both"),
        (["--prefix", "a", "--at", "1:1"], "FILE"),
        (["-", "--at", "1:1", "--marker", "x"], "not both"),
        (["-"], "contains no '<FILL>': mark one place"),
        (["-", "--marker", "b"], "'b' 2 times"),
        (["-", "--marker", ""], "empty"),
        (["-", "--at", "1"], "12:8"),
        (["-", "--at", "0:1"], "lines 1 to 2"),
        (["-", "--at", "3:1"], "lines 1 to 2"),
        (["-", "--at", "1:0"], "columns 1 to 4"),
        (["-", "--at", "1:5"], "columns 1 to 4"),
        (["-", "--at", f"{'9' * 5000}:1"], "LINE:COLUMN"),
        (["no-such-file"], "no-such-file"),
        (["--prefix", "a", "--mode", "pms"], "psm, spm"),
    ],
)
def test_a_missing_or_ambiguous_hole_is_bad_input(folder: str, arguments: list[str], says: str):
    assert says in refusal("infill", "-m", folder, *arguments, stdin="abb\ncd")


def test_a_checkpoint_without_infilling_tokens_says_so(folder: str, tmp_path: Path):
    tokenizer = json.loads((Path(folder) / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        token["content"] = token["content"].replace("fim", "nothing")
    tokenizer["model"]["vocab"] = {
        name.replace("fim", "nothing"): id_ for name, id_ in tokenizer["model"]["vocab"].items()
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(Path(folder) / name)
    assert "cannot infill" in refusal("infill", "-m", str(tmp_path), "--prefix", "a")


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--temperature", "-1"], "--temperature is -1"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--temperature", "1", "--top-p", "0"], "--top-p is 0"),
        (["--temperature", "1", "--top-p", "1.5"], "--top-p is 1.5"),
        (["--temperature", "1", "--top-k", "-2"], "--top-k is -2"),
        (["--temperature", "1", "--min-p", "2"], "--min-p is 2"),
        (["--n", "2"], "temperature"),
        (["--n", "0"], "--n is 0"),
        (["--repetition-penalty", "0"], "--repetition-penalty is 0"),
        (["--max-new-tokens", "-1"], "--max-new-tokens is -1"),
        (["--max-new-tokens", str(CONTEXT)], f"{CONTEXT:,}"),
        (["--logprobs", "-1"], "--logprobs is -1"),
        (["--stop", ""], "--stop is ''"),
        (["--stop", "a\udcff"], "--stop is 'a\\udcff': it must be a text in UTF-8"),
        (["--dtype", "float12"], "float32"),
        (["--device", "toaster"], "toaster"),
        (["--backend", "fast"], "reference"),
        (["--quantize", "int4"], "expected int8; leave it out"),
        (["--cache-dtype", "int4"], "expected int8; leave it out"),
        (["--revision", "main"], "revision"),
    ],
)
def test_an_option_out_of_range_is_bad_input(folder: str, flags: list[str], says: str):
    assert says in refusal("generate", "-m", folder, "abc", *flags)


@pytest.mark.parametrize("option", ["--top-k", "--max-new-tokens", "--threads"])
def test_a_word_where_a_number_belongs_is_a_usage_error(folder: str, option: str):
    result = invoke("generate", "-m", folder, "abc", option, "many")
    assert result.exit_code == 2
    assert option in result.stderr


def test_messages_name_options_as_the_command_line_does_and_leave_file_names_alone(tmp_path: Path):
    flags = {"top_k": "--top-k", "n": "--n", "model": "--model", "truncate": "--truncate"}
    for message, shown in {
        "top_k is 0: or leave top_k out": "--top-k is 0: or leave --top-k out",
        "n is 2 but n is odd": "--n is 2 but n is odd",
        "'top_k' and \"top_k is 0\"": "'top_k' and \"top_k is 0\"",
        "a/top_k.txt, /top_k/a and bottom_k": "a/top_k.txt, /top_k/a and bottom_k",
        "the model is large": "the model is large",
        "too long; truncate=True (--truncate) cuts it": "too long; --truncate cuts it",
    }.items():
        assert with_flags(message, flags) == shown


@pytest.mark.parametrize("flags", [["--top-k", "5"], ["--top-p", "0.9"], ["--min-p", "0.1"]])
def test_sampling_options_without_a_temperature_are_noted_and_have_no_effect(
    folder: str, flags: list[str]
):
    result = invoke("generate", "-m", folder, "uvw", *flags)
    assert (result.exit_code, result.stdout) == (0, "xyz")
    assert result.stderr == f"note: at a temperature of 0, {flags[0]} has no effect\n"


def test_filters_that_are_off_elsewhere_are_off_here(folder: str):
    run = ["generate", "-m", folder, "a", "--temperature", "15", "--seed", "1"]
    expected = invoke(*run)
    assert len(expected.stdout) > 5
    for flags in (["--top-k", "0"], ["--top-k", "-1"], ["--top-p", "1"]):
        result = invoke(*run, *flags)
        assert (result.stdout, result.stderr) == (expected.stdout, "")


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [("torch.bfloat16", "bfloat16"), ("bf16", "bfloat16"), ("fp16", "float16"),
     ("half", "float16"), ("torch.half", "float16"), ("fp32", "float32")],
)  # fmt: skip
def test_dtypes_may_be_spelled_as_elsewhere(folder: str, spelling: str, dtype: str):
    assert LLM.load(folder, dtype=spelling).model.dtype == getattr(torch, dtype)


@pytest.mark.slow
def test_the_number_of_threads_is_as_asked_and_one_for_a_small_model(
    folder: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    set_threads = mock.Mock()
    monkeypatch.setattr(torch, "set_num_threads", set_threads)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    run = ["-m", folder, "a", "--max-new-tokens", "1"]
    for command in ("generate", "verify"):
        invoke(command, *run)
        invoke(command, *run, "--threads", "3")
    assert [call.args for call in set_threads.call_args_list] == [(1,), (3,)] * 2
    for name, threads in (("tiny_starcoder_py", 8), ("starcoder", 8)):
        assert threads_for(GPTConfig.preset(name)) == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert threads_for(LLM.load(folder).model.config) == 8


def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(folder: str):
    message = refusal("generate", "-m", folder, "-", stdin="a" * (CONTEXT - 10))
    assert f"{CONTEXT - 10:,}" in message
    assert f"{CONTEXT:,}" in message


@pytest.mark.parametrize(
    ("arguments", "stdin", "says"),
    [
        (["-f", "no-such-file"], None, "no-such-file"),
        (["-f", "."], None, "directory"),
        (["-"], b"ab\xff", "UTF-8"),
        (["a\udcffb"], None, "surrogate"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_bad_input(
    folder: str, arguments: list[str], stdin: bytes | None, says: str
):
    assert says in refusal("generate", "-m", folder, *arguments, stdin=stdin)


@pytest.mark.parametrize("command", [["generate", "a"], ["infill", "--prefix", "a"], ["inspect"]])
def test_a_missing_checkpoint_is_bad_input(command: list[str], tmp_path: Path):
    assert "no-such-folder" in refusal(*command, "-m", str(tmp_path / "no-such-folder"))


def test_weights_with_nan_are_an_error_and_not_tokens(folder: str, tmp_path: Path):
    model = GPT.from_pretrained(folder)
    model.lm_head.weight.data[5] = torch.nan
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").symlink_to(Path(folder) / "tokenizer.json")
    assert "check-finite" in refusal("generate", "-m", str(tmp_path), "a")
    result = invoke("inspect", "-m", str(tmp_path), "--check-finite", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["non_finite"] == [
        {"name": "lm_head.weight", "nan": 261, "inf": 0}
    ]
    assert "lm_head.weight" in invoke("inspect", "-m", str(tmp_path), "--check-finite").stdout


@pytest.mark.parametrize("command", [["generate", "a"], ["infill", "--prefix", "a"], ["inspect"]])
def test_weights_that_are_a_pipe_are_refused_without_waiting(
    folder: str, tmp_path: Path, command: list[str]
):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).symlink_to(Path(folder) / name)
    os.mkfifo(tmp_path / "model.safetensors")
    assert "is a pipe or device" in refusal(*command, "-m", str(tmp_path))


@pytest.mark.parametrize(
    "command", [["generate", "a"], ["infill", "--prefix", "a"], ["inspect"], ["verify"]]
)
def test_the_demo_checkpoint_has_no_revisions(command: list[str]):
    assert "revision is 'main'" in refusal(*command, "--revision", "main")


@pytest.mark.parametrize("command", [["generate"], ["infill"]])
@pytest.mark.parametrize("file", ["", "\ud800", "a\0b", "x" * 5000])
def test_an_impossible_file_name_is_bad_input(folder: str, command: list[str], file: str):
    flags = ["-f"] * (command == ["generate"])
    assert "cannot read " in refusal(*command, "-m", folder, *flags, file)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no endless file here")
def test_an_endless_file_is_refused(folder: str):
    assert "larger than 10,000,000" in refusal("generate", "-m", folder, "-f", "/dev/zero")
    assert "larger than 10,000,000" in refusal("infill", "-m", folder, "/dev/zero")


def test_a_prompt_may_come_from_a_pipe(folder: str, tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("uvw",))
    writer.start()
    assert invoke("generate", "-m", folder, "-f", str(tmp_path / "pipe")).stdout == "xyz"
    writer.join()


@pytest.mark.parametrize(
    ("command", "tokens"), [(["generate", "a"], 10), (["infill", "--prefix", "a"], 13)]
)
def test_more_samples_than_the_memory_holds_are_refused_before_they_are_begun(
    folder: str, command: list[str], tokens: int
):
    run = [*command, "-m", folder, "--temperature", "1", "--n", "100000"]
    llm = LLM.load(folder)
    with (
        mock.patch.object(LLM, "load", return_value=llm),
        mock.patch("mqa_gpt.generation.batching.available_memory", return_value=10**9),
    ):
        message = refusal(*run, "--max-new-tokens", "9")
    assert f"100,000 completions of {tokens} tokens need " in message
    assert "from 1 to 100,000" in refusal(*run, "--n", "100001")
    assert f"{CONTEXT:,}" in refusal(*command, "-m", folder, "--max-new-tokens", "1000000000000")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_running_out_of_memory_is_bad_input(folder: str, error: Exception):
    with mock.patch.object(LLM, "begin", side_effect=error):
        assert "out of memory" in refusal("generate", "-m", folder, "a")


def test_an_error_of_ours_keeps_its_traceback(folder: str):
    with (
        mock.patch.object(LLM, "begin", side_effect=RuntimeError("a bug")),
        pytest.raises(RuntimeError, match="a bug"),
    ):
        invoke("generate", "-m", folder, "a")


@pytest.fixture(scope="module")
def loaded(folder: str) -> LLM:
    """The model of `folder`, loaded once."""
    return LLM.load(folder)


texts = st.text(st.characters(), max_size=40) | st.lists(
    st.sampled_from([*SPECIALS, "<FILL>", "a", "\n", "\x1b[31m", "\ud800", "\x00", "é", "-"]),
    max_size=6,
).map("".join)


@pytest.mark.slow
@settings(max_examples=50)
@given(texts, texts)
@example("\ud800", "")
@example("a\x1b]0;title\x07", "<fim_middle>")
def test_any_text_is_completed_and_infilled_or_refused(loaded: LLM, text: str, other: str):
    readable = not any("\ud800" <= c <= "\udfff" for c in text + other)
    for arguments in (
        ["generate", "--max-new-tokens", "1", "--", text + "a", other],
        ["infill", "--max-new-tokens", "1", f"--prefix={text}", f"--suffix={other}"],
    ):
        with mock.patch.object(LLM, "load", return_value=loaded):
            if not readable:
                assert "surrogate" in refusal(*arguments)
            else:
                assert invoke(*arguments).exit_code == 0


@pytest.mark.parametrize("command", [["generate", "abcabcabcab"], ["infill", "--prefix", "abcab"]])
@pytest.mark.parametrize("draft", ["prompt", "model"])
def test_a_draft_changes_the_statistics_and_not_the_text(
    folder: str, command: list[str], draft: str
):
    run = [*command, "-m", folder, "--json", "--max-new-tokens", "20"]
    plain = json.loads(invoke(*run).stdout)
    drafted = json.loads(invoke(*run, "--draft", folder if draft == "model" else draft).stdout)
    assert drafted["completions"] == plain["completions"]
    assert plain["stats"]["drafted_tokens"] is None
    assert drafted["stats"]["drafted_tokens"] >= drafted["stats"]["accepted_tokens"]
    if draft == "model":  # it agrees with itself
        assert drafted["stats"]["accepted_tokens"] > 0
        with mock.patch.object(Tokenizer, "same_vocabulary", return_value=False):
            assert "has another tokenizer" in refusal(*run, "--draft", folder)
    assert "there is no folder" in refusal(*run, "--draft", os.devnull + "/nothing")


# ------------------------------------------------------------------------ verify, inspect and env


def report(**changes: object) -> VerifyReport:
    return VerifyReport(
        **{
            "model": "someone/model",
            "dtype": "float32",
            "device": "cpu",
            "backend": "sdpa",
            "asked_backend": "auto",
            "quantize": None,
            "cache_dtype": None,
            "reference": "transformers",
            "rule": "",
            "logits_error": 1e-6,
            "logits_limit": 2e-5,
            "loss": None,
            "reference_loss": None,
            "tokens_must_be_equal": True,
            "prompts": [PromptReport("a", 1, 2, 2, None, [0.0], [0.0])],
        }
        | changes
    )


@pytest.mark.parametrize(("error", "status"), [(1e-6, 0), (1e-4, 1), (float("nan"), 1)])
def test_verify_reports_and_its_status_says_whether_it_passed(
    folder: str, error: float, status: int
):
    with mock.patch(
        "mqa_gpt.cli.verify.verify_checkpoint", return_value=report(logits_error=error)
    ) as verify:
        shown = invoke("verify", "-m", folder, "a", "-", "--dtype", "float32", stdin="b")
        in_json = invoke("verify", "--json")
    assert verify.call_args_list[0].kwargs["prompts"] == ["a", "b"]
    assert verify.call_args_list[1].kwargs["prompts"] is None
    assert verify.call_args_list[1].args == (DEMO_DIR,)
    assert shown.exit_code == in_json.exit_code == status
    assert "FAIL" in shown.stdout if status else "FAIL" not in shown.stdout
    parsed = json.loads(in_json.stdout, parse_constant=pytest.fail)
    assert parsed["passed"] is (status == 0)


@pytest.mark.slow
def test_verify_proves_a_checkpoint_against_transformers(folder: str):
    result = invoke("verify", "-m", folder, "abc", "--max-new-tokens", "5")
    assert result.exit_code == 0
    assert "5 of 5 greedy tokens equal" in result.stdout


def test_inspect_shows_the_published_figures_of_a_preset():
    shown = invoke("inspect", "--preset", "starcoderbase-7b").stdout
    assert all(figure in shown for figure in ("7,327,263,232", "21,504 B", "688,128 B", "14.7 GB"))
    report = json.loads(invoke("inspect", "--preset", "bigcode/starcoderbase-7b", "--json").stdout)
    assert report["parameters"] == 7_327_263_232


def test_the_bundled_checkpoint_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert invoke("inspect", "-m", "demo").stdout == invoke("inspect").stdout
    assert LLM.load("demo", dtype="float32").model.config == LLM.load(dtype="float32").model.config
    spelling_checkpoint(tmp_path / "demo")  # a folder here comes first
    assert "1 layers" in invoke("inspect", "-m", "demo").stdout
    assert "there is no folder" in refusal("inspect", "-m", "./nothing/demo")


def test_inspect_explains_a_forward_pass(folder: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ceilings, "PROBE_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "CPU_PROBE_SIZE", 64)
    flags = ("inspect", "--preset", "starcoderbase-7b", "--explain", "--context", "2048")
    shown = invoke(*flags, "--batch", "8").stdout.split("One forward pass: ")[1]
    assert "B = 8, T = 2,048" in shown
    for cell in ("8 32 2048 2048", "C+2GD", ".attn.scores", "H100", "this CPU", "as MHA"):
        assert cell in shown
    lines = [line.rstrip() for line in shown.splitlines() if not line.startswith("this CPU: ")]
    assert max(map(len, lines)) <= 80
    report = json.loads(invoke(*flags, "--json").stdout)["explain"]
    assert report["dtype"] == "bfloat16"
    assert report["rooflines"][-1]["device"] == "this CPU"
    own = json.loads(invoke("inspect", "-m", folder, "--explain", "--json").stdout)["explain"]
    assert (own["batch"], own["context"], own["dtype"]) == (1, 1024, "float32")
    half = invoke("inspect", "-m", folder, "--explain", "--dtype", "fp16", "--json").stdout
    assert json.loads(half)["explain"]["dtype"] == "float16"
    for flag, value in (("--batch", "2"), ("--context", "9"), ("--dtype", "fp16")):
        assert "are of --explain" in refusal("inspect", flag, value)
    assert "--batch is 0" in refusal("inspect", "--explain", "--batch", "0")
    assert "from 1 to 1,024" in refusal("inspect", "--explain", "--context", "2000")


def test_inspect_has_a_column_of_dtypes_only_for_what_is_stored(folder: str):
    def headings(*flags: str) -> list[list[str]]:
        lines = invoke("inspect", *flags).stdout.splitlines()
        return [line.split() for line in lines if line.split()[:1] == ["tensor"]]

    assert headings("-m", folder) == [["tensor", "shape", "dtype", "parameters", "times"]]
    assert headings("--preset", "starcoder") == [["tensor", "shape", "parameters", "times"]]


@pytest.mark.parametrize("width", [30, 60, 100])
def test_tables_on_narrow_terminals_cut_neither_names_nor_numbers(
    width: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(output, "PIPE_WIDTH", width)
    shown = invoke("inspect", "--preset", "starcoderbase-7b").stdout
    assert "…" not in shown
    for number in ("7,327,263,232", "29.3 GB", "21,504 B", "688,128 B", "176 MB", "201,326,592"):
        assert number in shown
    *_, tensors = shown.split("tensor ")
    names = "".join(line.split("  ")[0] for line in tensors.splitlines()[2:])
    assert "transformer.h.*.attn.c_attn.weight" in names
    *_, last = invoke("env").stdout.split("attention on cpu")
    assert "reference" in last


def test_inspect_shows_a_checkpoints_tensors_and_hashes(folder: str):
    result = invoke("inspect", "-m", folder, "--check-finite", "--hash")
    assert result.exit_code == 0
    assert "transformer.h.*.attn.c_attn.weight" in result.stdout
    assert "finite" in result.stdout
    assert "  model.safetensors" in result.stdout
    assert "nothing to compare with" in result.stderr


def test_inspect_with_every_check_finds_the_checkpoint_once(folder: str):
    from mqa_gpt.checkpoints import inspect as inspection

    with (
        mock.patch.object(inspection, "resolve", wraps=inspection.resolve) as resolve,
        mock.patch.object(inspection, "stored_tensors", wraps=inspection.stored_tensors) as stored,
    ):
        assert invoke("inspect", "-m", folder, "--check-finite", "--hash").exit_code == 0
    assert (resolve.call_count, stored.call_count) == (1, 1)


def test_json_is_readable_but_steers_no_terminal(folder: str, tmp_path: Path):
    odd = {"é": "\x7f\x9b2J\x1b[2J", "lone": "\ud800"}
    config = json.loads((Path(folder) / "config.json").read_text()) | odd
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(Path(folder) / "model.safetensors")
    text = invoke("inspect", "-m", str(tmp_path), "--json").stdout
    assert '"é": ' in text
    assert all(line.isprintable() for line in text.splitlines())
    assert json.loads(text)["config"].items() >= odd.items()


def test_a_hash_that_differs_fails_the_check(folder: str):
    from mqa_gpt.checkpoints import inspect as inspection

    wrong = inspection.FileHash("model.safetensors", "0" * 64, "1" * 64, "hub")
    with mock.patch.object(inspection, "hash_files", return_value=[wrong]):
        result = invoke("inspect", "-m", folder, "--hash")
        assert result.exit_code == 1
        assert "DIFFERS" in result.stderr
        assert invoke("inspect", "-m", folder, "--hash", "--json").exit_code == 1


def test_a_preset_has_no_files_to_check(folder: str):
    for flags in (["--check-finite"], ["--hash"], ["-m", folder], ["--revision", "main"]):
        assert "--preset" in refusal("inspect", "--preset", "starcoder", *flags)
    assert "starcoderbase-7b" in refusal("inspect", "--preset", "gpt2")


def test_env_tells_versions_and_backends():
    report = json.loads(invoke("env", "--json").stdout)
    assert report["versions"]["torch"] == torch.__version__
    assert report["backends"]["cpu"][:2] == ["reference", "sdpa"]
    shown = invoke("env").stdout
    assert torch.__version__ in shown
    assert "reference, sdpa" in shown


# -------------------------------------------------------------------------- help and interruption


@pytest.mark.parametrize(
    "command",
    [[], ["generate"], ["infill"], ["batch"], ["explore"], ["verify"], ["inspect"], ["env"]],
)
def test_help_explains_each_command_with_an_example(command: list[str]):
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert "Example" in result.stdout
    assert " ".join(["mqa-gpt", *command]) in result.stdout


def heed_interrupts() -> None:
    """For a child process: SIGINT has its default effect, even if the tests ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(folder: str, *arguments: str, **streams: object) -> subprocess.Popen[bytes]:
    """The real command, counting upwards for as long as the context lasts."""
    command = [sys.executable, "-m", "mqa_gpt", "generate", "-m", folder, "0"]
    return subprocess.Popen(
        [*command, "--max-new-tokens", str(CONTEXT - 1), *arguments],
        env=environment(),
        bufsize=0,
        preexec_fn=heed_interrupts,
        **{"stderr": subprocess.PIPE} | streams,
    )


def test_the_list_of_commands_cuts_no_summary():
    _, commands = invoke("--help").stdout.split("\nCommands:\n")
    assert commands.count("\n") == len([*app.registered_commands, *app.registered_groups])
    assert "..." not in commands


def ways_to_start() -> dict[str, list[str]]:
    """What Python gets when the command is started by its name, and by the package's."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["mqa-gpt"].partition(":")
    code = f"import sys; from {module} import {function}; sys.exit({function}())"
    return {"mqa-gpt": ["-c", code], "python -m mqa_gpt": ["-m", "mqa_gpt"]}


@pytest.mark.parametrize("name", ways_to_start())
def test_ctrl_c_while_torch_is_imported_says_so_and_exits_with_130(name: str, tmp_path: Path):
    (tmp_path / "torch.py").write_text("import time; print('begun', flush=True); time.sleep(60)")
    paths = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    process = subprocess.Popen(
        [sys.executable, *ways_to_start()[name], "env"],
        env=environment() | {"PYTHONPATH": paths},
        preexec_fn=heed_interrupts,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"begun\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == (b"", b"interrupted\n")
    assert process.returncode == 130


@pytest.mark.parametrize("before", [None, signal.SIG_IGN])
def test_a_handler_of_ctrl_c_that_is_not_pythons_own_is_left_alone(before: object):
    with (
        mock.patch("signal.getsignal", return_value=before),
        mock.patch("signal.signal") as set_handler,
        mock.patch("mqa_gpt.cli.app.main") as run,
    ):
        start_command()
    run.assert_called_once_with()
    set_handler.assert_not_called()


@pytest.mark.slow
@pytest.mark.parametrize("name", ways_to_start())
def test_every_way_to_start_the_command_runs_it(name: str):
    command = [sys.executable, *ways_to_start()[name], "--version"]
    shown = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("mqa-gpt")


def interrupted(process: subprocess.Popen[bytes]) -> bytes:
    """The output of a process that gets Ctrl-C after its first 5 bytes.

    Python loses an interrupt that arrives within a callback of C code. So it gets another whenever
    it has gone on for as long as an interrupt takes at most, counted in output, not in time.
    """
    output = process.stdout.read(5)
    size = 0
    while True:
        if size <= len(output) - 500 or size == 0:
            process.send_signal(signal.SIGINT)
            size = len(output)
        piece = process.stdout.read(100)
        if not piece:
            process.wait()
            return output
        output += piece


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_written_and_exits_with_130(folder: str):
    process = start(folder, stdout=subprocess.PIPE)
    output = interrupted(process)
    assert process.returncode == 130
    assert (b"1234567890" * (CONTEXT // 10)).startswith(output)
    assert len(output) < CONTEXT - 1
    assert process.stderr.read() == b"interrupted\n"


@pytest.mark.slow
def test_ctrl_c_is_reported_on_a_line_of_its_own_where_both_streams_are_one(folder: str):
    process = start(folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    text, told = interrupted(process).decode().splitlines()
    assert text.isdigit()
    assert told == "interrupted"


def test_ctrl_c_while_a_piece_is_written_writes_it_once(
    folder: str, monkeypatch: pytest.MonkeyPatch
):
    written: list[str] = []

    def write_and_interrupt(text: str, *, dim: bool = False) -> None:
        written.append(text)
        if text == "y":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(output, "write", write_and_interrupt)
    with default_interrupt():
        assert invoke("generate", "-m", folder, "uvw").exit_code == 130
    assert "".join(written) == "xy"


@contextmanager
def default_interrupt() -> Iterator[None]:
    """SIGINT as Python handles it, also where the tests were started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("code", [*range(0x20), *range(0x7F, 0xA0)])
def test_control_characters_are_spelled_out_on_a_terminal(code: int):
    shown = visible(f"a{chr(code)}b")
    assert shown == (f"a{chr(code)}b" if chr(code) in "\t\n" else f"a\\x{code:02x}b")


def test_ctrl_c_with_json_reports_the_interrupted_completion(folder: str):
    forward, calls = GPT.forward, iter(range(100))

    def interrupted(self: GPT, *arguments: object, **options: object) -> torch.Tensor:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, *arguments, **options)

    with mock.patch.object(GPT, "forward", interrupted):
        result = invoke("generate", "-m", folder, "abc", "--json")
    assert result.exit_code == 130
    (completion,) = json.loads(result.stdout)["completions"]
    assert (completion["text"], completion["finish_reason"]) == ("def", "interrupted")


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_the_command_quietly(folder: str):
    process = start(folder, stdout=subprocess.PIPE)
    assert process.stdout.read(1) == b"1"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("env --json >&-", 0, ""),
        ("generate -m {folder} - <&-", 2, "error: standard input is closed: give"),
        ("generate -m {folder}/nothing abc 2>&-", 2, ""),
        ("generate -m {folder} abc --stats <&- 2>&-", 0, ""),
    ],
)
def test_a_closed_stream_is_no_error_unless_it_is_needed(
    folder: str, arguments: str, status: int, message: str
):
    result = shell(arguments.format(folder=folder))
    assert result.returncode == status
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == bool(message)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device here")
@pytest.mark.parametrize("arguments", ["--help", "env --help", "env", "generate -m {folder} abc"])
def test_a_full_output_is_an_error_of_one_line(folder: str, arguments: str):
    result = shell(arguments.format(folder=folder) + " > /dev/full")
    assert result.returncode == 2
    assert result.stderr == "error: standard output: No space left on device\n"


def shell(arguments: str) -> subprocess.CompletedProcess[str]:
    """The real command with redirections."""
    return subprocess.run(
        f"{sys.executable} -m mqa_gpt {arguments}",
        shell=True,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_a_terminal_sees_the_prompt_and_no_control_characters(folder: str):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "mqa_gpt", "generate", "-m", folder, "\x1b]0;title\x07\tw"]
    process = subprocess.Popen(
        command, env=environment() | {"TERM": "xterm"}, stdin=theirs, stdout=theirs, stderr=theirs
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
    assert b"\x07" not in shown
    assert b"\x1b]" not in shown
    assert rb"\x1b]0;title\x07" in shown
    assert shown.endswith(b"xyz\r\n")
