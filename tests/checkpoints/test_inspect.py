"""Sizes against NUMERICS' published table and against the models themselves; checks of files."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mqa_gpt import GPT, CheckpointError, ConfigError, GPTConfig, KVCache
from mqa_gpt.checkpoints.inspect import (
    check_finite,
    hash_files,
    inspect_checkpoint,
    inspect_shape,
)
from mqa_gpt.fast.int8_cache import Int8KVCache
from tests.helpers import tiny_config
from tests.hub_server import HubServer, Repository

# Published: parameters, and bytes of 16-bit KV cache per token as MQA and as MHA.
OFFICIAL = {
    "tiny_starcoder_py": (164_144_128, 5_120, 61_440),
    "gpt_bigcode-santacoder": (1_124_886_528, 12_288, 196_608),
    "starcoderbase-1b": (1_137_207_296, 12_288, 196_608),
    "starcoderbase-3b": (3_043_311_104, 18_432, 405_504),
    "starcoderbase-7b": (7_327_263_232, 21_504, 688_128),
    "starcoderbase": (15_517_456_384, 20_480, 983_040),
    "starcoder": (15_517_456_384, 20_480, 983_040),
    "granite-20b-code-base-8k": (20_066_993_152, 26_624, 1_277_952),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in one file."""
    GPT(tiny_config()).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_official_shapes_have_their_published_sizes(name: str):
    found = inspect_shape(name)
    parameters, as_mqa, as_mha = OFFICIAL[name]
    sizes = found.to_dict()
    assert sizes["parameters"] == parameters
    assert sizes["weight_bytes"]["bfloat16"] == 2 * parameters
    assert sizes["cache_bytes_per_token"]["float16"] == {"mqa": as_mqa, "mha": as_mha}
    assert sum(math.prod(tensor.shape) for tensor in found.tensors) == parameters


@pytest.mark.parametrize("multi_query", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_and_cache_are_those_of_the_model(multi_query: bool, tied: bool, tmp_path: Path):
    config = tiny_config(multi_query=multi_query, tie_word_embeddings=tied)
    model = GPT(config)
    model.save_pretrained(tmp_path / "checkpoint")
    found = inspect_checkpoint(tmp_path / "checkpoint")
    assert found.config.parameters == sum(p.numel() for p in model.parameters())
    cache = KVCache(config, 1, 1, dtype=torch.float32)
    assert found.cache_bytes_per_token(torch.float32, multi_query=multi_query) == cache.kv.nbytes


def test_rounded_weights_have_a_row_of_what_the_files_hold(folder: Path, tmp_path: Path):
    assert "int8" not in inspect_checkpoint(folder).to_dict()["weight_bytes"]
    GPT.from_pretrained(folder, quantize="int8").save_pretrained(tmp_path / "rounded")
    sizes = inspect_checkpoint(tmp_path / "rounded").to_dict()
    tensors = load_file(tmp_path / "rounded" / "model.safetensors").values()
    assert 0 < sizes["weight_bytes"]["int8"] - sum(tensor.nbytes for tensor in tensors) < 10_000
    cache = Int8KVCache(tiny_config(), 1, 1)
    bytes_of_it = cache.kv.nbytes + cache.scales.nbytes
    assert sizes["cache_bytes_per_token"]["int8"]["mqa"] == bytes_of_it


def test_tensors_are_what_the_files_hold(tmp_path: Path):
    model = GPT(tiny_config()).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "checkpoint", max_shard_size=20_000)
    found = inspect_checkpoint(tmp_path / "checkpoint")
    files = list((tmp_path / "checkpoint").glob("*.safetensors"))
    assert len(files) > 1
    assert found.file_bytes == sum(file.stat().st_size for file in files)
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert {tensor.name: tensor.shape for tensor in found.tensors} == {
        name: tuple(tensor.shape) for name, tensor in stored.items()
    }
    assert {tensor.dtype for tensor in found.tensors} == {"BF16"}
    in_json = {tensor["name"]: tensor["file"] for tensor in found.to_dict()["tensors"]}
    assert in_json == {name: file.name for file in files for name in load_file(file)}


def test_the_report_is_valid_json(folder: Path):
    report = json.loads(json.dumps(inspect_checkpoint(folder).to_dict()))
    assert GPTConfig.from_dict(report["config"]).to_dict() == report["config"]


def test_a_config_of_absurd_size_is_reported_without_building_it(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    config["n_layer"] = 2**28
    (folder / "config.json").write_text(json.dumps(config))
    assert inspect_checkpoint(folder).config.parameters > 2**28


def test_a_shape_has_tensors_that_no_file_holds():
    found = inspect_shape("starcoder")
    assert {(tensor.dtype, tensor.file) for tensor in found.tensors} == {(None, None)}
    assert check_finite(found) == hash_files(found) == []


def test_the_demo_checkpoint_has_no_revisions():
    with pytest.raises(CheckpointError, match="revision is 'main'"):
        inspect_checkpoint(revision="main")


def test_a_file_without_tensors_is_inspected(folder: Path):
    save_file({}, folder / "model.safetensors")
    found = inspect_checkpoint(folder)
    assert (found.tensors, check_finite(found)) == ([], [])


def test_a_tensor_without_elements_is_inspected_and_finite(folder: Path):
    save_file({"empty": torch.zeros(0, 3)}, folder / "model.safetensors")
    found = inspect_checkpoint(folder)
    assert [tensor.shape for tensor in found.tensors] == [(0, 3)]
    assert check_finite(found) == []


def test_an_unknown_shape_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ConfigError, match="starcoderbase-7b"):
        inspect_shape("starcoderbase-7")


def test_a_folder_that_is_no_checkpoint_is_an_error(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        inspect_checkpoint(tmp_path)


def test_finite_weights_are_found_finite(folder: Path):
    assert check_finite(inspect_checkpoint(folder)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_nan_and_infinity_are_counted_per_tensor(folder: Path, dtype: torch.dtype):
    file = folder / "model.safetensors"
    weights = load_file(file)
    bad = weights["transformer.wpe.weight"]
    bad[0, :3] = torch.nan
    if dtype != torch.float8_e4m3fn:  # which has no infinity
        bad[1, :2] = torch.inf
        bad[2, 0] = -torch.inf
    weights["transformer.wpe.weight"] = bad.to(dtype)
    save_file(weights, file)
    infinite = 0 if dtype == torch.float8_e4m3fn else 3
    found = check_finite(inspect_checkpoint(folder))
    assert found == [("transformer.wpe.weight", 3, infinite)]


@pytest.mark.parametrize(("dtype", "size"), [("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6)])
def test_formats_without_nan_and_infinity_are_finite(folder: Path, dtype: str, size: int):
    header = json.dumps({"x": {"dtype": dtype, "shape": [8], "data_offsets": [0, size]}}).encode()
    data = struct.pack("<Q", len(header)) + header + b"\xff" * size
    (folder / "model.safetensors").write_bytes(data)
    assert check_finite(inspect_checkpoint(folder)) == []


def test_a_folder_has_hashes_but_nothing_to_compare_them_with(folder: Path):
    (hashed,) = hash_files(inspect_checkpoint(folder))
    data = (folder / "model.safetensors").read_bytes()
    assert hashed == ("model.safetensors", hashlib.sha256(data).hexdigest(), None, None)
    assert not hashed.differs


@pytest.mark.slow
def test_hashes_are_compared_with_the_hub_and_offline_with_its_cache(folder: Path, tmp_path: Path):
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    digest = hashlib.sha256(files["model.safetensors"]).hexdigest()
    name, home = "someone/tiny", tmp_path / "home"

    def hashes(target: str, url: str, **variables: str) -> list[list[str]]:
        # In a new process, because huggingface_hub reads its settings when it is imported.
        code = (
            "import json; from mqa_gpt.checkpoints.inspect import hash_files, inspect_checkpoint;"
            f"hashes = hash_files(inspect_checkpoint({target!r}));"
            "print(json.dumps([[*h, h.differs] for h in hashes]))"
        )
        settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"} | variables
        output = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **settings},
            capture_output=True,
            check=True,
        )
        return json.loads(output.stdout)

    with HubServer({name: Repository({"main": files})}) as hub:
        assert hashes(name, hub.url) == [["model.safetensors", digest, digest, "hub", False]]
        (blob,) = (home / "hub").glob(f"**/blobs/{digest}")
        blob.write_bytes(files["model.safetensors"][:-1] + b"\xff")
        ((_, changed, expected, source, differs),) = hashes(name, hub.url)
        assert (expected, source, differs) == (digest, "hub", True)
        url = hub.url
    offline = [["model.safetensors", changed, digest, "cache", True]]
    assert hashes(name, url, HF_HUB_OFFLINE="1") == offline
    (snapshot,) = (home / "hub").glob("models--someone--tiny/snapshots/*")
    assert hashes(str(snapshot), url) == offline
