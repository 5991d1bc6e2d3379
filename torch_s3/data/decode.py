"""Bytes to images."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode

from torch_s3 import errors

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")


def decode_image(data: Any, uri: str) -> torch.Tensor:
    """Decode an image: JPEG and WEBP with torchvision, PNG and all other formats with Pillow.

    Not PNG with torchvision, whose decoder (0.29) ends the process with a segmentation fault at some damaged files.

    Args:
        data: The file's bytes, any buffer.
        uri: Where they are from, for the error.

    Returns:
        uint8 (3, H, W), RGB, of any strides; an animation's first frame.

    Raises:
        DecodeError: They are no image.
    """
    view = memoryview(data)
    start = bytes(view[:12])
    if start.startswith(b"\xff\xd8\xff") or (start[:4] == b"RIFF" and start[8:] == b"WEBP"):
        encoded = torch.frombuffer(bytearray(data) if view.readonly else data, dtype=torch.uint8)
        try:
            # What torchvision.io.decode_image calls, which warns at each image that torchcodec will replace it.
            image: torch.Tensor = torch.ops.image.decode_image(encoded, ImageReadMode.RGB.value, False)
        except RuntimeError:
            pass  # Pillow reads some that torchvision doesn't
        else:
            return image[0].clone() if image.ndim == 4 else image
    return _with_pillow(view, uri)


def _with_pillow(view: memoryview, uri: str) -> torch.Tensor:
    try:
        with Image.open(io.BytesIO(view)) as image:
            if image.mode.startswith("I;16"):  # gray of 16 bits, which convert() would clip
                return torch.from_numpy((np.asarray(image) >> 8).astype(np.uint8)).repeat(3, 1, 1)
            # A palette's way to RGB is by RGBA where it has transparent colours: without it, Pillow warns.
            opaque = image.convert("RGBA") if "transparency" in image.info else image
            return torch.from_numpy(np.array(opaque.convert("RGB"))).permute(2, 0, 1)
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise whatever they hit: struct.error, SyntaxError …
        reason = str(error).partition(" <_io.")[0]
        message = f"not an image that can be decoded: {len(view)} bytes, starting {bytes(view[:8])!r} ({reason})"
        raise errors.DecodeError(message, uri=uri) from None
