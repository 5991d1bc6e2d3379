"""How many requests to have in flight. Pure, no I/O.

More are of use as long as each takes no longer for it, as in TCP Vegas (Brakmo and Peterson, 1995): where the pipe is
full, twice as many take twice as long. Halving when throttled, and slower growth after that, are TCP's (RFC 5681).
"""

from __future__ import annotations

_START = 32
_HARM = 0.5  # of the growth in requests may be seen in the time that each takes
_HOLD = 30.0  # seconds that a width is kept before a larger one is tried again
_PAUSE = 1.0  # seconds after a throttle in which others are put down to the same load


class Width:
    """The requests that one origin gets at a time: more while that makes none of them slower, half when throttled.

    Args:
        most: Never more than these.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.limit = min(_START, most)
        self._narrower = self.limit  # the limit before
        self._usual: dict[int, float] = {}  # seconds that requests took with that, by the bits of their size
        self._times: dict[int, tuple[float, int]] = {}  # sum and number of what they take with this
        self._skip = 0  # requests that say nothing yet, for their connections are new
        self._doubts = False  # they took longer, once: a pause elsewhere is enough for that
        self._doubling = True
        self._held_until = self._throttled_at = float("-inf")

    def done(self, nbytes: int, seconds: float, now: float, *, waiting: bool) -> None:
        """Note a request that succeeded.

        Args:
            nbytes: Of its body.
            seconds: That it took.
            now: Seconds, monotonic.
            waiting: Whether others wait for their turn; where none do, fewer than the limit may be in flight.
        """
        if (self.limit == self._most and not self._usual) or not waiting or now < self._held_until:
            return
        if self._skip:
            self._skip -= 1
            return
        size = nbytes.bit_length()
        total, count = self._times.get(size, (0.0, 0))
        if count + 1 < self.limit:
            self._times[size] = total + seconds, count + 1
            return
        mean = (total + seconds) / (count + 1)
        growth = self.limit / self._narrower
        slower = mean > self._usual.get(size, mean) * (1 + _HARM * (growth - 1))
        self._times.clear()
        if slower and not self._doubts:
            self._doubts = True
            return
        self._usual.clear()
        self._doubts = False
        if slower:
            self.limit, self._held_until = self._narrower, now + _HOLD
        elif self.limit < self._most:
            self._usual[size], self._narrower = mean, self.limit
            self.limit = min(self._most, self.limit + (self.limit if self._doubling else 1 + self.limit // 4))
            self._skip = self.limit

    def throttled(self, now: float) -> None:
        """Note that the server said to slow down."""
        if now - self._throttled_at < _PAUSE:
            return
        self._throttled_at, self._held_until = now, now + 5 * _PAUSE
        self.limit = self._narrower = max(1, self.limit // 2)
        self._usual.clear()
        self._times.clear()
        self._doubling = self._doubts = False
