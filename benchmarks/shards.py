"""torch_s3's datasets of shards beside other ways from S3 to records, in one run: ``python -m benchmarks.shards``.

The work: shards of 100 MB with records of about 100 KB, as TFRecord and as WebDataset's tars, each record handed out as
``bytes``, nothing decoded. Every client is held to one core, which its threads and programs share; the server has the
other ones. TFRecords' checksums are verified by ours and by TensorFlow, tars have none but of headers.

TensorFlow reads no S3 by itself: it is given files in memory, of which the next is fetched, by boto3's own transfer
manager or by s3fs, while one is read. webdataset opens shards by ``pipe:curl``, unsigned, which costs less than the
``pipe:aws`` of its documentation, and by file objects of boto3 and s3fs. Ours has its index; the row
"no index" finds where records lie in a pass of its own, every time. The transport's rows read the same bytes and look
at nothing.

What each yields is compared with the records' checksums in a warm-up round; then come interleaved rounds, of which the
median counts. CPU is that of this process and of its programs.
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
import tempfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import boto3_client, s3fs_filesystem
from benchmarks.rig import Rig, object_folder, serve
from benchmarks.table import (
    BUCKET,
    OURS,
    Bytes,
    Peer,
    add_choice,
    compare,
    cpu_with_children,
    describe,
    parse,
    parser,
    progress,
    report,
    show,
)
from torch_s3 import S3FileSystem
from torch_s3.data.tars import S3TarDataset
from torch_s3.data.tfrecord import frame
from torch_s3.data.tfrecords import S3TFRecordDataset

SHARD = 100_000_000  # bytes
RECORD = 100_000
NO_INDEX, RANGES, INTO = f"{OURS}, no index", "cat_ranges", "read_into"
PART = 8 << 20


@dataclass
class Work:
    """What every client is asked to read.

    Attributes:
        folder: Where the server has it.
        kind: ``"tfrecord"`` or ``"tar"``.
        keys: Of the shards.
        sums: CRC-32 of each record, in order.
        size: Bytes of all shards.
    """

    folder: Path
    kind: str
    keys: list[str] = field(default_factory=list)
    sums: list[int] = field(default_factory=list)
    size: int = 0

    @property
    def prefix(self) -> str:
        return f"s3://{BUCKET}/{self.kind}/"


class Reads(ABC):
    """A way from shards to records."""

    def __init__(self, rig: Rig, work: Work) -> None:
        self.rig, self.work = rig, work

    @abstractmethod
    def records(self) -> Iterator[Any]:
        """All of them, in order."""

    def close(self) -> None:  # noqa: B027 - nothing is open
        """Let go of what is open."""


class Ours(Reads):
    def __init__(self, rig: Rig, work: Work, *, shuffle: bool = False) -> None:
        super().__init__(rig, work)
        self._options: dict[str, Any] = {"storage_options": rig.storage_options, "shuffle": shuffle}
        self._dataset = self.dataset()

    def dataset(self) -> Any:
        if self.work.kind == "tar":
            return S3TarDataset(self.work.prefix, decode=False, **self._options)
        return S3TFRecordDataset(self.work.prefix, **self._options)

    def records(self) -> Iterator[Any]:
        return _bodies(self._dataset)


class WithoutIndex(Ours):
    def records(self) -> Iterator[Any]:
        return _bodies(self.dataset())


def shuffled(rig: Rig, work: Work) -> Reads:
    return Ours(rig, work, shuffle=True)


def _bodies(samples: Any) -> Iterator[Any]:
    """The bytes that are compared: a tar's samples have them by their extension."""
    return (sample["bin"] if isinstance(sample, dict) else sample for sample in samples)


class CatRanges(Reads):
    """The transport alone, as ``bytes``."""

    def __init__(self, rig: Rig, work: Work) -> None:
        super().__init__(rig, work)
        self._fs = S3FileSystem(**rig.storage_options)
        self._sizes = {key: (work.folder / BUCKET / key).stat().st_size for key in work.keys}

    def records(self) -> Iterator[Any]:
        for key, size in self._sizes.items():
            starts = range(0, size, PART)
            yield from self._fs.cat_ranges(
                [f"{BUCKET}/{key}"] * len(starts), list(starts), [min(size, start + PART) for start in starts]
            )


class ReadInto(CatRanges):
    """The transport alone, into memory that is there."""

    def __init__(self, rig: Rig, work: Work) -> None:
        super().__init__(rig, work)
        self._buffer = memoryview(bytearray(max(self._sizes.values())))

    def records(self) -> Iterator[Any]:
        for key, size in self._sizes.items():
            self._fs.read_into(f"{BUCKET}/{key}", 0, self._buffer[:size])
            yield self._buffer[:size]


class TensorFlow(Reads):
    """Files in memory, the next one on its way."""

    def __init__(self, rig: Rig, work: Work) -> None:
        super().__init__(rig, work)
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        self._tf = import_module("tensorflow")
        self._fetch = self.fetcher()

    def fetcher(self) -> Callable[[str, str], None]:
        client = boto3_client(self.rig, 10)
        return lambda key, path: client.download_file(BUCKET, key, path)

    def records(self) -> Iterator[Any]:
        parent = "/dev/shm" if Path("/dev/shm").is_dir() else None
        with tempfile.TemporaryDirectory(dir=parent) as folder, ThreadPoolExecutor(1) as pool:
            paths = [f"{folder}/{number}" for number in range(len(self.work.keys))]
            coming = pool.submit(self._fetch, self.work.keys[0], paths[0])
            for number, path in enumerate(paths):
                coming.result()
                if number + 1 < len(paths):
                    coming = pool.submit(self._fetch, self.work.keys[number + 1], paths[number + 1])
                yield from self._tf.data.TFRecordDataset(path, buffer_size=PART).as_numpy_iterator()
                Path(path).unlink()


class TensorFlowS3Fs(TensorFlow):
    def fetcher(self) -> Callable[[str, str], None]:
        fs = s3fs_filesystem(self.rig, 10)
        return lambda key, path: fs.get_file(f"{BUCKET}/{key}", path)


class WebDataset(Reads):
    """By ``pipe:``."""

    def __init__(self, rig: Rig, work: Work) -> None:
        super().__init__(rig, work)
        self._module = import_module("webdataset")
        self._client = boto3_client(rig, 1)

    def urls(self) -> Sequence[str]:
        ca = f" --cacert {self.rig.ca_file}" if self.rig.ca_file else ""
        return [f"pipe:curl -sf{ca} {self.rig.endpoint_url}/{BUCKET}/{key}" for key in self.work.keys]

    def records(self) -> Iterator[Any]:
        return _bodies(self._module.WebDataset(self.urls(), shardshuffle=False))


class WebDatasetBoto3(WebDataset):
    def urls(self) -> Sequence[str]:
        schemes = import_module("webdataset.gopen").gopen_schemes
        schemes["bench"] = lambda url, *_, **__: self.open(url.removeprefix("bench://"))
        return [f"bench://{key}" for key in self.work.keys]

    def open(self, key: str) -> Any:
        return self._client.get_object(Bucket=BUCKET, Key=key)["Body"]


class WebDatasetS3Fs(WebDatasetBoto3):
    def __init__(self, rig: Rig, work: Work) -> None:
        super().__init__(rig, work)
        self._fs = s3fs_filesystem(rig, 10)

    def open(self, key: str) -> Any:
        return self._fs.open(f"{BUCKET}/{key}", "rb", block_size=PART)


ALWAYS: dict[str, Peer[Reads]] = {
    OURS: Peer(Ours, "torch-s3"),
    f"{OURS}, shuffled": Peer(shuffled, ""),
    NO_INDEX: Peer(WithoutIndex, ""),
    RANGES: Peer(CatRanges, ""),
    INTO: Peer(ReadInto, ""),
}
PEERS: dict[str, dict[str, Peer[Reads]]] = {
    "tfrecord": {
        **ALWAYS,
        "tensorflow, boto3": Peer(TensorFlow, "tensorflow"),
        "tensorflow, s3fs": Peer(TensorFlowS3Fs, "s3fs"),
    },
    "tar": {
        **ALWAYS,
        "webdataset, pipe:curl": Peer(WebDataset, "webdataset"),
        "webdataset, boto3": Peer(WebDatasetBoto3, "boto3"),
        "webdataset, s3fs": Peer(WebDatasetS3Fs, "s3fs"),
    },
}


class Reading(Bytes[Reads]):
    cpu_seconds = staticmethod(cpu_with_children)

    def __init__(self, work: Work) -> None:
        super().__init__(work.size)
        self.work = work
        self.title = f"{work.kind} shards: {len(work.keys)} of {work.size / len(work.keys) / 1e6:.0f} MB, on one core"

    def run(self, client: Reads) -> int:
        return sum(1 for _ in client.records())

    def verify(self, client: Reads) -> bool:
        if isinstance(client, CatRanges):
            return sum(len(part) for part in client.records()) == self.work.size
        return sorted(map(zlib.crc32, client.records())) == sorted(self.work.sums)


def targets(table: Reading) -> Iterator[str]:
    """Each ratio beside what it is to be."""
    rates = {row.client: row.rate for row in table.rows if not row.note}
    costs = {row.client: row.cpu_cost for row in table.rows if not row.note}
    for client, rate in rates.items():
        if OURS not in rates or client.startswith(OURS):
            continue
        least = 0.8 if client in (RANGES, INTO) else 3.0
        ratio = rates[OURS] / rate
        verdict = "" if ratio >= least else "   MISSED"
        yield (
            f"  {table.work.kind}: {OURS} / {client}: {ratio:.2f}, wanted {least}{verdict} "
            f"(by CPU alone {costs[client] / costs[OURS]:.2f})"
        )


@contextmanager
def one_core() -> Iterator[str]:
    """Hold this thread, and what it starts, to the last core; says so."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield f"core {max(before)} of {len(before)}" + ("" if len(before) > 1 else ", WITH the server")
    finally:
        os.sched_setaffinity(0, before)


def make_shards(folder: Path, kind: str, count: int) -> Work:
    """Records of random bytes, of 80 to 120 KB."""
    random = np.random.default_rng(0)
    work = Work(folder, kind)
    base = random.bytes(4 * RECORD)
    (folder / BUCKET / kind).mkdir(parents=True)
    number = 0
    for shard in range(count):
        key = f"{kind}/shard-{shard:06}.{kind}"
        path = folder / BUCKET / key
        with path.open("wb") as file:
            archive = tarfile.open(fileobj=file, mode="w|") if kind == "tar" else None  # noqa: SIM115 - closed below
            while file.tell() < SHARD:
                size, start = (int(n) for n in random.integers((RECORD * 4 // 5, 0), (RECORD * 6 // 5, 2 * RECORD)))
                body = b"%08d" % number + base[start : start + size]
                work.sums.append(zlib.crc32(body))
                if archive is None:
                    file.writelines(frame(body))
                else:
                    for name, content in (("bin", body), ("cls", b"%d" % (number % 10))):
                        info = tarfile.TarInfo(f"{number:08}.{name}")
                        info.size = len(content)
                        archive.addfile(info, io.BytesIO(content))
                number += 1
            if archive is not None:
                archive.close()
        work.keys.append(key)
        work.size += path.stat().st_size
        progress(f"{kind} shard {shard + 1} of {count}")
    progress("")
    return work


def main() -> None:
    everybody = {name: peer for peers in PEERS.values() for name, peer in peers.items()}
    made = parser("shards", __doc__, everybody, rounds=5)
    made.add_argument("--shards", type=int, default=12, help="of each kind (default: 12)")
    add_choice(made, "--kinds", PEERS)
    options = parse(made)
    kinds = options.kinds
    with object_folder(len(kinds) * (options.shards + 2) * SHARD) as folder:
        works = [make_shards(folder, kind, options.shards) for kind in kinds]
        with serve(folder, tls=options.tls, weather=options.weather) as rig, one_core() as core:
            header = describe("shards", rig, everybody, options) | {"clients run on": core}
            show(header)
            tables = [Reading(work) for work in works]
            for table in tables:
                compare([table], PEERS[table.work.kind], rig, options, table.work)
            report(tables, header, options)
            print("", *(line for table in tables for line in targets(table)), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
