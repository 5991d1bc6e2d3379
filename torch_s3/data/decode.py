"""Bytes to images."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
import torchvision.io
from PIL import Image

from torch_s3 import errors

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")


def decode_image(data: Any, uri: str) -> torch.Tensor:
    """Decode a JPEG, PNG, GIF or WEBP with torchvision, and what that can't decode (BMP, TIFF, PNM …) with Pillow.

    Args:
        data: The file's bytes, any buffer.
        uri: Where they are from, for the error.

    Returns:
        uint8 (3, H, W), RGB; an animation's first frame.

    Raises:
        DecodeError: They are no image.
    """
    image: torch.Tensor
    try:
        image = torchvision.io.decode_image(
            torch.frombuffer(data if isinstance(data, memoryview) else bytearray(data), dtype=torch.uint8),
            mode=torchvision.io.ImageReadMode.RGB,
        )
    except (RuntimeError, ValueError):
        return _with_pillow(data, uri)
    if image.ndim == 4:
        image = image[0]
    if image.dtype == torch.uint16:
        image = image.to(torch.int32) >> 8
    return image.to(torch.uint8)


def _with_pillow(data: Any, uri: str) -> torch.Tensor:
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels: torch.Tensor = torch.from_numpy(np.array(image.convert("RGB")))
            return pixels.permute(2, 0, 1).contiguous()
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise whatever they hit: struct.error, SyntaxError, ValueError …
        start = bytes(memoryview(data)[:8])
        message = f"not an image that can be decoded: {len(data)} bytes, starting {start!r} ({error})"
        raise errors.DecodeError(message, uri=uri) from None
