"""Unpickles what torch.save writes of plain containers and dense tensors: quicker than torch does, and able to do less.

An interpreter of pickle's protocol 2 of our own. Nothing is imported, and no name in the file is looked up: a
``GLOBAL`` must be one of :data:`~torch_s3.checkpoint.allowed.GLOBALS`, and gives an instance of a class that nothing
but the opcodes below can use. Each checks the exact types of what it is applied to:

- ``REDUCE`` calls functions of that module alone, each of which checks all of its arguments;
- ``BUILD`` gives an OrderedDict attributes, from a dict by strings; nothing else has a state;
- ``APPEND`` and ``SETITEM`` change lists, and dicts and OrderedDicts; keys are scalars, or tuples of scalars, so that
  none is hashed in depth;
- ``BINPERSID`` names a storage, by a tuple of exactly such types;
- what is of use here alone, functions and storages, gets into no container, and so not into the result.

There is no recursion, and no opcode takes more memory than some multiple of its bytes, but for the storages: the caller
checks their sizes. Anything else is :class:`Unusual`: torch's own unpickler, restricted too, is asked, and decides.

Format: Lib/pickletools.py. What torch makes of it: ``torch/_weights_only_unpickler.py`` and ``torch/_utils.py``.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from struct import Struct, error
from typing import Any

import torch

from torch_s3.checkpoint.allowed import (
    GLOBALS,
    INNER,
    ORDERING,
    REBUILDING,
    USED,
    Arguments,
    Function,
    Kind,
    Storage,
    Unusual,
    is_key,
    require,
    tensor_of,
)
from torch_s3.errors import S3Error

FindStorage = Callable[[str, str, int], torch.UntypedStorage]
"""Gives the storage of a record, by its key, where it was saved from, and its bytes."""
_GET, _PUT, _NUMBER = rb"(h.|j....)", rb"(q.|r....)", rb"(?:K.|M..|J....)"
_MANY = rb"(?:\)|(%b\x85|%b{2}\x86|%b{3}\x87|\(%b{4,64}t)%b)" % (*[_NUMBER] * 4, _PUT)
_REBUILD = re.compile(
    b"".join(
        (
            rb"\(\(", _GET, _GET,  # "storage", its class,
            rb"X(.)\0\0\0([0-9]{1,9})", _PUT, _GET,  # its key, where it was
            rb"(", _NUMBER, rb")t", _PUT, rb"Q",  # and how many elements it has
            rb"(", _NUMBER, rb")", _MANY, _MANY,  # the offset of the tensor's, its sizes and strides
            rb"([\x88\x89])", _GET, rb"\)R", _PUT,  # whether it requires a gradient; no hooks
            rb"t", _PUT, rb"R", _PUT,
        )
    ),
    re.DOTALL,
)  # fmt: skip
"""What torch writes for a tensor after the function's name: most of what there is in a checkpoint of many of them."""
_LINE, _SHORT, _LONG, _FLOAT = re.compile(rb"([\w.]+\n\w+)\n"), Struct("<H"), Struct("<i"), Struct(">d")
_INDEX = Struct("<I")


def unpickle(pickled: bytes, find_storage: FindStorage) -> Any:
    """The object of a pickle.

    Args:
        pickled: A whole pickle, as in ``data.pkl``.
        find_storage: Called once for each storage that isn't empty, and for each mention of one that is.

    Raises:
        Unusual: torch has to be asked what it is, or what is wrong with it.
        Exception: What ``find_storage`` raised.
    """
    try:
        return _Unpickler(pickled, find_storage).run()
    except S3Error:
        raise
    # OverflowError and RuntimeError: of torch, that there is no such tensor.
    except (LookupError, TypeError, ValueError, OverflowError, RuntimeError, error):
        raise Unusual from None


class _Unpickler:
    def __init__(self, pickled: bytes, find_storage: FindStorage) -> None:
        self._data, self._find_storage = pickled, find_storage
        self._at = 2  # the next opcode's, or argument's, first byte
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks before each mark
        self._memo: dict[int, Any] = {}
        self._storages: dict[str, Storage] = {}
        self._shapes: dict[bytes, tuple[int, ...]] = {}

    def run(self) -> Any:
        data, steps = self._data, _STEPS
        require(data.startswith(b"\x80\x02"))
        while (opcode := data[self._at]) != _STOP:
            self._at += 1
            steps[opcode](self)
        (found,) = self._stack
        require(not self._below and type(found) not in INNER)
        return found

    def _read(self, layout: Struct) -> Any:
        at = self._at
        self._at += layout.size
        return layout.unpack_from(self._data, at)[0]

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _bytes(self, count: int) -> bytes:
        start = self._at
        self._at += count
        require(self._at < len(self._data))
        return self._data[start : self._at]

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def to_mark(self) -> list[Any]:
        taken, self._stack = self._stack, self._below.pop()
        return taken

    def text(self) -> None:
        self.push(str(self._bytes(self._read(_INDEX)), "utf-8", "surrogatepass"))

    def long(self) -> None:
        self.push(int.from_bytes(self._bytes(self._byte()), "little", signed=True))

    def global_(self) -> None:
        if (line := _LINE.match(self._data, self._at)) is None:
            raise Unusual
        self._at = line.end()
        self.push(GLOBALS[line[1]])

    def put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def get(self, index: int) -> None:
        value = self._memo[index]
        require(value is not USED)
        self.push(value)
        if value is REBUILDING:
            self._rebuild()

    def tuple_of(self, items: list[Any]) -> None:
        inner = any(type(item) in INNER for item in items)
        self.push(Arguments(items) if inner else tuple(items))

    def tuple_of_last(self, count: int) -> None:
        require(len(self._stack) >= count)
        items = self._stack[-count:]
        del self._stack[-count:]
        self.tuple_of(items)

    def append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        require(type(target) is list and not any(type(item) in INNER for item in items))
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target, kind = self._stack[-1], type(self._stack[-1])
        require(kind is dict or kind is OrderedDict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str and not is_key(key):
                raise Unusual
            if type(value) in INNER:
                raise Unusual
            target[key] = value

    def set_item(self) -> None:
        require(len(self._stack) > 2)
        items = self._stack[-2:]
        del self._stack[-2:]
        self.set_items(items)

    def build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        require(type(target) is OrderedDict and type(state) is dict and all(type(name) is str for name in state))
        vars(target).update(state)

    def reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        require(type(function) is Function and type(arguments) in (tuple, Arguments))
        self.push(function.call(arguments))

    def persistent(self) -> None:
        said = self._stack.pop()
        require(type(said) is Arguments)
        word, kind, key, location, count = said
        require(type(word) is str and word == "storage" and type(kind) is Kind and type(key) is str)
        require(type(location) is str and type(count) is int)
        self.push(self._storage(kind, key, location, count))

    def _storage(self, kind: Kind, key: str, location: str, count: int) -> Storage:
        found = self._storages.get(key)
        if found is None:
            storage = self._find_storage(key, location, count * kind.dtype.itemsize)
            found = Storage(storage, kind.dtype, storage.device)
            if count:  # as in torch, where each empty tensor has a storage of its own
                self._storages[key] = found
        # It has the size and place that were said first, in torch too.
        require(found.dtype is kind.dtype)
        return found

    def _rebuild(self) -> None:
        """Make a tensor at once, if what follows is what torch writes: as the opcodes would one by one."""
        match = _REBUILD.match(self._data, self._at)
        if match is None:
            return
        (
            word, kind, length, key, key_put, location, count, said_put, offset, size, size_put, stride, stride_put,
            grad, ordered, hooks_put, arguments_put, tensor_put,
        ) = match.groups()  # fmt: skip
        memo, number = self._memo, _index
        word, kind, location = memo[number(word)], memo[number(kind)], memo[number(location)]
        if (
            type(word) is not str
            or word != "storage"
            or type(kind) is not Kind
            or length[0] != len(key)
            or type(location) is not str
            or memo[number(ordered)] is not ORDERING
        ):
            raise Unusual
        key = key.decode()
        said = self._storage(kind, key, location, _number(count))
        size, stride = self._shape(size), self._shape(stride)
        tensor = tensor_of(said, said.dtype, (_number(offset), size, stride), grad=grad == b"\x88")
        memo[number(key_put)] = key
        memo[number(said_put)] = USED
        if size_put:
            memo[number(size_put)] = size
        if stride_put:
            memo[number(stride_put)] = stride
        memo[number(hooks_put)] = memo[number(arguments_put)] = USED
        memo[number(tensor_put)] = self._stack[-1] = tensor
        self._at = match.end()

    def _shape(self, said: bytes | None) -> tuple[int, ...]:
        if said is None:
            return ()
        found = self._shapes.get(said)
        if found is None:
            found = self._shapes[said] = tuple(map(_number, _NUMBERS.findall(said)))
        return found


def _index(said: bytes) -> int:
    return int.from_bytes(said[1:], "little")


def _number(said: bytes) -> int:
    return int.from_bytes(said[1:], "little", signed=said[0] == ord("J"))


_NUMBERS = re.compile(_NUMBER, re.DOTALL)
_STOP = ord(".")


def _refuse(_: _Unpickler) -> None:
    raise Unusual


_STEPS: list[Callable[[_Unpickler], None]] = [_refuse] * 256
for _opcode, _step in {
    b"(": _Unpickler.mark,
    b")": lambda self: self.push(()),
    b"N": lambda self: self.push(None),
    b"\x88": lambda self: self.push(True),
    b"\x89": lambda self: self.push(False),
    b"]": lambda self: self.push([]),
    b"}": lambda self: self.push({}),
    b"K": lambda self: self.push(self._byte()),
    b"M": lambda self: self.push(self._read(_SHORT)),
    b"J": lambda self: self.push(self._read(_LONG)),
    b"\x8a": _Unpickler.long,
    b"G": lambda self: self.push(self._read(_FLOAT)),
    b"X": _Unpickler.text,
    b"q": lambda self: self.put(self._byte()),
    b"r": lambda self: self.put(self._read(_INDEX)),
    b"h": lambda self: self.get(self._byte()),
    b"j": lambda self: self.get(self._read(_INDEX)),
    b"c": _Unpickler.global_,
    b"t": lambda self: self.tuple_of(self.to_mark()),
    b"\x85": lambda self: self.tuple_of_last(1),
    b"\x86": lambda self: self.tuple_of_last(2),
    b"\x87": lambda self: self.tuple_of_last(3),
    b"a": lambda self: self.append([self._stack.pop()]),
    b"e": lambda self: self.append(self.to_mark()),
    b"s": _Unpickler.set_item,
    b"u": lambda self: self.set_items(self.to_mark()),
    b"R": _Unpickler.reduce,
    b"b": _Unpickler.build,
    b"Q": _Unpickler.persistent,
}.items():
    _STEPS[_opcode[0]] = _step
