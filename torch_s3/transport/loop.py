"""The process's I/O thread: a selector over every connection, its timers, and the queue of transfers.

Callers append to an inbox and wake the thread; only the thread touches sockets, pools and transfers in flight, so there
is nothing to lock. A forked child gets a loop of its own when it first needs one; what it inherited of its parent's is
closed, not used. ``S3Config.loops`` asks for several.

Contract, any difference is a bug: every submitted transfer is handed back exactly once, finished; after that nothing
writes to its memory. That holds when it succeeds, fails, is cancelled, when the loop itself fails, and at interpreter
exit.
"""

from __future__ import annotations

import atexit
import heapq
import itertools
import logging
import os
import random
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from torch_s3 import errors
from torch_s3.transport.lines import write
from torch_s3.transport.pool import Pool
from torch_s3.transport.target import Origin
from torch_s3.transport.transfer import Sink, Transfer

log = logging.getLogger("torch_s3")

_NAME = "torch_s3-io"
_TICK = 0.25  # seconds between looks at the deadlines while anything is under way


class Loop:
    """One I/O thread. Use :func:`running`, which gives the process's.

    Args:
        number: Its place among the process's loops, from 0.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.selector = selectors.DefaultSelector()
        self.rng = random.Random()
        self._inbox: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._pools: dict[Origin, Pool] = {}
        self._timers: list[tuple[float, int, Transfer]] = []
        self._numbers = itertools.count()
        self._waker, self._wakened = socket.socketpair()
        self._waker.setblocking(False)
        self._wakened.setblocking(False)
        self.selector.register(self._wakened, selectors.EVENT_READ, None)
        self._taken: set[Transfer] = set()  # and not finished
        self._finished: dict[int, tuple[Sink, list[Transfer]]] = {}  # and not handed back, by the sink's id
        self._asleep = False
        self._stopping = False
        self._next_look = 0.0
        self.alive = True
        self._thread = threading.Thread(target=self._run, name=_NAME, daemon=True)
        self._thread.start()

    def submit(self, transfers: Sequence[Transfer]) -> None:
        """Queue transfers, in this order. Any thread."""
        self._tell(self._take, transfers)

    def cancel(self, transfers: Sequence[Transfer]) -> None:
        """Give up transfers; each comes back through its sink, finished. Any thread."""
        self._tell(self._cancel, transfers)

    def stop(self) -> None:
        """End the thread; what is under way comes back cancelled. Any thread but the loop's own."""
        self._stopping = True
        self._tell(lambda _: None, None)
        self._thread.join()

    def abandon(self) -> None:
        """In a forked child: close what was inherited, without disturbing the parent's connections."""
        for pool in self._pools.values():
            for connection in pool.open:
                connection.sock.close()
        self.selector.close()
        self._waker.close()
        self._wakened.close()

    def _tell(self, what: Callable[[Any], None], about: object) -> None:
        self._inbox.append((what, about))
        if self._asleep:
            try:
                self._waker.send(b"\0")
            except BlockingIOError:
                pass  # it is being woken already
            except OSError:
                pass  # it has ended; below
        if not self.alive:
            self._refuse_inbox()

    # ------------------------------------------------------------------ for the pools, in the thread

    def finish(self, transfer: Transfer, error: BaseException | None = None) -> None:
        """A transfer is done with."""
        sink = transfer.finish(error)
        finished = self._finished.get(id(sink))
        if finished is None:
            finished = self._finished[id(sink)] = sink, []
        finished[1].append(transfer)
        self._taken.discard(transfer)

    def later(self, when: float, transfer: Transfer) -> None:
        """Queue a transfer again at a time, monotonic."""
        heapq.heappush(self._timers, (when, next(self._numbers), transfer))

    def resubmit(self, transfer: Transfer) -> None:
        """Queue a transfer again, for its target may be another one now."""
        pool = self._pool(transfer.target.origin)
        pool.queue.appendleft(transfer)  # its time is running
        pool.fill()

    def in_background(self, name: str, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Run what blocks in a thread of its own; then ``done`` in this one, with its result or exception."""

        def run() -> None:
            try:
                answer = work()
            except Exception as error:  # noqa: BLE001 - those who wait must hear of it
                answer = error
            self._tell(done, answer)

        try:
            threading.Thread(target=run, name=f"torch_s3-{name}", daemon=True).start()
        except RuntimeError as error:  # no more threads
            done(error)

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        except BaseException as error:  # a bug: nobody may wait for ever because of it, nor for a log's lock
            self._end(f"the I/O thread failed: {error!r}")
            log.exception("the I/O thread failed")
        else:
            self._end("the interpreter is exiting")

    def _end(self, reason: str) -> None:
        self.alive = False
        self._fail_everything(reason)
        self._refuse_inbox()

    def _turn(self) -> None:
        """One round: take what callers sent, start what can start, wait, and serve the sockets that are ready."""
        while self._inbox:
            what, about = self._inbox.popleft()
            what(about)
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            transfer = heapq.heappop(self._timers)[2]
            if not transfer.finished:
                self.resubmit(transfer)
        if now >= self._next_look:
            for pool in list(self._pools.values()):
                pool.look_at_deadlines(now)
            self._next_look = now + _TICK
        busy = any(pool.busy for pool in self._pools.values())
        timeout = _TICK if busy else None
        if write():
            timeout = _TICK
        if self._timers:
            timeout = min(timeout or 60.0, max(0.0, self._timers[0][0] - now))
        self._hand_back()
        self._asleep = True
        if self._inbox:
            timeout = 0.0  # came in between
        ready = self.selector.select(timeout)
        self._asleep = False
        now = time.monotonic()
        for key, events in ready:
            if key.data is None:
                self._wakened.recv(4096)
            else:
                key.data.pool.serve(key.data, events, now)

    def _hand_back(self) -> None:
        """Give finished transfers to their callers: once a round, for each wake-up makes threads fight for the GIL.

        And not before the one that the caller sleeps for, if it is here and on its way.
        """
        for key, (sink, transfers) in list(self._finished.items()):
            wanted = sink.wanted
            if wanted is None or wanted.finished or wanted.carrier is not self or not self.alive:
                del self._finished[key]
                sink.put(transfers)

    def _take(self, transfers: Sequence[Transfer]) -> None:
        self._taken.update(transfers)
        pools: dict[int, Pool] = {}
        target, pool = None, None
        for transfer in transfers:
            if pool is None or transfer.target is not target:
                target = transfer.target
                pool = self._pool(target.origin)
                pools[id(pool)] = pool
            pool.queue.append(transfer)
        for pool in pools.values():
            pool.fill()

    def _cancel(self, transfers: Sequence[Transfer]) -> None:
        for transfer in transfers:
            if not transfer.finished:
                if transfer.connection is not None:
                    transfer.connection.pool.close(transfer.connection)
                self.finish(transfer, _ended(transfer, "cancelled"))
        # Nothing keeps their memory: not those who waited their turn, nor those who waited for a retry.
        for pool in self._pools.values():
            pool.forget_finished()
            pool.fill()
        self._timers = [timer for timer in self._timers if not timer[2].finished]
        heapq.heapify(self._timers)

    def _pool(self, origin: Origin) -> Pool:
        pool = self._pools.get(origin)
        if pool is None:
            pool = self._pools[origin] = Pool(origin, self)
        return pool

    def _fail_everything(self, reason: str) -> None:
        for pool in self._pools.values():
            for connection in pool.open:
                connection.close()
        for transfer in list(self._taken):
            self.finish(transfer, _ended(transfer, reason))
        self._hand_back()
        self.selector.close()
        self._wakened.close()
        self._waker.close()

    def _refuse_inbox(self) -> None:
        """Hand back what came after the end."""
        while self._inbox:
            try:
                what, about = self._inbox.popleft()
            except IndexError:
                return
            for transfer in about if what in (self._take, self._cancel) else ():
                if not transfer.finished:
                    transfer.finish(_ended(transfer, "the I/O thread has ended")).put([transfer])


def _ended(transfer: Transfer, reason: str) -> errors.S3Error:
    return errors.S3Error(reason, uri=transfer.uri, range=transfer.range)


_current: dict[int, Loop] = {}
_lock = threading.Lock()


def running(number: int = 0) -> Loop:
    """One of this process's loops, started when first needed, and again should it have failed."""
    loop = _current.get(number)
    if loop is None or not loop.alive:
        with _lock:
            loop = _current.get(number)
            if loop is None or not loop.alive:
                loop = _current[number] = Loop(number)
    return loop


def is_io_thread() -> bool:
    """Whether this is an I/O thread, where waiting for it would last for ever. Garbage is collected anywhere."""
    return threading.current_thread().name.startswith(_NAME)


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    inherited = list(_current.values())
    _current.clear()
    for loop in inherited:
        loop.abandon()


def _at_exit() -> None:
    for loop in list(_current.values()):
        if loop.alive:
            loop.stop()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
