"""What the benchmarks share: tables of works and clients, interleaved rounds, and what they print and write."""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import resource
import shlex
import signal
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, ParamSpec, Protocol, TypeVar

import torch

from benchmarks.rig import WEATHER_FIRST_BYTE, WEATHER_RATE, Rig

OURS = "torch_s3"
BUCKET = "bench"
_libc = ctypes.CDLL(None)


class CannotRun(Exception):
    """Why a client cannot do a job here."""


class Closes(Protocol):
    def close(self) -> None: ...


C = TypeVar("C", bound=Closes)
P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class Row:
    """One client's figures for one work; ``note`` says why there are none."""

    client: str
    note: str = ""
    rates: list[float] = field(default_factory=list)  # MB/s or objects/s, a round each
    cpu: list[float] = field(default_factory=list)  # s/GB or ms/object, a round each
    extra: list[float] = field(default_factory=list)  # in the table's extra_unit, if it has one

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def cpu_cost(self) -> float:
        return statistics.median(self.cpu)


class Table(ABC, Generic[C]):
    """One work, and what came out."""

    title: str
    unit: str
    cpu_unit: str
    extra_unit = ""
    amount: float  # in the unit of the rate
    cpu_scale: float  # from a round's CPU seconds to cpu_unit
    cpu_seconds: Callable[[], float] = staticmethod(time.process_time)  # so far

    def __init__(self) -> None:
        self.rows: list[Row] = []

    @abstractmethod
    def run(self, client: C) -> Any:
        """Do all of the work once."""

    @abstractmethod
    def verify(self, client: C) -> bool:
        """As run, and compare what came out."""

    def measure(self, client: C, row: Row) -> None:
        gc.collect()
        cpu, start = self.cpu_seconds(), time.perf_counter()
        self.run(client)
        seconds, cpu = time.perf_counter() - start, self.cpu_seconds() - cpu
        row.rates.append(self.amount / seconds)
        row.cpu.append(cpu * self.cpu_scale)

    def figures(self) -> dict[str, Any]:
        medians = [{"rate": row.rate, "cpu_cost": row.cpu_cost} if not row.note else {} for row in self.rows]
        rows = [asdict(row) | found for row, found in zip(self.rows, medians, strict=True)]
        return {"title": self.title, "unit": self.unit, "cpu_unit": self.cpu_unit, "rows": rows}

    def lines(self) -> list[str]:
        ours = next((row for row in self.rows if row.client == OURS and not row.note), None)
        lines = [
            self.title,
            f"  {'':27}{self.unit:>9}  {'min-max':>15}{self.cpu_unit:>13}  ours: rate    CPU  {self.extra_unit:>8}",
        ]
        for row in self.rows:
            if row.note:
                lines.append(f"  {row.client:27}{'-':>9}  {row.note}")
                continue
            spread = f"{min(row.rates):,.0f}-{max(row.rates):,.0f}"
            line = f"  {row.client:27}{row.rate:9,.0f}  {spread:>15}{row.cpu_cost:13.3f}"
            if ours and row is not ours:
                line += f"  {ours.rate / row.rate:8.2f} x {ours.cpu_cost / row.cpu_cost:4.2f} x"
            if row.extra:
                line = f"{line:86}{statistics.median(row.extra):8,.0f}"
            lines.append(line)
        return lines


def cpu_with_children() -> float:
    """Seconds of this process, and of those that it has started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


class Bytes(Table[C]):
    """A work of so many bytes."""

    unit, cpu_unit = "MB/s", "CPU s/GB"

    def __init__(self, size: int) -> None:
        super().__init__()
        self.amount, self.cpu_scale = size / 1e6, 1e9 / size


class Loads(Bytes[C]):
    """They are loaded into this process, by whose peak of memory one sees how often they were there at once."""

    extra_unit = "MB more"

    def measure(self, client: C, row: Row) -> None:
        _libc.malloc_trim(0)  # or what the one before has freed would be used again
        before = forget_peak()
        super().measure(client, row)
        row.extra.append((memory("VmHWM") - before) / 1e6)


class Sends(Bytes[C]):
    """They are sent by processes of their own, whose :func:`figures` ``run`` returns."""

    extra_unit = "peak MiB"

    @abstractmethod
    def run(self, client: C) -> Figures: ...

    def measure(self, client: C, row: Row) -> None:
        took = self.run(client)
        row.rates.append(self.amount / took.seconds)
        row.cpu.append(took.cpu * self.cpu_scale)
        row.extra.append(took.peak / (1 << 20))


class Figures(NamedTuple):
    seconds: float
    cpu: float  # seconds
    peak: int  # bytes


def figures(work: Callable[[], object]) -> Figures:
    """What some work takes; of memory, beyond what this process has now."""
    before = forget_peak()
    cpu, start = time.process_time(), time.perf_counter()
    work()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return Figures(seconds, cpu, memory("VmHWM") - before)


def in_own_process(call: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, *args, **kwargs).result()


def forget_peak() -> int:
    """Have ``VmHWM`` begin anew, from the bytes that this process has now."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(name: str) -> int:
    """What this process has of memory, in bytes: ``VmRSS`` now, ``VmHWM`` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@dataclass(frozen=True)
class Peer(Generic[C]):
    """How a client is made, and the distribution it comes from ("" for none)."""

    make: Callable[..., C]
    distribution: str


def parser(name: str, doc: str | None, clients: Mapping[str, Peer[Any]], rounds: int = 5) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=(doc or "").split("\n")[0])
    made.add_argument("--rounds", type=int, default=rounds, help=f"timed rounds (default: {rounds})")
    add_choice(made, "--clients", names(clients))
    made.add_argument("--tls", action="store_true", help="over HTTPS")
    first = "-".join(f"{seconds * 1000:.0f}" for seconds in WEATHER_FIRST_BYTE)
    weather = f"{first} ms to the first byte, {WEATHER_RATE / 1e6:.0f} MB/s a connection"
    made.add_argument("--weather", action="store_true", help=weather)
    made.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    made.add_argument("--plot", type=Path, metavar="FILE", help="draw them (needs matplotlib)")
    return made


def add_choice(made: argparse.ArgumentParser, option: str, known: Iterable[str], default: str = "") -> None:
    """Add an option that is a list of names, given with commas: all of them by default, or some."""
    every = ",".join(known)

    def chosen(text: str) -> list[str]:
        found = text.split(",")
        if unknown := set(found) - set(every.split(",")):
            raise argparse.ArgumentTypeError(f"there is no {', '.join(sorted(unknown))}; there are {every}")
        return found

    made.add_argument(option, type=chosen, default=default or every, metavar="NAMES", help=f"some of {every}")


def need_sink(rig: Rig) -> None:
    """Exit where the server stores what it is sent."""
    if "nginx" not in rig.server.partition(" ")[0]:
        sys.exit("needs nginx with its lua module, which takes uploads without storing them")


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The options given, checked."""
    options = made.parse_args()
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        made.error("--plot needs matplotlib")
    # Ends the servers and removes the objects, as an interrupt does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return options


def names(clients: Mapping[str, Peer[Any]]) -> list[str]:
    """What --clients takes: a client may have more than one row."""
    return list(dict.fromkeys(name.partition(",")[0] for name in clients))


def compare(
    tables: Sequence[Table[C]],
    peers: Mapping[str, Peer[C]],
    rig: Rig,
    options: argparse.Namespace,
    *arguments: Any,
) -> None:
    """Fill the tables: each client made and verified, then the rounds, each begun by another client.

    Args:
        tables: What to do.
        peers: Who does it.
        rig: With which server.
        options: How often, and by whom.
        *arguments: What clients are made of beside the rig.
    """
    os.environ.update(rig.environment)
    clients: dict[str, C] = {}
    for name, peer in peers.items():
        if name.partition(",")[0] not in options.clients:
            continue
        progress(f"warm-up: {name}")
        for table in tables:
            table.rows.append(Row(name))
        with noted(*(table.rows[-1] for table in tables)):
            clients[name] = peer.make(rig, *arguments)
        for table in tables:
            row = table.rows[-1]
            with noted(row):
                if not row.note and not table.verify(clients[name]):
                    row.note = "WRONG"
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


def describe(name: str, rig: Rig, peers: Mapping[str, Peer[Any]], options: argparse.Namespace) -> dict[str, str]:
    """What a reader of the figures must know."""
    used = {peer.distribution for row, peer in peers.items() if row.partition(",")[0] in options.clients} - {""}
    header = {
        "command": shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "server": f"{rig.server}, {'HTTPS' if options.tls else 'HTTP'} on loopback, objects in {rig.folder.parent}",
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.release()} {platform.machine()}",
        "python": f"{platform.python_version()}, torch {torch.__version__}",
        "clients": ", ".join(f"{distribution} {version(distribution)}" for distribution in sorted(used)),
        "rounds": f"medians of {options.rounds}, interleaved, after one in which all that came was compared",
    }
    if options.weather:
        low, high = WEATHER_FIRST_BYTE
        header["weather"] = (
            f"{low * 1000:.0f}-{high * 1000:.0f} ms to the first byte, {WEATHER_RATE / 1e6:.0f} MB/s a connection"
        )
    return header


def show(header: Mapping[str, str]) -> None:
    """Print a header."""
    print("\n".join(f"{name}: {value}" for name, value in header.items()), flush=True)


def report(tables: Sequence[Table[Any]], header: Mapping[str, str], options: argparse.Namespace) -> None:
    """Print the tables, and write and draw them where that was asked for."""
    for table in tables:
        print("", *table.lines(), sep="\n")
    if options.json:
        results = {"header": header, "tables": [table.figures() for table in tables]}
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.plot:
        plot(tables, header, options.plot)


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "(checkout)" if distribution == "torch-s3" else "(not installed)"


def plot(tables: Sequence[Table[Any]], header: Mapping[str, str], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(tables), figsize=(6.5 * len(tables), 4.2), layout="constrained", squeeze=False)
    for axis, table in zip(axes[0], tables, strict=True):
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
