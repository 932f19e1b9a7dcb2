"""Run files: every key is checked, overrides too, and what is written is read back the same."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from mqa_gpt.errors import ConfigError
from mqa_gpt.training.config import (
    RunConfig,
    differences,
    read_run_config,
    settings_text,
    to_toml,
)

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))

FILE = """
[model]
n_layer = 3
n_embd = 32
n_head = 4
[data]
sources = ["a folder"]
length = 64
[data.infilling]
piece_tokens = [64, 384]
[run]
steps = 7
holes = [["before\\n", "\\n\\u00e9"]]
"""


# Nothing in these texts is a setting or a section.
TEXTS = (
    "[run]\nprompts = [\n'''\nsteps = 5\n[data]\n''',\n"
    '"""\\"""\nsteps = 6\n""", # """\n]\n'
    'holes = [\n["a", "b"]]\n'
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(FILE, encoding="utf-8")
    return path


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_run_config(file, overrides)
    message = str(caught.value)
    assert message.count("\n") == 0
    return message


def test_sections_become_the_settings_of_their_parts(file: Path) -> None:
    config = read_run_config(file)
    assert config.model.sizes == {"n_layer": 3, "n_embd": 32, "n_head": 4}
    assert config.data.sources == ("a folder",)
    assert config.data.infilling.piece_tokens == (64, 384)
    assert config.run.steps == 7
    assert config.run.holes == (("before\n", "\né"),)
    assert config.optimizer.name == "adamw"


def test_any_text_is_written_and_read_back_the_same(file: Path, tmp_path: Path) -> None:
    config = read_run_config(file)
    texts = ("".join(map(chr, range(0x00, 0x100))), "\u2028\ufeff🙂")
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, prompts=texts))
    (tmp_path / "copy.toml").write_bytes(to_toml(config).encode())
    assert read_run_config(tmp_path / "copy.toml") == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_of_the_repository_is_written_and_read_back_the_same(
    path: Path, tmp_path: Path
) -> None:
    config = read_run_config(path)
    (tmp_path / "copy.toml").write_text(to_toml(config), encoding="utf-8")
    assert read_run_config(tmp_path / "copy.toml") == config
    assert RunConfig.from_dict(config.to_dict()) == config
    lines = settings_text(config).splitlines()
    stated = re.findall(r"^(\w+) = ", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert {line.split(" = ")[0].split(".")[-1] for line in lines} <= set(stated)


def test_there_are_configs_for_the_usual_kinds_of_runs() -> None:
    names = {path.stem for path in CONFIGS}
    assert names >= {"demo", "fine-tune", "overfit", "starcoderbase-1b"}


def test_starcoderbase_1b_is_the_published_recipe() -> None:
    (path,) = [path for path in CONFIGS if path.stem == "starcoderbase-1b"]
    config = read_run_config(path)
    model = config.model.gpt_config()
    assert model.parameters == 1_137_207_296
    assert model.initializer_range == 0.02209
    optimizer, schedule, run = config.optimizer, config.schedule, config.run
    assert (optimizer.name, optimizer.lr, optimizer.betas) == ("adamw", 4e-4, (0.9, 0.95))
    assert (optimizer.weight_decay, run.clip, run.dtype) == (0.1, 1.0, "bfloat16")
    assert (schedule.name, schedule.warmup_steps, schedule.final) == ("cosine", 2000, 0.1)
    assert (run.batch_size, run.steps, config.data.length) == (128, 1_000_000, 8192)
    assert (config.data.infilling.rate, config.data.infilling.spm_rate) == (0.5, 0.5)


def test_overrides_replace_settings_and_text_needs_no_quotes(file: Path) -> None:
    overrides = ["run.steps=9", "optimizer.lr = 1e-3", "optimizer.name=muon", "model.n_layer=2"]
    config = read_run_config(file, [*overrides, "data.infilling.lines=1", 'data.sources=["x"]'])
    assert (config.run.steps, config.optimizer.lr, config.optimizer.name) == (9, 1e-3, "muon")
    assert (config.model.sizes["n_layer"], config.data.infilling.lines) == (2, 1.0)
    assert config.data.sources == ("x",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.stepps=9", "run.stepps is not a setting: expected one of steps, batch_size"),
        ("runs.steps=9", "runs is not a section: expected one of model, data"),
        ("model.n_layers=9", "model.n_layers is not a setting: expected"),
        ("model.n_embd=30", "model.n_embd is 30 and n_head is 4: n_embd must be a multiple"),
        ("model.preset=nothing", "model: 'nothing' is not a preset: there are tiny_starcoder_py"),
        ("run.steps=many", "run.steps is 'many': it must be an integer"),
        ("run.steps=1.5", "run.steps is 1.5: it must be an integer"),
        ("run.steps=true", "run.steps is True: it must be an integer"),
        ("run.steps=0", "run.steps is 0: it must be an integer of at least 1"),
        ("run.dtype=float16", "run.dtype is 'float16': it must be one of float32, bfloat16"),
        ("run.batch_size=9", "run.batch_size is 9 and micro_batch_size is 8: the first must be"),
        ("run.holes=[['a']]", "run.holes[0] is ['a']: it must be a list of 2"),
        ("run.prompts=text", "run.prompts is 'text': it must be a list"),
        ("optimizer.lr=fast", "optimizer.lr is 'fast': it must be a number"),
        ("optimizer.lr=-1", "optimizer.lr is -1.0: it must be a number above 0"),
        ("averaging.decay=1", "averaging.decay is 1.0: it must be a number from 0 to below 1"),
        ("data=3", "--set data=3: expected SECTION.KEY=VALUE"),
        ("run.steps", "--set run.steps: expected SECTION.KEY=VALUE"),
        ("run.steps.x=1", "--set run.steps.x=1: steps is not a section"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(file: Path, override: str, message: str) -> None:
    assert message in refusal(file, override)


def test_a_file_that_is_no_config_is_refused_by_its_name(file: Path, tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.toml").startswith(f"{tmp_path}/none.toml cannot be read")
    file.write_text("[model\n")
    assert refusal(file).startswith(f"{file}:1: not TOML: expected ']'")
    file.write_text("[run]\nsteps = 1\ntext = [")
    assert refusal(file).startswith(f"{file}:3: not TOML: ")
    file.write_bytes(b"\xff")
    assert refusal(file) == f"{file}: not TOML: not UTF-8"
    file.write_text("[run]\nsteps = 1\n")
    assert refusal(file) == f"{file}: model is missing"
    file.write_text("model = 3\n[data]\n")
    assert refusal(file) == f"{file}:1: model is 3: it must be a table"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("[model]\n[data]\n\n[run] # long\nseed = 1\n  steps = 0\n", "6: run.steps is 0: "),
        ("[model]\nn_embd = 10\nn_head = 3\n[data]\n", "2: model.n_embd is 10 and n_head is"),
        ("[model]\n[data]\n[data.infilling]\nrate = 2\n", "4: data.infilling.rate is 2.0: "),
        ("[model]\n[data]\ninfilling = {rate = 2}\n", "3: data.infilling.rate is 2.0: "),
        ("[model]\n[data]\nlength = 0\n", "3: data.length is 0: "),
        ("[model]\npreset = 'x'\n[data]\n", "1: model: 'x' is not a preset: "),
        ("[model]\n[data]\n[rum]\nsteps = 1\n", "3: rum is not a section: "),
        ("[model]\n[data]\n[run]\nholes = [['a']]\n", "4: run.holes[0] is ['a']: "),
        (f"[model]\n[data]\n{TEXTS}steps = 0\n", "15: run.steps is 0: "),
    ],
)
def test_a_wrong_setting_is_refused_with_its_line(file: Path, text: str, place: str) -> None:
    file.write_text(text)
    assert refusal(file).startswith(f"{file}:{place}")


def test_a_setting_of_the_command_line_is_named_as_such(file: Path) -> None:
    assert refusal(file, "run.steps=0").startswith("--set run.steps=0: run.steps is 0: ")


def test_a_pretrained_model_keeps_its_sizes(file: Path) -> None:
    file.write_text('[model]\npretrained = "x"\nresid_pdrop = 0.0\n[data]\n')
    assert read_run_config(file).model.sizes == {"resid_pdrop": 0.0}
    assert "n_layer is not a setting: expected pretrained" in refusal(file, "model.n_layer=3")
    assert "pretrained and preset are both given" in refusal(file, "model.preset=starcoder")


def test_only_what_changes_the_result_may_not_differ_on_resume(file: Path) -> None:
    old = read_run_config(file)
    new = read_run_config(file, ["run.keep=5", "run.prompts=['x']", "run.on_bad_step=skip"])
    assert differences(old, new) == []
    new = read_run_config(file, ["run.seed=1", "data.infilling.lines=1", "model.n_positions=99"])
    assert differences(old, new) == [
        "data.infilling.lines was 0.0 and is 1.0",
        "model.n_positions was None and is 99",
        "run.seed was 0 and is 1",
    ]
