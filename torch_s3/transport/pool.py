"""One origin: the connections to it, the transfers that wait for one, and what becomes of those that fail.

Only the I/O thread is in here.
"""

from __future__ import annotations

import email.utils
import ssl
import time
from collections import deque
from typing import TYPE_CHECKING

from torch_s3 import errors
from torch_s3.transport.addresses import Addresses
from torch_s3.transport.connection import Connection, State
from torch_s3.transport.failures import final
from torch_s3.transport.lines import say
from torch_s3.transport.retry import Cause, Quota, Renew, Renewal, Retry, delay
from torch_s3.transport.target import Origin, Target
from torch_s3.transport.transfer import Transfer
from torch_s3.transport.width import Width

if TYPE_CHECKING:
    from torch_s3.transport.loop import Loop

_IDLE = 15.0  # seconds that an unused connection is kept; S3 itself closes after about 20
_CLOSED = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)  # what tells that the server has hung up
_SLOW = 4.0  # times as long as usual is a slow answer


class Pool:
    """The connections to one origin and the transfers that wait for one."""

    def __init__(self, origin: Origin, loop: Loop) -> None:
        self.origin = origin
        self._loop = loop
        self.queue: deque[Transfer] = deque()
        self._hurried: deque[Transfer] = deque()  # wait for a connection that has carried nothing yet
        # Who waits for what is found anew: what, instead of which target; the transfers, and what each is told else.
        self._renewing: list[tuple[Renewal, Target, list[tuple[Transfer, errors.S3Error]]]] = []
        self._replaced: tuple[Target, Target] | None = None  # the last that was found anew, and its successor
        self._failures = 0  # to connect, in a row
        self._closed_until = float("-inf")  # no connection is tried before
        self._idle: list[Connection] = []
        self.open: set[Connection] = set()
        self._connecting = 0
        self._width = Width(origin.max_connections)
        self._quota = Quota()
        self._clock_offset = 0.0  # seconds that the server's clock is ahead
        self._usual = 0.0  # seconds to the first byte, averaged over the last answers
        self._addresses = Addresses(origin, loop.in_background, changed=self.fill, unreachable=self._unreachable)

    @property
    def busy(self) -> bool:
        """Whether there is anything whose deadline must be watched."""
        return bool(self.open or self.queue or self._hurried or self._renewing)

    def fill(self) -> None:
        """Give waiting transfers to idle connections, and open connections for the others."""
        if self._hurried and len(self.open) >= self._width.limit:
            self._wait_with_the_others()
        while self.queue and self._idle and self._carrying < self._width.limit:
            self._next(self._idle.pop())
        while len(self.queue) + len(self._hurried) > self._connecting and len(self.open) < self._width.limit:
            if not self._open():
                return

    @property
    def _where(self) -> str:
        return f"{self.origin.scheme}://{self.origin.host}:{self.origin.port}"

    @property
    def _carrying(self) -> int:
        return len(self.open) - len(self._idle) - self._connecting

    def _wait_with_the_others(self) -> None:
        """Give up on a fresh connection for what was slow: an old one is better than none."""
        self.queue.extendleft(self._hurried)
        self._hurried.clear()

    def forget_finished(self) -> None:
        """Let go of the transfers that were cancelled while they waited."""
        self.queue = deque(transfer for transfer in self.queue if not transfer.finished)
        self._hurried = deque(transfer for transfer in self._hurried if not transfer.finished)
        for _, _, waiting in self._renewing:
            waiting[:] = [one for one in waiting if not one[0].finished]

    def close(self, connection: Connection) -> None:
        """Close a connection, whatever it does."""
        if connection in self.open:
            self.open.discard(connection)
            if connection.state < State.IDLE:
                self._connecting -= 1
            elif connection in self._idle:
                self._idle.remove(connection)
            self._loop.selector.unregister(connection.watched)
        connection.close()

    def serve(self, connection: Connection, events: int, now: float) -> None:
        """A connection's socket is ready."""
        if connection not in self.open:
            return  # closed earlier in this round
        if connection.state is State.IDLE:
            self.close(connection)  # closed by the server, or it sends what nobody asked for
            return
        transfer = connection.transfer
        if transfer is None:
            self._serve_connecting(connection)
            return
        answered = connection.answered
        try:
            done = connection.advance(events)
        except Exception as error:  # noqa: BLE001 - whatever it is belongs to this transfer, others go on
            self._failed(connection, transfer, error)
            return
        if connection.answered and not answered:
            seconds = now - transfer.began_attempt
            self._usual += 0.1 * (seconds - self._usual)
            transfer.target.stats[self._loop.number].answered(seconds)
        if not done:
            if connection.progressed():
                connection.deadline = now + transfer.patience.read_timeout
            self._watch(connection)
            return
        self._succeeded(transfer, now)
        self._free(connection)

    def _serve_connecting(self, connection: Connection) -> None:
        try:
            free = connection.connected()
        except Exception as error:  # noqa: BLE001 - see serve
            self.close(connection)
            self._unreachable(error)
            return
        if connection.sock is not connection.watched:  # the next address, or wrapped for TLS
            self._loop.selector.unregister(connection.watched)
            self._register(connection)
        else:
            self._watch(connection)
        if free:
            self._failures = 0
            self._connecting -= 1
            self._next(connection)

    def _next(self, connection: Connection) -> None:
        """Start the next waiting transfer on a connection that is free, or let it idle."""
        now = time.monotonic()
        queue = self._hurried if self._hurried and not connection.reused else self.queue
        while queue and self._carrying <= self._width.limit:  # this connection is among them
            transfer = queue.popleft()
            if transfer.finished:
                continue  # cancelled while it waited
            if self._replaced is not None and transfer.target is self._replaced[0]:
                if self._replaced[1].origin != self.origin:
                    transfer.target = self._replaced[1]
                    self._loop.resubmit(transfer)
                    continue
                transfer.target = self._replaced[1]
            patience = transfer.patience
            transfer.attempt += 1
            transfer.began_attempt = now
            self._begin(transfer, now)
            transfer.connection = connection
            connection.deadline = now + patience.first_byte_timeout
            stats = transfer.target.stats[self._loop.number]
            stats.requests += 1
            stats.connections += not connection.reused
            try:
                connection.start(transfer, time.time() + self._clock_offset)
            except Exception as error:  # noqa: BLE001 - see serve
                self._failed(connection, transfer, error)
                return
            self._watch(connection)
            return
        connection.deadline = now + _IDLE
        self._idle.append(connection)

    def _begin(self, transfer: Transfer, now: float) -> None:
        if not transfer.began:
            transfer.began, transfer.deadline = now, now + transfer.target.patience.total_timeout

    def _open(self) -> bool:
        """Begin a connection; false where that must wait for the addresses, or failed."""
        now = time.monotonic()
        if now < self._closed_until or (self._failures and self._connecting):
            return False
        addresses = self._addresses.next(now)
        if not addresses:
            return False
        try:
            connection = Connection(self.origin, addresses)
        except OSError as error:
            self._unreachable(error)
            return False
        connection.pool = self
        connection.deadline = now + self.origin.connect_timeout
        self._connecting += 1
        self.open.add(connection)
        self._register(connection)
        return True

    def _free(self, connection: Connection) -> None:
        """A connection is done with its transfer, whose whole answer it has read."""
        connection.idle()
        if connection.keep:
            self._watch(connection)
            self._next(connection)
        else:
            self.close(connection)
            self.fill()

    def _watch(self, connection: Connection) -> None:
        if connection.wants != connection.watched_for:
            self._loop.selector.modify(connection.sock, connection.wants, connection)
            connection.watched_for = connection.wants

    def _register(self, connection: Connection) -> None:
        self._loop.selector.register(connection.sock, connection.wants, connection)
        connection.watched, connection.watched_for = connection.sock, connection.wants

    # ------------------------------------------------------------------ what becomes of transfers

    def _succeeded(self, transfer: Transfer, now: float) -> None:
        stats = transfer.target.stats[self._loop.number]
        nbytes = transfer.nbytes
        stats.received += nbytes
        stats.sent += len(transfer.body)
        self._quota.give_back(transfer.paid)
        seconds = now - transfer.began_attempt
        self._width.done(nbytes + len(transfer.body), seconds, now, waiting=bool(self.queue))
        self._loop.finish(transfer)

    def _failed(self, connection: Connection, transfer: Transfer, error: Exception) -> None:
        """A transfer's attempt failed: try again, or hand it back with its error."""
        stale = connection.reused and not connection.answered and isinstance(error, _CLOSED)
        if connection.state is State.BODY and not connection.whole:
            transfer.interrupted(connection.missing)
        transfer.connection = None
        if connection.whole and connection.keep:
            self._free(connection)
        else:
            self.close(connection)
        if stale:  # the server had closed the idle connection: this says nothing about the request
            transfer.attempt -= 1
            self.queue.appendleft(transfer)
        else:
            self._retry(transfer, error)
        self.fill()

    def _retry(self, transfer: Transfer, error: Exception) -> None:
        if isinstance(error, Renew):
            self._renew(transfer, error)
            return
        if isinstance(error, OSError) and not isinstance(error, (errors.S3Error, ssl.SSLCertVerificationError)):
            cause = Cause.TIMEOUT if isinstance(error, TimeoutError) else Cause.CONNECTION
            error = Retry(cause, error.strerror or str(error))
        if not isinstance(error, Retry):
            self._give_up(transfer, final(error, uri=transfer.uri, range=transfer.range))
            return
        now = time.monotonic()
        if error.cause is Cause.THROTTLE:
            self._width.throttled(now)
        stats = transfer.target.stats[self._loop.number]
        wait = transfer.until_next(error, now, quota=self._quota, rng=self._loop.rng, stats=stats)
        if isinstance(wait, errors.S3Error):
            self._give_up(transfer, wait)
        else:
            self._loop.later(now + wait, transfer)

    def _give_up(self, transfer: Transfer, error: errors.S3Error) -> None:
        transfer.target.stats[self._loop.number].failed += 1
        self._loop.finish(transfer, error)

    def _renew(self, transfer: Transfer, refused: Renew) -> None:
        """Find out anew what the server refuses, and try again: once each for credentials, clock and place."""
        if refused.renewal in transfer.renewed:
            self._give_up(transfer, refused.error)
            return
        transfer.renewed += (refused.renewal,)
        transfer.attempt -= 1
        transfer.target.stats[self._loop.number].retries[refused.renewal.value] += 1
        say("%s: %s: again with the %s found anew", transfer.uri, str(refused), refused.renewal.value)
        if refused.renewal is Renewal.CLOCK:
            said = email.utils.parsedate_tz(refused.hint)
            if said is None:
                self._give_up(transfer, refused.error)
                return
            self._clock_offset = email.utils.mktime_tz(said) - time.time()
            self.queue.appendleft(transfer)
            return

        target, bucket = transfer.target, transfer.bucket
        for renewal, asked, waiting in self._renewing:
            if renewal is refused.renewal and asked is target:
                waiting.append((transfer, refused.error))
                return
        waiting = [(transfer, refused.error)]
        entry = (refused.renewal, target, waiting)
        self._renewing.append(entry)

        def done(answer: Target | Exception) -> None:
            self._renewing = [each for each in self._renewing if each is not entry]
            if isinstance(answer, Target):
                self._replaced = target, answer
            for one, error in waiting:
                if one.finished:
                    continue  # cancelled meanwhile, or too late
                if isinstance(answer, Target):
                    one.target = answer
                    self._loop.resubmit(one)
                else:
                    self._give_up(one, error)

        self._loop.in_background("renew", lambda: target.renew(target, bucket, refused), done)

    def _unreachable(self, error: Exception) -> None:
        """No connection could be made. Where none is open either, that is a failed attempt of everyone who waits.

        They go on waiting, and connections are tried one at a time, less and less often.
        """
        self._addresses.distrust()
        now = time.monotonic()
        if len(self.open) > self._connecting:
            self._wait_with_the_others()
            return
        if now < self._closed_until:
            return  # another connection of the same moment
        self._wait_with_the_others()
        waiting, self.queue = [transfer for transfer in self.queue if not transfer.finished], deque()
        if isinstance(error, ssl.SSLCertVerificationError):  # as it will be the next time
            for transfer in waiting:
                self._give_up(transfer, final(error, uri=transfer.uri, range=transfer.range))
            return
        cause = Cause.TIMEOUT if isinstance(error, TimeoutError) else Cause.CONNECTION
        reason = str(error)
        if cause is Cause.CONNECTION:
            reason = f"no connection to {self._where}: {getattr(error, 'strerror', None) or error}"
        self._failures += 1
        self._closed_until = now + delay(cause, self._failures, self._loop.rng)
        say("%s, again in %.2f s", reason, self._closed_until - now)
        for transfer in waiting:
            self._begin(transfer, now)
            transfer.attempt += 1
            if transfer.attempt >= transfer.target.patience.attempts:
                self._give_up(transfer, transfer.given_up(cause, reason, now))
            elif transfer.deadline <= self._closed_until:
                self._give_up(transfer, self._late(transfer, now))
            else:
                transfer.target.stats[self._loop.number].retries[cause.value] += 1
                self.queue.append(transfer)
        if not self.queue:
            self._failures, self._closed_until = 0, float("-inf")  # who comes next tries at once

    def look_at_deadlines(self, now: float) -> None:
        """Give up what has waited too long, and send what is slow to answer a second time."""
        for connection in list(self.open):
            transfer = connection.transfer
            if transfer is not None:
                self._look_at(connection, transfer, now)
            elif connection.deadline < now:
                self.close(connection)
                if connection.state < State.IDLE:
                    seconds = self.origin.connect_timeout
                    self._unreachable(TimeoutError(f"no connection to {self._where} within {seconds:g} s"))
        for _, _, waiting in self._renewing:
            for waiter, _ in waiting:
                if waiter.deadline < now and not waiter.finished:
                    self._give_up(waiter, self._late(waiter, now))
        self._addresses.look(now)
        self.fill()

    def _late(self, transfer: Transfer, now: float) -> errors.S3Error:
        return transfer.given_up(Cause.TIMEOUT, f"not done within {transfer.target.patience.total_timeout:g} s", now)

    def _look_at(self, connection: Connection, transfer: Transfer, now: float) -> None:
        patience = transfer.patience
        if transfer.deadline < now:
            self._failed(connection, transfer, self._late(transfer, now))
        elif connection.deadline < now:
            waited = patience.read_timeout if connection.answered or connection.sending else patience.first_byte_timeout
            self._failed(connection, transfer, TimeoutError(f"no progress for {waited:g} s"))
        elif (
            transfer.small
            and not (connection.answered or transfer.hurried)
            and now - transfer.began_attempt > max(patience.slow_after, _SLOW * self._usual)
        ):
            # Another of the service's hosts may answer at once. This isn't counted as an attempt.
            self.close(connection)
            transfer.connection, transfer.hurried = None, True
            transfer.attempt -= 1
            transfer.target.stats[self._loop.number].slow += 1
            say("%s: slow to answer, again on a fresh connection", transfer.uri)
            self._hurried.append(transfer)
