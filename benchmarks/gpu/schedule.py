"""How long the programs of a launch keep a GPU busy: a simulation of how they are scheduled.

A GPU starts the programs of a grid in order, the first axis fastest, each as soon as a place is
free. Their costs are their steps: iterations of a kernel's loop.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

# An H200. Bandwidths and latency are assumptions, not measured here: what long reads of memory and
# of the L2 cache reach in practice, and how long a load takes while memory is busy.
MULTIPROCESSORS = 132
BANDWIDTH = 4.3e12  # bytes per second
CACHE_BANDWIDTH = 5.5e12  # bytes per second
LATENCY = 0.8e-6  # seconds
MATMUL = 989e12 / MULTIPROCESSORS  # FLOP/s of a multiprocessor, 16 bits (data sheet)
CACHE_RATE = 64 * 1.755e9  # bytes per second from the L2 cache to a multiprocessor
EXPONENTIALS = 16 * 1.755e9  # per second, of a multiprocessor (CUDA programming guide)


def simulate(
    costs: Sequence[float], places: int, rate: Callable[[int], float] = lambda running: 1.0
) -> float:
    """Seconds until the last program ends.

    Args:
        costs: steps of each program, in the order in which they start.
        places: how many programs run at once.
        rate: how many programs run -> steps per second of each. With the default this is list
            scheduling (Graham 1966): a step takes one second, whatever else runs.
    """
    now = progress = 0.0  # seconds, and steps of a program that has run from the beginning
    ends: list[float] = []  # the progress at which each running program ends
    for cost in costs:
        if len(ends) == places:
            end = heapq.heappop(ends)
            now += (end - progress) / rate(places)
            progress = end
        heapq.heappush(ends, progress + cost)
    while ends:
        running = len(ends)
        end = heapq.heappop(ends)
        now += (end - progress) / rate(running)
        progress = end
    return now


def efficiency(costs: Sequence[float], places: int) -> float:
    """Of the time in which all places are busy: the share in which programs run, by list
    scheduling. 1 if all programs end together."""
    return sum(costs) / (places * simulate(costs, places))


def waves(programs: int, places: int) -> tuple[int, float]:
    """How many times the places are filled, and which share of them is used the last time."""
    count = -(-programs // places)
    return count, programs / places - (count - 1)


def step_rate(
    step_bytes: float, ahead: int, compute: float = 0.0, cached_bytes: float = 0.0
) -> Callable[[int], float]:
    """Steps per second of one of several programs that read memory: `simulate`'s rate.

    A step takes the longest of its bytes' share of the bandwidth, of memory and of the L2 cache,
    the latency of a load divided by the steps that are loaded ahead, and its products and
    exponentials, for which the programs of a multiprocessor take turns.

    Args:
        step_bytes: read from memory in a step.
        ahead: steps whose loads are under way while one is computed, at least 1.
        compute: seconds of a multiprocessor.
        cached_bytes: read in a step that lie in the L2 cache. What memory delivers passes it too.
    """

    def rate(running: int) -> float:
        return 1 / max(
            running * step_bytes / BANDWIDTH,
            running * (step_bytes + cached_bytes) / CACHE_BANDWIDTH,
            LATENCY / ahead,
            compute * max(1.0, running / MULTIPROCESSORS),
        )

    return rate


def combine_seconds(rows: int, splits: int, D: int) -> float:
    """Seconds that splitting the keys costs: each split writes a float32 output of D channels per
    row, and one program per row reads them again. Both stay in the L2 cache.
    """
    if splits == 1:
        return 0.0
    written = 4 * rows * splits * D / CACHE_BANDWIDTH
    per_multiprocessor = -(-rows // MULTIPROCESSORS) * 4 * splits * D / CACHE_RATE
    return written + LATENCY + max(written, per_multiprocessor)


# ------------------------------------------------------------------------- steps of each program


def forward_steps(
    lengths: Sequence[int], T: int, H: int, G: int, M: int, N: int, splits: int = 1
) -> list[int]:
    """Blocks of keys of each program of `forward_kernel` (and with one split of `dq_kernel`).

    Args:
        lengths: of each row of the batch: slots that are filled, its T new tokens included.
    """
    heads = H // G
    tiles = -(-T * heads // M)
    steps = []
    for split in range(splits):
        for length in lengths:
            row = []
            for tile in reversed(range(tiles)):  # the longest first
                last_t = min((tile * M + M - 1) // heads, T - 1)
                blocks = -(-(length - T + last_t + 1) // N)
                share = -(-blocks // splits)
                row.append(min(max(blocks - split * share, 0), share))
            steps += row * G
    return steps


def dkv_steps(B: int, T: int, H: int, G: int, M: int, N: int, splits: int) -> list[int]:
    """Tiles of rows of each program of `dkv_kernel`, for T new tokens and no others."""
    heads = H // G
    tiles = -(-T * heads // M)
    steps = []
    for block in range(-(-T // N)):
        first = block * N * heads // M
        for _ in range(B * G):
            for split in range(splits):
                steps.append(len(range(first + split, tiles, splits)))
    return steps
