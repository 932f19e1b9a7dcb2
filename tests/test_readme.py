"""README.md and docs/ are true: commands, examples, files, names, links and numbers."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from definitions import definitions
from typer.testing import CliRunner

import mqa_gpt
from benchmarks import tables
from benchmarks.tables import filled
from mqa_gpt import GPTConfig
from mqa_gpt.cache import cache_bytes
from mqa_gpt.cli.app import app
from mqa_gpt.machine import INSTALL_EVAL, INSTALL_NUMBA, INSTALL_PEERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = {
    file.name: file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md"))
}
PAGES = {"README.md": README, **{f"docs/{name}": text for name, text in GUIDES.items()}}
ALL = "\n".join(PAGES.values())
LINKING = [
    *sorted(file.relative_to(ROOT).as_posix() for file in (ROOT / "docs").rglob("[!_]*.md")),
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md", "benchmarks/README.md"),
    "mqa_gpt/demo/README.md",
]
FOLDERS = ("mqa_gpt", "kernels", "scripts", "benchmarks", "configs", "docs", "tests")


def commands(text: str) -> list[str]:
    """The indented lines that call `mqa-gpt`, from its name to where the shell takes over."""
    lines = re.findall(r"^ +(?![| ]).*?\b(mqa-gpt [a-z].*)$", text, re.MULTILINE)
    # Three spaces begin a remark, unless they indent a line of a prompt.
    return [re.split(r" [|>] |(?<!\\n)(?<! )   +", line)[0] for line in lines]


def run(command: str) -> str:
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output
    return result.stdout


def indented(text: str) -> str:
    return textwrap.indent(text.rstrip(), "    ")


def help_texts() -> str:
    names = ["generate", "infill", "batch", "score", "verify", "inspect", "bench", "env"]
    names += ["train", "convert", "explore"]
    analyses = ["logit-lens", "attribution", "attention", "patch", "loss", "sharing"]
    runs = [[], *([name] for name in names), ["train", "plot"], ["train", "export"]]
    runs += [["research", name] for name in analyses]
    runs += [["evaluate", name] for name in ("infilling", "tasks", "pass-at-k")]
    return "".join(CliRunner().invoke(app, [*run, "--help"]).stdout for run in runs)


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 150


# ----------------------------------------------------------------------- commands and examples


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```python" in text])
def test_the_python_examples_run_on_the_demo_checkpoint_each_by_itself(
    page: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # some of them save
    tells_a_story = page == "docs/fine-tuning.md"  # its examples go on where the last one ended
    if tells_a_story:
        pytest.importorskip("peft")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL):
        if tells_a_story or "bigcode/" not in block:  # which would be downloaded
            names = names if tells_a_story else {}
            exec(block, names)
            if page == "README.md":
                assert indented(capsys.readouterr().out) in README
    for command in commands(PAGES[page]):
        if "--model demo-int8" in command:
            assert run(command).strip()


@pytest.mark.parametrize("command", [*commands(ALL), *commands(help_texts())])
def test_every_command_that_is_shown_has_only_options_that_exist(command: str):
    words = [word for word in shlex.split(command)[1:] if word not in ("COMMAND", "...")]
    run(shlex.join(["mqa-gpt", *words, "--help"]))


def test_the_commands_are_found():
    assert len(commands(ALL)) > 20
    assert len(commands(help_texts())) > 10


def test_the_options_in_the_tables_exist():
    options = re.findall(r"`(--[a-z-]+)", ALL)
    assert len(options) > 30
    known = help_texts()
    assert [option for option in options if not re.search(rf"{option}\b", known)] == []


def test_the_readme_shows_what_the_command_writes():
    (command,) = (command for command in commands(README) if " generate " in command)
    prompt = shlex.split(command)[2]
    assert indented(prompt + run(command.replace(" --stats", ""))) in README


@pytest.mark.slow
def test_the_readme_shows_what_make_demo_writes():
    script = [sys.executable, "scripts/demo.py"]
    written = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    shown = README.split("## Two commands")[1].split("`mqa-gpt` runs")[0]
    for line in written.splitlines()[1:]:  # the first says how large the model is
        assert line.startswith("[load") or indented(line) in shown.splitlines() or not line, line


def test_make_has_the_targets_that_are_named():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = re.findall(
        r"(?:^    |`)make (?:[A-Z_]+=\w+ )?([a-z-]+)", ALL + contributing, re.MULTILINE
    )
    assert len(targets) > 6
    assert [target for target in targets if f"\n{target}:" not in makefile] == []


def test_what_else_is_needed_is_installed_by_one_command_wherever_it_is_said():
    for text in (README, ALL, help_texts()):
        text = " ".join(text.split())
        text = text.replace(".venv-openvino/bin/pip install", "")  # another environment
        said = sum(map(text.count, (INSTALL_PEERS, INSTALL_NUMBA, INSTALL_EVAL)))
        assert text.count("pip install") == said > 0


# -------------------------------------------------------------------------- files, names, links


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_every_path_that_is_named_exists(page: str):
    text = (ROOT / page).read_text(encoding="utf-8")
    for path in re.findall(r"[`(]((?:\w+/)+[\w.*-]*)[`)]", text):
        if path.split("/")[0] in FOLDERS:
            assert list(ROOT.glob(path.rstrip("/"))), path


def links(page: str) -> list[tuple[str, str]]:
    """Path and anchor of each link to a file; code holds none."""
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```|`[^`\n]+`", "", text, flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target.partition("#")[::2] for target in targets if "://" not in target]


@pytest.mark.parametrize("page", LINKING)
def test_every_link_leads_to_a_file_and_a_heading_or_a_definition(page: str):
    file = ROOT / page
    for path, anchor in links(page):
        linked = (file.parent / path).resolve() if path else file
        assert linked.exists(), path
        if not anchor:
            continue
        text = linked.read_text(encoding="utf-8")
        if linked.suffix == ".py":
            anchors = list(definitions(text))
        else:
            headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
        assert anchor in anchors, f"{path}#{anchor}"


def test_every_name_in_the_tour_is_defined_in_the_code():
    tour = GUIDES["architecture.md"]
    files = [*(ROOT / "mqa_gpt").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    code = "\n".join(file.read_text(encoding="utf-8") for file in files)
    modules = {file.stem for file in files} | {file.parent.name for file in files}
    names = {name.split(".")[-1] for name in re.findall(r"`([A-Za-z_][\w.]*)`", tour)}
    defined = r"^\s*(?:def |class |self\.)?{}\b(?=[(:]| [:=]|\[)"
    unknown = {
        name for name in names - modules - {"py"}
        if not re.search(defined.format(name), code, re.MULTILINE)
    }  # fmt: skip
    assert unknown == set()


def test_the_tour_links_its_claims_to_code_and_to_tests():
    anchored = [path for path, anchor in links("docs/architecture.md") if anchor and path]
    assert sum("/tests/" in path for path in anchored) > 25
    assert sum("/tests/" not in path for path in anchored) > 40


def test_every_method_that_is_named_exists():
    named = re.findall(r"`([A-Z]\w+)\.(\w+)`", ALL)
    public = [(owner, name) for owner, name in named if owner in mqa_gpt.__all__]
    assert len(public) > 10
    for owner, name in public:
        assert hasattr(getattr(mqa_gpt, owner), name), (owner, name)


# ---------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("page", tables.BLOCKS)
def test_the_tables_are_those_of_the_benchmark_results(page: str):
    """`python -m benchmarks.tables` makes them so."""
    assert filled(page) == (ROOT / page).read_text(encoding="utf-8")


def test_the_sizes_of_the_official_checkpoints_are_those_of_their_configs():
    rows = re.findall(
        r"^\| `(\w[\w-]*/[\w-]+)` \| (.*) \|$", GUIDES["checkpoints.md"], re.MULTILINE
    )
    assert len(rows) > 6
    for name, cells in rows:
        config = GPTConfig.preset(name)
        separate = dataclasses.replace(config, multi_query=False)
        expected = [
            f"{config.parameters:,}",
            f"{2 * config.parameters / 1e9:.1f} GB",
            f"{config.n_positions:,}",
            *(f"{cache_bytes(each, torch.bfloat16):,} B" for each in (config, separate)),
        ]
        assert cells.split(" | ") == expected


def test_the_picture_shows_the_cache_sizes_of_starcoderbase_7b():
    picture = (ROOT / "docs/images/mqa.svg").read_text(encoding="utf-8")
    config = GPTConfig.preset("starcoderbase-7b")
    separate = dataclasses.replace(config, multi_query=False)
    one, many = (cache_bytes(each, torch.bfloat16) for each in (config, separate))
    assert f"{many:,} bytes</tspan>, or {many * 8192 / 1e9:.2f} GB for 8,192 tokens" in picture
    assert f"{one:,} bytes</tspan>, or {one * 8192 / 1e6:.0f} MB for 8,192 tokens" in picture
    bars = re.findall(r'width="(\d+)" height="20"', picture)
    assert int(bars[0]) / int(bars[1]) == many / one == config.n_head
