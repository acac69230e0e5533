"""The figures of a benchmark as a table, for a terminal or for Markdown.

Enters: what `bench_model` returns. Leaves: text. Nothing is measured or computed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

HEADINGS = (
    "form", "batch", "images/s (min to max)", "to eager", "max logit difference", "min cosine",
    "GFLOP/s (of peak)", "peak memory",
)  # fmt: skip

BUSY = 0.5  # cores; what others take comes off everything that is measured


def rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row a form, in the order of HEADINGS; one that did not run has none but its name."""
    empty = ("-",) * (len(HEADINGS) - 1)
    return [(name, *(cells(form) if form else empty)) for name, form in figures["forms"].items()]


def cells(form: dict[str, Any]) -> tuple[str, ...]:
    low, high = form["images_per_s_min"], form["images_per_s_max"]
    memory = form["peak_memory_bytes"]
    return (
        str(form["batch_size"]),
        f"{form['images_per_s']:.1f} ({low:.1f} to {high:.1f})",
        number(form["ratio_to_eager"], ".2f"),
        number(form["max_abs_logit_difference"], ".1e"),
        number(form["min_cosine"], ".6f"),
        f"{form['gflops']:.0f} ({form['share_of_peak']:.0%})",
        "" if memory is None else f"{memory / 1e6:.0f} MB",
    )


def summary(figures: dict[str, Any]) -> list[str]:
    """Lines that a reader of the table needs: what ran where, and how it was measured."""
    machine, precisions = figures["hardware"], peaks(figures)
    size = "×".join(map(str, figures["image_size"]))
    lines = [
        f"{figures['checkpoint']} (weights: {figures['weights']}), {size}, {figures['images']}, "
        f"batch {figures['batch_size']}, {figures['gflop_per_image']:.2f} GFLOP an image",
        machine_line(figures),
        "peak of a matrix product: "
        + ", ".join(f"{peak:.0f} GFLOP/s in {precision}" for precision, peak in precisions.items()),
        "ours is handed uint8 pixels and normalises them, the rivals are handed normalised tensors; "
        f"differences are to {figures['agreement_with']}",
        f"ours runs on {figures['backend']}; "
        + ", ".join(
            f"{name} {number(figures[name], '.2f')}" for name in figures if name.startswith("ratio")
        ),
    ]
    if not machine["bfloat16_on_cpu"] and not machine["gpu"] and "bfloat16" in precisions:
        lines.append(
            "this CPU has no arithmetic in bfloat16: ours and OpenVINO compute in float32 there, "
            "torch emulates it, so these ratios say little of other machines"
        )
    smaller = [
        name
        for name, form in figures["forms"].items()
        if form and form["batch_size"] < figures["batch_size"]
    ]
    if smaller:
        lines.append(f"in smaller batches, as whole ones would take too long: {', '.join(smaller)}")
    return lines + warnings(figures)


def machine_line(figures: dict[str, Any]) -> str:
    """The machine and the packages."""
    machine = figures["hardware"]
    packages = ", ".join(f"{name} {version}" for name, version in figures["versions"].items() if version)
    gpu = f"{machine['gpu']}; " if machine["gpu"] else ""
    return f"{gpu}{machine['cpu']}, {machine['threads']} of {machine['cores']} cores; {packages}"


def warnings(figures: dict[str, Any]) -> list[str]:
    """What takes from the worth of the figures: a busy machine, and what was not measured."""
    lines = [f"not measured: {name}: {why}" for name, why in figures["unavailable"].items()]
    load = figures["hardware"]["load_before"] or 0
    if load > BUSY:
        lines.insert(0, f"other processes kept {load:.1f} cores busy before this began: measure again")
    return lines


def peaks(figures: dict[str, Any]) -> dict[str, float]:
    prefix = "peak_gflops_"
    return {name.removeprefix(prefix): figures[name] for name in figures if name.startswith(prefix)}


def markdown(figures: dict[str, Any]) -> str:
    """The table and what belongs to it, for a README."""
    return markdown_of(HEADINGS, rows(figures), summary(figures))


def markdown_of(headings: Sequence[str], table: Iterable[Sequence[str]], remarks: Iterable[str]) -> str:
    """A table, and remarks as a list below it."""
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    lines += [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([*lines, "", *(f"- {remark}" for remark in remarks)])


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
