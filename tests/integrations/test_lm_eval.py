"""EleutherAI's unmodified harness runs our model on local tasks, and gives the figures of its own
`hf` model, which is transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import mqa_gpt.evaluation  # noqa: E402
from mqa_gpt import LLM  # noqa: E402
from mqa_gpt.checkpoints.load import DEMO_DIR  # noqa: E402
from mqa_gpt.errors import InputError  # noqa: E402
from mqa_gpt.integrations.lm_eval import MqaGpt, _options  # noqa: E402

pytestmark = pytest.mark.slow

TASKS = Path(mqa_gpt.evaluation.__file__).parent / "lm_eval_tasks"

CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
PERPLEXITY = """
task: local_perplexity
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""


@pytest.fixture(scope="module")
def ours() -> MqaGpt:
    return MqaGpt(LLM.load(device="cpu", dtype="float32"), batch_size=3)


@pytest.fixture(scope="module")
def theirs() -> Any:
    return HFLM(pretrained=str(DEMO_DIR), device="cpu", dtype="float32", batch_size=3)


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=i)
        for i, each in enumerate(arguments)
    ]


def test_continuations_are_as_likely_as_in_the_harness_own_model(ours: MqaGpt, theirs: Any) -> None:
    long = "def f(x):\n    return x\n" * 300  # longer than the context
    asked = requests(
        "loglikelihood",
        ("import os\nimport", " sys"),
        ("import os\nimport ", "sys"),
        ("", "def f(self):"),
        ("", "<|endoftext|>x"),
        ("def area(w, h):\n    return w", " * h\n"),
        ("for i in range(10):", "\n   "),
        (long, "def f(x):"),
        ("<fim_prefix>a = <fim_suffix>\n<fim_middle>", "1"),
    )
    found, expected = ours.loglikelihood(asked), theirs.loglikelihood(asked)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [p for p, _ in found] == pytest.approx([p for p, _ in expected], abs=2e-3, rel=1e-4)
    assert any(greedy for _, greedy in found)


def test_texts_are_as_likely_in_the_same_windows(ours: MqaGpt, theirs: Any) -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    asked = requests("loglikelihood_rolling", (text,), ("x = 1\n",), (text[:3000],))
    assert len(ours.tok_encode(text)) > ours.max_length
    found, expected = ours.loglikelihood_rolling(asked), theirs.loglikelihood_rolling(asked)
    assert found == pytest.approx(expected, rel=1e-4)


def test_generations_are_the_same_texts(ours: MqaGpt, theirs: Any) -> None:
    asked = requests(
        "generate_until",
        ("def read_lines(path):", {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False}),
        ("import os\n", {"until": "import", "max_gen_toks": 9}),
        ("class Stack:\n    def", {"max_gen_toks": 16, "until": []}),
        ("x = 1\n" * 900, {"until": ["\ny"], "max_gen_toks": 40, "temperature": 0.0}),
    )
    found = ours.generate_until(asked)
    assert found == theirs.generate_until(asked)
    assert [len(text) > 0 for text in found] == [True, False, True, True]


def test_the_harness_evaluates_local_tasks_alike(
    ours: MqaGpt, theirs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    choices = [
        {"prompt": "import os\nimport", "choices": [" sys", " def", " 1"], "answer": 0},
        {"prompt": "def f(self", "choices": ["):", " class", "import"], "answer": 0},
        {"prompt": "for i in", "choices": [" range", " while", "\n"], "answer": 0},
    ]
    texts = [{"text": "def f(x):\n    return x\n"}, {"text": "import os\n" * 20}]
    for name, template, rows in (
        ("choice", CHOICE, choices), ("perplexity", PERPLEXITY, texts)
    ):  # fmt: skip
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"{name}.yaml").write_text(template.format(data=data))
    holes = tmp_path / "code"
    holes.mkdir()
    (holes / "a.py").write_text("import os\nimport sys\n\n\ndef f(x):\n    return x\n")
    manager = TaskManager(
        include_path=[str(tmp_path), str(TASKS)],
        include_defaults=False,
        metadata={"source": str(holes), "count": 4},
    )
    # In a batch its rows go on after a control token, until all have ended.
    monkeypatch.setattr(theirs, "batch_size_per_gpu", 1)
    names = ["local_choice", "local_perplexity", "infilling_psm", "infilling_spm"]
    figures = [
        lm_eval.simple_evaluate(
            model=model, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True
        )
        for model in (ours, theirs)
    ]
    found, expected = (figure["results"] for figure in figures)
    assert found.keys() == expected.keys() == set(names)
    for task in names:
        for metric, value in expected[task].items():
            if isinstance(value, float):
                assert found[task][metric] == pytest.approx(value, rel=1e-4), (task, metric)
    assert found["local_choice"]["acc,none"] > 0.5
    assert 0 < found["local_perplexity"]["bits_per_byte,none"] < 3
    assert 0 < found["infilling_psm"]["edit_similarity,none"] < 1
    sample = figures[0]["samples"]["infilling_psm"][0]
    prompt = sample["arguments"][0][0] if isinstance(sample["arguments"], list) else str(sample)
    assert "<fim_prefix>" in prompt
    assert "<fim_middle>" in prompt


def test_the_command_of_the_harness_knows_the_model(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import os\nimport sys\nx = 1\n")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [
            sys.executable, "-m", "mqa_gpt.integrations.lm_eval", "run", "--model", "mqa-gpt",
            "--include_path", str(TASKS), "--tasks", "infilling_psm",
            "--metadata", json.dumps({"source": str(tmp_path), "count": 2}),
        ],
        capture_output=True, text=True, env=environment, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "edit_similarity" in done.stdout


def test_options_of_tasks_become_those_of_generation() -> None:
    assert _options({}, 7) == {"max_new_tokens": 7, "stop": []}
    assert _options({"until": "a", "max_tokens": 3, "temperature": 0.0}, 7) == {
        "max_new_tokens": 3, "stop": ["a"]
    }  # fmt: skip
    assert _options({"do_sample": True, "temperature": 0.2, "top_p": 0.9}, 7) == {
        "max_new_tokens": 7, "stop": [], "temperature": 0.2, "top_p": 0.9
    }  # fmt: skip
    assert "temperature" not in _options({"do_sample": False, "temperature": 0.8}, 7)
    with pytest.raises(InputError, match="num_beams"):
        _options({"num_beams": 4}, 7)
