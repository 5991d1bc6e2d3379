"""torch_s3's GETs beside other clients', over the same server, in one run: ``python -m benchmarks.transport``.

Works: one large object in ranges of 8 MiB, into the same tensor, whose memory has been touched, for every client that
can write into one; 2,000 objects of 90 KB with the same number of requests in flight; the same one at a time, in eight
threads of a call at a time each, and while a thread of the caller's spins in pure Python. What each client reads is
compared with the objects' content in a warm-up round; then come interleaved rounds, of which the median counts. CPU is
this process's, user and system, over the timed part: all clients run in it, their threads included.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers import CLIENTS, Client, Work
from benchmarks.rig import object_folder, serve
from benchmarks.table import BUCKET, Row, Table, add_choice, compare, describe, parse, parser, report, show

MIB = 1 << 20
PART = 8 * MIB
SMALL = 90_000  # bytes
THREADS = 8


class _Reads(Table[Client]):
    def __init__(self, folder: Path, work: Work) -> None:
        super().__init__()
        self.folder = folder / work.bucket
        self.work = work


class Large(_Reads):
    unit, cpu_unit = "MB/s", "CPU s/GB"

    def __init__(self, folder: Path, work: Work) -> None:
        super().__init__(folder, work)
        self.title = (
            f"One object of {work.size / MIB:,.0f} MiB in ranges of {PART // MIB} MiB, {work.in_flight} in flight"
        )
        self.amount, self.cpu_scale = work.size / 1e6, 1e9 / work.size
        self._tensor = torch.empty(work.size, dtype=torch.uint8)

    def run(self, client: Client) -> None:
        client.read_large(self._tensor.numpy().data)

    def verify(self, client: Client) -> bool:
        self._tensor.fill_(0)  # forget what the client before has read
        parts = client.read_large(self._tensor.numpy().data)
        got = self._tensor.numpy() if parts is None else np.concatenate([np.frombuffer(p, np.uint8) for p in parts])
        return np.array_equal(got, np.memmap(self.folder / self.work.large, np.uint8, "r"))


class Small(_Reads):
    unit, cpu_unit = "obj/s", "CPU ms/obj"

    def __init__(self, folder: Path, work: Work) -> None:
        super().__init__(folder, work)
        self.title = f"{len(work.small):,} objects of {SMALL // 1000} KB, {self.how(work)}"
        self.amount, self.cpu_scale = len(work.small), 1e3 / len(work.small)

    def how(self, work: Work) -> str:
        return f"{work.in_flight} in flight"

    def run(self, client: Client) -> None:
        for body in self.bodies(client):
            del body  # as a consumer would before it takes the next, so that its memory can be used again

    def verify(self, client: Client) -> bool:
        got = self.bodies(client)
        return all(
            bytes(body) == (self.folder / key).read_bytes() for body, key in zip(got, self.work.small, strict=True)
        )

    def bodies(self, client: Client) -> Iterable[Any]:
        """The small objects' bytes, in order."""
        return client.read_small()


class Single(Small):
    """One small GET at a time from one thread: a call's whole way, and nothing to hide it."""

    def how(self, work: Work) -> str:
        return "one at a time"

    def bodies(self, client: Client) -> Iterable[Any]:
        return map(client.get_small, self.work.small)


class Threads(Small):
    """The synchronous call from many threads at once."""

    def how(self, work: Work) -> str:
        return f"{THREADS} threads, one at a time each"

    def bodies(self, client: Client) -> Iterable[Any]:
        with ThreadPoolExecutor(THREADS) as pool:
            yield from pool.map(client.get_small, self.work.small)


class Spinning(Small):
    """While a thread holds the GIL as long as it can, which also eats the CPU that is counted."""

    def how(self, work: Work) -> str:
        return f"{work.in_flight} in flight, beside a thread that spins in pure Python"

    def measure(self, client: Client, row: Row) -> None:
        done = threading.Event()

        def spin() -> None:
            while not done.is_set():
                pass

        spinner = threading.Thread(target=spin)
        spinner.start()
        try:
            super().measure(client, row)
        finally:
            done.set()
            spinner.join()


TABLES: dict[str, Callable[[Path, Work], Table[Client]]] = {
    "large": Large,
    "small": Small,
    "single": Single,
    "threads": Threads,
    "spinning": Spinning,
}


def main() -> None:
    made = parser("transport", __doc__, CLIENTS)
    made.add_argument("--size", type=int, default=1024, metavar="MIB", help="of the large object (default: 1024)")
    made.add_argument("--objects", type=int, default=2000, help="how many small objects (default: 2000)")
    add_choice(made, "--works", TABLES, "large,small,single")
    options = parse(made)
    in_flight = 64 if options.weather else 16
    size = options.size * MIB
    with object_folder(size + options.objects * SMALL) as folder:
        work = make_objects(folder, size, options.objects, in_flight)
        with serve(folder, tls=options.tls, weather=options.weather) as rig:
            header = describe("transport", rig, CLIENTS, options)
            show(header)
            tables = [TABLES[name](folder, work) for name in options.works]
            compare(tables, CLIENTS, rig, options, work)
    report(tables, header, options)


def make_objects(folder: Path, size: int, count: int, in_flight: int) -> Work:
    """Random bytes, the same in every run."""
    random = np.random.default_rng(0)
    (folder / BUCKET / "small").mkdir(parents=True)
    work = Work(BUCKET, "large", size, [f"small/{index:06}" for index in range(count)], PART, in_flight)
    with (folder / BUCKET / work.large).open("wb") as file:
        for start in work.starts:
            file.write(random.bytes(min(PART, size - start)))
    for key in work.small:
        (folder / BUCKET / key).write_bytes(random.bytes(SMALL))
    return work


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
