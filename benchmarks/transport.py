"""torch_s3's GETs beside other clients', over the same server, in one run: ``python -m benchmarks.transport``.

Two works: one large object in ranges of 8 MiB, into the same tensor, whose memory has been touched, for every client
that can write into one; and 2,000 objects of 90 KB. Every client has the same number of requests in flight. What each
reads is compared with the objects' content in a warm-up round; then come interleaved rounds, of which the median
counts. CPU is this process's, user and system, over the timed part: all clients run in it, their threads included.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers import CLIENTS, CannotRun, Client, Work
from benchmarks.rig import WEATHER_FIRST_BYTE, WEATHER_RATE, Rig, object_folder, serve

MIB = 1 << 20
PART = 8 * MIB
SMALL = 90_000  # bytes
BUCKET = "bench"
OURS = "torch_s3"


@dataclass
class Row:
    """One client's figures for one work; ``note`` says why there are none."""

    client: str
    note: str = ""
    rates: list[float] = field(default_factory=list)  # MB/s or objects/s, a round each
    cpu: list[float] = field(default_factory=list)  # s/GB or ms/object, a round each

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def cpu_cost(self) -> float:
        return statistics.median(self.cpu)


class Table:
    """One work, and what came out."""

    title: str
    unit: str
    cpu_unit: str
    amount: float  # in the unit of the rate
    cpu_scale: float  # from a round's CPU seconds to cpu_unit

    def __init__(self, folder: Path, work: Work) -> None:
        self.folder = folder / work.bucket
        self.work = work
        self.rows: list[Row] = []

    def run(self, client: Client) -> None:
        """Read everything once, and drop it."""
        raise NotImplementedError

    def verify(self, client: Client) -> bool:
        """As run, and compare every byte."""
        raise NotImplementedError

    def measure(self, client: Client, row: Row) -> None:
        gc.collect()
        cpu, start = time.process_time(), time.perf_counter()
        self.run(client)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        row.rates.append(self.amount / seconds)
        row.cpu.append(cpu * self.cpu_scale)

    def figures(self) -> dict[str, Any]:
        medians = [{"rate": row.rate, "cpu_cost": row.cpu_cost} if not row.note else {} for row in self.rows]
        rows = [asdict(row) | found for row, found in zip(self.rows, medians, strict=True)]
        return {"title": self.title, "unit": self.unit, "cpu_unit": self.cpu_unit, "rows": rows}

    def lines(self) -> list[str]:
        ours = next((row for row in self.rows if row.client == OURS and not row.note), None)
        lines = [self.title, f"  {'':27}{self.unit:>9}  {'min-max':>15}{self.cpu_unit:>13}  ours: rate    CPU"]
        for row in self.rows:
            if row.note:
                lines.append(f"  {row.client:27}{'-':>9}  {row.note}")
                continue
            spread = f"{min(row.rates):,.0f}-{max(row.rates):,.0f}"
            line = f"  {row.client:27}{row.rate:9,.0f}  {spread:>15}{row.cpu_cost:13.3f}"
            if ours and row is not ours:
                line += f"  {ours.rate / row.rate:8.2f} x {ours.cpu_cost / row.cpu_cost:4.2f} x"
            lines.append(line)
        return lines


class Large(Table):
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


class Small(Table):
    unit, cpu_unit = "obj/s", "CPU ms/obj"

    def __init__(self, folder: Path, work: Work) -> None:
        super().__init__(folder, work)
        self.title = f"{len(work.small):,} objects of {SMALL // 1000} KB, {work.in_flight} in flight"
        self.amount, self.cpu_scale = len(work.small), 1e3 / len(work.small)

    def run(self, client: Client) -> None:
        for body in client.read_small():
            del body  # as a consumer would before it takes the next, so that its memory can be used again

    def verify(self, client: Client) -> bool:
        got = client.read_small()
        return all(
            bytes(body) == (self.folder / key).read_bytes() for body, key in zip(got, self.work.small, strict=True)
        )


def main() -> None:
    options = parse()
    # Ends the servers and removes the objects, as an interrupt does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    size = options.size * MIB
    with object_folder(size + options.objects * SMALL) as folder:
        work = make_objects(folder, size, options.objects, 64 if options.weather else 16)
        with serve(folder, tls=options.tls, weather=options.weather) as rig:
            header = describe(rig, work, options)
            print("\n".join(f"{name}: {value}" for name, value in header.items()), flush=True)
            os.environ.update(rig.environment)
            tables: list[Table] = [Large(folder, work), Small(folder, work)]
            compare(tables, rig, work, options)
    for table in tables:
        print("", *table.lines(), sep="\n")
    if options.json:
        results = {"header": header, "tables": [table.figures() for table in tables]}
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.plot:
        plot(tables, header, options.plot)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transport", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=int, default=1024, metavar="MIB", help="of the large object (default: 1024)")
    parser.add_argument("--objects", type=int, default=2000, help="how many small objects (default: 2000)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--clients", default="", help=f"some of, with commas: {','.join(names())}")
    parser.add_argument("--tls", action="store_true", help="over HTTPS")
    first = "-".join(f"{seconds * 1000:.0f}" for seconds in WEATHER_FIRST_BYTE)
    weather = f"{first} ms to the first byte, {WEATHER_RATE / 1e6:.0f} MB/s a connection, 64 in flight instead of 16"
    parser.add_argument("--weather", action="store_true", help=weather)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them (needs matplotlib)")
    options = parser.parse_args()
    options.clients = options.clients.split(",") if options.clients else names()
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib")
    if unknown := set(options.clients) - set(names()):
        parser.error(f"no such client: {', '.join(sorted(unknown))}; there are {', '.join(names())}")
    return options


def names() -> list[str]:
    """What --clients takes: a client may have more than one row."""
    return list(dict.fromkeys(name.partition(",")[0] for name in CLIENTS))


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


def compare(tables: Sequence[Table], rig: Rig, work: Work, options: argparse.Namespace) -> None:
    """Fill the tables: each client made and verified, then the rounds, each begun by another client."""
    clients: dict[str, Client] = {}
    for name, (kind, _) in CLIENTS.items():
        if name.partition(",")[0] not in options.clients:
            continue
        progress(f"warm-up: {name}")
        for table in tables:
            table.rows.append(Row(name))
        with noted(*(table.rows[-1] for table in tables)):
            clients[name] = kind(rig, work)
        for table in tables:
            row = table.rows[-1]
            with noted(row):
                if not row.note and not table.verify(clients[name]):
                    row.note = "WRONG BYTES"
    for table in tables:
        for number in range(options.rounds):
            at = number % len(table.rows)
            for row in table.rows[at:] + table.rows[:at]:
                progress(f"round {number + 1} of {options.rounds}: {row.client}")
                with noted(row):
                    if not row.note:
                        table.measure(clients[row.client], row)
    progress("")
    for client in clients.values():
        client.close()


@contextmanager
def noted(*rows: Row) -> Iterator[None]:
    """A client that fails is a row that says so."""
    try:
        yield
    except CannotRun as error:
        why = str(error)
    except ImportError as error:
        why = f"not installed: {error}"
    except Exception as error:  # noqa: BLE001 - whatever it is, the others go on
        why = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    else:
        return
    for row in rows:
        row.note = why


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def describe(rig: Rig, work: Work, options: argparse.Namespace) -> dict[str, str]:
    used = {dist for name, (_, dist) in CLIENTS.items() if dist and name.partition(",")[0] in options.clients}
    header = {
        "command": shlex.join(["python", "-m", "benchmarks.transport", *sys.argv[1:]]),
        "server": f"{rig.server}, {'HTTPS' if options.tls else 'HTTP'} on loopback, objects in {rig.folder.parent}",
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.release()} {platform.machine()}",
        "python": f"{platform.python_version()}, torch {torch.__version__}",
        "clients": ", ".join(f"{dist} {version(dist)}" for dist in sorted(used)),
        "rounds": f"medians of {options.rounds}, interleaved, after one in which all bytes were compared",
    }
    if options.weather:
        low, high = WEATHER_FIRST_BYTE
        header["weather"] = (
            f"{low * 1000:.0f}-{high * 1000:.0f} ms to the first byte, {WEATHER_RATE / 1e6:.0f} MB/s a connection; "
            f"{work.in_flight} in flight / mean latency = {work.in_flight / ((low + high) / 2):,.0f} obj/s"
        )
    return header


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "(checkout)" if distribution == "torch-s3" else "(not installed)"


def plot(tables: Sequence[Table], header: dict[str, str], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(tables), figsize=(6.5 * len(tables), 4.2), layout="constrained")
    for axis, table in zip(axes, tables, strict=True):
        measured = [row for row in reversed(table.rows) if not row.note]
        colors = ["tab:orange" if row.client == OURS else "tab:gray" for row in measured]
        bars = axis.barh([row.client for row in measured], [row.rate for row in measured], color=colors)
        cpu_unit = table.cpu_unit.removeprefix("CPU ")
        labels = [f" {row.rate:,.0f}   (CPU {row.cpu_cost:.3g} {cpu_unit})" for row in measured]
        axis.bar_label(bars, labels, fontsize=8)
        axis.margins(x=0.5)
        axis.set(title=table.title, xlabel=table.unit)
        axis.title.set_fontsize(10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"{header['command']}\n{header['server']}; {header['machine']}", fontsize=7)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
