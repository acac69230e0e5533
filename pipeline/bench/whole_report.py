"""The figures of the whole as a table, for a terminal or for Markdown.

Enters: what `bench_whole` returns. Leaves: text. Nothing is measured or computed here.
"""

from __future__ import annotations

from typing import Any

from pipeline.bench.report import machine_line, markdown_of, number, warnings

HEADINGS = ("alone, then together", "images/s (min to max)", "of what")


def rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row a speed, in the order of HEADINGS; one that was not measured has none."""
    threads, megabytes_per_s = figures["hardware"]["threads"], figures["read_bytes_per_s"] / 1e6
    on_all = f"{figures['decode']}, " + ("the only core" if threads == 1 else f"{threads} cores at once")
    shared = (
        "decoding and model overlap" if figures["hardware"]["gpu"] else "decoding and model share cores"
    )
    named = [
        ("read", "read_images_per_s", f"tars, one process, {megabytes_per_s:,.0f} MB/s"),
        ("decode", "decode_images_per_s_core", "exact, one core"),
        ("", "decode_fast_images_per_s_core", "fast, one core"),
        ("", "decode_images_per_s", on_all),
        ("model", "model_images_per_s", f"{figures['precision']}, {figures['chunk_images']} at once"),
        ("write", "write_images_per_s", "to Parquet, one process"),
        ("ceiling", "ceiling_images_per_s", shared),
        ("a run", "run_images_per_s", f"{figures['fraction_of_ceiling']:.0%} of the ceiling"),
        ("transformers' pipeline", "pipeline_images_per_s", "float32, batches of 16"),
    ]
    return [(title, speed(figures, name), what) for title, name, what in named]


def speed(figures: dict[str, Any], name: str) -> str:
    """A median, with its spread where it has one."""
    low, high = figures.get(f"{name}_min"), figures.get(f"{name}_max")
    spread = "" if low is None or low == high else f" ({low:,.1f} to {high:,.1f})"
    return number(figures[name], ",.1f") + spread


def summary(figures: dict[str, Any]) -> list[str]:
    """Lines that a reader of the table needs: what ran where, and what else was found."""
    times = "once" if figures["rounds"] == 1 else f"{figures['rounds']} times"
    lines = [
        f"{figures['checkpoint']} (weights: {figures['weights']}) in {figures['precision']} on "
        f"{figures['backend']}, decode: {figures['decode']}; {figures['num_images']:,} images of "
        f"{figures['num_photographs']} ({figures['images']}), everything {times}",
        machine_line(figures),
        f"the run: first images after {number(figures['startup_s'], '.1f')} s, limited by "
        f"{figures['limiting_stage']}{rival_words(figures)}",
        f"decode: fast is {figures['decode_ratio_fast']:.2f} times as fast as exact, and "
        f"{figures['decode_ratio_fast_12mp']:.1f} times on JPEGs of 12 megapixels; its embeddings have a "
        f"cosine of {figures['cosine_fast_mean']:.4f} to exact's (least "
        f"{figures['cosine_fast_min']:.4f}), its pixels differ by "
        f"{figures['pixel_difference_fast']:.2f} of 255",
    ]
    return lines + warnings(figures)


def rival_words(figures: dict[str, Any]) -> str:
    ratio = figures["ratio_pipeline"]
    return "" if ratio is None else f"; {ratio:.2f} times as fast as transformers' pipeline, starts apart"


def markdown(figures: dict[str, Any]) -> str:
    """The table and what belongs to it, for a README."""
    return markdown_of(HEADINGS, rows(figures), summary(figures))
