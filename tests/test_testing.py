import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from urllib.parse import urlsplit

import boto3
import pytest

from torch_s3 import testing
from torch_s3.testing import serve_s3


def _client(server):
    options = server.storage_options
    session = boto3.Session(options["key"], options["secret"], **options["client_kwargs"])
    return session.client("s3", endpoint_url=options["endpoint_url"])


def _address(server):
    url = urlsplit(server.endpoint_url)
    return url.hostname, url.port


def _refuses(server):
    with contextlib.suppress(ConnectionError), socket.create_connection(_address(server)):
        return False
    return True


def _request(connection, method, path, body=None):
    """Signed well enough for moto, which looks at no signature."""
    scope = "AWS4-HMAC-SHA256 Credential=testing/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
    connection.request(method, path, body, {"Authorization": scope})
    response = connection.getresponse()
    return response.status, response.read()


def test_object_comes_back_as_it_was_put(s3, bucket):
    client = _client(s3)
    name = bucket.removeprefix("s3://")
    client.put_object(Bucket=name, Key="a key/ä+%", Body=b"body")

    assert client.get_object(Bucket=name, Key="a key/ä+%")["Body"].read() == b"body"


def test_create_bucket_returns_uri_of_existing_bucket(s3):
    assert s3.create_bucket("again") == s3.create_bucket("again") == "s3://again"


def test_servers_share_nothing():
    with serve_s3() as one, serve_s3() as other:
        one.create_bucket("only-in-one")

        assert _client(other).list_buckets()["Buckets"] == []


def test_threads_open_servers_at_once():
    endpoints = set()

    def serve():
        with serve_s3() as server:
            server.create_bucket("bucket")
            endpoints.add(server.endpoint_url)
            all_serve.wait()

    all_serve = threading.Barrier(3)
    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(endpoints) == 3


def test_server_is_gone_after_block():
    with serve_s3() as server:
        assert not _refuses(server)

    assert _refuses(server)


def test_server_is_gone_after_exception_in_block():
    with pytest.raises(ZeroDivisionError), serve_s3() as server:
        raise ZeroDivisionError

    assert _refuses(server)


def test_connection_outlives_refused_requests_with_bodies(s3, bucket):
    with contextlib.closing(http.client.HTTPConnection(*_address(s3))) as connection:
        connection.connect()
        first = connection.sock
        name = bucket.removeprefix("s3://")
        path = f"/{name}/key"
        for _ in range(20):
            assert _request(connection, "PUT", f"/not-{name}/key", b"GET / HTTP/1.1\r\n\r\n" * 1000)[0] == 404
            assert _request(connection, "PUT", path, b"body") == (200, b"")
            assert _request(connection, "HEAD", path) == (200, b"")
            assert _request(connection, "GET", path) == (200, b"body")
            assert _request(connection, "DELETE", path) == (204, b"")

        assert connection.sock is first


def test_chunked_body_is_stored_whole(s3, bucket):
    with contextlib.closing(http.client.HTTPConnection(*_address(s3))) as connection:
        path = f"/{bucket.removeprefix('s3://')}/key"
        assert _request(connection, "PUT", path, iter([b"in ", b"chunks"])) == (200, b"")

        assert _request(connection, "GET", path) == (200, b"in chunks")


def test_server_writes_nothing(capfd):
    with serve_s3() as server:
        server.create_bucket("bucket")
        client = _client(server)
        with pytest.raises(client.exceptions.NoSuchKey):
            client.get_object(Bucket="bucket", Key="missing")

    assert capfd.readouterr() == ("", "")


def test_environment_stays_as_it_is():
    before = dict(os.environ)
    with serve_s3():
        assert dict(os.environ) == before


def test_moto_settings_of_caller_do_not_reach_server(monkeypatch):
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "1")

    with serve_s3() as server:
        server.create_bucket("bucket")
        client = _client(server)
        client.put_object(Bucket="bucket", Key="one")
        client.put_object(Bucket="bucket", Key="two")

        assert client.list_objects_v2(Bucket="bucket")["KeyCount"] == 2


def test_server_program_imports_no_torch():
    program = "import runpy, sys; runpy.run_path(sys.argv[1]); sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-P", "-c", program, testing.__file__], check=False).returncode == 0


def test_forked_child_may_leave_block():
    parent = os.getpid()
    try:
        with serve_s3() as server:
            child = os.fork()
            if child == 0:
                sys.exit()
            os.waitpid(child, 0)

            assert not _refuses(server)
    finally:
        if os.getpid() != parent:
            os._exit(0)


@pytest.mark.parametrize("fork", ["0", "os.fork()"], ids=["alone", "with a forked child that lives on"])
def test_server_dies_with_killed_parent(fork):
    program = f"""
        import os, signal
        from torch_s3.testing import serve_s3

        with serve_s3() as server:
            parent = os.getpid()
            child = {fork}
            if os.getpid() == parent:
                print(server.endpoint_url, child, flush=True)
            signal.pause()
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        url, child = process.stdout.readline().split()
        server = testing.EmbeddedS3(url)
        try:
            with socket.create_connection(_address(server), timeout=30) as connection:
                process.kill()
                with contextlib.suppress(ConnectionResetError):
                    assert connection.recv(1) == b""
            while not _refuses(server):  # the system closes a dead process's sockets one by one
                pass
        finally:
            process.kill()
            if child != "0":
                os.kill(int(child), signal.SIGKILL)


def test_missing_moto_is_an_import_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "moto", None)

    with pytest.raises(ImportError, match=r"pip install 'torch-s3\[demo\]'"), serve_s3():
        pass


def test_failed_start_is_an_error_with_what_server_wrote(monkeypatch, tmp_path):
    program = tmp_path / "program.py"
    program.write_text("raise SystemExit('no port is free')")
    monkeypatch.setattr(testing, "__file__", str(program))

    with pytest.raises(RuntimeError, match="no port is free"), serve_s3():
        pass
