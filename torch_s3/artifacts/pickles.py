"""Pickles and joblib's files, unpickled so that nothing comes into being that is not trusted."""

from __future__ import annotations

import functools
import math
import pickle
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from torch_s3 import errors
from torch_s3.artifacts import follow
from torch_s3.artifacts.source import MemoryFile
from torch_s3.artifacts.trust import Trust
from torch_s3.wording import brief

_IN_PLACE = 0.9  # the part of the memory that holds them that arrays must take, so as to stay in it
_SMALL = 64 * 1024  # bytes of an array that is copied out of it in any case
_Found = Mapping[tuple[str, str], Any]


def load(pickled: memoryview, trust: Trust, *, uri: str) -> Any:
    """Unpickle what pickle or joblib has written, once all that it asks for is known to be trusted.

    Large arrays of joblib's files stay where they are, if those are most of what is there: ``pickled`` must be writable
    and nobody else's.

    Raises:
        UnsafeArtifact: It asks for what isn't trusted. Nothing was built, and nothing imported.
        ArtifactError: It is truncated or damaged, or no pickle; or what it asks for isn't installed.
    """
    outline, found = checked(pickled, trust, uri=uri)
    with built(uri):
        if any(name.full == follow.WRAPPER for name in outline.names.values()):
            in_place = outline.array_bytes >= _IN_PLACE * memoryview(pickled.obj).nbytes
            return _joblib_unpickler()(MemoryFile(pickled), found, in_place=in_place).load()
        return Unpickler(MemoryFile(pickled), found).load()


@contextmanager
def built(uri: str) -> Iterator[None]:
    """Turn what goes wrong in the block, where objects are made, into an error that names ``uri``.

    Raises:
        ArtifactError: Something did.
    """
    try:
        yield
    except (errors.S3Error, MemoryError, Warning):
        raise
    except Exception as error:
        reason = brief(f"{type(error).__name__}: {error}", 300)
        raise errors.ArtifactError(f"damaged, or of another version: it cannot be built ({reason})", uri=uri) from error


def checked(pickled: memoryview, trust: Trust, *, uri: str) -> tuple[follow.Outline, _Found]:
    """What a pickle asks for, and what that is.

    Raises:
        UnsafeArtifact: It isn't trusted.
        ArtifactError: See :func:`load`.
    """
    if not len(pickled):
        raise errors.ArtifactError("it is empty", uri=uri)
    try:
        outline = follow.outline(pickled, is_free=trust.is_free)
    except EOFError:
        raise errors.ArtifactError(f"truncated: its pickle goes on after its {len(pickled)} bytes", uri=uri) from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, struct.error) as error:
        reason = brief(error)
        raise errors.ArtifactError(f"damaged, or no pickle: it cannot be followed ({reason})", uri=uri) from None
    names = list(outline.names.values())
    trust.check((name.full for name in names), uri=uri)
    if outline.refused is not None:
        asked = sorted({name.full for name in names})
        raise errors.UnsafeArtifact(f"{outline.refused}: nothing was built", uri=uri, asks_for=asked)
    return outline, trust.resolved(names, uri=uri)


class Unpickler(pickle.Unpickler):
    """pickle's, of names that were looked up before.

    Args:
        file: What it reads.
        found: What the names are.
    """

    def __init__(self, file: MemoryFile, found: _Found) -> None:
        super().__init__(file)
        self._found = found

    def find_class(self, module: str, name: str) -> Any:
        """What was found, and nothing else."""
        return looked_up(self._found, module, name)


def looked_up(found: _Found, module: str, name: str) -> Any:
    """What a name is.

    Raises:
        UnsafeArtifact: It was not found while the pickle was followed.
    """
    if (module, name) not in found:
        asked = f"{module}.{name}"
        raise errors.UnsafeArtifact(f"it asks for {asked!r:.200} where nothing said so", asks_for=[asked])
    return found[module, name]


@functools.cache
def _joblib_unpickler() -> Any:
    """A subclass of joblib's, which need not be installed."""
    from joblib.numpy_pickle import NumpyArrayWrapper, NumpyUnpickler

    class Wrapper(NumpyArrayWrapper):  # type: ignore[misc]  # joblib has no types
        def read(self, unpickler: Any, *_: Any) -> Any:
            return unpickler.array(self)

    class JoblibUnpickler(NumpyUnpickler):  # type: ignore[misc]  # ditto
        def __init__(self, file: MemoryFile, found: _Found, *, in_place: bool) -> None:
            super().__init__("", file, ensure_native_byte_order=True)
            self._found, self._in_place = found, in_place

        def find_class(self, module: str, name: str) -> Any:
            result = looked_up(self._found, module, name)
            return Wrapper if result is NumpyArrayWrapper else result

        def array(self, wrapper: Any) -> Any:
            """The array whose bytes come next."""
            file, dtype, shape, order = self.file_handle, wrapper.dtype, wrapper.shape, wrapper.order
            if dtype.hasobject:
                return Unpickler(file, self._found).load()
            if wrapper.safe_get_numpy_array_alignment_bytes() is not None:
                file.view(file.view(1)[0])
            memory = file.view(math.prod(shape) * dtype.itemsize)
            if not memory:
                return np.empty(shape, dtype, order)
            array: Any = np.ndarray(shape, dtype, memory, order=order)
            if not self._in_place or array.nbytes < _SMALL or not array.flags.aligned:
                array = array.copy(order="K")
            return array if dtype.isnative else array.astype(dtype.newbyteorder("="))

    return JoblibUnpickler
