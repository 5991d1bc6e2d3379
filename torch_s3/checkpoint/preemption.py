"""SIGTERM: one more checkpoint, then the end that it would have been."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterable
from types import FrameType, TracebackType
from typing import Any, Self

log = logging.getLogger("torch_s3")


class Preemption:
    """Notes a signal, and saves at the next point where the state is whole. See ``CheckpointManager.on_preemption``.

    A handler in Python runs between any two bytecodes of the main thread: in the middle of an optimizer's step, and
    while that thread holds locks that saving needs. So it takes a note only. :meth:`check` saves, and then raises the
    signal again, to be met by whoever handled it before; by default the process dies of it, which its exit status
    says. So does the block's clean end. A second signal is not waited for: it is met at once.

    Attributes:
        requested: Whether the signal has come.
    """

    def __init__(self, save: Callable[[], object], signals: Iterable[signal.Signals]) -> None:
        self._save = save
        self._signals = tuple(signals)
        self._before: dict[int, Any] = {}
        self._received: int | None = None

    @property
    def requested(self) -> bool:
        return self._received is not None

    def __enter__(self) -> Self:
        for number in self._signals:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.requested:
            log.warning("nothing is saved on the signal, for an exception has come too: %r", error, exc_info=error)
            self._deliver()
        elif self.requested:
            self.finish()
        self._restore()

    def check(self) -> None:
        """Save and end, if the signal has come. To be called where the state is whole, once a step."""
        if self.requested:
            self.finish()

    def finish(self) -> None:
        """Save and end as the signal would, which may have come to another rank only.

        Returns where whoever handled the signal before lets the process live; nothing is saved from then on.
        """
        if not self._before:  # done
            return
        if self._received is None:
            self._received = self._signals[0]
        try:
            self._save()
        except Exception:
            log.exception("the checkpoint on the signal could not be saved")
        finally:
            self._deliver()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received is None:
            self._received = number
        else:
            self._deliver()

    def _deliver(self) -> None:
        self._restore()
        if self._received is not None:
            signal.raise_signal(self._received)

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not from Python
