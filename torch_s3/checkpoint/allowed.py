"""What our own unpickler may make, and nothing else: classes and functions of torch's, by the names in a pickle.

Each function checks all of its arguments. The classes here are what a pickle gets in place of functions and storages,
which only :mod:`torch_s3.checkpoint.unpickler` can use.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from torch_s3.checkpoint.pickled import STORAGES


class Unusual(Exception):
    """A pickle that torch has to be asked about."""


class Function(NamedTuple):
    """What ``REDUCE`` may call, with a tuple of arguments."""

    call: Callable[[tuple[Any, ...]], Any]


class Kind(NamedTuple):
    """A class of storages."""

    dtype: torch.dtype


class Storage(NamedTuple):
    """A storage, and what its elements are."""

    storage: torch.UntypedStorage
    dtype: torch.dtype
    device: torch.device


class Arguments(tuple[Any, ...]):
    """A tuple that has something in it which is of use here alone."""

    __slots__ = ()


class Used:
    """What was made by the way, and is never looked at again by what torch writes."""


INNER = frozenset({Function, Kind, Storage, Arguments, Used})
_SCALARS = frozenset({str, int, float, bool, type(None)})
USED = Used()


def require(met: bool) -> None:
    if not met:
        raise Unusual


def _sizes(said: Any) -> None:
    require(type(said) is tuple and all(type(size) is int for size in said))


def _no_hooks(said: Any) -> None:
    require(type(said) is OrderedDict and not said and not vars(said))


def tensor_of(said: Storage, dtype: torch.dtype, view: tuple[Any, Any, Any], *, grad: bool) -> torch.Tensor:
    """A tensor; torch refuses offsets, sizes and strides that don't lie in the storage, which cannot be resized."""
    tensor = torch.empty(0, dtype=dtype, device=said.device).set_(said.storage, *view)
    return tensor.requires_grad_() if grad else tensor


def _rebuild_tensor(arguments: tuple[Any, ...]) -> torch.Tensor:
    said, offset, size, stride, grad, hooks = arguments
    require(type(said) is Storage and type(offset) is int and type(grad) is bool)
    _sizes(size)
    _sizes(stride)
    _no_hooks(hooks)
    return tensor_of(said, said.dtype, (offset, size, stride), grad=grad)


def _rebuild_tensor_of_dtype(arguments: tuple[Any, ...]) -> torch.Tensor:
    said, *_, dtype = arguments
    require(type(said) is Storage and type(dtype) is torch.dtype)
    return _rebuild_tensor((said._replace(dtype=dtype), *arguments[1:-1]))


def _rebuild_parameter(arguments: tuple[Any, ...]) -> torch.nn.Parameter:
    data, grad, hooks = arguments
    require(type(data) is torch.Tensor and type(grad) is bool)
    _no_hooks(hooks)
    return torch.nn.Parameter(data, grad)


def _ordered_dict(arguments: tuple[Any, ...]) -> OrderedDict[Any, Any]:
    require(not arguments)
    return OrderedDict()


def _size(arguments: tuple[Any, ...]) -> torch.Size:
    (sizes,) = arguments
    _sizes(sizes)
    return torch.Size(sizes)


def _device(arguments: tuple[Any, ...]) -> torch.device:
    kind, *index = arguments
    require(type(kind) is str and len(index) <= 1 and all(type(number) is int for number in index))
    return torch.device(kind, *index)


def _set(arguments: tuple[Any, ...]) -> set[Any]:
    (members,) = arguments
    require(type(members) is list and all(map(is_key, members)))
    return set(members)


def is_key(key: Any) -> bool:
    kind = type(key)
    return kind in _SCALARS or (kind is tuple and all(type(part) in _SCALARS for part in key))


REBUILDING = Function(_rebuild_tensor)
ORDERING = Function(_ordered_dict)
_FUNCTIONS: dict[bytes, Function] = {
    b"torch._utils\n_rebuild_tensor_v2": REBUILDING,
    b"torch._utils\n_rebuild_tensor_v3": Function(_rebuild_tensor_of_dtype),
    b"torch._utils\n_rebuild_parameter": Function(_rebuild_parameter),
    b"collections\nOrderedDict": ORDERING,
    b"torch\nSize": Function(_size),
    b"torch\ndevice": Function(_device),
    b"__builtin__\nset": Function(_set),
}
_DTYPES = {
    f"torch\n{name}".encode(): each
    for each in vars(torch).values()
    if isinstance(each, torch.dtype)
    for name in [str(each).removeprefix("torch.")]
}
GLOBALS: Mapping[bytes, Any] = {
    **_FUNCTIONS,
    **_DTYPES,
    **{
        f"{'torch.storage' if kind == 'UntypedStorage' else 'torch'}\n{kind}".encode(): Kind(getattr(torch, dtype))
        for kind, dtype in STORAGES.items()
    },
}
"""All that a pickle may name, by module and name."""
