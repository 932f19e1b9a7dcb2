"""Samples: the training sequences of a corpus, numbered once and for all.

Sample number i is a function of the corpus, the settings, the seed and i alone. It does not depend
on ranks, batch sizes, or on what was read before, so a run that knows its number of steps
knows its place in the data, and any number of ranks can read the same samples in the same order.

An epoch is every document once, in an order of its own. Its length in samples is known beforehand:
it is that of the documents as they are, left to right, with `<|endoftext|>` between them. The epoch
is cut into blocks of that length, each of which is made by itself when it is needed: documents are
drawn for infilling and rearranged, the block is packed, and its windows are shuffled. What
infilling adds, a few tokens per piece, displaces the end of each block, another one in each epoch.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mqa_gpt.errors import ConfigError, InputError, require_int
from mqa_gpt.tokenizer import Tokenizer
from mqa_gpt.training.documents import SourceConfig
from mqa_gpt.training.infilling import InfillingConfig
from mqa_gpt.training.loss import IGNORED
from mqa_gpt.training.packing import LEAST_LENGTH, MASKED, MIDDLE, Packer, Part
from mqa_gpt.training.shards import Corpus

LOOKED_AT = 32  # sequences that are searched for a hole


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    """The section `[data]`: which documents are read (see `SourceConfig`) and how they are packed.

    Attributes:
        length: T, tokens per sequence; with infilling at least 16.
        infilling: see `InfillingConfig`.
        within_documents: let no token attend to another document of its sequence.
        shuffle_tokens: about how many tokens the blocks have within which sequences are shuffled.
            Documents are shuffled over the whole corpus.
    """

    length: int = 1024
    infilling: InfillingConfig = field(default_factory=InfillingConfig)
    within_documents: bool = False
    shuffle_tokens: int = 2**20

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int(ConfigError, "data.length", self.length, 1)
        if self.infilling.is_used and self.length < LEAST_LENGTH:
            raise ConfigError(
                f"data.length is {self.length}: infilling needs at least {LEAST_LENGTH}; raise it, "
                "or set data.infilling.rate to 0"
            )
        require_int(ConfigError, "data.shuffle_tokens", self.shuffle_tokens, 1)


class Batch(NamedTuple):
    """B sequences of T tokens.

    Attributes:
        ids: (B, T) int64 input.
        labels: (B, T) int64 the token after each, or -100 where no loss is computed.
        kinds: (B, T) uint8 what each label is: LEFT_TO_RIGHT, CONTEXT, MIDDLE or MASKED (see
            `mqa_gpt.training.packing`).
        documents: (B, T) int32 which document of its sequence a token is of, or None if tokens
            attend to other documents too.
    """

    ids: Tensor
    labels: Tensor
    kinds: Tensor
    documents: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; copied without waiting if it is a GPU."""
        ids, labels, kinds = (t.to(device, non_blocking=True) for t in self[:3])
        documents = self.documents
        if documents is not None:
            documents = documents.to(device, non_blocking=True)
        return Batch(ids, labels, kinds, documents)


class Block(NamedTuple):
    """Windows of one block, shuffled: ids (n, T + 1) int32 and kinds (n, T + 1) uint8."""

    ids: Tensor
    kinds: Tensor


class Samples:
    """The training sequences of a corpus.

    Args:
        corpus: tokenized documents.
        tokenizer: the one that made their ids.
        config: how they are rearranged and packed.
        seed: of order and infilling.

    Raises:
        InputError: the corpus is shorter than one sequence.
        ConfigError: the tokenizer lacks control tokens that are needed.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        config: DataConfig,
        *,
        seed: int = 0,
    ) -> None:
        self.config = config
        self._blocks = Blocks(corpus, tokenizer, config, seed)
        self._kept: dict[int, Block] = {}  # the last two that were read

    def __len__(self) -> int:
        """Samples per epoch."""
        return self._blocks.samples

    @property
    def end(self) -> int:
        """The id of `<|endoftext|>`."""
        return self._blocks.packer.end

    def can_infill(self) -> bool:
        """Whether a middle that is not empty is among the first sequences if each document is
        rearranged for infilling.
        """
        infilling = replace(self.config.infilling, rate=1.0, late_rate=None)
        tokens = LOOKED_AT * self.config.length
        config = replace(self.config, infilling=infilling, shuffle_tokens=tokens)
        blocks = self._blocks
        every = Samples(blocks.corpus, blocks.packer.tokenizer, config, seed=blocks.seed)
        batch = every.rows(range(min(LOOKED_AT, len(every))))
        middles = batch.labels[batch.kinds == MIDDLE]
        return bool((middles != self.end).any())

    def rows(self, numbers: Sequence[int]) -> Batch:
        """Samples by their numbers, counted over all epochs: number `len(samples)` is the first of
        the second epoch.

        Neighbouring numbers are cheap, since they lie in one block; a jump makes a new block.

        Args:
            numbers: B of them, such as `range(first + rank, first + batch_size, ranks)`.
        """
        rows = [self._row(number) for number in numbers]
        ids = torch.stack([ids for ids, _ in rows]).long()  # (B, T + 1)
        kinds = torch.stack([kinds for _, kinds in rows])[:, 1:]  # (B, T)
        labels = ids[:, 1:].masked_fill(kinds == MASKED, IGNORED)
        ids = ids[:, :-1]
        documents = None
        if self.config.within_documents:
            documents = (ids == self.end).cumsum(1, dtype=torch.int32)
        return Batch(ids.contiguous(), labels, kinds.contiguous(), documents)

    def _row(self, number: int) -> tuple[Tensor, Tensor]:
        epoch, i = divmod(number, self._blocks.samples)
        block, row = divmod(i, self._blocks.block_samples)
        ids, kinds = self._block(epoch * self._blocks.per_epoch + block)
        return ids[row], kinds[row]

    def _block(self, number: int) -> Block:
        if number not in self._kept:
            self._kept = {n: b for n, b in self._kept.items() if n == number - 1}
            self._kept[number] = self._blocks[number]
        return self._kept[number]


class Blocks:
    """The blocks of all epochs, each made from its number alone."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, config: DataConfig, seed: int) -> None:
        self.corpus, self.config, self.seed = corpus, config, seed
        self.packer = Packer(tokenizer, config.infilling, config.length)
        tokens = corpus.tokens + len(corpus)  # each document after its <|endoftext|>
        self.samples = tokens // config.length
        if self.samples == 0:
            raise InputError(
                f"the documents have {tokens:,} tokens, fewer than one sequence of "
                f"{config.length:,}: name more sources, or lower data.length"
            )
        self.block_samples = min(self.samples, max(1, config.shuffle_tokens // config.length))
        self.per_epoch = -(-self.samples // self.block_samples)
        self._epoch = -1  # whose order is known

    def __getitem__(self, number: int) -> Block:
        epoch, block = divmod(number, self.per_epoch)
        first = block * self.block_samples
        count = min(self.block_samples, self.samples - first)
        parts = self._parts(epoch, first * self.config.length, count * self.config.length + 1)
        ids, kinds = self.packer.pack(parts, count)  # (nT + 1,) each
        T = self.config.length
        order = list(range(count))
        random.Random(f"{self.seed} {epoch} block {block}").shuffle(order)
        return Block(ids.unfold(0, T + 1, T)[order], kinds.unfold(0, T + 1, T)[order])

    def _parts(self, epoch: int, first: int, count: int) -> list[Part]:
        """The documents, whole or in part, of some tokens of an epoch read left to right."""
        self._read_order(epoch)
        rate = self.config.infilling.rate_in(epoch)
        parts = []
        end = first  # of the document before
        for i in range(int(torch.searchsorted(self._ends, first, right=True)), len(self._order)):
            if end >= first + count:
                break
            document = int(self._order[i])
            end = int(self._ends[i])
            begin = end - int(self.corpus.lengths[document])  # of its first token
            prompt = int(self.corpus.prompts[document])
            ids = self.corpus.ids(document)
            if self.packer.is_whole(len(ids), prompt):  # it is of the block that it begins in
                if first <= begin < first + count - 1:
                    parts.append(Part(ids, prompt))
                continue
            cut = max(0, first - begin)
            ids = ids[cut : max(0, first + count - begin)]
            if not ids:  # only its end, or only what comes before it
                continue
            rng = random.Random(f"{self.seed} {epoch} document {document}")
            is_rearranged = not prompt and rng.random() < rate
            holes = rng if is_rearranged else None
            parts.append(Part(ids, max(0, prompt - cut), begin <= first, holes))
        return parts

    def _read_order(self, epoch: int) -> None:
        """Draw the order of an epoch's documents, and count where each one ends."""
        if epoch == self._epoch:
            return
        digest = hashlib.sha256(f"{self.seed} {epoch} order".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        self._order = torch.randperm(len(self.corpus), generator=generator)
        self._ends = (self.corpus.lengths[self._order] + 1).cumsum(0)  # (documents,) int64
        self._epoch = epoch
