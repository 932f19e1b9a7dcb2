"""8-bit weights are the nearest ones, survive saving, and are computed with as they are."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPTBigCodeForCausalLM

from mqa_gpt import GPT, generate
from mqa_gpt.checkpoints.load import DEMO_DIR
from mqa_gpt.errors import CheckpointError, InputError
from mqa_gpt.fast import int8 as quantization
from mqa_gpt.fast.int8 import (
    CONFIG_ENTRY,
    CONFIG_KEY,
    Int8Linear,
    quantize,
    quantize_rows,
    reads_integers,
)
from mqa_gpt.verify.compare import verify
from tests.helpers import (
    our_model,
    random_ids,
    random_prompts,
    reference_model,
    relative_error,
    tiny_config,
)


def tiny_model(**changes: object) -> GPT:
    config = tiny_config(**changes)
    return our_model(reference_model(config), config)


def dequantized(model: GPT) -> GPT:
    """A plain model whose weights are those that the 8-bit model stands for."""
    plain = GPT(model.config).to(model.dtype).eval()
    state = {}
    for name, tensor in model.state_dict().items():
        if f"{name}_scale" in model.state_dict():
            tensor = tensor * model.state_dict()[f"{name}_scale"][:, None]
        if not name.endswith("_scale"):
            state[name] = tensor
    plain.load_state_dict(state)
    return plain


# ------------------------------------------------------------------------------------- the weights


def test_every_weight_becomes_the_nearest_multiple_of_its_rows_scale():
    weight = torch.randn(50, 33)
    integers, scale = quantize_rows(weight)
    assert integers.dtype == torch.int8
    assert torch.equal(integers.abs().amax(1), torch.full((50,), 127, dtype=torch.int8))
    assert torch.allclose(scale, weight.abs().amax(1) / 127)
    error = (integers * scale[:, None] - weight).abs()
    assert (error <= scale[:, None] / 2 * 1.0001).all()


def test_the_most_negative_weight_counts_as_much_as_the_largest():
    integers, scale = quantize_rows(torch.tensor([[1.0, -2.0], [2.0, -1.0]]))
    assert integers.tolist() == [[64, -127], [127, -64]]
    assert torch.allclose(scale, torch.tensor([2 / 127, 2 / 127]))


def test_a_row_of_zeros_stays_zero():
    integers, scale = quantize_rows(torch.zeros(2, 3))
    assert not integers.any()
    assert not scale.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_stays_so(bad: float):
    linear = nn.Linear(4, 3)
    with torch.no_grad():
        linear.weight[1, 2] = bad
        y = Int8Linear(linear)(torch.ones(1, 4))
    assert y.isfinite().tolist() == [[True, False, True]]


def test_quantizing_while_loading_is_quantizing_what_was_loaded(tmp_path: Path):
    tiny_model().save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path, quantize="int8")
    later = GPT.from_pretrained(tmp_path)
    quantize(later)
    assert loaded.state_dict().keys() == later.state_dict().keys()
    assert all(torch.equal(t, later.state_dict()[n]) for n, t in loaded.state_dict().items())


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_tied_as_before(tmp_path: Path, tied: bool):
    model = tiny_model(tie_word_embeddings=tied)
    quantize(model)
    model.save_pretrained(tmp_path)
    for checked in (model, GPT.from_pretrained(tmp_path)):
        assert (checked.lm_head.weight is checked.transformer.wte.weight) == tied
        assert (checked.lm_head.weight_scale is checked.transformer.wte.weight_scale) == tied


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_leaves_integers_and_scales_as_they_are(dtype, tmp_path: Path):
    model = tiny_model()
    quantize(model)
    before = {n: t.clone() for n, t in model.state_dict().items() if n.endswith("_scale")}
    model.to(dtype)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())
    assert model.lm_head.weight.dtype == torch.int8
    ids = random_ids(model.config, 1, 3)
    assert model.transformer.wte(ids).dtype == model(ids).dtype == dtype
    model.save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    assert all(torch.equal(loaded.state_dict()[n], t) for n, t in model.state_dict().items())


def test_a_model_that_is_moved_keeps_its_head_tied(tmp_path: Path):
    model = tiny_model()
    quantize(model)
    model._apply(lambda tensor: tensor.clone())  # what moving does to each tensor
    assert model.lm_head.weight is model.transformer.wte.weight
    model.save_pretrained(tmp_path)


def test_nothing_large_is_left_in_floats():
    model = tiny_model()
    quantize(model)
    floats = {n for n, p in model.named_parameters() if p.is_floating_point() and p.ndim > 1}
    assert floats == {"transformer.wpe.weight"}


# ------------------------------------------------------------------------------------- computation


@pytest.mark.parametrize("changes", [{}, {"multi_query": False}, {"tie_word_embeddings": False}])
def test_the_model_computes_with_the_weights_that_the_integers_stand_for(changes):
    model = tiny_model(**changes)
    quantize(model)
    ids = random_ids(model.config, 2, 20)
    with torch.inference_mode():
        assert relative_error(model(ids), dequantized(model)(ids)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bit_the_product_is_as_exact_as_with_the_same_weights_rounded(dtype):
    x, linear = torch.randn(5, 64), nn.Linear(64, 40)
    layer = Int8Linear(linear)
    exact = F.linear(x, layer.weight * layer.weight_scale[:, None], layer.bias)
    plain = nn.Linear(64, 40).to(dtype)
    with torch.no_grad():
        plain.weight.copy_(layer.weight * layer.weight_scale[:, None])
        plain.bias.copy_(layer.bias)
        error = (layer.to(dtype)(x.to(dtype)) - exact).abs().max()
        assert error <= 2 * (plain(x.to(dtype)) - exact).abs().max() + 1e-5


def test_a_gpu_reads_the_integers_of_up_to_64_rows_where_no_gradient_is_needed():
    pytest.importorskip("triton")
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 1)
    with torch.no_grad():
        for dtype, most in ((torch.float32, 16), (torch.bfloat16, 64), (torch.float16, 64)):
            assert [reads_integers(gpu, dtype, rows) for rows in (0, 1, most, most + 1)] == [
                *(False, True, True, False)
            ]
            assert not reads_integers(cpu, dtype, 1)
        assert not reads_integers(gpu, torch.float64, 1)
    assert not reads_integers(gpu, torch.bfloat16, 1)


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48,), (5, 48), (4, 9, 48)], ids=str)
def test_a_layer_that_reads_its_integers_is_as_exact_as_one_that_makes_floats(
    monkeypatch, shape, bias
):
    kernels = pytest.importorskip("mqa_kernels")
    if not kernels.runs_on(torch.device("cpu")):
        pytest.skip("the kernels are for the GPU where there is one")
    layer = Int8Linear(nn.Linear(48, 70, bias=bias)).bfloat16()
    x = torch.randn(2, *shape).bfloat16()[1]
    exact = F.linear(x.float(), layer.weight * layer.weight_scale[:, None])
    with torch.inference_mode():
        if bias:
            exact = exact + layer.bias.float()
        plain = layer(x)
        rows = []
        monkeypatch.setattr(
            quantization, "reads_integers", lambda _, dtype, R: rows.append(R) or True
        )
        monkeypatch.setattr(quantization.F, "linear", None)
        y = layer(x)
        assert rows == [x.numel() // 48]
        assert y.shape == plain.shape
        assert (y - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-5
        apart = x.new_zeros(*shape[:-1], 96)[..., ::2].copy_(x)  # strides that no kernel takes
        assert torch.equal(layer(apart), y)


def test_a_batch_gives_each_rows_own_tokens():
    model = tiny_model()
    quantize(model)
    prompts = random_prompts(model.config, [9, 30, 1])
    together = generate(model, prompts, 32)
    assert together == [generate(model, [prompt], 32)[0] for prompt in prompts]


@pytest.mark.parametrize("changes", [{}, {"multi_query": False}, {"tie_word_embeddings": False}])
@pytest.mark.parametrize("max_shard_size", ["5GB", 20_000])
def test_a_saved_model_loads_bit_for_bit(tmp_path: Path, changes, max_shard_size):
    model = tiny_model(**changes)
    quantize(model)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    for method in (None, "int8"):
        loaded = GPT.from_pretrained(tmp_path, quantize=method)
        state, expected = loaded.state_dict(), model.state_dict()
        assert state.keys() == expected.keys()
        assert all(state[n].dtype == t.dtype for n, t in expected.items())
        assert all(torch.equal(state[n], t) for n, t in expected.items())
    loaded = GPT.from_pretrained(tmp_path, dtype="bfloat16")
    assert loaded.dtype == loaded(random_ids(model.config, 1, 3)).dtype == torch.bfloat16
    assert loaded.lm_head.weight_scale.dtype == torch.float32


def test_the_file_is_about_a_quarter_of_float32s(tmp_path: Path):
    GPT.from_pretrained(DEMO_DIR, dtype="float32").save_pretrained(tmp_path / "full")
    GPT.from_pretrained(DEMO_DIR, dtype="float32", quantize="int8").save_pretrained(tmp_path / "q")
    full, small = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "q"))
    assert small < 0.3 * full


def test_floats_where_the_config_says_8_bits_are_refused_by_name(tmp_path: Path):
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {CONFIG_KEY: CONFIG_ENTRY}))
    with pytest.raises(CheckpointError, match=r"c_attn\.weight has the dtype F32: only I8"):
        GPT.from_pretrained(tmp_path)


def test_a_plain_model_with_the_config_of_an_8_bit_one_is_saved_as_what_it_is(tmp_path: Path):
    model = tiny_model()
    quantize(model)
    model.save_pretrained(tmp_path / "8")
    plain = GPT(GPT.from_pretrained(tmp_path / "8").config)
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(GPT.from_pretrained(tmp_path / "plain").lm_head.weight, plain.lm_head.weight)


def test_transformers_refuses_8_bits_instead_of_taking_them_for_weights(tmp_path: Path):
    model = tiny_model()
    quantize(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quant_method"):
        GPTBigCodeForCausalLM.from_pretrained(tmp_path)


def test_a_model_is_quantized_once():
    model = tiny_model()
    quantize(model)
    with pytest.raises(ValueError, match="8-bit integers already"):
        quantize(model)


def test_an_unknown_way_to_quantize_is_refused():
    with pytest.raises(InputError, match="quantize is 'int3': expected int8"):
        GPT.from_pretrained(DEMO_DIR, quantize="int3")


def test_memory_is_counted_in_8_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    GPT.from_pretrained(DEMO_DIR, dtype="float32").save_pretrained(tmp_path)
    parameters = sum(p.numel() for p in GPT.from_pretrained(tmp_path).parameters())
    monkeypatch.setattr(
        "mqa_gpt.checkpoints.placement.available_memory", lambda device: 3 * parameters
    )
    with pytest.raises(CheckpointError, match="needs"):
        GPT.from_pretrained(tmp_path, device="cpu")
    assert GPT.from_pretrained(tmp_path, device="cpu", quantize="int8")


# ------------------------------------------------------------------------------------------- proof


def test_verify_reports_how_far_the_approximation_is_off_and_claims_nothing():
    report = verify(DEMO_DIR, quantize="int8", dtype="float32", max_new_tokens=8)
    assert report.logits_limit is None
    assert not report.tokens_must_be_equal
    assert report.passed
    assert 1e-4 < report.logits_error < 0.1
    assert report.loss != report.reference_loss
    assert report.loss == pytest.approx(report.reference_loss, abs=0.1)
    assert not dataclasses.replace(report, logits_error=float("nan")).passed


def test_verify_does_not_compare_8_bits_with_themselves(tmp_path: Path):
    GPT.from_pretrained(DEMO_DIR, quantize="int8").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="verify the checkpoint that they were made from"):
        verify(tmp_path)
