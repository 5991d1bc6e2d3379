"""Archives, read in memory: nothing is extracted."""

from __future__ import annotations

import itertools
import os
import stat
import struct
import tarfile
import zipfile
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import fsspec
from zlib_ng import zlib_ng

from torch_s3 import errors
from torch_s3.artifacts.members import Caps, Names, quoted
from torch_s3.artifacts.source import MAX_BYTES, MemoryFile, receive, resolve_object
from torch_s3.artifacts.unpack import MAX_RATIO, Limits, compression, unpacked
from torch_s3.filesystem import S3FileSystem
from torch_s3.reader import S3Reader
from torch_s3.source import Source, opened
from torch_s3.uris import translated
from torch_s3.wording import listed

_ENTRY = 512  # bytes of a zip's directory that a member may take on average
_LEAST = 1 << 20  # of a zip's directory, that are read in any case
_LOCAL = struct.Struct("<4s22x2H")  # of a zip member's local header: sign, lengths of its name and its extra field
_TAR_BLOCK = 512
_TAR_HEADERS = 64 * 1024  # bytes of a member's, of which PAX has most
_TAR_GLOBAL = 100  # PAX's for all members that follow, which tarfile copies for each
_TAR_KINDS = ("gzip", "bz2", "xz", "zstd")
_METHODS = {zipfile.ZIP_DEFLATED: "deflate", zipfile.ZIP_BZIP2: "bz2", 93: "zstd"}
_ENCRYPTED = 1
_LISTED = 20  # names in a message
_TYPES = {
    tarfile.SYMTYPE: "a link",
    tarfile.LNKTYPE: "a link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
}


class Artifact(Mapping[str, bytes]):
    """An archive's regular files by name, as :func:`open_artifact` opens it. For one thread.

    ``artifact[name]`` is a member's bytes. :meth:`view` and :meth:`open` give them without a copy.

    Attributes:
        uri: Of the archive.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._found: dict[str, Any] | None = {}

    @property
    def _members(self) -> dict[str, Any]:
        if self._found is None:
            raise ValueError(f"{self.uri}: this archive is closed")
        return self._found

    def __repr__(self) -> str:
        state = "closed" if self._found is None else f"{len(self._found)} members"
        return f"<torch_s3 archive {self.uri}: {state}>"

    def __getitem__(self, name: str) -> bytes:
        return bytes(self.view(name))

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    @abstractmethod
    def view(self, name: str) -> memoryview:
        """A member's bytes as memory.

        Of a tar it is the archive's own, which others may see; of a zip it is fetched anew each time.

        Raises:
            KeyError: There is no such member.
            IntegrityError: Its CRC32 is wrong.
            ArtifactError: It is damaged, or larger than allowed.
        """

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a member, as the archive says, unpacked."""

    def open(self, name: str) -> MemoryFile:
        """A member as a seekable file in memory."""
        return MemoryFile(self.view(name), name)

    def _member(self, name: str) -> Any:
        if name not in self._members:
            raise KeyError(f"{self.uri}: it has no member {name!r}; it has {shown(self)}")
        return self._members[name]

    def close(self) -> None:
        """Give up what is kept open or in memory: after that, any use is a ``ValueError``."""
        self._found = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_artifact(
    uri: str,
    *,
    max_members: int = 100_000,
    max_member_bytes: int = MAX_BYTES,
    max_bytes: int = MAX_BYTES,
    max_ratio: float = MAX_RATIO,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: fsspec.AbstractFileSystem | None = None,
) -> Artifact:
    """Open an archive as a mapping from its members' names to their bytes, in memory: nothing is written anywhere.

    ``.tar``, ``.tar.gz``, ``.tar.bz2``, ``.tar.xz``, ``.tar.zst`` and ``.zip``; which one it is, its content tells. A
    tar is received whole, by parallel ranges, and unpacked where it is compressed. Of a zip, the directory is read, and
    then the members that are asked for: one range each.

    Args:
        uri: ``s3://bucket/key``, or a file of any filesystem that fsspec knows.
        max_members: Most members, folders among them.
        max_member_bytes: Most bytes of a member.
        max_bytes: Most bytes of all members together, and of what is received.
        max_ratio: Most bytes that may be unpacked from one, beyond the first MiB.
        storage_options: For the filesystem, see :class:`~torch_s3.S3FileSystem`.
        filesystem: Used instead of one made for the uri.

    Raises:
        NotFound: There is no such object.
        ArtifactError: It is no archive, or truncated or damaged; a member is a link, a device, encrypted, or has a
            name that is absolute, leaves the archive by ``..`` or is there twice; or there is more than allowed.
        ObjectChanged: It was overwritten while it was read.
    """
    uri = os.fspath(uri)
    fs, path = resolve_object(uri, storage_options=storage_options, filesystem=filesystem)
    caps = Caps(max_members, max_member_bytes, max_bytes, max_ratio)
    with opened(fs, path, uri) as source:
        if not is_zip(source.head):
            return tar_in(receive(source, max_bytes=max_bytes), caps, uri=uri)
        file = reader_of(fs, path, source)
    return Zip(file, caps, uri=uri)


def shown(names: Collection[str]) -> str:
    """The names of members, in a message."""
    return listed(names, _LISTED)[:2000] or "none"


def is_zip(head: memoryview | bytes) -> bool:
    """Whether bytes that begin so are a zip's."""
    return bytes(head[:4]) in (b"PK\x03\x04", b"PK\x05\x06")


def is_tar(head: memoryview | bytes) -> bool:
    """Whether bytes that begin so are a tar's, of any format since 1988."""
    return bytes(head[257:262]) == b"ustar"


def reader_of(fs: fsspec.AbstractFileSystem, path: str, source: Source) -> Any:
    """The same version of the file as the source's, where it has a name."""
    if isinstance(fs, S3FileSystem):
        bucket, key, version = fs.locate(path)
        return S3Reader(fs.client, bucket, key, size=source.size, etag=source.etag, version_id=version, fs=fs)
    with translated(source.uri):
        return fs.open(path, "rb")


# ---------------------------------------------------------------------- tar


class _Tar(Artifact):
    def __init__(self, members: dict[str, memoryview], uri: str) -> None:
        super().__init__(uri)
        self._found = members

    def view(self, name: str) -> memoryview:
        found: memoryview = self._member(name)
        return found

    def size(self, name: str) -> int:
        return len(self._member(name))


def tar_in(content: memoryview, caps: Caps, *, uri: str) -> Artifact:
    """A tar, perhaps compressed, that is in memory.

    Raises:
        ArtifactError: See :func:`open_artifact`.
    """
    kind = None if is_tar(content) else compression(content, _TAR_KINDS)
    if kind is not None:
        content = unpacked(content, kind, Limits(caps.bytes, caps.ratio), what="the archive", uri=uri)
    found = Names(caps, uri)
    members: dict[str, memoryview] = {}
    reached = 0  # where the next member's header is
    try:
        file: Any = _Bounded(MemoryFile(content), _TAR_HEADERS, "headers of a member", uri)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                vars(tar)["members"] = []  # of which it keeps all
                file.left = _TAR_HEADERS
                if len(tar.pax_headers) > _TAR_GLOBAL:
                    raise errors.ArtifactError(f"more than {_TAR_GLOBAL} headers for all its members", uri=uri)
                start, stop = info.offset_data, info.offset_data + (0 if info.isdir() else info.size)
                if not reached < start <= stop:
                    raise tarfile.ReadError("members overlap")
                reached = -(-stop // _TAR_BLOCK) * _TAR_BLOCK
                found.count()
                if info.isdir():
                    continue
                if not info.isreg() or info.issparse():
                    raise found.refused(info.name, f"is {_TYPES.get(info.type, 'no regular file')}")
                name = found.add(info.name, info.size)
                if stop > len(content):
                    raise errors.ArtifactError(f"truncated: it ends before its member {quoted(name)} does", uri=uri)
                members[name] = content[start:stop]
    except errors.S3Error:
        raise
    except (tarfile.TarError, ValueError, ArithmeticError, RecursionError, LookupError, EOFError) as error:
        inside = f"{kind} that holds no tar" if kind else "neither a tar, compressed or not, nor a zip"
        what = "damaged: its tar" if reached else f"no archive that is known here: {inside}"
        raise errors.ArtifactError(f"{what} ({str(error)[:200]})", uri=uri) from None
    if bytes(content[reached : reached + _TAR_BLOCK]) != bytes(_TAR_BLOCK):  # tarfile takes anything for the end
        raise errors.ArtifactError(f"truncated or damaged: its tar has no end at byte {reached}", uri=uri)
    return _Tar(members, uri)


# ---------------------------------------------------------------------- zip


class Zip(Artifact):
    """A zip, of which the directory is read, and members when they are asked for.

    Args:
        file: Of the archive: seekable.
        caps: What it may hold.
        uri: For errors.
    """

    def __init__(self, file: Any, caps: Caps, *, uri: str) -> None:
        super().__init__(uri)
        self._file, self._caps = file, caps
        found = Names(caps, uri)
        with self._reading():
            most = max(_LEAST, caps.members * _ENTRY)
            directory = zipfile.ZipFile(_Bounded(file, most, "its directory (raise max_members)", uri))
        for info in directory.infolist():
            found.count()
            if info.is_dir():
                continue
            mode = info.external_attr >> 16
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                raise found.refused(info.filename, f"is {'a link' if stat.S_ISLNK(mode) else 'no regular file'}")
            if info.flag_bits & _ENCRYPTED:
                raise found.refused(info.filename, "is encrypted: unpack it, and store it so")
            if info.compress_type != zipfile.ZIP_STORED and info.compress_type not in _METHODS:
                raise found.refused(info.filename, f"is compressed by method {info.compress_type}: use deflate")
            if info.compress_type == zipfile.ZIP_STORED and info.file_size != info.compress_size:
                raise found.refused(info.filename, "has two sizes")
            self._members[found.add(info.filename, info.file_size, info.compress_size)] = info
        starts = sorted({info.header_offset for info in directory.infolist()} | {directory.start_dir})
        self._limits = dict(itertools.pairwise(starts))

    def view(self, name: str) -> memoryview:
        info: zipfile.ZipInfo = self._member(name)
        limit = self._limits.get(info.header_offset, 0)
        longest = info.header_offset + 30 + 2 * 0xFFFF + info.compress_size
        with self._reading():
            content = self._range(info.header_offset, min(limit, longest))
        sign, name_length, extra = _LOCAL.unpack_from(content) if len(content) >= 30 else (b"", 0, 0)
        start = 30 + name_length + extra
        packed = content[start : start + info.compress_size]
        written = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437", "surrogateescape")
        if (
            sign != b"PK\x03\x04"
            or len(packed) < info.compress_size
            or bytes(content[30:start])[:name_length] != written
        ):
            raise errors.ArtifactError(f"damaged: its directory and {quoted(name)} don't agree", uri=self.uri)
        if info.compress_type != zipfile.ZIP_STORED:
            limits = Limits(info.file_size, self._caps.ratio)
            packed = unpacked(packed, _METHODS[info.compress_type], limits, what=quoted(name), uri=self.uri)
        if len(packed) != info.file_size or zlib_ng.crc32(packed) != info.CRC:
            raise errors.IntegrityError(
                f"{quoted(name)} is damaged: it has another CRC32 than its zip says", uri=self.uri
            )
        return packed

    def size(self, name: str) -> int:
        info: zipfile.ZipInfo = self._member(name)
        return info.file_size

    def close(self) -> None:
        super().close()
        self._file.close()

    def _range(self, start: int, stop: int) -> memoryview:
        if isinstance(self._file, S3Reader):
            return self._file.receive(start, max(start, stop))
        self._file.seek(start)
        content = bytearray(max(0, stop - start))
        view = memoryview(content)
        while view and (count := self._file.readinto(view)):
            view = view[count:]
        return memoryview(content)[: len(content) - len(view)]

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            with translated(self.uri):
                yield
        except errors.S3Error:
            raise
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as error:
            raise errors.ArtifactError(
                f"truncated or damaged: no whole zip ({str(error)[:200]})", uri=self.uri
            ) from None


def check_zip(content: memoryview, *, uri: str) -> Collection[str]:
    """Compare the CRCs of a zip's members, for libraries that don't. It raises what :class:`Artifact` does.

    Returns:
        The members' names.
    """
    archive = Zip(MemoryFile(content), Caps(ratio=MAX_RATIO), uri=uri)
    for name in archive:
        archive.view(name)
    return archive.keys()


class _Bounded:
    """A file for zipfile and tarfile, which read a whole directory or header at once, whatever its size.

    Attributes:
        left: Bytes that may be read.
    """

    def __init__(self, file: Any, left: int, what: str, uri: str) -> None:
        self._file, self.left, self._what, self._uri = file, left, what, uri

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        """As the file's, but not of so much."""
        found: bytes = b"" if size > self.left else self._file.read(size)
        self.left -= max(size, len(found))
        if self.left < 0:
            raise errors.ArtifactError(f"too many bytes of {self._what}", uri=self._uri)
        return found
