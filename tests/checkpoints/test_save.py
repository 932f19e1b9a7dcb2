"""Saving, against what transformers reads."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPTBigCodeForCausalLM, pipeline

from mqa_gpt import GPT, LLM, CheckpointError, Tokenizer
from mqa_gpt.checkpoints import save as save_module
from mqa_gpt.checkpoints.headers import read_config
from mqa_gpt.checkpoints.load import DEMO_DIR, load_model
from mqa_gpt.checkpoints.save import save_model, tokenizer_config
from mqa_gpt.errors import InputError
from tests.helpers import (
    INDEX,
    SPECIALS,
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


def test_saved_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
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
    others = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{}",
        "model-card.safetensors.txt": "x",
        "notes/a.txt": "y",
    }
    (tmp_path / "notes").mkdir()
    for file, text in others.items():
        (tmp_path / file).write_text(text)
    new.save_pretrained(tmp_path, max_shard_size=after)

    assert_same_weights(load_model(tmp_path), new)
    assert_same_weights(new, GPTBigCodeForCausalLM.from_pretrained(tmp_path))
    fresh = tmp_path.parent / "fresh"
    new.save_pretrained(fresh, max_shard_size=after)
    expected = {file.name for file in fresh.iterdir()} | {"notes"}
    assert {f.name for f in tmp_path.iterdir()} == expected | {*others} - {"notes/a.txt"}
    assert all((tmp_path / file).read_text() == text for file, text in others.items())


def test_a_model_can_be_saved_to_where_it_came_from(
    tmp_path: Path, reference: GPTBigCodeForCausalLM
) -> None:
    model = load_model(write_checkpoint(tmp_path, weights_of(reference), tiny_config()))
    with torch.no_grad():
        model.transformer.ln_f.bias += 1
    model.save_pretrained(tmp_path)
    assert_same_weights(load_model(tmp_path), model)


def loaded(folder: Path) -> GPT | str:
    """The model in a folder, or the message that says why there is none."""
    try:
        return load_model(folder)
    except CheckpointError as error:
        return str(error)


def finish_saving(message: str) -> None:
    """Do what loading's message says."""
    found = re.search(r"move all files of (.*) into (.*)", message)
    assert found is not None, message
    for file in Path(found[1]).iterdir():
        file.rename(Path(found[2]) / file.name)


@pytest.mark.slow
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

            patch.setattr(save_module, "save_file", killed_after(save_module.save_file))
            patch.setattr(save_module, "_sync", killed_after(save_module._sync))
            patch.setattr(Path, "replace", killed_after(Path.replace))
            patch.setattr(Path, "unlink", killed_after(Path.unlink))
            try:
                new.save_pretrained(folder, max_shard_size=after)
                finished = True
            except KeyboardInterrupt:
                finished = False
        model = loaded(folder)
        if isinstance(model, str):
            seen.add("error")
            finish_saving(model)
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
    real, written = save_module.save_file, []

    def full_disk(tensors: Tensors, file: Path, **kwargs: Any) -> None:
        if written:
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        written.append(file)
        real(tensors, file, **kwargs)

    monkeypatch.setattr(save_module, "save_file", full_disk)
    for folder in (tmp_path / "x", tmp_path / "y"):
        with pytest.raises(CheckpointError, match=r"cannot be written to .*No space left.*room"):
            new.save_pretrained(folder, max_shard_size=50_000)
    assert {file.name: file.read_bytes() for file in (tmp_path / "x").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_a_file_in_the_way_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    model = GPT(tiny_config())
    with pytest.raises(CheckpointError, match=r"/x is a file: choose another folder$"):
        model.save_pretrained(tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"cannot be written .*: choose another folder$"):
        model.save_pretrained(tmp_path / "x/y")
    assert (tmp_path / "x").read_text() == "mine"


def test_a_folder_that_may_not_be_seen_or_named_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    model = GPT(tiny_config())
    with monkeypatch.context() as patch:  # root ignores permissions, so they are simulated
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


@pytest.mark.parametrize(
    "size", ["5 parsecs", "", "GB", "-1GB", "0GB", "0.0001KB", "1e3GB", 0, -1, 1.5, True, None]
)
def test_an_invalid_shard_size_is_an_error(tmp_path: Path, size: Any) -> None:
    with pytest.raises(InputError, match=r"max_shard_size is .*: it must be a positive number of"):
        GPT(tiny_config()).save_pretrained(tmp_path / "x", max_shard_size=size)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("size", "files"), [("0.03MB", 10), ("30 kb", 10), (30_000, 10), ("1TB", 1)]
)
def test_a_shard_size_is_bytes_or_text(tmp_path: Path, size: int | str, files: int) -> None:
    GPT(tiny_config()).save_pretrained(tmp_path, max_shard_size=size)
    assert len(list(tmp_path.glob("*.safetensors"))) == files


@pytest.mark.parametrize("folder", ["a\0b", "\ud800", "~nobody-of-this-name/x", 5, None, "loop/x"])
def test_an_impossible_folder_name_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match=r"cannot be (the path of a folder|written to) "):
        GPT(tiny_config()).save_pretrained(folder)


@pytest.mark.parametrize("exists", [True, False])
def test_files_are_synced_before_they_are_moved_and_folders_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    folder = tmp_path / "x"
    if exists:
        folder.mkdir()
    events: list[tuple[str, Any]] = []
    sync, replace, rename = os.fsync, Path.replace, Path.rename

    def synced(descriptor: int) -> None:
        events.append(("sync", os.fstat(descriptor).st_ino))
        sync(descriptor)

    def moved(self: Path, target: Path) -> Path:
        events.append(("move", self.name))
        return (replace if self.is_file() else rename)(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", moved)
    monkeypatch.setattr(Path, "rename", moved)
    GPT(tiny_config()).save_pretrained(folder, max_shard_size=50_000)
    first = next(i for i, (what, _) in enumerate(events) if what == "move")
    last = max(i for i, (what, _) in enumerate(events) if what == "move")
    files = {file.stat().st_ino for file in folder.iterdir()}
    assert {inode for _, inode in events[:first]} == files
    assert len(files) > 4
    expected = {folder.stat().st_ino} | (set() if exists else {tmp_path.stat().st_ino})
    assert {inode for _, inode in events[last + 1 :]} == expected


# ----------------------------------------------------------------- saved folders in transformers


TEXT = "def f(x):\n    return  x  # caf\u00e9 <fim_prefix>a<|endoftext|> b  \n\n"


def check_auto_classes(folder: Path) -> None:
    """AutoTokenizer and pipeline give what we give; the end token is known."""
    ours, theirs = Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = ours.encode(TEXT)
    assert theirs(TEXT)["input_ids"] == ids
    assert theirs.decode(ids) == TEXT
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    config = read_config(folder)
    assert theirs.eos_token == "<|endoftext|>"
    assert theirs.eos_token_id == theirs.bos_token_id == ours.end_of_text_id
    assert theirs.model_max_length == config.n_positions
    generator = pipeline("text-generation", model=str(folder), dtype="float32")
    ((written,),) = generator(["def f"], max_new_tokens=9, do_sample=False)
    llm = LLM(GPT.from_pretrained(folder, dtype="float32"), ours)
    assert written["generated_text"] == "def f" + llm.generate("def f", 9).text


def test_the_demo_folder_works_with_the_auto_classes_of_transformers() -> None:
    check_auto_classes(DEMO_DIR)


def test_a_saved_folder_works_with_the_auto_classes_of_transformers(tmp_path: Path) -> None:
    tokenizer = Tokenizer(byte_tokenizer(*SPECIALS))
    config = tiny_config(vocab_size=tokenizer.vocab_size, bos_token_id=0, eos_token_id=0)
    LLM(our_model(reference_model(config), config), tokenizer).save(tmp_path)
    check_auto_classes(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def test_the_demo_folder_is_as_saving_writes_it(tmp_path: Path) -> None:
    LLM(GPT.from_pretrained(DEMO_DIR), Tokenizer.from_pretrained(DEMO_DIR)).save(tmp_path)
    for name in ("tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / name).read_text() == (DEMO_DIR / name).read_text()


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (3, "<fim_suffix>"),
        ([200, 2], "<fim_middle>"),
        (200, "<|endoftext|>"),
        (None, "<|endoftext|>"),
    ],
)
def test_the_end_token_of_transformers_is_a_control_token(
    end: int | list[int] | None, expected: str
) -> None:
    tokenizer = Tokenizer(byte_tokenizer(*SPECIALS))
    config = tiny_config(vocab_size=tokenizer.vocab_size, eos_token_id=end)
    assert tokenizer_config(tokenizer, config)["eos_token"] == expected
    assert "eos_token" not in tokenizer_config(Tokenizer(byte_tokenizer()), config)


def test_an_old_generation_config_does_not_outlive_its_model(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    GPT(tiny_config(eos_token_id=[1, 2])).save_pretrained(tmp_path)
    assert read_config(tmp_path).eos_token_id == [1, 2]


# ------------------------------------------------------------------------------- other processes

EXAMPLES = int(os.environ.get("MQA_GPT_FUZZ", "0"))  # what `make fuzz` asks for
FORK = multiprocessing.get_context("fork") if sys.platform == "linux" else None
needs_fork = pytest.mark.skipif(FORK is None, reason="only Linux forks safely")


@contextmanager
def saving(folder: Path, models: list[GPT], max_shard_size: int) -> Iterator[BaseProcess]:
    """A process that saves two models in turn, from its second saving on, until it is killed."""
    assert FORK is not None
    saved = FORK.Event()

    def save() -> None:
        for model in itertools.cycle(models):
            model.save_pretrained(folder, max_shard_size=max_shard_size)
            saved.set()

    process = FORK.Process(target=save, daemon=True)
    process.start()
    try:
        assert saved.wait(60)
        yield process
    finally:
        process.kill()
        process.join()


@pytest.fixture
def models() -> list[GPT]:
    """Two that differ in their weights and their config."""
    configs = [tiny_config(activation_function=name) for name in ("relu", "gelu_pytorch_tanh")]
    return [our_model(reference_model(c, seed=i), c) for i, c in enumerate(configs)]


def which(found: GPT, models: list[GPT]) -> int:
    """Which of two models it is; fails if it is a mixture of them."""
    i = int(torch.equal(found.lm_head.weight, models[1].lm_head.weight))
    assert_same_weights(found, models[i])
    assert found.config.activation_function == models[i].config.activation_function
    return i


@pytest.mark.fuzz
@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("max_shard_size", [10**9, 50_000])
def test_loading_while_another_process_saves_gives_one_model_or_the_other_or_an_error(
    tmp_path: Path, models: list[GPT], max_shard_size: int
) -> None:
    outcomes: Counter[int | str] = Counter()
    with saving(tmp_path, models, max_shard_size) as process:
        for _ in range(min(max(EXAMPLES, 100), 300)):
            found = loaded(tmp_path)
            outcomes["error" if isinstance(found, str) else which(found, models)] += 1
            if isinstance(found, str):
                assert re.search("is being written|is not finished|does not fit|holds no", found)
        assert process.is_alive()
    assert outcomes[0] + outcomes[1] > 0


@pytest.mark.fuzz
@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("max_shard_size", [10**9, 50_000])
def test_a_saving_process_that_is_killed_leaves_a_model_or_says_where_it_is(
    tmp_path: Path, models: list[GPT], max_shard_size: int
) -> None:
    pauses = random.Random(0)
    for moment in range(min(max(EXAMPLES, 10), 50)):
        folder = tmp_path / str(moment)
        with saving(folder, models, max_shard_size):
            time.sleep(pauses.uniform(0, 0.1))
        found = loaded(folder)
        if isinstance(found, str):
            finish_saving(found)
            found = load_model(folder)
        which(found, models)
