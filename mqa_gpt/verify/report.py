"""The results of `mqa_gpt.verify.compare` as an object, JSON and a table of plain text."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from mqa_gpt.attention import backend_text


@dataclass(frozen=True)
class Divergence:
    """The first new token that differs.

    Attributes:
        position: among the prompt's new tokens, from 0.
        ours_text, reference_text: None without a tokenizer.
        margin: by how much transformers' largest logit exceeds its second largest there.
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

    Attributes:
        equal_tokens: new tokens before the first that differs.
        absolute_error: per position of prompt and new tokens, max |ours - reference| over the
            vocabulary. Where the reference computes in two precisions, the higher one counts.
        relative_error: the same over the position's largest logit.
    """

    name: str
    prompt_tokens: int
    new_tokens: int
    equal_tokens: int
    divergence: Divergence | None
    absolute_error: list[float]
    relative_error: list[float]


@dataclass(frozen=True)
class VerifyReport:
    """The result of `verify`.

    Attributes:
        backend: the attention backend that computed.
        asked_backend: the same, or "auto".
        reference: which transformers it was, and how it got the weights.
        rule: what `logits_error` and `logits_limit` are, in words.
        logits_limit: what the error must not exceed; None where it only has to be finite.
        loss, reference_loss: of the prompts' tokens, in nats per token; None where no prompt has
            two tokens.
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
        """Whether the error is within the limit; NaN is not."""
        limit = self.logits_limit
        return math.isfinite(self.logits_error) if limit is None else self.logits_error <= limit

    @property
    def tokens_passed(self) -> bool:
        """Whether all greedy tokens are equal, or need not be."""
        return not self.tokens_must_be_equal or all(p.divergence is None for p in self.prompts)

    @property
    def passed(self) -> bool:
        """Whether the checkpoint computes the same as in transformers."""
        return self.logits_passed and self.tokens_passed

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return {"passed": self.passed, **asdict(self)}


def format_report(report: VerifyReport) -> str:
    """The report as text: a table of the prompts, then a verdict each for logits and tokens.

    Prompts are in the last column, so that a narrow terminal wraps them and no number.
    """
    lines = [
        f"{report.model} in {report.dtype} on {report.device}, "
        f"backend {backend_text(report.asked_backend, report.backend)}"
        + ("" if report.quantize is None else f", weights in {report.quantize}")
        + ("" if report.cache_dtype is None else f", cache in {report.cache_dtype}"),
        f"against {report.reference}",
        "",
        "tokens  max error  by position  equal new tokens  prompt",
    ]
    notes = []
    for prompt in report.prompts:
        name = repr(prompt.name)[1:-1]  # one line, and no control characters for the terminal
        name = name if len(name) <= 32 else f"{name[:29]}..."
        absolute, relative = _largest(prompt.absolute_error), _largest(prompt.relative_error)
        equal = f"{prompt.equal_tokens} of {prompt.new_tokens}"
        lines.append(
            f"{prompt.prompt_tokens:6}  {absolute:9.2e}  {relative:11.2e}  {equal:>16}  {name}"
        )
        if (d := prompt.divergence) is not None:
            notes.append(
                f"{name}: new token {d.position} is {d.ours} {_quoted(d.ours_text)}here and "
                f"{d.reference} {_quoted(d.reference_text)}in transformers, whose two largest "
                f"logits differ by {d.margin:.2e} there"
            )
    equal_tokens = sum(prompt.equal_tokens for prompt in report.prompts)
    total = sum(prompt.new_tokens for prompt in report.prompts)
    # An approximation has no limit to keep, but NaN fails it.
    checked = report.logits_limit is not None or not report.logits_passed
    logits = "info" if not checked else "pass" if report.logits_passed else "FAIL"
    tokens = "info" if not report.tokens_must_be_equal else "pass" if not notes else "FAIL"
    limit = "" if report.logits_limit is None else f", limit {report.logits_limit:.2e}"
    # The verdict's ratio differs: its two maxima may be at different positions.
    lines.append("by position: the error over the largest logit of the same position, at most")
    lines += ["", *notes, f"logits  {logits}  {report.logits_error:.2e}{limit}: {report.rule}"]
    if report.loss is not None and report.reference_loss is not None:
        lines.append(
            f"loss    info  {report.loss:.4f} nats per token of the prompts, "
            f"{report.reference_loss:.4f} in transformers"
        )
    rounding = report.quantize or report.cache_dtype or report.dtype
    promise = "" if report.tokens_must_be_equal else f", which {rounding} does not promise"
    lines.append(f"tokens  {tokens}  {equal_tokens} of {total} greedy tokens equal{promise}")
    return "\n".join(lines)


def _largest(errors: list[float]) -> float:
    """The largest error; NaN, which `max` may skip, counts as the largest."""
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


def _quoted(text: str | None) -> str:
    return "" if text is None else f"{text!r} "
