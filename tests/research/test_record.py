"""record: values, names, gradients, and that nothing else changes."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F

from mqa_gpt import GPT, DraftModel, InputError, KVCache, generate
from mqa_gpt.attention import is_own
from mqa_gpt.checkpoints.load import DEMO_DIR
from mqa_gpt.fast.int8_cache import Int8KVCache
from mqa_gpt.fast.plain import is_plain
from mqa_gpt.generation.prefill import prefill
from mqa_gpt.research import patch, record, replace, zero
from mqa_gpt.research.points import _LENS, _LENS_IN_LAYER
from tests.helpers import (
    error,
    our_model,
    random_ids,
    random_prompts,
    reference_model,
    relative_error,
    tiny_config,
    tiny_model,
)

CONFIG = tiny_config()
EVERYTHING = [
    "transformer.*",
    "transformer.h.*",
    "transformer.h.*.*",
    "transformer.h.*.attn.*",
    "transformer.h.*.mlp.*",
    "logits",
]
IN_ATTENTION = ["transformer.h.*.attn.scores", "transformer.h.*.attn.probs"]
OUTSIDE = [
    *(name for name in EVERYTHING if name not in ("transformer.h.*.attn.*", "logits")),
    *(f"transformer.h.*.attn.{name}" for name in ("q", "k", "v", "z", "result", "c_proj")),
]


@pytest.fixture(scope="module")
def model() -> GPT:
    return tiny_model()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return random_ids(CONFIG, 2, 9)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"multi_query": False}, {"scale_attn_weights": False}])
def test_it_is_what_transformers_gives(ids: torch.Tensor, changes: dict[str, object]) -> None:
    config = tiny_config(**changes)
    reference = reference_model(config).double()  # of which transformers' softmax is in float32
    theirs = reference(ids, output_hidden_states=True, output_attentions=True)
    model = our_model(reference, config)
    names = ["transformer.h.*.resid_pre", "transformer.ln_f", "transformer.h.*.attn.probs"]
    with record(model, [*names, "lm_head"]) as acts:
        model(ids)
    streams = torch.cat([acts["transformer.h.*.resid_pre"], acts["transformer.ln_f"][None]])
    assert relative_error(streams, torch.stack(theirs.hidden_states)) < 2e-6
    assert error(acts["transformer.h.*.attn.probs"], torch.stack(theirs.attentions)) < 2e-6
    assert relative_error(acts["logits"], theirs.logits) < 2e-6


@torch.no_grad()
@pytest.mark.parametrize("multi_query", [True, False])
def test_the_points_of_a_layer_are_related_as_the_textbook_says(multi_query: bool) -> None:
    model = tiny_model(multi_query=multi_query)
    with record(model, EVERYTHING) as acts:
        model(random_ids(CONFIG, 2, 9))
    block, name = model.transformer.h[1], "transformer.h.1"
    got = {key: acts[f"{name}.{key}"] for key in ("resid_pre", "resid_mid", "resid_post")}
    got |= {key: acts[f"{name}.attn.{key}"] for key in ("q", "k", "v", "scores", "probs", "z")}
    got |= {key: acts[f"{name}.attn.{key}"] for key in ("result", "k_read", "v_read")}
    q, k, v = got["q"], got["k"], got["v"]
    H = CONFIG.n_head
    assert torch.equal(got["k_read"], k.expand(-1, -1, H, -1))
    assert torch.equal(got["v_read"], v.expand(-1, -1, H, -1))
    scores = torch.einsum("bthd,bshd->bhts", q, got["k_read"]) * block.attn.scale
    hidden = torch.ones(9, 9).triu(1).bool()
    assert torch.allclose(got["scores"], scores.masked_fill(hidden, -torch.inf), atol=1e-5)
    assert torch.allclose(got["probs"], got["scores"].softmax(-1), atol=1e-6)
    z = torch.einsum("bhts,bshd->bthd", got["probs"], got["v_read"])
    assert torch.allclose(got["z"], z, atol=1e-5)
    out = got["result"].sum(2) + block.attn.c_proj.bias
    assert torch.allclose(acts[f"{name}.attn"], out, atol=1e-4)
    assert torch.equal(got["resid_mid"], got["resid_pre"] + acts[f"{name}.attn"])
    assert torch.equal(acts[f"{name}.ln_2"], block.ln_2(got["resid_mid"]))
    assert torch.equal(acts[f"{name}.mlp.post"], block.mlp.activate(acts[f"{name}.mlp.pre"]))
    assert torch.equal(got["resid_post"], got["resid_mid"] + acts[f"{name}.mlp"])
    assert torch.equal(got["resid_pre"], acts["transformer.h.0"])


@torch.no_grad()
def test_transformer_lens_names_are_aliases(model: GPT, ids: torch.Tensor) -> None:
    pairs = {
        "hook_embed": "transformer.wte",
        "ln_final.hook_out": "transformer.ln_f",
        "unembed.hook_out": "logits",
        "blocks.1.hook_resid_pre": "transformer.h.1.resid_pre",
        "blocks.1.hook_resid_post": "transformer.h.1",
        "blocks.*.attn.hook_pattern": "transformer.h.*.attn.probs",
        "blocks.0.attn.hook_z": "transformer.h.0.attn.z",
        "blocks.0.mlp.hook_post": "transformer.h.0.mlp.post",
        "blocks.0.mlp.hook_pre": "transformer.h.0.mlp.c_fc",
        "blocks.0.ln1.hook_out": "transformer.h.0.ln_1",
    }
    with record(model, list(pairs)) as acts:
        model(ids)
    for alias, name in pairs.items():
        assert torch.equal(acts[alias], acts[name]), alias
        assert not alias.startswith("blocks") or name.startswith("transformer.h")


@torch.no_grad()
@pytest.mark.slow
def test_it_is_what_transformer_lens_gives() -> None:
    bridge = pytest.importorskip("transformer_lens.model_bridge", reason="not installed")
    lens = bridge.TransformerBridge.boot_transformers(str(DEMO_DIR), device="cpu")
    lens.enable_compatibility_mode(no_processing=True)
    model = GPT.from_pretrained(DEMO_DIR, dtype="float32")
    ids = random_ids(model.config, 2, 40)
    logits, cache = lens.run_with_cache(ids)
    names = [*_LENS, *(f"blocks.*.{name}" for name in _LENS_IN_LAYER)]
    names.remove("blocks.*.attn.hook_result")  # which it does not have for this architecture
    with record(model, names) as acts:
        assert error(model(ids), logits) < 1e-4
    for name in names:
        layers = range(model.config.n_layer) if "*" in name else [0]
        for one in (name.replace("*", str(i)) for i in layers):
            ours, theirs = acts[one], cache[one]
            ours = ours.expand(len(ids), *ours.shape[1:])  # positions are the same for all rows
            theirs = theirs.reshape(ours.shape)  # of z with its heads side by side
            finite = ours.isfinite()
            assert torch.equal(theirs.isfinite(), finite), one
            scale = max(1.0, ours[finite].abs().max().item())
            assert error(ours[finite], theirs[finite]) < 1e-5 * scale, one


@torch.no_grad()
def test_a_wildcard_stacks_layers_in_order(ids: torch.Tensor) -> None:
    model = tiny_model(n_layer=12)
    names = ["transformer.h.*", "transformer.h.[3-5].mlp", "transformer.h.4.ln_1"]
    with record(model, names) as acts:
        model(ids)
    stacked = acts["transformer.h.*"]
    assert stacked.shape == (12, 2, 9, CONFIG.n_embd)
    assert torch.equal(stacked[10], acts["transformer.h.10"])
    assert acts["transformer.h.[3-5].mlp"].shape[0] == 3
    assert acts["transformer.h.4.mlp"].shape == (2, 9, CONFIG.n_embd)
    with pytest.raises(InputError, match="was not recorded"):
        acts["transformer.h.2.mlp"]
    with pytest.raises(InputError, match="different points"):
        acts["transformer.h.4.*"]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_recording_does_not_change_a_bit(ids: torch.Tensor, context, backend: str) -> None:
    model = tiny_model(backend)
    with context():
        plain = model(ids)
        with record(model, OUTSIDE if context is torch.enable_grad else EVERYTHING[:-1]):
            recorded = model(ids)
        assert torch.equal(model(ids), plain)
    assert torch.equal(recorded, plain)


def test_with_gradients_recorded_attention_is_the_references(ids: torch.Tensor) -> None:
    model, reference = tiny_model("sdpa"), tiny_model("reference")
    with record(model, IN_ATTENTION):
        recorded = model(ids)
    assert recorded.requires_grad
    assert torch.equal(recorded, reference(ids))
    assert not torch.equal(recorded, model(ids))
    with record(model, ["transformer.h.*.attn.k_read", "transformer.h.*.attn.v_read"]):
        assert relative_error(model(ids), recorded) < 1e-5


def test_what_was_recorded_can_be_read_whatever_becomes_of_the_layers(ids: torch.Tensor) -> None:
    model = tiny_model()
    names = ["transformer.h.1", "transformer.h.*.resid_pre", "transformer.h.1.attn.q"]
    with record(model, names) as acts:
        model(ids)
    before = [acts[name] for name in names]
    del model.transformer.h[1:]
    assert all(map(torch.equal, before, (acts[name] for name in names)))


def test_a_layer_without_attention_is_recorded(ids: torch.Tensor) -> None:
    class Same(torch.nn.Module):
        def forward(self, x: torch.Tensor, *_: object) -> torch.Tensor:
            return x

    model = tiny_model()
    model.transformer.h[1] = Same()
    with torch.inference_mode(), record(model, ["transformer.h.0", "transformer.h.1"]) as acts:
        model(ids)
    assert torch.equal(acts["transformer.h.1"], acts["transformer.h.0"])


def test_afterwards_the_model_is_as_before(model: GPT, ids: torch.Tensor) -> None:
    def state() -> list[object]:
        found: list[object] = []
        for module in model.modules():
            hooks = (module._forward_hooks, module._forward_pre_hooks)
            found += [set(vars(module)), [list(some) for some in hooks]]
        return [*found, is_plain(model), [b.attn.attend for b in model.transformer.h]]

    before = state()
    with record(model, EVERYTHING):
        assert not is_plain(model)
    with pytest.raises(ZeroDivisionError), record(model, EVERYTHING):
        raise ZeroDivisionError
    assert state() == before
    with record(model, IN_ATTENTION), patch(model, {"transformer.h.1.attn.probs": zero()}):
        with pytest.raises(IndexError), torch.no_grad():
            model(ids + 1000)
        with torch.no_grad():  # the failed pass left nothing behind
            model(ids)
    assert state() == before
    with pytest.raises(InputError), record(model, ["transformer.h.*", "transformer.h.9"]):
        pass
    assert state() == before
    assert all(is_own(block.attn.attend) for block in model.transformer.h)


@pytest.mark.parametrize("point", ["", ".resid_pre", ".resid_mid", ".attn.q", ".attn.k", ".attn.v"])
def test_gradients_are_those_of_a_leaf_in_its_place(model: GPT, ids: torch.Tensor, point: str):
    check_gradient(model, ids, f"transformer.h.1{point}")


@pytest.mark.parametrize(
    "point", [".attn.z", ".attn.scores", ".attn.probs", ".attn.k_read", ".mlp.post", ".ln_2"]
)
def test_gradients_inside_a_sublayer_are_too(model: GPT, ids: torch.Tensor, point: str) -> None:
    check_gradient(model, ids, f"transformer.h.0{point}")


def check_gradient(model: GPT, ids: torch.Tensor, name: str) -> None:
    with record(model, name) as acts:
        loss(model, ids).backward()
    value, gradient = acts[name].detach(), acts.grad[name]
    leaf = value.clone().requires_grad_()
    with patch(model, {name: replace(leaf)}):
        loss(model, ids).backward()
    assert leaf.grad is not None
    assert gradient.shape == value.shape
    assert leaf.grad.abs().max() > 0
    assert error(gradient, leaf.grad) < 1e-5 * leaf.grad.abs().max().item()


def loss(model: GPT, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_a_wildcard_stacks_gradients(model: GPT, ids: torch.Tensor) -> None:
    with record(model, "transformer.h.*.attn.q") as acts:
        loss(model, ids).backward()
    gradient = acts.grad["blocks.*.attn.hook_q"]
    assert gradient.shape == acts["transformer.h.*.attn.q"].shape
    names = ["transformer.h.1", "transformer.h.0.attn.result"]
    with torch.no_grad(), record(model, names) as acts:
        model(ids)
    for name in acts:
        with pytest.raises(InputError, match="has no gradient"):
            acts.grad[name]


@torch.no_grad()
def test_steps_with_a_cache_are_concatenated(model: GPT, ids: torch.Tensor) -> None:
    names = [*EVERYTHING[1:], "transformer.wpe"]
    with record(model, names) as whole:
        model(ids)
    cache = KVCache(CONFIG, 2, 20)
    with record(model, names) as stepped:
        for begin, end in ((0, 4), (4, 5), (5, 9)):
            model(ids[:, begin:end], cache=cache)
    for name in whole:
        mine = stepped[name][:1] if name.endswith("wpe") else stepped[name]
        assert mine.shape == whole[name].shape, name
        finite = whole[name].isfinite()
        assert torch.equal(finite, mine.isfinite()), name
        assert error(mine[finite], whole[name][finite]) < 1e-4, name


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [None, 3])
def test_rows_of_a_padded_prefill_are_as_if_alone(model: GPT, chunk: int | None) -> None:
    prompts = random_prompts(CONFIG, [7, 2, 5])
    cache = KVCache(CONFIG, 3, 12)
    with record(model, EVERYTHING[1:]) as acts:
        logits = prefill(model, cache, prompts, chunk)
        model(logits.argmax(-1)[:, None], cache=cache)
    for row, prompt in enumerate(prompts):
        text = torch.tensor([[*prompt, int(logits[row].argmax())]])
        with record(model, EVERYTHING[1:]) as alone:
            model(text)
        for name in acts:
            check_row(name, acts[name][row], alone[name][0])


def check_row(name: str, ours: torch.Tensor, alone: torch.Tensor) -> None:
    assert ours.shape == alone.shape, name
    finite = alone.isfinite()
    assert torch.equal(ours.isfinite(), finite), name
    assert error(ours[finite], alone[finite]) < 1e-4, name


@torch.no_grad()
def test_generation_may_be_entered_late(model: GPT) -> None:
    from mqa_gpt.generation.batching import Engine
    from mqa_gpt.generation.request import make_requests

    (prompt,) = random_prompts(CONFIG, [5])
    engine = Engine(model, 1, 20)
    engine.add(make_requests(CONFIG, [prompt], 8)[0])
    made = [token.id for _ in range(3) for token in engine.step()]
    with record(model, "transformer.h.1") as acts:
        made += [token.id for _ in range(3) for token in engine.step()]
    made += [token.id for _ in range(2) for token in engine.step()]
    with record(model, "transformer.h.1") as alone:
        model(torch.tensor([[*prompt, *made]]))
    # The first token comes from the prompt; the third is the first that is fed in the context.
    assert acts.starts == [5 + 2]
    assert relative_error(acts["transformer.h.1"][0], alone["transformer.h.1"][0, 7:10]) < 2e-5
    assert made == generate(model, [prompt], 8)[0]


def test_threads_do_not_mix(model: GPT, ids: torch.Tensor) -> None:
    plain, results = model(ids).detach(), {}
    inside, patched = threading.Event(), threading.Event()

    def other() -> None:
        inside.wait(60)
        with torch.no_grad():
            results["plain"] = model(ids)
            with patch(model, {"transformer.h.0.attn.z": zero()}):
                results["patched"] = model(ids)
        patched.set()

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    with torch.no_grad(), record(model, ["transformer.h.1", *IN_ATTENTION]) as acts:
        inside.set()
        assert patched.wait(60)
        with pytest.raises(InputError, match="nothing was recorded"):
            acts["transformer.h.1"]
        assert torch.equal(model(ids), plain)
    thread.join()
    assert torch.equal(results["plain"], plain)
    assert not torch.equal(results["patched"], plain)
    assert acts["transformer.h.1"].shape[:2] == (2, 9)
    assert is_plain(model)


@torch.no_grad()
def test_contexts_of_two_threads_may_end_in_any_order(model: GPT, ids: torch.Tensor) -> None:
    plain = model(ids)
    first, second = (record(model, IN_ATTENTION) for _ in range(2))
    first.__enter__()
    acts = second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(model(ids), plain)
    second.__exit__(None, None, None)
    assert acts["blocks.*.attn.hook_pattern"].shape[0] == CONFIG.n_layer
    assert is_plain(model)


@torch.no_grad()
def test_what_was_recorded_is_not_overwritten_silently(model: GPT, ids: torch.Tensor) -> None:
    with record(model, ["transformer.h.1", "logits"]) as acts:
        model(ids).zero_()
    with pytest.raises(InputError, match="was written to"):
        acts["logits"]
    assert acts["transformer.h.1"].abs().max() > 0
    with torch.inference_mode(), record(model, "logits") as acts:
        logits = model(ids)
        before = logits.clone()
        logits.zero_()
    assert torch.equal(acts["logits"], before)


@torch.no_grad()
def test_two_runs_in_one_context_are_an_error(model: GPT, ids: torch.Tensor) -> None:
    with record(model, "transformer.h.1") as acts:
        model(ids)
        model(ids)
    with pytest.raises(InputError, match="2 runs were recorded"):
        acts["transformer.h.1"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("transformer.h.7", "not in this model of 2 layers"),
        ("transformer.h.0.attn.keys", "not in this model"),
        ("blocks.0.attn.hook_rot_q", "has no equal here"),
        ("blocks.0.attn.hook_patern", r"did you mean attn\.hook_pattern"),
        ("blocks.0.ln1.hook_normalized", "has no equal here"),
        ("transformer.h.1.attn.prob", r"did you mean transformer\.h\.1\.attn\.probs\b"),
        ("transformer.h.*.mlp.c_fec", r"did you mean transformer\.h\.\*\.mlp\.c_fc\b"),
        ("transformer.h.9.attn.probs", r"did you mean transformer\.h\.\*\.attn\.probs\b"),
        ("h.0.resid_mid", r"did you mean transformer\.h\.0\.resid_mid\b"),
        ("attn.scores", r"did you mean transformer\.h\.\*\.attn\.scores\b"),
        ("lm_hed", r"did you mean lm_head\b"),
        ("logit", r"did you mean logits\b"),
        ("qqqqqq", r"layers: names are"),
        ([], "names are"),
        (3, "names are"),
        ([3], "a name is 3"),
        ("transformer.h", "not in this model"),
    ],
)
def test_an_unknown_name_says_which_there_are(model: GPT, names, message: str) -> None:
    with pytest.raises(InputError, match=message), record(model, names):
        pass


def test_what_is_not_reached_is_an_error(ids: torch.Tensor) -> None:
    model = tiny_model()
    with record(model, "transformer.h.1.attn.probs"):
        model.set_backend("reference")
        with pytest.raises(InputError, match=r"did not reach the probs of transformer\.h\.1\.attn"):
            model(ids)
    assert model.transformer.h[1].attn.attend is not None
    with record(model, "transformer.h.1.mlp"):
        model.transformer.h[1].mlp = torch.nn.Identity()
        with pytest.raises(InputError, match="did not reach the output of"):
            model(ids)
    with record(model, "transformer.h.0"), pytest.raises(InputError, match="called by itself"):
        model.transformer(ids)
    with pytest.raises(InputError, match="expected a GPT"), record(model.transformer, "h.0"):
        pass


def test_a_compiled_model_is_refused(model: GPT) -> None:
    compiled = tiny_model()
    compiled.compile()
    with pytest.raises(InputError, match="compiled"), record(compiled, "transformer.h.0"):
        pass


def test_a_draft_models_own_passes_are_refused(model: GPT) -> None:
    small = tiny_model(n_layer=1)
    with record(small, "transformer.h.0") as acts:
        generate(model, random_prompts(CONFIG, [4, 6]), 5, draft=DraftModel(small))
    with pytest.raises(InputError, match="a draft model's own passes"):
        acts["transformer.h.0"]


def test_samples_of_a_prompt_share_what_its_prefill_computed(model: GPT) -> None:
    prompts = random_prompts(CONFIG, [4, 6])
    names = ["transformer.h.*", "transformer.h.1.attn.k_read", "transformer.h.0.attn.probs"]
    with record(model, names) as acts:
        new = generate(model, prompts, 5, n=3, temperature=1.0, seed=0)
    for row, ids in enumerate(new):
        with torch.no_grad(), record(model, names) as alone:
            model(torch.tensor([[*prompts[row // 3], *ids][:-1]]))
        for name in acts:
            check_row(name, acts[name][row], alone[name][0])


def test_an_8_bit_cache_is_recorded_as_it_is_read(model: GPT) -> None:
    eight = tiny_model()
    eight.cache_class = Int8KVCache
    prompts = random_prompts(CONFIG, [7, 3])
    plain = generate(eight, prompts, 6)
    with record(eight, ["transformer.h.1", "transformer.h.0.attn.k_read"]) as acts:
        assert generate(eight, prompts, 6) == plain
    with torch.no_grad(), record(model, list(acts)) as exact:
        model(torch.tensor([[*prompts[1], *plain[1]][:-1]]))
    for name in acts:
        ours, theirs = acts[name][1], exact[name][0]
        assert ours.shape == theirs.shape
        assert 0 < error(ours, theirs) < 0.2 * theirs.abs().max().item()
