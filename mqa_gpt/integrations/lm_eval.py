"""The model `mqa-gpt` for EleutherAI's lm-evaluation-harness.

    python -m mqa_gpt.integrations.lm_eval run --model mqa-gpt --tasks TASK ...

is the harness's own command with this model registered; its options are the harness's. In Python,
`lm_eval.simple_evaluate(model=MqaGpt(llm), tasks=[...])`.

Texts are tokenized, cut to the context and windowed as the harness does it for its own `hf` model,
so that figures can be compared.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError("mqa_gpt.integrations.lm_eval needs lm-eval: pip install lm-eval") from error

from mqa_gpt.checkpoints.load import DEMO_DIR
from mqa_gpt.errors import InputError, shown
from mqa_gpt.generation.score import score_ids
from mqa_gpt.llm import BATCH_SIZE, LLM
from mqa_gpt.machine import threads_for

# What the harness's tasks call the options of `LLM.generate`.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
MAX_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")

HARNESS_DEVICE = "cuda:0"  # what the harness asks for where its user has not


@register_model("mqa-gpt")
class MqaGpt(TemplateLM):  # type: ignore[misc]
    """A checkpoint as the harness wants it.

    Args:
        pretrained: a folder or a name on the hub; None is the demo checkpoint. Or a loaded `LLM`,
            with which the options of loading have no meaning.
        batch_size: rows that run at a time; "auto" is 16.
        max_gen_toks: at most this many new tokens, where a task does not say.
        revision, device, dtype, backend, quantize, cache_dtype: see `LLM.load`.
        max_batch_size: given by the harness and without effect.
    """

    def __init__(
        self,
        pretrained: LLM | str | None = None,
        *,
        batch_size: int | str = BATCH_SIZE,
        max_gen_toks: int = 256,
        device: str | None = None,
        dtype: str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, LLM):
            self.llm = pretrained
        else:
            if device == HARNESS_DEVICE and not torch.cuda.is_available():
                device = None
            self.llm = LLM.load(
                DEMO_DIR if pretrained is None else pretrained,
                device=device,
                dtype=None if dtype == "auto" else dtype,
                **options,
            )
            for note in self.llm.notes:
                logging.getLogger(__name__).info(note)
            torch.set_num_threads(threads_for(self.llm.model.config))
        self.batch_size = BATCH_SIZE if str(batch_size).startswith("auto") else int(batch_size)
        self.max_gen_toks = max_gen_toks
        self.max_length = self.llm.model.config.n_positions

    @property
    def eot_token_id(self) -> int:
        """<|endoftext|>, which texts without a context are scored after."""
        id_ = self.llm.tokenizer.end_of_text_id
        if id_ is None:
            raise InputError("the tokenizer has no <|endoftext|>, which lm-eval needs")
        return id_

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps prepared requests under."""
        return repr(self.llm)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text; control tokens spelled out in it act as such, and none is added."""
        return self.llm.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Of each continuation the log-probability, and whether greedy decoding gives it."""
        pairs = []
        for _, context, continuation in requests:
            room = max(1, self.max_length + 1 - len(continuation))  # the last token is not read
            pairs.append((context[-room:], continuation))
        found = score_ids(self.llm.model, pairs, batch_size=self.batch_size)
        results = [(sum(p for p, _ in row), all(greedy for _, greedy in row)) for row in found]
        for (key, _, _), result in zip(requests, results, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], **kwargs: Any) -> list[float]:
        """Log-probability of each text, read in windows that overlap by one token."""
        texts = [request.args[0] for request in requests]
        pairs = [([self.prefix_token_id], self.tok_encode(text)) for text in texts]
        found = score_ids(self.llm.model, pairs, stride=self.max_length, batch_size=self.batch_size)
        results = [sum(p for p, _ in row) for row in found]
        for text, result in zip(texts, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), result)
        return results

    def generate_until(self, requests: Sequence[Any], **kwargs: Any) -> list[str]:
        """Continue each text up to what ends it; too long a text is cut on the left."""
        arguments = [request.args for request in requests]
        completions = self.llm.begin(
            [context for context, _ in arguments],
            batch_size=self.batch_size,
            truncate=True,
            per_prompt=[_options(asked, self.max_gen_toks) for _, asked in arguments],
        ).run()
        for asked, completion in zip(arguments, completions, strict=True):
            self.cache_hook.add_partial("generate_until", asked, completion.text)
        return [completion.text for completion in completions]


def _options(asked: Mapping[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """What a task asks of generation, as `LLM.generate` takes it.

    Raises:
        InputError: an option that is not known here.
    """
    asked = dict(asked)
    counts = [asked.pop(name, None) for name in MAX_NEW_TOKENS]
    until = asked.pop("until", None) or []
    options: dict[str, Any] = {
        "max_new_tokens": next((int(x) for x in counts if x is not None), max_new_tokens),
        "stop": [text for text in ([until] if isinstance(until, str) else until) if text],
    }
    samples = asked.pop("do_sample", float(asked.get("temperature") or 0) > 0)
    given = {name: asked.pop(name) for name in SAMPLING if name in asked}
    if unknown := sorted(asked):
        raise InputError(f"generation_kwargs hold {', '.join(map(shown, unknown))}: remove it")
    if samples:
        options |= {"temperature": 1.0, **given}
    return options


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
