"""LLM: a checkpoint's model and tokenizer in one object that completes and infills text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, Unpack, overload

import torch

from mqa_gpt.checkpoints.files import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, versions
from mqa_gpt.checkpoints.headers import read_checkpoint
from mqa_gpt.checkpoints.hub import resolve
from mqa_gpt.checkpoints.load import DEMO_DIR, load_model
from mqa_gpt.checkpoints.placement import as_device, fast_dtype
from mqa_gpt.checkpoints.save import save_model
from mqa_gpt.errors import CheckpointError, PromptError, require_int
from mqa_gpt.fast import compiled
from mqa_gpt.fast.int8 import is_quantized
from mqa_gpt.fast.int8_cache import cache_class
from mqa_gpt.generation.batching import EnginePool
from mqa_gpt.generation.completion import Completion, Generation
from mqa_gpt.generation.prompts import Options, hole_request, text_requests
from mqa_gpt.generation.score import Score, score_texts
from mqa_gpt.machine import INSTALL_NUMBA, threads_for
from mqa_gpt.model import GPT
from mqa_gpt.tokenizer import TOKENIZER_FILE, Tokenizer

SAVED_FILES = (CONFIG_FILE, TOKENIZER_FILE, INDEX_FILE, WEIGHTS_FILE)  # all of one saving

BATCH_SIZE = 16  # rows that run at a time, where there are many prompts


class LLM:
    """A model and its tokenizer: text in, text out.

    Attributes:
        model: the `GPT`.
        tokenizer: its `Tokenizer`.
        notes: what `load` chose or left out, a sentence each.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.notes: list[str] = []
        self._pool = EnginePool()

    def __repr__(self) -> str:
        model = self.model
        dtype = "int8" if is_quantized(model) else str(model.dtype).removeprefix("torch.")
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

        Args:
            name_or_dir: a folder or a name on the hub; None is the bundled demo checkpoint.
            dtype: None is the checkpoint's own, or float32 for 16-bit weights on a CPU that is slow
                in 16 bits; `notes` says so.
            revision, device, backend, quantize: see `mqa_gpt.checkpoints.load.load_model`.
            cache_dtype: "int8" keeps keys and values as 8-bit integers, see `KVCache`.

        Raises:
            CheckpointError, ConfigError: the checkpoint cannot be found or loaded.
        """
        new_cache_class = cache_class(cache_dtype)
        folder = resolve(DEMO_DIR if name_or_dir is None else name_or_dir, revision)
        before = versions(folder, SAVED_FILES)
        checkpoint = read_checkpoint(folder)  # first: a wrong folder is no missing tokenizer
        config, notes = checkpoint.config, checkpoint.notes
        tokenizer = Tokenizer.from_pretrained(folder)
        if dtype is None:
            parameters = 0 if quantize else config.parameters
            dtype, note = fast_dtype(checkpoint.dtype, as_device(device), parameters)
            notes += [] if note is None else [note]
        model = load_model(
            checkpoint, device=device, dtype=dtype, backend=backend, quantize=quantize
        )
        if versions(folder, SAVED_FILES) != before:  # tokenizer and model may be from two saves
            raise CheckpointError(
                f"{folder} was saved over while it was read: load it when that has finished"
            )
        if model.device.type == "cpu" and torch.get_num_threads() > threads_for(config):
            notes.append("a model this small is fastest with torch.set_num_threads(1)")
        can_compile = model.device.type == "cpu" and model.dtype in compiled.DTYPES
        if can_compile and backend == "auto" and not compiled.HAS_NUMBA:
            notes.append(
                "numba is not installed, which makes generation faster on a CPU: run "
                f"{INSTALL_NUMBA} in the checkout"
            )
        model.cache_class = new_cache_class
        llm = cls(model, tokenizer)
        llm.notes = notes
        return llm

    def release(self) -> None:
        """Free the KV cache and the CUDA graphs that are kept from the last generation."""
        self._pool.clear()

    def save(self, folder: str | PathLike[str], *, max_shard_size: int | str = "5GB") -> None:
        """Write a checkpoint, model and tokenizer, that `load` reads, and transformers too unless
        the weights are 8-bit integers.

        Arguments, errors and what happens to a folder that exists are those of
        `mqa_gpt.checkpoints.save.save_model`.
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
        n = int(n)  # NumPy's integers would wrap
        if n > 1:
            samples = [completions[i : i + n] for i in range(0, len(completions), n)]
            return samples[0] if isinstance(prompt, str) else samples
        return completions[0] if isinstance(prompt, str) else completions

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
        generation = self.begin(
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

    @overload
    def score(
        self,
        text: str | tuple[str, str],
        *,
        special_tokens: bool = True,
        window: int | None = None,
        stride: int | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> Score: ...

    @overload
    def score(
        self,
        text: list[str | tuple[str, str]],
        *,
        special_tokens: bool = True,
        window: int | None = None,
        stride: int | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> list[Score]: ...

    def score(self, text: Any, **options: Any) -> Any:
        """How likely the model finds a text, token by token.

        Args:
            text: a text, which is scored as a document of its own, after end-of-text; a pair of a
                context and the text that is scored after it, each tokenized by itself; or a list.
            special_tokens: as in `generate`.
            window, stride: how longer texts are read; see `mqa_gpt.generation.score.windows`.
            batch_size: windows that are read at a time.

        Returns:
            A `Score`, with log-probabilities, perplexity and bits per byte; a list for a list.

        Raises:
            PromptError: an empty or unusable text, or an unusable option.
        """
        texts = text if isinstance(text, list) else [text]
        scores = score_texts(self.model, self.tokenizer, texts, **options)
        return scores if isinstance(text, list) else scores[0]

    def begin(
        self,
        prompts: Sequence[str | tuple[str, str]],
        max_new_tokens: int | None = 64,
        *,
        n: int = 1,
        batch_size: int | None = None,
        special_tokens: bool = True,
        mode: str | None = None,
        truncate: bool = False,
        names: Sequence[str] | None = None,
        per_prompt: Sequence[Mapping[str, Any]] | None = None,
        **options: Unpack[Options],
    ) -> Generation:
        """Start completing prompts; what `generate`, `generate_many` and `stream` run on.

        Arguments and errors are theirs.

        Args:
            batch_size: rows that run at a time; None for all together.
            mode: as in `infill`, where there may be pairs; None refuses them.
            names: of the prompts in messages; "prompt 0", "prompt 1", ... if None.
            per_prompt: per-prompt options, `max_new_tokens` among them, which override the common
                ones.
        """
        requests = text_requests(
            self.model.config,
            self.tokenizer,
            prompts,
            {**options, "max_new_tokens": max_new_tokens},
            n=n,
            truncate=truncate,
            special_tokens=special_tokens,
            mode=mode,
            names=names,
            per_prompt=per_prompt,
        )
        if batch_size is not None:
            batch_size = require_int(PromptError, "batch_size", batch_size, 1)
            if options.get("draft") is not None:
                raise PromptError(
                    "draft is for prompts that are completed all at once: leave it or batch_size "
                    "out"
                )
        return Generation(self.model, self.tokenizer, requests, slots=batch_size, pool=self._pool)

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
        request, cut = hole_request(
            self.model.config,
            self.tokenizer,
            prefix,
            suffix,
            {**options, "max_new_tokens": max_new_tokens},
            n=n,
            truncate=truncate,
            mode=mode,
            file_name=file_name,
            repo_name=repo_name,
        )
        return Generation(self.model, self.tokenizer, [request], pool=self._pool, cut=cut)
