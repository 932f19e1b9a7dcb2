from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

import mqa_gpt.generation.steps
import mqa_gpt.verify.compare
from mqa_gpt import GPT, CheckpointError, GPTConfig, PromptError
from mqa_gpt.attention import HAS_TRITON
from mqa_gpt.checkpoints.load import DEMO_DIR
from mqa_gpt.errors import InputError
from mqa_gpt.generation.loop import generate
from mqa_gpt.machine import INSTALL_PEERS
from mqa_gpt.verify.compare import verify
from mqa_gpt.verify.report import format_report
from tests.helpers import (
    byte_tokenizer,
    error,
    our_model,
    reference_greedy,
    reference_model,
    tiny_config,
)

# Larger weights would make 16-bit rounding so large that it hides small mistakes.
config_of = partial(tiny_config, initializer_range=0.2)
CONFIG = config_of()
PROMPTS = [[5, 9, 2], [7], [0, 1, 2, 3, 4, 5, 6]]


def save(folder: Path, config: GPTConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Path:
    reference_model(config).to(dtype).save_pretrained(folder)
    return folder


def add_tokenizer(folder: Path) -> Path:
    """One token per byte."""
    byte_tokenizer("<|endoftext|>").save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("checkpoint"))


# ------------------------------------------------------------------------------------- what passes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"multi_query": False, "activation_function": "gelu"},
        {"tie_word_embeddings": False},
        {"scale_attn_weights": False},
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_sound_checkpoint_passes(tmp_path: Path, changes: dict[str, object], dtype: str) -> None:
    report = verify(save(tmp_path, config_of(**changes)), dtype=dtype, max_new_tokens=24)
    assert report.passed
    assert 0 < report.logits_error <= report.logits_limit
    assert report.dtype == dtype
    assert report.reference.endswith("eager; it read the checkpoint itself")
    for prompt in report.prompts:
        positions = prompt.prompt_tokens + prompt.new_tokens - 1
        assert len(prompt.absolute_error) == len(prompt.relative_error) == positions
        assert (prompt.equal_tokens == prompt.new_tokens) == (prompt.divergence is None)
    if dtype == "float32":
        assert all(prompt.equal_tokens == prompt.new_tokens == 24 for prompt in report.prompts)
    json.loads(json.dumps(report.to_dict()), parse_constant=pytest.fail)


def test_the_checkpoints_own_dtype_is_the_default(tmp_path: Path) -> None:
    folder = save(tmp_path, dtype=torch.bfloat16)
    report = verify(folder, prompts=PROMPTS, max_new_tokens=8)
    assert (report.dtype, report.tokens_must_be_equal) == ("bfloat16", False)
    assert verify(folder, dtype="float32", prompts=PROMPTS, max_new_tokens=8).passed


def test_a_generation_config_does_not_change_what_greedy_means(tmp_path: Path) -> None:
    save(tmp_path)
    everything_ends = {"eos_token_id": list(range(97)), "repetition_penalty": 5.0, "top_k": 3}
    (tmp_path / "generation_config.json").write_text(json.dumps(everything_ends))
    assert verify(tmp_path, prompts=PROMPTS, max_new_tokens=8).passed


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend",
    [
        "reference",
        "sdpa",
        pytest.param(
            "triton",  # on a CPU under its interpreter
            marks=pytest.mark.skipif(not HAS_TRITON, reason="Triton is not available here"),
        ),
    ],
)
def test_prompts_may_be_ids_of_any_lengths_with_id_0_among_them(folder: Path, backend: str) -> None:
    report = verify(folder, prompts=PROMPTS, max_new_tokens=12, backend=backend)
    assert report.passed
    assert [prompt.prompt_tokens for prompt in report.prompts] == [3, 1, 7]
    assert report.backend == backend


def test_a_model_whose_logits_are_all_0_is_compared_like_any_other(tmp_path: Path) -> None:
    reference = reference_model(CONFIG)
    for parameter in reference.parameters():
        torch.nn.init.zeros_(parameter)
    reference.save_pretrained(tmp_path)
    report = verify(tmp_path, prompts=PROMPTS, max_new_tokens=4)
    assert report.passed
    assert report.logits_error == 0
    assert "nan" not in format_report(report)


def test_built_in_prompts_fit_into_a_small_context(tmp_path: Path) -> None:
    report = verify(save(tmp_path, config_of(n_positions=12)), max_new_tokens=5)
    assert report.passed
    assert max(prompt.prompt_tokens for prompt in report.prompts) == 7


@pytest.mark.parametrize(
    "changes",
    [
        {"return_dict": False},
        {"use_cache": "x"},
        {"dtype": "evil"},
        {"torch_dtype": 5},
        {"layer_types": ["odd", 7]},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"quantization_config": "fp8"},
        {"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "trust_remote_code": True},
        {"architectures": 3, "id2label": [], "problem_type": "x", "output_attentions": "yes"},
        {"rope_scaling": {"type": 9}, "is_encoder_decoder": True, "tie_encoder_decoder": True},
        {"attn_implementation": "flash_attention_9", "_attn_implementation": "evil"},
        {"attention_softmax_in_fp32": "x", "scale_attention_softmax_in_fp32": 7},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_keys_of_a_config_that_loads_do_not_disturb_transformers(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    save(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    report = verify(tmp_path, prompts=PROMPTS, max_new_tokens=4)
    assert report.passed
    assert report.reference.endswith("it read the checkpoint itself")


@pytest.mark.parametrize("text", ['{"temperature": "hot", "use_cache": []}', '{"top_k": -1}', "{}"])
def test_an_odd_generation_config_does_not_disturb_transformers(tmp_path: Path, text: str) -> None:
    save(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    assert verify(tmp_path, prompts=PROMPTS, max_new_tokens=4).passed


def test_transformers_shows_no_progress_bar_not_even_on_a_terminal(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    verify(folder, prompts=[[1]], max_new_tokens=1)
    assert "computing in transformers" in terminal.getvalue()
    assert "%|" not in terminal.getvalue()


def test_with_a_tokenizer_the_prompts_are_text(tmp_path: Path) -> None:
    add_tokenizer(save(tmp_path, config_of(vocab_size=257)))
    report = verify(tmp_path, prompts=["ab", "<|endoftext|>c"], max_new_tokens=5)
    assert report.passed
    assert [prompt.prompt_tokens for prompt in report.prompts] == [2, 2]
    assert verify(tmp_path, max_new_tokens=5).prompts[0].name == "def print_hello_world():"


# ------------------------------------------------------------------------------------- old layouts


def unprefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def with_mask_buffers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 9, 9) for i in range(2)}
    return tensors | masks


def santacoder(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries and keys with values apart, and every linear weight transposed."""
    result = {}
    for name, tensor in tensors.items():
        if ".attn." in name or ".mlp." in name:
            tensor = tensor.t().contiguous()  # of a bias too, where it changes nothing
        if ".c_attn." in name:
            q, kv = tensor.split([60, 40], dim=-1)
            result[name.replace("c_attn", "q_attn")] = q.contiguous()
            result[name.replace("c_attn", "kv_attn")] = kv.contiguous()
        else:
            result[name] = tensor
    return result


@pytest.mark.parametrize(
    ("layout", "n_inner", "reads_itself"),
    [
        (unprefixed, 136, True),
        (with_mask_buffers, 136, True),
        (santacoder, 136, False),
        (santacoder, 60, False),  # every weight square: only the names tell
    ],
)
def test_old_layouts_are_verified_and_the_report_says_who_read_them(
    tmp_path: Path,
    layout: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    n_inner: int,
    reads_itself: bool,
) -> None:
    config = config_of(n_inner=n_inner)
    tensors = dict(reference_model(config).state_dict())
    del tensors["lm_head.weight"]
    save_file(layout(tensors), tmp_path / "model.safetensors", metadata={"format": "pt"})
    values = config.to_dict()
    if layout is santacoder:
        values |= {"model_type": "gpt2", "attention_head_type": "multiquery"}
        del values["multi_query"]
    (tmp_path / "config.json").write_text(json.dumps(values))

    report = verify(tmp_path, prompts=PROMPTS, max_new_tokens=8)
    assert report.passed
    assert ("it read the checkpoint itself" in report.reference) == reads_itself
    assert ("mqa_gpt's reader gave it the weights" in report.reference) != reads_itself


# -------------------------------------------------------------------------------------- what fails


def break_models(monkeypatch: pytest.MonkeyPatch, damage: Callable[[GPT], None]) -> None:
    """Damage each model that our loader returns."""
    load = mqa_gpt.verify.compare.load_model

    def load_damaged(*args: object, **options: object) -> GPT:
        model = load(*args, **options)
        with torch.no_grad():
            damage(model)
        return model

    monkeypatch.setattr(mqa_gpt.verify.compare, "load_model", load_damaged)


def wrong_scale(model: GPT) -> None:
    for block in model.transformer.h:
        block.attn.scale *= 1.2


def wrong_activation(model: GPT) -> None:
    model.transformer.h[1].mlp.activation = "relu"


def one_position_off(model: GPT) -> None:
    model.transformer.wpe.weight.copy_(model.transformer.wpe.weight.roll(1, 0))


def one_bias_wrong(model: GPT) -> None:
    model.transformer.h[0].attn.c_proj.bias[3] += 1.0


@pytest.mark.parametrize(
    "damage", [wrong_scale, wrong_activation, one_position_off, one_bias_wrong]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_wrong_computation_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[GPT], None], dtype: str
) -> None:
    break_models(monkeypatch, damage)
    report = verify(folder, dtype=dtype, prompts=PROMPTS, max_new_tokens=16)
    assert not report.passed
    assert not report.logits_passed
    assert "logits  FAIL" in format_report(report)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_wrong_computation_of_an_unscaled_model_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    save(tmp_path, config_of(scale_attn_weights=False))
    break_models(monkeypatch, one_bias_wrong)
    assert not verify(tmp_path, dtype=dtype, prompts=PROMPTS, max_new_tokens=16).logits_passed


def test_the_limit_of_an_unscaled_model_is_measured_in_float64_throughout(tmp_path: Path) -> None:
    config = config_of(scale_attn_weights=False, initializer_range=0.5)
    report = verify(save(tmp_path, config), prompts=[PROMPTS[0]], max_new_tokens=16)
    reference = reference_model(config)
    new_ids, _ = reference_greedy(reference, [PROMPTS[0]], 16)
    ids = torch.cat([torch.tensor([PROMPTS[0]]), new_ids], dim=1)[:, :-1]
    with torch.no_grad():
        expected = reference(ids).logits
        exact = our_model(reference.double(), config, "sdpa")(ids)
    assert report.logits_limit == pytest.approx(2 * error(expected, exact), rel=1e-6)


def test_the_rule_for_16_bit_notices_an_error_of_a_few_times_the_rounding(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def round_once_more(model: GPT) -> None:
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.float8_e4m3fn))

    break_models(monkeypatch, round_once_more)
    assert not verify(folder, dtype="bfloat16", prompts=PROMPTS, max_new_tokens=16).passed


def test_tokens_are_those_of_the_path_that_users_get(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hook that reads the logits would keep `generate` from it."""
    monkeypatch.setattr(
        mqa_gpt.generation.steps, "step_forward", lambda model: lambda *inputs: -model(*inputs)
    )
    report = verify(folder, prompts=PROMPTS, max_new_tokens=4)
    assert report.logits_passed
    assert not report.tokens_passed


def test_logits_that_are_not_numbers_fail(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = mqa_gpt.verify.compare._ours

    def with_nan(*args: object) -> object:
        ids, logits, unwatched = ours(*args)
        return ids, [logits[0], logits[1] * float("nan"), *logits[2:]], unwatched

    monkeypatch.setattr(mqa_gpt.verify.compare, "_ours", with_nan)
    report = verify(folder, prompts=PROMPTS, max_new_tokens=4)
    assert report.tokens_passed
    assert not report.passed


def test_the_first_different_token_is_shown_with_the_references_margin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_tokenizer(save(tmp_path, config_of(vocab_size=257)))

    def slip(model: GPT, rows: list[list[int]], count: int, **options: object) -> list[list[int]]:
        new_ids = generate(model, rows, count, **options)
        new_ids[1][3] = (new_ids[1][3] + 1) % 257
        new_ids[1][5] = (new_ids[1][5] + 1) % 257
        return new_ids

    monkeypatch.setattr(mqa_gpt.verify.compare, "generate", slip)
    report = verify(tmp_path, prompts=PROMPTS, max_new_tokens=8)
    config = config_of(vocab_size=257)
    ids, logits = reference_greedy(reference_model(config), [PROMPTS[1]], 8)
    expected = int(ids[0, 3])
    first, second = logits[0, 3].topk(2).values.tolist()

    assert not report.tokens_passed
    assert [prompt.equal_tokens for prompt in report.prompts] == [8, 3, 8]
    divergence = report.prompts[1].divergence
    assert divergence is not None
    assert (divergence.position, divergence.ours) == (3, (expected + 1) % 257)
    assert divergence.reference == expected
    assert divergence.margin == pytest.approx(first - second, rel=1e-3)
    text = format_report(report)
    assert "tokens  FAIL  19 of 24 greedy tokens equal" in text
    assert f"new token 3 is {divergence.ours} {divergence.ours_text!r} here" in text
    assert f"and {expected} {divergence.reference_text!r} in transformers" in text


def test_a_report_shows_control_characters_as_escapes(tmp_path: Path) -> None:
    add_tokenizer(save(tmp_path, config_of(vocab_size=257)))
    report = verify(tmp_path, prompts=["G\n"], max_new_tokens=2)
    assert report.prompts[0].name == "G\n"
    assert "  G\\n\n" in format_report(report)


# ------------------------------------------------------------------------------------ bad requests


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, rf"not installed: run {re.escape(INSTALL_PEERS)} in the checkout$"),
        ("4.54.0", "4.54.0 cannot be the reference.*head dim"),
        ("4.54.1", "4.54.1 cannot be the reference.*head dim"),
        ("4.55.0", "4.55.0 cannot be the reference.*head dim"),
        ("4.53.3", "4.53.3 is too old"),
        ("4.55.1", "4.55.1 is too old"),
        ("4.57.6", "4.57.6 is too old"),
    ],
)
def test_a_transformers_that_cannot_be_the_reference_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, message: str
) -> None:
    monkeypatch.setattr(mqa_gpt.verify.compare, "version", lambda package: version)
    with pytest.raises(InputError, match=message):
        verify(folder)


@pytest.mark.parametrize("version", ["5.0.0", "5.17.0", "5.24.0.dev0"])
def test_newer_versions_are_accepted(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(mqa_gpt.verify.compare, "version", lambda package: version)
    assert mqa_gpt.verify.compare.require_transformers() == version


@pytest.mark.parametrize(
    ("prompts", "max_new_tokens", "message"),
    [
        ([], 4, "prompts is empty"),
        ([[1, 97]], 4, "prompt 0 holds 97"),
        ([[1], [2] * 110], 4, "prompt 1 has 110 tokens.*context of 112"),
        ([[1]], 0, "max_new_tokens is 0"),
        ([[1]], "4", "max_new_tokens is '4'"),
        ("text", 4, "prompts is 'text': give a list of texts or of token ids"),
        (b"text", 4, "prompts is b'text'"),
        (5, 4, "prompts is 5"),
        (None, 112, "context of 112"),
    ],
)
def test_unusable_prompts_are_errors_before_anything_is_loaded(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    prompts: list[list[int]] | None,
    max_new_tokens: int,
    message: str,
) -> None:
    monkeypatch.setattr(mqa_gpt.verify.compare, "load_model", pytest.fail)
    with pytest.raises(PromptError, match=message):
        verify(folder, prompts=prompts, max_new_tokens=max_new_tokens)


def test_text_prompts_need_a_tokenizer(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json"):
        verify(folder, prompts=["def f():"])


def test_a_folder_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        verify(tmp_path / "nothing")


def test_the_verbosity_of_transformers_is_restored(folder: Path) -> None:
    for level in (logging.INFO, logging.ERROR):
        logging.set_verbosity(level)
        verify(folder, prompts=[[1]], max_new_tokens=1)
        assert logging.get_verbosity() == level
        assert logging.is_progress_bar_enabled()


def test_an_8_bit_cache_is_reported_and_claims_nothing():
    report = verify(DEMO_DIR, cache_dtype="int8", dtype="float32", max_new_tokens=8)
    assert report.logits_limit is None
    assert not report.tokens_must_be_equal
    assert report.passed
    assert 1e-4 < report.logits_error < 0.05
    assert all(min(prompt.absolute_error) > 1e-3 for prompt in report.prompts)  # prompts too
    assert report.loss != report.reference_loss
