"""8-bit weights are the nearest ones, survive saving, and are computed with as they are."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPTBigCodeForCausalLM

from mqa_gpt import GPT, LLM, generate
from mqa_gpt.checkpoints.load import DEMO_DIR
from mqa_gpt.errors import CheckpointError, InputError
from mqa_gpt.fast import int8 as quantization
from mqa_gpt.fast import packing
from mqa_gpt.fast.int8 import (
    CONFIG_ENTRY,
    CONFIG_KEY,
    Int8Linear,
    quantize,
    quantize_rows,
    reads_integers,
)
from mqa_gpt.fast.packing import PackedInt8Linear, can_pack, pack
from mqa_gpt.verify.compare import verify
from tests.helpers import (
    our_model,
    random_ids,
    random_prompts,
    reference_model,
    relative_error,
    tiny_config,
)

needs_int8_products = pytest.mark.skipif(
    not can_pack(Int8Linear(nn.Linear(1, 1))), reason="this torch has no 8-bit products"
)


PRODUCTS = {"FBGEMM": packing._FBGEMMProduct, "oneDNN": packing._OneDNNProduct}


@pytest.fixture(params=PRODUCTS)
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "FBGEMM" and not packing.has_fbgemm():
        pytest.skip("this torch has no FBGEMM products")
    monkeypatch.setattr(packing, "fbgemm_is_faster", lambda: request.param == "FBGEMM")
    return request.param


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


@needs_int8_products
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_when_packed(product, bad: float):
    linear = nn.Linear(4, 3)
    whole = PackedInt8Linear(Int8Linear(linear))
    with torch.no_grad():
        linear.weight[1, 2] = bad
    with torch.inference_mode():
        y = PackedInt8Linear(Int8Linear(linear))(torch.ones(1, 4))
        assert y.isfinite().tolist() == [[True, False, True]]
        rows = torch.ones(3, 4)
        rows[1, 0] = bad
        finite = whole(rows).isfinite()
    assert finite.all(1).tolist() == [True, False, True]


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


@needs_int8_products
@pytest.mark.parametrize("bits", [8, 7])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 17, 64, 300])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_rounds_each_row_once_more_and_no_further(
    product, monkeypatch, rows, bias, bits
):
    if bits == 7:
        monkeypatch.setattr(packing, "_holds_8_bits", lambda product: False)
    elif not packing._holds_8_bits(PRODUCTS[product]):
        pytest.skip(f"{product} adds in 16 bits here")
    layer = Int8Linear(nn.Linear(71, 45, bias=bias))
    x = torch.randn(rows, 71) * torch.logspace(-3, 3, rows)[:, None]
    largest = 127 if bits == 8 else 63
    step = x.abs().amax(1, keepdim=True) / largest  # (R, 1)
    rounded = (x / step).round() * step
    with torch.inference_mode():
        packed = PackedInt8Linear(layer)
        y, expected = packed(x), F.linear(rounded, layer.weight * layer.weight_scale[:, None])
        if bias:
            expected += layer.bias
        assert (y - expected).abs().amax(1).le(1e-4 * expected.abs().amax(1)).all()
        assert packed(x[:, None]).shape == (rows, 1, 45)


@needs_int8_products
def test_a_row_does_not_depend_on_the_other_rows(product):
    packed = PackedInt8Linear(Int8Linear(nn.Linear(40, 30)))
    x = torch.randn(4, 40)
    with torch.inference_mode():
        together = packed(x * torch.tensor([[1.0], [1000.0], [1e-3], [0.0]]))
        assert torch.allclose(together[:1], packed(x[:1]), rtol=1e-6, atol=1e-6)
        assert torch.equal(together[3], packed.bias)


@needs_int8_products
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_model_is_close_to_the_model_and_cannot_be_edited(product, dtype, tmp_path):
    model = tiny_model().to(dtype)
    quantize(model)
    packed = copy.deepcopy(model)
    pack(packed)
    ids = random_ids(model.config, 2, 20)
    with torch.inference_mode():
        logits = packed(ids)
        assert logits.dtype == dtype
        assert (logits - model(ids)).float().norm() < 0.1 * model(ids).float().norm()
    with pytest.raises(InputError, match="cannot be saved"):
        packed.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="cannot be copied"):
        copy.deepcopy(packed)
    with pytest.raises(AttributeError, match="cannot be read"):
        packed.lm_head.weight_scale.zero_()


@needs_int8_products
@pytest.mark.parametrize("has_tiles", [True, False])
def test_fbgemm_is_chosen_unless_the_processor_has_tiles_or_torch_lacks_it(monkeypatch, has_tiles):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_tiles)
    monkeypatch.setattr(packing, "has_fbgemm", lambda: True)
    assert packing.fbgemm_is_faster() == (not has_tiles)
    monkeypatch.setattr(packing, "has_fbgemm", lambda: False)
    assert not packing.fbgemm_is_faster()


@needs_int8_products
def test_a_torch_without_quantized_tensors_packs_for_onednn(monkeypatch):
    monkeypatch.delattr(torch, "_make_per_channel_quantized_tensor")
    assert not packing.has_fbgemm()
    layer = Int8Linear(nn.Linear(40, 30))
    with torch.inference_mode():
        x = torch.randn(2, 40)
        assert relative_error(PackedInt8Linear(layer)(x), layer(x)) < 0.02


@needs_int8_products
def test_asking_for_fbgemm_where_it_is_missing_is_refused(monkeypatch):
    monkeypatch.setattr(packing, "has_fbgemm", lambda: False)
    with pytest.raises(ValueError, match="no 8-bit products by FBGEMM"):
        PackedInt8Linear(Int8Linear(nn.Linear(4, 3)), fbgemm=True)


@pytest.mark.slow
@needs_int8_products
@pytest.mark.parametrize(
    ("name", "value"), [("FBGEMM_ENABLE_INSTRUCTIONS", "AVX2"), ("ONEDNN_MAX_CPU_ISA", "AVX2")]
)
@pytest.mark.parametrize("fbgemm", [True, False])
def test_a_library_that_adds_in_16_bits_gets_7_bit_rows(name, value, fbgemm):
    if fbgemm and not packing.has_fbgemm():
        pytest.skip("this torch has no FBGEMM products")
    code = f"""
import torch
from mqa_gpt.fast.packing import PackedInt8Linear
from mqa_gpt.fast.int8 import Int8Linear
layer = Int8Linear(torch.nn.Linear(512, 8))
layer.weight.fill_(127)
with torch.inference_mode():
    x = torch.ones(1, 512)
    packed = PackedInt8Linear(layer, fbgemm={fbgemm})
    assert torch.allclose(packed(x), layer(x), rtol=1e-3), (packed(x), layer(x))
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {name: value})


@needs_int8_products
@pytest.mark.parametrize("size", [1e37, 1e-37])
def test_rows_of_any_size_are_rounded_alike(product, size):
    packed = PackedInt8Linear(Int8Linear(nn.Linear(40, 30, bias=False)))
    x = torch.randn(2, 40)
    with torch.inference_mode():
        assert relative_error(packed(x * size) / size, packed(x)) < 1e-3


@needs_int8_products
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_packing_does_not_depend_on_torchs_defaults(product, monkeypatch, dtype):
    layer, x = Int8Linear(nn.Linear(40, 30)), torch.randn(2, 40)
    packing._holds_8_bits.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            packed = PackedInt8Linear(layer)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.inference_mode():
        assert relative_error(packed(x), layer(x)) < 0.02


@needs_int8_products
def test_packing_says_nothing_of_what_is_deprecated(product, recwarn):
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # not once in a process
    try:
        PackedInt8Linear(Int8Linear(nn.Linear(4, 3)))
    finally:
        torch.set_warn_always(always)
    assert not recwarn.list


def test_a_batch_gives_each_rows_own_tokens():
    model = tiny_model()
    quantize(model)
    prompts = random_prompts(model.config, [9, 30, 1])
    together = generate(model, prompts, 32)
    assert together == [generate(model, [prompt], 32)[0] for prompt in prompts]


@needs_int8_products
def test_llm_loads_8_bits_packed():
    llm = LLM.load(quantize="int8", dtype="float32")
    assert isinstance(llm.model.lm_head, PackedInt8Linear)
    assert not any(isinstance(layer, (nn.Linear, Int8Linear)) for layer in llm.model.modules())
    assert llm.generate("def f(", max_new_tokens=4).token_ids


# ----------------------------------------------------------------------------------------- on disk


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
