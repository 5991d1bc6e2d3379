"""Places to keep checkpoints in, and a view of S3 that owes nothing to our code."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import fsspec
import pytest
import s3fs

from torch_s3 import S3FileSystem

_MIB = 1024 * 1024


@pytest.fixture
def open_uploads(client, bucket):
    """Lists the multipart uploads to `bucket` that are neither complete nor aborted."""
    return lambda: client.list_multipart_uploads(Bucket=bucket[5:]).get("Uploads", [])


@dataclass(frozen=True)
class Place:
    """A folder in some filesystem, empty at first."""

    uri: str
    arguments: dict[str, Any] = field(repr=False)
    """Those that load_checkpoint and save_checkpoint need to get there."""
    fs: fsspec.AbstractFileSystem
    """An instance of the test's own, whose methods it may replace."""
    leftovers: Callable[[], list[Any]] = list
    """What unfinished writes have left outside the folder."""

    def names(self):
        """All that is there."""
        self.fs.invalidate_cache()
        return sorted(name.rpartition("/")[2] for name in self.fs.find(self.uri))

    def put(self, name, content):
        """Have ``content`` there, by no code of ours but the filesystem's."""
        self.fs.makedirs(self.fs._strip_protocol(f"{self.uri}/{name}").rpartition("/")[0], exist_ok=True)
        self.fs.pipe_file(f"{self.uri}/{name}", content)

    def read(self, name):
        """The bytes of what is there."""
        return self.fs.cat_file(f"{self.uri}/{name}")


@pytest.fixture(params=["s3", "s3fs", "memory", "file"])
def place(request, tmp_path, monkeypatch):
    """A `Place` in each kind of filesystem. On S3, files of more than 5 MiB are written in parts."""
    own = {"skip_instance_cache": True}
    if request.param == "memory":
        return Place(f"memory://{tmp_path}", {}, fsspec.filesystem("memory", **own))
    if request.param == "file":
        temporary = tmp_path / "temporary"
        temporary.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
        uri = (tmp_path / "checkpoints").as_uri()
        return Place(uri, {}, fsspec.filesystem("file", **own), lambda: list(temporary.iterdir()))
    s3, bucket, open_uploads = map(request.getfixturevalue, ("s3", "bucket", "open_uploads"))
    if request.param == "s3fs":
        fs = s3fs.S3FileSystem(**s3.storage_options, **own, default_block_size=5 * _MIB)
        return Place(bucket, {"filesystem": fs}, fs, open_uploads)
    options = s3.storage_options | {"part_size": 5 * _MIB}
    return Place(bucket, {"storage_options": options}, S3FileSystem(**options, **own), open_uploads)
