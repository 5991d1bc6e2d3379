"""What a pickle would make, without making it. Pure.

The opcodes are followed with names in place of functions, and calls are written down in place of being made: nothing is
imported, nothing is run, and time and memory are bounded by the pickle's length.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch_s3.errors import CheckpointError
from torch_s3.wording import brief

_TENSOR = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v3")
_MARK = object()
_MOST = 1_000_000  # tensors
_PATHS = 64  # characters of paths for each byte of pickle: long keys can be nested, again and again
_MAX_ELEMENTS = 2**63 - 1
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
    "UntypedStorage": "uint8",
}
"""Kinds of elements by the storage classes that torch.save names."""


class Name(str):
    """A function or class that a pickle asks for, by its dotted name."""

    __slots__ = ()


class Stored(NamedTuple):
    """A storage that a pickle refers to.

    Attributes:
        kind: Name of its class, such as ``torch.FloatStorage``.
        key: Its record is ``data/KEY``.
    """

    kind: str
    key: str


class PickledTensor(NamedTuple):
    """A dense tensor that a pickle describes.

    Attributes:
        path: Where in the object it is.
        storage: What holds its elements.
        offset: Of its first one, in elements.
        shape: Its sizes.
        dtype: Name of its dtype where its storage doesn't say.
    """

    path: str
    storage: Stored
    offset: int
    shape: tuple[int, ...]
    dtype: str | None


@dataclass(slots=True, eq=False)
class _Call:
    """What a function would have returned."""

    function: Any
    arguments: Any
    entries: list[Any] = field(default_factory=list)  # put in afterwards, keys and values in turn, or values
    state: Any = None


def tensors_in(pickled: bytes, *, uri: str) -> list[PickledTensor]:
    """The tensors of an object.

    Raises:
        CheckpointError: It is damaged.
    """
    try:
        return list(_walk(_follow(pickled), _PATHS * len(pickled) + 2**20))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError) as error:
        reason = brief(error)
        raise CheckpointError(f"damaged: its pickle cannot be followed ({reason})", uri=uri) from None


def _follow(pickled: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def to_mark() -> list[Any]:
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("no mark")
        taken = stack[at + 1 :]
        del stack[at:]
        return taken

    def tuple_of(count: int) -> None:
        taken = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        stack.append(tuple(taken))

    def call() -> None:
        arguments, function = stack.pop(), stack.pop()
        stack.append(_Call(function, arguments))

    def put_in(values: list[Any]) -> None:
        target = stack[-1]
        (target.entries if isinstance(target, _Call) else target).extend(values)

    def build() -> None:
        state = stack.pop()
        if isinstance(stack[-1], _Call):
            stack[-1].state = state

    simple: dict[str, Callable[[], object]] = {
        "MARK": lambda: stack.append(_MARK),
        "POP": stack.pop,
        "POP_MARK": to_mark,
        "DUP": lambda: stack.append(stack[-1]),
        "NONE": lambda: stack.append(None),
        "NEWTRUE": lambda: stack.append(True),
        "NEWFALSE": lambda: stack.append(False),
        "EMPTY_TUPLE": lambda: stack.append(()),
        "EMPTY_LIST": lambda: stack.append([]),
        "EMPTY_SET": lambda: stack.append([]),
        "EMPTY_DICT": lambda: stack.append(_Call(None, ())),
        "DICT": lambda: stack.append(_Call(None, (), to_mark())),
        "LIST": lambda: stack.append(to_mark()),
        "FROZENSET": lambda: stack.append(to_mark()),
        "TUPLE": lambda: stack.append(tuple(to_mark())),
        "TUPLE1": lambda: tuple_of(1),
        "TUPLE2": lambda: tuple_of(2),
        "TUPLE3": lambda: tuple_of(3),
        "REDUCE": call,
        "NEWOBJ": call,
        "BUILD": build,
        "APPEND": lambda: put_in([stack.pop()]),
        "APPENDS": lambda: put_in(to_mark()),
        "ADDITEMS": lambda: put_in(to_mark()),
        "SETITEM": lambda: put_in([stack.pop(-2), stack.pop()]),
        "SETITEMS": lambda: put_in(to_mark()),
        "BINPERSID": lambda: stack.append(_stored(stack.pop())),
        "MEMOIZE": lambda: memo.update({len(memo): stack[-1]}),
        "STACK_GLOBAL": lambda: stack.append(Name(f"{stack.pop(-2)}.{stack.pop()}")),
        "PROTO": lambda: None,
        "FRAME": lambda: None,
    }
    for opcode, argument, _ in pickletools.genops(pickled):
        name = opcode.name
        if name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[_index(argument)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[_index(argument)])
        elif (action := simple.get(name)) is not None:
            action()
        elif name == "GLOBAL":
            stack.append(Name(str(argument).replace(" ", ".", 1)))
        elif name in ("INST", "OBJ"):
            arguments = to_mark()
            function = Name(str(argument).replace(" ", ".", 1)) if name == "INST" else arguments.pop(0)
            stack.append(_Call(function, tuple(arguments)))
        elif name == "NEWOBJ_EX":
            keywords, positional, function = stack.pop(), stack.pop(), stack.pop()
            stack.append(_Call(function, (positional, keywords)))
        elif name == "STOP":
            return stack.pop()
        elif opcode.arg is not None and not opcode.stack_before:
            stack.append(argument)  # a number, a string, bytes
        else:
            raise ValueError(f"opcode {name}")
    raise ValueError("it has no end")


def _index(argument: Any) -> int:
    return int(argument)


def _stored(said: Any) -> Any:
    match said:
        case ("storage", str(kind), str(key), str(), int()):
            return Stored(kind, key)
    raise ValueError("what it refers to is no storage")


def _walk(root: Any, characters: int) -> Iterator[PickledTensor]:
    """Every tensor, under the path by which it is first met; containers are entered once.

    A path is a chain of keys until it is a tensor's, and all paths together have at most so many characters.
    """
    seen: set[int] = set()
    left: list[tuple[Any, Any]] = [(None, root)]
    found = 0
    while left:
        trail, node = left.pop()
        if isinstance(node, _Call) and node.function in _TENSOR:
            tensor = _tensor(node.arguments)
            if tensor is not None:
                path = _path(trail, characters)
                characters -= len(path)
                found += 1
                if found > _MOST:
                    raise ValueError(f"more than {_MOST} tensors")
                yield tensor._replace(path=path)
                continue
        if not isinstance(node, list | tuple | _Call) or isinstance(node, Stored):
            continue
        if isinstance(node, _Call) and node.function == "torch._utils._rebuild_parameter" and node.arguments:
            left.append((trail, node.arguments[0]))
            continue
        if id(node) in seen:
            continue
        seen.add(id(node))
        left += reversed([((trail, key), value) for key, value in _entries(node)])


def _path(trail: Any, most: int) -> str:
    """The keys of a chain, joined.

    Raises:
        ValueError: They are longer than ``most``.
    """
    keys = []
    while trail is not None:
        trail, key = trail
        keys.append(str(key))
        most -= len(keys[-1]) + 1
        if most < 0:
            raise ValueError("its names are too long")
    return ".".join(reversed(keys))


def _entries(node: Any) -> list[tuple[Any, Any]]:
    if not isinstance(node, _Call):
        return list(enumerate(node))
    keys, values = node.entries[::2], node.entries[1::2]
    found = [(key if isinstance(key, str | int) else "?", value) for key, value in zip(keys, values, strict=False)]
    if node.function not in (None, "collections.OrderedDict"):
        arguments = node.arguments if isinstance(node.arguments, tuple) else ()
        found = [*enumerate(arguments), *found, ("state", node.state)]
    return found


def _tensor(arguments: Any) -> PickledTensor | None:
    if not isinstance(arguments, tuple) or len(arguments) < 4 or not isinstance(arguments[0], Stored):
        return None
    storage, offset, shape, strides = arguments[:4]
    shape, strides = tuple(_ints(shape)), tuple(_ints(strides))
    sizes = (offset, *shape, *strides)
    if not all(type(size) is int for size in sizes):
        return None
    if min(sizes) < 0 or max(sizes) > _MAX_ELEMENTS or elements(shape) > _MAX_ELEMENTS:
        raise ValueError("a tensor of no shape")
    dtype = next((str(each) for each in arguments[4:] if isinstance(each, Name) and each.startswith("torch.")), None)
    return PickledTensor("", storage, offset, shape, dtype)


def elements(shape: Sequence[int]) -> int:
    """How many a tensor has; of more than there can be, some number above that."""
    if 0 in shape:
        return 0
    product = 1
    for size in shape:  # stops before the product is too large a number to work with
        product *= size
        if product > _MAX_ELEMENTS:
            break
    return product


def _ints(said: Any) -> Any:
    if isinstance(said, _Call) and said.function == "torch.Size" and said.arguments:
        said = said.arguments[0]
    return said if isinstance(said, tuple | list) else (None,)
