"""Encoded images: bytes to an RGB image, or a reason why not.

What enters: the bytes of one file, from anybody. What leaves: an `OpenedImage` (or a `StoredImage`, for
those who turn it themselves), or an `ImageError` with a reason of a closed list; nothing else escapes,
whatever the bytes. It must not know where the bytes came from.
"""

import ctypes
import io
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError, _imaging, features

from cvt_model.errors import ImageError
from cvt_model.magic import ends_before_pixels, image_format, other_kind

DEFAULT_MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
MAX_DETAIL = 160  # characters of a decoder's own words
Size = tuple[int, int]  # (width, height), as Pillow has it

TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation


DRAFTED = ("JPEG", "MPO")  # formats whose decoder can make the image smaller

# Codecs that Pillow may be built without.
CODECS = {"WebP": "webp", "AVIF": "avif", "JPEG 2000": "jpg_2000"}
UNSUPPORTED_WORDS = ("support", "not available", "cannot find loader", "ghostscript", "unknown")
TRUNCATED_WORDS = ("truncated", "unexpected end", "not enough image data", "reached eof")


class OpenedImage(NamedTuple):
    """A decoded image, upright, with its original's size and format."""

    image_rgb: Image.Image  # after EXIF's transposition
    width: int  # as stored, before that
    height: int
    format: str  # Pillow's name: JPEG, PNG, …


class StoredImage(NamedTuple):
    """A decoded image as its file holds it; `transposition` turns it upright."""

    image_rgb: Image.Image
    size: Size  # that `image_rgb` has, or would have, had its decoder not made it smaller
    transposition: Image.Transpose | None
    width: int  # of the original
    height: int
    format: str


def open_image(data: bytes, max_pixels: int | None) -> OpenedImage:
    """Decode an image completely (an animation's first frame), upright and as RGB.

    Images of more than `max_pixels` pixels are refused by their header, before any decoding.
    Raises ImageError and nothing else.
    """
    with explained(data, max_pixels):
        stored = decode(data, max_pixels)
        image_rgb = turn(stored.image_rgb, stored.transposition)
        return OpenedImage(image_rgb, stored.width, stored.height, stored.format)


def open_stored(data: bytes, max_pixels: int | None, draft: Callable[[Size], Size]) -> StoredImage:
    """As `open_image`, not turned, and of a JPEG perhaps a half, a quarter or an eighth of its size.

    `draft` tells, of the whole image's size, the one that is large enough: libjpeg then computes no more
    than that, which is several times as fast.
    """
    with explained(data, max_pixels):
        return decode(data, max_pixels, draft)


@contextmanager
def explained(data: bytes, max_pixels: int | None) -> Iterator[None]:
    """Whatever goes wrong inside, as the ImageError that says why."""
    if not data:
        raise ImageError("empty", "the file is empty (0 bytes); copy it again")
    with PILLOW_GUARD.limit(max_pixels):
        # Decoders meet hostile and broken bytes here, and Pillow's plugins raise almost any class
        # for those (struct.error, SyntaxError, KeyError, OverflowError, MemoryError, …): to catch
        # fewer would let one bad image end a run. Nothing of our own logic is inside.
        try:
            yield
        except ImageError:
            raise
        except Exception as error:
            raise explain(error, data) from error


def decode(data: bytes, max_pixels: int | None, draft: Callable[[Size], Size] | None = None) -> StoredImage:
    with Image.open(io.BytesIO(data)) as image:
        width, height = stored_size(image)
        if max_pixels is not None and width * height > max_pixels:
            raise too_many_pixels(f"{width} x {height} pixels", max_pixels)
        if not (width and height):
            image.load()  # which says what is wrong, where it can
            raise ImageError("corrupt", "the image has no pixels; its header is damaged")
        whole = None
        if draft is not None and image.format in DRAFTED:
            whole = image.size
            image.draft("RGB", draft(whole))
        image.load()
        transposition = TRANSPOSITIONS.get(orientation(image))
        size = whole or image.size  # Pillow turns TIFFs while it loads them
        return StoredImage(as_rgb(image), size, transposition, width, height, image.format or "")


def upright_rgb(image: Image.Image) -> Image.Image:
    """The image as RGB, turned as its EXIF orientation says."""
    return turn(as_rgb(image), TRANSPOSITIONS.get(orientation(image)))


def as_rgb(image: Image.Image) -> Image.Image:
    # A copy is spared where nothing of the plug-in is left to do: one with a load() of its own may look
    # for its file again, which is closed by then.
    image.load()
    if image.mode == "RGB" and type(image).load in (Image.Image.load, ImageFile.ImageFile.load):
        return image
    return image.convert("RGB")


def turn(image: Image.Image, transposition: Image.Transpose | None) -> Image.Image:
    return image if transposition is None else image.transpose(transposition)


def stored_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) as the file has them; Pillow's TIFF reader turns them by orientation."""
    width, height = image.size
    tags = getattr(image, "tag_v2", {})
    if tags.get(ExifTags.Base.Orientation) in (5, 6, 7, 8):
        return height, width
    return width, height


def orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 (upright) where there is none or the metadata is malformed."""
    # Parsing metadata fails in as many ways as decoding does (see open_image), and an image must
    # not be lost for it.
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return 1


def explain(error: Exception, data: bytes) -> ImageError:
    """The reason behind what Pillow raised on these bytes."""
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        found = str(error).partition(" exceeds")[0]
        return too_many_pixels(found, Image.MAX_IMAGE_PIXELS)
    if isinstance(error, UnidentifiedImageError):
        return explain_unidentified(data)
    detail = " ".join(str(error).split())[:MAX_DETAIL] or type(error).__name__
    name = image_format(data) or "image"
    words = detail.lower()
    if isinstance(error, NotImplementedError) or any(word in words for word in UNSUPPORTED_WORDS):
        return ImageError("unsupported", f"{name} of a kind that cannot be decoded here: {detail}")
    cut = isinstance(error, EOFError) or any(word in words for word in TRUNCATED_WORDS)
    if cut or ends_before_pixels(data):
        return ends_early(name, detail)
    return ImageError("corrupt", f"{name} data is damaged: {detail}; restore the file or take it out")


def explain_unidentified(data: bytes) -> ImageError:
    """Why Pillow knows no format for these bytes."""
    name = image_format(data)
    if name is None:
        kind, remedy = other_kind(data) or ("of no known image format", "take it out of the input")
        return ImageError("not_an_image", f"the file appears to be {kind}; {remedy}")
    if name in CODECS and not features.check(CODECS[name]):
        return ImageError("unsupported", f"{name}, which this build of Pillow cannot decode")
    if ends_before_pixels(data):
        return ends_early(name, "it stops before the pixels")
    return ImageError("corrupt", f"begins as {name}, but its header cannot be read; restore the file")


def ends_early(name: str, detail: str) -> ImageError:
    return ImageError(
        "truncated",
        f"{name} data ends early: {detail}; the file was probably cut off while being copied",
    )


def too_many_pixels(found: str, max_pixels: int | None) -> ImageError:
    return ImageError(
        "too_many_pixels",
        f"{found}, over the limit of {max_pixels}; raise the limit if the image is wanted",
    )


class PillowGuard:
    """Pillow's process-wide switches, set while any thread decodes and restored after the last.

    Its limit of pixels catches the images inside of images (icons, tiles) that no header
    announces; its other warnings are silenced. Python's warning filters are shared by all
    threads, so each thread saving and restoring them by itself would undo another's.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.num_inside = 0
        self.restore = ExitStack()

    @contextmanager
    def limit(self, max_pixels: int | None) -> Iterator[None]:
        with self.lock:
            if self.num_inside == 0:
                self.enter()
            self.num_inside += 1
            Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            yield
        finally:
            with self.lock:
                self.num_inside -= 1
                if self.num_inside == 0:
                    self.restore.close()

    def enter(self) -> None:
        self.restore.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
        self.restore.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module=r"PIL\b")
        warnings.simplefilter("error", Image.DecompressionBombWarning)


PILLOW_GUARD = PillowGuard()


def silence_decoders() -> None:
    """Keep what decoders say about bad images off the terminal: it is in our ImageError.

    Pillow logs an error about some TIFFs, which would get there through logging's last resort, and
    libtiff prints by itself unless it is told not to. Where that library cannot be reached, its
    lines stay.
    """
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    try:
        set_handler = ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler
    except (OSError, AttributeError, TypeError):
        return
    set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
    set_handler(None)


silence_decoders()
