"""The clients that the transport benchmark compares, each used as its documentation recommends for the work.

Every client has the same jobs: read a large object into memory that exists and is touched already (a client that cannot
write there gives the parts that it read), and many small ones, both with the same number of requests in flight; and
read one small object. A client that cannot do a job raises :class:`CannotRun`, when it is made or given the job.
"""

from __future__ import annotations

import io
import socket
import ssl
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from benchmarks.rig import KEY, REGION, SECRET, Rig
from benchmarks.table import CannotRun, Peer

_AS_ABOVE = "reads small objects as in the row above"
Parts = Sequence[Any]  # bytes-like objects


@dataclass(frozen=True)
class Work:
    """What every client is asked to read, and how."""

    bucket: str
    large: str  # key
    size: int  # bytes
    small: Sequence[str]  # keys
    part: int  # bytes a request of the large object
    in_flight: int  # requests at once

    @property
    def starts(self) -> range:
        return range(0, self.size, self.part)


def boto3_client(rig: Rig, connections: int) -> Any:
    config = import_module("botocore.config").Config(
        max_pool_connections=connections,
        # Nothing to validate here, and asking costs time.
        response_checksum_validation="when_required",
    )
    return import_module("boto3").client(
        "s3",
        endpoint_url=rig.endpoint_url,
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        config=config,
        **rig.storage_options["client_kwargs"],
    )


def boto3_file(client: Any, bucket: str, key: str) -> io.BytesIO:
    """An object as a file in memory, fetched by boto3's own transfer manager."""
    buffer = io.BytesIO()
    client.download_fileobj(bucket, key, buffer)
    buffer.seek(0)
    return buffer


def s3fs_filesystem(rig: Rig, connections: int) -> Any:
    return import_module("s3fs").S3FileSystem(
        config_kwargs={"max_pool_connections": connections}, skip_instance_cache=True, **rig.storage_options
    )


def obstore_store(rig: Rig, bucket: str) -> Any:
    client_options: dict[str, Any] = {"allow_http": rig.ca_file is None}
    if rig.ca_file:
        client_options["root_certificate"] = rig.ca_file.read_text()
    return import_module("obstore.store").S3Store(
        bucket,
        endpoint=rig.endpoint_url,
        region=REGION,
        access_key_id=KEY,
        secret_access_key=SECRET,
        virtual_hosted_style_request=False,
        client_options=client_options,
    )


def s3torch_client(rig: Rig, part: int) -> Any:
    if rig.ca_file:
        raise CannotRun("cannot be told to trust a private authority")
    config = import_module("s3torchconnector").S3ClientConfig(
        throughput_target_gbps=100.0, part_size=part, force_path_style=True
    )
    native = import_module("s3torchconnector._s3client")
    return native.S3Client(REGION, endpoint=rig.endpoint_url, s3client_config=config)


class Client(Protocol):
    def __init__(self, rig: Rig, work: Work) -> None: ...

    def read_large(self, out: memoryview) -> Parts | None:
        """Fill ``out`` with the large object and return None; or return its parts, in order."""

    def read_small(self) -> Iterable[Any]:
        """The small objects' bytes, in order; the caller drops each before it takes the next."""

    def get_small(self, key: str) -> Any:
        """One small object's bytes. Any thread."""

    def close(self) -> None: ...


class TorchS3:
    """One I/O thread, and no other."""

    def __init__(self, rig: Rig, work: Work) -> None:
        module, self._uris = import_module("torch_s3"), import_module("torch_s3.uris")
        self._fs = module.S3FileSystem(max_connections=work.in_flight, part_size=work.part, **rig.storage_options)
        self._work = work

    def read_large(self, out: memoryview) -> None:
        self._fs.read_into(f"{self._work.bucket}/{self._work.large}", 0, out)

    def read_small(self) -> Iterable[Any]:
        reads = [self._uris.Read(f"{self._work.bucket}/{key}") for key in self._work.small]
        window = 2 * self._work.in_flight  # as they are taken in order, the next must be at hand while one is late
        found: Iterable[Any] = self._uris.read_ahead(self._fs, reads, window=window)
        return found

    def get_small(self, key: str) -> Any:
        return self._fs.cat_file(f"{self._work.bucket}/{key}")

    def close(self) -> None: ...


class _Threaded(ABC):
    """A client that blocks, called from as many threads as there are requests in flight."""

    def __init__(self, rig: Rig, work: Work) -> None:
        self.work = work
        self._pool = ThreadPoolExecutor(work.in_flight)

    @abstractmethod
    def get_range(self, start: int, out: memoryview) -> None:
        """Fill ``out`` with the large object's bytes from ``start``."""

    @abstractmethod
    def get_small(self, key: str) -> Any:
        """One small object's bytes."""

    def read_large(self, out: memoryview) -> Parts | None:
        part = self.work.part
        list(self._pool.map(lambda start: self.get_range(start, out[start : start + part]), self.work.starts))
        return None

    def read_small(self) -> Iterable[Any]:
        return self._pool.map(self.get_small, self.work.small)

    def close(self) -> None:
        self._pool.shutdown()


class Boto3(_Threaded):
    def __init__(self, rig: Rig, work: Work) -> None:
        self._client = boto3_client(rig, work.in_flight)
        super().__init__(rig, work)

    def get_range(self, start: int, out: memoryview) -> None:
        byte_range = f"bytes={start}-{start + len(out) - 1}"
        body = self._client.get_object(Bucket=self.work.bucket, Key=self.work.large, Range=byte_range)["Body"]
        got = 0
        while got < len(out):
            count = body.readinto(out[got:])
            if not count:
                raise EOFError(f"the body ended after {got} bytes of {len(out)}")
            got += count

    def get_small(self, key: str) -> Any:
        return self._client.get_object(Bucket=self.work.bucket, Key=key)["Body"].read()


class Obstore(_Threaded):
    """In threads its calls release the GIL, and beat its ``asyncio`` ones; its parts are then copied to their place."""

    def __init__(self, rig: Rig, work: Work) -> None:
        self._obstore = import_module("obstore")
        self._store = obstore_store(rig, work.bucket)
        super().__init__(rig, work)

    def get_range(self, start: int, out: memoryview) -> None:
        out[:] = memoryview(self._obstore.get_range(self._store, self.work.large, start=start, length=len(out)))

    def get_small(self, key: str) -> Any:
        return self._obstore.get(self._store, key).bytes()


class S3Fs:
    def __init__(self, rig: Rig, work: Work) -> None:
        self._fs = s3fs_filesystem(rig, work.in_flight)
        self._work = work

    def read_large(self, out: memoryview) -> Parts:
        starts = list(self._work.starts)
        ends = [min(start + self._work.part, self._work.size) for start in starts]
        paths = [f"{self._work.bucket}/{self._work.large}"] * len(starts)
        found: Parts = self._fs.cat_ranges(paths, starts, ends, batch_size=self._work.in_flight, on_error="raise")
        return found

    def read_small(self) -> Iterable[Any]:
        paths = [f"{self._work.bucket}/{key}" for key in self._work.small]
        # max_concurrency is of the parts of one object; at 1 it saves asking for each object's size first.
        found = self._fs.cat(paths, batch_size=self._work.in_flight, max_concurrency=1)
        return (found[path] for path in paths)

    def get_small(self, key: str) -> Any:
        return self._fs.cat_file(f"{self._work.bucket}/{key}")

    def close(self) -> None: ...


class S3TorchConnector(_Threaded):
    """Its range-based readers, one a range, write into given memory."""

    def __init__(self, rig: Rig, work: Work) -> None:
        self._module = import_module("s3torchconnector")
        self._client = s3torch_client(rig, work.part)
        self._info = self._client.head_object(work.bucket, work.large)  # else each reader would ask for it
        super().__init__(rig, work)

    def get_range(self, start: int, out: memoryview) -> None:
        ranged = self._module.S3ReaderConstructor.range_based(buffer_size=0)
        reader = self._client.get_object(
            self.work.bucket, self.work.large, object_info=self._info, reader_constructor=ranged
        )
        reader.seek(start)
        if reader.readinto(out) != len(out):
            raise EOFError(f"fewer bytes than asked for at {start}")

    def get_small(self, key: str) -> Any:
        return self._client.get_object(self.work.bucket, key).read()


class S3TorchConnectorReader(S3TorchConnector):
    """Its default reader, one for the whole object, as its checkpoints use it."""

    def read_large(self, out: memoryview) -> None:
        reader = self._client.get_object(self.work.bucket, self.work.large)
        if reader.readinto(out) != len(out):
            raise EOFError("fewer bytes than the object has")

    def read_small(self) -> Iterable[Any]:
        raise CannotRun(_AS_ABOVE)

    def get_small(self, key: str) -> Any:
        raise CannotRun(_AS_ABOVE)


class AwsCrt:
    """Cuts the large object into parts by itself, and hands over the bytes in a callback."""

    def __init__(self, rig: Rig, work: Work) -> None:
        auth, io, self._s3 = import_module("awscrt.auth"), import_module("awscrt.io"), import_module("awscrt.s3")
        self._http = import_module("awscrt.http")
        tls = None
        if rig.ca_file:
            options = io.TlsContextOptions()
            options.override_default_trust_store_from_path(ca_filepath=str(rig.ca_file))
            tls = io.ClientTlsContext(options).new_connection_options()
        self._client = self._s3.S3Client(
            region=REGION,
            signing_config=self._s3.create_default_s3_signing_config(
                region=REGION, credential_provider=auth.AwsCredentialsProvider.new_static(KEY, SECRET)
            ),
            tls_mode=self._s3.S3RequestTlsMode.ENABLED if tls else self._s3.S3RequestTlsMode.DISABLED,
            tls_connection_options=tls,
            part_size=work.part,
            throughput_target_gbps=100.0,
            max_active_connections_override=work.in_flight,
        )
        self._host = f"127.0.0.1:{rig.port}"
        self._work = work

    def _get(self, key: str, on_body: Callable[..., None]) -> Any:
        headers = self._http.HttpHeaders([("host", self._host)])
        request = self._http.HttpRequest("GET", f"/{self._work.bucket}/{key}", headers)
        return self._client.make_request(type=self._s3.S3RequestType.GET_OBJECT, request=request, on_body=on_body)

    def read_large(self, out: memoryview) -> None:
        def on_body(chunk: bytes, offset: int, **_: Any) -> None:
            out[offset : offset + len(chunk)] = chunk

        self._get(self._work.large, on_body).finished_future.result()

    def read_small(self) -> Iterator[Any]:
        flying: deque[tuple[list[bytes], Any]] = deque()
        for key in self._work.small:
            parts: list[bytes] = []
            flying.append((parts, self._get(key, lambda chunk, *, into=parts, **_: into.append(chunk))))
            if len(flying) >= self._work.in_flight:
                yield self._body(*flying.popleft())
        while flying:
            yield self._body(*flying.popleft())

    def get_small(self, key: str) -> Any:
        parts: list[bytes] = []
        return self._body(parts, self._get(key, lambda chunk, **_: parts.append(chunk)))

    def _body(self, parts: list[bytes], request: Any) -> bytes:
        request.finished_future.result()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None: ...


class BareReceive(_Threaded):
    """No client: requests without a signature, and the bodies received where they belong, in four threads.

    The limit of what blocking Python reaches on this server. (In weather it takes a thread a connection.)
    """

    def __init__(self, rig: Rig, work: Work) -> None:
        threads = work.in_flight if work.in_flight > 16 else 4
        super().__init__(rig, Work(work.bucket, work.large, work.size, work.small, work.part, threads))
        context = ssl.create_default_context(cafile=rig.ca_file) if rig.ca_file else None
        self._free: list[socket.socket] = []
        for _ in range(threads):
            plain = socket.create_connection(("127.0.0.1", rig.port))
            self._free.append(context.wrap_socket(plain, server_hostname="127.0.0.1") if context else plain)

    def get_range(self, start: int, out: memoryview) -> None:
        connection = self._free.pop()
        path = f"/{self.work.bucket}/{self.work.large}"
        ask = f"GET {path} HTTP/1.1\r\nHost: bare\r\nRange: bytes={start}-{start + len(out) - 1}\r\n\r\n"
        connection.sendall(ask.encode())
        head = connection.recv(4096)
        if not head.startswith(b"HTTP/1.1 206"):
            raise CannotRun("needs nginx, which asks for no signature")
        while b"\r\n\r\n" not in head:
            head += connection.recv(4096)
        body = head.partition(b"\r\n\r\n")[2]
        got = len(body)
        out[:got] = body
        while got < len(out):
            count = connection.recv_into(out[got:])
            if not count:
                raise EOFError(f"the body ended after {got} bytes of {len(out)}")
            got += count
        self._free.append(connection)

    def get_small(self, key: str) -> Any:
        raise CannotRun("measures large objects only")

    def close(self) -> None:
        super().close()
        for connection in self._free:
            connection.close()


CLIENTS: dict[str, Peer[Client]] = {
    "torch_s3": Peer(TorchS3, "torch-s3"),
    "boto3": Peer(Boto3, "boto3"),
    "s3fs": Peer(S3Fs, "s3fs"),
    "obstore": Peer(Obstore, "obstore"),
    "s3torchconnector": Peer(S3TorchConnector, "s3torchconnector"),
    "s3torchconnector, 1 reader": Peer(S3TorchConnectorReader, "s3torchconnector"),
    "awscrt": Peer(AwsCrt, "awscrt"),
    "bare recv_into": Peer(BareReceive, ""),
}
