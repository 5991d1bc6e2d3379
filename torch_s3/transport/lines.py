"""Lines of the log from threads that others wait for, and that must never wait for a log themselves.

Garbage is collected anywhere, also while a thread writes a line: where that cancels transfers, it waits for the I/O
thread, which would wait for the handler's lock to write one of its own. So lines wait instead, until the lock is free.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

log = logging.getLogger("torch_s3")

_waiting: deque[tuple[str, tuple[Any, ...]]] = deque(maxlen=10_000)


def say(message: str, *args: Any) -> None:
    """``log.debug``, now or when :func:`write` is called next; never waits. Any thread."""
    if log.isEnabledFor(logging.DEBUG):
        _waiting.append((message, args))
        write()


def write() -> bool:
    """Write the lines that wait, unless another thread is writing to the same log: whether any are left."""
    while _waiting:
        with ExitStack() as stack:
            for handler in _handlers():
                if handler.lock is not None:
                    if not handler.lock.acquire(blocking=False):
                        return True
                    stack.callback(handler.lock.release)
            try:
                message, args = _waiting.popleft()
            except IndexError:  # another thread has written it
                break
            log.debug(message, *args)
    return False


def _handlers() -> Iterator[logging.Handler]:
    logger: logging.Logger | None = log
    while logger is not None:
        yield from logger.handlers
        logger = logger.parent if logger.propagate else None
