"""Searching and looking: neighbours, filters, facets, pictures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from pipeline.errors import SearchError
from pipeline.index.vectors import Ids, Vectors
from pipeline.serve.answers import (
    Facets,
    Found,
    FromUrl,
    ImageFacts,
    ImageId,
    Page,
    Problem,
    Uploaded,
)
from pipeline.serve.fetch_url import fetch_url
from pipeline.serve.live import View
from pipeline.serve.site import Site
from pipeline.serve.thumbnails import PLACEHOLDER, SIZES

_SHOWN_VALUES = 100
_URL_S = 15
_UPLOADS = 8  # in memory at the same time
_PICTURES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "a JPEG, or the placeholder",
        "content": {
            kind: {"schema": {"type": "string", "format": "binary"}}
            for kind in ("image/jpeg", "image/svg+xml")
        },
    }
}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "what was asked for cannot be answered"},
    404: {"model": Problem, "description": "there is no such image"},
}

Where = Annotated[
    str | None,
    Query(max_length=4000, description="SQL over the columns of embeddings/: one boolean expression"),
]
Chosen = Annotated[
    list[str],
    Query(alias="facet", max_length=50, description="column:value; several of one column are alternatives"),
]
UploadName = Annotated[str, Query(pattern="^[0-9a-f]{64}$", description="of an image that was uploaded")]


class NotFoundError(SearchError):
    """There is no such image."""


class ChangedError(SearchError):
    """What was seen is no longer so."""


def answer(value: Any) -> Response:
    """JSON that is already what the API promises."""
    return Response(json.dumps(value), media_type="application/json")


def chosen_of(texts: list[str], names: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Facets' values from `column:value` texts, either of which may have colons. Raises SearchError."""
    for text in texts:
        if ":" not in text:
            raise SearchError(f"facet: found {text!r}; it is column:value")
    longest = sorted(names, key=len, reverse=True)

    def parted(text: str) -> tuple[str, str]:
        name = next((it for it in longest if text.startswith(f"{it}:")), text.partition(":")[0])
        return name, text[len(name) + 1 :]

    return tuple(sorted(map(parted, texts)))


def row_of(view: View, image_id: str) -> int:
    """The row of an image. Raises NotFoundError."""
    row = view.catalogue.row_of(image_id)
    if row is None:
        raise NotFoundError(f"there is no image {image_id}; ids are exact")
    return row


def page_of(site: Site, view: View, rows: Ids, after: int, limit: int) -> Response:
    """Some of these rows from one on, as a `Page`."""
    some = rows[after : after + limit].tolist()
    more = after + len(some) if after + len(some) < len(rows) else None
    return answer({"images": site.images(view, some), "next": more, "total": len(rows)})


def search_routes(site: Site) -> APIRouter:  # one short function a path
    """The paths below /api that read."""
    api = APIRouter(prefix="/api", tags=["search"], responses=PROBLEMS)
    at_once = asyncio.Semaphore(_UPLOADS)

    @api.get("/search", response_model=Found, summary="The nearest images of an image")
    async def search(
        image_id: Annotated[ImageId | None, Query(alias="id")] = None,
        upload: UploadName | None = None,
        k: Annotated[int, Query(ge=1, le=500)] = 48,
        where: Where = None,
        facet: Chosen = [],  # noqa: B006  # FastAPI copies it
    ) -> Response:
        view = site.view
        if (image_id is None) == (upload is None):
            raise SearchError("name one image to search by: id or upload")
        query = None
        if image_id is not None:
            row = row_of(view, image_id)
            own = int(view.faiss_ids[row]) if view.has_index else -1
            if own < 0:
                raise SearchError(
                    f"{image_id} is not in the index yet" if view.has_index else view.no_index
                )
            vector = view.searcher.engine.store.take(np.array([own]))[0]
            query = site.images(view, [row])[0]
        else:
            assert upload is not None
            found = await run_in_threadpool(site.uploads.vector, upload, view.searcher)
            vector, own = _unit(found), None
        scores, ids = await _nearest(site, view, vector, k, where, chosen_of(facet, view.facets))
        pairs = [(int(n), float(s)) for n, s in zip(ids, scores, strict=True) if n >= 0]
        if own is not None and own in (n for n, _ in pairs):  # exact copies may rank before it
            pairs = [(own, pairs[0][1]), *(pair for pair in pairs if pair[0] != own)]
        rows = [(int(view.rows[n]), score) for n, score in pairs]
        rows = [(row, score) for row, score in rows if row >= 0]  # redone since the index was built
        hits = site.images(view, [row for row, _ in rows], [score for _, score in rows])
        return answer({"query": query, "hits": hits})

    @api.get("/images", response_model=Page, summary="Images that pass a filter, in the order of the files")
    def images(
        where: Where = None,
        facet: Chosen = [],  # noqa: B006
        after: Annotated[int, Query(ge=0, le=2**53)] = 0,
        limit: Annotated[int, Query(ge=1, le=200)] = 48,
    ) -> Response:
        view = site.view
        mask = view.mask(where, chosen_of(facet, view.facets))
        rows = np.arange(len(view.catalogue)) if mask is None else np.flatnonzero(mask)
        return page_of(site, view, rows, after, limit)

    @api.get("/image", response_model=ImageFacts, summary="What is known of an image")
    def image(image_id: Annotated[ImageId, Query(alias="id")]) -> Response:
        view = site.view
        return answer(site.images(view, [row_of(view, image_id)])[0])

    @api.get("/facets", response_model=Facets, summary="How many images have each value")
    def facets(where: Where = None, facet: Chosen = []) -> Response:  # noqa: B006
        view = site.view
        mask = view.mask(where, chosen_of(facet, view.facets))
        counted = [
            {
                "name": name,
                "values": [{"value": value, "count": count} for value, count in pairs[:_SHOWN_VALUES]],
                "num_values": len(pairs),
            }
            for name, pairs in view.counts(mask).items()
        ]
        total = len(view.catalogue) if mask is None else int(np.count_nonzero(mask))
        return answer({"total": total, "facets": counted})

    @api.get(
        "/thumbnail",
        summary="A small picture of the original; a placeholder where it has gone",
        response_class=Response,
        responses=_PICTURES,
    )
    def thumbnail(image_id: Annotated[ImageId, Query(alias="id")], size: int = SIZES[0]) -> Response:
        if size not in SIZES:
            raise SearchError(f"size: found {size}; choose {' or '.join(map(str, SIZES))}")
        view = site.view
        (row,) = view.catalogue.get([row_of(view, image_id)])
        return _picture(site.thumbnails.of_row(row, size, view.originals))

    @api.get(
        "/uploads/thumbnail",
        summary="A small picture of an image that was searched by",
        response_class=Response,
        responses=_PICTURES,
    )
    def upload_thumbnail(upload: UploadName) -> Response:
        return _picture(site.uploads.picture(upload))

    @api.post(
        "/uploads",
        response_model=Uploaded,
        summary="An image to search by: its bytes are the body",
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
            }
        },
    )
    async def upload(request: Request) -> Response:
        async with at_once:
            data = await request.body()
            searcher = site.view.searcher
            return answer({"upload": await run_in_threadpool(site.uploads.add, data, searcher)})

    @api.post("/uploads/url", response_model=Uploaded, summary="An image behind a public URL to search by")
    def upload_url(source: FromUrl) -> Response:
        if not site.config.allow_urls:
            raise SearchError("URLs are not fetched here; start the server with serve.allow_urls=true")
        data = fetch_url(source.url, site.config.max_upload_bytes, _URL_S)
        return answer({"upload": site.uploads.add(data, site.view.searcher)})

    return api


async def _nearest(
    site: Site,
    view: View,
    vector: Vectors,
    k: int,
    where: str | None,
    chosen: tuple[tuple[str, str], ...],
) -> tuple[Vectors, Ids]:
    if where is None and not chosen:
        return await view.batcher(vector, k)
    mask = await run_in_threadpool(lambda: view.mask(where, chosen))
    assert mask is not None, "there is a filter"
    only = view.indexed(mask)
    number = min(k, int(np.count_nonzero(only)))
    if not number:
        return np.empty(0, np.float32), np.empty(0, np.int64)

    def search() -> tuple[Vectors, Ids]:
        return view.searcher.engine.search(vector[None], number, only=only)

    scores, ids = await asyncio.get_running_loop().run_in_executor(site.pool, search)
    return scores[0], ids[0]


def _unit(vector: Vectors) -> Vectors:
    length = float(np.linalg.norm(vector))
    if not np.isfinite(length) or not length:
        raise SearchError("the image's embedding is zero or not finite, so it has no neighbours")
    return np.asarray(vector / length, np.float32)


def _picture(data: bytes | None) -> Response:
    if data is None:
        return Response(PLACEHOLDER, media_type="image/svg+xml", headers={"X-Placeholder": "1"})
    return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=86400"})


def problem(status: int, message: str) -> JSONResponse:
    """The answer to what cannot be answered."""
    return JSONResponse({"error": message}, status)
