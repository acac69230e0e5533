"""What bytes appear to be, by how they begin.

What enters: the bytes of a file. What leaves: a name for people and, where it is no image that can
be decoded here, what to do. It must not know decoders.
"""

import re
import struct

IMAGE_PREFIXES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG", "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"\0\0\1\0", "ICO"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"8BPS", "PSD"),
)
CONVERT = "convert it to JPEG or PNG first"
TAKE_OUT = "take it out of the input"
OTHER_PREFIXES = (
    (b"\xff\x0a", "a JPEG XL image", CONVERT),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image", CONVERT),
    (b"%PDF-", "a PDF document", "render its pages as PNG first"),
    (b"\x1a\x45\xdf\xa3", "a Matroska or WebM video", "extract its frames first"),
    (b"PK\3\4", "a ZIP archive", "unpack it first"),
    (b"\x1f\x8b", "gzip-compressed data", "decompress it first"),
)
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
AVIF_BRANDS = {b"avif", b"avis"}
HEAD_BYTES = 1024  # where a text format must show itself
HTML = re.compile(rb"<(!doctype\s+html|html|head|body)\b", re.IGNORECASE)
SVG = re.compile(rb"<svg[\s>]", re.IGNORECASE)


def image_format(data: bytes) -> str | None:
    """The format that the first bytes promise, of those that Pillow can decode."""
    for prefix, name in IMAGE_PREFIXES:
        if data.startswith(prefix):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if data[4:8] == b"ftyp" and data[8:12] in AVIF_BRANDS:
        return "AVIF"
    return None


def other_kind(data: bytes) -> tuple[str, str] | None:
    """What the bytes are instead of an image that can be decoded here, and the remedy."""
    for prefix, name, remedy in OTHER_PREFIXES:
        if data.startswith(prefix):
            return name, remedy
    if data[4:8] == b"ftyp":
        if data[8:12] in HEIF_BRANDS:
            return "a HEIC/HEIF image", CONVERT
        return "an MP4 or QuickTime video", "extract its frames first"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "an AVI video", "extract its frames first"
    head = data[:HEAD_BYTES]
    if SVG.search(head):
        return "an SVG drawing", "render it as PNG first"
    if HTML.search(head):
        return "an HTML page", f"the download probably failed; fetch it again, or {TAKE_OUT}"
    if not data.strip(b"\0"):
        return "nothing but zero bytes", "the copy probably failed; copy it again"
    if is_text(head):
        return "text", TAKE_OUT
    return None


def ends_before_pixels(data: bytes) -> bool:
    """Whether a JPEG, PNG or WebP visibly stops before its pixels do (others: False)."""
    match image_format(data):
        case "JPEG":
            return b"\xff\xda" not in data
        case "PNG":
            return b"IDAT" not in data
        case "WebP":
            return len(data) < 12 or struct.unpack_from("<I", data, 4)[0] + 8 > len(data)
    return False


def is_text(head: bytes) -> bool:
    """Whether these are printable characters in UTF-8 (the last may be cut)."""
    text = head.decode("utf-8", errors="ignore")
    return len(text.encode()) > len(head) - 4 and all(c.isprintable() or c.isspace() for c in text)
