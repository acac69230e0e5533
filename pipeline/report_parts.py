"""Pieces of a report's page: text made safe, numbers made short, bars, tables and the area chart.

Labels of the chart are HTML beside its SVG, so that they keep their size on a phone.
"""

from __future__ import annotations

import html
import json
import math
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029")
_TICKS = 4
_MOST_POINTS = 120


def safe(text: object) -> str:
    """Any text as HTML: markup escaped; control, direction and broken characters shown by number."""
    shown = (
        f"\\u{ord(char):04x}" if char in _BIDI or unicodedata.category(char) in ("Cc", "Cs") else char
        for char in str(text)
    )
    return html.escape("".join(shown))


def name(text: object) -> str:
    """A name from the input, whose direction of writing leaves its neighbours alone."""
    return f"<bdi>{safe(text)}</bdi>"


def count(number: float) -> str:
    """A count as people read it: 9,876,543 and 12.3 M."""
    if abs(number) < 10_000_000:
        return f"{number:,.0f}"
    exponent = min(5, int((math.log10(abs(number)) + 0.0002) // 3))  # so that 999,999,999 is 1 G
    return f"{number / 1000**exponent:,.3g} {' kMGTP'[exponent]}"


def rate(number: float) -> str:
    """A rate: two digits of it where it is small."""
    if number >= 1000:
        return count(number)
    return f"{number:.2g}" if 0 < number < 10 and number != round(number, 1) else f"{number:,.1f}"


def size(num_bytes: float) -> str:
    """Bytes with a unit of 1,000s."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:,.1f} {unit}"
    return f"{num_bytes:,.0f} B"


def clock(seconds: float) -> str:
    """A time after the start: 42 s, 3:05 min, 2:10 h, 3 d 04 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if seconds >= 10 or seconds == whole else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    if whole < 86400:
        return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def section(title: str, content: str, note: str = "", *, wide: bool = False) -> str:
    """A card whose content is HTML; nothing where it has none."""
    if not content:
        return ""
    said = f"<small>{safe(note)}</small>" if note else ""
    return f"<section class='{'wide' if wide else ''}'><h2>{safe(title)}{said}</h2>{content}</section>"


def configuration(config: dict[str, Any]) -> str:
    """A configuration, folded."""
    lines = json.dumps(config, indent=1, ensure_ascii=False).split("\n")
    summary = "<summary class='plain'>as it was used, secrets hidden</summary>"
    return f"<details>{summary}<pre>{chr(10).join(map(safe, lines))}</pre></details>"


def bar(label: str, share: float, value: str, *, kind: str = "", note: str = "") -> str:
    """One horizontal bar; `share` of the full width. Label, value and note are HTML."""
    width = 100 * max(0.0, min(1.0, share))
    return (
        f'<div class="bar {kind}"><span class="label">{label}</span>'
        f'<span class="track"><i style="width:{width:.2f}%"></i></span>'
        f'<span class="value">{value}</span>{f"<small>{note}</small>" if note else ""}</div>'
    )


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells are HTML; the first column is text, the others are numbers."""
    head = "".join(f"<th>{safe(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def pairs(values: Iterable[tuple[str, str]]) -> str:
    """Names with their values, both HTML."""
    return "<dl>" + "".join(f"<div><dt>{key}</dt><dd>{value}</dd></div>" for key, value in values) + "</dl>"


def throughput(timeline: dict[str, Any], seconds: float, startup_s: float | None) -> str:
    """Images a second over time, as an area with axes; rejects in red below it, start-up shaded."""
    width_s, images, rejects = _readable(timeline)
    num, total_s = len(images), max(seconds, 1e-3)
    spans = [max(1e-3, min(width_s, total_s - n * width_s)) for n in range(num)]
    if num > 1 and spans[-1] < width_s / 4:  # a sliver of a bucket says nothing of the rate
        spans[-1] = width_s
    rates = [images[n] / spans[n] for n in range(num)]
    bad = [rejects[n] / spans[n] for n in range(num)]
    step, top = axis(max([*rates, *bad, 1e-3]))
    centres = [min(100.0, 100 * (n * width_s + spans[n] / 2) / total_s) for n in range(num)]
    grid = "".join(
        f'<i class="grid" style="bottom:{100 * n * step / top:.2f}%"><b>{tick(n * step)}</b></i>'
        for n in range(round(top / step) + 1)
    )
    every, last = _time_axis(total_s)
    times = "".join(
        f'<i class="time" style="left:{100 * n * every / total_s:.2f}%"><b>{_mark(n * every)}</b></i>'
        for n in range(last + 1)
    )
    shade = 100 * min(1.0, (startup_s or 0.0) / total_s)
    startup = (
        f'<i class="startup" style="width:{shade:.2f}%"><b>start-up {clock(startup_s)}</b></i>'
        if startup_s and shade >= 1
        else ""
    )
    points = [[clock(n * width_s), rate(rates[n]), count(rejects[n])] for n in range(num)]
    return (
        f'<div class="chart" role="img" aria-label="images a second over time">{grid}{times}{startup}'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none">'
        f'<path class="area" d="{_area(centres, rates, top)}"/>'
        f'<path class="line" d="{_line(centres, rates, top)}"/>'
        + (f'<path class="bad" d="{_area(centres, bad, top)}"/>' if any(bad) else "")
        + f'</svg><div class="cursor" data-points="{html.escape(json.dumps(points))}" '
        f'data-step="{100 * width_s / total_s:.6f}"><p></p></div></div>'
    )


def _readable(timeline: dict[str, Any]) -> tuple[float, list[int], list[int]]:
    """Buckets wide enough that a typical one has received something, and no more than can be seen."""
    width_s, images, rejects = timeline["bucket_s"], timeline["images"], timeline["rejects"]
    while len(images) > _MOST_POINTS or (len(images) > 8 and _typical_gap(images, rejects) > 1):
        width_s *= 2
        images, rejects = _pairs_summed(images), _pairs_summed(rejects)
    return width_s, images, rejects


def _typical_gap(images: list[int], rejects: list[int]) -> int:
    """How far apart buckets that received something mostly are: chunks may take seconds each."""
    filled = [n for n in range(len(images)) if images[n] or rejects[n]]
    gaps = sorted(b - a for a, b in pairwise(filled))
    return gaps[(3 * len(gaps)) // 4] if gaps else 1


def _pairs_summed(counts: list[int]) -> list[int]:
    return [sum(counts[n : n + 2]) for n in range(0, len(counts), 2)]


def axis(most: float) -> tuple[float, float]:
    """A round step (1, 2 or 5 times a power of ten) and the axis's end, a multiple of it."""
    power = 10.0 ** math.floor(math.log10(most / _TICKS))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * _TICKS >= most)
    return step, step * math.ceil(most / step - 1e-9)


def _time_axis(seconds: float) -> tuple[float, int]:
    """Seconds between marks of the time axis, and how many fit beside the first."""
    steps = (0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200)
    step = next((step for step in steps if seconds / step <= 7), None)
    step = step or 86400 * math.ceil(seconds / 86400 / 7)
    return step, int(seconds / step)


def _mark(seconds: float) -> str:
    """A round time of the axis: 30 s, 15 min, 2 h, 1.5 h, 3 d."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length and seconds % (length / 4) == 0:
            return f"{seconds / length:g} {unit}"
    return f"{seconds:g} s"


def tick(number: float) -> str:
    return count(number) if number >= 10 or number == round(number) else f"{number:.3g}"


def _line(xs: list[float], values: list[float], top: float) -> str:
    if not xs:
        return ""
    ys = [100 - 100 * value / top for value in values]
    inner = " ".join(f"L{x:.3f} {y:.3f}" for x, y in zip(xs, ys, strict=True))
    return f"M0 {ys[0]:.3f} {inner} L100 {ys[-1]:.3f}"


def _area(xs: list[float], values: list[float], top: float) -> str:
    line = _line(xs, values, top)
    return f"{line} L100 100 L0 100 Z" if line else ""
