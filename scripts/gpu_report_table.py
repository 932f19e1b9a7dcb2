"""The short table at the end of gpu_report.py, and what in a report counts as failed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]

OURS = "mqa_kernels"
INT8 = " weights=int8"  # at the end of a case


def failures(report: Row) -> list[str]:
    """Sections that ended early, checks that failed, and cases in which ours was wrong."""
    found = []
    for name, section in report["sections"].items():
        if section.get("error"):
            found.append(f"{name}: {section['error'].strip().splitlines()[-1]}")
        for row in section.get("rows", ()):
            if row.get("passed") is False:
                found.append(f"{name}: {row_text(row)}")
            for result in row.get("results", ()):
                if result["contender"] in (OURS, "shipped") and not result.get("right"):
                    reason = result.get("refused", "not as exact as it should be")
                    found.append(f"{name}: {row_text(row)}: {reason}")
    return found


def row_text(row: Row) -> str:
    """A row's case in a few words."""
    parts = [
        str(row[key]) for key in ("kernel", "model", "dtype", "backend", "check") if key in row
    ]
    if "problem" in row:
        parts.append(problem_text(row["problem"]))
    if "case" in row:
        parts.append(" ".join(f"{key}={value}" for key, value in row["case"].items()))
    if "task" in row:
        parts.append(row["task"])
    if "error" in row:
        parts.append(row["error"].strip().splitlines()[-1])
    return ", ".join(parts)


def problem_text(problem: Row) -> str:
    return "B {B:<3} T {T:<5} S {S:<5} H {H} D {D}".format(**problem)


def print_table(report: Row) -> None:
    """What the report says, in a screenful or two."""
    sections = report["sections"]
    ceilings: Row = next(iter(sections["ceilings"].get("rows", ())), {})
    lines: list[str] = []
    for name, section in sections.items():
        if "rows" not in section:
            continue
        lines.append(f"== {name}, {section['seconds']:.0f} s")
        if name in ("forward", "backward"):
            lines += race_lines(section["rows"], "tflops", ceilings.get("matmul_tflops"))
        elif name == "decode":
            lines += race_lines(section["rows"], "gb_per_s", ceilings.get("copy_gb_per_s"))
        elif name in MODEL_LINES:
            lines += MODEL_LINES[name](section["rows"], ceilings)
        else:
            lines += LINES[name](section["rows"])
        late = [row_text(row) for row in section["rows"] if "skipped" in row]
        if late:
            lines.append(f"no time for {len(late)}: {'; '.join(late)[:200]}")
    failed = failures(report)
    lines.append(f"== {len(failed)} failures" if failed else "== nothing failed")
    lines += [line[:300] for line in failed[:20]]
    print("\n".join(lines))


def environment_lines(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        versions = row["versions"]
        names = ("python", "torch", "triton", "transformers")
        gpus = ", ".join(gpu["name"] for gpu in row["gpus"]) or "no GPU"
        yield f"{gpus}; " + ", ".join(f"{name} {versions[name]}" for name in names)


def ceiling_lines(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        yield "copy {copy_gb_per_s:.0f} GB/s, matmul {matmul_tflops:.0f} TFLOP/s".format(**row)


def numerics_lines(rows: list[Row]) -> Iterator[str]:
    """Per dtype the worst error over what the rule allows; then the other checks."""
    judged = [row for row in rows if "verdicts" in row and "dtype" in row]
    for dtype in dict.fromkeys(row["dtype"] for row in judged):
        mine = [row for row in judged if row["dtype"] == dtype]
        worst: dict[str, float] = {}
        for row in mine:
            for name, verdict in row["verdicts"].items():
                worst[name] = max(worst.get(name, 0.0), verdict["error"] / verdict["allowed"])
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in worst.items())
        passed = sum(row["passed"] for row in mine)
        yield f"{dtype}: {passed} of {len(mine)} pass; largest error over allowed: {ratios}"
    for row in rows:
        if "check" in row and "skipped" not in row:
            outcome = {True: "passes", False: "FAILS"}.get(row["passed"], row.get("refused"))
            yield f"{row['check']}: {outcome}"


def parity_lines(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        if "tokens" in row:  # not one that failed before
            yield (
                "{model} {dtype} {backend}: {tokens_equal} of {tokens} tokens equal, "
                "error {logits_error:.1e} of {logits_limit:.1e}".format(**row)
                + ("" if row["passed"] else "  FAILS")
            )


def race_lines(rows: list[Row], figure: str, ceiling: float | None) -> Iterator[str]:
    """Ours, its share of the ceiling, and the fastest other one that is right."""
    unit = {"tflops": "TFLOP/s", "gb_per_s": "GB/s"}[figure]
    for row in rows:
        by_name = {result["contender"]: result for result in row.get("results", ())}
        ours = by_name.pop(OURS, None)
        if ours is None:
            continue
        text = problem_text(row["problem"])
        if "refused" in ours:
            yield f"{text}: {ours['refused'][:100]}"
            continue
        text += f": {ours[figure]:6.4g} {unit}"
        if "microseconds" in ours:
            text += " {microseconds:7.1f} us (eager {eager_microseconds:.0f})".format(**ours)
        if ceiling:
            text += f", {ours[figure] / ceiling:.2f} of ceiling"
        others = [result for result in by_name.values() if result.get("right")]
        best = max(others, key=lambda result: result[figure], default=None)
        if best is not None:
            text += (
                f"; {ours[figure] / best[figure]:.2f} x {best['contender']} ({best[figure]:.4g})"
            )
        peak, theirs = (
            result.get("peak_bytes") for result in (ours, by_name.get("flash, heads expanded", {}))
        )
        if peak and theirs:
            text += f"; {peak / 1e9:.2f} GB, expanded {theirs / 1e9:.2f}"
        yield text + ("" if ours["right"] else "  WRONG")


def autotune_lines(rows: list[Row]) -> Iterator[str]:
    """The winner of each kernel, and how much faster than what is shipped it is."""
    for row in rows:
        winner = row.get("winner")
        if winner is None:
            continue
        text = f"{row['kernel']}, {problem_text(row['problem'])}: {winner['contender']}"
        text += f" {winner['whole']['median'] * 1e6:.1f} us"
        shipped = next(result for result in row["results"] if result["contender"] == "shipped")
        if "whole" in shipped:
            faster = shipped["whole"]["median"] / winner["whole"]["median"]
            text += f", {faster:.2f} x as fast as shipped"
        yield text


def token_lines(rows: list[Row], ceilings: Row) -> Iterator[str]:
    """Where replayed steps, of one batch or of many prompts, say what the plain loop does."""
    for row in rows:
        if "tokens" in row:
            yield (
                f"{case_text(row)}, {'fused' if row['fused'] else 'modules'}: "
                f"{row['tokens_equal']['replayed']} of {row['tokens']} tokens equal, batched "
                f"{row['tokens_equal']['batched']}, "
                f"{row['different_tokens']} different ones" + ("" if row["passed"] else "  FAILS")
            )


def step_lines(rows: list[Row], ceilings: Row) -> Iterator[str]:
    """Decoding: the rate, its share of the memory's bandwidth (MBU), and the loops.

    Of 8-bit weights also how much faster they are than the model's own 16 bits, which come before.
    """
    rates: dict[str, float] = {}
    for row in rows:
        text = case = f"{row['model']} {case_text(row)}"
        if "refused" in row:
            yield f"{text}: {row['refused']}"
        elif "seconds_per_step" in row:
            seconds = row["seconds_per_step"]
            rates[case] = row["tokens_per_s"]
            text += f": {row['tokens_per_s']:8.1f} tok/s, {seconds['replayed'] * 1e6:.0f} us a step"
            text += of_ceiling(row["gb_per_s"], ceilings.get("copy_gb_per_s"))
            own = rates.get(case.removesuffix(INT8))
            if case.endswith(INT8) and own is not None:
                text += f" ({row['gb_per_s']:.0f} GB/s), {rates[case] / own:.2f} x bfloat16"
            text += f"; {seconds['called'] / seconds['replayed']:.2f} x as fast as called"
            if "modules" in seconds:
                text += f", {seconds['modules'] / seconds['replayed']:.2f} x as modules replayed"
            text += f"; first run {1e3 * row['first_run_seconds']:.1f} ms"
            text += f", recording {1e3 * row['recording_seconds']:.1f} ms"
            yield text + f", a replay {1e3 * row['replay_seconds']:.1f} ms"
        elif "loops" in row:
            plain, replayed = (row["loops"][name]["tokens_per_s"] for name in ("plain", "replayed"))
            yield (
                f"{text}: generating {row['new_tokens']} tokens {replayed:.1f} tok/s, "
                f"{replayed / plain:.2f} x the plain loop"
            )


def prefill_lines(rows: list[Row], ceilings: Row) -> Iterator[str]:
    """Reading prompts: the rate, and its share of the matrix rate (MFU)."""
    for row in rows:
        for way in ("whole", "by pieces"):
            if way in row:  # as they are where nothing failed
                yield (
                    f"{row['model']} {case_text(row)} {way}: {row[way]['tokens_per_s']:.0f} tok/s, "
                    f"{row[way]['tflops']:.0f} TFLOP/s"
                    + of_ceiling(row[way]["tflops"], ceilings.get("matmul_tflops"))
                )


def profile_lines(rows: list[Row], ceilings: Row) -> Iterator[str]:
    """The kernels that a decode step spends most of its time in."""
    for row in rows:
        if "kernels" not in row:
            continue
        yield (
            "{0}: {step_microseconds:.0f} us a step, {kernels_microseconds:.0f} us in "
            "{kernels_per_step:.0f} kernels".format(f"{row['model']} {case_text(row)}", **row)
        )
        for kernel in row["kernels"][:8]:
            yield "  {microseconds:8.1f} us in {count:4.0f} of {0}".format(
                kernel["kernel"][:70], **kernel
            )


def case_text(row: Row) -> str:
    return " ".join(f"{key}={value}" for key, value in row["case"].items())


def of_ceiling(figure: float, ceiling: float | None) -> str:
    return f", {figure / ceiling:.2f} of ceiling" if ceiling else ""


MODEL_LINES = {
    "model_tokens": token_lines,
    "model_decode": step_lines,
    "model_prefill": prefill_lines,
    "model_profile": profile_lines,
    "model_heads": step_lines,
}

LINES = {
    "environment": environment_lines,
    "ceilings": ceiling_lines,
    "numerics": numerics_lines,
    "parity": parity_lines,
    "autotune": autotune_lines,
}
