"""The process's one I/O thread: a selector over every connection, its timers, and the queue of transfers.

Callers append to an inbox and wake the thread; only the thread touches sockets, pools and transfers in flight, so there
is nothing to lock. A forked child gets a loop of its own when it first needs one; what it inherited of its parent's is
closed, not used.

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
import ssl
import threading
import time
from collections import deque
from collections.abc import Sequence
from queue import SimpleQueue

from torch_s3 import errors
from torch_s3.transport.connection import Address, Connection, State
from torch_s3.transport.failures import final, given_up
from torch_s3.transport.pool import Pool, lookup
from torch_s3.transport.retry import Cause, Retry, delay
from torch_s3.transport.transfer import Origin, Transfer

log = logging.getLogger("torch_s3")

_TICK = 0.25  # seconds between looks at the deadlines while anything is under way
_IDLE = 15.0  # seconds that an unused connection is kept; S3 itself closes after about 20
_FRESH = 30.0  # seconds that resolved addresses are used before they are looked up again, in the background


class Loop:
    """One I/O thread. Use :func:`running`, which gives the process's."""

    def __init__(self) -> None:
        self._inbox: deque[tuple[str, object]] = deque()
        self._pools: dict[Origin, Pool] = {}
        self._timers: list[tuple[float, int, Transfer]] = []
        self._numbers = itertools.count()
        self._rng = random.Random()
        self._selector = selectors.DefaultSelector()
        self._waker, self._wakened = socket.socketpair()
        self._waker.setblocking(False)
        self._wakened.setblocking(False)
        self._selector.register(self._wakened, selectors.EVENT_READ, None)
        self._taken: set[Transfer] = set()  # and not finished
        self._finished: list[tuple[SimpleQueue[Transfer], Transfer]] = []  # and not handed back
        self._asleep = False
        self._stopping = False
        self._next_look = 0.0
        self.alive = True
        self._thread = threading.Thread(target=self._run, name="torch_s3-io", daemon=True)
        self._thread.start()

    def submit(self, transfers: Sequence[Transfer]) -> None:
        """Queue transfers, in this order. Any thread."""
        self._tell("submit", transfers)

    def cancel(self, transfers: Sequence[Transfer]) -> None:
        """Give up transfers; each comes back through its sink, finished. Any thread."""
        self._tell("cancel", transfers)

    def is_current_thread(self) -> bool:
        """Whether this is the I/O thread, where waiting for it would last for ever. Garbage is collected anywhere."""
        return threading.current_thread() is self._thread

    def stop(self) -> None:
        """End the thread; what is under way comes back cancelled. Any thread but the loop's own."""
        self._stopping = True
        self._tell("stop", None)
        self._thread.join()

    def abandon(self) -> None:
        """In a forked child: close what was inherited, without disturbing the parent's connections."""
        for pool in self._pools.values():
            for connection in pool.open:
                connection.sock.close()
        self._selector.close()
        self._waker.close()
        self._wakened.close()

    def _tell(self, what: str, payload: object) -> None:
        self._inbox.append((what, payload))
        if self._asleep:
            try:
                self._waker.send(b"\0")
            except BlockingIOError:
                pass  # it is being woken already
            except OSError:
                pass  # it has ended; below
        if not self.alive:
            self._refuse_inbox()

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        reason = "the interpreter is exiting"
        try:
            while not self._stopping:
                self._turn()
        except BaseException as error:  # a bug: nobody may wait for ever because of it
            log.exception("the I/O thread failed")
            reason = f"the I/O thread failed: {error!r}"
        finally:
            self.alive = False
            self._fail_everything(reason)
            self._refuse_inbox()

    def _turn(self) -> None:
        """One round: take what callers sent, start what can start, wait, and serve the sockets that are ready."""
        while self._inbox:
            self._take(*self._inbox.popleft())
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            transfer = heapq.heappop(self._timers)[2]
            if not transfer.finished:
                pool = self._pool(transfer.target.origin)
                pool.queue.append(transfer)
                self._fill(pool)
        if now >= self._next_look:
            self._look_at_deadlines(now)
            self._next_look = now + _TICK
        busy = any(pool.open or pool.queue for pool in self._pools.values())
        timeout = _TICK if busy else None
        if self._timers:
            timeout = min(timeout or 60.0, max(0.0, self._timers[0][0] - now))
        self._hand_back()
        self._asleep = True
        if self._inbox:
            timeout = 0.0  # came in between
        ready = self._selector.select(timeout)
        self._asleep = False
        now = time.monotonic()
        for key, events in ready:
            if key.data is None:
                self._wakened.recv(4096)
            else:
                self._serve(key.data, events, now)

    def _finish(self, transfer: Transfer, error: BaseException | None = None) -> None:
        self._finished.append((transfer.finish(error), transfer))
        self._taken.discard(transfer)

    def _hand_back(self) -> None:
        """Give finished transfers to their callers: once a round, for each wake-up makes threads fight for the GIL."""
        for sink, transfer in self._finished:
            sink.put(transfer)
        self._finished.clear()

    def _take(self, what: str, payload: object) -> None:
        pools: dict[Origin, Pool] = {}  # that may have something to start now
        if what == "submit":
            self._taken.update(payload)  # type: ignore[arg-type]
            for transfer in payload:  # type: ignore[attr-defined]
                pool = self._pool(transfer.target.origin)
                pool.queue.append(transfer)
                pools[pool.origin] = pool
        elif what == "cancel":
            for transfer in payload:  # type: ignore[attr-defined]
                if not transfer.finished:
                    pool = self._pool(transfer.target.origin)
                    pools[pool.origin] = pool
                    if transfer.connection is not None:
                        self._close(transfer.connection)
                    self._finish(transfer, _ended(transfer, "cancelled"))
            # Nothing keeps their memory: not those who waited their turn, nor those who waited for a retry.
            for pool in pools.values():
                pool.queue = deque(transfer for transfer in pool.queue if not transfer.finished)
            self._timers = [timer for timer in self._timers if not timer[2].finished]
            heapq.heapify(self._timers)
        elif what == "resolved":
            self._resolved(*payload)  # type: ignore[misc]
        for pool in pools.values():
            self._fill(pool)

    def _pool(self, origin: Origin) -> Pool:
        pool = self._pools.get(origin)
        if pool is None:
            pool = self._pools[origin] = Pool(origin)
        return pool

    def _fill(self, pool: Pool) -> None:
        """Give waiting transfers to idle connections, and open connections for the others."""
        while pool.queue and pool.idle:
            self._next(pool, pool.idle.pop())
        limit = pool.origin.max_connections
        while len(pool.queue) > pool.connecting and len(pool.open) < limit:
            if not self._open(pool):
                return

    def _next(self, pool: Pool, connection: Connection) -> None:
        """Start the next waiting transfer on a connection that is free, or let it idle."""
        while pool.queue:
            transfer = pool.queue.popleft()
            if transfer.finished:
                continue  # cancelled while it waited
            now = time.monotonic()
            transfer.attempt += 1
            transfer.began = transfer.began or now
            transfer.connection = connection
            connection.deadline = now + pool.origin.read_timeout
            wanted = connection.wants
            try:
                connection.start(transfer)
            except Exception as error:  # noqa: BLE001 - whatever it is belongs to this transfer
                self._failed(connection, transfer, error)
                return
            self._watch(connection, wanted)
            return
        connection.deadline = time.monotonic() + _IDLE
        pool.idle.append(connection)

    def _open(self, pool: Pool) -> bool:
        """Begin a connection; false where that must wait for the addresses, or failed."""
        now = time.monotonic()
        if now - pool.resolved_at > _FRESH and not pool.resolving:
            self._resolve(pool)
        if not pool.addresses:
            return False
        pool.addresses.append(pool.addresses.pop(0))  # spread over them
        try:
            connection = Connection(pool.origin, pool.addresses)
        except OSError as error:
            self._unreachable(pool, error)
            return False
        connection.deadline = now + pool.origin.connect_timeout
        pool.connecting += 1
        pool.open.add(connection)
        self._register(connection)
        return True

    def _serve(self, connection: Connection, events: int, now: float) -> None:
        """A connection's socket is ready."""
        pool = self._pools[connection.origin]
        if connection not in pool.open:
            return  # closed earlier in this round
        wanted = connection.wants
        if connection.state is State.IDLE:
            self._close(connection)  # closed by the server, or it sends what nobody asked for
            return
        transfer = connection.transfer
        try:
            if transfer is None:
                free = connection.connected()
                if connection.sock is not connection.watched:  # the next address, or wrapped for TLS
                    self._selector.unregister(connection.watched)
                    self._register(connection)
                    wanted = connection.wants
                if not free:
                    self._watch(connection, wanted)
                    return
                pool.connecting -= 1
            else:
                connection.deadline = now + pool.origin.read_timeout
                if not connection.advance(events):
                    self._watch(connection, wanted)
                    return
                connection.idle()
                self._finish(transfer)
                if not connection.keep:
                    self._close(connection)
                    self._fill(pool)
                    return
        except Exception as error:  # noqa: BLE001 - whatever it is belongs to this transfer, others go on
            if transfer is None:
                self._close(connection)
                self._unreachable(pool, error)
            else:
                self._failed(connection, transfer, error)
            return
        self._watch(connection, wanted)
        self._next(pool, connection)

    def _watch(self, connection: Connection, wanted: int) -> None:
        if connection.wants != wanted:
            self._selector.modify(connection.sock, connection.wants, connection)

    def _register(self, connection: Connection) -> None:
        self._selector.register(connection.sock, connection.wants, connection)
        connection.watched = connection.sock

    def _close(self, connection: Connection) -> None:
        pool = self._pools[connection.origin]
        if connection in pool.open:
            pool.open.discard(connection)
            if connection.state < State.IDLE:
                pool.connecting -= 1
            elif connection in pool.idle:
                pool.idle.remove(connection)
            self._selector.unregister(connection.watched)
        connection.close()

    # ------------------------------------------------------------------ failures

    def _failed(self, connection: Connection, transfer: Transfer, error: Exception) -> None:
        """A transfer's attempt failed: try again, or hand it back with its error."""
        pool = self._pools[connection.origin]
        stale = connection.reused and not connection.answered and isinstance(error, ConnectionError)
        self._close(connection)
        transfer.connection = None
        if stale:  # the server had closed the idle connection: this says nothing about the request
            transfer.attempt -= 1
            pool.queue.appendleft(transfer)
        else:
            self._retry(transfer, error)
        self._fill(pool)

    def _retry(self, transfer: Transfer, error: Exception) -> None:
        if isinstance(error, Retry):
            cause = error.cause
        elif isinstance(error, OSError) and not isinstance(error, (errors.S3Error, ssl.SSLCertVerificationError)):
            cause = Cause.TIMEOUT if isinstance(error, TimeoutError) else Cause.CONNECTION
        else:
            self._finish(transfer, final(error, uri=transfer.uri, range=transfer.range))
            return
        if transfer.attempt >= transfer.target.attempts:
            tries = (transfer.attempt, transfer.target.attempts, time.monotonic() - transfer.began)
            error = given_up(cause, error, *tries, uri=transfer.uri, range=transfer.range)
            self._finish(transfer, error)
            return
        wait = delay(cause, transfer.attempt, self._rng)
        log.debug("%s: %s (attempt %d), again in %.2f s", transfer.uri, error, transfer.attempt, wait)
        heapq.heappush(self._timers, (time.monotonic() + wait, next(self._numbers), transfer))

    def _unreachable(self, pool: Pool, error: Exception) -> None:
        """No connection could be made. Where none is open either, that is a failed attempt of everyone who waits."""
        pool.resolved_at = float("-inf")
        if len(pool.open) > pool.connecting:
            return
        now = time.monotonic()
        waiting = list(pool.queue)
        pool.queue.clear()
        for transfer in waiting:
            if not transfer.finished:
                transfer.attempt += 1
                transfer.began = transfer.began or now
                self._retry(transfer, error)

    def _look_at_deadlines(self, now: float) -> None:
        for pool in list(self._pools.values()):
            for connection in [c for c in pool.open if c.deadline < now]:
                transfer = connection.transfer
                if connection.state is State.IDLE:
                    self._close(connection)
                elif transfer is None:
                    self._close(connection)
                    seconds = pool.origin.connect_timeout
                    where = f"{pool.origin.host}:{pool.origin.port}"
                    self._unreachable(pool, TimeoutError(f"no connection to {where} within {seconds:g} s"))
                else:
                    self._failed(connection, transfer, TimeoutError(f"no byte came for {pool.origin.read_timeout:g} s"))
            self._fill(pool)

    def _fail_everything(self, reason: str) -> None:
        for pool in self._pools.values():
            for connection in pool.open:
                connection.close()
        for transfer in list(self._taken):
            self._finish(transfer, _ended(transfer, reason))
        self._hand_back()
        self._selector.close()
        self._wakened.close()
        self._waker.close()

    def _refuse_inbox(self) -> None:
        """Hand back what came after the end."""
        while self._inbox:
            try:
                what, payload = self._inbox.popleft()
            except IndexError:
                return
            for transfer in payload if what in ("submit", "cancel") else ():  # type: ignore[attr-defined]
                if not transfer.finished:
                    transfer.finish(_ended(transfer, "the I/O thread has ended")).put(transfer)

    # ------------------------------------------------------------------ addresses

    def _resolve(self, pool: Pool) -> None:
        """Look the host up: at once where it is a number, else in a thread, for the system's resolver blocks."""
        host, port = pool.origin.host, pool.origin.port
        try:
            self._resolved(pool, lookup(host, port, socket.AI_NUMERICHOST))
        except (OSError, UnicodeError):
            pool.resolving = True

            def look_up() -> None:
                try:
                    answer: list[Address] | OSError = lookup(host, port)
                except OSError as error:
                    answer = ConnectionError(f"cannot resolve {host!r}: {error.strerror or error}")
                except Exception as error:  # noqa: BLE001 - those who wait must hear of it: UnicodeError is one
                    answer = ConnectionError(f"cannot resolve {host!r}: {error}")
                self._tell("resolved", (pool, answer))

            threading.Thread(target=look_up, name="torch_s3-dns", daemon=True).start()

    def _resolved(self, pool: Pool, answer: list[Address] | OSError) -> None:
        waited = pool.resolving
        pool.resolving = False
        if isinstance(answer, list):
            pool.addresses, pool.resolved_at = answer, time.monotonic()
        elif not pool.addresses:
            self._unreachable(pool, answer)
        if waited:
            self._fill(pool)


def _ended(transfer: Transfer, reason: str) -> errors.S3Error:
    return errors.S3Error(reason, uri=transfer.uri, range=transfer.range)


_current: Loop | None = None
_lock = threading.Lock()


def running() -> Loop:
    """This process's loop, started when first needed, and again should it have failed."""
    global _current
    loop = _current
    if loop is None or not loop.alive:
        with _lock:
            if _current is None or not _current.alive:
                _current = Loop()
            loop = _current
    return loop


def _after_fork() -> None:
    global _current, _lock
    _lock = threading.Lock()
    inherited, _current = _current, None
    if inherited is not None:
        inherited.abandon()


def _at_exit() -> None:
    if _current is not None and _current.alive:
        _current.stop()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
