"""The tables of `mqa-gpt inspect --explain`, 80 columns wide."""

from __future__ import annotations

from collections.abc import Sequence

from mqa_gpt.bench.anatomy import BATCHES, LAYER, STORAGE, TENSORS, Anatomy, name_of
from mqa_gpt.bench.counts import Work, whole
from mqa_gpt.bench.devices import Device
from mqa_gpt.cli.output import new_table, print_table, size_text, write


def print_anatomy(found: Anatomy, devices: Sequence[Device]) -> None:
    """All of it.

    Args:
        devices: the last one is this machine.
    """
    prefill = f"a prefill of {_sizes(found, 'B', 'T', is_prefill=True)}"
    decode = f"a decode step with {_sizes(found, 'T', 'S', is_prefill=False)}"
    weights = "int8 weights, the rest in " if found.int8 else ""
    write(f"\nOne forward pass: {prefill}, and\n{decode}; {weights}{name_of(found.dtype)}\n\n")
    numbers = found.dimensions(is_prefill=True)
    write("  ".join(f"{letter} {numbers[letter]:,}" for letter in "HGDCFVL") + "\n\n")
    _print_tensors(found)
    _print_parts(found)
    _print_intensities(found)
    _print_rooflines(found, devices)
    _print_memory(found, devices)


def _sizes(found: Anatomy, *letters: str, is_prefill: bool) -> str:
    numbers = found.dimensions(is_prefill=is_prefill)
    return ", ".join(f"{letter} = {numbers[letter]:,}" for letter in letters)


def _print_tensors(found: Anatomy) -> None:
    table = new_table("tensor", "axes", "prefill", "decode")
    prefill, decode = found.shapes(is_prefill=True), found.shapes(is_prefill=False)
    is_inside = False
    for name, axes in TENSORS:
        if name.startswith(LAYER) != is_inside:
            is_inside = not is_inside
            table.add_section()
            if is_inside:
                table.add_row(f"{LAYER.rstrip('.')}, {found.config.n_layer:,} times")
        short = name.replace(LAYER, "  .")
        table.add_row(short, axes, *(_shape(shapes[name]) for shapes in (prefill, decode)))
    print_table(table)
    write(
        "Names are those of `record` in mqa_gpt.research; cache: K and V side by side.\n"
        "Fused attention never holds scores and probs.\n\n"
    )


def _print_parts(found: Anatomy) -> None:
    prefill, decode = ((f">{name}\nFLOP", ">\nbytes", ">\nratio") for name in ("prefill", "decode"))
    table = new_table("\npart", ">\nparameters", *prefill, *decode)

    def row(name: str, prefill: Work, decode: Work) -> None:
        count = _scaled(prefill.parameters) if prefill.parameters else ""
        table.add_row(name, count, *_work(prefill), *_work(decode))

    for name, work in found.prefill.items():
        if work.bytes:
            row(name, work, found.decode[name])
    table.add_section()
    row("all", whole(found.prefill.values()), whole(found.decode.values()))
    print_table(table)
    tied = " lm_head's parameters are wte's." * found.config.tie_word_embeddings
    write(
        "All layers together. A product counts two operations, attention the half that\n"
        "causality leaves; weights and inputs are read once, outputs written once.\n"
        f"ratio: arithmetic intensity, FLOP per byte.{tied}\n\n"
    )


def _print_intensities(found: Anatomy) -> None:
    table = new_table("FLOP per byte, by rows B", *(f">{batch}" for batch in BATCHES))
    figures = [found.intensities(batch) for batch in BATCHES]
    table.add_row("prefill", *(_number(prefill) for prefill, _ in figures))
    table.add_row("decode, one K/V head", *(_number(heads.mqa) for _, heads in figures))
    table.add_row("decode, one per query head", *(_number(heads.mha) for _, heads in figures))
    print_table(table)
    write(
        "More rows share the reading of the weights, but each has a cache of its own: the\n"
        "ratio of decoding ends where the cache is most of what is read.\n\n"
    )


def _print_rooflines(found: Anatomy, devices: Sequence[Device]) -> None:
    table = new_table(
        "at most", ">GB/s", ">TFLOP/s", ">ratio", ">prefill", ">decode", ">tok/s", ">as MHA"
    )
    notes: list[str] = []
    is_known = True
    for device in devices:
        roof = found.roof(device)
        speed = f"{device.bandwidth / 1e9:,.0f}"
        if roof is None:
            table.add_row(device.name, speed, "–")
            is_known = False
            continue
        if device.is_measured:
            notes.append(f"{device.name}: measured, in {name_of(roof.dtype)}: {device.source}.")
        table.add_row(
            device.name,
            speed,
            _number(device.rates[roof.dtype] / 1e12),
            f"{device.balance(roof.dtype):,.0f}",
            f"{_time(roof.prefill)} {_limit(roof.prefill_is_memory_bound)}",
            f"{_time(roof.decode)} {_limit(roof.decode_is_memory_bound)}",
            *(_number(rate) for rate in roof.rates),
        )
    print_table(table)
    if not is_known:
        notes.append(f"–: no figure for {name_of(found.dtype)}.")
    rows = "" if found.batch == 1 else f", {found.batch:,} rows together"
    lines = (
        "A: arithmetic is the limit, M: memory. ratio: FLOP per byte where it changes.",
        f"tok/s: decoding with one K/V head{rows}; as MHA: one per query head.",
        *notes,
        "The others: data sheets, dense products (mqa_gpt/bench/devices.py).",
    )
    write("\n".join(lines) + "\n\n")


def _print_memory(found: Anatomy, devices: Sequence[Device]) -> None:
    full = found.config.n_positions
    headings = [f">{label}\n{kind}" for label, _, _ in STORAGE for kind in ("MQA", "MHA")]

    def cells(memory: float, context: int) -> list[str]:
        rows = [found.rows_that_fit(memory, context, dtype, int8=i) for _, dtype, i in STORAGE]
        return [f"{count:,}" for heads in rows for count in heads]

    write(f"Rows of {full:,} tokens that fit beside the weights, by dtype of both:\n\n")
    table = new_table("", ">GB", *headings)
    for device in devices:
        table.add_row(device.name, f"{device.memory / 1e9:,.0f}", *cells(device.memory, full))
    print_table(table)
    here = devices[-1]
    write(f"\nRows by context, {here.name}, {size_text(int(here.memory))} available:\n\n")
    table = new_table(">tokens", *headings)
    for context in found.contexts():
        table.add_row(f"{context:,}", *cells(here.memory, context))
    print_table(table)


def _limit(is_memory_bound: bool) -> str:
    return "M" if is_memory_bound else "A"


def _shape(shape: tuple[int, ...]) -> str:
    return " ".join(f"{n}" for n in shape)


def _work(work: Work) -> tuple[str, str, str]:
    flops = f"{_scaled(work.flops)}" if work.flops else ""
    return flops, size_text(work.bytes), _number(work.intensity) if work.flops else ""


def _scaled(value: float) -> str:
    """A number in three digits with its prefix."""
    unit = ""
    for larger in ("k", "M", "G", "T", "P"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{_number(value)} {unit}".rstrip()


def _number(value: float) -> str:
    """In three digits or more."""
    return f"{value:,.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1), ("ms", 1e3)):
        if seconds * factor >= 0.9995:
            return f"{_number(seconds * factor)} {unit}"
    return f"{_number(seconds * 1e6)} us"
