"""Servers on loopback, and an environment without anybody's AWS settings."""

import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import sysconfig
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path

import boto3
import botocore.session
import pytest
import trustme
from fsspec.registry import _registry
from hypothesis import settings

import torch_s3
from torch_s3.testing import serve_s3

settings.register_profile("no deadline", deadline=None)  # no test asserts a time
settings.load_profile("no deadline")
signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells have their background jobs ignore


@pytest.fixture(scope="session", autouse=True)
def _botocore_reads_its_models_once():
    """Each client would parse a megabyte of JSON anew, in each fork too, which takes longer than most tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.session, "create_loader", functools.lru_cache(botocore.session.create_loader))
        yield


@pytest.fixture(autouse=True)
def _no_aws_settings(monkeypatch, tmp_path):
    for name in os.environ:
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def registered():
    """``s3://`` is ours to fsspec, until the test's end."""
    before = dict(_registry)
    torch_s3.register()
    yield
    _registry.clear()
    _registry.update(before)


@pytest.fixture(scope="session")
def tf():
    """TensorFlow, which takes seconds to import."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    return pytest.importorskip("tensorflow")


@pytest.fixture(scope="session")
def s3():
    """moto's S3: every call, any credentials."""
    with serve_s3() as server:
        yield server


@pytest.fixture(scope="session")
def client(s3):
    """boto3's, to `s3`."""
    options = s3.storage_options
    session = boto3.Session(options["key"], options["secret"], **options["client_kwargs"])
    return session.client("s3", endpoint_url=options["endpoint_url"])


@pytest.fixture
def bucket(client):
    """The uri of an empty bucket in `s3`."""
    name = str(uuid.uuid4())
    client.create_bucket(Bucket=name)
    return f"s3://{name}"


@dataclass(frozen=True)
class Rclone:
    """`rclone serve s3`: fast, and refuses wrong signatures."""

    endpoint_url: str
    root: Path
    """A folder here is a bucket, a file in it an object."""
    ca_file: str | None = None
    """What to trust, over TLS."""

    @property
    def storage_options(self):
        return {
            "key": "rclone-id",
            "secret": "rclone-secret",
            "endpoint_url": self.endpoint_url,
            "client_kwargs": {"region_name": "us-east-1"} | ({"verify": self.ca_file} if self.ca_file else {}),
        }

    def create_bucket(self, name):
        (self.root / name).mkdir()
        return f"s3://{name}"


@contextlib.contextmanager
def _serve_rclone(root, *options, ca_file=None):
    rclone = shutil.which("rclone", path=sysconfig.get_path("scripts"))
    # With --dir-cache-time=0 it spins after a deletion, for good.
    always = ["--auth-key=rclone-id,rclone-secret", "--addr=127.0.0.1:0", "--config=", "--dir-cache-time=1ms"]
    command = [rclone, "serve", "s3", *always, *options, root]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wrote = ""
            while not (started := re.search(r"Starting s3 server on \[(https?://[^/\]]+)", wrote)):
                line = process.stderr.readline()
                assert line, f"rclone did not start: {wrote}"
                wrote += line
            threading.Thread(target=process.stderr.read, daemon=True).start()  # or it stops at a full pipe
            yield Rclone(started[1], root, ca_file)
        finally:
            process.kill()


@pytest.fixture(scope="session")
def rclone(tmp_path_factory):
    """An `Rclone` over HTTP."""
    with _serve_rclone(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@pytest.fixture(scope="session")
def rclone_alone(tmp_path_factory):
    """An `Rclone` that alone writes to its folder, and so need not forget what is there: it is kept busy by that."""
    with _serve_rclone(tmp_path_factory.mktemp("rclone-alone"), "--dir-cache-time=5m") as server:
        yield server


@pytest.fixture(scope="session")
def rclone_tls(tmp_path_factory):
    """An `Rclone` over TLS, with its certificate from a CA that only its `ca_file` knows."""
    folder = tmp_path_factory.mktemp("tls")
    ca = trustme.CA()
    certificate = ca.issue_cert("127.0.0.1", "localhost")
    ca.cert_pem.write_to_path(folder / "ca.pem")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    options = [f"--cert={folder / 'cert.pem'}", f"--key={folder / 'key.pem'}"]
    with _serve_rclone(tmp_path_factory.mktemp("rclone-tls"), *options, ca_file=str(folder / "ca.pem")) as server:
        yield server
