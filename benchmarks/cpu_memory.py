"""How much memory does it take to load a float32 checkpoint and decode from it?

    python benchmarks/cpu_memory.py --shape starcoderbase-1b   # needs 4.5 GB of disk

Peak resident memory of a new process that loads a checkpoint of random weights with `LLM.load`,
which packs it, and generates 16 tokens. The weights are written shard by shard by another process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import RESULTS, write_result

from mqa_gpt.checkpoint import DEMO_DIR

ROOT = Path(__file__).parents[1]

WRITE = """
from mqa_gpt import GPT, GPTConfig
GPT(GPTConfig.official({shape!r})).save_pretrained({folder!r}, max_shard_size="2GB")
"""

DECODE = """
import json, time
from mqa_gpt import LLM, generate
from mqa_gpt.environment import peak_memory
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="starcoderbase-1b", help="an official shape")
    parser.add_argument("--folder", type=Path, help="where to put the temporary checkpoint")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/cpu_memory_*.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run(WRITE.format(shape=options.shape, folder=folder))
        shutil.copy(DEMO_DIR / "tokenizer.json", folder)  # any: the prompt is ids
        files = sorted(Path(folder).glob("*.safetensors"))
        checkpoint_bytes = sum(file.stat().st_size for file in files)
        figures = json.loads(run(DECODE.format(folder=folder)).splitlines()[-1])
    figures = {"checkpoint_bytes": checkpoint_bytes, "files": len(files)} | figures
    print(f"{options.shape}, float32, {checkpoint_bytes / 1e9:.2f} GB in {len(files)} files")
    for stage, peak in figures["peak_bytes_after"].items():
        print(f"peak resident memory after {stage:9}{peak / 1e9:>8.2f} GB")
    print(f"load {figures['load_s']:.1f} s")
    write_result(
        options.output or RESULTS / f"cpu_memory_{options.shape}.json",
        __doc__.split("\n")[0],
        options,
        figures,
        dtype="float32",
    )


if __name__ == "__main__":
    main()
