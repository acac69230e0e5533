"""The server: its paths, its page, and what it does when something goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import AsyncIterator
from importlib import resources
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from pipeline.errors import BusyError, OutputError, PipelineError, StorageError
from pipeline.serve.answers import Overview, Problem
from pipeline.serve.guard import App, Guard, Limits
from pipeline.serve.review_api import label_counts, review_routes
from pipeline.serve.search_api import ChangedError, NotFoundError, answer, problem, search_routes
from pipeline.serve.site import Site, plain
from pipeline.status import status

_REPORTS = "reports"
_RUNS = 30
_RUN_FACTS = ("started_at", "images", "rejects", "seconds", "images_per_s", "limiting_stage", "stopped")
# Reports are pages of their own with style and script inside: shut off from everything else.
_REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css",
    "js": "text/javascript",
    "svg": "image/svg+xml",
}

logger = logging.getLogger(__name__)


def create_app(site: Site, token: str | None) -> App:
    """The ASGI application of an output, with all that guards it."""
    app = FastAPI(
        title="cvt-pipeline",
        summary="Search, look at and review the images of an output.",
        docs_url=None,  # its page comes from a network
        redoc_url=None,
        lifespan=lambda _: _refreshing(site),
    )
    app.include_router(search_routes(site))
    app.include_router(review_routes(site))
    app.include_router(_overview_routes(site))
    _add_page(app)
    app.add_exception_handler(PipelineError, _on_error)
    app.add_exception_handler(OSError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_nonsense)
    config = site.config
    limits = Limits(config.max_upload_bytes, config.upload_timeout_s)
    return Guard(app, token=token, names=(config.host, *config.names), limits=limits)


@contextlib.asynccontextmanager
async def _refreshing(site: Site) -> AsyncIterator[None]:
    async def refresh() -> None:
        while True:
            await asyncio.sleep(site.config.refresh_s)
            (outcome,) = await asyncio.gather(run_in_threadpool(site.refresh), return_exceptions=True)
            if isinstance(outcome, Exception):  # a fault of ours, which must not be the last refresh
                logger.error("the output could not be looked at again", exc_info=outcome)

    task = asyncio.create_task(refresh())
    yield
    task.cancel()
    site.close()


async def _on_error(_: Request, error: Exception) -> JSONResponse:
    """The words of an error that a visitor can do something about; nothing of our insides."""
    if isinstance(error, NotFoundError):
        return problem(404, str(error))
    if isinstance(error, ChangedError):
        return problem(409, str(error))
    if isinstance(error, OSError | StorageError | OutputError | BusyError):
        logger.error("%s", error)
        return problem(503, "the output cannot be read or written now; the server's log says why")
    return problem(400, str(error))


async def _on_nonsense(_: Request, error: Exception) -> Response:
    """What is wrong with a request, without the request: it may hold what cannot be written."""
    assert isinstance(error, RequestValidationError)
    told = [{name: fault[name] for name in ("loc", "msg", "type")} for fault in error.errors()]
    return Response(json.dumps({"detail": told}), 422, media_type="application/json")


def _overview_routes(site: Site) -> APIRouter:
    api = APIRouter(tags=["overview"])

    @api.get("/api/overview", response_model=Overview, summary="What the output holds")
    def overview() -> Response:
        view = site.view
        index = None
        if view.has_index:
            record = view.searcher.record.to_json()
            names = ("version", "type", "num_vectors", "dim", "recall_at_10", "created_at")
            index = {name: record.get(name) for name in names}
        facts = {
            "output": site.output.uri,
            "status": plain(status(site.output)),
            "rows": len(view.catalogue),
            "index": plain(index),
            "no_index": view.no_index,
            "labels": label_counts(site),
            "runs": _runs(site),
            "allow_urls": site.config.allow_urls,
            "max_upload_bytes": site.config.max_upload_bytes,
        }
        return answer(facts)

    @api.get(
        "/reports/{run}.html",
        summary="The report of a run",
        responses={404: {"model": Problem}},
        response_class=Response,
    )
    def report(run: Annotated[str, Path(max_length=200)]) -> Response:
        name = f"{_REPORTS}/{run}.html"
        if name not in {info.path for info in site.output.find(_REPORTS)}:
            raise NotFoundError("there is no such report")
        headers = {"Content-Security-Policy": _REPORT_POLICY}
        return Response(site.output.read_bytes(name), media_type=_KINDS["html"], headers=headers)

    return api


def _runs(site: Site) -> list[dict[str, Any]]:
    """The last runs, the newest first."""
    paths = {info.path for info in site.output.find(_REPORTS)}
    found = []
    for path in sorted((path for path in paths if path.endswith(".json")), reverse=True)[:_RUNS]:
        with contextlib.suppress(ValueError, FileNotFoundError):  # one that is being replaced
            values = json.loads(site.output.read_bytes(path))
            run = path.removeprefix(f"{_REPORTS}/").removesuffix(".json")
            facts = {name: plain(values.get(name)) for name in _RUN_FACTS}
            found.append({"run": run, **facts, "page": path.removesuffix(".json") + ".html" in paths})
    return found


def _add_page(app: FastAPI) -> None:
    """The files of the page, from the package, read once; nothing else can be asked for."""
    folder = resources.files("pipeline.serve") / "static"
    files = {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.is_file()}

    def page() -> Response:
        return Response(files["index.html"], media_type=_KINDS["html"])

    def file(name: Annotated[str, Path(max_length=100)]) -> Response:
        if name not in files or not re.fullmatch(r"[a-z_-]+\.(css|js|svg)", name):
            raise NotFoundError("there is no such file")
        return Response(
            files[name],
            media_type=_KINDS[name.rpartition(".")[2]],
            headers={"Cache-Control": "no-cache"},
        )

    app.get("/", include_in_schema=False)(page)
    app.get("/static/{name}", include_in_schema=False)(file)
