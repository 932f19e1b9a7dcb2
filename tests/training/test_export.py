"""Models of checkpoints, exported before the end of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mqa_gpt import GPT
from mqa_gpt.errors import InputError
from mqa_gpt.training.export import export_checkpoint, written_texts
from mqa_gpt.training.run import train
from tests.training.runs import last_tensors, say_nothing, tiny_run, write_sources


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    config = tiny_run(
        write_sources(folder / "sources"), averaging_decay=0.8, run_export_dtype="bfloat16"
    )
    train(config, folder / "run", device="cpu", say=say_nothing)
    return folder / "run"


def test_the_last_checkpoint_is_exported_as_the_end_of_the_run_is(
    run: Path, tmp_path: Path
) -> None:
    assert export_checkpoint(run, tmp_path / "model") == run / "checkpoints/step-00000012"
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "model" / name).read_bytes() == (run / "model" / name).read_bytes()


def test_any_checkpoint_can_be_exported_and_the_weights_of_its_step(
    run: Path, tmp_path: Path
) -> None:
    export_checkpoint(run, tmp_path / "raw", raw=True)
    weight = last_tensors(run)["model.transformer.wpe.weight"]
    model = GPT.from_pretrained(tmp_path / "raw", device="cpu")
    assert torch.equal(model.transformer.wpe.weight, weight.bfloat16())
    assert export_checkpoint(run, tmp_path / "early", step=8).name == "step-00000008"
    assert export_checkpoint(run, tmp_path / "best", best=True).name == "step-00000012"


def test_a_checkpoint_that_does_not_exist_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such checkpoint: there are those of the steps 8, 12"):
        export_checkpoint(run, tmp_path / "model", step=3)
    with pytest.raises(InputError, match="step and best are both given"):
        export_checkpoint(run, tmp_path / "model", step=8, best=True)
    with pytest.raises(InputError, match="holds no run: name a folder"):
        export_checkpoint(tmp_path, tmp_path / "model")


def test_texts_show_what_is_written_in_brackets(run: Path) -> None:
    from mqa_gpt import LLM

    llm = LLM.load(run / "model", device="cpu", dtype="float32")
    config = tiny_run(run, run_prompts=["def "], run_holes=[["a = ", "\n"]], run_sample_tokens=5)
    one, other = written_texts(llm.model, llm.tokenizer, config.run)
    new = llm.generate("def ", max_new_tokens=5).token_ids
    assert one == f"def [{llm.tokenizer.decode(new, skip_special_tokens=False)}]"
    assert other.startswith("a = [")
    assert other.endswith("]\n")
