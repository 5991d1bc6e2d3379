"""What is fed to a TensorFlow graph: arrays of its tensors' types, of which nothing is lost on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_s3 import errors

_NUMBERS = "biufcV"  # numpy's kinds; V has bfloat16, and float8


def fed(tensor: Any, value: Any, *, is_text: bool, uri: str | None) -> Any:
    """A value as an array of a tensor's type and shape. Rounding to a shorter float loses nothing that counts.

    Raises:
        TypeError: It is no array.
        ArtifactMismatch: It has another shape, or values that the type hasn't.
    """
    try:
        given = np.asarray(value, object if is_text and not isinstance(value, np.ndarray) else None)
    except Exception as error:
        raise TypeError(f"inputs: {tensor.name} takes an array, not {value!r:.100}") from error
    if not tensor.shape.is_compatible_with(given.shape):
        message = f"{tensor.name} has shape {tensor.shape}, its input {given.shape}"
        raise errors.ArtifactMismatch(message, uri=uri)
    if is_text:
        lost = [each for each in given.flat if not isinstance(each, str | bytes)]
    else:
        given, lost = _converted(given, np.dtype(tensor.dtype.as_numpy_dtype))
    if lost:
        message = f"{tensor.name} is of {tensor.dtype.name}, which its input {lost[0]!r:.100} doesn't fit: convert it"
        raise errors.ArtifactMismatch(message, uri=uri)
    return given


def _converted(given: NDArray[Any], kind: np.dtype[Any]) -> tuple[Any, list[Any]]:
    """An array of another type, and what that cannot hold of it."""
    if given.dtype.hasobject and not kind.hasobject:
        given = np.asarray(given.tolist())  # numbers, perhaps
    if np.can_cast(given.dtype, kind, "safe"):
        return given.astype(kind, copy=False), []
    if given.dtype.kind not in _NUMBERS or kind.kind not in _NUMBERS:
        return given, given.ravel()[:1].tolist()
    real, is_lost = given, np.False_
    if given.dtype.kind == "c" and kind.kind != "c":
        real, is_lost = given.real, given.imag != 0
    with np.errstate(all="ignore"):
        found = real.astype(kind)
        is_lost = is_lost | (found != real if kind.kind in "biu" else ~np.isfinite(found) & np.isfinite(real))
    return found, given[is_lost].tolist()
