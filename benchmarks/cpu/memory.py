"""How much memory does it take to load a float32 checkpoint and decode from it?

    python -m benchmarks.cpu.memory --shape starcoderbase-1b   # needs 4.5 GB of disk

Peak resident memory of a new process that loads a checkpoint of random weights with `LLM.load`,
which packs it, and generates 16 tokens. Another process writes the checkpoint, in shards.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.measure import (
    ROOT,
    add_shape,
    make_parser,
    refuse_bad_input,
    require_memory,
    result_path,
    write_result,
)
from mqa_gpt import GPTConfig
from mqa_gpt.bench.counts import weight_bytes
from mqa_gpt.bench.peers import temporary_folder
from mqa_gpt.checkpoints.load import DEMO_DIR
from mqa_gpt.errors import InputError

WRITE = """
from mqa_gpt import GPT, GPTConfig
GPT(GPTConfig.preset({shape!r})).save_pretrained({folder!r}, max_shard_size="2GB")
"""

DECODE = """
import json, time
from mqa_gpt import LLM, generate
from mqa_gpt.machine import peak_memory
imported = peak_memory()
begin = time.perf_counter()
llm = LLM.load({folder!r})
loaded, loaded_at = peak_memory(), time.perf_counter()
tokens = generate(llm.model, [list(range(128))], 16)[0]
assert len(tokens) == 16
print(json.dumps({{
    "peak_bytes_after": {{"import": imported, "load": loaded, "decoding": peak_memory()}},
    "load_s": loaded_at - begin,
}}))
"""


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True
    ).stdout


def require_room(shape: str, folder: Path) -> None:
    """Raise InputError if the shape's weights do not fit into memory, or not into the folder."""
    needed = weight_bytes(GPTConfig.preset(shape), torch.float32.itemsize)
    require_memory(needed, torch.device("cpu"))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"the checkpoint takes {needed / 1e9:,.1f} GB, but {free / 1e9:,.1f} GB are free in "
            f"{folder}: name another --folder or a smaller --shape"
        )


@refuse_bad_input
def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "cpu_memory_*.json")
    add_shape(parser, "starcoderbase-1b")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where to put the temporary checkpoint",
    )
    options = parser.parse_args(arguments)
    output = result_path(options.output, f"cpu_memory_{options.shape}.json")
    if not options.folder.is_dir():
        raise InputError(f"--folder {options.folder} is not a folder: make it first")
    require_room(options.shape, options.folder)

    with temporary_folder(options.folder) as folder:
        print("writing a checkpoint of random weights", file=sys.stderr)
        run(WRITE.format(shape=options.shape, folder=str(folder)))
        shutil.copy(DEMO_DIR / "tokenizer.json", folder)  # any: the prompt is ids
        sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
        print("loading it and decoding", file=sys.stderr)
        measured = json.loads(run(DECODE.format(folder=str(folder))).splitlines()[-1])
    figures = {"checkpoint_bytes": sum(sizes), "files": len(sizes)} | measured
    print(f"{options.shape}, float32, {sum(sizes) / 1e9:.2f} GB in {len(sizes)} files")
    for stage, peak in measured["peak_bytes_after"].items():
        print(f"peak resident memory after {stage:9}{peak / 1e9:>8.2f} GB")
    print(f"load {measured['load_s']:.1f} s")
    return write_result(output, __file__, __doc__, options, figures, dtype="float32")


if __name__ == "__main__":
    sys.exit(main())
