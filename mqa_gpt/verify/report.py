"""What `mqa_gpt.verify.compare` found, as an object, as JSON and as a table of plain text."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from mqa_gpt.attention import backend_text


@dataclass(frozen=True)
class Divergence:
    """The first new token that differs.

    `position` counts the prompt's new tokens from 0; `margin` is how far transformers' largest
    logit is above its second largest there. Texts are None without a tokenizer.
    """

    position: int
    ours: int
    reference: int
    ours_text: str | None
    reference_text: str | None
    margin: float


@dataclass(frozen=True)
class PromptReport:
    """One prompt's comparison.

    `absolute_error` and `relative_error` hold one number per position of prompt and new tokens:
    max |ours - reference| over the vocabulary, and that over the position's largest logit. The
    reference is the more precise of the two computations where there are two.
    """

    name: str
    prompt_tokens: int
    new_tokens: int
    equal_tokens: int
    divergence: Divergence | None
    absolute_error: list[float]
    relative_error: list[float]


@dataclass(frozen=True)
class Report:
    """What `verify` found. `logits_error` must not exceed `logits_limit`, or only be finite where
    that is None; `rule` says in words what the two are. `backend` is the attention backend that
    computed, `asked_backend` that or "auto". `reference` says which transformers it was and how it
    got the weights. The losses are those of the prompts' tokens, in nats per token; None where no
    prompt has two tokens.
    """

    model: str
    dtype: str
    device: str
    backend: str
    asked_backend: str
    quantize: str | None
    cache_dtype: str | None
    reference: str
    rule: str
    logits_error: float
    logits_limit: float | None
    loss: float | None
    reference_loss: float | None
    tokens_must_be_equal: bool
    prompts: list[PromptReport]

    @property
    def logits_passed(self) -> bool:
        """Whether the logits keep to the rule; NaN does not."""
        limit = self.logits_limit
        return math.isfinite(self.logits_error) if limit is None else self.logits_error <= limit

    @property
    def tokens_passed(self) -> bool:
        """Whether all greedy tokens are equal, or need not be."""
        return not self.tokens_must_be_equal or all(p.divergence is None for p in self.prompts)

    @property
    def passed(self) -> bool:
        """Whether the checkpoint computes what it computes in transformers."""
        return self.logits_passed and self.tokens_passed

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return {"passed": self.passed, **asdict(self)}


def format_report(report: Report) -> str:
    """The report as lines of text: a table of the prompts, then the two verdicts."""
    lines = [
        f"{report.model} in {report.dtype} on {report.device}, "
        f"backend {backend_text(report.asked_backend, report.backend)}"
        + ("" if report.quantize is None else f", weights in {report.quantize}")
        + ("" if report.cache_dtype is None else f", cache in {report.cache_dtype}"),
        f"against {report.reference}",
        "",
        f"{'prompt':32}  {'tokens':>6}  {'max error':>9}  {'by position':>11}  equal new tokens",
    ]
    notes = []
    for prompt in report.prompts:
        name = repr(prompt.name)[1:-1]  # one line, and no control characters for the terminal
        name = name if len(name) <= 32 else f"{name[:29]}..."
        absolute, relative = _largest(prompt.absolute_error), _largest(prompt.relative_error)
        lines.append(
            f"{name:32}  {prompt.prompt_tokens:6}  {absolute:9.2e}  {relative:11.2e}"
            f"  {prompt.equal_tokens} of {prompt.new_tokens}"
        )
        if (d := prompt.divergence) is not None:
            notes.append(
                f"{name}: new token {d.position} is {d.ours} {_quoted(d.ours_text)}here and "
                f"{d.reference} {_quoted(d.reference_text)}in transformers, whose two largest "
                f"logits differ by {d.margin:.2e} there"
            )
    equal = sum(prompt.equal_tokens for prompt in report.prompts)
    total = sum(prompt.new_tokens for prompt in report.prompts)
    # An approximation has no limit to pass, but it can fail: with NaN.
    checked = report.logits_limit is not None or not report.logits_passed
    logits = "info" if not checked else "pass" if report.logits_passed else "FAIL"
    tokens = "info" if not report.tokens_must_be_equal else "pass" if not notes else "FAIL"
    limit = "" if report.logits_limit is None else f", limit {report.logits_limit:.2e}"
    # The verdict's ratio is another: its two maxima may be of different positions.
    lines.append("by position: the largest error over the largest logit of its own position")
    lines += ["", *notes, f"logits  {logits}  {report.logits_error:.2e}{limit}: {report.rule}"]
    if report.loss is not None and report.reference_loss is not None:
        lines.append(
            f"loss    info  {report.loss:.4f} nats per token of the prompts, "
            f"{report.reference_loss:.4f} in transformers"
        )
    promise = (
        ""
        if report.tokens_must_be_equal
        else (f", which {report.quantize or report.cache_dtype or report.dtype} does not promise")
    )
    lines.append(f"tokens  {tokens}  {equal} of {total} greedy tokens equal{promise}")
    return "\n".join(lines)


def _largest(errors: list[float]) -> float:
    """The largest error, where NaN, which `max` may pass over, is the largest of all."""
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


def _quoted(text: str | None) -> str:
    return "" if text is None else f"{text!r} "
