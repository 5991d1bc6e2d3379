"""What pickles may ask for without being trusted: containers, numbers, and numpy's arrays, with arguments that can do
no more than make those. Pure.

Functions that look harmless do harm with other arguments: ``list(range(10**12))`` takes all memory, so does
``bytearray(10**12)``, a dtype whose fields lie outside of its items reads memory that isn't its own, and numpy's
``memmap`` makes files. So each is judged together with what it is called with, as
:mod:`~torch_s3.artifacts.follow` finds it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from torch_s3.artifacts.stand_ins import Dict, List, Name, Refused

_KIND = re.compile(r"[<>=|]?[?bhilqpBHILQPefdgFDGSUVOMmacu]\d{0,9}(\[\w*\])?")
_EMPTY_SHAPE = (0,)
_WRAPPED = {"subclass", "shape", "order", "dtype", "allow_mmap", "numpy_array_alignment_bytes"}
_ALIGNED = 0x80  # numpy's flag of a struct with padding


class Made:
    """What a call has made.

    Pickle puts in a list's items, then a dict's, then sets the state, each once. What has a dict's items or a state may
    have methods of those names, which are called with whatever comes: so nothing is done in another order.
    """

    __slots__ = ("function", "has_items", "is_set")

    def __init__(self, function: Name) -> None:
        self.function, self.is_set = function, False
        self.has_items = function.full == "copyreg._reconstructor"

    def add(self, *, keys: bool) -> None:
        """Put in items, those of a dict where there are ``keys``.

        Raises:
            Refused: They come too late.
        """
        if self.is_set or (self.has_items and not keys):
            raise Refused(f"it adds to what {self.function.full} made when that is set")
        self.has_items |= keys

    def set(self, state: Any) -> None:
        """Judge what is set.

        Raises:
            Refused: It was set before, or an array isn't what it says: numpy takes memory before it looks; or a random
                generator goes on beyond its numbers, where numpy doesn't look at all.
        """
        if self.is_set:
            raise Refused(f"it sets what {self.function.full} made twice")
        self.is_set = True
        if self.function.full in _EMPTY_ARRAYS and not _is_array_state(state):
            raise Refused("it makes an array that isn't what it says")
        if self.function.full in _RANDOM and not _is_random_state(state):
            raise Refused("it makes a random generator of no such state")


class Dtype:
    """A dtype, as it stands."""

    __slots__ = ("is_set", "it")

    def __init__(self, it: np.dtype[Any]) -> None:
        self.it, self.is_set = it, False

    def set(self, state: Any) -> None:
        """Do what ``dtype.__setstate__`` does, for what numpy's own dtypes have. Once, before anything uses it.

        numpy believes what it is told of sizes, offsets and flags: so they must be those of a dtype that numpy's
        constructor makes, which doesn't.

        Raises:
            Refused: There is no dtype of such a state.
        """
        match state:
            case (3 | 4, str(order), subarray, names, fields, int(size), int(), int(flags), *_) if not self.is_set:
                pass
            case _:
                raise Refused("it makes a dtype of no such state")
        try:
            now = self._with(order, subarray, names, fields, size)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            raise Refused(f"it makes a dtype that there cannot be ({error})") from None
        if size not in (-1, self.it.itemsize) or now.itemsize != self.it.itemsize or (flags ^ now.flags) & ~_ALIGNED:
            raise Refused("it makes a dtype that isn't what it says")
        self.it, self.is_set = now, True

    def _with(self, order: Any, subarray: Any, names: Any, fields: Any, size: int) -> np.dtype[Any]:
        if subarray is not None:
            base, shape = subarray
            cells: np.dtype[Any] = np.dtype((base.it, _ints(shape)))
            return cells
        if names is not None:
            if not fields.whole or set(names) != set(fields.entries):
                raise ValueError("its fields have other names")
            parts = [fields.entries[name] for name in names]
            formats, offsets = [part[0].it for part in parts], [part[1] for part in parts]
            if min(offsets, default=0) < 0:
                raise ValueError("a field lies before it")
            description: Any = {"names": list(names), "formats": formats, "offsets": offsets, "itemsize": size}
            struct: np.dtype[Any] = np.dtype(description)
            fields.is_fixed = True
            return struct
        if fields is not None:
            raise ValueError("its fields have no names")
        swapped: np.dtype[Any] = self.it.newbyteorder(order) if order in ("<", ">", "=") else self.it
        return swapped


@dataclass(frozen=True, slots=True)
class Wrapper:
    """What stands in joblib's files before the bytes of an array.

    Attributes:
        dtype: Of the array.
        nbytes: Its bytes.
        padded: A byte comes first that says how many follow before the array's.
    """

    dtype: np.dtype[Any]
    nbytes: int
    padded: bool

    @classmethod
    def of(cls, state: Any) -> Self:
        """Out of the state of joblib's own."""
        entries = state.entries if isinstance(state, Dict) and state.whole else {}
        if not set(entries) <= _WRAPPED:  # others would take the place of its methods
            entries = {}
        match entries:
            case {"subclass": Name(full=kind), "shape": tuple(shape), "order": "C" | "F", "dtype": Dtype(it=dtype)}:
                alignment = entries.get("numpy_array_alignment_bytes")
                count = math.prod(_ints(shape))
                if kind in _ARRAYS and count < 2**62 and (alignment is None or type(alignment) is int):
                    return cls(dtype, count * dtype.itemsize, alignment is not None)
        raise Refused("it holds an array of no such kind")


def _ints(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, tuple) or not all(type(size) is int and 0 <= size < 2**62 for size in shape):
        raise Refused("an array has no such shape")
    return shape


# ---------------------------------------------------------------------- calls


def made(function: Name, arguments: tuple[Any, ...]) -> Any:
    """What a call makes.

    Raises:
        Refused: It isn't to be called, or not with that.
    """
    judge = _CALLS.get(function.full)
    try:
        result = judge is not None and judge(*arguments)
    except TypeError:  # not with so many
        result = False
    if result is False:
        words = "calls" if judge is None else "calls with what it is not to be given"
        raise Refused(f"it {words}: {function.full}")
    return Made(function) if result is True else result


def is_data(full: str) -> bool:
    """Whether a name may be asked for by anybody."""
    return full in _CALLS or full in _MENTIONED or bool(_SCALAR_TYPE.fullmatch(full))


def _is_bytes(value: Any) -> bool:
    return isinstance(value, memoryview)


def _is_array_state(state: Any) -> bool:
    match state:
        case (int(), tuple(shape), Dtype(it=dtype), _, content, *_):
            count = math.prod(_ints(shape))
            if dtype.hasobject:
                return isinstance(content, List) and content.count == count
            return isinstance(content, memoryview | str) and len(content) == count * dtype.itemsize
    return False


def _is_random_state(state: Any) -> bool:
    match state:
        case (Dict() as state, Made() | None):  # with the seeds
            pass
        case (_, _, position, *_):  # of numpy before 1.17
            return position in _POSITIONS
    match state:
        case Dict(whole=True, entries={"state": Dict(whole=True, entries=inner), **outer}):
            return inner.get("pos", 0) in _POSITIONS and outer.get("buffer_pos", 0) in _BUFFERED
    return False


def _items(items: Any = ()) -> bool:
    return isinstance(items, tuple | List)


def _counts(counts: Any = None) -> bool:
    return counts is None or isinstance(counts, Dict)


def _bytes(*arguments: Any) -> Any:
    match arguments:
        case ():  # as protocols up to 2 write those of an empty array
            return memoryview(b"")
        case (memoryview() | List(),) | (str(), "latin-1" | "latin1" | "utf-8"):
            return True
    return False


def _latin(text: Any, encoding: Any) -> Any:
    """How protocols up to 2 write bytes."""
    return isinstance(text, str) and encoding in ("latin1", "latin-1") and memoryview(text.encode("latin-1"))


def _plain(*arguments: Any) -> bool:
    return all(value is None or isinstance(value, int | float | str | memoryview) for value in arguments)


def _numbers(*arguments: Any) -> bool:
    return all(value is None or isinstance(value, int | float) for value in arguments)


def _reconstructed(kind: Any, base: Any, state: Any) -> bool:
    """Which calls the base with the state, and ``str`` of a list takes more than all memory."""
    if not isinstance(kind, Name) or not isinstance(base, Name) or (is_data(kind.full) and kind.full != _OBJECT):
        return False
    return base.full in _BASES and isinstance(state, _BASES[base.full])


def _deque(items: Any = (), most: Any = None) -> bool:
    return _items(items) and _numbers(most)


def _factory(factory: Any = None) -> bool:
    return factory is None or isinstance(factory, Name)


def _empty_array(kind: Any, shape: Any, code: Any) -> bool:
    return _is_array(kind) and shape == _EMPTY_SHAPE and (code == "b" or (_is_bytes(code) and code == b"b"))


def _empty_masked(kind: Any, base: Any, shape: Any, code: Any) -> bool:
    return isinstance(kind, Name) and kind.full in _MASKED and _empty_array(base, shape, code)


def _is_array(kind: Any) -> bool:
    return isinstance(kind, Name) and kind.full in _ARRAYS


def _dtype(kind: Any, align: Any, copy: Any) -> Any:
    if type(kind) is not str or not _KIND.fullmatch(kind) or align not in (0, 1) or copy != 1:  # or it is numpy's own
        return False
    try:
        return Dtype(np.dtype(kind))
    except (TypeError, ValueError):
        return False


def _scalar(dtype: Any, content: Any = None) -> bool:
    return isinstance(dtype, Dtype) and not dtype.it.hasobject and _is_bytes(content)


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> bool:
    whole = _is_bytes(content) and isinstance(dtype, Dtype) and not dtype.it.hasobject and isinstance(shape, tuple)
    return whole and isinstance(order, str | None) and (axes is None or isinstance(axes, tuple))


def _bit_generator(kind: Any = "MT19937") -> bool:
    return isinstance(kind, str) or (isinstance(kind, Name) and kind.full in _BIT_GENERATORS)


def _random(kind: Any = "MT19937", maker: Any = None) -> bool:
    made_so = isinstance(kind, Made) and kind.function.full == _MAKER
    return (isinstance(kind, str) or made_so) and (maker is None or (isinstance(maker, Name) and maker.full == _MAKER))


def _seeds(kind: Any, checksum: Any, _state: Any) -> bool:
    return isinstance(kind, Name) and kind.full == _SEEDS and type(checksum) is int


HASHING = ("builtins.set", "builtins.frozenset", "collections.OrderedDict")
"""What hashes the items that it is given."""
_MAKER = "numpy.random._pickle.__bit_generator_ctor"
_SEEDS = "numpy.random.bit_generator.SeedSequence"
_ARRAYS = {
    "numpy.ndarray",
    "numpy.matrix",
    "numpy.matrixlib.defmatrix.matrix",
    "numpy.memmap",
    "numpy.core.memmap.memmap",
}
_MASKED = {"numpy.ma.MaskedArray", "numpy.ma.core.MaskedArray"}
_POSITIONS = range(624 + 1)  # of MT19937
_BUFFERED = range(4 + 1)  # of Philox
_BIT_GENERATORS = {
    "numpy.random._mt19937.MT19937",
    "numpy.random._pcg64.PCG64",
    "numpy.random._pcg64.PCG64DXSM",
    "numpy.random._philox.Philox",
    "numpy.random._sfc64.SFC64",
}
_OBJECT = "builtins.object"
_BASES: Mapping[str, Any] = {
    _OBJECT: type(None),
    "builtins.dict": Dict,
    "builtins.list": List,
    "builtins.tuple": tuple,
    "builtins.float": float,
    "builtins.int": int,
    "builtins.str": str,
}
_SCALAR_TYPE = re.compile(
    r"numpy\.(bool_?|u?int(c|p|8|16|32|64)?|float(16|32|64|128)|complex(64|128|256)|longdouble|str_|bytes_|void|object_"
    r"|datetime64|timedelta64|longlong|ulonglong|intc|uintc|long|ulong|short|byte|ubyte|ushort|single|double)"
)
_MENTIONED = {  # but not called
    *_ARRAYS,
    *_MASKED,
    *_BIT_GENERATORS,
    _SEEDS,
    *(f"builtins.{name}" for name in ("bool", "int", "float", "str")),
}
_RANDOM: Mapping[str, Callable[..., Any]] = {
    _MAKER: _bit_generator,
    "numpy.random._pickle.__randomstate_ctor": _random,
    "numpy.random._pickle.__generator_ctor": _random,
}
_CALLS: Mapping[str, Callable[..., Any]] = {
    **{f"builtins.{name}": lambda: True for name in ("object", "list", "tuple", "dict")},
    **dict.fromkeys(HASHING, _items),
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "builtins.complex": _numbers,
    "builtins.range": _numbers,
    "builtins.slice": _numbers,
    "_codecs.encode": _latin,
    "copyreg._reconstructor": _reconstructed,
    "collections.Counter": _counts,
    "collections.defaultdict": _factory,
    "collections.deque": _deque,
    **{f"datetime.{name}": _plain for name in ("date", "time", "datetime", "timedelta")},
    **{
        f"numpy.{core}.{name}": judge
        for core in ("_core", "core")
        for name, judge in (
            ("multiarray._reconstruct", _empty_array),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _from_buffer),
        )
    },
    "numpy.dtype": _dtype,
    "numpy.ma.core._mareconstruct": _empty_masked,
    **_RANDOM,
    "numpy.random.bit_generator.__pyx_unpickle_SeedSequence": _seeds,
    "joblib.numpy_pickle.NumpyArrayWrapper": lambda: False,  # only as joblib itself makes it
}
_EMPTY_ARRAYS = {
    "numpy.ma.core._mareconstruct",
    *(f"numpy.{core}.multiarray._reconstruct" for core in ("_core", "core")),
}
