"""`cvt-pipeline serve OUTPUT`: a page on which people search, look and review."""

from __future__ import annotations

import os
import secrets
from typing import Annotated

import typer
from rich.markup import escape

from jobs.common import console, run_module, set_up_logging

SETTINGS: dict[str, object] = {}
TOKEN_VARIABLE = "CVT_PIPELINE__SERVE__TOKEN"  # the name of a variable


def serve(
    output: Annotated[str, typer.Argument(help="the output of an extract")],
    overrides: Annotated[list[str] | None, typer.Argument(help="serve.key=value")] = None,
) -> None:
    """Open a page on an output: search by image, filter, review labels, look at duplicates."""
    set_up_logging(verbose=False)
    from pipeline.config import ServeConfig
    from pipeline.load_config import load_section, open_output, storage_options_of

    given = {"token": os.environ[TOKEN_VARIABLE]} if TOKEN_VARIABLE in os.environ else {}
    config = load_section(ServeConfig, overrides or (), "serve", given)
    place = open_output(output)
    from pipeline.serve.server import run_server, token_for

    token = token_for(config, lambda: secrets.token_urlsafe(24))

    def ready(address: str, rows: int) -> None:
        query = f"?token={token}" if token else ""
        console.print(f"{rows:,} images of {escape(place.uri)}: {escape(address)}/{query}", highlight=False)

    run_server(place, config, storage_options_of("input", shared=False), token, ready)


if __name__ == "__main__":
    run_module(serve, SETTINGS)
