"""The process that serves: a socket, uvicorn on it, and an end in good order."""

from __future__ import annotations

import gc
import logging
import socket
from collections.abc import Callable, Mapping
from typing import Any

from pipeline.config import ServeConfig
from pipeline.errors import ConfigError
from pipeline.serve.guard import LOOPBACK
from pipeline.storage import Storage

_CONNECTIONS = 512
_KEEP_ALIVE_S = 15
_END_S = 5

logger = logging.getLogger(__name__)


def token_for(config: ServeConfig, draw: Callable[[], str]) -> str | None:
    """What visitors must know: the configured token; drawn where others can reach the address; or None.

    Raises ConfigError for a token that could be guessed.
    """
    if config.token is not None:
        token = config.token.get_secret_value()
        if len(token) < 16 or not token.isascii() or not token.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(
                "serve.token: 16 or more letters, digits, - and _; leave it out to have one drawn"
            )
        return token
    return None if config.host in LOOPBACK else draw()


def run_server(
    output: Storage,
    config: ServeConfig,
    input_options: Mapping[str, Any],
    token: str | None,
    ready: Callable[[str, int], None],
) -> None:
    """Serve until SIGINT or SIGTERM. `ready` is told the address and the number of images.

    Raises ConfigError where the address cannot be had, or FastAPI is not installed.
    """
    try:
        import uvicorn

        from pipeline.serve.app import create_app
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"serve needs the extra `serve` ({error}); pip install 'cvt-pipeline[serve]'"
        ) from error
    from pipeline.serve.site import Site

    listening = _listen(config)  # before the output is opened, which may take a while
    site = Site(output, config, input_options)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    settings = uvicorn.Config(
        create_app(site, token),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_CONNECTIONS,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_END_S,
    )
    ready(f"http://{shown}:{port}", len(site.view.catalogue))
    gc.collect()
    gc.freeze()  # what is there by now stays; looking through it again and again stops everybody for 100 ms
    uvicorn.Server(settings).run(sockets=[listening])


def _listen(config: ServeConfig) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((config.host, config.port))
        listening.listen(_CONNECTIONS)
    except OSError as error:
        raise ConfigError(
            f"serve.host, serve.port: cannot listen on {config.host}:{config.port} ({error.strerror}); "
            "choose another port, or 0 for any that is free"
        ) from error
    return listening
