"""Tensors in nested dicts, lists and tuples, by dotted paths. Pure."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import translate
from typing import Any

import torch

from torch_s3.errors import CheckpointError, CheckpointMismatch
from torch_s3.wording import listed

_LISTED = 10  # names in a message
_MOST = 10_000_000  # places: a file of a few bytes can say to put a list into a list into a list … twice each
_LONG = 32  # characters of a path that count as much as a place: long keys can be nested too


@contextmanager
def _bounded(uri: str) -> Iterator[Callable[[str], None]]:
    """What is called at each place; complains when there are too many, or they lie too deep."""
    left = _MOST

    def step(path: str) -> None:
        nonlocal left
        left -= 1 + len(path) // _LONG
        if left < 0:
            raise CheckpointError(f"it has more than {_MOST} entries", uri=uri)

    try:
        yield step
    except RecursionError:
        raise CheckpointError("it is nested too deeply, or contains itself", uri=uri) from None


def tensors(tree: Any, *, uri: str) -> dict[str, torch.Tensor]:
    """All tensors by their paths, such as ``model.layers.0.weight``, in order.

    Raises:
        CheckpointError: The tree has no end, or two of them have one path.
    """
    found: dict[str, torch.Tensor] = {}

    def walk(node: Any, path: str) -> None:
        step(path)
        if isinstance(node, torch.Tensor):
            if path in found:
                raise CheckpointError(f"two tensors in it have the path {path[:200]!r}", uri=uri)
            found[path] = node
        for key, value in _entries(node):
            walk(value, f"{path}.{key}" if path else str(key))

    with _bounded(uri) as step:
        walk(tree, "")
    return found


def storages(tree: Any, *, beyond_paths: bool = False) -> list[torch.UntypedStorage]:
    """The storages of all that torch's restricted unpickler can put into plain containers: of tensors at any place, and
    of what no path leads to: storages themselves, keys of dicts, members of sets, attributes of OrderedDicts.

    Args:
        tree: The object, its tensors dense.
        beyond_paths: Leave out tensors that paths lead to.
    """
    found = []
    seen: set[tuple[int, bool]] = set()
    left = [(tree, beyond_paths)]
    while left:
        node, on_path = left.pop()
        if (id(node), on_path) in seen:
            continue
        seen.add((id(node), on_path))
        if isinstance(node, torch.Tensor):
            if not on_path:
                found.append(node.untyped_storage())
        elif isinstance(node, torch.UntypedStorage):
            found.append(node)
        elif isinstance(node, torch.TypedStorage):
            found.append(node._untyped_storage)  # noqa: SLF001 - what untyped() gives, without its warning
        elif isinstance(node, dict):
            left += [(value, on_path) for value in node.values()]
            left += [(key, False) for key in node]
            if isinstance(node, OrderedDict):
                left.append((vars(node), False))
        elif isinstance(node, list | tuple):
            left += [(value, on_path) for value in node]
        elif isinstance(node, set | frozenset):
            left += [(value, False) for value in node]
    return found


class Keys:
    """Which paths are wanted.

    Args:
        patterns: As in :mod:`fnmatch`: ``*`` is anything, dots too. One that matches the path of a dict or list takes
            all that is in it.
        names: Paths themselves.
    """

    def __init__(self, patterns: Collection[str] = (), names: Collection[str] = ()) -> None:
        self._patterns = {pattern: re.compile(translate(pattern)) for pattern in patterns}
        self._names = frozenset(names)

    def select(self, tree: Any, *, uri: str) -> Any:
        """The tree, of nested dicts, lists and tuples, without what is not wanted.

        Raises:
            CheckpointMismatch: A pattern or name matches nothing.
        """
        unused = {*self._patterns, *self._names}

        def walk(node: Any, path: str) -> tuple[bool, Any]:
            """Whether anything is left of it, and what."""
            step(path)
            matching = [pattern for pattern, compiled in self._patterns.items() if path and compiled.match(path)]
            if path in self._names:
                matching.append(path)
            if matching:
                unused.difference_update(matching)
                return True, node
            kept = []
            for key, value in _entries(node):
                some, rest = walk(value, f"{path}.{key}" if path else str(key))
                if some:
                    kept.append((key, rest))
            return bool(kept), _rebuilt(node, kept) if kept else None

        with _bounded(uri) as step:
            _, selected = walk(tree, "")
        if unused:
            some = listed(list(map(repr, sorted(unused))), _LISTED)
            raise CheckpointMismatch(f"nothing in it matches {some}", uri=uri)
        return selected


def check_alike(have: dict[str, torch.Tensor], into: dict[str, torch.Tensor], *, uri: str) -> None:
    """Whether tensors of a file could fill those of a caller.

    Raises:
        CheckpointMismatch: They are not of the same paths, dtypes and shapes; the message says how they differ.
    """
    wrong = []
    for words, some in (("has no", into.keys() - have.keys()), ("has also", have.keys() - into.keys())):
        if some:
            wrong.append(f"it {words} {listed(sorted(some), _LISTED)}")
    for path in have.keys() & into.keys():
        one, other = have[path], into[path]
        if (reason := _unfillable(one, other)) is not None:
            wrong.append(f"{path} {reason}")
        elif (one.dtype, one.shape) != (other.dtype, other.shape):
            its = f"{path} in it is {one.dtype} {tuple(one.shape)}"
            wrong.append(f"{its}, not {other.dtype} {tuple(other.shape)}")
    if wrong:
        raise CheckpointMismatch(f"it cannot fill these tensors: {listed(wrong, _LISTED, '; ')}", uri=uri)


def _unfillable(one: torch.Tensor, other: torch.Tensor) -> str | None:
    """Why ``one`` cannot be copied into ``other``, whatever it holds; ``None`` if it can."""
    if one.is_nested or other.is_nested:
        return "is a nested tensor: load it without into="
    if other.device.type == "meta":
        return "is to go to the meta device, where there is no memory"
    strided = other.layout is torch.strided
    if strided and any(size > 1 and step == 0 for size, step in zip(other.shape, other.stride(), strict=True)):
        return "is to go into an expanded tensor, of which several elements are one"
    return None


def replaced(tree: Any, new: dict[str, torch.Tensor]) -> Any:
    """The tree with other tensors at some of its paths."""

    def walk(node: Any, path: str) -> Any:
        if isinstance(node, torch.Tensor):
            return new.get(path, node)
        entries = [(key, walk(value, f"{path}.{key}" if path else str(key))) for key, value in _entries(node)]
        if isinstance(node, tuple):
            values = [value for _, value in entries]
            same = all(one is other for one, other in zip(node, values, strict=True))
            return node if same else node._make(values) if hasattr(node, "_make") else tuple(values)
        if entries:
            node = copy.copy(node)  # with its type and attributes
            for key, value in entries:
                node[key] = value
        return node

    return walk(tree, "")


def _entries(node: Any) -> Sequence[tuple[Any, Any]]:
    if isinstance(node, dict):
        return list(node.items())
    return list(enumerate(node)) if isinstance(node, list | tuple) else ()


def _rebuilt(node: Any, entries: list[tuple[Any, Any]]) -> Any:
    if isinstance(node, OrderedDict):
        made = OrderedDict(entries)
        made.__dict__.update(vars(node))  # the _metadata of a state_dict
        return made
    if isinstance(node, dict):
        return dict(entries)
    values = [value for _, value in entries]
    return tuple(values) if isinstance(node, tuple) else values
