"""torch_s3's uploads beside other clients', over the same server, in one run: ``python -m benchmarks.upload``.

1 GiB goes from memory into one object by parts of 8 MiB, with the checksums that each client sends by default, through
what each offers for it. The server is nginx, which reads the parts and forgets them: one that stores them would be what
is measured. Each round runs in a process of its own, so that ``peak``, the memory that the process needs beyond what it
had before (the data included), is the client's. In the warm-up the object goes to rclone, and is compared.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import boto3_client, obstore_store, s3fs_filesystem, s3torch_client
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
IN_FLIGHT = 4  # parts; ours, and obstore's concurrency
WRITE = 16 * MIB  # what torch.save writes at a time
SAMPLE = 5 * PART + 1  # bytes of the object that is compared


def by_torch_s3(rig: Rig, bucket: str, data: memoryview) -> None:
    filesystem = import_module("torch_s3").S3FileSystem(part_size=PART, **rig.storage_options)
    _write(filesystem.open(f"{bucket}/key", "wb"), data)


def by_boto3(rig: Rig, bucket: str, data: memoryview) -> None:
    config = import_module("boto3.s3.transfer").TransferConfig(multipart_chunksize=PART)  # 10 threads
    boto3_client(rig, 10).upload_fileobj(_Reader(data), bucket, "key", Config=config)


def by_s3fs(rig: Rig, bucket: str, data: memoryview) -> None:
    _write(s3fs_filesystem(rig, 16).open(f"{bucket}/key", "wb", block_size=PART), data)


def by_obstore(rig: Rig, bucket: str, data: memoryview) -> None:
    import_module("obstore").put(
        obstore_store(rig, bucket), "key", data, use_multipart=True, chunk_size=PART, max_concurrency=IN_FLIGHT
    )


def by_s3torchconnector(rig: Rig, bucket: str, data: memoryview) -> None:
    writer = s3torch_client(rig, PART).put_object(bucket, "key")
    for start in range(0, len(data), WRITE):
        writer.write(bytes(data[start : start + WRITE]))
    writer.close()


def _write(file: Any, data: memoryview) -> None:
    with file:
        for start in range(0, len(data), WRITE):
            file.write(data[start : start + WRITE])


class _Reader(io.RawIOBase):
    """A file over memory, which io.BytesIO would copy."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        piece = self._data[self._at : self._at + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


class Uploader:
    """Runs one client in processes of its own."""

    def __init__(self, rig: Rig, upload: Callable[[Rig, str, memoryview], None]) -> None:
        self._rig, self._upload = rig, upload

    def upload(self, bucket: str, size: int) -> Figures:
        """Upload ``size`` bytes, and say what that took."""
        return in_own_process(work, self._rig, self._upload, bucket, size)

    def close(self) -> None: ...


def work(rig: Rig, upload: Callable[[Rig, str, memoryview], None], bucket: str, size: int) -> Figures:
    """In the process: upload, and measure."""
    upload(rig, bucket, memoryview(bytes(MIB)))  # loads what is loaded but once
    data = content(size).data
    return figures(lambda: upload(rig, bucket, data))


def content(size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Bytes, the same in every process."""
    return np.resize(np.frombuffer(np.random.default_rng(0).bytes(PART + 7), np.uint8), size)


def _peer(upload: Callable[[Rig, str, memoryview], None], distribution: str) -> Peer[Uploader]:
    return Peer(lambda rig: Uploader(rig, upload), distribution)


UPLOADERS = {
    OURS: _peer(by_torch_s3, "torch-s3"),
    "boto3": _peer(by_boto3, "boto3"),
    "s3fs": _peer(by_s3fs, "s3fs"),
    "obstore": _peer(by_obstore, "obstore"),
    "s3torchconnector": _peer(by_s3torchconnector, "s3torchconnector"),
}


class Upload(Sends[Uploader]):
    def __init__(self, folder: Path, size: int) -> None:
        super().__init__(size)
        self._folder, self._size = folder, size
        self.title = f"One object of {size // MIB:,} MiB in parts of {PART // MIB} MiB"

    def run(self, client: Uploader) -> Figures:
        return client.upload(SINK, self._size)

    def verify(self, client: Uploader) -> bool:
        client.upload(BUCKET, SAMPLE)
        return (self._folder / BUCKET / "key").read_bytes() == content(SAMPLE).tobytes()


def main() -> None:
    made = parser("upload", __doc__, UPLOADERS, rounds=3)
    made.add_argument("--size", type=int, default=1024, metavar="MIB", help="of the object (default: 1024)")
    options = parse(made)
    with object_folder(SAMPLE) as folder:
        (folder / BUCKET).mkdir()
        with serve(folder, tls=options.tls, weather=options.weather) as rig:
            need_sink(rig)
            header = describe("upload", rig, UPLOADERS, options)
            header["peak"] = f"memory beyond what the process had; a part is {PART // MIB} MiB"
            show(header)
            tables = [Upload(folder, options.size * MIB)]
            compare(tables, UPLOADERS, rig, options)
    report(tables, header, options)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
