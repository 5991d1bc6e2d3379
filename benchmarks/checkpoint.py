"""Loading checkpoints beside other clients, over the same server, in one run: ``python -m benchmarks.checkpoint``.

Works: 1.2 GB of float32 in 192 tensors as torch.save writes them, and as safetensors; one of those tensors; 20,000
small ones of 1.2 GB together, beside one object of that size read into touched memory. What each client loads is
compared with what was saved in a warm-up round; then come interleaved rounds, of which the median counts. CPU is this
process's, user and system. "MB more" is by how much the process's peak memory rose while it loaded.
"""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import boto3_client, boto3_file, s3fs_filesystem
from benchmarks.rig import REGION, Rig, object_folder, serve
from benchmarks.table import (
    BUCKET,
    Bytes,
    CannotRun,
    Loads,
    Peer,
    Row,
    Table,
    add_choice,
    compare,
    describe,
    parse,
    parser,
    report,
    show,
)

TENSORS, SMALL_TENSORS = 192, 20_000


@dataclass(frozen=True)
class Work:
    """What there is to load."""

    folder: Path
    size: int  # bytes of all tensors of a file

    def path(self, name: str) -> Path:
        """Of a local file, in the page cache or in memory."""
        return self.folder / BUCKET / name


class Client(ABC):
    def __init__(self, rig: Rig, work: Work) -> None:
        self.rig, self.work = rig, work

    @abstractmethod
    def load(self, name: str) -> dict[str, torch.Tensor]:
        """All of a file."""

    def one(self, name: str, key: str) -> tuple[dict[str, torch.Tensor], int]:
        """One tensor, and how many bytes were received for it."""
        raise CannotRun("loads whole files only")

    def close(self) -> None:  # noqa: B027 - nothing is open
        """Let go of what is open."""


class ByFile(Client):
    """torch.load of a file."""

    @abstractmethod
    def file(self, name: str) -> Any:
        """A file to load from."""

    def load(self, name: str) -> dict[str, torch.Tensor]:
        if name.endswith(".safetensors"):
            raise CannotRun("loads .pt only")
        with self.file(name) as file:
            found: dict[str, torch.Tensor] = torch.load(file)
        return found


class TorchS3(Client):
    verify = True

    def __init__(self, rig: Rig, work: Work) -> None:
        super().__init__(rig, work)
        self._module = import_module("torch_s3")
        self._fs = self._module.S3FileSystem(**rig.storage_options, skip_instance_cache=True)

    def load(self, name: str) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = self._module.load_checkpoint(
            f"s3://{BUCKET}/{name}", filesystem=self._fs, verify=self.verify
        )
        return found

    def one(self, name: str, key: str) -> tuple[dict[str, torch.Tensor], int]:
        before = self._fs.stats()["bytes_received"]
        found = self._module.load_checkpoint(f"s3://{BUCKET}/{name}", filesystem=self._fs, keys=[key])
        return found, self._fs.stats()["bytes_received"] - before

    def raw(self, name: str, out: memoryview) -> None:
        """An object into memory, unchecked."""
        self._fs.read_into(f"{BUCKET}/{name}", 0, out)

    def requests(self) -> int:
        """Made so far."""
        return int(self._fs.stats()["requests"])


class Unverified(TorchS3):
    verify = False


class Local(Client):
    """torch.load and safetensors of a local file: the limit."""

    def load(self, name: str) -> dict[str, torch.Tensor]:
        path = self.work.path(name)
        if name.endswith(".safetensors"):
            # load_file would map the file into memory, and read nothing
            found: dict[str, torch.Tensor] = import_module("safetensors.torch").load(path.read_bytes())
        else:
            found = torch.load(path, mmap=False)
        return found


class Boto3(ByFile):
    def __init__(self, rig: Rig, work: Work) -> None:
        super().__init__(rig, work)
        self._client = boto3_client(rig, 64)

    def file(self, name: str) -> Any:
        return boto3_file(self._client, BUCKET, name)


class S3Fs(ByFile):
    def __init__(self, rig: Rig, work: Work) -> None:
        super().__init__(rig, work)
        self._fs = s3fs_filesystem(rig, 64)

    def file(self, name: str) -> Any:
        return self._fs.open(f"{BUCKET}/{name}")


class S3TorchConnector(ByFile):
    def __init__(self, rig: Rig, work: Work) -> None:
        super().__init__(rig, work)
        if rig.ca_file:
            raise CannotRun("cannot be told to trust a private authority")
        module = import_module("s3torchconnector")
        config = module.S3ClientConfig(throughput_target_gbps=100.0, force_path_style=True)
        self._checkpoint = module.S3Checkpoint(REGION, endpoint=rig.endpoint_url, s3client_config=config)

    def file(self, name: str) -> Any:
        return self._checkpoint.reader(f"s3://{BUCKET}/{name}")


class Runai(Client):
    def __init__(self, rig: Rig, work: Work) -> None:
        super().__init__(rig, work)
        self._streamer = import_module("runai_model_streamer").SafetensorsStreamer
        os.environ.update(AWS_ENDPOINT_URL=rig.endpoint_url, RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING="0")

    def load(self, name: str) -> dict[str, torch.Tensor]:
        if not name.endswith(".safetensors"):
            raise CannotRun("loads safetensors only")
        with self._streamer() as streamer:
            streamer.stream_file(f"s3://{BUCKET}/{name}")
            return {key: tensor.clone() for key, tensor in streamer.get_tensors()}


CLIENTS: dict[str, Peer[Client]] = {
    "torch_s3": Peer(TorchS3, "torch-s3"),
    "torch_s3, verify=False": Peer(Unverified, "torch-s3"),
    "local file": Peer(Local, "torch"),
    "boto3": Peer(Boto3, "boto3"),
    "s3fs": Peer(S3Fs, "s3fs"),
    "s3torchconnector": Peer(S3TorchConnector, "s3torchconnector"),
    "runai": Peer(Runai, "runai-model-streamer"),
}


class Whole(Loads[Client]):
    def __init__(self, work: Work, title: str, name: str) -> None:
        super().__init__(work.size)
        self.title, self.name = f"{work.size / 1e9:.1f} GB {title}", name

    def run(self, client: Client) -> Any:
        return client.load(self.name)

    def verify(self, client: Client) -> bool:
        found = client.load(self.name)
        return all(bool((tensor == number).all()) for number, tensor in _numbered(found))


class One(Table[Client]):
    unit, cpu_unit, extra_unit = "loads/s", "CPU s", "KB more"

    def __init__(self, work: Work, name: str) -> None:
        super().__init__()
        self.title = f"One tensor of {TENSORS}; KB that were received beside its own {work.size / TENSORS / 1e6:.2f} MB"
        self.amount, self.cpu_scale, self.name = 1, 1, name
        self._own = work.size // TENSORS // 4 * 4
        self._bytes = 0

    def run(self, client: Client) -> Any:
        _, self._bytes = client.one(self.name, f"layer.{TENSORS // 2}")

    def verify(self, client: Client) -> bool:
        found, _ = client.one(self.name, f"layer.{TENSORS // 2}")
        return [(number, bool((tensor == number).all())) for number, tensor in _numbered(found)] == [
            (TENSORS // 2, True)
        ]

    def measure(self, client: Client, row: Row) -> None:
        super().measure(client, row)
        row.extra.append((self._bytes - self._own) / 1000)


class Raw(Bytes[Client]):
    """One object of the size of all the small tensors, read into memory."""

    def __init__(self, work: Work, name: str) -> None:
        super().__init__(work.size)
        self.title, self.name = "The file of the table above as one object, into touched memory", name
        self._out = torch.zeros(work.path(name).stat().st_size, dtype=torch.uint8)

    def run(self, client: Client) -> Any:
        if type(client) is not TorchS3:
            raise CannotRun("is compared with itself")
        client.raw(self.name, self._out.numpy().data)

    def verify(self, client: Client) -> bool:
        self.run(client)
        return True


class Requests(Table[Client]):
    unit, cpu_unit, extra_unit = "loads/s", "CPU s", "requests"

    def __init__(self, work: Work, name: str) -> None:
        super().__init__()
        allowed = 2 * work.size / (8 << 20) + 20
        self.title, self.name = f"Requests for {SMALL_TENSORS:,} small tensors (at most {allowed:,.0f})", name
        self.amount, self.cpu_scale = 1, 1

    def run(self, client: Client) -> Any:
        if not isinstance(client, TorchS3):
            raise CannotRun("is not counted")
        client.load(self.name)

    def verify(self, client: Client) -> bool:
        self.run(client)
        return True

    def measure(self, client: Client, row: Row) -> None:
        before = client.requests() if isinstance(client, TorchS3) else 0
        super().measure(client, row)
        row.extra.append((client.requests() if isinstance(client, TorchS3) else 0) - before)


TABLES: dict[str, Callable[[Work], Table[Client]]] = {
    "pt": lambda work: Whole(work, f"of float32 in {TENSORS} tensors, .pt", "large.pt"),
    "safetensors": lambda work: Whole(work, f"of float32 in {TENSORS} tensors, .safetensors", "large.safetensors"),
    "one": lambda work: One(work, "large.pt"),
    "small": lambda work: Whole(work, f"of float32 in {SMALL_TENSORS:,} tensors, .pt", "small.pt"),
    "raw": lambda work: Raw(work, "small.pt"),
    "requests": lambda work: Requests(work, "small.pt"),
}


def main() -> None:
    made = parser("checkpoint", __doc__, CLIENTS, rounds=3)
    made.add_argument("--size", type=int, default=1200, metavar="MB", help="of the checkpoints (default: 1200)")
    add_choice(made, "--works", TABLES, "pt,safetensors,one")
    options = parse(made)
    works = options.works
    size = options.size * 1_000_000
    with object_folder(3 * size) as folder:
        work = Work(folder, size)
        make_files(work, works)
        with serve(folder, tls=options.tls, weather=options.weather) as rig:
            header = describe("checkpoint", rig, CLIENTS, options)
            show(header)
            tables = [TABLES[name](work) for name in works]
            compare(tables, CLIENTS, rig, options, work)
    report(tables, header, options)


def make_files(work: Work, works: list[str]) -> None:
    """Checkpoints whose tensors are full of their number."""
    work.path("").mkdir()

    def state(count: int) -> dict[str, torch.Tensor]:
        return {f"layer.{number}": torch.full((work.size // count // 4,), float(number)) for number in range(count)}

    if {"pt", "one"} & set(works):
        torch.save(state(TENSORS), work.path("large.pt"))
    if "safetensors" in works:
        import_module("safetensors.torch").save_file(state(TENSORS), work.path("large.safetensors"))
    if {"small", "raw", "requests"} & set(works):
        torch.save(state(SMALL_TENSORS), work.path("small.pt"))


def _numbered(found: dict[str, torch.Tensor]) -> list[tuple[int, torch.Tensor]]:
    return [(int(name.rpartition(".")[2]), tensor) for name, tensor in found.items()]


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
