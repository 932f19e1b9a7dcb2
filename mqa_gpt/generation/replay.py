"""The stepper of CUDA devices: steps are CUDA graphs, recorded once and replayed.

Step t+1 is launched before the host reads the tokens of step t, so the GPU never waits. So a row
that has ended computes one token more, which is dropped. Graphs are recorded for the powers of two
of rows and kept for as long as the engine. Slots without a row are computed too, which costs less
than recording again: a step with few rows takes the time of reading the weights either way.

The tokens are those of `ModelStepper`, except at near ties: fused kernels sum and round in another
order, so where two tokens are nearly tied, the other may win, especially in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from mqa_gpt.cache import KVCache
from mqa_gpt.fast.decode_step import (
    Reports,
    StaticCache,
    StepState,
    choose_next,
    decode_step,
    step_logits,
)
from mqa_gpt.fast.graph import Replay, WatchedReplay, fetch, upload
from mqa_gpt.fast.plain import is_plain, is_watched
from mqa_gpt.generation.steps import (
    Choice,
    Results,
    Row,
    RowOptions,
    by_options,
    not_finite,
    report_choices,
)
from mqa_gpt.model import GPT, MLP, MultiQueryAttention
from mqa_gpt.sampling import forbid

# Limit per engine, because every distinct combination of options records a graph.
MAX_GRAPHS = 64


def can_replay(model: GPT) -> bool:
    """Whether decode steps of this model may be recorded and replayed.

    On a CUDA device they may, unless its cache is not a plain one, or the model is not plain: a
    replay would leave out Python code that was put into it, and in training mode dropout is to
    differ at every step. (What `mqa_gpt.research` puts into it is asked at each step.)
    """
    is_usual = model.device.type == "cuda" and model.cache_class is KVCache
    return is_usual and is_plain(model, watched=True)


class GraphStepper:
    """Replays recorded steps; see the module.

    Attributes:
        cache: (slots, length) positions.
    """

    def __init__(self, model: GPT, slots: int, length: int) -> None:
        self.cache = model.new_cache(slots, length)
        self.drafted = 0, 0
        self._model = model
        self._state = StepState.empty(slots, length + 1, model.device)
        self._reports: dict[int, Reports] = {}  # by the number of likeliest tokens
        self._logits: Tensor | None = None  # (slots, V), where rows differ in their options
        self._graphs: dict[tuple[int, RowOptions | None], Callable[[], None]] = {}
        self._watched: dict[tuple[int, RowOptions | None], tuple[StaticCache, WatchedReplay]] = {}
        self._recorded_from = _fingerprint(model)

    def is_valid(self) -> bool:
        """Whether the graphs compute what the model computes now."""
        is_same_cache = self._model.cache_class is type(self.cache)
        is_same = self._recorded_from == _fingerprint(self._model)
        return is_same_cache and is_same and is_plain(self._model)

    def begin(self, slot: int, rows: Sequence[Row], logits: Tensor) -> None:
        """See `Stepper`."""
        state, device = self._state, self._model.device
        if state.seen is None and any(r.request.sampling.repetition_penalty != 1 for r in rows):
            shape = (self.cache.batch_size, self._model.config.vocab_size)
            state = replace(state, seen=torch.zeros(shape, dtype=torch.bool, device=device))
            self._state = state  # graphs without a penalty never read `seen`, and share the rest
        for i, row in enumerate(rows, slot):
            state.lengths[i] = len(row.ids)
            state.position[i] = 0
            state.active[i] = 1
            if row.draws:
                state.draws[i, : len(row.draws)] = upload(row.draws, device, torch.float64)
            if state.seen is not None:
                state.seen[i] = False
                state.seen[i, upload(row.ids, device)] = True
        self._choose(logits, slot, rows, [0] * len(rows))

    def advance(self, rows: Sequence[Row]) -> Results:
        """See `Stepper`; all rows have a new token, and the step for the next ones runs then."""
        groups = by_options(rows)
        reports = [self._reports_for(options) for options in groups]
        tensors = [self._state.chosen, *(x for report in reports if report for x in report)]
        results = fetch([tensor[: len(rows)] for tensor in tensors], self._model.device)
        if any(row.count + 1 < row.request.max_new_tokens for row in rows):
            self._run(rows)
        ids, *lists = results()
        if -1 in ids:
            raise not_finite(rows[ids.index(-1)])
        choices = [Choice(id_) for id_ in ids]
        for slots, report in zip(groups.values(), reports, strict=True):
            if report is not None:
                own, likeliest, values = lists[:3]
                del lists[:3]
                reported = report_choices(ids, own, likeliest, values)
                for slot in slots:
                    choices[slot] = reported[slot]
        return [(slot, [choice]) for slot, choice in enumerate(choices)]

    def remove(self, slot: int, last: int) -> None:
        """See `Stepper`."""
        if slot != last:
            self.cache.copy_row(slot, last)
            self._state.write([slot], self._state.copy([last]))
            for report in self._reports.values():
                for tensor in report:
                    tensor[slot] = tensor[last]
        self._state.end(last)

    def _run(self, rows: Sequence[Row]) -> None:
        """Start a step; the device is not waited for."""
        count = min(1 << (len(rows) - 1).bit_length(), self.cache.batch_size)
        groups = by_options(rows)
        counts = [row.count + 1 for row in rows]  # the newest is chosen, and not yet counted
        is_free = not any(map(Row.suppresses_end, rows, counts))
        if len(groups) == 1 and is_free:
            self._graph(count, next(iter(groups)), rows)()
        else:
            self._graph(count, None, rows)()
            assert self._logits is not None
            self._choose(self._logits[: len(rows)], 0, rows, counts)

    def _graph(
        self, count: int, options: RowOptions | None, rows: Sequence[Row] = ()
    ) -> Callable[[], None]:
        """The step of the first `count` slots, which share these options; None: logits only."""
        key = (count, options)
        if is_watched(self._model):
            return self._watched_graph(key, (*rows, *[None] * (count - len(rows))))
        self._watched.clear()  # the contexts have ended
        if key not in self._graphs:
            if len(self._graphs) >= MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]  # the least recently used
            self._graphs[key] = self._recorded(self._step(self._slots(count), options))
        self._graphs[key] = self._graphs.pop(key)
        return self._graphs[key]

    def _watched_graph(
        self, key: tuple[int, RowOptions | None], labels: Sequence[Row | None]
    ) -> Callable[[], None]:
        """The step of a model that is recorded or patched; `labels` are its slots' rows."""
        # None: a patch, or another's `forward`, may compute anything.
        found = getattr(vars(self._model)["forward"], "recorders", None)
        recorders = None if found is None else found()
        graphs = [graph for _, graph in self._watched.values()]
        is_new = recorders is None or not all(graph.serves(recorders) for graph in graphs)
        if is_new or len(graphs) >= MAX_GRAPHS:
            self._watched.clear()
        if key not in self._watched:
            cache = self._slots(key[0])
            cache.labels = labels
            step = self._recorded(self._step(cache, key[1])) if recorders is not None else None
            if recorders is None or not isinstance(step, Replay):
                return self._step(cache, key[1])
            self._watched[key] = cache, WatchedReplay(step, recorders)
        cache, graph = self._watched[key]
        cache.labels = labels
        return partial(graph, labels)

    def _recorded(self, step: Callable[[], None]) -> Callable[[], None]:
        device = self._model.device
        return Replay(step, device) if device.type == "cuda" else step

    def _slots(self, count: int) -> StaticCache:
        """The first `count` slots as the cache of a step."""
        state = self._state.first(count)
        return StaticCache(self.cache, state.lengths, state.active)

    def _step(self, cache: StaticCache, options: RowOptions | None) -> Callable[[], None]:
        """The step itself."""
        count = cache.batch_size
        state = self._state.first(count)
        if options is None:
            if self._logits is None:
                shape = (self.cache.batch_size, self._model.config.vocab_size)
                self._logits = torch.zeros(shape, device=self._model.device)
            return partial(step_logits, self._model, cache, state, self._logits[:count])
        report = self._reports_for(options)
        if report is not None:
            report = (report[0][:count], report[1][:count], report[2][:count])
        return partial(decode_step, self._model, cache, state, options[0], report)

    def _choose(
        self, logits: Tensor, first: int, rows: Sequence[Row], counts: Sequence[int]
    ) -> None:
        """Choose by logits (B, V) for the rows from the slot `first` on, by calls from Python."""
        for options, group in by_options(rows).items():
            slots = [first + i for i in group]
            index = upload(slots, logits.device)  # (b,)
            part, some = logits[upload(group, logits.device)], self._state.copy(slots)  # (b, V)
            allowed = part
            for k, i in enumerate(group):
                if rows[i].suppresses_end(counts[i]):
                    allowed = forbid(allowed, k, rows[i].request.end_ids)
            report = self._reports_for(options)
            if report is None:
                choose_next(part, some, options[0], None, allowed)
            else:
                own, likeliest, values = (x[index] for x in report)
                choose_next(part, some, options[0], (own, likeliest, values), allowed)
                for tensor, new in zip(report, (own, likeliest, values), strict=True):
                    tensor[index] = new
            self._state.write(slots, some)

    def _reports_for(self, options: RowOptions) -> Reports | None:
        """The buffers (slots,), (slots, K), (slots, K) for K likeliest tokens; None for none."""
        K = options[1]
        if K is None:
            return None
        if K not in self._reports:
            slots, device = self.cache.batch_size, self._model.device
            values = torch.zeros((slots, K), device=device)
            self._reports[K] = (values.new_zeros(slots), torch.zeros_like(values).long(), values)
        return self._reports[K]


def _fingerprint(model: GPT) -> list[object]:
    """What graphs of this model depend on: where its weights are, and the numbers in its layers."""
    found: list[object] = [x.data_ptr() for x in [*model.parameters(), *model.buffers()]]
    found += [model.dtype]
    for module in model.modules():
        if isinstance(module, MultiQueryAttention):
            found += [id(module.attend), module.scale]
        elif isinstance(module, MLP):
            found.append(module.activation)
        elif isinstance(module, nn.LayerNorm):
            found.append(module.eps)
    return found
