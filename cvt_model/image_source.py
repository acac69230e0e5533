"""An image as people name it: a path, a URL, bytes or a PIL image.

What enters: one of these. What leaves: an upright RGB image, or an `ImageError` that says why not. It
reads local files and the web; whoever knows other storage hands in a reader for its URLs.
"""

import http.client
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

from PIL import Image

from cvt_model.errors import ImageError
from cvt_model.image_file import DEFAULT_MAX_PIXELS, open_image, upright_rgb

ImageInput = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image
IMAGE_TYPES = tuple(getattr(kind, "__origin__", kind) for kind in get_args(ImageInput))  # for isinstance

URL = re.compile(r"[A-Za-z][\w.+-]*(::[A-Za-z][\w.+-]*)*://")
TIMEOUT_S = 10.0  # for a server to say something
DEADLINE_S = 60.0  # for a whole image
PIECE_BYTES = 2**20


def read_http(url: str) -> bytes:
    """What an http or https URL answers with; OSError in words where that is no image's bytes."""
    if not url.lower().startswith(("http://", "https://")):
        raise OSError("only http and https are read here; read it yourself and pass the bytes")
    give_up = time.monotonic() + DEADLINE_S
    pieces = []
    try:
        request = Request(as_ascii(url), headers={"User-Agent": "cvt-pipeline"})
        with urlopen(request, timeout=TIMEOUT_S) as response:
            while piece := response.read1(PIECE_BYTES):
                pieces.append(piece)
                if time.monotonic() > give_up:
                    raise TimeoutError(f"not there after {DEADLINE_S:.0f} s")
            if response.length:
                raise ConnectionError(f"the answer ends {response.length} bytes early")
    except HTTPError as error:
        raise OSError(str(error)) from error
    except URLError as error:
        raise OSError(str(error.reason)) from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # gone, no HTTP, or no URL
        raise OSError(str(error) or type(error).__name__) from error
    return b"".join(pieces)


def as_ascii(url: str) -> str:
    """The URL with blanks and letters beyond ASCII written as %XX, as browsers send them."""
    parts = urlsplit(url)
    path, query = (quote(part, safe="%/:=&?~+!$,;'@()*[]") for part in (parts.path, parts.query))
    return parts._replace(path=path, query=query, fragment="").geturl()


def load_image(
    image: ImageInput,
    *,
    read_url: Callable[[str], bytes] = read_http,
    max_pixels: int | None = DEFAULT_MAX_PIXELS,
) -> Image.Image:
    """The image, upright and as RGB, whatever it is given as.

    `read_url` reads what begins like a URL and raises OSError where it cannot; `~/` is the home folder.
    Raises ImageError, and TypeError for what is no image at all.
    """
    if isinstance(image, Image.Image):
        return convert_image(image)
    if isinstance(image, str | os.PathLike):
        image = read_source(os.fspath(image), read_url)
    elif not isinstance(image, bytes | bytearray | memoryview):
        raise TypeError(
            f"expected a path, a URL, bytes or a PIL image, found {type(image).__name__}; "
            "PIL.Image.fromarray makes an image of an array"
        )
    return open_image(bytes(image), max_pixels).image_rgb


def read_source(source: str, read_url: Callable[[str], bytes] = read_http) -> bytes:
    """The bytes of a local file or of a URL; ImageError where they cannot be had."""
    try:
        if URL.match(source) and not source.startswith("file://"):
            return read_url(source)
        path = Path(source.removeprefix("file://"))
        return (path.expanduser() if source.startswith("~/") else path).read_bytes()
    except IsADirectoryError as error:
        raise ImageError("unreadable", "it is a directory; name the images in it") from error
    except (OSError, ValueError) as error:  # ValueError: no path, such as one with a null byte
        reason = getattr(error, "strerror", None) or error
        raise ImageError("unreadable", f"it cannot be read: {reason}") from error


def convert_image(image: Image.Image) -> Image.Image:
    """A PIL image of any mode, upright and as RGB; the file behind it may be read only now."""
    if 0 in image.size:
        raise ImageError("corrupt", "the image has no pixels")
    try:
        return upright_rgb(image)
    except (OSError, SyntaxError, ValueError, EOFError, AssertionError) as error:  # the last: it is closed
        detail = str(error) or "its file is closed"
        raise ImageError("corrupt", f"its pixels cannot be read: {detail}") from error
