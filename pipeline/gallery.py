"""A self-contained page of queries and their neighbours, with thumbnails made from the originals."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cvt_model.errors import ImageError
from cvt_model.image_file import DEFAULT_MAX_PIXELS, open_image
from pipeline.search import Hit

THUMBNAIL_PX = 192

ReadOriginal = Callable[[str, str], bytes | None]


@dataclass(frozen=True)
class Row:
    """One query: its name, its encoded image where there is one, and what was found."""

    title: str
    image: bytes | None
    hits: list[Hit]


def gallery_page(title: str, note: str, rows: Iterable[Row], read_original: ReadOriginal) -> str:
    """HTML with every thumbnail inside it. `read_original` takes a shard and a key."""
    return page(title, note, "".join(_section(row, read_original) for row in rows))


def page(title: str, note: str, body: str, style: str = "") -> str:
    """A page of the gallery's looks; `body` and `style`, further CSS, go into it as they are."""
    return _PAGE.format(title=html.escape(title), note=html.escape(note), body=body, style=style)


def thumbnail(data: bytes | None) -> str | None:
    """A data: URL of a JPEG of at most 192 x 192 pixels; None where there is no usable image."""
    if data is None:
        return None
    try:
        image = open_image(data, DEFAULT_MAX_PIXELS).image_rgb
    except ImageError:
        return None
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _section(row: Row, read_original: ReadOriginal) -> str:
    query = figure(row.image, row.title, "query")
    hits = "".join(
        figure(
            read_original(hit.shard, hit.key) if hit.shard and hit.key else None,
            hit.image_id,
            _caption(hit),
        )
        for hit in row.hits
    )
    return f'<section><div class="query">{query}</div><div class="hits">{hits}</div></section>'


def _caption(hit: Hit) -> str:
    named = hit.label is not None and not hit.label.startswith("LABEL_")  # transformers' placeholder
    return f"{hit.score:.4f} · {hit.label}" if named else f"{hit.score:.4f}"


def figure(image: bytes | None, name: str, caption: str) -> str:
    """An encoded image as a thumbnail, with a caption and its name below it."""
    source, alternative = thumbnail(image), html.escape(name, quote=True)
    picture = (
        f'<img src="{source}" alt="{alternative}">' if source else '<div class="none">no preview</div>'
    )
    return (
        f'<figure title="{alternative}">{picture}'
        f"<figcaption><b>{html.escape(caption)}</b><span>{html.escape(name)}</span></figcaption></figure>"
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif }}
body {{ margin: 0 auto; max-width: 90rem; padding: 1.5rem }}
h1 {{ font-size: 1.4rem; margin: 0 }} p {{ opacity: .75; margin: .25rem 0 1.5rem }}
section {{ display: grid; grid-template-columns: 13rem 1fr; gap: 1rem; padding: 1rem 0;
  border-top: 1px solid #8884 }}
.hits {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .75rem }}
figure {{ margin: 0; min-width: 0 }}
img, .none {{ width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: .5rem; background: #8882 }}
.query img {{ outline: 3px solid #3b82f6; outline-offset: 2px }}
.none {{ display: grid; place-items: center; color: #888 }}
figcaption {{ font-size: .8rem; margin-top: .3rem; overflow: hidden }}
figcaption b {{ display: block }}
figcaption span {{ display: block; opacity: .7; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap }}
@media (max-width: 40rem) {{ section {{ grid-template-columns: 1fr }} .query {{ max-width: 13rem }} }}
{style}</style></head><body><h1>{title}</h1><p>{note}</p>{body}</body></html>
"""
