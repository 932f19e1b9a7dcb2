"""What is refused or noted about a run before its documents are read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mqa_gpt import Tokenizer
from mqa_gpt.errors import ConfigError, InputError
from mqa_gpt.training import checks, data, documents, log
from mqa_gpt.training.checks import require_runnable
from mqa_gpt.training.config import ModelConfig, RunConfig
from mqa_gpt.training.parallel import World
from mqa_gpt.training.plan import plan_run
from mqa_gpt.training.run import train
from tests.helpers import SPECIALS, byte_tokenizer
from tests.training.runs import say_nothing, tiny_run, write_sources


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture
def tokenizers(tmp_path: Path) -> dict[str, str]:
    """Folders of tokenizers with all control tokens, without those of infilling, and with none."""
    kinds = {"full": SPECIALS, "no fim": SPECIALS[:1], "none": ()}
    for name, specials in kinds.items():
        (tmp_path / name).mkdir()
        text = byte_tokenizer(*specials).to_str()
        (tmp_path / name / "tokenizer.json").write_text(text)
    return {name: str(tmp_path / name) for name in kinds}


@pytest.fixture
def reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading documents is an error."""

    def refuse(*_: Any) -> None:
        raise AssertionError("documents are read")

    monkeypatch.setattr(documents, "_records", refuse)
    monkeypatch.setattr(data, "save_tokenizer", refuse)


@pytest.mark.usefixtures("reads_nothing")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_length": 49}, "data.length is 49 and model.n_positions is 48: "),
        ({"data_sources": []}, "data.sources is empty: "),
        ({"data_sources": ["/nowhere"]}, "data.sources: /nowhere does not exist: "),
        ({"model_induction": True, "model_n_embd": 20}, "model.induction is true, which needs "),
        ({"model_vocab_size": 280}, "model.vocab_size is 280 and the tokenizer has 290 entries: "),
        ({"tokenizer_source": "/none"}, "tokenizer.source is '/none': there is no folder '/none'"),
        ({"model_preset": "starcoder", "data_length": 8193}, "data.length is 8,193 and model.n_"),
        ({"tokenizer_source": "no fim"}, "data.infilling.rate is above 0, but the tokenizer has "),
        ({"tokenizer_source": "none"}, "tokenizer.source has no <|endoftext|>, which packing "),
        (
            {
                "tokenizer_source": "no fim",
                "data_infilling": {"rate": 0.0},
                "run_holes": [["a", "b"]],
            },
            "run.holes is given, but the tokenizer has no fill-in-the-middle tokens",
        ),
        (
            {"tokenizer_source": "full", "run_prompts": ["a", ""], "run_sample_tokens": 4},
            "run.prompts[1] is empty: give a text to continue",
        ),
        (
            {"tokenizer_source": "full", "run_prompts": ["a"], "run_sample_tokens": 48},
            "run.prompts[0] has 1 tokens, to which run.sample_tokens adds 48: together they must",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_work_is_said_first_and_leaves_nothing(
    changes: dict[str, Any],
    message: str,
    sources: Path,
    tokenizers: dict[str, str],
    tmp_path: Path,
) -> None:
    named = changes.get("tokenizer_source")
    if named in tokenizers:
        changes = changes | {"tokenizer_source": tokenizers[named]}
    if "model_preset" in changes:
        config = RunConfig.from_dict(
            {
                "model": {"preset": "starcoder"},
                "data": {"sources": [str(sources)], "length": changes["data_length"]},
            }
        )
    else:
        config = tiny_run(sources, **changes)
    for run in (
        lambda: train(config, tmp_path / "run", device="cpu", say=say_nothing),
        lambda: plan_run(config, device="cpu", say=say_nothing),
    ):
        with pytest.raises(ConfigError) as caught:
            run()
        assert str(caught.value).startswith(message)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("reads_nothing")
def test_a_backend_that_does_not_run_here_is_refused_first(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(backend: str, device: torch.device) -> None:
        raise InputError(f"{backend} needs a GPU")

    monkeypatch.setattr(checks, "select_attention", refuse)
    with pytest.raises(ConfigError, match=r"model\.backend is 'triton': triton needs a GPU"):
        plan_run(tiny_run(sources, model_backend="triton"), device="cpu", say=say_nothing)


@pytest.mark.usefixtures("reads_nothing")
def test_a_pretrained_model_is_looked_for_first(sources: Path, tokenizers: Any) -> None:
    config = tiny_run(sources, tokenizer_source=tokenizers["full"])
    model = dataclasses.replace(config.model, pretrained="/none", sizes={})
    with pytest.raises(ConfigError, match=r"^model.pretrained is '/none': there is no folder"):
        plan_run(dataclasses.replace(config, model=model), device="cpu", say=say_nothing)


@pytest.mark.parametrize("is_prepared", [False, True])
def test_ranks_that_cannot_share_a_layer_are_refused_before_anything_is_opened(
    is_prepared: bool, sources: Path
) -> None:
    mesh: Any = SimpleNamespace(size=lambda: 3)
    ranks = World(0, 1, torch.device("cpu"), tensor_mesh=mesh)
    with pytest.raises(InputError, match="n_head is 4 and there are 3 tensor-parallel ranks"):
        require_runnable(tiny_run(sources), ranks, is_prepared=is_prepared)


@pytest.mark.parametrize("is_prepared", [False, True])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_backend_that_cannot_stay_within_documents_is_refused(
    backend: str, is_prepared: bool, sources: Path
) -> None:
    def config(backend: str) -> RunConfig:
        return tiny_run(sources, model_backend=backend, data_within_documents=True)

    ranks = World(0, 1, torch.device("cpu"))
    with pytest.raises(ConfigError, match=f"^model.backend is '{backend}', but data.within_"):
        require_runnable(config(backend), ranks, is_prepared=is_prepared)
    for able in ("auto", "sdpa"):
        require_runnable(config(able), ranks, is_prepared=is_prepared)


@pytest.mark.parametrize("is_prepared", [False, True])
def test_muon_on_a_whole_c_attn_is_refused_where_ranks_divide_it(
    is_prepared: bool, sources: Path
) -> None:
    mesh: Any = SimpleNamespace(size=lambda: 2)
    ranks = World(0, 1, torch.device("cpu"), tensor_mesh=mesh)

    def config(**changes: Any) -> RunConfig:
        return tiny_run(sources, **{"optimizer_split_qkv": False, **changes})

    with pytest.raises(ConfigError, match=r"^optimizer.split_qkv is false, but tensor-parallel"):
        require_runnable(config(optimizer_name="muon"), ranks, is_prepared=is_prepared)
    require_runnable(config(), ranks, is_prepared=is_prepared)
    multi_head = config(optimizer_name="muon", model_multi_query=False)
    require_runnable(multi_head, ranks, is_prepared=is_prepared)


@pytest.mark.usefixtures("reads_nothing")
def test_packages_that_are_missing_are_missed_first(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/0.parquet").touch()
    with monkeypatch.context() as patch:
        patch.setattr(documents, "find_spec", lambda name: None)
        for source in ("tables", "tables/0.parquet"):
            config = tiny_run(sources, data_sources=[str(sources), str(tmp_path / source)])
            with pytest.raises(ConfigError, match=r"^data.sources: .*0.parquet needs pyarrow"):
                plan_run(config, device="cpu", say=say_nothing)

    def missing() -> None:
        raise InputError("tensorboard is not installed")

    monkeypatch.setattr("mqa_gpt.training.run.require_tensorboard", missing)
    with pytest.raises(InputError, match="tensorboard is not installed"):
        train(tiny_run(sources), tmp_path / "run", tensorboard=True, say=say_nothing)
    assert not (tmp_path / "run").exists()
    assert log.require_tensorboard is not missing


@pytest.mark.parametrize("existed", [False, True])
def test_what_shows_only_when_documents_are_read_leaves_no_half_made_folder(
    existed: bool, sources: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    if existed:
        out.mkdir()
    for changes in ({"data_include": ["*.none"]}, {"data_length": 48, "data_include": ["*_2.py"]}):
        config = tiny_run(sources, model_n_positions=100_000, **changes)
        if "data_length" in changes:
            config = tiny_run(
                sources, model_n_positions=100_000, **{**changes, "data_length": 99_999}
            )
        with pytest.raises(InputError, match=r"no documents to train on|fewer than one sequence"):
            train(config, out, device="cpu", say=say_nothing)
        assert out.exists() == existed
        assert not existed or list(out.iterdir()) == []


def said_by(config: RunConfig, out: Path) -> list[str]:
    """The notes of a run."""
    said: list[str] = []
    train(config, out, device="cpu", say=said.append)
    return [line.removeprefix("note: ") for line in said if line.startswith("note: ")]


def test_what_will_have_no_effect_is_noted(sources: Path, tmp_path: Path) -> None:
    short = {"run_steps": 2, "run_batch_size": 2, "run_evaluate_samples": 1}
    assert said_by(tiny_run(sources, run_steps=4), tmp_path / "none") == []
    warm = said_by(tiny_run(sources, **short, schedule_warmup_steps=2), tmp_path / "warm")
    assert warm == [
        "schedule.warmup_steps is 2 and run.steps is 2: the learning rate grows to the end of "
        "the run"
    ]
    short["schedule_warmup_steps"] = 1
    silent = said_by(tiny_run(sources, **short, run_sample_every=1), tmp_path / "silent")
    assert silent == ["run.sample_every has no effect without run.prompts or run.holes"]
    run = tmp_path / "none"
    tuned = dataclasses.replace(
        tiny_run(sources, **short), model=ModelConfig(pretrained=str(run / "model"))
    )
    (kept,) = said_by(tuned, tmp_path / "kept")
    assert kept == (
        f"tokenizer.vocab_size has no effect: the tokenizer is that of {run}/model, and none is "
        "trained"
    )
    late = {"rate": 0.0, "late_rate": 1.0, "late_epoch": 1}
    (line,) = said_by(tiny_run(sources, **short, data_infilling=late), tmp_path / "late")
    assert line == (
        "data.infilling.late_epoch is 1, but the run has 1 epochs, counted from 0: late_rate has "
        "no effect"
    )


def test_infilling_that_can_never_happen_is_noted(tmp_path: Path) -> None:
    lines = (f'{{"prompt": "{i} * 2 =", "completion": " {2 * i}"}}\n' for i in range(200))
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    config = tiny_run(
        tmp_path / "prompts.jsonl",
        run_steps=1,
        schedule_warmup_steps=0,
        data_held_out=[],
        data_infilling={"rate": 0.25},
    )
    (line,) = said_by(config, tmp_path / "prompts")
    assert line == (
        "data.infilling.rate is 0.25, but no hole can be cut: the documents have prompts, or "
        "data.length, 40, leaves no room"
    )


def test_a_resumed_run_needs_its_sources_no_more(tmp_path: Path) -> None:
    sources = write_sources(tmp_path / "sources")
    config = tiny_run(sources, run_steps=2)
    train(config, tmp_path / "run", device="cpu", say=say_nothing)
    sources.rename(tmp_path / "moved")
    train(config, tmp_path / "run", resume=True, device="cpu", say=say_nothing)
    assert Tokenizer.from_pretrained(tmp_path / "run/tokenizer").vocab_size == 290
