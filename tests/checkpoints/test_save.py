"""Saving, against what transformers reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPTBigCodeForCausalLM

from mqa_gpt import GPT, CheckpointError, Tokenizer
from mqa_gpt.checkpoints import save as saving
from mqa_gpt.checkpoints.load import load_model, read_config
from mqa_gpt.checkpoints.save import save_model
from tests.helpers import (
    INDEX,
    WEIGHTS,
    Tensors,
    assert_same_weights,
    byte_tokenizer,
    our_model,
    reference_model,
    tiny_config,
    weights_of,
    write_checkpoint,
)


@pytest.fixture(scope="module")
def reference() -> GPTBigCodeForCausalLM:
    return reference_model(tiny_config())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("multi_query", [True, False])
@pytest.mark.parametrize("max_shard_size", ["5GB", 20_000])
def test_what_is_saved_loads_in_transformers_bit_for_bit(
    tmp_path: Path,
    dtype: torch.dtype,
    tied: bool,
    multi_query: bool,
    max_shard_size: int | str,
) -> None:
    config = tiny_config(tie_word_embeddings=tied, multi_query=multi_query)
    model = our_model(reference_model(config).to(dtype), config)
    model.save_pretrained(tmp_path / "new" / "folder", max_shard_size=max_shard_size)
    folder = tmp_path / "new" / "folder"
    theirs, report = GPTBigCodeForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert theirs.dtype == dtype
    assert_same_weights(model, theirs)
    assert (theirs.lm_head.weight is theirs.transformer.wte.weight) == tied
    assert_same_weights(load_model(folder), model)
    assert read_config(folder).to_dict() == config.to_dict() | {"dtype": str(dtype)[6:]}

    files = {file.name for file in folder.iterdir()}
    if max_shard_size == "5GB":
        assert files == {"config.json", "generation_config.json", WEIGHTS}
        assert ("lm_head.weight" in load_file(folder / WEIGHTS)) == (not tied)
    else:
        index = json.loads((folder / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
        assert files == {
            "config.json", "generation_config.json", INDEX, *index["weight_map"].values()
        }  # fmt: skip
        assert len(files) > 4


def test_saved_files_can_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    config = tiny_config()
    GPT(config).save_pretrained(tmp_path / "x", max_shard_size=50_000)
    (tmp_path / "plain").write_text("")
    mode = (tmp_path / "plain").stat().st_mode
    assert all(file.stat().st_mode == mode for file in (tmp_path / "x").iterdir())


def test_saving_a_loaded_model_keeps_the_keys_of_its_config(
    tmp_path: Path, reference: GPTBigCodeForCausalLM
) -> None:
    values = tiny_config().to_dict() | {"inference_runner": 0, "torch_dtype": "float32"}
    folder = write_checkpoint(tmp_path / "old", weights_of(reference), values)
    load_model(folder, dtype="bfloat16").save_pretrained(tmp_path / "new")
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert written["inference_runner"] == 0
    assert written["dtype"] == "bfloat16"
    assert "torch_dtype" not in written


@pytest.mark.parametrize("before", ["5GB", 50_000, 20_000])
@pytest.mark.parametrize("after", ["5GB", 50_000, 20_000])
def test_saving_over_a_checkpoint_replaces_it_and_keeps_what_else_is_there(
    tmp_path: Path, before: int | str, after: int | str
) -> None:
    config = tiny_config()
    old, new = (our_model(reference_model(config, seed=i), config) for i in range(2))
    old.save_pretrained(tmp_path, max_shard_size=before)
    others = {"tokenizer.json": "{}", "model-card.safetensors.txt": "x", "notes/a.txt": "y"}
    (tmp_path / "notes").mkdir()
    for file, text in others.items():
        (tmp_path / file).write_text(text)
    new.save_pretrained(tmp_path, max_shard_size=after)

    assert_same_weights(load_model(tmp_path), new)
    assert_same_weights(new, GPTBigCodeForCausalLM.from_pretrained(tmp_path))
    fresh = tmp_path.parent / "fresh"
    new.save_pretrained(fresh, max_shard_size=after)
    expected = {file.name for file in fresh.iterdir()} | {"tokenizer.json", "notes"}
    assert {f.name for f in tmp_path.iterdir()} == expected | {"model-card.safetensors.txt"}
    assert all((tmp_path / file).read_text() == text for file, text in others.items())


def test_a_model_can_be_saved_to_where_it_came_from(
    tmp_path: Path, reference: GPTBigCodeForCausalLM
) -> None:
    model = load_model(write_checkpoint(tmp_path, weights_of(reference), tiny_config()))
    with torch.no_grad():
        model.transformer.ln_f.bias += 1
    model.save_pretrained(tmp_path)
    assert_same_weights(load_model(tmp_path), model)


@pytest.mark.parametrize("activation", ["relu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize(("before", "after"), [("5GB", "5GB"), (50_000, 50_000), (50_000, "5GB")])
def test_a_saving_that_is_broken_off_leaves_the_old_or_the_new_model_or_a_clear_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: int | str,
    after: int | str,
    activation: str,
) -> None:
    configs = [tiny_config(activation_function=name) for name in ("relu", activation)]
    old, new = (our_model(reference_model(c, seed=i), c) for i, c in enumerate(configs))
    seen = set()
    for moment in range(100):
        folder = tmp_path / str(moment)
        old.save_pretrained(folder, max_shard_size=before)
        with monkeypatch.context() as patch:
            left = moment

            def killed_after(real: Callable[..., Any]) -> Callable[..., Any]:
                def step(*args: Any, **kwargs: Any) -> Any:
                    nonlocal left
                    if left == 0:
                        raise KeyboardInterrupt
                    left -= 1
                    return real(*args, **kwargs)

                return step

            patch.setattr(saving, "save_file", killed_after(saving.save_file))
            patch.setattr(saving, "_sync", killed_after(saving._sync))
            patch.setattr(Path, "replace", killed_after(Path.replace))
            patch.setattr(Path, "unlink", killed_after(Path.unlink))
            try:
                new.save_pretrained(folder, max_shard_size=after)
                finished = True
            except KeyboardInterrupt:
                finished = False
        try:
            model = load_model(folder)
        except CheckpointError:
            seen.add("error")
            (rest,) = folder.glob(".saving-*")  # nothing is lost
            for file in rest.iterdir():
                file.rename(folder / file.name)
            assert_same_weights(load_model(folder), new)
        else:
            is_new = torch.equal(model.lm_head.weight, new.lm_head.weight)
            assert_same_weights(model, new if is_new else old)
            assert model.config.activation_function == ("relu" if not is_new else activation)
            seen.add("new" if is_new else "old")
        if finished:
            break
    assert finished
    assert {"old", "new"} <= seen
    if after == "5GB" and activation == "relu":
        assert seen == {"old", "new"}


def test_a_saving_that_is_broken_off_never_mixes_a_tokenizer_with_the_weights_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    old, new = (our_model(reference_model(config, seed=i), config) for i in range(2))
    save_model(old, tmp_path, tokenizer=Tokenizer(byte_tokenizer("old")))
    real = Path.replace

    def killed_before_the_weights(self: Path, target: Path) -> Path:
        if target.name == WEIGHTS:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", killed_before_the_weights)
    with pytest.raises(KeyboardInterrupt):
        save_model(new, tmp_path, tokenizer=Tokenizer(byte_tokenizer("new")))
    assert Tokenizer.from_pretrained(tmp_path).token_id("new") is not None
    with pytest.raises(CheckpointError, match="holds neither"):
        load_model(tmp_path)


def test_a_saving_that_cannot_be_moved_into_place_says_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    old, new = (our_model(reference_model(config, seed=i), config) for i in range(2))
    old.save_pretrained(tmp_path, max_shard_size=50_000)
    real, moved = Path.replace, []

    def refused(self: Path, target: Path) -> Path:
        moved.append(target)
        if len(moved) == 3:
            raise PermissionError(13, "Permission denied")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refused)
        with pytest.raises(CheckpointError, match=r"cannot be moved .*denied.*\.saving-"):
            new.save_pretrained(tmp_path, max_shard_size=50_000)
    (rest,) = tmp_path.glob(".saving-*")
    for file in rest.iterdir():
        file.rename(tmp_path / file.name)
    assert_same_weights(load_model(tmp_path), new)


def test_a_failed_saving_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    old, new = (our_model(reference_model(config, seed=i), config) for i in range(2))
    old.save_pretrained(tmp_path / "x", max_shard_size=50_000)
    before = {file.name: file.read_bytes() for file in (tmp_path / "x").iterdir()}
    real, written = saving.save_file, []

    def full_disk(tensors: Tensors, file: Path, **kwargs: Any) -> None:
        if written:
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        written.append(file)
        real(tensors, file, **kwargs)

    monkeypatch.setattr(saving, "save_file", full_disk)
    for folder in (tmp_path / "x", tmp_path / "y"):
        with pytest.raises(CheckpointError, match=r"cannot be written to .*No space left.*room"):
            new.save_pretrained(folder, max_shard_size=50_000)
    assert {file.name: file.read_bytes() for file in (tmp_path / "x").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_a_file_in_the_way_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot be written"):
        GPT(tiny_config()).save_pretrained(tmp_path / "x")
    assert (tmp_path / "x").read_text() == "mine"


def test_a_folder_that_may_not_be_seen_or_named_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    model = GPT(tiny_config())
    with monkeypatch.context() as patch:  # permissions do not bind root, so they are played
        patch.setattr(Path, "exists", refuse)
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(CheckpointError, match=r"cannot be written to .*Permission denied"):
            model.save_pretrained(tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"cannot be written to .*name too long"):
        model.save_pretrained(tmp_path / ("x" * 300))
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_was_untied_by_hand_is_not_lost_silently(tmp_path: Path) -> None:
    model = GPT(tiny_config())
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(97, 60))
    with pytest.raises(ValueError, match="use a config with tie_word_embeddings=False"):
        save_model(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_unreadable_shard_size_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="5 parsecs"):
        GPT(tiny_config()).save_pretrained(tmp_path / "x", max_shard_size="5 parsecs")
