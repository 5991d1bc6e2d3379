"""Loading estimators beside other clients, over the same server, in one run: ``python -m benchmarks.artifacts``.

Works: an estimator of 500 MB of float64 as joblib writes it; the same as skops; a forest, whose trees are made anew
out of what comes. What each client loads is compared with what was saved in a warm-up round; then come interleaved
rounds, of which the median counts. CPU is this process's, user and system. "MB more" is by how much the process's peak
memory rose while it loaded.
"""

from __future__ import annotations

import ctypes
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.checkpoint import memory
from benchmarks.peers import boto3_client, s3fs_filesystem
from benchmarks.rig import Rig, object_folder, serve
from benchmarks.table import BUCKET, Peer, Row, Table, compare, describe, parse, parser, report, show

_libc = ctypes.CDLL(None)
_MATRICES = 8


@dataclass(frozen=True)
class Work:
    """What there is to load."""

    folder: Path

    def path(self, name: str) -> Path:
        """Of a local file, in the page cache or in memory."""
        return self.folder / BUCKET / name


class Client(Protocol):
    def load(self, name: str) -> Any:
        """What a file holds."""

    def close(self) -> None: ...


class _Client:
    def __init__(self, rig: Rig, work: Work) -> None:
        self.rig, self.work = rig, work

    def file(self, name: str) -> Any:
        """A file to load from."""
        raise NotImplementedError

    def load(self, name: str) -> Any:
        with self.file(name) as file:
            if name.endswith(".skops"):
                return import_module("skops.io").load(file)
            return import_module("joblib").load(file)

    def close(self) -> None: ...


class TorchS3(_Client):
    def __init__(self, rig: Rig, work: Work) -> None:
        super().__init__(rig, work)
        self._load = import_module("torch_s3.artifacts").load_estimator
        self._fs = import_module("torch_s3").S3FileSystem(**rig.storage_options, skip_instance_cache=True)

    def load(self, name: str) -> Any:
        return self._load(f"s3://{BUCKET}/{name}", trusted=["sklearn"], filesystem=self._fs)


class Local(_Client):
    """The libraries' own loading of a local file: the limit."""

    def file(self, name: str) -> Any:
        return self.work.path(name).open("rb")


class Boto3(_Client):
    def __init__(self, rig: Rig, work: Work) -> None:
        super().__init__(rig, work)
        self._client = boto3_client(rig, 64)

    def file(self, name: str) -> Any:
        buffer = io.BytesIO()
        self._client.download_fileobj(BUCKET, name, buffer)
        buffer.seek(0)
        return buffer


class S3Fs(_Client):
    def __init__(self, rig: Rig, work: Work) -> None:
        super().__init__(rig, work)
        self._fs = s3fs_filesystem(rig, 64)

    def file(self, name: str) -> Any:
        return self._fs.open(f"{BUCKET}/{name}")


CLIENTS: dict[str, Peer[Client]] = {
    "torch_s3": Peer(TorchS3, "torch-s3"),
    "local file": Peer(Local, "joblib"),
    "boto3": Peer(Boto3, "boto3"),
    "s3fs": Peer(S3Fs, "s3fs"),
}


class Whole(Table[Client]):
    unit, cpu_unit, extra_unit = "MB/s", "CPU s/GB", "MB more"

    def __init__(self, work: Work, title: str, name: str) -> None:
        super().__init__()
        size = work.path(name).stat().st_size
        self.title, self.name = f"{size / 1e6:.0f} MB of {title}", name
        self.amount, self.cpu_scale = size / 1e6, 1e9 / size

    def run(self, client: Client) -> Any:
        return client.load(self.name)

    def verify(self, client: Client) -> bool:
        found = client.load(self.name)
        if self.name == "forest.joblib":
            return bool(found.predict(np.zeros((1, 20)))[0] in found.classes_)
        return all(bool((matrix == number).all()) for number, matrix in enumerate(found.coefs_))

    def measure(self, client: Client, row: Row) -> None:
        _libc.malloc_trim(0)  # or what the one before has freed would be used again
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = memory("VmRSS")
        super().measure(client, row)
        row.extra.append((memory("VmHWM") - before) / 1e6)


TABLES: dict[str, Callable[[Work], Table[Client]]] = {
    "joblib": lambda work: Whole(work, "float64, .joblib", "network.joblib"),
    "skops": lambda work: Whole(work, "float64, .skops", "network.skops"),
    "forest": lambda work: Whole(work, "trees, .joblib", "forest.joblib"),
}


def main() -> None:
    made = parser("artifacts", __doc__, CLIENTS, rounds=3)
    made.add_argument("--size", type=int, default=500, metavar="MB", help="of the estimators (default: 500)")
    made.add_argument("--works", default="joblib,skops", help=f"some of {','.join(TABLES)}, with commas")
    options = parse(made, CLIENTS)
    works = options.works.split(",")
    if unknown := set(works) - set(TABLES):
        made.error(f"no such work: {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    size = options.size * 1_000_000
    with object_folder(len(works) * size) as folder:
        work = Work(folder)
        make_files(work, works, size)
        with serve(folder, tls=options.tls, weather=options.weather) as rig:
            header = describe("artifacts", rig, CLIENTS, options)
            show(header)
            tables = [TABLES[name](work) for name in works]
            compare(tables, CLIENTS, rig, options, work)
    report(tables, header, options)


def make_files(work: Work, works: list[str], size: int) -> None:
    """Estimators: a network whose matrices are full of their number, and a forest of random trees."""
    work.path("").mkdir()
    if {"joblib", "skops"} & set(works):
        network = import_module("sklearn.neural_network").MLPRegressor()
        network.coefs_ = [np.full((size // _MATRICES // 8000, 1000), float(number)) for number in range(_MATRICES)]
        if "joblib" in works:
            import_module("joblib").dump(network, work.path("network.joblib"))
        if "skops" in works:
            import_module("skops.io").dump(network, work.path("network.skops"))
    if "forest" in works:
        rng = np.random.default_rng(0)
        forest = import_module("sklearn.ensemble").RandomForestClassifier(max(1, size // 8_000_000), n_jobs=2)
        forest.fit(rng.random((50_000, 20)), rng.integers(0, 2, 50_000))
        import_module("joblib").dump(forest, work.path("forest.joblib"))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
