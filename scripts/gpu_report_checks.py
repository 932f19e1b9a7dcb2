"""The checks of gpu_report.py: are the kernels right on this device, alone and inside a model?"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from clock import Clock
from gpu_report_pool import Row, in_processes
from judge import FACTORS, by_pieces, exact_attention, find_truth, judge, plain_attention
from torch import Tensor

from mqa_gpt import GPT, GPTConfig, KVCache
from mqa_gpt.generation.decode import prefill
from mqa_gpt.verify.compare import FLOAT32_TOLERANCE
from mqa_kernels import attention, reference

DTYPES = ("float32", "bfloat16", "float16")
BACKENDS = ("triton", "sdpa", "reference")
PROMPT_LENGTHS = (9, 33, 1, 20)
CASES_SHARE = 0.75  # of the time of "numerics"; the rest is for the other checks


class Case(NamedTuple):
    """Shapes of one check; per row its first position, real tokens and padding before them."""

    B: int
    T: int
    S: int
    H: int
    G: int
    D: int
    start: tuple[int, ...]
    lengths: tuple[int, ...] | None = None
    left_padding: tuple[int, ...] | None = None


# Every T and S of 1, 63, 64, 65, 111, 128, 1000, D of 16, 32, 64, 80, 96, 128, 256, H of 1, 3, 12,
# 16, 22, 32, 48 and G of 1, 2, H, in odd company. The shapes that matter most come first.
CASES = (
    Case(1, 1000, 1000, 32, 1, 128, (0,)),
    Case(2, 1, 1000, 32, 1, 128, (999, 500)),
    Case(3, 65, 65, 12, 1, 128, (0, 0, 0), (65, 17, 1)),
    Case(2, 8, 1000, 32, 1, 128, (992, 130)),
    Case(3, 65, 65, 12, 1, 128, (0, 0, 0), None, (0, 17, 64)),
    Case(2, 1, 1000, 32, 1, 128, (999, 999), None, (0, 870)),
    Case(2, 111, 128, 22, 2, 64, (17, 3)),
    Case(1, 128, 128, 48, 1, 128, (0,)),
    Case(1, 1000, 1000, 16, 1, 64, (0,)),
    Case(2, 1, 1, 1, 1, 16, (0, 0)),
    Case(1, 63, 63, 3, 1, 32, (0,)),
    Case(2, 64, 65, 12, 2, 64, (0, 1)),
    Case(1, 65, 111, 3, 3, 80, (46,)),
    Case(3, 1, 128, 12, 1, 96, (127, 0, 64)),
    Case(1, 64, 64, 32, 1, 256, (0,)),
    Case(1, 16, 111, 48, 1, 128, (95,)),
    Case(1, 63, 63, 16, 16, 96, (0,)),
    Case(2, 3, 20, 4, 2, 5, (0, 9)),
    Case(3, 33, 128, 16, 2, 96, (64, 64, 64), (33, 20, 33), (63, 75, 128)),
)
FEW_CASES = (
    Case(2, 5, 20, 4, 2, 24, (3, 15)),
    Case(2, 17, 17, 3, 1, 16, (0, 0), (17, 6)),
    Case(3, 9, 20, 4, 2, 16, (8, 8, 8), (9, 7, 9), (3, 12, 20)),
)


def check_numerics(
    clock: Clock, cases: Iterable[Case], workers: int, large: bool, deadline: float
) -> Iterator[Row]:
    """Every case in every dtype by the error rule; then capture, compilation and the rest.

    Args:
        workers: processes among which the cases are divided, since most of their time is that of
            compiling kernels; 0 for this one alone.
        large: also check tensors of more than 2**31 elements (40 GB).
        deadline: by `time.monotonic`; what would begin later is skipped.
    """
    device = clock.device
    tasks = list(product(cases, DTYPES))
    now = time.monotonic()
    until = now + CASES_SHARE * (deadline - now)
    yield from in_processes(partial(check_case, device), tasks, workers, until)
    checks: list[Callable[[torch.device], Row]] = [
        check_capture,
        check_compiled,
        check_determinism,
        check_operator,
        check_integration,
    ]
    if large:
        checks.append(check_beyond_32_bits)
    for check in checks:
        begin = time.monotonic()
        row: Row = {"check": check.__name__.removeprefix("check_")}
        if begin > deadline:
            yield row | {"skipped": "no time left"}
            continue
        try:
            row |= check(device)
        except Exception:  # whatever it is, the other checks are worth having
            row |= {"passed": False, "error": traceback.format_exc()}
        clock.release()
        yield row | {"seconds": time.monotonic() - begin}


def check_case(device: torch.device, case: Case, dtype: str) -> Row:
    """One case by the error rule: "verdicts" on out, lse, dq, dk and dv, and whether all passed."""
    q, k, v, start, lengths, left, do = case_inputs(device, case, getattr(torch, dtype))

    with poisoned_allocations(), torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, lse = attention(*leaves, start, lengths=lengths, left_padding=left, return_lse=True)
        answers = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, do), strict=True))
    answers |= {"out": out.detach(), "lse": lse}

    q, k, v, do = (x.nan_to_num(0.0) for x in (q, k, v, do))
    real = torch.ones(q.shape[:2], dtype=torch.bool, device=device)  # (B, T)
    if lengths is not None:  # what is beyond a row's end is zero and has no gradient
        real = torch.arange(case.T, device=device) < lengths[:, None]
    # A row that is rolled to the left by its padding is one without; padded queries come last.
    left = torch.zeros_like(start) if left is None else left
    new = (left - start).clamp(min=0)  # (B,); padding among the queries
    real &= torch.arange(case.T, device=device) >= new[:, None]
    do = do * real[..., None, None]
    q, do, k, v = rolled(q, new), rolled(do, new), rolled(k, left), rolled(v, left)
    start = (start - left).clamp(min=0)
    wide = [x.double() for x in (q, k, v)]
    exact = by_pieces(exact_attention, wide[0], wide[1], wide[2], start, do.double())
    plain = by_pieces(plain_attention, q, k, v, start, do)
    scale = case.D**-0.5
    exact["lse"] = reference.log_sum_exp(wide[0], wide[1], start, scale)
    plain["lse"] = reference.log_sum_exp(q.float(), k.float(), start, scale)
    shifts = {"out": new, "lse": new, "dq": new, "dk": left, "dv": left}
    for truth in (exact, plain):
        for name, shift in shifts.items():
            truth[name] = rolled(truth[name], -shift)
        truth["out"] = truth["out"] * real[..., None, None]
    for each in (exact, plain, answers):
        each["lse"] = each["lse"].where(real[..., None], 0.0)
    verdicts = {
        name: judge(answers[name], plain[name], exact[name], factor)
        for name, factor in FACTORS.items()
    }
    return {
        "case": case._asdict(),
        "dtype": dtype,
        "passed": all(verdict.passed for verdict in verdicts.values()),
        "verdicts": {name: verdict._asdict() for name, verdict in verdicts.items()},
    }


def rolled(x: Tensor, counts: Tensor) -> Tensor:
    """x (B, N, ...) with row b's N entries moved counts[b] to the left, around the end."""
    B, N = x.shape[:2]
    places = (torch.arange(N, device=x.device) + counts[:, None]) % N  # (B, N)
    return x[torch.arange(B, device=x.device)[:, None], places]


def case_inputs(device: torch.device, case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v, start, lengths, left padding (both or None) and dO of a case, as in a model.

    q is a part of a fused projection (B, T, (H + 2 G) D), and so are k and v if there is no cache,
    else they are parts of a cache (B, S, G, 2 D). What nobody may look at is NaN.
    """
    B, T, S, H, G, D, first, real, padding = case
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=device)
    qkv = normal(B, T, (H + 2 * G) * D).to(dtype)
    for b, count in enumerate(real or ()):
        qkv[b, count:] = float("nan")
    q = qkv[..., : H * D].view(B, T, H, D)
    if S == T:
        k, v = (part.view(B, S, G, D) for part in qkv[..., H * D :].chunk(2, -1))
    else:
        kv = normal(B, S, G, 2 * D).to(dtype)
        for b, position in enumerate(first):
            kv[b, position + T :] = float("nan")
        k, v = kv.chunk(2, -1)
    for b, count in enumerate(padding or ()):
        k[b, :count] = v[b, :count] = float("nan")
    do = normal(B, H, T, D).to(dtype).transpose(1, 2)  # its strides are not those of out
    start = torch.tensor(first, device=device)
    lengths = None if real is None else torch.tensor(real, device=device)
    left = None if padding is None else torch.tensor(padding, device=device)
    return q, k, v, start, lengths, left, do  # type: ignore[return-value]


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Inside, `torch.empty` gives NaN: what a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def check_capture(device: torch.device) -> Row:
    """One captured step of decoding serves every position."""
    if device.type != "cuda":
        return {"passed": None, "refused": "CUDA graphs need a GPU"}
    case = Case(4, 1, 1000, 32, 1, 128, (999, 0, 500, 64))
    q, k, v, start, *_ = case_inputs(device, case, torch.bfloat16)
    k, v = k.nan_to_num(0.0), v.nan_to_num(0.0)
    out: dict[str, Tensor] = {}

    def step() -> None:
        out["graph"] = attention(q, k, v, start)

    replay = Clock(device).recorder()(step)
    equal = []
    for positions in ((0, 1, 2, 3), (999, 998, 64, 63), (127, 128, 129, 640)):
        start.copy_(torch.tensor(positions))
        replay()
        equal.append(torch.equal(out["graph"], attention(q, k, v, start)))
    return {"passed": all(equal), "equal": equal}


def check_compiled(device: torch.device) -> Row:
    """torch.compile takes the operator into one graph, with its gradient."""
    q, k, v, *_, do = case_inputs(device, Case(1, 33, 33, 4, 1, 64, (0,)), torch.float32)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q * 2, k, v) * 3

    # Without a GPU nothing is gained from generating code, which takes a C++ compiler.
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    eager = by_pieces(lambda q, k, v, _: layer(q, k, v), q, k, v, 0, do)
    graph = by_pieces(lambda q, k, v, _: compiled(q, k, v), q, k, v, 0, do)
    errors = {name: difference(graph[name], x).item() for name, x in eager.items()}
    return {"passed": max(errors.values()) <= 1e-5, "differences": errors}


def check_determinism(device: torch.device) -> Row:
    """Gradients are the same bits at every run."""
    gpu = device.type == "cuda"
    case = Case(2, 1000, 1000, 32, 1, 128, (0, 0)) if gpu else Case(2, 20, 20, 4, 1, 16, (0, 0))
    q, k, v, *_, do = case_inputs(device, case, torch.bfloat16)
    first, *others = (
        by_pieces(lambda q, k, v, _: attention(q, k, v), q, k, v, 0, do) for _ in range(3)
    )
    equal = {name: all(torch.equal(x, o[name]) for o in others) for name, x in first.items()}
    return {"passed": all(equal.values()), "equal": equal}


def check_operator(device: torch.device) -> Row:
    """torch.library.opcheck on the registration: schema, autograd, fake tensors."""
    q, k, v, start, *_ = case_inputs(device, Case(2, 3, 9, 4, 1, 16, (1, 6)), torch.float32)
    k, v = k.nan_to_num(0.0), v.nan_to_num(0.0)
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    given: Row = {"q": q, "k": k, "v": v, "start": start, "offset": 0}
    given |= {"scale": 0.25, "dropout_p": 0.0}
    operator = torch.ops.mqa_kernels.attention_forward
    arguments = {a.name: given.get(a.name) for a in operator.default._schema.arguments}
    outcome = torch.library.opcheck(operator, (), arguments)
    return {"passed": set(outcome.values()) == {"SUCCESS"}, "outcome": outcome}


def check_integration(device: torch.device) -> Row:
    """From a padded batch transformers' model generates on the kernels what it does on sdpa."""
    from mqa_gpt.integrations.transformers import register

    register()
    gpu = device.type == "cuda"
    lengths = torch.tensor(PROMPT_LENGTHS if gpu else (2, 7, 1), device=device)
    slots = torch.arange(int(lengths.max()), device=device)
    mask = (slots >= len(slots) - lengths[:, None]).long()  # (B, T)
    equal = {}
    for multi_query, cache in product((True, False), ("dynamic", "static")):
        config = GPTConfig(
            vocab_size=61, n_positions=64, n_embd=256 if gpu else 48, n_layer=2,
            n_head=4 if gpu else 3, multi_query=multi_query, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        _, theirs = random_pair(config, torch.float32, device)
        generator = torch.Generator(device).manual_seed(1)
        ids = torch.randint(61, mask.shape, generator=generator, device=device)
        tokens = []
        for implementation in ("sdpa", "mqa_triton"):
            theirs.set_attn_implementation(implementation)
            tokens.append(
                theirs.generate(
                    ids, attention_mask=mask, max_new_tokens=16 if gpu else 4, do_sample=False,
                    cache_implementation=cache, disable_compile=True,
                )
            )  # fmt: skip
        kind = "multi-query" if multi_query else "multi-head"
        equal[f"{kind}, {cache} cache"] = torch.equal(*tokens)
    return {"passed": all(equal.values()), "equal": equal}


def check_beyond_32_bits(device: torch.device) -> Row:
    """The last row of tensors with more than 2**31 elements, forward and backward."""
    q, k, v, *_ = case_inputs(device, Case(66, 8192, 8192, 32, 1, 128, (0,) * 66), torch.bfloat16)
    do = torch.randn_like(q[-1:]).expand_as(q)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    names = ("out", "dq", "dk", "dv")
    answers = dict(zip(names, (out, *torch.autograd.grad(out, leaves, do)), strict=True))
    verdicts = find_truth(q, k, v, 0, do).judge(answers)
    return {
        "passed": all(verdict.passed for verdict in verdicts.values()),
        "verdicts": {name: verdict._asdict() for name, verdict in verdicts.items()},
    }


def check_parity(clock: Clock, config: GPTConfig, dtype: str, new_tokens: int) -> Iterator[Row]:
    """A model with random weights against transformers' with the same: tokens and logits.

    transformers generates greedily from each prompt by itself. Ours reads all prompts as one ragged
    batch and is then fed transformers' tokens, so that both always continue the same text: if its
    largest logit is the same every time, it would have generated the same tokens. Logits are judged
    as `mqa-gpt verify` judges them.

    Yields:
        One row per backend.
    """
    device = clock.device
    model, theirs = random_pair(config, getattr(torch, dtype), device)
    generator = torch.Generator().manual_seed(1)
    rows = [
        torch.randint(config.vocab_size, (length,), generator=generator).tolist()
        for length in PROMPT_LENGTHS
    ]
    chosen = torch.stack([greedy(theirs, row, new_tokens) for row in rows])  # (B, N)
    ours = {backend: fed_logits(model, rows, chosen, backend) for backend in BACKENDS}
    del model
    clock.release()
    expected = full_logits(theirs, rows, chosen)  # (B, N, V)
    exact = None if dtype == "float32" else full_logits(theirs.float(), rows, chosen)
    del theirs
    clock.release()
    for backend, logits in ours.items():
        equal = logits.argmax(-1) == chosen.cpu()  # (B, N)
        if exact is None:
            error = (difference(logits, expected) / expected.abs().max()).item()
            limit = FLOAT32_TOLERANCE
        else:
            error = difference(logits, exact).item()
            limit = 2 * difference(expected, exact).item()
        yield {
            "backend": backend,
            "dtype": dtype,
            "layers": config.n_layer,
            "heads": config.n_head,
            "width": config.n_embd,
            "tokens": equal.numel(),
            "tokens_equal": equal.sum().item(),
            "logits_error": error,
            "logits_limit": limit,
            # In 16 bit two tokens may be as likely as each other.
            "passed": error <= limit and (exact is not None or bool(equal.all())),
        }


@torch.no_grad()
def random_pair(config: GPTConfig, dtype: torch.dtype, device: torch.device) -> tuple[GPT, Any]:
    """Our model and transformers' with the same random weights, made where they run.

    Attention is peaked (at the usual initialisation a wrong mask hardly shows) and no bias is 0.
    """
    from transformers import GenerationConfig, GPTBigCodeConfig, GPTBigCodeForCausalLM

    with device:
        theirs: Any = GPTBigCodeForCausalLM._from_config(  # type: ignore[no-untyped-call]
            GPTBigCodeConfig(**config.to_dict()), attn_implementation="eager"
        )
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if parameter.ndim == 1:
            center = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
            parameter.normal_(center, 0.3, generator=generator)
        else:
            std = 2 * config.n_embd**-0.5
            if name.endswith("c_proj.weight"):
                std *= (2 * config.n_layer) ** -0.5
            parameter.normal_(0.0, std, generator=generator)
    theirs = theirs.to(dtype).eval()
    # No end token, no special cases: greedy is the largest logit and nothing else.
    theirs.generation_config = GenerationConfig(pad_token_id=0)  # type: ignore[no-untyped-call]
    with device:
        model = GPT(config, backend="reference").to(dtype).eval()
    model.load_state_dict(theirs.state_dict())
    return model, theirs


@torch.inference_mode()
def greedy(theirs: Any, row: list[int], count: int) -> Tensor:
    """The (count,) tokens that transformers generates behind a prompt."""
    ids = torch.tensor([row], device=theirs.device)
    output = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    return output[0, len(row) :]


@torch.inference_mode()
def full_logits(theirs: Any, rows: list[list[int]], chosen: Tensor) -> Tensor:
    """transformers' logits (B, N, V) of each chosen token, without a cache; float32 on the CPU."""
    logits = []
    for row, tokens in zip(rows, chosen, strict=True):
        ids = torch.cat([torch.tensor(row, device=chosen.device), tokens[:-1]])[None]
        logits.append(theirs(ids, use_cache=False).logits[0, len(row) - 1 :].float().cpu())
    return torch.stack(logits)


@torch.inference_mode()
def fed_logits(model: GPT, rows: list[list[int]], chosen: Tensor, backend: str) -> Tensor:
    """Our logits (B, N, V) of the same, from one ragged batch with a cache."""
    model.set_backend(backend)
    slots = max(map(len, rows)) + chosen.shape[1]
    cache = KVCache(model.config, len(rows), slots, dtype=model.dtype, device=model.device)
    steps = [prefill(model, cache, rows)]
    for tokens in chosen.T[:-1]:
        steps.append(model(tokens[:, None], cache=cache)[:, 0])
    return torch.stack(steps, 1).float().cpu()


def difference(a: Tensor, b: Tensor) -> Tensor:
    """max |a - b|; NaN anywhere gives NaN."""
    return (a - b).abs().max()
