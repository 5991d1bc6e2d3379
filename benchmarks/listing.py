"""torch_s3's listing beside other clients', over the same server, in one run: ``python -m benchmarks.listing``.

Two works, each of 100,000 keys: in 100 folders, and in one. Ours makes a manifest; boto3's paginator, whose pages are
read into lists of keys, sizes and ETags, and the others do what comes nearest to that. The pages are XML as S3 writes
it, made beforehand and served as files by nginx, because rclone needs longer to list than any client here; ``--rclone``
asks rclone all the same, with real files. CPU is this process's.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, Protocol

from benchmarks.peers import boto3_client, obstore_store, s3fs_filesystem, s3torch_client
from benchmarks.rig import Asked, Rig, object_folder, serve
from benchmarks.table import BUCKET, OURS, Peer, Table, compare, describe, parse, parser, report, show

FOLDERS = 100
PAGE = 1000  # keys, S3's most


class Lister(Protocol):
    def __init__(self, rig: Rig) -> None: ...

    def list(self, prefix: str) -> Any:
        """All keys, sizes and ETags under a prefix, in memory."""

    def keys(self, listed: Any) -> Sequence[str]:
        """The keys of what list() gave."""

    def close(self) -> None: ...


class TorchS3:
    def __init__(self, rig: Rig) -> None:
        self._module, self._options = import_module("torch_s3"), rig.storage_options

    def list(self, prefix: str) -> Any:
        return self._module.Manifest.from_prefix(f"s3://{BUCKET}/{prefix}", storage_options=self._options)

    def keys(self, listed: Any) -> Sequence[str]:
        return [listed.uri(index).removeprefix(f"s3://{BUCKET}/") for index in range(len(listed))]

    def close(self) -> None: ...


class Boto3:
    def __init__(self, rig: Rig) -> None:
        self._client = boto3_client(rig, 16)

    def list(self, prefix: str) -> Any:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [(entry["Key"], entry["Size"], entry["ETag"]) for page in pages for entry in page.get("Contents", ())]

    def keys(self, listed: Any) -> Sequence[str]:
        return [key for key, _, _ in listed]

    def close(self) -> None: ...


class S3Fs:
    def __init__(self, rig: Rig) -> None:
        self._fs = s3fs_filesystem(rig, 16)

    def list(self, prefix: str) -> Any:
        self._fs.invalidate_cache()
        return self._fs.find(f"{BUCKET}/{prefix}", detail=True)

    def keys(self, listed: Any) -> Sequence[str]:
        return [name.removeprefix(f"{BUCKET}/") for name in listed]

    def close(self) -> None: ...


class Obstore:
    def __init__(self, rig: Rig) -> None:
        self._module, self._store = import_module("obstore"), obstore_store(rig, BUCKET)

    def list(self, prefix: str) -> Any:
        return [entry for chunk in self._module.list(self._store, prefix, chunk_size=PAGE) for entry in chunk]

    def keys(self, listed: Any) -> Sequence[str]:
        return [entry["path"] for entry in listed]

    def close(self) -> None: ...


class S3TorchConnector:
    def __init__(self, rig: Rig) -> None:
        self._client = s3torch_client(rig, 8 << 20)

    def list(self, prefix: str) -> Any:
        return [entry for page in self._client.list_objects(BUCKET, prefix) for entry in page.object_info]

    def keys(self, listed: Any) -> Sequence[str]:
        return [entry.key for entry in listed]

    def close(self) -> None: ...


LISTERS: dict[str, Peer[Lister]] = {
    OURS: Peer(TorchS3, "torch-s3"),
    "boto3": Peer(Boto3, "boto3"),
    "s3fs": Peer(S3Fs, "s3fs"),
    "obstore": Peer(Obstore, "obstore"),
    "s3torchconnector": Peer(S3TorchConnector, "s3torchconnector"),
}


class Listing(Table[Lister]):
    unit, cpu_unit = "keys/s", "CPU us/key"

    def __init__(self, prefix: str, keys: Sequence[str]) -> None:
        super().__init__()
        self._prefix, self._keys = prefix, keys
        folders = len({key.rpartition("/")[0] for key in keys})
        self.title = f"{len(keys):,} keys in {folders} folder{'s' * (folders > 1)}"
        self.amount, self.cpu_scale = len(keys), 1e6 / len(keys)

    def run(self, client: Lister) -> Any:
        return client.list(self._prefix)

    def verify(self, client: Lister) -> bool:
        return sorted(client.keys(self.run(client))) == self._keys


def make_keys(prefix: str, count: int, folders: int) -> list[str]:
    """In S3's order."""
    each = -(-count // folders)
    names = (f"{number // each:03}/image-{number:08}.jpeg" for number in range(count))
    return [f"{prefix}{name}" if folders > 1 else f"{prefix}{name[4:]}" for name in names]


def render(prefix: str, keys: Sequence[str]) -> Iterator[tuple[Asked, str]]:
    """Every page of a prefix, of the folders in it, and of the folders."""
    yield from _pages(prefix, "", keys)
    names = dict.fromkeys(key[: key.find("/", len(prefix)) + 1] for key in keys)
    own = [key for key in keys if key.find("/", len(prefix)) < 0]
    yield from _pages(prefix, "/", sorted([*own, *filter(None, names)]))
    for name in filter(None, names):
        yield from render(name, [key for key in keys if key.startswith(name)])


def _pages(prefix: str, delimiter: str, items: Sequence[str]) -> Iterator[tuple[Asked, str]]:
    token = ""
    for start in range(0, len(items), PAGE):
        page, more = items[start : start + PAGE], start + PAGE < len(items)
        asked, token = Asked(BUCKET, prefix, delimiter, token), f"{prefix}{delimiter}{start}"
        said = f"<NextContinuationToken>{token}</NextContinuationToken>" if more else ""
        yield (
            asked,
            (
                '<?xml version="1.0" encoding="UTF-8"?>\n'
                '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
                f"<Name>{BUCKET}</Name><Prefix>{prefix}</Prefix>{said}<KeyCount>{len(page)}</KeyCount>"
                f"<MaxKeys>{PAGE}</MaxKeys><EncodingType>url</EncodingType><IsTruncated>{str(more).lower()}</IsTruncated>"
                f"{''.join(map(_item, page))}</ListBucketResult>"
            ),
        )


def _item(key: str) -> str:
    if key.endswith("/"):
        return f"<CommonPrefixes><Prefix>{key}</Prefix></CommonPrefixes>"
    etag = hashlib.md5(key.encode()).hexdigest()
    return (
        f"<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>&quot;{etag}&quot;</ETag><ChecksumAlgorithm>CRC64NVME</ChecksumAlgorithm>"
        "<ChecksumType>FULL_OBJECT</ChecksumType><Size>90000</Size><StorageClass>STANDARD</StorageClass></Contents>"
    )


def main() -> None:
    made = parser("listing", __doc__, LISTERS, rounds=3)
    made.add_argument("--objects", type=int, default=100_000, help="how many (default: 100000)")
    made.add_argument("--rclone", action="store_true", help="ask rclone, which has the files")
    options = parse(made)
    works = {f"{folders}/": make_keys(f"{folders}/", options.objects, folders) for folders in (FOLDERS, 1)}
    pages = {} if options.rclone else dict(page for prefix, keys in works.items() for page in render(prefix, keys))
    with object_folder(0) as folder:
        if options.rclone:
            for path in (folder / BUCKET / key for keys in works.values() for key in keys):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"x")
        with serve(folder, tls=options.tls, weather=options.weather, pages=pages) as rig:
            header = describe("listing", rig, LISTERS, options)
            header["pages"] = "made by rclone" if options.rclone else "made beforehand, sent by nginx"
            show(header)
            tables = [Listing(prefix, keys) for prefix, keys in works.items()]
            compare(tables, LISTERS, rig, options)
    report(tables, header, options)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
