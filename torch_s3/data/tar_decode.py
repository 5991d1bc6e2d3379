"""From the bytes of a sample's members to values, by their extensions."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from torch_s3 import errors
from torch_s3.data.decode import MAX_PIXELS, SUFFIXES, decode_image, formats

Decode = bool | str | Callable[[dict[str, Any]], Any] | Mapping[str, Callable[[bytes], Any] | None]
"""What :func:`decode` takes for ``how``."""

IMAGES = ("rgb", "l", "pil")
_IMAGES = frozenset(suffix[1:] for suffix in SUFFIXES)
_CODE = ("pyd", "pickle", "pkl")
_MOST = 1 << 32  # bytes of an .npz's arrays


def check(how: Any) -> None:
    """Refuse what can't be meant.

    Raises:
        ValueError: It is no way to decode.
    """
    if isinstance(how, Mapping):
        for extension, handler in how.items():
            if handler is not None and not callable(handler):
                raise ValueError(f"decode: {extension!r} maps to {handler!r}, which can't be called")
            if extension != extension.lower().lstrip("."):
                raise ValueError(f"decode: {extension!r}: extensions are in lower case, without the dot before")
    elif not (isinstance(how, bool) or how in IMAGES or callable(how)):
        raise ValueError(f"decode={how!r}: use True, False, 'rgb', 'l', 'pil', a callable, or extension → callable")


def decode(sample: dict[str, Any], how: Decode = True) -> Any:
    """The values of a sample. What isn't decoded becomes ``bytes``, so that nothing keeps the shard in memory.

    By extension, of which the last part counts (``seg.png`` is a png): images → uint8 tensors (3, H, W); ``cls`` (and
    ``class count id idx index``) → int; ``txt`` (and ``text``) → str; ``json``; ``npy``, ``npz`` → arrays;
    ``pt``, ``pth`` → what ``torch.load(weights_only=True)`` makes of it.

    Args:
        sample: As :func:`~torch_s3.data.tar.sample` gives it.
        how: ``True`` or ``"rgb"``: as above; ``"l"``: images as (1, H, W), gray; ``"pil"``: as ``PIL.Image``;
            ``False``: nothing; a callable: called with the sample of bytes, its result taken; a mapping: extension →
            callable of bytes, ``None`` to leave bytes, the rest as above.

    Raises:
        DecodeError: A member is not what its extension says, or is a pickle, which may run any code.
    """
    if how is False or (callable(how) and not isinstance(how, Mapping)):
        whole = {name: bytes(value) if isinstance(value, memoryview) else value for name, value in sample.items()}
        return how(whole) if callable(how) else whole
    handlers: Mapping[str, Any] = how if isinstance(how, Mapping) else {}
    images = how if isinstance(how, str) else "rgb"
    decoded: dict[str, Any] = {}
    for name, value in sample.items():
        if not isinstance(value, memoryview):
            decoded[name] = value
            continue
        last = name.rpartition(".")[2]
        where = f"{sample['__key__']!r}, {name!r}"
        chosen = name if name in handlers else last
        if chosen in handlers:
            handler = handlers[chosen]
            try:
                decoded[name] = bytes(value) if handler is None else handler(bytes(value))
            except Exception as error:
                error.add_note(f"while decoding {where} of {sample['__url__']}")
                raise
            continue
        if last in _CODE:
            message = f"{where} is a pickle, which may run any code: decode={{{last!r}: pickle.loads}} if you trust it"
            raise errors.DecodeError(message, uri=sample["__url__"])
        try:
            decoded[name] = _decoded(value, last, images, sample["__url__"])
        except errors.DecodeError as error:
            raise errors.DecodeError(f"{where}: {str(error).partition(': ')[2]}", uri=sample["__url__"]) from None
        except Exception as error:  # noqa: BLE001 - numpy, json and torch raise whatever they hit
            message = f"{where} can't be decoded: {type(error).__name__}: {error}"
            raise errors.DecodeError(message, uri=sample["__url__"]) from None
    return decoded


def _decoded(data: memoryview, extension: str, images: str, uri: str) -> Any:
    if extension in _IMAGES:
        return _image(data, images, uri)
    if extension in ("cls", "class", "count", "id", "idx", "index"):
        return int(bytes(data))
    if extension in ("txt", "text"):
        return str(data, "utf-8")
    if extension == "json":
        return json.loads(bytes(data))
    if extension == "npy":
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    if extension == "npz":
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            size = sum(info.file_size for info in file.infolist())
        if size > _MOST:
            raise ValueError(f"it says that its arrays have {size} bytes")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return dict(arrays)
    if extension in ("pt", "pth"):
        return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    return bytes(data)


def _image(data: memoryview, how: str, uri: str) -> Any:
    if how != "pil":
        return decode_image(data, uri, mode="GRAY" if how == "l" else "RGB")
    image = Image.open(io.BytesIO(data), formats=formats())
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"it says that it has {image.width} x {image.height} pixels")
    image.load()
    return image
