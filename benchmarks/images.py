"""torch_s3's image datasets beside other ways from S3 to batches, in one run: ``python -m benchmarks.images``.

The work: JPEGs of 500 x 375 pixels and about 90 KB, decoded, resized to 224 x 224, and put into batches of 64 by a
``DataLoader``; once with two workers and once with none. The ceiling is the same on bytes that are in RAM already. The
server runs on the same cores. Every peer decodes with torchvision; ours with the fastest decoder that is installed, as
users have it. What each client yields is compared with the pictures' pixels in a warm-up round; then come interleaved
rounds, of which the median counts. Workers are forked anew for each round, and CPU is theirs and this process's.

Beside that: the time to the first batch of 100,000 keys (``first``), the memory of workers over 20 epochs (``memory``),
and a second epoch from the local cache (``cache``). Each figure stands beside its target.
"""

from __future__ import annotations

import argparse
import gc
import io
import os
import statistics
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode
from torchvision.transforms import v2

from benchmarks.peers import boto3_client, s3fs_filesystem
from benchmarks.rig import REGION, Rig, object_folder, serve
from benchmarks.table import (
    BUCKET,
    OURS,
    CannotRun,
    Peer,
    Row,
    Table,
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
from torch_s3 import Manifest, S3ImageDataset, S3ImageFolder
from torch_s3.data.decode import decode_image

BATCH = 64
CLASSES = 10
IN_RAM, IN_RAM_TORCHVISION = "in RAM", "in RAM, torchvision"
MANY = 100_000  # keys of the prefix whose first batch is timed
EPOCHS = 20  # over which memory is watched
PEER_IMAGES_IN_WEATHER = 256  # of which they read sixty a second
WORKS = ("speed", "first", "memory", "cache")
resize = v2.Resize((224, 224))


@dataclass(frozen=True)
class Work:
    """What every client is asked to load."""

    folder: Path
    keys: Sequence[str]
    weather: bool
    sums: dict[str, int] = field(default_factory=dict)  # of each picture's pixels, decoded and resized

    @property
    def prefix(self) -> str:
        return f"s3://{BUCKET}/train/"

    @property
    def peers_keys(self) -> Sequence[str]:
        """Those that are asked of a client that reads one object at a time."""
        return self.keys[:PEER_IMAGES_IN_WEATHER] if self.weather else self.keys


def torchvision_decode(data: Any) -> torch.Tensor:
    """As ``torchvision.io.decode_image``, which warns at each image."""
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    image: torch.Tensor = torch.ops.image.decode_image(encoded, ImageReadMode.RGB.value, False)
    return image


def torchvision_picture(data: Any) -> torch.Tensor:
    """What every peer makes of an object's bytes."""
    picture: torch.Tensor = resize(torchvision_decode(data))
    return picture


class Loads(ABC):
    """A way from objects to batches."""

    sampled = False  # by a shuffling sampler

    def __init__(self, rig: Rig, work: Work) -> None:
        self.rig, self.work = rig, work
        self.keys = work.keys

    @abstractmethod
    def dataset(self) -> Any:
        """What the ``DataLoader`` is given."""

    def batches(self, workers: int) -> Iterator[torch.Tensor]:
        """One epoch."""
        yield from DataLoader(self.dataset(), batch_size=BATCH, num_workers=workers, shuffle=self.sampled or None)

    def close(self) -> None:  # noqa: B027 - most have nothing open
        """Let go of what is open."""


class Ours(Loads):
    """Listed once, as everybody's keys are known before the clock starts."""

    def __init__(self, rig: Rig, work: Work, *, shuffle: bool = False, **options: Any) -> None:
        super().__init__(rig, work)
        given = {"labels": None, "transform": resize, "shuffle": shuffle, "batch_size": BATCH}
        self._dataset = S3ImageDataset(work.prefix, storage_options=rig.storage_options, **given, **options)

    def dataset(self) -> Any:
        return self._dataset


def shuffled(rig: Rig, work: Work) -> Loads:
    return Ours(rig, work, shuffle=True)


class Folder(Loads):
    """Map-style: nothing is read between batches."""

    sampled = True

    def __init__(self, rig: Rig, work: Work, **options: Any) -> None:
        super().__init__(rig, work)
        self._dataset = S3ImageFolder(work.prefix, resize, storage_options=rig.storage_options, **options)

    def dataset(self) -> Any:
        return self._dataset

    def batches(self, workers: int) -> Iterator[torch.Tensor]:
        return (images for images, _ in super().batches(workers))


class Bytes(Dataset[torch.Tensor]):
    def __init__(self, bodies: Sequence[bytes], picture: Callable[[bytes], torch.Tensor]) -> None:
        self._bodies, self._picture = bodies, picture

    def __len__(self) -> int:
        return len(self._bodies)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._picture(self._bodies[index])


def our_picture(data: bytes) -> torch.Tensor:
    picture: torch.Tensor = resize(decode_image(data, "in RAM"))
    return picture


class InRam(Loads):
    """The ceiling: our decoder on bytes that are there."""

    picture = staticmethod(our_picture)

    def __init__(self, rig: Rig, work: Work) -> None:
        super().__init__(rig, work)
        self._bodies = [(work.folder / BUCKET / key).read_bytes() for key in work.keys]

    def dataset(self) -> Any:
        return Bytes(self._bodies, self.picture)


class InRamTorchvision(InRam):
    picture = staticmethod(torchvision_picture)


class S3TorchConnector(Loads):
    def __init__(self, rig: Rig, work: Work) -> None:
        super().__init__(rig, work)
        if rig.ca_file:
            raise CannotRun("cannot be told to trust a private authority")
        self.keys = work.peers_keys

    def dataset(self) -> Any:
        module = import_module("s3torchconnector")
        return module.S3IterableDataset.from_objects(
            [f"s3://{BUCKET}/{key}" for key in self.keys],
            region=REGION,
            endpoint=self.rig.endpoint_url,
            transform=_read_picture,
            s3client_config=module.S3ClientConfig(force_path_style=True),
            enable_sharding=True,
        )


def _read_picture(reader: Any) -> torch.Tensor:
    return torchvision_picture(reader.read())


class _Gets(Dataset[torch.Tensor]):
    """One GET for each item; the client is made in the worker."""

    def __init__(self, make: Callable[[], Callable[[str], bytes]], keys: Sequence[str]) -> None:
        self._make, self._keys = make, keys
        self._get: tuple[int, Callable[[str], bytes]] | None = None

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self._get is None or self._get[0] != os.getpid():
            self._get = os.getpid(), self._make()
        return torchvision_picture(self._get[1](self._keys[index]))


class Boto3(Loads):
    def __init__(self, rig: Rig, work: Work) -> None:
        super().__init__(rig, work)
        self.keys = work.peers_keys

    def dataset(self) -> Any:
        return _Gets(self._make, self.keys)

    def _make(self) -> Callable[[str], bytes]:
        client = boto3_client(self.rig, 1)
        return lambda key: client.get_object(Bucket=BUCKET, Key=key)["Body"].read()


class S3Fs(Boto3):
    def _make(self) -> Callable[[str], bytes]:
        fs = s3fs_filesystem(self.rig, 1)
        return lambda key: fs.cat_file(f"{BUCKET}/{key}")


class LitDataRaw(Loads):
    """litData's dataset of files as they are, with its own defaults: a batch at once, and some look-ahead."""

    def __init__(self, rig: Rig, work: Work) -> None:
        super().__init__(rig, work)
        raw, indexer = import_module("litdata.raw.dataset"), import_module("litdata.raw.indexer")
        if rig.ca_file:
            raise CannotRun("cannot be told to trust a private authority")
        os.environ["AWS_ENDPOINT_URL"] = rig.endpoint_url  # of all its clients; the rest is there already
        import_module("litdata.streaming.downloader")._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # noqa: SLF001
        keys = work.keys

        class Known(indexer.BaseIndexer):  # type: ignore[name-defined,misc]
            """The keys are known, as everybody's are."""

            def build_or_load_index(self, *_: Any, **__: Any) -> list[Any]:
                sizes = [(work.folder / BUCKET / key).stat().st_size for key in keys]
                known = zip(keys, sizes, strict=True)
                return [indexer.FileMetadata(f"s3://{BUCKET}/{key}", size) for key, size in known]

            def discover_files(self, *_: Any) -> list[Any]:
                return []

        self._cache = tempfile.TemporaryDirectory(prefix="torch-s3-bench-litdata-")
        self._dataset = raw.StreamingRawDataset(
            work.prefix, cache_dir=self._cache.name, indexer=Known(), transform=torchvision_picture
        )

    def dataset(self) -> Any:
        return self._dataset

    def close(self) -> None:
        self._cache.cleanup()


TWO_WORKERS: dict[str, Peer[Loads]] = {
    OURS: Peer(Ours, "torch-s3"),
    "torch_s3, shuffled": Peer(shuffled, "torch-s3"),
    "torch_s3, S3ImageFolder": Peer(Folder, "torch-s3"),
    IN_RAM: Peer(InRam, ""),
    IN_RAM_TORCHVISION: Peer(InRamTorchvision, "torchvision"),
    "s3torchconnector": Peer(S3TorchConnector, "s3torchconnector"),
    "boto3": Peer(Boto3, "boto3"),
    "s3fs": Peer(S3Fs, "s3fs"),
    "litData raw": Peer(LitDataRaw, "litdata"),
}
NO_WORKERS = {name: TWO_WORKERS[name] for name in list(TWO_WORKERS)[:5]}


class Loading(Table[Loads]):
    unit, cpu_unit = "img/s", "CPU ms/img"
    cpu_scale = 1e3

    def __init__(self, work: Work, workers: int) -> None:
        super().__init__()
        self.work, self.workers = work, workers
        self.amount = len(work.keys)
        how = f"{workers} workers" if workers else "no workers"
        self.title = f"{len(work.keys):,} JPEGs, decoded, resized to 224, in batches of {BATCH}, {how}"

    def run(self, client: Loads) -> int:
        return sum(len(images) for images in client.batches(self.workers))

    def verify(self, client: Loads) -> bool:
        got = [int(image.sum()) for images in client.batches(self.workers) for image in images]
        return sorted(got) == sorted(self.work.sums[key] for key in client.keys)

    def measure(self, client: Loads, row: Row) -> None:
        gc.collect()  # a loader that failed before, or its workers would
        cpu, start = cpu_with_children(), time.perf_counter()
        count = self.run(client)
        row.rates.append(count / (time.perf_counter() - start))
        row.cpu.append((cpu_with_children() - cpu) * self.cpu_scale / count)

    def rate(self, name: str) -> float | None:
        return next((row.rate for row in self.rows if row.client == name and not row.note), None)


def targets(two: Loading, none: Loading | None, *, weather: bool) -> Iterator[str]:
    """Each ratio of the tables that has one to reach."""
    wanted: list[tuple[Loading | None, str, str, float]] = [
        (two, OURS, IN_RAM, 0.86 if weather else 0.88),
        (two, OURS, IN_RAM_TORCHVISION, 1.0),
        (two, OURS, "s3torchconnector", 15 if weather else 1.15),
        (two, OURS, "boto3", 15 if weather else 1.7),
        (two, OURS, "s3fs", 1.7),
        (two, OURS, "litData raw", 1.7),
        (two, "torch_s3, shuffled", OURS, 0.95),
        (none, OURS, IN_RAM, 0.95),
        (none, OURS, IN_RAM_TORCHVISION, 1.0),
    ]
    for table, client, other, least in wanted:
        if table is None:
            continue
        rate, limit = table.rate(client), table.rate(other)
        if rate and limit:
            verdict = "" if rate / limit >= least else "   MISSED"
            yield f"  {client} / {other}, {table.workers} workers: {rate / limit:.2f}, wanted {least}{verdict}"


def first_batch(rig: Rig, rounds: int) -> Iterator[str]:
    """From the start of the workers, and of all, to the first batch of a large prefix's saved manifest."""
    names = [f"many/{number // 1000:03}/{number:06}.jpg" for number in range(MANY)]
    manifest = Manifest.from_uris([f"s3://{BUCKET}/{name}" for name in names])
    with tempfile.TemporaryDirectory() as folder:
        saved = f"file://{folder}/manifest"
        manifest.save(saved)
        for context in ("fork", "spawn"):
            loads, starts, firsts = [], [], []
            for number in range(rounds):
                progress(f"first batch, {context}: {number + 1} of {rounds}")
                began = time.monotonic()
                found = Manifest.load(saved)
                loads.append(time.monotonic() - began)
                given: dict[str, Any] = {"labels": None, "transform": resize, "shuffle": True, "batch_size": BATCH}
                dataset = S3ImageDataset(found, seed=number, storage_options=rig.storage_options, **given)
                ready = torch.zeros(2, dtype=torch.float64).share_memory_()  # type: ignore[no-untyped-call]
                began = time.monotonic()
                loader = DataLoader(
                    dataset, BATCH, num_workers=2, multiprocessing_context=context, worker_init_fn=_Ready(ready)
                )
                reading = iter(loader)
                next(reading)
                ended = time.monotonic()
                starts.append(float(ready.max()) - began)
                firsts.append(ended - float(ready.max()))
                del reading
            yield (
                f"first batch of {MANY:,} keys, {context}: {statistics.median(firsts):.3f} s after the workers have "
                f"started (wanted < 1 s); the manifest loads in {statistics.median(loads):.3f} s, "
                f"workers start in {statistics.median(starts):.2f} s"
            )


class _Ready:
    """A worker's initializer that notes when it ran."""

    def __init__(self, ready: torch.Tensor) -> None:
        self._ready = ready

    def __call__(self, worker: int) -> None:
        self._ready[worker] = time.monotonic()


def memory(rig: Rig, work: Work) -> Iterator[str]:
    """The workers' own memory, over many epochs."""
    for name, client in (("S3ImageDataset", shuffled(rig, work)), ("S3ImageFolder", Folder(rig, work))):
        dataset, sampled = client.dataset(), client.sampled or None
        loader = DataLoader(dataset, BATCH, num_workers=2, persistent_workers=True, shuffle=sampled)
        most: list[int] = []
        for epoch in range(EPOCHS):
            progress(f"memory: {name}, epoch {epoch + 1} of {EPOCHS}")
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)
            reading, seen = iter(loader), []
            for number, _ in enumerate(reading):
                if number % 4 == 3:
                    seen.append(max(_private_bytes(worker.pid) for worker in reading._workers))  # type: ignore[attr-defined]  # noqa: SLF001
            most.append(max(seen))
        early, late = statistics.median(most[2:6]), statistics.median(most[-4:])
        yield (
            f"{name}, {EPOCHS} epochs: a worker's own memory is {late / 1e6:.0f} MB (wanted: look-ahead + 150), "
            f"{(late - early) / 1e6:+.1f} MB from epochs 3-6 to the last four (wanted: flat)"
        )
        del reading, loader


def _private_bytes(pid: int) -> int:
    """What a process has in memory and shares with none: what a forked worker has beyond its parent's imports."""
    fields = Path(f"/proc/{pid}/smaps_rollup").read_text().split()
    return sum(int(fields[fields.index(name) + 1]) for name in ("Private_Clean:", "Private_Dirty:")) * 1024


def cached(rig: Rig, work: Work) -> Iterator[str]:
    """The second epoch from the local cache."""
    with tempfile.TemporaryDirectory(prefix="torch-s3-bench-cache-") as folder:
        table = Loading(work, 2)
        client, ram = Folder(rig, work, cache_dir=folder), InRam(rig, work)
        rates: Mapping[str, list[float]] = {"first": [], "second": [], "ram": []}
        for number in range(4):
            progress(f"cache: epoch {number + 1} of 4")
            for name, each in ((("first", "second")[number > 0], client), ("ram", ram)):
                began = time.perf_counter()
                count = table.run(each)
                rates[name].append(count / (time.perf_counter() - began))
        first, second, ceiling = (statistics.median(rates[name]) for name in ("first", "second", "ram"))
        yield (
            f"S3ImageFolder with a cache, 2 workers: {first:,.0f} img/s in the first epoch, {second:,.0f} in the next; "
            f"{second / ceiling:.2f} of bytes in RAM (wanted: disk speed)"
        )


def main() -> None:
    made = parser("images", __doc__, TWO_WORKERS, rounds=3)
    made.add_argument("--images", type=int, default=2000, help="how many (default: 2000)")
    add_choice(made, "--works", WORKS, "speed,first,cache")
    options = parse(made)
    works = options.works
    with object_folder(options.images * 100_000) as folder:
        work = make_pictures(folder, options.images, weather=options.weather)
        if "first" in works:
            make_many(folder, work)
        with serve(folder, tls=options.tls, weather=options.weather) as rig:
            header = describe("images", rig, TWO_WORKERS, options)
            sizes = [(folder / BUCKET / key).stat().st_size for key in work.keys]
            header["pictures"] = (
                f"{len(sizes):,} of 500 x 375 pixels, {statistics.mean(sizes) / 1000:.0f} KB on average"
            )
            show(header)
            os.environ.update(rig.environment)
            tables = speed(rig, work, options) if "speed" in works else []
            report(tables, header, options)
            if tables:
                print("", *targets(tables[0], tables[1], weather=options.weather), sep="\n")
            rest: dict[str, Callable[[], Iterator[str]]] = {
                "first": lambda: first_batch(rig, options.rounds),
                "memory": lambda: memory(rig, work),
                "cache": lambda: cached(rig, work),
            }
            for name in works:
                for line in rest.get(name, lambda: iter(()))():
                    progress("")
                    print(line, flush=True)


def speed(rig: Rig, work: Work, options: argparse.Namespace) -> list[Loading]:
    two, none = Loading(work, 2), Loading(work, 0)
    compare([two], TWO_WORKERS, rig, options, work)
    compare([none], NO_WORKERS, rig, options, work)
    return [two, none]


def make_pictures(folder: Path, count: int, *, weather: bool) -> Work:
    """Pictures with shapes of every size and grain, as photographs have; the same in every run."""
    random = np.random.default_rng(0)
    work = Work(folder, [f"train/{number % CLASSES}/{number:05}.jpg" for number in range(count)], weather)
    base = [photograph(random) for _ in range(20)]
    for number, key in enumerate(work.keys):
        progress(f"picture {number + 1:,} of {count:,}")
        path = folder / BUCKET / key
        path.parent.mkdir(parents=True, exist_ok=True)
        # Other pixels in each, without the work of making them: shifted, mirrored, brighter or darker.
        pixels = np.roll(base[number % len(base)], tuple(random.integers(0, 375, 2)), axis=(0, 1))[
            :, :: number % 2 * 2 - 1
        ]
        pixels = np.clip(pixels * random.uniform(0.75, 1.15), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path, quality=94)
        work.sums[key] = int(torchvision_picture(path.read_bytes()).sum())
    progress("")
    return work


def photograph(random: np.random.Generator, width: int = 500, height: int = 375) -> np.ndarray[Any, Any]:
    """float32 (H, W, 3) in 0 … 255: noise of every octave, weaker the finer it is, and the film's grain."""
    pixels = np.zeros((height, width, 3), np.float32)
    for octave in range(8):
        cells = 2**octave
        noise = random.standard_normal((2 + cells, 2 + cells * 4 // 3, 3)).astype(np.float32)
        noise += 1.5 * noise.mean(-1, keepdims=True)
        for channel in range(3):
            layer = Image.fromarray(noise[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            pixels[..., channel] += np.asarray(layer) / cells**0.9
    pixels += 0.5 * random.standard_normal(pixels.shape).astype(np.float32)
    pixels -= pixels.min()
    scaled: np.ndarray[Any, Any] = pixels * (255 / pixels.max())
    return scaled


def make_many(folder: Path, work: Work) -> None:
    """A hundred thousand names for a small picture."""
    small = io.BytesIO()
    with Image.open(folder / BUCKET / work.keys[0]) as image:
        image.save(small, "jpeg", quality=5)
    first = folder / BUCKET / "many" / "picture"
    for number in range(MANY):
        path = folder / BUCKET / "many" / f"{number // 1000:03}" / f"{number:06}.jpg"
        if number == 0:
            path.parent.mkdir(parents=True)
            first.write_bytes(small.getvalue())
        elif number % 1000 == 0:
            path.parent.mkdir()
        path.hardlink_to(first)
    first.unlink()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
