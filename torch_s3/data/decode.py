"""Bytes to images."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import struct
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode

from torch_s3 import errors

try:
    import simplejpeg
except ImportError:  # torchvision does it too
    simplejpeg = None

SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".ppm",
    ".bmp",
    ".pgm",
    ".tif",
    ".tiff",
    ".webp",
    ".gif",
    ".avif",
    ".heic",
    ".heif",
)
MAX_PIXELS = 89_478_485
"""The most that an image may have: Pillow's own limit, 256 MB as RGB."""

MODES = {"RGB": ImageReadMode.RGB.value, "GRAY": ImageReadMode.GRAY.value}
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF", "HEIF")  # others, EPS for one, run programs
_ORIENTATION = 0x0112
_MARKER = re.compile(rb"\xff[\x01-\xfe]")
_TURNS: dict[int, tuple[bool, tuple[int, ...]]] = {  # EXIF's orientation → whether rows become columns, what is flipped
    2: (False, (-1,)),
    3: (False, (-2, -1)),
    4: (False, (-2,)),
    5: (True, ()),
    6: (True, (-1,)),
    7: (True, (-2, -1)),
    8: (True, (-2,)),
}
# libjpeg goes on after these, and fills what is lost with gray. What else it warns of costs no pixels.
_LOSSES = ("remature end", "bad Huffman code", "bad arithmetic code", "instead of RST")


def decode_image(data: Any, uri: str, *, mode: str = "RGB", max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Decode an image: JPEG with libjpeg-turbo, all other formats with Pillow.

    Turned upright as its EXIF orientation says. Alpha is dropped; of 16 bits, the upper eight are kept; of an
    animation, the first frame. JPEG is decoded by simplejpeg where that is installed, else by torchvision, to the same
    pixels; a file that is cut off is an error either way, and with simplejpeg one that is damaged where libjpeg
    notices, too. Not PNG with torchvision, whose decoder (0.29) ends the process with a segmentation fault at some
    damaged files. Releases the GIL while it decodes.

    Args:
        data: The file's bytes, any buffer.
        uri: Where they are from, for the error.
        mode: ``"RGB"`` or ``"GRAY"``.
        max_pixels: Of an image that says that it has more, nothing is decoded.

    Returns:
        uint8 (3, H, W), or (1, H, W) with ``"GRAY"``; of any strides.

    Raises:
        DecodeError: They are no image, or too large a one.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: use 'RGB' or 'GRAY'")
    view = memoryview(data)
    if bytes(view[:3]) == b"\xff\xd8\xff":
        return _decode_jpeg(view, uri, mode, max_pixels)
    return _with_pillow(view, uri, mode, max_pixels)


def _decode_jpeg(view: memoryview, uri: str, mode: str, max_pixels: int) -> torch.Tensor:
    frame = _jpeg_frame(view)
    if frame is None:
        raise _undecodable(view, uri, "a JPEG without a frame")
    _check_size(frame.width, frame.height, uri, max_pixels)
    if simplejpeg is not None and frame.components in (1, 3):
        try:
            pixels = simplejpeg.decode_jpeg(view, mode, fastdct=False, fastupsample=False)
        except ValueError as error:
            if any(words in str(error) for words in _LOSSES):
                raise _undecodable(view, uri, str(error)) from None
        else:
            return _turned(torch.from_numpy(pixels).permute(2, 0, 1), frame.orientation)
    encoded = torch.frombuffer(bytearray(view) if view.readonly else view, dtype=torch.uint8)
    try:
        # What torchvision.io.decode_jpeg calls, which warns at each image that torchcodec will replace it.
        image: torch.Tensor = torch.ops.image.decode_jpeg(encoded, MODES[mode], False)
    except RuntimeError:
        return _with_pillow(view, uri, mode, max_pixels)  # which reads some that torchvision doesn't
    return _turned(image, frame.orientation)


def _with_pillow(view: memoryview, uri: str, mode: str, max_pixels: int) -> torch.Tensor:
    try:
        with Image.open(io.BytesIO(view), formats=formats()) as image:
            _check_size(*image.size, uri, max_pixels)
            image.load()
            orientation = 1
            with contextlib.suppress(Exception):  # what is wrong there is not wrong with the pixels
                orientation = int(image.getexif().get(_ORIENTATION, 1))
            return _turned(_pixels(image, mode), orientation)
    except errors.DecodeError:
        raise
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise whatever they hit: struct.error, SyntaxError …
        reason = str(error).partition(" <_io.")[0]
        if bytes(view[4:8]) == b"ftyp" and "HEIF" not in formats():
            reason += "; HEIC is read where pillow-heif is installed"
        raise _undecodable(view, uri, reason) from None


def _pixels(image: Image.Image, mode: str) -> torch.Tensor:
    if image.mode.startswith("I;16"):  # gray of 16 bits, which convert() would clip
        gray = torch.from_numpy((np.asarray(image) >> 8).astype(np.uint8))
        return gray.repeat(3 if mode == "RGB" else 1, 1, 1)
    # A palette's way to RGB is by RGBA where it has transparent colours: without it, Pillow warns.
    opaque = image.convert("RGBA") if "transparency" in image.info else image
    if mode == "RGB":
        return torch.from_numpy(np.array(opaque.convert("RGB"))).permute(2, 0, 1)
    return torch.from_numpy(np.array(opaque.convert("L")))[None]


def _turned(image: torch.Tensor, orientation: int) -> torch.Tensor:
    """Upright, from what EXIF says of it (CIPA DC-008, "Orientation")."""
    transposed, flipped = _TURNS.get(orientation, (False, ()))
    image = image.transpose(-2, -1) if transposed else image
    return image.flip(flipped) if flipped else image


class _Frame(NamedTuple):
    width: int
    height: int
    components: int
    orientation: int


def _jpeg_frame(view: memoryview) -> _Frame | None:
    """What a JPEG's head says, ``None`` where it doesn't come to it; a few microseconds (ITU-T T.81, annex B)."""
    at, orientation = 2, 1
    try:
        while True:
            found = _MARKER.search(view, at)  # past fill bytes, and what does not belong there
            if found is None:
                return None
            at = found.start()
            marker, length = view[at + 1], view[at + 2] << 8 | view[at + 3]
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                height, width, components = struct.unpack_from(">HHB", view, at + 5)
                return _Frame(width, height, components, orientation)
            if marker == 0xE1 and bytes(view[at + 4 : at + 10]) == b"Exif\0\0":
                orientation = _exif_orientation(view[at + 10 : at + 2 + length])
            at += 2 + length
    except (IndexError, struct.error):
        return None


def _exif_orientation(tiff: memoryview) -> int:
    """The orientation in EXIF data, 1 (upright) where it says none (CIPA DC-008, TIFF 6.0)."""
    order = "<" if bytes(tiff[:2]) == b"II" else ">"
    try:
        (at,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", tiff, entry)
            if tag == _ORIENTATION:
                return int(value)
    except struct.error:
        pass
    return 1


def _check_size(width: int, height: int, uri: str, max_pixels: int) -> None:
    if width * height > max_pixels:
        message = f"it says that it has {width} x {height} pixels; raise max_pixels={max_pixels} if that is right"
        raise errors.DecodeError(message, uri=uri)


def _undecodable(view: memoryview, uri: str, reason: str) -> errors.DecodeError:
    message = f"not an image that can be decoded: {len(view)} bytes, starting {bytes(view[:8])!r} ({reason})"
    return errors.DecodeError(message, uri=uri)


@functools.cache
def formats() -> list[str]:
    """Those that Pillow reads here."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]
