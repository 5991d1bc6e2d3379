import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pictures import tree
from servers import running

from torch_s3 import S3FileSystem, S3ImageDataset


@pytest.fixture(scope="session")
def fs(s3):
    """Our filesystem, on the embedded server."""
    return S3FileSystem(**s3.storage_options)


@pytest.fixture(scope="session")
def images(s3, fs):
    """The uri of a prefix with `tree()` in it. Not to be written to."""
    bucket = s3.create_bucket("images")
    fs.pipe({f"{bucket}/train/{name}": body for name, body in tree().items()})
    return f"{bucket}/train/"


@pytest.fixture(scope="session")
def _shared_bucket(s3):
    return s3.create_bucket("shared")


@pytest.fixture
def folder(_shared_bucket):
    """The uri of an empty prefix: cheaper than `bucket`."""
    return f"{_shared_bucket}/{uuid.uuid4()}"


@pytest.fixture(autouse=True)
def _no_ranks(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.fixture
def dataset(images, s3):
    """Makes datasets of the samples 0 … COUNT-1."""

    def make(source=images, **options):
        if not {"storage_options", "filesystem"} & options.keys():
            options["storage_options"] = s3.storage_options
        return S3ImageDataset(source, **options)

    return make


@pytest.fixture
def together():
    """A filesystem whose server answers reads four at a time: one alone would wait for ever. Every object is "body"."""
    arrived = threading.Barrier(4)

    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            arrived.wait(timeout=20)
            self.send_response(200)
            self.send_header("Content-Length", "4")
            self.send_header("ETag", '"1"')
            self.end_headers()
            self.wfile.write(b"body")

        def log_message(self, *_):
            pass

    with running(ThreadingHTTPServer(("127.0.0.1", 0), Answer)) as server:
        yield S3FileSystem(
            key="id", secret="secret", region="us-east-1", endpoint_url=f"http://127.0.0.1:{server.server_port}"
        )
