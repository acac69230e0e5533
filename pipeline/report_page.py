"""A report's values as one page that stands alone: no script or style from elsewhere, nothing to install.

Enters: the values of `reports/<run>.json`. Leaves: HTML. Everything that came from the input or the user
passes through `safe`.
"""

from __future__ import annotations

from typing import Any

from pipeline.report_parts import (
    bar,
    clock,
    configuration,
    count,
    name,
    pairs,
    rate,
    safe,
    section,
    size,
    table,
    throughput,
)
from pipeline.report_style import PAGE, SCRIPT, STYLE
from pipeline.steps import outcome

MOST_ROWS = 50
MOST_LABELS = 20
_ADVICE = {
    "read": "Storage delivers more slowly than the rest computes: run nearer to the data, or read from a "
    "faster store.",
    "decode": "Decoding fills its cores: add CPU cores or nodes, or set <code>input.decode: fast</code>.",
    "model": "The model sets the pace, as it should: add GPUs, or a lower <code>model.precision</code>.",
    "write": "Writing results holds up the rest: a faster output store, or fewer columns "
    "(<code>output.logits: 5</code>, <code>output.dtype: float16</code>).",
}
_MEANING = {
    "list": "listing and planning, before the start",
    "read": "reading shards from storage",
    "decode": "decoding and resizing images",
    "wait": "chunks lying ready between stages",
    "model": "the network",
    "write": "writing results",
}


def report_page(values: dict[str, Any]) -> str:
    """The page of a report."""
    sections = (
        section("Steps", _steps(values), "one after the other, each over what is committed", wide=True),
        section("Throughput", _throughput(values), "images a second, over time", wide=True),
        section("Time by stage", _stages(values), "seconds of work, of all workers together"),
        section("Failed shards", _failed(values["shards"]["failed"]), "left out; tried by the next run"),
        section("Rejects by reason", _rejects(values)),
        section("Labels", _labels(values), "the most probable class of each image"),
        section("Largest shards", _shards(values["largest_shards"])),
        section("Slowest shards", _shards(values["slowest_shards"]), "from the first read to the commit"),
        section("Left alone", _left_alone(values)),
        section("Machine and versions", _machine(values)),
        section("Configuration", configuration(values["config"])),
    )
    return PAGE.format(
        title=f"Run {safe(values['run'])}",
        run=f"<code>{safe(values['run'])}</code>",
        verb="run" if "steps" in values else "extract",
        output=name(values["output"]),
        when=safe(f"{values['started_at'].replace('T', ' ').replace('+00:00', ' UTC')}"),
        verdict=_verdict(values),
        stopped=f'<p class="stopped">Stopped: {safe(values["stopped"])}</p>' if values["stopped"] else "",
        tiles=_tiles(values),
        sections="".join(sections),
        style=STYLE,
        script=SCRIPT,
    )


def _verdict(values: dict[str, Any]) -> str:
    num_failed = len(values["shards"]["failed"])
    failed = [f"{count(num_failed)} failed shard{'s' * (num_failed != 1)}"] if num_failed else []
    later = values.get("steps", ())[1:]
    failed += [f"{safe(step['step'])} failed" for step in later if step["status"] == "failed"]
    if values["stopped"]:
        kind, text = "bad", "stopped"
    elif failed:
        kind, text = "bad", f"finished, {', '.join(failed)}"
    elif not values["shards"]["planned"]:
        kind, text = "idle", "nothing to do"
    else:
        kind, text = "good", "finished"
    return f'<span class="verdict {kind}">{text}</span>'


def _tiles(values: dict[str, Any]) -> str:
    shards, samples = values["shards"], values["images"] + values["rejects"]
    share = f"{values['rejects'] / samples:.2%} of samples" if values["rejects"] else "none"
    before = f" · {count(shards['done_before'])} done before" if shards["done_before"] else ""
    startup, speed = values["startup_s"], values["images_per_s"]
    tiles = [
        ("images", count(values["images"]), "committed"),
        ("images/s", rate(speed) if speed else "–", "after start-up" if speed else "too few to tell"),
        ("rejects", count(values["rejects"]), share),
        ("shards", count(shards["committed"]), f"of {count(shards['planned'])}{before}"),
        (
            "time",
            clock(values["seconds"]),
            f"{clock(startup)} start-up" if startup is not None else "in all",
        ),
        ("limited by", *_limit(values)),
    ]
    return "".join(
        f'<div class="tile"><span>{label}</span><b>{number}</b><small>{note}</small></div>'
        for label, number, note in tiles
    )


def _limit(values: dict[str, Any]) -> tuple[str, str]:
    if values["limiting_stage"] is None:
        return "–", "nothing was done"
    if values["is_waiting"]:
        return "start-up", "and waiting"
    return safe(values["limiting_stage"]), "the stage to speed up"


def _steps(values: dict[str, Any]) -> str:
    rows = [
        (
            f"<b>{safe(step['step'])}</b><br><small>{name(outcome(step))}</small>",
            safe(step["status"]),
            clock(step["seconds"]),
        )
        for step in values.get("steps", ())
    ]
    return table(("step", "ended as", "time"), rows) if rows else ""


def _throughput(values: dict[str, Any]) -> str:
    timeline = values["timeline"]
    if not any(timeline["images"]) and not any(timeline["rejects"]):
        return '<p class="empty">Nothing was processed in this run.</p>'
    legend = '<p class="legend"><i class="key"></i>images/s'
    legend += '<i class="key bad"></i>rejects/s' if any(timeline["rejects"]) else ""
    return throughput(timeline, values["seconds"], values["startup_s"]) + legend + "</p>"


def _stages(values: dict[str, Any]) -> str:
    stages, limit = values["stages"], values["limiting_stage"]
    # Many chunks wait at once, so that all their waiting together would dwarf the work.
    most = max((facts["seconds"] for stage, facts in stages.items() if stage != "wait"), default=0)
    if not most:
        return ""
    bars = []
    for stage, facts in stages.items():
        busy = f" · {facts['busy']:.0%} busy" if facts["busy"] is not None else ""
        marked = stage == limit and not values["is_waiting"]
        bars.append(
            bar(
                f"{stage}{' <em>limits</em>' if marked else ''}",
                facts["seconds"] / most,
                clock(facts["seconds"]),
                kind="limit" if marked else ("pale" if stage in ("list", "wait") else ""),
                note=_MEANING[stage] + busy,
            )
        )
    return "".join(bars) + _advice(values)


def _advice(values: dict[str, Any]) -> str:
    limit = values["limiting_stage"]
    if limit is None:
        return ""
    if values["is_waiting"]:
        return (
            '<p class="advice"><b>Start-up and waiting</b> took most of this run: no stage was busy for '
            f"even half of the time (the busiest: {safe(limit)}). Larger runs use the machine better.</p>"
        )
    busy = values["stages"][limit]["busy"]
    share = f", busy for {busy:.0%} of the time" if busy is not None else ""
    return f'<p class="advice"><b>{safe(limit)}</b> limits this run{share}. {_ADVICE[limit]}</p>'


def _rejects(values: dict[str, Any]) -> str:
    reasons = values["rejects_seen_by_reason"]
    total = sum(reasons.values())
    if not total:
        return '<p class="empty">No image was rejected.</p>'
    most, rows = max(reasons.values()), []
    for reason, number in reasons.items():
        line = bar(safe(reason), number / most, f"{count(number)} · {number / total:.1%}", kind="bad")
        examples = [_example(row) for row in values["reject_examples"].get(reason, [])]
        inner = "".join(examples) or "<li>no example was kept</li>"
        rows.append(f"<details><summary>{line}</summary><ul>{inner}</ul></details>")
    if total != values["rejects"]:
        rows.append(f'<p class="empty">{count(values["rejects"])} of them are in committed shards.</p>')
    return "".join(rows)


def _example(row: dict[str, Any]) -> str:
    bytes_ = f" · {size(row['size_bytes'])}" if row["size_bytes"] is not None else ""
    return f"<li>{name(row['image_id'])}{bytes_}<small>{safe(row['message'])}</small></li>"


def _labels(values: dict[str, Any]) -> str:
    labels = values["labels"]
    top = list(labels["top"].items())[:MOST_LABELS]
    if not top:
        return ""
    total = sum(labels["top"].values()) + labels["others"]
    others = total - sum(number for _, number in top)
    bars = [
        bar(name(label), number / top[0][1], f"{count(number)} · {number / total:.1%}")
        for label, number in top
    ]
    if others:
        rest = f"{count(labels['num_labels'] - len(top))} others"
        bars.append(f'<p class="empty">{rest} with {count(others)} images · {others / total:.1%}</p>')
    return "".join(bars)


def _shards(shards: list[dict[str, Any]]) -> str:
    rows = [
        (
            name(shard["shard"]),
            size(shard["size_bytes"]),
            count(shard["images"]),
            count(shard["rejects"]),
            clock(shard["seconds"]),
        )
        for shard in shards
    ]
    return table(("shard", "size", "images", "rejects", "time"), rows) if rows else ""


def _failed(failed: dict[str, str]) -> str:
    shown = "".join(
        f"<li>{name(shard)}<small>{safe(error)}</small></li>"
        for shard, error in list(failed.items())[:MOST_ROWS]
    )
    return f"<ul class='failed'>{shown}</ul>{_more(len(failed))}" if shown else ""


def _left_alone(values: dict[str, Any]) -> str:
    shards = values["shards"]
    rows = []
    if shards["removed"]:
        rows.append(("removed", f"{count(shards['removed'])} shards, which are gone from the input"))
    if values["waiting_files"]:
        rows.append(
            ("waiting", f"{count(values['waiting_files'])} files, too young: the next run takes them")
        )
    if shards["ignored"]:
        shown = ", ".join(map(name, shards["ignored"][:MOST_ROWS]))
        rows.append(("ignored", f"{count(len(shards['ignored']))}, by input.ignore_shards: {shown}"))
    return pairs(rows) + _more(len(shards["ignored"])) if rows else ""


def _more(number: int) -> str:
    rest = number - MOST_ROWS
    return (
        f'<p class="empty">… and {count(rest)} more; the report in JSON names all.</p>' if rest > 0 else ""
    )


def _machine(values: dict[str, Any]) -> str:
    machine = values["machine"]
    gpus = ", ".join(machine["gpus"]) or "none seen on the driver's machine"
    rows = [
        ("host", machine["host"]),
        ("processor", f"{machine['cpu']}, {machine['cores']} cores"),
        ("GPUs", gpus),
        ("system", machine["platform"]),
        *values["versions"].items(),
        ("fingerprint", values["fingerprint"]),
    ]
    return pairs((safe(key), safe(value)) for key, value in rows)
