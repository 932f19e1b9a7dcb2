"""`generate` and the plain loop: against transformers' tokens, row by row, and at their limits."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from mqa_gpt import GPT, PromptError, generate
from mqa_gpt.generation import prefill as prefill_module
from mqa_gpt.generation.loop import greedy_steps
from mqa_gpt.generation.prefill import prefill
from mqa_gpt.generation.request import make_requests
from mqa_gpt.sampling import SamplingParams, draw, filter_logits, uniforms
from tests.helpers import (
    engine_tokens,
    our_model,
    random_prompts,
    reference_greedy,
    reference_model,
    relative_error,
    tiny_config,
)

CONFIG = tiny_config()


@pytest.fixture(scope="module")
def model() -> GPT:
    return our_model(reference_model(CONFIG), CONFIG)


def test_greedy_tokens_are_those_of_transformers(model):
    prompts = random_prompts(CONFIG, [17, 3, 9, 1])
    ids, _ = reference_greedy(reference_model(CONFIG), prompts, 64)
    assert generate(model, prompts, 64) == ids.tolist()


def test_the_plain_loop_gives_the_tokens_and_logits_of_transformers(model):
    prompts = random_prompts(CONFIG, [17, 3, 9, 1])
    ids, logits = reference_greedy(reference_model(CONFIG), prompts, 20)
    steps = list(greedy_steps(model, prompts, 20))
    assert [step[0].tolist() for step in steps] == ids.T.tolist()
    for (_, ours), theirs in zip(steps, logits.unbind(1), strict=True):
        assert relative_error(ours, theirs) < 5e-6


def test_a_row_of_a_batch_equals_its_solo_run(model):
    prompts = random_prompts(CONFIG, [2, 30, 11, 11, 5], seed=1)
    options = {"temperature": 1.2, "top_k": 30, "top_p": 0.95, "repetition_penalty": 1.2, "seed": 5}
    together = generate(model, prompts, 40, n=2, eos_token_id=[7, 60], **options)
    alone = [
        row
        for prompt in prompts
        for row in generate(model, [prompt], 40, n=2, eos_token_id=[7, 60], **options)
    ]
    assert together == alone
    assert len({len(row) for row in together}) > 1  # rows did leave the batch at different times


def test_samples_of_one_prompt_differ_and_the_first_does_not_depend_on_how_many_there_are(model):
    prompt = random_prompts(CONFIG, [8])
    four = generate(model, prompt, 20, n=4, temperature=1.0, seed=2)
    assert len(set(map(tuple, four))) == 4
    assert four[:2] == generate(model, prompt, 20, n=2, temperature=1.0, seed=2)


def test_n_samples_take_one_prefill(model):
    calls = []
    hook = model.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape))
    generate(model, random_prompts(CONFIG, [9, 4]), 3, n=5, temperature=1.0, seed=0)
    hook.remove()
    assert [tuple(shape) for shape in calls] == [(2, 9), (10, 1), (10, 1)]


def test_without_a_seed_equal_prompts_get_different_draws_and_with_one_the_same(model):
    prompts = random_prompts(CONFIG, [6]) * 3
    free = generate(model, prompts, 20, temperature=1.0)
    assert len(set(map(tuple, free))) == 3
    first, *others = generate(model, prompts, 20, temperature=1.0, seed=1)
    assert others == [first, first]


def test_numpys_integers_are_integers(model):
    (prompt,) = random_prompts(CONFIG, [6])
    ids, one = [np.int64(i) for i in prompt], np.int32(1)
    options = {"temperature": np.float32(1), "seed": one, "top_k": np.int64(5)}
    assert generate(model, [ids], np.int64(4), **options) == generate(
        model, [prompt], 4, temperature=1.0, seed=1, top_k=5
    )


def test_a_seed_repeats_and_another_seed_does_not(model):
    prompt = random_prompts(CONFIG, [8])
    first, again, other = (
        generate(model, prompt, 20, temperature=1.0, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert generate(model, prompt, 20, temperature=1.0) != generate(
        model, prompt, 20, temperature=1.0
    )


def test_sampling_follows_filters_and_stream_step_by_step(model):
    prompt, options = random_prompts(CONFIG, [8]), {"temperature": 0.9, "top_p": 0.8}
    expected = list(prompt[0])
    for u in uniforms(3, 0, 12):
        seen = torch.zeros(1, CONFIG.vocab_size, dtype=torch.bool)
        seen[0, expected] = True
        with torch.no_grad():
            logits = model(torch.tensor([expected]))[:, -1]
        filtered = filter_logits(logits, SamplingParams(**options, repetition_penalty=1.5), seen)
        expected.append(draw(filtered, torch.tensor([u], dtype=torch.float64)).item())
    assert generate(model, prompt, 12, seed=3, repetition_penalty=1.5, **options) == [expected[8:]]


@pytest.mark.parametrize("chunk", [1, 4, 7, 64])
def test_the_prefill_chunk_limits_each_pass_and_does_not_change_the_tokens(model, chunk):
    prompts = random_prompts(CONFIG, [20, 7, 1, 8])
    expected = generate(model, prompts, 12)
    widths = []
    hook = model.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    assert generate(model, prompts, 12, prefill_chunk=chunk) == expected
    hook.remove()
    assert max(widths) == min(chunk, 20)


@pytest.mark.parametrize(("lengths", "width"), [([20], 8), ([20, 5], 4), ([20, 7, 1, 8], 3)])
def test_on_a_gpu_all_rows_of_a_pass_share_its_positions(monkeypatch, lengths, width):
    monkeypatch.setattr(prefill_module, "PREFILL_POSITIONS", 8)
    monkeypatch.setattr(prefill_module, "MIN_CHUNK", 3)
    model = GPT(CONFIG).to("meta").eval()
    widths = []
    model.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    cache = model.new_cache(len(lengths), 20)
    prefill(model, cache, random_prompts(CONFIG, lengths))
    assert widths[: 20 // width] == [width] * (20 // width)


@pytest.mark.parametrize(("lengths", "width"), [([20], 8), ([20, 5], 4), ([20, 7, 1, 8], 3)])
def test_on_a_cpu_prompts_are_read_in_chunks_that_its_caches_hold(
    model, monkeypatch, lengths, width
):
    monkeypatch.setattr(prefill_module, "CPU_PREFILL_BYTES", 8 * CONFIG.inner_size * 4)
    monkeypatch.setattr(prefill_module, "MIN_CHUNK", 3)
    prompts = random_prompts(CONFIG, lengths)
    expected = generate(model, prompts, 12, prefill_chunk=20)
    widths = []
    hook = model.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    assert generate(model, prompts, 12) == expected
    hook.remove()
    assert widths[: 20 // width] == [width] * (20 // width)


def test_prompts_that_have_ended_are_left_out_of_further_chunks(model):
    shapes = []
    hook = model.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    generate(model, random_prompts(CONFIG, [5, 20, 7, 8]), 1, prefill_chunk=4)
    hook.remove()
    assert shapes == [(4, 4), (4, 4), (2, 4), (2, 4), (2, 4)]  # row i is prompt i


def test_the_head_is_computed_only_for_the_chunks_in_which_a_prompt_ends(model):
    sizes = []
    hook = model.lm_head.register_forward_hook(lambda *call: sizes.append(len(call[-1])))
    generate(model, random_prompts(CONFIG, [20, 7, 6]), 1, prefill_chunk=3)
    hook.remove()
    assert sizes == [0, 3, 2, 0, 0, 0, 1]


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("chunk", [4, 64])
def test_padding_that_overflows_does_not_reach_the_tokens_of_its_row(backend, chunk):
    config = tiny_config(tie_word_embeddings=False)
    model = our_model(reference_model(config), config, backend)
    with torch.no_grad():
        model.transformer.wte.weight[0] = float("inf")  # what the prefill pads with
        model.lm_head.weight[0] = 0  # and the prompts and new tokens below do not hold
    prompts = [[token or 1 for token in row] for row in random_prompts(config, [9, 2, 1, 5])]
    together = generate(model, prompts, 20, prefill_chunk=chunk)
    assert together == [generate(model, [prompt], 20)[0] for prompt in prompts]


def test_an_end_token_ends_its_row_and_is_returned(model):
    prompts = random_prompts(CONFIG, [6, 12])
    free = generate(model, prompts, 30)
    end = free[0][4]
    cut = generate(model, prompts, 30, eos_token_id=end)
    for row, whole in zip(cut, free, strict=True):
        assert row == (whole[: whole.index(end) + 1] if end in whole else whole)


def test_any_of_several_end_tokens_ends_a_row(model):
    prompt = random_prompts(CONFIG, [6])
    free = generate(model, prompt, 30)[0]
    second = next(token for token in free if token != free[0])
    unused = next(i for i in range(CONFIG.vocab_size) if i not in free)
    cut = generate(model, prompt, 30, eos_token_id=[unused, second])[0]
    assert cut == free[: free.index(second) + 1]


def test_without_an_end_token_nothing_stops_early(model):
    prompt = random_prompts(CONFIG, [6])
    assert all(len(row) == 50 for row in generate(model, prompt, 50, n=3, temperature=2.0, seed=0))


def test_finish_reasons_mark_the_last_token_of_each_row(model):
    prompts = random_prompts(CONFIG, [6, 6], seed=4)
    free = generate(model, prompts, 10)
    stop_at = free[0][3]
    assert stop_at not in free[1]
    tokens = list(engine_tokens(model, prompts, 10, end_ids=[stop_at]))
    rows = [[t for t in tokens if t.row == row] for row in (0, 1)]
    assert [[t.id for t in row] for row in rows] == [free[0][: free[0].index(stop_at) + 1], free[1]]
    assert [row[-1].finished for row in rows] == ["stop", "length"]
    assert all(t.finished is None for row in rows for t in row[:-1])


def test_log_probabilities_are_the_unfiltered_model_s(model):
    prompts = random_prompts(CONFIG, [5, 9])
    sampling = SamplingParams(temperature=3.0, top_k=20, repetition_penalty=2.0, seed=1)
    tokens = list(engine_tokens(model, prompts, 6, sampling, logprobs=3))
    for row, prompt in enumerate(prompts):
        mine = [t for t in tokens if t.row == row]
        ids = torch.tensor([prompt + [t.id for t in mine]])
        with torch.no_grad():
            logprobs = model(ids)[0].double().log_softmax(-1)
        for t, expected in zip(mine, logprobs[len(prompt) - 1 :], strict=False):
            assert t.logprob == pytest.approx(expected[t.id].item(), abs=1e-4)
            values, top_ids = expected.topk(3)
            assert [i for i, _ in t.top] == top_ids.tolist()
            assert [v for _, v in t.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_no_log_probabilities_unless_asked_for(model):
    tokens = engine_tokens(model, [[3]], 2)
    assert [(t.logprob, t.top) for t in tokens] == [(None, ()), (None, ())]
    assert all(
        math.isfinite(t.logprob) and t.top == () for t in engine_tokens(model, [[3]], 2, logprobs=0)
    )


def test_a_prompt_may_fill_the_context_to_the_last_new_token(model):
    room = CONFIG.n_positions - 40
    assert len(generate(model, random_prompts(CONFIG, [40]), room)[0]) == room
    with pytest.raises(PromptError, match=rf"40 tokens .* {room + 1}.* {CONFIG.n_positions}"):
        generate(model, random_prompts(CONFIG, [40]), room + 1)


def test_as_many_tokens_as_fit_are_written_if_no_number_is_given(model):
    prompts = random_prompts(CONFIG, [40, 7])
    counts = [len(row) for row in generate(model, prompts, None)]
    assert counts == [CONFIG.n_positions - 40, CONFIG.n_positions - 7]
    with pytest.raises(PromptError, match="no new token fits"):
        generate(model, [[1] * CONFIG.n_positions], None)


def test_a_row_has_no_end_token_among_its_first_min_new_tokens(model):
    prompts = random_prompts(CONFIG, [6, 12])
    end = generate(model, prompts, 1)[0][0]
    assert len(generate(model, prompts, 30, eos_token_id=end)[0]) == 1
    for options in ({}, {"temperature": 1.0, "seed": 0}):
        rows = generate(model, prompts, 30, eos_token_id=end, min_new_tokens=9, **options)
        for row, prompt in zip(rows, prompts, strict=True):
            assert end not in row[:9]
            assert len(row) >= 9
            if not options:  # what transformers' MinNewTokensLengthLogitsProcessor does
                expected = list(prompt)
                for _ in range(9):
                    with torch.no_grad():
                        logits = model(torch.tensor([expected]))[0, -1]
                    logits[end] = -math.inf
                    expected.append(int(logits.argmax()))
                assert row[:9] == expected[len(prompt) :]


def test_errors_come_before_any_computation(model):
    def fail(*_):
        raise AssertionError("the model ran")

    hook = model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(PromptError):
            generate(model, [[1], [2] * CONFIG.n_positions], 1)
    finally:
        hook.remove()


def test_an_empty_prompt_starts_from_the_bos_token(model):
    assert generate(model, [[], [4]], 8) == generate(model, [[CONFIG.bos_token_id], [4]], 8)


def test_an_empty_prompt_without_a_bos_token_is_refused():
    with pytest.raises(PromptError, match="bos_token_id"):
        generate(GPT(tiny_config(bos_token_id=None)), [[]], 1)


@pytest.mark.parametrize("bos", [97, -1])
def test_a_bos_token_outside_the_vocabulary_is_refused(bos):
    with pytest.raises(PromptError, match=f"holds {bos}"):
        generate(GPT(tiny_config(bos_token_id=bos)), [[]], 1)


def test_nothing_asked_for_gives_nothing(model):
    assert generate(model, [[1], [2]], 0) == [[], []]
    assert generate(model, [], 5) == []


def test_prompts_may_be_a_tensor(model):
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert generate(model, ids, 4) == generate(model, ids.tolist(), 4)


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([[1, 97]], {}, "97"),
        ([[1], [-1]], {}, "prompt 1 holds -1"),
        ([[1.5]], {}, "1.5"),
        ([[True]], {}, "True"),
        (["text"], {}, "list of token ids"),
        ([None], {}, "NoneType"),
        (None, {}, "prompts are None"),
        ("text", {}, "list of lists"),
        ([[1]], {"eos_token_id": 1.5}, "eos_token_id is 1.5"),
        ([[1]], {"eos_token_id": "x"}, "eos_token_id"),
        ([[1]], {"prefill_chunk": 0}, "prefill_chunk"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens"),
        ([[1]], {"max_new_tokens": 2.0}, "max_new_tokens"),
        ([[1]], {"n": 0}, "n is 0"),
        ([[1]], {"max_new_tokens": np.int32(2**31 - 1)}, "2,?147,?483,?647.* context"),
        ([[1]], {"max_new_tokens": np.uint64(2**64 - 1)}, "context"),
        ([[1]], {"max_new_tokens": 4, "min_new_tokens": 5}, "min_new_tokens is 5"),
        ([[1]], {"min_new_tokens": -1}, "min_new_tokens"),
        ([[1]], {"n": 2**70}, "n is"),
        ([[1]], {"temperature": 2**64}, "temperature"),
        ([[1]], {"temperature": Fraction(-1, 3)}, "temperature"),
        ([[1]], {"eos_token_id": ""}, "eos_token_id"),
        ([[1]], {"draft": 3}, "draft is 3"),
        (torch.zeros(2, 2).long().to_sparse(), {}, "dense"),
        (torch.zeros(2, 2, dtype=torch.int64, device="meta"), {}, "dense"),
        (torch.zeros(2), {}, "dense"),
        ([[1]], {"n": 2}, "n is 2 but temperature is 0"),
        ([[1]], {"temperature": -1}, "temperature"),
    ],
)
def test_unusable_input_is_named(model, prompts, options, words):
    with pytest.raises(PromptError, match=words):
        generate(model, prompts, **options)


@pytest.mark.parametrize("logprobs", [-1, 98, 1.5, True])
def test_an_impossible_number_of_log_probabilities_is_refused(model, logprobs):
    with pytest.raises(PromptError, match="logprobs"):
        make_requests(model.config, [[1]], 1, logprobs=logprobs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_an_error_not_tokens(value, temperature):
    broken = our_model(reference_model(CONFIG), CONFIG)
    with torch.no_grad():
        broken.transformer.ln_f.bias[3] = value
    with pytest.raises(FloatingPointError, match="not finite"):
        generate(broken, [[1, 2]], 4, temperature=temperature)


def test_generation_leaves_gradients_and_modes_alone(model):
    tokens = engine_tokens(model, [[1]], 3)
    assert next(tokens).row == 0
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    model(torch.tensor([[1, 2]])).sum().backward()
    assert model.transformer.wpe.weight.grad is not None
    model.zero_grad()
