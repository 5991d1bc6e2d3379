"""What a pickle would do, without doing it: its opcodes are followed with stand-ins for objects. Pure.

Nothing is imported and nothing is called. Names are found however they are put together, for a name that is not a
string on the stack is refused; and calls are only of names, never of what another call has made. Time and memory are
bounded by the pickle's length.

joblib's files are pickles with the bytes of arrays between the opcodes: each after the BUILD of a
``NumpyArrayWrapper``, which says how many there are; or another pickle, where an array holds objects.

Formats: CPython's ``Lib/pickletools.py``; joblib's ``numpy_pickle.py``.
"""

from __future__ import annotations

import _compat_pickle
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch_s3.artifacts import data
from torch_s3.artifacts.data import Dtype, Made
from torch_s3.artifacts.reading import Reader
from torch_s3.artifacts.stand_ins import Dict, List, Name, Refused, size

WRAPPER = "joblib.numpy_pickle.NumpyArrayWrapper"
_COMPAT = ("joblib.numpy_pickle.NDArrayWrapper", "joblib.numpy_pickle.ZNDArrayWrapper")
_MEMO_GAP = 1000
_WORK = 16  # bytes copied, or parts of keys hashed, for each byte of a pickle: one thing can be used again and again
_SPARE = 1_000_000  # of them in any case
_LONG = 1000  # bits of a number that takes time to hash


class Outline(NamedTuple):
    """What a pickle asks for.

    Attributes:
        names: By module and name, as it gives them.
        array_bytes: Of joblib's arrays.
        refused: What it does that no pickle of data, types and their instances needs to; it was followed no further.
    """

    names: Mapping[tuple[str, str], Name]
    array_bytes: int
    refused: str | None = None


def outline(pickled: memoryview, *, is_free: Callable[[str], bool]) -> Outline:
    """Follow a pickle to its end; what comes after that doesn't matter.

    Args:
        pickled: It.
        is_free: Whether the caller trusts a name with any arguments.

    Raises:
        EOFError: It is truncated.
        ValueError: It is damaged. So are LookupError, TypeError, AttributeError, ArithmeticError and struct.error.
    """
    follower = _Follower(pickled, 0, is_free, {}, arrays=True)
    try:
        follower.follow()
    except Refused as error:
        return Outline(follower.names, follower.array_bytes, str(error))
    return Outline(follower.names, follower.array_bytes)


class _Follower(Reader):
    def __init__(
        self,
        pickled: memoryview,
        at: int,
        is_free: Callable[[str], bool],
        names: dict[tuple[str, str], Name],
        *,
        arrays: bool,
    ) -> None:
        super().__init__(pickled, at)
        self.names, self._is_free, self._arrays = names, is_free, arrays
        self.array_bytes = 0
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._work = _WORK * len(pickled) + _SPARE

    def follow(self) -> None:
        """Go to the STOP."""
        buffer, actions = self.buffer, _ACTIONS
        while True:
            if self.at >= len(buffer):
                raise EOFError
            opcode = buffer[self.at]
            begun = self.at
            self.at += 1
            if opcode == _STOP:
                self._stack.pop()
                self.check_frame_is_over()
                return
            action = actions[opcode]
            if action is None:
                raise ValueError(f"byte {begun} is no opcode: {opcode}")
            action(self)
            if begun < self.frame_stop < self.at and opcode != _FRAME:
                raise ValueError("an opcode goes on after its frame")

    # ------------------------------------------------------------------ the stack

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def to_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self.to_mark()

    def duplicate(self) -> None:
        self._stack.append(self._stack[-1])

    def append(self) -> None:
        self.add([self._stack.pop()])

    def set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self.add([key, value], keys=2)

    def memoize(self) -> None:
        self.put(len(self._memo))

    def tuple_of(self, count: int) -> None:
        if len(self._stack) < count:
            raise IndexError("the stack is empty")
        items = self._stack[-count:]
        del self._stack[-count:]
        self.to_tuple(items)

    def to_tuple(self, items: list[Any]) -> None:
        self._check_set(items)
        self._stack.append(tuple(items))

    def _check_set(self, items: list[Any]) -> None:
        """A dtype that is changed after something has used it lets numpy read what isn't there."""
        for item in items:
            if type(item) is Dtype and not item.is_set:
                raise Refused("it uses a dtype that isn't made yet")

    def put(self, index: int) -> None:
        if not 0 <= index <= len(self._memo) + _MEMO_GAP:  # the unpickler makes room for all that lie before
            raise ValueError("its memo has holes")
        self._memo[index] = self._stack[-1]

    def get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def add(self, items: list[Any], *, keys: int = 0) -> None:
        """Put items into what is on the stack; every ``keys``-th of them is hashed."""
        target = self._stack[-1]
        if isinstance(target, Name):
            raise Refused(f"it changes {target.full} itself")
        self._check_set(items)
        if keys:
            self._hash(items[::keys])
        if isinstance(target, Made):
            target.add(keys=keys == 2)
        elif isinstance(target, List) or (isinstance(target, Dict) and keys == 2):
            target.add(items)

    def _hash(self, keys: Iterable[Any]) -> None:
        """Take account of keys: tuples can be nested, and are hashed anew each time."""
        left = [(key, 0) for key in keys if _is_slow(key)]
        while left:
            node, depth = left.pop()
            if isinstance(node, int):
                self._spend(node.bit_length() // 32)
                continue
            self._spend(1 + len(node))
            if depth > 100:
                raise Refused("its keys are nested too deeply")
            left += [(child, depth + 1) for child in node if _is_slow(child)]

    def _spend(self, work: int) -> None:
        self._work -= work
        if self._work < 0:
            raise Refused("it uses the same things too often, or its keys are nested too deeply")

    def collect(self, kind: Callable[[], Any], keys: int = 0) -> None:
        items = self.to_mark()
        self._stack.append(kind())
        self.add(items, keys=keys)

    # ------------------------------------------------------------------ names and calls

    def named(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise Refused("it puts together the name of what it asks for")
        found = self.names.get((module, name))
        if found is None:
            full = canonical(module, name, self.protocol)
            if full in _COMPAT:
                raise Refused("joblib before 0.10 has written it: load it with that, and save it anew")
            found = self.names[module, name] = Name(module, name, full)
        self._stack.append(found)

    def stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self.named(module, name)

    def call(self, function: Any, arguments: Any, *, new: bool = False) -> None:
        """Push what a call makes."""
        if not isinstance(function, Name):
            raise Refused("it calls what is no name")
        if not isinstance(arguments, tuple):
            raise Refused(f"it calls {function.full} with no tuple")
        of_joblib = function.full == WRAPPER and self._arrays and new and not arguments
        by_name = self._is_free(function.full) or not data.is_data(function.full)  # which is trusted, or refused
        if of_joblib or by_name:
            self._stack.append(Made(function))
            return
        self._spend(sum(map(size, arguments)))
        self._stack.append(data.made(function, arguments))
        for given in arguments if function.full in data.HASHING else ():
            items = given.nested if isinstance(given, List) else given
            self._hash(tuple(item.nested) if isinstance(item, List) else item for item in items)

    def reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self.call(function, arguments)

    def new(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self.call(function, arguments, new=True)

    def new_with_keywords(self) -> None:
        keywords, arguments, function = self._stack.pop(), self._stack.pop(), self._stack.pop()
        if not isinstance(function, Name) or not isinstance(keywords, Dict) or not self._is_free(function.full):
            raise Refused("it calls something with keywords that is not to be called so")
        self.call(function, arguments)

    def instance(self) -> None:
        self.named(self.line(), self.line())
        function = self._stack.pop()
        self._call_with(function, self.to_mark())

    def _call_with(self, function: Any, arguments: list[Any]) -> None:
        self._check_set(arguments)
        self.call(function, tuple(arguments))

    def obj(self) -> None:
        function, *arguments = self.to_mark()
        self._call_with(function, arguments)

    def build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Name):
            raise Refused(f"it changes {target.full} itself")
        if isinstance(target, Dtype):
            target.set(state)
        elif isinstance(target, Made):
            self._spend(sum(map(size, state if isinstance(state, tuple) else [state])))
            target.set(state)
            if target.function.full == WRAPPER:
                self._array(state)  # in whose place comes the array, which is as much set once as the wrapper is

    def _array(self, state: Any) -> None:
        """Go on after the bytes of an array, or after the pickle of its objects."""
        self.check_frame_is_over()
        wrapper = data.Wrapper.of(state)
        if wrapper.dtype.hasobject:
            inner = _Follower(self.buffer, self.at, self._is_free, self.names, arrays=False)
            inner.follow()
            self.at, self.frame_stop = inner.at, 0
            return
        if wrapper.padded:
            self.take(self.number("<B"))
        self.take(wrapper.nbytes)
        self.array_bytes += wrapper.nbytes
        self.frame_stop = 0


def canonical(module: str, name: str, protocol: int) -> str:
    """The dotted name of what the unpickler would import, which knows Python 2's."""
    if protocol < 3:
        if (module, name) in _compat_pickle.NAME_MAPPING:
            module, name = _compat_pickle.NAME_MAPPING[module, name]
        elif module in _compat_pickle.IMPORT_MAPPING:
            module = _compat_pickle.IMPORT_MAPPING[module]
    return f"{module}.{name}"


def _is_slow(key: Any) -> bool:
    """Whether a key takes time to hash."""
    return isinstance(key, tuple) or (isinstance(key, int) and key.bit_length() > _LONG)


def _refuse(words: str) -> Callable[[_Follower], None]:
    def refuse(_: _Follower) -> None:
        raise Refused(words)

    return refuse


_STOP, _FRAME = b".\x95"
_Self = _Follower
_BY_OPCODE: dict[bytes, Callable[[_Follower], object]] = {
    b"(": _Self.mark,
    b"0": _Self.pop,
    b"1": _Self.to_mark,
    b"2": _Self.duplicate,
    b"F": lambda self: self.push(float(self.line())),
    b"I": lambda self: self.push(self.whole()),
    b"J": lambda self: self.push(self.number("<i")),
    b"K": lambda self: self.push(self.number("<B")),
    b"L": lambda self: self.push(self.whole()),
    b"M": lambda self: self.push(self.number("<H")),
    b"N": lambda self: self.push(None),
    b"P": _refuse("it asks for objects from elsewhere (persistent ids)"),
    b"Q": _refuse("it asks for objects from elsewhere (persistent ids)"),
    b"R": _Self.reduce,
    b"S": lambda self: self.push(self.quoted()),
    b"T": lambda self: self.push(self.old_text("<i")),
    b"U": lambda self: self.push(self.old_text("<B")),
    b"V": lambda self: self.push(str(self.raw_line(), "raw-unicode-escape")),
    b"X": lambda self: self.push(self.text("<I")),
    b"a": _Self.append,
    b"b": _Self.build,
    b"c": lambda self: self.named(self.line(), self.line()),
    b"d": lambda self: self.collect(Dict, 2),
    b"}": lambda self: self.push(Dict()),
    b"e": lambda self: self.add(self.to_mark()),
    b"g": lambda self: self.get(int(self.line())),
    b"h": lambda self: self.get(self.number("<B")),
    b"i": _Self.instance,
    b"j": lambda self: self.get(self.number("<I")),
    b"l": lambda self: self.collect(List),
    b"]": lambda self: self.push(List()),
    b"o": _Self.obj,
    b"p": lambda self: self.put(int(self.line())),
    b"q": lambda self: self.put(self.number("<B")),
    b"r": lambda self: self.put(self.number("<I")),
    b"s": _Self.set_item,
    b"t": lambda self: self.to_tuple(self.to_mark()),
    b")": lambda self: self.push(()),
    b"u": lambda self: self.add(self.to_mark(), keys=2),
    b"G": lambda self: self.push(self.number(">d")),
    b"\x80": _Self.read_protocol,
    b"\x81": _Self.new,
    b"\x82": _refuse("it asks for names by number (copyreg's extensions)"),
    b"\x83": _refuse("it asks for names by number (copyreg's extensions)"),
    b"\x84": _refuse("it asks for names by number (copyreg's extensions)"),
    b"\x85": lambda self: self.tuple_of(1),
    b"\x86": lambda self: self.tuple_of(2),
    b"\x87": lambda self: self.tuple_of(3),
    b"\x88": lambda self: self.push(True),
    b"\x89": lambda self: self.push(False),
    b"\x8a": lambda self: self.push(self.long("<B")),
    b"\x8b": lambda self: self.push(self.long("<i")),
    b"B": lambda self: self.push(self.content("<I")),
    b"C": lambda self: self.push(self.content("<B")),
    b"\x8c": lambda self: self.push(self.text("<B")),
    b"\x8d": lambda self: self.push(self.text("<Q")),
    b"\x8e": lambda self: self.push(self.content("<Q")),
    b"\x8f": lambda self: self.push(List()),
    b"\x90": lambda self: self.add(self.to_mark(), keys=1),
    b"\x91": lambda self: self.collect(List, 1),
    b"\x92": _Self.new_with_keywords,
    b"\x93": _Self.stack_global,
    b"\x94": _Self.memoize,
    b"\x95": _Self.read_frame,
    b"\x96": lambda self: self.push(self.content("<Q")),
    b"\x97": _refuse("it asks for buffers from elsewhere"),
    b"\x98": _refuse("it asks for buffers from elsewhere"),
}
_ACTIONS = [_BY_OPCODE.get(bytes([opcode])) for opcode in range(256)]
