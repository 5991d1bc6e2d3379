"""torch_s3's saving beside other ways, over the same server, in one run: ``python -m benchmarks.checkpoint_save``.

A state of 1.2 GB of float32 in 192 tensors, and one of as much in 20,000, are saved from memory to one object with
torch.save, by parts of 8 MiB with the checksums that each client sends by default. The server is nginx, which reads the
parts and forgets them: one that stores them would be what is measured. Each round runs in a process of its own, so that
``peak``, the memory that the process needs beyond the state, is the client's. In the warm-up a small state goes to
rclone, and what is there must load, and equal it.

Last, how long ``save_async`` holds the thread that trains, beside a ``clone()`` of every tensor, and beside a copy of
each to memory that is there already.
"""

from __future__ import annotations

import io
import statistics
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.peers import boto3_client, s3fs_filesystem, s3torch_client
from benchmarks.rig import SINK, Rig, object_folder, serve
from benchmarks.table import (
    BUCKET,
    OURS,
    Figures,
    Peer,
    Sends,
    compare,
    describe,
    figures,
    in_own_process,
    need_sink,
    parse,
    parser,
    report,
    show,
)

MIB = 1 << 20
PART = 8 * MIB
SMALL = 40 * MIB  # of the state that is compared
HELD = 1_200_000_000  # bytes at most of the state that is copied: there are four of it at once
State = dict[str, torch.Tensor]


def by_torch_s3(rig: Rig, bucket: str, state: State) -> None:
    options = rig.storage_options | {"part_size": PART}
    import_module("torch_s3").save_checkpoint(state, f"s3://{bucket}/key", storage_options=options)


def by_boto3(rig: Rig, bucket: str, state: State) -> None:
    config = import_module("boto3.s3.transfer").TransferConfig(multipart_chunksize=PART)  # 10 threads
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    boto3_client(rig, 10).upload_fileobj(file, bucket, "key", Config=config)


def by_s3fs(rig: Rig, bucket: str, state: State) -> None:
    with s3fs_filesystem(rig, 16).open(f"{bucket}/key", "wb", block_size=PART) as file:
        torch.save(state, file)


def by_s3torchconnector(rig: Rig, bucket: str, state: State) -> None:
    writer = s3torch_client(rig, PART).put_object(bucket, "key")
    torch.save(state, writer)
    writer.close()


def into_nothing(rig: Rig, bucket: str, state: State) -> None:
    """What torch.save itself costs."""
    if bucket != SINK:
        by_torch_s3(rig, bucket, state)  # there is nothing to compare
    else:
        torch.save(state, io.BufferedWriter(_Nothing(), 1))


class _Nothing(io.RawIOBase):
    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return memoryview(data).nbytes


class Saver:
    """Runs one client in processes of its own."""

    def __init__(self, rig: Rig, save: Callable[[Rig, str, State], None]) -> None:
        self._rig, self._save = rig, save

    def save(self, bucket: str, size: int, count: int) -> Figures:
        """Save ``size`` bytes in ``count`` tensors, and say what that took."""
        return in_own_process(work, self._rig, self._save, bucket, size, count)

    def close(self) -> None: ...


def work(rig: Rig, save: Callable[[Rig, str, State], None], bucket: str, size: int, count: int) -> Figures:
    """In the process: save, and measure."""
    save(rig, bucket, state_of(MIB, 1))  # loads what is loaded but once
    state = state_of(size, count)
    return figures(lambda: save(rig, bucket, state))


def state_of(size: int, count: int) -> State:
    """``count`` tensors of float32 of about ``size`` bytes in all, the same in every process."""
    torch.manual_seed(0)
    return {f"layers.{number}.weight": torch.rand(max(1, size // 4 // count)) for number in range(count)}


SAVERS = {
    OURS: Peer(lambda rig: Saver(rig, by_torch_s3), "torch-s3"),
    "boto3": Peer(lambda rig: Saver(rig, by_boto3), "boto3"),
    "s3fs": Peer(lambda rig: Saver(rig, by_s3fs), "s3fs"),
    "s3torchconnector": Peer(lambda rig: Saver(rig, by_s3torchconnector), "s3torchconnector"),
    "nowhere": Peer(lambda rig: Saver(rig, into_nothing), ""),
}


class Save(Sends[Saver]):
    def __init__(self, folder: Path, size: int, count: int) -> None:
        super().__init__(size)
        self._folder, self._size, self._count = folder, size, count
        self.title = f"Save {size / 1e9:.1f} GB in {count:,} tensors"

    def run(self, client: Saver) -> Figures:
        return client.save(SINK, self._size, self._count)

    def verify(self, client: Saver) -> bool:
        client.save(BUCKET, SMALL, 5)
        found = torch.load(self._folder / BUCKET / "key", weights_only=True)
        wanted = state_of(SMALL, 5)
        return list(found) == list(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)


class Held(NamedTuple):
    """Seconds that a thread is held in each round: by save_async, and by copies of all tensors."""

    saves: list[float]
    clones: list[float]
    copies: list[float]


def held(rig: Rig, size: int, count: int, rounds: int) -> Held:
    """Alternate between save_async, a clone() of each tensor, and a copy of each to memory that is there already."""
    manager = import_module("torch_s3").CheckpointManager(f"s3://{SINK}/run", storage_options=rig.storage_options)
    # The sink keeps no manifest that could be read back.
    manager._commit = manager._tidy = manager._check_new = lambda *_: None  # noqa: SLF001
    state = state_of(size, count)
    there = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    found = Held([], [], [])
    for step in range(rounds + 1):
        start = time.perf_counter()
        copied = {name: tensor.clone() for name, tensor in state.items()}
        found.clones.append(time.perf_counter() - start)
        del copied
        start = time.perf_counter()
        for name, tensor in state.items():
            there[name].copy_(tensor)
        found.copies.append(time.perf_counter() - start)
        start = time.perf_counter()
        manager.save_async(step, state)
        found.saves.append(time.perf_counter() - start)
        manager.wait()
    manager.close()
    return found


def main() -> None:
    made = parser("checkpoint_save", __doc__, SAVERS, rounds=3)
    made.add_argument("--size", type=float, default=1.2, metavar="GB", help="of the state (default: 1.2)")
    options = parse(made)
    size = int(options.size * 1e9)
    with object_folder(2 * SMALL) as folder:
        (folder / BUCKET).mkdir()
        with serve(folder, tls=options.tls, weather=options.weather) as rig:
            need_sink(rig)
            header = describe("checkpoint_save", rig, SAVERS, options)
            header["peak"] = f"memory beyond the process with the state in it; a part is {PART // MIB} MiB"
            header["nowhere"] = "torch.save into a file that discards it: what all of them pay"
            show(header)
            tables = [Save(folder, size, count) for count in (192, 20_000)]
            compare(tables, SAVERS, rig, options)
            size = min(size, HELD)
            waits = {n: in_own_process(held, rig, size, n, options.rounds) for n in (192, 20_000)}
    report(tables, header, options)
    for count, found in waits.items():
        saves, clones, copies = (statistics.median(times[1:]) for times in found)
        print(f"\nsave_async of {size / 1e9:.1f} GB in {count:,} tensors holds the thread for {saves:.3f} s:")
        print(
            f"  {saves / clones:.2f} x a clone() of each, {saves / copies:.2f} x a copy of each to memory that is there"
        )
        print(f"  the first time {found.saves[0]:.3f} s, {found.saves[0] / found.clones[0]:.2f} x a clone() of each")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
