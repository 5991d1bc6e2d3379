"""An S3 of one's own, for tests and examples.

This file is also the program that the server's process runs: it imports nothing of torch_s3, and so no torch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.util
import io
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import boto3


@dataclass(frozen=True, slots=True)
class EmbeddedS3:
    """An S3 server that `serve_s3` has started."""

    endpoint_url: str
    """Where it listens, such as ``http://127.0.0.1:40213``."""

    @property
    def storage_options(self) -> dict[str, Any]:
        """Endpoint, region and credentials, ready to pass anywhere in the package, or to s3fs. A new dict each time."""
        return {
            "key": "testing",
            "secret": "testing",
            "endpoint_url": self.endpoint_url,
            "client_kwargs": {"region_name": "us-east-1"},
        }

    def create_bucket(self, name: str) -> str:
        """Create the bucket ``name``, unless it is there, and return its uri, ``s3://name``.

        Raises:
            botocore.exceptions.ClientError: S3 allows no such name.
        """
        session = boto3.Session("testing", "testing", region_name="us-east-1")
        session.client("s3", endpoint_url=self.endpoint_url).create_bucket(Bucket=name)
        return f"s3://{name}"


@contextlib.contextmanager
def serve_s3() -> Iterator[EmbeddedS3]:
    """Serve an S3 of its own, empty at first, on a free loopback port while the block runs.

    The server is moto's, in a process that keeps every object to itself. It accepts any credentials, but does not open
    private buckets to anonymous requests, and it speaks S3 alone (no STS). It takes requests from the start of the
    block, and it is gone after the block, or when the process that opened it dies, in whatever way. Any number may run
    at once, opened by any thread; child processes may use one too.

    As a pytest fixture::

        @pytest.fixture(scope="session")
        def s3():
            with serve_s3() as server:
                yield server


        def test_resumes(s3):
            bucket = s3.create_bucket("checkpoints")
            train(f"{bucket}/run-1/", storage_options=s3.storage_options)

    Raises:
        ImportError: moto or Flask is not installed.
        RuntimeError: The server did not start; the message holds what it wrote.
    """
    if not all(map(importlib.util.find_spec, ("flask", "flask_cors", "moto"))):
        raise ImportError("serve_s3 needs moto and Flask: pip install 'torch-s3[demo]'")
    owner = os.getpid()
    # moto, and botocore within it, read these; the caller has set them for other ends.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MOTO_", "S3_"))}
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(  # noqa: S603 this file
            [sys.executable, "-P", __file__, str(owner)],  # -P: don't look for modules beside this file
            env=env | {"MOTO_DISABLE_GLOBAL_CORS": "1"},
            stdin=subprocess.PIPE,  # never written to: its end tells the server that we are gone
            stdout=subprocess.PIPE,
            stderr=log,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            port = process.stdout.readline()
            if not port:
                process.wait()
                log.seek(0)
                raise RuntimeError(f"the embedded S3 did not start:\n{log.read().decode(errors='replace')}")
            yield EmbeddedS3(f"http://127.0.0.1:{int(port)}")
        finally:
            if os.getpid() == owner:  # a forked child may leave the block too
                process.kill()  # it holds nothing that is worth a gentle end


def _serve(parent: int) -> NoReturn:
    """Serve until the process ``parent`` is gone or stdin ends; write the port to stdout once listening."""
    faulthandler.dump_traceback_later(60, exit=True)  # a start that hangs becomes an error that says where
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which may want to save before it stops

    from moto.moto_server.werkzeug_app import MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server
    from werkzeug.test import run_wsgi_app

    class Handler(MotoRequestHandler):
        """werkzeug's handler, with connections that are kept alive: a GET takes a third of the time.

        werkzeug closes each connection, since an application may leave a request's body unread, which would then be
        taken for the next request. So here the body is read before the application is called.
        """

        disable_nagle_algorithm = True  # a head and its body are two writes

        def run_wsgi(self) -> None:
            environ = self.make_environ()
            if environ.get("wsgi.input_terminated"):  # chunked
                body = environ["wsgi.input"].read()
            else:
                body = self.rfile.read(int(environ.get("CONTENT_LENGTH", 0)))
            environ["wsgi.input"] = io.BytesIO(body)
            chunks, status, headers = run_wsgi_app(self.server.app, environ, buffered=True)
            code, _, reason = status.partition(" ")
            self.send_response_only(int(code), reason)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Date", self.date_time_string())
            self.end_headers()
            self.wfile.write(b"".join(chunks))

        def log(self, *_: object) -> None:
            """Write nothing for each request."""

    app = create_backend_app("s3")
    app.debug = False  # what moto raises is answered as status 500, not raised through the handler
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.write(1, b"%d\n" % server.port)
    os.dup2(2, 1)  # nobody reads stdout from here on
    faulthandler.cancel_dump_traceback_later()

    end = threading.Event()

    def wait_for_end_of_stdin() -> None:
        sys.stdin.read()
        end.set()

    threading.Thread(target=wait_for_end_of_stdin, daemon=True).start()
    # The parent's forked children hold stdin's other end too, and may outlive it.
    while not end.wait(0.5) and os.getppid() == parent:
        pass
    os._exit(0)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
