"""How deep the tuples of a pickle are nested. Pure.

Python hashes a tuple by recursion in C, without a limit: one that is nested hundreds of thousands deep and used as a
key ends the process. Lists and dicts are no keys, so that only what makes tuples, or may, has to be followed.
"""

from __future__ import annotations

import pickletools
from typing import Any, BinaryIO

from torch_s3.errors import CheckpointError

_MOST = 5_000
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "REDUCE": 2, "NEWOBJ": 2, "NEWOBJ_EX": 3}
_MAKERS = (b"\x85", b"\x86", b"\x87", b"t", b"R", b"\x81", b"\x92")  # of nested ones: the opcodes of those and TUPLE


def check_nesting(pickled: bytes | BinaryIO, *, uri: str) -> None:
    """Refuse what torch could not unpickle without danger for the process.

    Raises:
        CheckpointError: Its tuples are nested thousands deep.
    """
    if is_too_deep(pickled):
        raise CheckpointError("it is nested too deeply", uri=uri)


def is_too_deep(pickled: bytes | BinaryIO) -> bool:
    """Whether tuples in a pickle are nested too deep to be keys. Time and memory are bounded by its length.

    Args:
        pickled: The pickle, or a file that it begins at; then it is read to its end.
    """
    if isinstance(pickled, bytes) and sum(pickled.count(maker) for maker in _MAKERS) < _MOST:
        return False
    stack: list[int] = []  # how deep each value is; the marks are below
    marks: list[int] = []
    memo: dict[Any, int] = {}
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            name = opcode.name
            if name == "MARK":
                marks.append(len(stack))
            elif name in _TUPLES or name == "TUPLE":
                start = marks.pop() if name == "TUPLE" else len(stack) - _TUPLES[name]
                stack[start:] = [1 + max(stack[start:], default=0)]
                if stack[-1] > _MOST:
                    return True
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                stack.append(memo.get(argument, 0))
            elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
                memo[len(memo) if argument is None else argument] = stack[-1]
            elif opcode.stack_before and opcode.stack_before[-1] is pickletools.stackslice:
                start = marks.pop()
                stack[start - (len(opcode.stack_before) - 2) :] = [0] * len(opcode.stack_after)
            elif opcode.stack_before or opcode.stack_after:
                stack[len(stack) - len(opcode.stack_before) :] = [0] * len(opcode.stack_after)
    except (ValueError, IndexError, TypeError, UnicodeDecodeError):  # damaged: whoever reads it will say so
        return False
    return False
