"""Loading estimators beside other clients, over the same server, in one run: ``python -m benchmarks.artifacts``.

Works: an estimator of 500 MB of float64 as joblib writes it; the same as skops; a forest, whose trees are made anew
out of what comes. What each client loads is compared with what was saved in a warm-up round; then come interleaved
rounds, of which the median counts. CPU is this process's, user and system. "MB more" is by how much the process's peak
memory rose while it loaded.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import boto3_client, boto3_file, s3fs_filesystem
from benchmarks.rig import Rig, object_folder, serve
from benchmarks.table import BUCKET, Loads, Peer, Table, add_choice, compare, describe, parse, parser, report, show

_MATRICES = 8


class Client(ABC):
    """A way to load what is in a file.

    Args:
        rig: The server.
        files: The folder that it serves, in the page cache or in memory.
    """

    def __init__(self, rig: Rig, files: Path) -> None:
        self.rig, self.files = rig, files

    @abstractmethod
    def load(self, name: str) -> Any:
        """What a file holds."""

    def close(self) -> None:  # noqa: B027 - nothing is open
        """Let go of what is open."""


class ByFile(Client):
    """The libraries' own loading."""

    @abstractmethod
    def file(self, name: str) -> Any:
        """A file to load from."""

    def load(self, name: str) -> Any:
        with self.file(name) as file:
            if name.endswith(".skops"):
                return import_module("skops.io").load(file)
            return import_module("joblib").load(file)


class TorchS3(Client):
    def __init__(self, rig: Rig, files: Path) -> None:
        super().__init__(rig, files)
        self._load = import_module("torch_s3.artifacts").load_estimator
        self._fs = import_module("torch_s3").S3FileSystem(**rig.storage_options, skip_instance_cache=True)

    def load(self, name: str) -> Any:
        return self._load(f"s3://{BUCKET}/{name}", trusted=["sklearn"], filesystem=self._fs)


class Local(ByFile):
    """Of a local file: the limit."""

    def file(self, name: str) -> Any:
        return (self.files / name).open("rb")


class Boto3(ByFile):
    def __init__(self, rig: Rig, files: Path) -> None:
        super().__init__(rig, files)
        self._client = boto3_client(rig, 64)

    def file(self, name: str) -> Any:
        return boto3_file(self._client, BUCKET, name)


class S3Fs(ByFile):
    def __init__(self, rig: Rig, files: Path) -> None:
        super().__init__(rig, files)
        self._fs = s3fs_filesystem(rig, 64)

    def file(self, name: str) -> Any:
        return self._fs.open(f"{BUCKET}/{name}")


CLIENTS: dict[str, Peer[Client]] = {
    "torch_s3": Peer(TorchS3, "torch-s3"),
    "local file": Peer(Local, "joblib"),
    "boto3": Peer(Boto3, "boto3"),
    "s3fs": Peer(S3Fs, "s3fs"),
}


class Whole(Loads[Client]):
    def __init__(self, files: Path, title: str, name: str) -> None:
        size = (files / name).stat().st_size
        super().__init__(size)
        self.title, self.name = f"{size / 1e6:.0f} MB of {title}", name

    def run(self, client: Client) -> Any:
        return client.load(self.name)

    def verify(self, client: Client) -> bool:
        found = client.load(self.name)
        if self.name == "forest.joblib":
            return bool(found.predict(np.zeros((1, 20)))[0] in found.classes_)
        return all(bool((matrix == number).all()) for number, matrix in enumerate(found.coefs_))


TABLES: dict[str, Callable[[Path], Table[Client]]] = {
    "joblib": lambda files: Whole(files, "float64, .joblib", "network.joblib"),
    "skops": lambda files: Whole(files, "float64, .skops", "network.skops"),
    "forest": lambda files: Whole(files, "trees, .joblib", "forest.joblib"),
}


def main() -> None:
    made = parser("artifacts", __doc__, CLIENTS, rounds=3)
    made.add_argument("--size", type=int, default=500, metavar="MB", help="of the estimators (default: 500)")
    add_choice(made, "--works", TABLES, "joblib,skops")
    options = parse(made)
    works = options.works
    size = options.size * 1_000_000
    with object_folder(len(works) * size) as folder:
        files = folder / BUCKET
        make_files(files, works, size)
        with serve(folder, tls=options.tls, weather=options.weather) as rig:
            header = describe("artifacts", rig, CLIENTS, options)
            show(header)
            tables = [TABLES[name](files) for name in works]
            compare(tables, CLIENTS, rig, options, files)
    report(tables, header, options)


def make_files(files: Path, works: list[str], size: int) -> None:
    """Estimators: a network whose matrices are full of their number, and a forest of random trees."""
    files.mkdir()
    if {"joblib", "skops"} & set(works):
        network = import_module("sklearn.neural_network").MLPRegressor()
        network.coefs_ = [np.full((size // _MATRICES // 8000, 1000), float(number)) for number in range(_MATRICES)]
        if "joblib" in works:
            import_module("joblib").dump(network, files / "network.joblib")
        if "skops" in works:
            import_module("skops.io").dump(network, files / "network.skops")
    if "forest" in works:
        rng = np.random.default_rng(0)
        forest = import_module("sklearn.ensemble").RandomForestClassifier(max(1, size // 8_000_000), n_jobs=2)
        forest.fit(rng.random((50_000, 20)), rng.integers(0, 2, 50_000))
        import_module("joblib").dump(forest, files / "forest.joblib")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
