"""How many requests to have in flight. Pure, no I/O.

Slow start and halving are TCP's (RFC 5681), with throughput in place of loss as the sign that more are of no use.
"""

from __future__ import annotations

_START = 16
_WINDOW = 0.05  # seconds that a rate is measured over, at least
_GAP = 0.5  # seconds without an answer, which are no time to be measured
_GAIN = 0.3  # of the growth in requests must be seen in the rate
_HOLD = 10.0  # seconds at a width that was found, before a larger one is tried again
_PAUSE = 1.0  # seconds after a throttle in which others are put down to the same load
_REQUEST = 64 * 1024  # bytes that a request counts as, beyond its own


class Width:
    """The requests that one origin gets at a time: more while that brings more bytes a second, half when throttled.

    Args:
        most: Never more than these.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.limit = min(_START, most)
        self._before: tuple[int, float] | None = None  # the limit before this one, and its rate
        self._doubts = False  # it has not, once: a pause elsewhere is enough for that
        self._doubling = True
        self._settling = False  # connections are being made: what is measured says nothing yet
        self._held_until = 0.0
        self._throttled_at = float("-inf")
        self._last = float("-inf")
        self._begin(0.0)

    def done(self, nbytes: int, now: float, *, waiting: bool) -> None:
        """Note a request that succeeded.

        Args:
            nbytes: Of its body.
            now: Seconds, monotonic.
            waiting: Whether others wait for their turn; where none do, the width is not what limits the rate.
        """
        if self.limit == self._most and self._before is None:
            return  # there is nothing to find out
        before, self._last = self._last, now
        if not waiting or now - before > _GAP:  # nobody asked for more than there was
            self._begin(now)
            return
        self._amount += nbytes + _REQUEST
        self._count += 1
        if self._count < self.limit or now - self._since < _WINDOW:
            return
        rate = self._amount / (now - self._since)
        settling, self._settling = self._settling, False
        self._begin(now)
        if settling or now < self._held_until:
            return
        if self._before is not None and rate < self._enough(*self._before):
            if self._doubts:
                self.limit, self._before = self._before[0], None
                self._held_until = now + _HOLD
            self._doubts = not self._doubts
            return
        self._before, self._doubts = None, False
        if self.limit < self._most:
            self._before = self.limit, rate
            self.limit = min(self._most, self.limit + (self.limit if self._doubling else 1 + self.limit // 4))
            self._settling = True

    def throttled(self, now: float) -> None:
        """Note that the server said to slow down."""
        if now - self._throttled_at < _PAUSE:
            return
        self._throttled_at, self._held_until = now, now + _HOLD / 2
        self.limit = max(1, self.limit // 2)
        self._before, self._doubling = None, False
        self._begin(now)

    def _enough(self, limit: int, rate: float) -> float:
        return rate * (1 + _GAIN * (self.limit / limit - 1))

    def _begin(self, now: float) -> None:
        self._since, self._amount, self._count = now, 0, 0
