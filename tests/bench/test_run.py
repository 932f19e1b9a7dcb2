"""Speed measurements: what is counted, what is divided by what, and how it is printed.

A fake clock makes every figure known in advance.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mqa_gpt import GPT, KVCache
from mqa_gpt.bench import ceilings, peers
from mqa_gpt.bench import run as bench
from mqa_gpt.bench.counts import prefill_flops, weight_bytes
from mqa_gpt.bench.report import BenchReport, count_text, times_faster
from mqa_gpt.bench.run import benchmark, random_model
from mqa_gpt.cli.app import app
from mqa_gpt.errors import InputError
from mqa_gpt.machine import INSTALL_PEERS, version
from tests.fake_cuda import Tape
from tests.helpers import random_ids, tiny_config

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (bench, ceilings):  # the one counts them, the other takes them
        monkeypatch.setattr(module, "PROBE_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "CPU_PROBE_SIZE", 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose greedy tokens depend on the whole prompt."""
    path = tmp_path_factory.mktemp("bench") / "checkpoint"
    torch.manual_seed(0)
    GPT(tiny_config()).save_pretrained(path)
    return path


def clock_of(durations: Sequence[float]) -> Callable[[], float]:
    """A clock by which what is timed takes these seconds, one after the other."""
    ticks = itertools.chain.from_iterable((0.0, seconds) for seconds in durations)
    return lambda: next(ticks)


def program(name: str, token: int = 0, first: float = 0.0) -> peers.Program:
    """One that writes the same token everywhere, the first of them after `first` seconds."""
    return peers.Program(
        name, lambda ids, count: peers.Written([[token] * count for _ in ids], first), 4
    )


def peer(*programs: peers.Program) -> peers.Peer:
    return peers.Peer(lambda folder, model: iter(programs), (), 1)


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert (result.exit_code, result.stdout) == (2, "")
    return result.stderr


# ------------------------------------------------------------------------------------- measurement


def test_actions_take_turns_and_may_time_themselves():
    order: list[str] = []

    def timed_by_itself() -> float:
        order.append("b")
        return 0.25

    actions = {"a": lambda: order.append("a"), "b": timed_by_itself}
    seconds = bench.take_turns(actions, 3, "", clock_of([1, 9, 2, 9, 3, 9]))
    assert order == ["a", "b"] * 3
    assert seconds == {"a": [1, 2, 3], "b": [0.25] * 3}


def test_every_figure_follows_from_the_clock_and_known_sizes(folder, monkeypatch):
    monkeypatch.setattr(bench, "ours", lambda model: program("mqa-gpt", first=1.5))
    # A round: prefill, writing, both, then the three probes.
    rounds = [(2.0, 4.0, 3.0, 0.7, 1.0, 0.1), (1.0, 4.0, 2.0, 0.5, 1.5, 0.2)]
    rounds.append((4.0, 8.0, 9.0, 0.6, 1.2, 0.3))
    report = benchmark(
        model=folder,
        device="cpu",
        prompt_lengths=[8],
        new_lengths=[5],
        batches=[3],
        repeats=3,
        clock=clock_of([s for seconds in rounds for s in seconds]),
    )
    config = tiny_config()
    read_rate, copy_rate = 2**20 / 0.5 / 1e9, 2**20 / 1.0 / 1e9
    assert report.ceilings.read_gb_per_s == pytest.approx(read_rate)
    assert report.ceilings.copy_gb_per_s == pytest.approx(copy_rate)
    assert report.ceilings.matmul_tflops == pytest.approx(2 * 64**3 / 0.1 / 1e12)

    pp, tg, both, after = report.results
    assert [r.test for r in report.results] == ["pp8", "tg5", "pp8+tg5", "tg4 @ d8"]
    assert [r.tokens for r in report.results] == [24, 15, 39, 12]
    assert pp.seconds == [2.0, 1.0, 4.0]
    assert pp.mean == pytest.approx((12 + 24 + 6) / 3)
    assert pp.stdev == pytest.approx(statistics.stdev([12, 24, 6]))
    assert pp.median == pytest.approx(12)
    assert pp.tflops == pytest.approx(prefill_flops(config, 3, 8) / 2.0 / 1e12)
    assert pp.mfu == pytest.approx(pp.tflops / report.ceilings.matmul_tflops)
    assert (pp.gb_per_s, pp.mbu) == (None, None)

    # 5 forward passes of one token: they attend to 1, 2, 3, 4 and 5.
    read = 5 * weight_bytes(config, 4) + KVCache(config, 3, 1 + 2 + 3 + 4 + 5).kv.nbytes
    assert tg.gb_per_s == pytest.approx(read / 4.0 / 1e9)
    assert tg.mbu == pytest.approx(tg.gb_per_s / read_rate)
    assert (tg.tflops, tg.mfu) == (None, None)

    assert both.median == pytest.approx(39 / 3.0)
    assert (both.gb_per_s, both.tflops) == (None, None)
    # The first of the 5 tokens belongs to the prefill; the others attend to 9, 10, 11 and 12.
    assert after.seconds == [1.5, 0.5, 7.5]
    read = 4 * weight_bytes(config, 4) + KVCache(config, 3, 9 + 10 + 11 + 12).kv.nbytes
    assert after.gb_per_s == pytest.approx(read / 1.5 / 1e9)
    assert {r.ours_faster for r in report.results} == {None}


def test_programs_with_8_bit_weights_are_measured_by_products_of_8_bit_integers(folder):
    # A round: the prefill, then the probes, that of 8-bit products last.
    clock = clock_of([2.0, 0.5, 1.0, 0.1, 0.02])
    lengths = {"prompt_lengths": [8], "new_lengths": [0], "repeats": 1}
    report = benchmark(model=folder, device="cpu", quantize="int8", clock=clock, **lengths)
    assert report.ceilings.matmul_tflops == pytest.approx(2 * 64**3 / 0.1 / 1e12)
    assert report.ceilings.int8_matmul_tflops == pytest.approx(2 * 64**3 / 0.02 / 1e12)
    (pp,) = report.results
    assert pp.mfu == pytest.approx(pp.tflops / report.ceilings.int8_matmul_tflops)
    assert report.ceilings.tflops(4) == report.ceilings.matmul_tflops
    assert ", 2.62e-05 in 8 bits;" in report.to_markdown()
    plain = benchmark(model=folder, device="cpu", clock=clock_of([1.0] * 4), **lengths)
    assert plain.ceilings.tflops(1) == plain.ceilings.matmul_tflops
    assert "8 bits" not in plain.to_markdown()


def test_a_checkpoint_is_measured_in_the_dtype_that_generation_uses(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    GPT(tiny_config()).to(torch.float16).save_pretrained(tmp_path / "half")
    run = {"model": tmp_path / "half", "prompt_lengths": [2], "new_lengths": [], "repeats": 1}
    assert benchmark(**run, device="cpu").dtype == "float32"
    assert benchmark(**run, device="cpu", dtype="float16").dtype == "float16"


def test_a_single_round_has_no_deviation(folder):
    run = {"model": folder, "device": "cpu", "prompt_lengths": [2], "new_lengths": []}
    one, two = (benchmark(**run, repeats=repeats).to_markdown() for repeats in (1, 2))
    assert "; 1 repeat\n" in one
    assert "±" not in one
    assert "; 2 repeats\n" in two
    assert "±" in two


@pytest.mark.parametrize("faster", [torch.bfloat16, torch.float32])
def test_the_ceiling_of_16_bit_products_is_that_of_the_faster_dtype(faster, monkeypatch):
    def probe(device: torch.device, dtype: torch.dtype, size: int) -> ceilings.Probe:
        return ceilings.Probe(lambda: None, 2.0 if dtype == faster else 1.0)

    monkeypatch.setattr(ceilings, "product_probe", probe)
    monkeypatch.setattr(ceilings, "_rate", lambda probe: probe.amount)
    assert ceilings.probes(CPU, torch.bfloat16)["matmul_tflops"].amount == 2.0


def test_a_probe_counts_all_the_passes_that_it_makes(monkeypatch):
    assert ceilings.PASSES["cuda"] > ceilings.PASSES["cpu"] == 1

    def operations_and_amounts() -> dict[str, tuple[int, float]]:
        found = {}
        for name, probe in ceilings.probes(CPU, torch.float32, in_8_bits=True).items():
            with torch.inference_mode(), Tape() as tape:
                probe.run()
            found[name] = (len(tape.operations), probe.amount)
        return found

    once = operations_and_amounts()
    assert min(count for count, _ in once.values()) > 0
    monkeypatch.setitem(ceilings.PASSES, "cpu", 3)
    assert operations_and_amounts() == {
        name: (3 * count, pytest.approx(3 * amount)) for name, (count, amount) in once.items()
    }


def test_a_test_runs_the_prompts_and_new_tokens_of_its_name(folder, monkeypatch):
    calls = []

    def generate(ids, count):
        calls.append((len(ids), {len(row) for row in ids}, count))
        return peers.Written([[0] * count for _ in ids], 0.0)

    monkeypatch.setattr(bench, "ours", lambda model: peers.Program("mqa-gpt", generate, 4))
    report = benchmark(
        model=folder, prompt_lengths=[6, 0], new_lengths=[4], batches=[2, 2, 1], repeats=2
    )
    once = [(2, {6}, 1), (2, {1}, 4), (2, {6}, 4), (1, {6}, 1), (1, {1}, 4), (1, {6}, 4)]
    assert calls == once * 3  # the first is the warm-up
    assert [(r.test, r.batch) for r in report.results] == [
        (name, batch) for batch in (2, 1) for name in ("pp6", "tg4", "pp6+tg4", "tg3 @ d6")
    ]


def test_peers_run_the_same_weights_and_are_compared_round_by_round(folder):
    pytest.importorskip("transformers")
    # One request per round: ours, theirs, then the probes.
    report = benchmark(
        model=folder,
        dtype="float32",
        device="cpu",
        prompt_lengths=[],
        new_lengths=[9],
        batches=[2],
        repeats=3,
        compare=["transformers"],
        clock=clock_of([1, 4, 1, 1, 1, 2, 4, 1, 1, 1, 5, 50, 1, 1, 1]),
    )
    mine, theirs = report.results
    assert (mine.contender, theirs.contender) == ("mqa-gpt", "transformers")
    assert theirs.same_tokens is True
    assert theirs.ours_faster == pytest.approx(4)  # of 4, 2 and 10
    assert theirs.median == pytest.approx(18 / 4)


def test_other_tokens_are_reported(folder, monkeypatch):
    monkeypatch.setitem(peers.PEERS, "other", peer(program("other", token=-1)))
    report = benchmark(
        model=folder, prompt_lengths=[3], new_lengths=[], repeats=1, compare=["other"]
    )
    assert [r.same_tokens for r in report.results] == [None, False]


def require_peer(name: str) -> None:
    """Skip a test where a program is not installed."""
    missing = [package for package in peers.PEERS[name].packages if version(package) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed")


@pytest.mark.parametrize("name", ["ctranslate2", "openvino"])
def test_other_programs_run_the_same_weights_and_print_nothing(name, folder, capfd):
    require_peer(name)
    report = benchmark(
        model=folder,
        dtype="float32",
        device="cpu",
        prompt_lengths=[5],
        new_lengths=[9],
        batches=[2],
        repeats=1,
        compare=[name],
    )
    names = {result.contender for result in report.results}
    assert names == {"mqa-gpt", f"{name} float32", f"{name} int8"}
    exact = [r for r in report.results if r.contender == f"{name} float32"]
    assert all(result.same_tokens for result in exact)
    assert capfd.readouterr().out == ""  # which is the report's


def test_a_shape_gets_random_weights_in_the_dtype_asked_for_and_no_zeros():
    config = tiny_config()
    model = random_model(config, torch.bfloat16, CPU)
    assert model.lm_head.weight is model.transformer.wte.weight
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert parameter.float().std() > 0.1, name  # of 0.4
        mean = 1 if ".ln_" in name and name.endswith("weight") else 0
        assert abs(parameter.float().mean() - mean) < 0.3, name
    assert not model.training
    with torch.inference_mode():
        assert model(random_ids(config, 2, 9)).isfinite().all()


@pytest.mark.parametrize("name", ["mqa-gpt", *peers.PEERS])
def test_every_program_says_when_its_first_tokens_came(name, folder, tmp_path):
    """So that decoding is timed by itself, and not as a difference of two runs."""
    model = GPT.from_pretrained(folder, dtype="float32")
    if name == "mqa-gpt":
        programs = [peers.ours(model)]
    else:
        require_peer(name)
        model.save_pretrained(tmp_path / "peer")
        programs = list(peers.PEERS[name].load(tmp_path / "peer", model))
    prompts = random_ids(tiny_config(), 3, 9).tolist()
    for each in programs:
        each.generate(prompts, 2)
        begin = time.perf_counter()
        written = each.generate(prompts, 100)
        whole = time.perf_counter() - begin
        assert [len(row) for row in written.tokens] == [100] * 3
        assert 0 < written.first_seconds < 0.5 * whole
        only = each.generate(prompts, 1)
        assert [row[:1] for row in written.tokens] == only.tokens
        assert only.first_seconds > 0


# ----------------------------------------------------------------------------------------- printing


@pytest.fixture(scope="module")
def short(folder: Path) -> list[str]:
    return ["--model", str(folder), "-p", "4,6", "-g", "3", "-b", "2", "-r", "2"]


TESTS = ["pp4", "pp6", "tg3", "pp4+tg3", "tg2 @ d4", "pp6+tg3", "tg2 @ d6"]


def test_json_holds_everything(short, monkeypatch):
    monkeypatch.setattr("sys.argv", ["mqa-gpt", "bench", "-p", "4,6"])
    found = json.loads(invoke(*short, "--output", "json"))
    assert found.keys() == BenchReport.__dataclass_fields__.keys()
    assert [result["test"] for result in found["results"]] == TESTS
    assert all(len(result["seconds"]) == 2 for result in found["results"])
    assert found["weights"] == "checkpoint"
    assert found["config"]["n_layer"] == 2
    assert found["command"] == "mqa-gpt bench -p 4,6"
    assert found["environment"]["versions"]["torch"] == torch.__version__
    assert found["peak_memory_bytes"] > 1e6


def test_json_is_short_for_output_json(short):
    assert json.loads(invoke(*short, "--json")).keys() == BenchReport.__dataclass_fields__.keys()


def test_csv_has_a_line_per_result_with_the_figures_of_the_json(short, monkeypatch):
    reports = []
    monkeypatch.setattr(
        "mqa_gpt.cli.bench.benchmark",
        lambda **options: reports.append(benchmark(**options)) or reports[0],
    )
    rows = list(csv.DictReader(io.StringIO(invoke(*short, "--output", "csv"))))
    assert [row["test"] for row in rows] == TESTS
    for row, result in zip(rows, reports[0].results, strict=True):
        assert row["median"] == str(result.median)
        assert row["mbu"] == ("" if result.mbu is None else str(result.mbu))
        assert int(row["parameters"]) == reports[0].parameters
        assert row["backend"] == "sdpa"


def test_markdown_is_a_table_that_names_the_model_and_the_ceilings(short):
    lines = invoke(*short).splitlines()
    assert "checkpoint weights, float32 on cpu" in lines[0]
    assert "attention auto (sdpa)" in lines[0]
    assert lines[1].startswith("ceilings: ")
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[3:]]
    assert {len(cells) for cells in table} == {9}
    assert table[0][:4] == ["test", "batch", "by", "tok/s"]
    assert all(set(cell) <= set("-:") for cell in table[1])
    assert [cells[0] for cells in table[2:]] == TESTS
    for cells in table[2:]:
        assert " ± " in cells[3]
        float(cells[4].replace(",", ""))


@pytest.mark.parametrize(("ratio", "text"), [(0.4, "2.50 x slower"), (1.65, "1.65 x faster")])
def test_a_peer_that_is_faster_is_said_to_be(ratio: float, text: str):
    assert times_faster(ratio) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(5_460_000, "5.46 M"), (164_000_000, "164 M"), (999_600_000, "1 B"), (15_517e6, "15.5 B")],
)
def test_parameters_are_shown_in_three_digits_of_a_fitting_unit(count: int, text: str):
    assert count_text(count) == text


# ----------------------------------------------------------------------------------------- refusals


def test_an_unknown_peer_is_refused():
    assert refusal("--compare", "transformers,vllm") == (
        "error: there is no program 'vllm' to compare with: there are transformers, ctranslate2, "
        "openvino\n"
    )


def test_a_peer_that_is_not_installed_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setattr(peers, "version", lambda package: None)
    assert refusal("--compare", "ctranslate2") == (
        "error: comparing with ctranslate2 needs ctranslate2 and transformers, not installed here: "
        f"run {INSTALL_PEERS} in the checkout\n"
    )


def test_openvino_is_refused_with_where_an_environment_for_it_is_described(monkeypatch):
    monkeypatch.setattr(peers, "version", lambda package: None)
    assert refusal("--compare", "openvino") == (
        "error: comparing with openvino needs optimum-intel and openvino, not installed here: it "
        "needs an older transformers, so see docs/bench.md for an environment of its own\n"
    )


def test_a_shape_that_does_not_fit_into_memory_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(bench, "available_memory", lambda device: 40 * 10**9)
    monkeypatch.setattr(bench, "random_model", None)
    message = refusal("--preset", "starcoder", "--device", "cpu", "-b", "16")
    # 15,517,456,384 parameters; 640 x 16 tokens of 40,960 bytes
    assert "62.07 GB are for weights in float32" in message
    assert "0.42 GB for the KV cache, but 40.00 GB are available on cpu" in message


def test_peers_count_as_copies_of_the_weights(folder, monkeypatch):
    pytest.importorskip("transformers")
    weights = sum(p.numel() for p in GPT(tiny_config()).parameters()) * 4
    room = (1 << 20) + 4 * weights
    monkeypatch.setattr(bench, "available_memory", lambda device: room)
    run = {"model": folder, "prompt_lengths": [2], "new_lengths": [], "repeats": 1}
    benchmark(**run)
    monkeypatch.setitem(peers.PEERS, "transformers", peers.PEERS["transformers"]._replace(copies=9))
    with pytest.raises(InputError, match="compare with fewer programs"):
        benchmark(**run, compare=["transformers"])


def test_a_shape_and_a_checkpoint_together_are_refused(folder):
    for option in (["--model", str(folder)], ["--revision", "main"]):
        assert "leave out one or the other" in refusal("--preset", "starcoder", *option)


def test_what_exceeds_the_context_is_refused_before_anything_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(bench, "load_model", None)
    message = refusal("--model", str(folder), "-p", "100", "-g", "13")
    assert "the longest test has 113 tokens, and the context of the model 112" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "8,"], "--n-prompt is '8,'"),
        (["-g", "-3"], "--n-gen is '-3'"),
        (["-b", "0"], "the batch size is 0: it must be an integer of at least 1"),
        (["-r", "0"], "repeats is 0"),
        (["-p", "0", "-g", "0"], "there is nothing to measure"),
        (["--output", "xml"], "--output is 'xml': expected one of md, csv, json"),
        (["--preset", "gpt2"], "'gpt2' is not a preset"),
        (["--preset", "starcoder", "--backend", "magic"], "backend is 'magic'"),
        (["--preset", "starcoder", "--dtype", "int3"], "dtype is 'int3'"),
    ],
)
def test_options_that_cannot_be_used_are_refused(arguments, message):
    assert message in refusal(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compare": "transformers"}, "compare is 'transformers': it must be a list"),
        ({"compare": [["transformers"]]}, "there is no program"),
        ({"prompt_lengths": 8}, "prompt_lengths is 8: it must be a list"),
        ({"new_lengths": "8"}, "new_lengths is '8': it must be a list"),
        ({"new_lengths": [8.0]}, "the number of new tokens is 8.0"),
        ({"batches": None}, "batches is None: it must be a list"),
        ({"repeats": "3"}, "repeats is '3'"),
        ({"shape": 5}, "shape is 5: it must be one of tiny_starcoder_py"),
        ({"quantize": 8}, "quantize is 8"),
    ],
    ids=str,
)
def test_arguments_of_wrong_types_are_errors_of_ours(options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        benchmark(**options)


def test_numpy_integers_count_as_integers(folder):
    numpy = pytest.importorskip("numpy")
    report = benchmark(
        model=folder,
        prompt_lengths=[numpy.int8(100)],
        new_lengths=[],
        batches=[numpy.uint8(2)],
        repeats=numpy.int64(1),
    )
    assert [(r.test, r.tokens) for r in report.results] == [("pp100", 200)]


TERMINATED = """
import time
from mqa_gpt.bench.peers import temporary_folder
with temporary_folder() as folder:
    (folder / "weights").write_text("many")
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_process_that_is_terminated_leaves_no_temporary_checkpoint():
    process = subprocess.Popen(
        [sys.executable, "-c", TERMINATED], stdout=subprocess.PIPE, text=True
    )
    folder = Path(process.stdout.readline().strip())
    assert folder.is_dir()
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert not folder.exists()


def test_termination_is_as_before_after_the_folder_is_gone():
    with peers.temporary_folder():
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


KILLED = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from mqa_gpt.bench.peers import end_with_parent
pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), end_with_parent)
print(pool.submit(os.getpid).result(), flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_peer_s_process_ends_with_ours_even_if_that_is_killed():
    process = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    process.kill()
    try:
        # To the end of what the worker, which holds this pipe too, could still write.
        assert process.communicate(timeout=60) == ("", None)
    except subprocess.TimeoutExpired:
        os.kill(worker, signal.SIGKILL)
        raise


def test_ctranslate2_refuses_one_key_value_head_per_query_head(tmp_path):
    pytest.importorskip("ctranslate2")
    model = random_model(tiny_config(multi_query=False), torch.float32, CPU)
    with pytest.raises(InputError, match="one key/value head only"):
        next(peers.load_ctranslate2(tmp_path, model))


def test_8_bit_weights_count_a_byte_each_and_peers_get_the_weights_as_they_were(folder):
    options = {"model": folder, "dtype": "float32", "prompt_lengths": [], "new_lengths": [3]}
    plain = benchmark(**options, repeats=1)
    rounded = benchmark(**options, repeats=1, quantize="int8", compare=["transformers"])
    assert rounded.weight_bytes * 4 == plain.weight_bytes
    (before,), (own, theirs) = plain.results, rounded.results
    assert own.gb_per_s * own.seconds[0] < 0.5 * before.gb_per_s * before.seconds[0]
    assert theirs.contender == "transformers"
    assert "float32 with int8 weights" in rounded.to_markdown()


def test_peers_are_not_given_8_bit_weights_that_they_cannot_read(folder, tmp_path):
    GPT.from_pretrained(folder, quantize="int8").save_pretrained(tmp_path / "8")
    with pytest.raises(InputError, match="holds 8-bit weights, which transformers cannot read"):
        benchmark(
            model=tmp_path / "8", prompt_lengths=[], new_lengths=[2], compare=["transformers"]
        )
