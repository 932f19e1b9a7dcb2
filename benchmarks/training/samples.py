"""How many training tokens a second does one core make?

    python -m benchmarks.training.samples

The documents are the standard library's sources, tokenized with the demo checkpoint's vocabulary.
Each setting makes the first 512 sequences of 1024 tokens of an epoch. Counted is the process's CPU
time, so that other work on the machine disturbs little.
"""

from __future__ import annotations

import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks.measure import (
    interleaved,
    make_parser,
    positive,
    refuse_bad_input,
    result_path,
    write_result,
)
from mqa_gpt.checkpoints.load import DEMO_DIR
from mqa_gpt.tokenizer import Tokenizer
from mqa_gpt.training.documents import STANDARD_LIBRARY
from mqa_gpt.training.infilling import InfillingConfig
from mqa_gpt.training.prepare import prepare
from mqa_gpt.training.samples import DataConfig, Samples
from mqa_gpt.training.shards import Corpus

LENGTH, SEQUENCES = 1024, 512
SETTINGS = {
    "left to right": InfillingConfig(rate=0.0),
    "StarCoder's: half is infilled": InfillingConfig(),
    "all is infilled": InfillingConfig(rate=1.0),
    "all, lines": InfillingConfig(rate=1.0, characters=0.0, lines=1.0),
    "all, nodes": InfillingConfig(rate=1.0, characters=0.0, nodes=1.0),
    "all, nodes, short pieces": InfillingConfig(
        rate=1.0, characters=0.0, nodes=1.0, piece_tokens=(64, 1024)
    ),
}


def make_samples(corpus: Corpus, tokenizer: Tokenizer, infilling: InfillingConfig) -> None:
    """The first sequences, made again."""
    config = DataConfig(length=LENGTH, infilling=infilling, shuffle_tokens=LENGTH * SEQUENCES)
    Samples(corpus, tokenizer, config).rows(range(SEQUENCES))


@refuse_bad_input
def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__, "training_samples.json")
    parser.add_argument("--repeats", type=positive, default=5, help="of each setting")
    options = parser.parse_args(arguments)
    output = result_path(options.output, "training_samples.json")
    tokenizer = Tokenizer.from_pretrained(DEMO_DIR)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.process_time()
        sources = DataConfig(sources=(STANDARD_LIBRARY,), include=("*.py",))
        corpus = prepare(sources, tokenizer, Path(folder) / "data").training
        prepared = corpus.tokens / (time.process_time() - begin)
        actions = {
            name: partial(make_samples, corpus, tokenizer, infilling)
            for name, infilling in SETTINGS.items()
        }
        seconds = interleaved(actions, options.repeats, "samples", time.process_time)
    rates = {name: LENGTH * SEQUENCES / row["median"] for name, row in seconds.items()}
    print(f"{'reading and tokenizing':30} {prepared / 1e6:5.2f} million tokens/s")
    for name, rate in rates.items():
        print(f"{name:30} {rate / 1e6:5.2f} million tokens/s")
    figures = {
        "documents": len(corpus),
        "tokens": corpus.tokens,
        "prepared_tokens_per_cpu_second": prepared,
        "tokens_per_cpu_second": rates,
        "cpu_seconds": seconds,
    }
    settings = {"length": LENGTH, "sequences": SEQUENCES}
    return write_result(output, __file__, __doc__, options, figures, **settings)


if __name__ == "__main__":
    sys.exit(main())
