"""LLM: a checkpoint's model and tokenizer in one object that completes and infills text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, Unpack, overload

import torch

from mqa_gpt.checkpoints.hub import resolve
from mqa_gpt.checkpoints.load import DEMO_DIR, load_model, read_config
from mqa_gpt.checkpoints.save import save_model
from mqa_gpt.errors import PromptError, require_int, require_text, shown
from mqa_gpt.fast.int8 import is_quantized
from mqa_gpt.fast.int8_cache import cache_class
from mqa_gpt.fim import check_mode, infill_prompt, truncated_infill_prompt
from mqa_gpt.generation.batching import Engine
from mqa_gpt.generation.completion import Completion, Generation, Options, check_options
from mqa_gpt.generation.request import Request, all_problems, make_requests, stop_texts
from mqa_gpt.model import GPT
from mqa_gpt.sampling import SamplingParams
from mqa_gpt.tokenizer import Tokenizer

BATCH_SIZE = 16  # rows that run at a time, where there are many prompts


class LLM:
    """A model and its tokenizer: text in, text out.

    Attributes:
        model: the `GPT`; from `load` on a CPU its weights may be packed, which is for
            inference only (see `mqa_gpt.fast.packing`).
        tokenizer: its `Tokenizer`.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._idle: list[Engine] = []  # with graphs that a further generation can replay

    def __repr__(self) -> str:
        model = self.model
        dtype = "int8" if is_quantized(model) else str(model.dtype).removeprefix("torch.")
        # From the config, because packed weights are no parameters.
        return f"LLM({model.config.parameters:,} parameters, {dtype} on {model.device})"

    @classmethod
    def load(
        cls,
        name_or_dir: str | PathLike[str] | None = None,
        *,
        revision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        backend: str = "auto",
        quantize: str | None = None,
        cache_dtype: str | None = None,
    ) -> LLM:
        """Load a checkpoint with its tokenizer, ready to generate.

        On a CPU, float32 and 8-bit weights are packed for speed, and bfloat16 ones if it has
        AVX512-BF16 (see `mqa_gpt.fast.packing`). To train, edit or save a model, take
        `LLM(GPT.from_pretrained(...), Tokenizer.from_pretrained(...))`.

        Args:
            name_or_dir: a folder or a name on the hub; None is the bundled demo checkpoint.
            revision, device, dtype, backend, quantize: see `mqa_gpt.checkpoints.load.load_model`.
            cache_dtype: "int8" keeps keys and values as 8-bit integers, see `KVCache`.

        Raises:
            CheckpointError, ConfigError: the checkpoint cannot be had or used; says why.
        """
        new_cache_class = cache_class(cache_dtype)
        folder = resolve(DEMO_DIR if name_or_dir is None else name_or_dir, revision)
        read_config(folder)  # a folder that is no checkpoint lacks more than a tokenizer
        tokenizer = Tokenizer.from_pretrained(folder)
        model = load_model(
            folder, device=device, dtype=dtype, backend=backend, quantize=quantize, packed=True
        )
        model.cache_class = new_cache_class
        return cls(model, tokenizer)

    def save(self, folder: str | PathLike[str], *, max_shard_size: int | str = "5GB") -> None:
        """Write a checkpoint, model and tokenizer, that `load` reads, and transformers too unless
        the weights are 8-bit integers.

        Arguments, errors and what happens to a folder that exists are those of
        `mqa_gpt.checkpoints.save.save_model`.

        Raises:
            InputError: the weights are packed, as `load` packs most on a CPU (see there):
                take `LLM(GPT.from_pretrained(...), Tokenizer.from_pretrained(...))`.
        """
        save_model(self.model, folder, tokenizer=self.tokenizer, max_shard_size=max_shard_size)

    @overload
    def generate(
        self,
        prompt: str,
        max_new_tokens: int | None = 64,
        *,
        n: Literal[1] = 1,
        special_tokens: bool = True,
        **options: Unpack[Options],
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: list[str] | tuple[str, ...],
        max_new_tokens: int | None = 64,
        *,
        n: Literal[1] = 1,
        special_tokens: bool = True,
        **options: Unpack[Options],
    ) -> list[Completion]: ...

    @overload
    def generate(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int | None = 64,
        *,
        n: int,
        special_tokens: bool = True,
        **options: Unpack[Options],
    ) -> Any: ...

    def generate(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int | None = 64,
        *,
        n: int = 1,
        special_tokens: bool = True,
        **options: Unpack[Options],
    ) -> Any:
        """Complete one prompt or several, together.

        Args:
            prompt: text, or a list of texts. An empty one starts from end-of-text.
            max_new_tokens: at most this many new tokens per completion; None for as many as fit
                into the context.
            n: samples per prompt, from one prefill of it.
            special_tokens: whether control tokens spelled out in a prompt, such as <fim_prefix>,
                act as such.
            options: see `mqa_gpt.Options`.

        Returns:
            For a text a `Completion`, with n > 1 a list of n; for a list of texts a list of these.

        Raises:
            PromptError: an unusable prompt or option.
        """
        texts = [prompt] if isinstance(prompt, str) else prompt
        completions = self.begin(
            texts, max_new_tokens, n=n, special_tokens=special_tokens, **options
        ).run()
        if n > 1:
            samples = [completions[i : i + n] for i in range(0, len(completions), n)]
            return samples[0] if isinstance(prompt, str) else samples
        return completions[0] if isinstance(prompt, str) else completions

    @overload
    def generate_many(
        self,
        prompts: Sequence[str | tuple[str, str]],
        max_new_tokens: int | None = 64,
        *,
        n: Literal[1] = 1,
        batch_size: int = BATCH_SIZE,
        special_tokens: bool = True,
        mode: str = "psm",
        **options: Unpack[Options],
    ) -> Iterator[Completion]: ...

    @overload
    def generate_many(
        self,
        prompts: Sequence[str | tuple[str, str]],
        max_new_tokens: int | None = 64,
        *,
        n: int,
        batch_size: int = BATCH_SIZE,
        special_tokens: bool = True,
        mode: str = "psm",
        **options: Unpack[Options],
    ) -> Iterator[Any]: ...

    def generate_many(
        self,
        prompts: Sequence[str | tuple[str, str]],
        max_new_tokens: int | None = 64,
        *,
        n: int = 1,
        batch_size: int = BATCH_SIZE,
        special_tokens: bool = True,
        mode: str = "psm",
        **options: Unpack[Options],
    ) -> Iterator[Any]:
        """Complete any number of prompts, some of which run at a time.

        The next prompt takes the slot of one that is finished (`mqa_gpt.generation.batching`).
        Everything is checked at once, before the first completion.

        Args:
            prompts: texts, and pairs (prefix, suffix) between which to infill.
            batch_size: rows that run at a time; there is a KV cache for these.
            max_new_tokens, n, special_tokens: as in `generate`.
            mode: as in `infill`.
            options: as in `generate`, without `draft`.

        Returns:
            What `generate` gives for each prompt, in order: each as soon as it and all before it
            are finished.

        Raises:
            PromptError: an unusable option, or prompts, all of which it names.
            CheckpointError: a pair, where the tokenizer has no infilling tokens.
        """
        generation = self.begin_many(
            prompts,
            max_new_tokens,
            n=n,
            batch_size=batch_size,
            special_tokens=special_tokens,
            mode=mode,
            **options,
        )
        return (samples if n > 1 else samples[0] for samples in generation.run_in_order())

    def stream(
        self,
        prompt: str,
        max_new_tokens: int | None = 64,
        *,
        special_tokens: bool = True,
        **options: Unpack[Options],
    ) -> Iterator[str]:
        """Complete one prompt, piece by piece as the text becomes final.

        Arguments and errors are those of `generate`; errors come at once, not with the first piece.
        """
        generation = self.begin(
            [prompt], max_new_tokens, n=1, special_tokens=special_tokens, **options
        )
        return (piece for _, piece in generation)

    def infill(
        self,
        prefix: str,
        suffix: str,
        max_new_tokens: int | None = 64,
        *,
        mode: str = "psm",
        truncate: bool = False,
        file_name: str | None = None,
        repo_name: str | None = None,
        **options: Unpack[Options],
    ) -> Completion:
        """Write what belongs between a prefix and a suffix (Bavarian et al. 2022).

        Args:
            prefix, suffix: plain text; control tokens spelled out in it stay text.
            mode: "psm" or "spm", the order in which the model is shown the two.
            truncate: cut the far ends of prefix and suffix where they exceed the context, instead
                of raising.
            file_name, repo_name: where the text is from, as models of the StarCoder family saw it
                in training; see `mqa_gpt.fim.infill_prompt`.
            options: see `mqa_gpt.Options`.

        Raises:
            CheckpointError: the checkpoint's tokenizer has no infilling tokens.
            PromptError: an unusable text or option.
        """
        return self.begin_infill(
            prefix,
            suffix,
            max_new_tokens,
            n=1,
            mode=mode,
            truncate=truncate,
            file_name=file_name,
            repo_name=repo_name,
            **options,
        ).run()[0]

    def begin(
        self,
        prompts: Sequence[str],
        max_new_tokens: int | None = 64,
        *,
        n: int = 1,
        special_tokens: bool = True,
        truncate: bool = False,
        names: Sequence[str] | None = None,
        **options: Unpack[Options],
    ) -> Generation:
        """Start completing prompts; what `generate` and `stream` run on, with their arguments.

        Args:
            names: what messages call the prompts; "prompt 0", "prompt 1", ... if None.
        """
        check_options(options)
        if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence):
            raise PromptError(
                f"the prompt is {shown(prompts)}: it must be a text or a list of texts"
            )
        names = names or _names(len(prompts))
        ids = self._encode(prompts, names, special_tokens=special_tokens, truncate=truncate)
        requests = self._requests(ids, max_new_tokens, options, n=n, truncate=truncate, names=names)
        return Generation(self.model, self.tokenizer, requests, idle=self._idle)

    def begin_many(
        self,
        prompts: Sequence[str | tuple[str, str]],
        max_new_tokens: int | None = 64,
        *,
        n: int = 1,
        batch_size: int = BATCH_SIZE,
        special_tokens: bool = True,
        mode: str = "psm",
        truncate: bool = False,
        names: Sequence[str] | None = None,
        per_prompt: Sequence[Mapping[str, Any]] | None = None,
        **options: Unpack[Options],
    ) -> Generation:
        """Start completing many prompts; what `generate_many` runs on, with its arguments.

        Args:
            names: what messages call the prompts; "prompt 0", "prompt 1", ... if None.
            per_prompt: options of each prompt's own, `max_new_tokens` among them, which go before
                the common ones.
        """
        check_options(options)
        if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence):
            raise PromptError(f"prompts are {shown(prompts)}: they must be a list of texts")
        batch_size = require_int(PromptError, "batch_size", batch_size, 1)
        if options.get("draft") is not None:
            raise PromptError(
                "draft is for prompts that are completed all at once: leave it or batch_size out"
            )
        names = names or _names(len(prompts))
        ids = self._encode(
            prompts, names, special_tokens=special_tokens, mode=mode, truncate=truncate
        )
        if per_prompt is None:
            requests = self._requests(
                ids, max_new_tokens, options, n=n, truncate=truncate, names=names
            )
        else:
            requests, problems = [], {}
            for row, name, own in zip(ids, names, per_prompt, strict=True):
                merged = {"max_new_tokens": max_new_tokens, **options, **own}
                room = merged.pop("max_new_tokens")
                check_options(merged)
                try:
                    requests += self._requests(
                        [row], room, merged, n=n, truncate=truncate, names=[name]
                    )
                except PromptError as error:  # about the prompt, or about an option of its line
                    is_named = str(error).startswith(name)
                    problems[name] = error if is_named else PromptError(f"{name}: {error}")
            if problems:
                raise all_problems(problems)
        return Generation(self.model, self.tokenizer, requests, slots=batch_size, idle=self._idle)

    def begin_infill(
        self,
        prefix: str,
        suffix: str,
        max_new_tokens: int | None = 64,
        *,
        n: int = 1,
        mode: str = "psm",
        truncate: bool = False,
        file_name: str | None = None,
        repo_name: str | None = None,
        **options: Unpack[Options],
    ) -> Generation:
        """Start infilling, with the arguments of `infill`; n samples of it."""
        check_options(options)
        # A probe checks the options before the number of new tokens is used.
        self._requests([[0]], 0 if max_new_tokens is None else max_new_tokens, options, n=n)
        context, cut = self.model.config.n_positions, (0, 0)
        room = context - (1 if max_new_tokens is None else max_new_tokens)
        named: dict[str, Any] = {"mode": mode, "file_name": file_name, "repo_name": repo_name}
        if truncate:
            fitted = truncated_infill_prompt(self.tokenizer, prefix, suffix, room, **named)
            ids, cut = fitted.ids, (fitted.cut_prefix, fitted.cut_suffix)
        else:
            self._require_short(prefix, "prefix")
            self._require_short(suffix, "suffix")
            ids = infill_prompt(self.tokenizer, prefix, suffix, **named)
            if 0 < room < len(ids):
                raise PromptError(
                    f"prefix and suffix take {len(ids):,} tokens and max_new_tokens is "
                    f"{context - room:,}: together they exceed the context of {context:,} tokens; "
                    "truncate=True (--truncate) leaves out what is farthest from the hole"
                )
        # A filling ends at any control token: the model has left the hole then.
        requests = self._requests(
            [ids], max_new_tokens, options, n=n, end_ids=self.tokenizer.special_ids
        )
        return Generation(self.model, self.tokenizer, requests, idle=self._idle, cut=cut)

    def _require_short(self, text: str, name: str) -> None:
        """PromptError for a text that is too long for the context, before it is tokenized."""
        require_text(name, text)
        least, context = self.tokenizer.min_tokens(text), self.model.config.n_positions
        if least > context:
            raise PromptError(
                f"{name} has {len(text):,} characters, at least {least:,} tokens: they exceed the "
                f"context of {context:,} tokens; shorten it, or let truncate=True (--truncate) "
                "cut it"
            )

    def _encode(
        self,
        prompts: Sequence[str | tuple[str, str]],
        names: Sequence[str],
        *,
        special_tokens: bool,
        mode: str = "psm",
        truncate: bool = False,
    ) -> list[list[int]]:
        """The ids of texts to continue and of pairs to infill; errors name the prompt."""
        check_mode(mode)
        ids = []
        for name, prompt in zip(names, prompts, strict=True):
            try:
                if isinstance(prompt, tuple) and len(prompt) == 2:
                    for side, text in zip(("prefix", "suffix"), prompt, strict=True):
                        self._require_short(text, side)
                    ids.append(infill_prompt(self.tokenizer, *prompt, mode=mode))
                else:
                    ids.append(self._encode_text(prompt, special_tokens, truncate=truncate))
            except PromptError as error:
                raise PromptError(f"{name}: {error}") from error
        return ids

    def _encode_text(self, text: str, special_tokens: bool, *, truncate: bool) -> list[int]:
        if not truncate:
            self._require_short(text, "text")
        elif isinstance(text, str):  # enough of its end to fill the context
            text = text[-self.model.config.n_positions * self.tokenizer.max_token_bytes :]
        return self.tokenizer.encode(text, special_tokens=special_tokens)

    def _requests(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | None,
        options: Mapping[str, Any],
        *,
        n: int,
        truncate: bool = False,
        names: Sequence[str] | None = None,
        end_ids: Collection[int] = (),
    ) -> list[Request]:
        """Requests for prompts of ids, which may be empty, with options by the names of `Options`.

        Args:
            end_ids: tokens that end a row, besides the checkpoint's end tokens.
        """
        options = dict(options)
        stop, ignore_eos = options.pop("stop", None), options.pop("ignore_eos", False)
        if not isinstance(ignore_eos, bool):
            raise PromptError(f"ignore_eos is {shown(ignore_eos)}: it must be True or False")
        others = {
            name: options.pop(name) for name in ("min_new_tokens", "logprobs") if name in options
        }
        drafter = options.pop("draft", None)
        sampling = SamplingParams(**options)
        end_of_text = self.tokenizer.end_of_text_id
        start = [] if end_of_text is None else [end_of_text]
        ends = {*end_ids, *start, *self.model.config.end_token_ids} if not ignore_eos else set()
        # A control token leaves no text in which its name could be found.
        stops = stop_texts(stop)
        ends |= {id_ for text in stops if (id_ := self.tokenizer.control_id(text)) is not None}
        return make_requests(
            self.model.config,
            [ids or start for ids in prompts],
            max_new_tokens,
            sampling,
            n=n,
            end_ids=ends,
            stop=stops,
            drafter=drafter,
            truncate=truncate,
            names=names,
            **others,
        )


def _names(count: int) -> list[str]:
    return [f"prompt {i}" for i in range(count)]
