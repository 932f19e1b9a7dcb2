"""How long does a new process take to its first token on a CPU, and how much memory?

    python -m benchmarks.cpu.start                            # the shape of tiny_starcoder_py
    python -m benchmarks.cpu.start --shape starcoderbase-1b   # needs 10 GB of disk

A process imports, loads a float32 checkpoint of random weights (ours loads its tokenizer too),
reads a prompt of 128 tokens and writes one: its seconds, and its peak resident memory (on Linux).
The programs take turns. "Nothing compiled" begins without the compiled code that a first run leaves
in the user's cache folder. CTranslate2 takes part if it is installed, with a checkpoint converted
beforehand.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import (
    ROOT,
    add_shape,
    interleaved,
    make_parser,
    positive,
    refuse_bad_input,
    require_memory,
    result_path,
    write_result,
)
from mqa_gpt import GPT, GPTConfig
from mqa_gpt.bench.counts import weight_bytes
from mqa_gpt.bench.peers import convert_for_ctranslate2, temporary_folder
from mqa_gpt.bench.run import Workload, random_prompts
from mqa_gpt.checkpoints.load import DEMO_DIR
from mqa_gpt.errors import InputError
from mqa_gpt.fast.compiled import HAS_NUMBA
from mqa_gpt.machine import version

OURS = """
from mqa_gpt import LLM, generate
generate(LLM.load({folder!r}, quantize={quantize!r}).model, [{prompt}], 1)
"""

TRANSFORMERS = """
import torch
from transformers import GPTBigCodeForCausalLM
model = GPTBigCodeForCausalLM.from_pretrained({folder!r})
model.generate(torch.tensor([{prompt}]), max_new_tokens=1, do_sample=False, pad_token_id=0)
"""

CTRANSLATE2 = """
import ctranslate2
model = ctranslate2.Generator({converted!r}, compute_type={compute!r}, intra_threads={threads})
prompt = [str(token) for token in {prompt}]
model.generate_batch([prompt], max_length=1, end_token=[], include_prompt_in_result=False)
"""

# The peak of a process, which only it can tell.
PEAK = """
try:
    print(open("/proc/self/status").read())
except OSError:
    pass
"""


def run(code: str, environment: dict[str, str]) -> int | None:
    """The peak memory of a process that runs the code, in bytes."""
    written = subprocess.run(
        [sys.executable, "-c", code + PEAK],
        check=True,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ).stdout
    found = re.search(r"^VmHWM:\s+(\d+) kB", written, re.MULTILINE)
    return None if found is None else int(found[1]) * 1024


def programs(folder: Path, converted: Path | None, prompt: list[int]) -> dict[str, str]:
    """The code of each process, by the program's name."""
    given = {"folder": str(folder), "prompt": prompt, "threads": torch.get_num_threads()}
    codes = {
        "mqa-gpt": OURS.format(quantize=None, **given),
        "mqa-gpt int8": OURS.format(quantize="int8", **given),
    }
    if HAS_NUMBA:
        codes["mqa-gpt, nothing compiled"] = codes["mqa-gpt"]
    if version("transformers") is not None:
        codes["transformers"] = TRANSFORMERS.format(**given)
    for kind in ("float32", "int8") if converted else ():
        codes[f"ctranslate2 {kind}"] = CTRANSLATE2.format(
            converted=str(converted), compute=kind.replace("int8", "int8_float32"), **given
        )
    return codes


def measure(codes: dict[str, str], repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds and peak memory of each program."""
    peaks: dict[str, list[int | None]] = defaultdict(list)

    def start(name: str, code: str) -> float:
        environment = dict(os.environ)
        with tempfile.TemporaryDirectory() as empty:
            if name.endswith("nothing compiled"):
                environment["XDG_CACHE_HOME"] = environment["LOCALAPPDATA"] = empty
            begin = time.perf_counter()
            peak = run(code, environment)
            elapsed = time.perf_counter() - begin
        peaks[name].append(peak)
        return elapsed

    actions = {name: partial(start, name, code) for name, code in codes.items()}
    times = interleaved(actions, repeats, "starting")
    return {
        name: {
            "seconds": time["median"],
            "peak_bytes": max(filter(None, peaks[name]), default=None),
            "rounds": time["seconds"],
        }
        for name, time in times.items()
    }


def require_room(shape: str, folder: Path) -> None:
    """Raise InputError if the shape's weights do not fit into memory, or not into the folder."""
    needed = weight_bytes(GPTConfig.preset(shape), torch.float32.itemsize)
    require_memory(2 * needed, torch.device("cpu"))
    free = shutil.disk_usage(folder).free
    if 2.2 * needed > free:  # the checkpoint, and CTranslate2's form of it
        raise InputError(
            f"the checkpoints take {2.2 * needed / 1e9:,.1f} GB, but {free / 1e9:,.1f} GB are free "
            f"in {folder}: name another --folder or a smaller --shape"
        )


@refuse_bad_input
def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "cpu_start_*.json")
    add_shape(parser)
    parser.add_argument("--repeats", type=positive, default=5, help="rounds of starting a process")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where to put the temporary checkpoints",
    )
    options = parser.parse_args(arguments)
    output = result_path(options.output, f"cpu_start_{options.shape}.json")
    if not options.folder.is_dir():
        raise InputError(f"--folder {options.folder} is not a folder: make it first")
    require_room(options.shape, options.folder)

    with temporary_folder(options.folder) as parent:
        print("writing a checkpoint of random weights", file=sys.stderr)
        folder = write_checkpoint(parent / "checkpoint", options)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        converted = None
        if version("ctranslate2") is not None and version("transformers") is not None:
            # From a copy, since it needs a tokenizer of its own in the folder.
            shutil.copytree(folder, parent / "copy", copy_function=os.link)
            (parent / "copy/tokenizer.json").unlink()
            converted = parent / "converted"
            convert_for_ctranslate2(parent / "copy", converted)
            shutil.rmtree(parent / "copy")
        (prompt,) = random_prompts(GPTConfig.preset(options.shape), Workload(1, 128, 1))
        figures = measure(programs(folder, converted, prompt), options.repeats)
    print(f"{options.shape}: {size / 1e9:.2f} GB in float32\n{'':28}first token, s  peak, GB")
    for name, found in figures.items():
        peak = "-" if found["peak_bytes"] is None else f"{found['peak_bytes'] / 1e9:.2f}"
        print(f"{name:28}{found['seconds']:>14.2f}{peak:>10}")
    return write_result(
        output, __file__, __doc__, options, {"checkpoint_bytes": size, "programs": figures}
    )


def write_checkpoint(folder: Path, options: argparse.Namespace) -> Path:
    """The folder, which holds random weights and a tokenizer."""
    torch.manual_seed(0)
    GPT(GPTConfig.preset(options.shape)).save_pretrained(folder, max_shard_size="2GB")
    shutil.copy(DEMO_DIR / "tokenizer.json", folder)  # any: the prompt is ids
    return folder


if __name__ == "__main__":
    sys.exit(main())
