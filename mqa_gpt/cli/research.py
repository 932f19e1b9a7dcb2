"""`mqa-gpt research`: the analyses of `mqa_gpt.research`, each as a table, JSON and a picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from mqa_gpt.checkpoints.hub import resolve
from mqa_gpt.checkpoints.load import load_model
from mqa_gpt.cli.input import read_text
from mqa_gpt.cli.options import Json, ModelOptions, with_groups
from mqa_gpt.cli.output import new_table, note, print_json, print_table, visible
from mqa_gpt.errors import InputError, shown
from mqa_gpt.generation.score import score_texts
from mqa_gpt.model import GPT
from mqa_gpt.research import heads, lens, patching, pictures
from mqa_gpt.research.lens import as_row
from mqa_gpt.tokenizer import Tokenizer

Text = Annotated[str, typer.Argument(metavar="TEXT", help="A text; - is standard input.")]
Picture = Annotated[
    str | None, typer.Option(metavar="PATH", help="Write a picture: .png, .svg or .pdf.")
]
Token = Annotated[str | None, typer.Option(metavar="TEXT", help="A text of one token.")]

app = typer.Typer(
    name="research",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Look inside a model: which layer, head or position does what.",
)


def _command(function: Callable[..., None]) -> Callable[..., None]:
    app.command(name=function.__name__.replace("_", "-"))(with_groups(function))
    return function


@_command
def logit_lens(
    text: Text,
    *,
    last: Annotated[int, typer.Option(metavar="N", min=1, help="Show the last N positions.")] = 10,
    model: ModelOptions,
    picture: Picture = None,
    as_json: Json = False,
) -> None:
    """Read the residual stream after each layer as a next token.

    \b
    Example:
      mqa-gpt research logit-lens 'def copy(source, target):\\n    for item in' --picture lens.png
    """
    gpt, tokenizer = _load(model)
    ids = _ids(tokenizer, text)
    found = lens.logit_lens(gpt, ids)
    found = lens.Lens(*(x[:, -last:] for x in vars(found).values()))
    names = ["embedding", *(f"layer {i}" for i in range(gpt.config.n_layer))]
    read = [tokenizer.decode([id_], skip_special_tokens=False) for id_ in ids[-last:]]
    top = [[_text(tokenizer, id_) for id_ in row] for row in found.top_ids.tolist()]
    if picture is not None:
        flat = [token for row in top for token in row]
        pictures.save(pictures.lens_picture(found, [*read, *flat]), picture)
    if as_json:
        _print(model, {"tokens": read, "layers": names, "top": top, **_lists(found)})
        return
    table = new_table("stream after", *(f"after {_show(token)}" for token in read))
    for name, row, shares in zip(names, top, found.probability.tolist(), strict=True):
        table.add_row(name, *(f"{_show(t)} {p:.2f}" for t, p in zip(row, shares, strict=True)))
    print_table(table)
    note("the number: the probability that the layer gives to the model's own choice")


@_command
def attribution(
    text: Text,
    *,
    token: Token = None,
    against: Token = None,
    model: ModelOptions,
    picture: Picture = None,
    as_json: Json = False,
) -> None:
    """Split the logit of the next token into what each head and MLP adds.

    Without --token it is the likeliest one; with --against the difference of two logits.

    \b
    Example:
      mqa-gpt research attribution 'import random\\nimport' --against ' sys'
    """
    gpt, tokenizer = _load(model)
    ids = _ids(tokenizer, text)
    target = _likeliest(gpt, ids) if token is None else _one_token(tokenizer, token)
    other = None if against is None else _one_token(tokenizer, against)
    found = lens.logit_attribution(gpt, ids, target, against=other)
    minus = "" if other is None else f" minus {_text(tokenizer, other)!r}"
    title = f"logit of {_text(tokenizer, target)!r}{minus}"
    if picture is not None:
        pictures.save(pictures.attribution_picture(found, title), picture)
    if as_json:
        _print(model, {"token": target, "against": other, **_lists(found)})
        return
    table = new_table("layer", *(f">head {h}" for h in range(gpt.config.n_head)), ">bias", ">MLP")
    for i, row in enumerate(found.heads.tolist()):
        numbers = [*row, found.biases[i].item(), found.mlps[i].item()]
        table.add_row(str(i), *(f"{x:.3f}" for x in numbers))
    print_table(table)
    note(
        f"{title} is {found.total:.3f}: with {found.embedding:.3f} of the embedding and "
        f"{found.constant:.3f} of the last normalisation's bias"
    )


@_command
def attention(
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="For the previous-token score.")
    ] = None,
    *,
    prefix: Annotated[str | None, typer.Option(metavar="TEXT", help="Before a hole.")] = None,
    middle: Annotated[str | None, typer.Option(metavar="TEXT", help="What fills it.")] = None,
    suffix: Annotated[str | None, typer.Option(metavar="TEXT", help="After it.")] = None,
    model: ModelOptions,
    picture: Picture = None,
    as_json: Json = False,
) -> None:
    """Which heads attend to the previous token, to earlier occurrences, to parts of an infill.

    With --prefix, --middle and --suffix: how much of its attention each head spends on each of
    them while the middle is written, in both infilling orders.

    \b
    Examples:
      mqa-gpt research attention 'def find(names, name):' --picture heads.png
      mqa-gpt research attention --prefix 'def add(a, b):\\n    return ' --middle a --suffix ' + b'
    """
    gpt, tokenizer = _load(model)
    parts = (prefix, middle, suffix)
    scores: dict[str, Tensor] = {}
    if all(part is not None for part in parts):
        for mode in ("psm", "spm"):
            before, inside, after = map(_unescaped, parts)
            shares = heads.hole_shares(gpt, tokenizer, before, inside, after, mode)
            scores |= {f"{name} ({mode.upper()})": share for name, share in shares.items()}
        title = "Attention while the middle of an infill is written"
    elif any(part is not None for part in parts) or text is None:
        raise InputError("give a TEXT, or --prefix, --middle and --suffix")
    else:
        patterns = heads.attention_patterns(gpt, _ids(tokenizer, text))
        scores["previous token"] = heads.previous_token_scores(patterns)
        length = min(64, gpt.config.n_positions // 2)
        scores["induction"] = heads.induction_scores(gpt, length=length)
        title = "Attention to the previous token, and to what followed the token before"
    if picture is not None:
        pictures.save(pictures.heads_picture(scores, title), picture)
    if as_json:
        _print(model, {name: share.tolist() for name, share in scores.items()})
        return
    table = new_table("layer", ">head", *(f">{name}" for name in scores))
    L, H = next(iter(scores.values())).shape
    for i in range(L):
        for h in range(H):
            table.add_row(str(i), str(h), *(f"{share[i, h]:.3f}" for share in scores.values()))
    print_table(table)


@_command
def patch(
    clean: Annotated[str, typer.Argument(metavar="CLEAN")],
    corrupted: Annotated[str, typer.Argument(metavar="CORRUPTED")],
    *,
    answer: Annotated[str | None, typer.Option(metavar="TEXT", help="Of the clean prompt.")] = None,
    against: Annotated[str | None, typer.Option(metavar="TEXT", help="Of the other.")] = None,
    point: Annotated[
        str, typer.Option(metavar="NAME", help="What is patched, at all layers.")
    ] = patching.RESIDUALS,
    steps: Annotated[
        int, typer.Option(metavar="N", min=1, help="Gradients that the estimate averages.")
    ] = 1,
    model: ModelOptions,
    picture: Picture = None,
    as_json: Json = False,
) -> None:
    """Activation patching over layers and positions, and its estimate by attribution patching.

    Two prompts of equally many tokens have different answers. The corrupted one runs with one
    activation of the clean run in its place: 1 brings the clean answer back, 0 changes nothing.
    Without --answer and --against, the answers are the likeliest next tokens.

    \b
    Example:
      mqa-gpt research patch 'def f(source):\\n    for x in' 'def f(names):\\n    for x in'
    """
    gpt, tokenizer = _load(model)
    ids, other = _ids(tokenizer, clean), _ids(tokenizer, corrupted)
    right = _likeliest(gpt, ids) if answer is None else _one_token(tokenizer, answer)
    wrong = _likeliest(gpt, other) if against is None else _one_token(tokenizer, against)
    if right == wrong:
        raise InputError(
            f"both answers are {_text(tokenizer, right)!r}: give others with --answer and --against"
        )
    metric = patching.logit_difference(right, wrong)
    found = {
        "activation patching": patching.patch_positions(gpt, ids, other, metric, point),
        "attribution patching": patching.attribute_positions(
            gpt, ids, other, metric, point, steps=steps
        ),
    }
    correlation = patching.agreement(*found.values())
    agreed = "none" if correlation is None else f"{correlation:.3f}"
    truth = found["activation patching"].restored  # (L, T)
    tokens = [_text(tokenizer, id_) for id_ in ids]
    question = f"{_text(tokenizer, right)!r} against {_text(tokenizer, wrong)!r}"
    if picture is not None:
        title = f"{question}, patched at {point}; correlation of the two: {agreed}"
        pictures.save(pictures.patching_picture(found, tokens, title), picture)
    if as_json:
        _print(
            model,
            {"answer": right, "against": wrong, "tokens": tokens, "correlation": correlation}
            | {name: _lists(one) for name, one in found.items()},
        )
        return
    table = new_table("position", "token", *(f">layer {i}" for i in range(len(truth))))
    for t, token in enumerate(tokens):
        table.add_row(str(t), _show(token), *(f"{x:.2f}" for x in truth[:, t].tolist()))
    print_table(table)
    note(f"{question}; correlation with attribution patching ({steps} steps): {agreed}")


@_command
def loss(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A file; - is standard input.")],
    *,
    model: ModelOptions,
    picture: Picture = None,
    as_json: Json = False,
) -> None:
    """The loss of each token of a file: as a heat-mapped listing, or its lines in a table.

    \b
    Example:
      mqa-gpt research loss app.py --picture loss.png
    """
    gpt, tokenizer = _load(model)
    text = read_text(file)
    (score,) = score_texts(gpt, tokenizer, [text], special_tokens=False)
    tokens = [_text(tokenizer, id_) for id_ in score.token_ids]
    if picture is not None:
        title = f"{score.bits_per_byte:.3f} bits per byte"
        pictures.save(pictures.loss_picture(score, tokens, title), picture)
    if as_json:
        _print(
            model,
            {"file": file, "bits_per_byte": score.bits_per_byte, "tokens": tokens}
            | {"logprobs": score.logprobs},
        )
        return
    table = new_table(">line", ">tokens", ">bits", "text")
    line, count, bits, shown_text = 1, 0, 0.0, ""
    for i, (token, value) in enumerate(zip(tokens, score.logprobs, strict=True)):
        count, bits, shown_text = count + 1, bits - (value or 0.0) / 0.6931, shown_text + token
        if "\n" in token or i == len(tokens) - 1:
            table.add_row(str(line), str(count), f"{bits:.1f}", visible(shown_text.split("\n")[0]))
            line, count, bits = line + token.count("\n"), 0, 0.0
            shown_text = token.rsplit("\n", 1)[-1]
    print_table(table)


@_command
def sharing(
    text: Text,
    *,
    model: ModelOptions,
    picture: Picture = None,
    as_json: Json = False,
) -> None:
    """What one K/V head costs: how alike heads are, and the effective rank of K and V.

    Run it on a model with many K/V heads and on what it was converted to, with the same text.

    \b
    Example:
      mqa-gpt research sharing "$(cat app.py)" --picture sharing.png
    """
    gpt, tokenizer = _load(model)
    ids, config = _ids(tokenizer, text), gpt.config
    found = heads.kv_sharing(gpt, ids)
    most = heads.most_rank(config, len(ids))
    if picture is not None:
        kv_heads = f"{config.n_kv_head} K/V head{'s' * (config.n_kv_head > 1)} of {config.head_dim}"
        title = f"{config.n_head} query heads, {kv_heads}, {len(ids)} tokens"
        pictures.save(pictures.sharing_picture(found, most, title), picture)
    if as_json:
        _print(model, {"head_dim": config.head_dim, "most_rank": most, **_lists(found)})
        return
    table = new_table("layer", ">attention in common", ">rank of K", ">rank of V", ">of at most")
    others = ~torch.eye(config.n_head).bool()
    for i, overlap in enumerate(found.overlap.cpu()):
        common = overlap[others].mean().item() if config.n_head > 1 else 1.0
        ranks = (found.all_key_rank[i], found.all_value_rank[i])
        table.add_row(str(i), f"{common:.3f}", *(f"{x:.1f}" for x in ranks), str(most))
    print_table(table)


def _load(options: ModelOptions) -> tuple[GPT, Tokenizer]:
    """The model with readable weights, in float32 unless asked otherwise, and its tokenizer."""
    options.check()
    folder = resolve(options.name_or_dir, options.revision)
    options.set_threads()
    model = load_model(
        folder,
        device=options.device,
        dtype=options.dtype or "float32",
        backend=options.backend,
        quantize=options.quantize,
    )
    return model, Tokenizer.from_pretrained(folder)


def _unescaped(text: str | None) -> str:
    return (text or "").replace("\\n", "\n").replace("\\t", "\t")


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(read_text("-") if text == "-" else _unescaped(text))


def _one_token(tokenizer: Tokenizer, text: str) -> int:
    ids = tokenizer.encode(_unescaped(text))
    if len(ids) != 1:
        raise InputError(f"{shown(text)} is {len(ids)} tokens: give a text that is one token")
    return ids[0]


@torch.no_grad()
def _likeliest(model: GPT, ids: list[int]) -> int:
    """The next token that the model finds likeliest."""
    return int(model(as_row(model, ids))[0, -1].argmax())


def _text(tokenizer: Tokenizer, id_: int) -> str:
    return tokenizer.decode([id_], skip_special_tokens=False)


def _show(token: str) -> str:
    return visible(repr(token)[1:-1])


def _lists(found: Any) -> dict[str, Any]:
    """The fields of a result for JSON."""
    return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in vars(found).items()}


def _print(model: ModelOptions, report: dict[str, Any]) -> None:
    print_json({"model": model.name, **report})
