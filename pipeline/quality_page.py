"""Pieces of a page about labels: curves, a confusion matrix, classes and calibration, as HTML.

Enters: values of `metrics.json` or of an evaluation's report. Everything from the input passes `safe`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report_parts import axis, bar, count, name, safe, table, tick
from pipeline.report_style import PAGE, SCRIPT, STYLE

MOST_ROWS = 200
MOST_SHOWN = 30  # classes of a confusion matrix that can be read
OTHER = "another class"
_COLOURS = ("--accent", "--warm", "--good", "--bad")

QUALITY_STYLE = """
.curve { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke; stroke-linejoin: round }
.legend .key { margin-left: .8rem } .legend .key:first-child { margin-left: 0 }
.matrix { border-spacing: 2px; border-collapse: separate; width: auto; font-size: .8rem }
.matrix th, .matrix td { border: 0; padding: .25rem .35rem; min-width: 0 }
.matrix td { text-align: center; border-radius: .25rem; min-width: 2.3rem }
.matrix thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left;
  padding: .35rem .25rem; white-space: nowrap; max-height: 9rem; overflow: hidden }
.matrix tbody th { text-align: right; padding-right: .6rem; white-space: nowrap }
.matrix .dark { color: #fff }
"""


def page(
    title: str, verb: str, verdict: str, when: str, tiles: Sequence[tuple[str, str, str]], body: str
) -> str:
    """A page that stands alone. `verdict`, tiles and body are HTML, the rest is text."""
    shown = "".join(
        f'<div class="tile"><span>{label}</span><b>{value}</b><small>{note}</small></div>'
        for label, value, note in tiles
    )
    return PAGE.format(
        title=safe(f"{verb}: {title}"),
        run="",
        verb=safe(verb),
        output=name(title),
        when=safe(when),
        verdict=verdict,
        stopped="",
        tiles=shown,
        sections=body,
        style=STYLE + QUALITY_STYLE,
        script=SCRIPT,
    )


def curves(
    xs: Sequence[float], lines: Mapping[str, Sequence[float | None]], unit: str, *, percent: bool = False
) -> str:
    """Lines over one axis from zero, with a legend; `unit` names what is counted along the x axis.

    A line has a gap where its value is None.
    """
    if not xs:
        return ""
    step, top = axis(max((y for ys in lines.values() for y in ys if y is not None), default=0) or 1e-3)
    left, right = 0.0, max(xs)
    grid = "".join(
        f'<i class="grid" style="bottom:{100 * n * step / top:.2f}%"><b>{_value(n * step, percent)}</b></i>'
        for n in range(round(top / step) + 1)
    )
    every, _ = axis(max(right - left, 1e-3))
    marks = "".join(
        f'<i class="time" style="left:{100 * n * every / right:.2f}%"><b>{tick(n * every)}</b></i>'
        for n in range(int(right / every + 1e-9) + 1)
    )
    paths = [_path([x / right for x in xs], ys, top) for ys in lines.values()]
    drawn = "".join(
        f'<path class="curve" style="stroke:var({_COLOURS[n % len(_COLOURS)]})" d="{path}"/>'
        for n, path in enumerate(paths)
    )
    legend = "".join(
        f'<i class="key" style="background:var({_COLOURS[n % len(_COLOURS)]})"></i>{safe(label)}'
        for n, label in enumerate(lines)
    )
    told = safe(", ".join(f"{label} {_value(ys[-1], percent)}" for label, ys in lines.items()))
    return (
        f'<div class="chart" role="img" aria-label="at the end: {told}">{grid}{marks}'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none">{drawn}</svg></div>'
        f'<p class="legend">{legend}<span>over {safe(unit)}</span></p>'
    )


def _path(xs: Sequence[float], ys: Sequence[float | None], top: float) -> str:
    """A line through the points, `xs` being shares of the width; it begins anew after a gap."""
    points, begins = [], "M"
    for x, y in zip(xs, ys, strict=True):
        if y is not None:
            points.append(f"{begins}{100 * x:.3f} {100 - 100 * y / top:.3f}")
        begins = "M" if y is None else "L"
    return " ".join(points)


def confusion_matrix(
    counts: Sequence[Sequence[int]] | None, classes: Sequence[str], others: Sequence[int] = ()
) -> str:
    """Labels down, what was said across, shaded by the share of the row; nothing of too many classes.

    `others` are the images of each class that were said to be of none of these: a last column, if any.
    """
    if counts is None or len(classes) > MOST_SHOWN:
        return ""
    across = [*classes, OTHER] if any(others) else classes
    head = "".join(f"<th scope='col'>{name(it)}</th>" for it in across)
    rows = []
    for row, label in enumerate(classes):
        numbers = [*counts[row], others[row]] if any(others) else counts[row]
        total = max(1, sum(numbers))
        cells = "".join(
            _cell(number, number / total, right=row == column, what=f"{label} said to be {said}")
            for column, (number, said) in enumerate(zip(numbers, across, strict=True))
        )
        rows.append(f"<tr><th scope='row'>{name(label)}</th>{cells}</tr>")
    return (
        f'<div class="scroll"><table class="matrix"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(number: int, share: float, *, right: bool, what: str) -> str:
    if not number:
        return "<td></td>"
    colour = "--good" if right else "--bad"
    strength = round(100 * (share if right else min(1.0, 4 * share)))
    dark = " class='dark'" if strength > 55 else ""
    style = f"background:color-mix(in srgb, var({colour}) {max(6, strength)}%, transparent)"
    return f"<td{dark} style='{style}' title='{safe(what)}: {share:.1%}'>{count(number)}</td>"


def class_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Classes with their figures, the weakest first; `columns` maps names of values to headings."""
    last = list(columns)[-1]
    ordered = sorted(rows, key=lambda row: (row[last] is None, row[last]))
    cells = [
        (name(row["class"]), count(row["images"]), *(_share(row[column]) for column in columns))
        for row in ordered[:MOST_ROWS]
    ]
    more = (
        f'<p class="empty">… and {count(len(rows) - MOST_ROWS)} more.</p>' if len(rows) > MOST_ROWS else ""
    )
    return table(("class", "images", *columns.values()), cells) + more if rows else ""


def calibration_bars(bins: Sequence[Sequence[float]]) -> str:
    """How often each band of probability was right."""
    rows = [
        bar(f"{mean:.0%} sure", right, f"{right:.0%} right", note=f"{count(number)} images")
        for number, mean, right in bins
        if number
    ]
    return "".join(rows)


def _value(number: float | None, percent: bool) -> str:
    if number is None:
        return "–"
    return f"{number:.0%}" if percent else tick(number)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
