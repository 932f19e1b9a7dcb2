"""Packed weights give the plain model's results, and give its memory back."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from mqa_gpt import GPT, InputError, generate
from mqa_gpt.fast import packing
from mqa_gpt.fast.packing import PackedLinear, can_pack, pack

# Before any test replaces it.
from mqa_gpt.fast.packing import reads_plain_layout_fast as asked_of_the_processor
from tests.helpers import (
    error,
    our_model,
    random_ids,
    random_prompts,
    reference_greedy,
    reference_model,
    relative_error,
    tiny_config,
    tiny_model,
)

pytestmark = pytest.mark.skipif(
    not can_pack(nn.Linear(1, 1)), reason="this torch has no packed oneDNN products"
)
needs_bfloat16 = pytest.mark.skipif(
    not can_pack(nn.Linear(1, 1, dtype=torch.bfloat16)), reason="no AVX512-BF16 here"
)


@pytest.fixture(params=[False, True], ids=["slow plain", "fast plain"], autouse=True)
def plain_is_fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(packing, "reads_plain_layout_fast", lambda: request.param)
    return request.param


def packed_model(**changes: object) -> tuple[GPT, GPT]:
    config = tiny_config(**changes)
    plain = our_model(reference_model(config), config)
    packed = copy.deepcopy(plain)
    pack(packed)
    return plain, packed


@pytest.mark.parametrize("repeat_to", [1, 4])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 8, 17, 64, 300])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_computes_what_the_plain_one_does_for_any_number_of_rows(
    repeat_to, rows, bias
):
    plain = nn.Linear(71, 45, bias=bias)
    packed = PackedLinear(plain, repeat_to)
    x = torch.randn(rows, 71)
    with torch.inference_mode():
        expected = plain(x)
        for leading in [(rows,), (rows, 1), (1, rows), *([()] if rows == 1 else [])]:
            y = packed(x.view(*leading, 71))
            assert y.shape == (*leading, 45)
            assert rows == 0 or relative_error(y.view(rows, 45), expected) < 2e-6


@pytest.mark.parametrize("few_are_slow", [False, True])
def test_one_and_two_rows_are_multiplied_as_four_where_that_is_faster(monkeypatch, few_are_slow):
    monkeypatch.setattr(packing, "few_rows_are_slow", lambda: few_are_slow)
    multiplied = []
    product = PackedLinear._product

    def noting(layer: PackedLinear, x: torch.Tensor) -> torch.Tensor:
        multiplied.append(x.shape[:-1].numel())
        return product(layer, x)

    monkeypatch.setattr(PackedLinear, "_product", noting)
    packed = PackedLinear(nn.Linear(8, 8))
    for shape in [(1, 1, 8), (2, 1, 8), (1, 2, 8), (3, 1, 8), (8, 1, 8)]:
        packed(torch.randn(shape))
    assert multiplied == ([4, 4, 4, 3, 8] if few_are_slow else [1, 2, 2, 3, 8])


@pytest.mark.parametrize(
    ("name", "capability", "are_slow"),
    [
        ("AMD EPYC 9B45", "AVX512", True),
        ("AMD EPYC 7B13", "AVX2", False),
        ("Intel(R) Xeon(R) Platinum 8481C", "AVX512", False),
    ],
)
def test_few_rows_are_slow_on_amds_processors_with_avx512(monkeypatch, name, capability, are_slow):
    monkeypatch.setattr(packing, "cpu_name", lambda: name)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert packing.few_rows_are_slow() == are_slow


@needs_bfloat16
@pytest.mark.parametrize("rows", [1, 2, 4, 17, 300])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_in_bfloat16_is_as_exact_as_the_plain_one(rows, bias):
    plain = nn.Linear(71, 45, bias=bias, dtype=torch.bfloat16)
    x = torch.randn(rows, 71, dtype=torch.bfloat16)
    with torch.inference_mode():
        exact = copy.deepcopy(plain).double()(x.double())
        packed = PackedLinear(plain)(x)
        assert packed.dtype == torch.bfloat16
        assert error(packed, exact) <= 1.01 * error(plain(x), exact)


@needs_bfloat16
def test_bfloat16_is_packed_throughout_whatever_is_fast_in_float32(plain_is_fast):
    config = tiny_config()
    model = our_model(reference_model(config).bfloat16(), config)
    pack(model)
    assert not any(isinstance(layer, nn.Linear) for layer in model.modules())


@pytest.mark.parametrize("changes", [{}, {"multi_query": False}, {"tie_word_embeddings": False}])
def test_a_packed_model_gives_transformers_tokens_and_logits(changes):
    plain, packed = packed_model(**changes)
    prompts = random_prompts(plain.config, [9, 30, 1])
    expected, _ = reference_greedy(reference_model(plain.config), prompts, 64)
    assert generate(packed, prompts, 64) == expected.tolist()
    ids = random_ids(plain.config, 3, 20)
    with torch.inference_mode():
        assert relative_error(packed(ids), plain(ids)) < 2e-5


def test_a_packed_model_runs_without_asking_for_no_gradients():
    config = tiny_config()
    model = our_model(reference_model(config), config)
    ids = torch.tensor([[1, 2, 3]])
    expected = model(ids)
    pack(model)
    assert relative_error(model(ids), expected) < 1e-5


def test_every_linear_layer_is_packed_or_where_the_plain_layout_is_fast_the_head(plain_is_fast):
    plain, packed = packed_model()
    layers = {n for n, m in packed.named_modules() if isinstance(m, PackedLinear)}
    linear = {n for n, m in plain.named_modules() if isinstance(m, nn.Linear)}
    assert layers == ({"lm_head"} if plain_is_fast else linear)
    left = {n for n, m in packed.named_modules() if isinstance(m, nn.Linear)}
    assert left == linear - layers


@pytest.mark.parametrize(
    ("name", "capability", "is_fast"),
    [
        ("Intel(R) Xeon(R) Platinum 8481C", "AVX512", True),
        ("Intel(R) Xeon(R) Platinum 8481C", "AVX2", False),
        ("AMD EPYC 9B45", "AVX512", False),
        ("aarch64", "DEFAULT", False),
    ],
)
def test_the_plain_layout_is_fast_on_processors_that_mkl_has_avx512_for(
    monkeypatch, name, capability, is_fast
):
    monkeypatch.setattr(packing, "cpu_name", lambda: name)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert asked_of_the_processor() == is_fast


def test_the_embedding_of_a_tied_head_stays_plain():
    plain, packed = packed_model()
    assert torch.equal(packed.transformer.wte.weight, plain.transformer.wte.weight)


def test_a_plain_weight_is_given_up_before_the_next_is_packed(monkeypatch):
    monkeypatch.setattr(packing, "reads_plain_layout_fast", lambda: False)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    weights = [weakref.ref(layer.weight) for layer in model]
    alive: list[int] = []
    init = PackedLinear.__init__

    def counting(self: PackedLinear, linear: nn.Linear) -> None:
        alive.append(sum(weight() is not None for weight in weights))
        init(self, linear)

    monkeypatch.setattr(PackedLinear, "__init__", counting)
    pack(model)
    assert alive == [4, 3, 2, 1]
    assert not list(model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_not_packed(dtype):
    model = nn.Linear(4, 4).to(dtype)
    assert not can_pack(model)
    with pytest.raises(ValueError, match="float32"):
        pack(model)


@pytest.mark.parametrize("processor", [False, True])
@pytest.mark.parametrize("onednn", [False, True])
def test_bfloat16_is_packed_where_the_processor_has_it_and_onednn_uses_it(
    monkeypatch, processor, onednn
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: processor)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    assert can_pack(nn.Linear(4, 4, dtype=torch.bfloat16)) == (processor and onednn)


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_what_is_counted_for_packing_is_the_largest_layer_in_the_dtype_asked_for(
    monkeypatch, has_bfloat16, plain_is_fast
):
    monkeypatch.setattr(packing, "_multiplies_bfloat16", lambda: has_bfloat16)
    model, cpu = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 50)), torch.device("cpu")
    largest = 8 * 50
    in_float32 = 0 if plain_is_fast else 4 * largest  # there is no head in it
    assert packing.packing_bytes(model, torch.float32, cpu) == in_float32
    assert packing.packing_bytes(model, torch.bfloat16, cpu) == 2 * largest * has_bfloat16
    assert packing.packing_bytes(model, torch.float16, cpu) == 0


def test_each_layer_is_packed_by_its_own_dtype(monkeypatch):
    monkeypatch.setattr(packing, "reads_plain_layout_fast", lambda: False)
    model = nn.Sequential(nn.Embedding(3, 8).bfloat16(), nn.Linear(8, 8), nn.Linear(8, 8).half())
    pack(model)
    assert [type(layer) for layer in model] == [nn.Embedding, PackedLinear, nn.Linear]


def test_what_packed_weights_cannot_do_is_refused(tmp_path):
    _, packed = packed_model()
    refused = [
        lambda: packed.save_pretrained(tmp_path / "out"),
        lambda: packed.state_dict(),
        lambda: copy.deepcopy(packed),
        lambda: pickle.dumps(packed.lm_head),
        lambda: packed.requires_grad_()(torch.tensor([[1, 2]])),
        lambda: packed.to(torch.bfloat16),
        lambda: packed.lm_head.weight.zero_(),
    ]
    for action in refused:
        with pytest.raises(
            (InputError, RuntimeError, AttributeError), match=r"GPT\.from_pretrained"
        ):
            action()
    assert not (tmp_path / "out").exists()


def test_a_packed_model_says_that_it_cannot_be_trained() -> None:
    model = tiny_model()
    pack(model)
    model.eval()
    with pytest.raises(RuntimeError, match=r"packed weights cannot be trained: load .* GPT\.from"):
        model.train()


@pytest.mark.parametrize("change", ["train", "half", "double", "cpu"])
def test_what_a_packed_model_refuses_leaves_all_of_it_as_it_was(change: str) -> None:
    model = tiny_model()
    pack(model)
    model.eval()
    with pytest.raises(RuntimeError, match="packed weights cannot be"):
        getattr(model, change)()
    assert not any(module.training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_packed_model_is_freed_without_the_garbage_collector() -> None:
    model = tiny_model()
    pack(model)
    alive = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()
