"""What is shipped: the wheel holds the package, its types and its demo checkpoint, and runs."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    # From a copy: building writes next to its source.
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for name in ("mqa_gpt", "kernels"):
        (source / name).symlink_to(ROOT / name)
    subprocess.run([*command, *options, str(source)], check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_all_files_of_the_packages_and_the_demo_checkpoint(wheel):
    archive = zipfile.ZipFile(wheel)
    names = set(archive.namelist())
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "mqa_gpt").rglob("*.*")
        if "__pycache__" not in path.parts
    }
    kernels = {
        path.relative_to(ROOT / "kernels").as_posix()
        for path in (ROOT / "kernels/mqa_kernels").rglob("*.py")
    }
    assert package | kernels <= names
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
        path = f"mqa_gpt/demo/{name}"
        assert archive.read(path) == (ROOT / path).read_bytes()
    assert not [name for name in names if "test" in name.split("/")[0]]


def test_the_wheel_holds_the_licences_of_the_code_and_of_the_demo_checkpoint(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    assert b"License-Expression: Apache-2.0 AND PSF-2.0\n" in archive.read(metadata)
    for licence in ("LICENSE", "mqa_gpt/demo/LICENSE"):
        path = metadata.replace("METADATA", f"licenses/{licence}")
        assert archive.read(path) == (ROOT / licence).read_bytes()
    assert archive.read("mqa_gpt/demo/LICENSE") == (ROOT / "mqa_gpt/demo/LICENSE").read_bytes()


def test_the_unpacked_wheel_completes_code_by_itself(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "from mqa_gpt import LLM; from mqa_kernels import attention; "
        "print(len(LLM.load().generate('def f(', 4).token_ids))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    assert output.strip() == "4"


def test_the_demo_checkpoint_takes_at_most_12_megabytes():
    files = (ROOT / "mqa_gpt/demo").iterdir()
    assert sum(file.stat().st_size for file in files) <= 12_000_000


def test_transformers_can_be_imported_from_the_repository():
    # A package called `kernels` there would stand in the way of the one that transformers uses.
    code = "from transformers.models.gpt_bigcode import modeling_gpt_bigcode"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert not (ROOT / "kernels/__init__.py").exists()
