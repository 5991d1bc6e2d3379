"""A checkpoint is stored whole, or nothing has happened."""

import contextlib
import gc
import os
import signal
import socket
import sys
import tempfile
import threading
from collections import OrderedDict
from pathlib import Path

import pytest
import s3fs
import torch
from processes import in_new_process, measured_peak

from torch_s3 import errors, load_checkpoint, save_checkpoint
from torch_s3.testing import serve_s3
from torch_s3.upload import S3Writer

_MIB = 1024 * 1024
_SMALL_PARTS = {"part_size": 5 * _MIB}


class _WhenPickled:
    """Calls ``then`` when it is pickled, and comes back as nothing much."""

    def __init__(self, then):
        self.then = then

    def __reduce__(self):
        self.then()
        return OrderedDict, ()


def _raise(error):
    raise error


class _WhenWritten(torch.UntypedStorage):
    """Calls ``then`` when its turn to be written has come: pickling is done by then, and what came before it written.

    torch copies storages of other devices to the CPU, one at a time.
    """

    def __new__(cls, then):
        return super().__new__(cls, 1, device="meta")

    def __init__(self, then):
        self.then = then

    def cpu(self):
        self.then()
        return torch.UntypedStorage(1)


def _state():
    """20 MiB: four parts of 5 MiB and a bit."""
    return {number: torch.full((4 * _MIB,), number, dtype=torch.uint8) for number in range(5)}


def _with(then):
    """Like `_state`; calls ``then`` when three parts are full, and two to come."""
    storage = torch.storage.TypedStorage(wrap_storage=_WhenWritten(then), dtype=torch.uint8, _internal=True)
    return [torch.zeros(16 * _MIB, dtype=torch.uint8), storage, torch.ones(8 * _MIB, dtype=torch.uint8)]


def _interrupt():
    signal.raise_signal(signal.SIGINT)


_FAILURES = {
    "error while pickling": (lambda: [_state(), _WhenPickled(lambda: 1 / 0)], ZeroDivisionError),
    "Ctrl-C while pickling": (lambda: [_state(), _WhenPickled(_interrupt)], KeyboardInterrupt),
    "error after three parts": (lambda: _with(lambda: 1 / 0), ZeroDivisionError),
    "Ctrl-C after three parts": (lambda: _with(_interrupt), KeyboardInterrupt),
    "error of torch itself": (lambda: [_state(), torch.UntypedStorage(1, device="meta")], NotImplementedError),
}


@pytest.mark.parametrize("failure", _FAILURES)
def test_failed_save_leaves_what_was_there_and_nothing_else(place, failure):
    make, error = _FAILURES[failure]
    place.put("old.pt", b"what was there")

    for name in ("old.pt", "new.pt"):
        with pytest.raises(error):
            save_checkpoint(make(), f"{place.uri}/{name}", **place.arguments)
    gc.collect()

    assert place.names() == ["old.pt"]
    assert place.read("old.pt") == b"what was there"
    assert place.leftovers() == []


def test_interrupted_write_leaves_nothing(s3, bucket, client, open_uploads, monkeypatch):
    def write(file, data):
        if file.tell() > 16 * _MIB:
            _interrupt()
        return plain_write(file, data)

    plain_write = S3Writer.write
    monkeypatch.setattr(S3Writer, "write", write)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(_state(), f"{bucket}/model.pt", storage_options=s3.storage_options | _SMALL_PARTS)

    assert "Contents" not in client.list_objects_v2(Bucket=bucket[5:])
    assert open_uploads() == []


def test_nothing_is_seen_of_a_save_before_its_end(place):
    place.put("old.pt", b"what was there")
    seen = []
    for name in ("new.pt", "old.pt"):
        save_checkpoint(_with(lambda: seen.append(place.read("old.pt"))), f"{place.uri}/{name}", **place.arguments)

    assert seen == [b"what was there"] * 2
    assert place.names() == ["new.pt", "old.pt"]
    assert place.leftovers() == []


def test_parts_go_up_while_torch_still_writes(s3, bucket, open_uploads):
    seen = []
    state = _with(lambda: seen.extend(open_uploads()))
    save_checkpoint(state, f"{bucket}/model.pt", storage_options=s3.storage_options | _SMALL_PARTS)

    assert [upload["Key"] for upload in seen] == ["model.pt"]
    assert open_uploads() == []


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("mine"), FileNotFoundError("mine"), PermissionError("mine"), OSError("mine")], ids=repr
)
def test_error_of_pickling_arrives_as_it_is(s3, bucket, error):
    with pytest.raises(type(error)) as caught:
        save_checkpoint(_WhenPickled(lambda: _raise(error)), f"{bucket}/x.pt", storage_options=s3.storage_options)

    assert caught.value is error


def test_bucket_deleted_under_way_is_not_found(s3, bucket, client):
    state = _with(lambda: client.delete_bucket(Bucket=bucket[5:]))
    with pytest.raises(errors.NotFound) as caught:
        save_checkpoint(state, f"{bucket}/model.pt", storage_options=s3.storage_options | _SMALL_PARTS)

    assert caught.value.uri == bucket


def test_server_gone_under_way_is_a_failed_transfer():
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serve_s3())
        uri = f"{server.create_bucket('bucket')}/model.pt"
        options = server.storage_options | _SMALL_PARTS | {"attempts": 2}

        with pytest.raises(errors.TransferFailed) as caught:
            save_checkpoint(_with(stack.close), uri, storage_options=options)

    assert caught.value.uri == uri


@pytest.mark.parametrize("place", ["s3", "file"], indirect=True)
def test_killed_save_leaves_what_was_there(place):
    place.put("old.pt", b"what was there")
    state = _with(lambda: os.kill(os.getpid(), signal.SIGKILL))
    for name in ("old.pt", "new.pt"):
        child = os.fork()
        if child == 0:
            try:
                save_checkpoint(state, f"{place.uri}/{name}", **place.arguments)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    assert "new.pt" not in place.names()
    assert place.read("old.pt") == b"what was there"


def test_local_file_stays_whole_for_who_has_it_open(tmp_path, monkeypatch):
    """Also where the temporary folder is on another device, from which nothing can be moved in one step."""
    with contextlib.ExitStack() as stack:
        if Path("/dev/shm").is_dir():
            monkeypatch.setattr(tempfile, "tempdir", stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        save_checkpoint({"epoch": 1}, f"file://{tmp_path}/model.pt")
        with (tmp_path / "model.pt").open("rb") as reader:
            save_checkpoint({"epoch": 2}, f"file://{tmp_path}/model.pt")

            assert torch.load(reader, weights_only=True) == {"epoch": 1}


def test_folder_in_the_way_is_an_error(tmp_path):
    folder = tmp_path / "model.pt"
    folder.mkdir()

    with pytest.raises(errors.S3Error, match=r"model\.pt: "):
        save_checkpoint({"epoch": 1}, f"file://{folder}")
    assert list(folder.iterdir()) == []


def test_two_saves_at_once_are_both_stored(place):
    def save_other():
        thread = threading.Thread(target=save_checkpoint, args=({"epoch": 2}, f"{place.uri}/2.pt"), kwargs=through)
        thread.start()
        thread.join()

    through = {"filesystem": place.fs}  # without it, fsspec gives both the same one too
    save_checkpoint({"epoch": 1, "x": _WhenPickled(save_other)}, f"{place.uri}/1.pt", **through)

    assert load_checkpoint(f"{place.uri}/1.pt", **through) == {"epoch": 1, "x": OrderedDict()}
    assert load_checkpoint(f"{place.uri}/2.pt", **through) == {"epoch": 2}


def test_failed_save_takes_no_other_file_with_it(place):
    def write_and_fail():
        place.put("log.txt", b"line")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        save_checkpoint(_WhenPickled(write_and_fail), f"{place.uri}/model.pt", filesystem=place.fs)

    assert place.names() == ["log.txt"]


def test_existing_checkpoint_is_replaced(place):
    for epoch in (1, 2):
        save_checkpoint({"epoch": epoch}, f"{place.uri}/model.pt", **place.arguments)

    assert load_checkpoint(f"{place.uri}/model.pt", **place.arguments) == {"epoch": 2}


def test_without_overwrite_what_exists_stays_and_nothing_is_pickled(place):
    place.put("model.pt", b"what was there")
    pickled = []

    with pytest.raises(errors.AlreadyExists, match=r"model\.pt: "):
        save_checkpoint(
            _WhenPickled(lambda: pickled.append(1)), f"{place.uri}/model.pt", overwrite=False, **place.arguments
        )

    assert pickled == []
    assert place.read("model.pt") == b"what was there"


def test_without_overwrite_something_new_is_stored(place):
    save_checkpoint({"epoch": 1}, f"{place.uri}/model.pt", overwrite=False, **place.arguments)

    assert load_checkpoint(f"{place.uri}/model.pt", **place.arguments) == {"epoch": 1}


@pytest.mark.parametrize("state", [dict, _state], ids=["one request", "several parts"])
@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_without_overwrite_what_appears_under_way_stays(place, state):
    def appear():
        place.put("model.pt", b"somebody else's")

    with pytest.raises(errors.AlreadyExists, match=r"model\.pt: "):
        save_checkpoint([state(), _WhenPickled(appear)], f"{place.uri}/model.pt", overwrite=False, **place.arguments)

    assert place.read("model.pt") == b"somebody else's"
    assert place.leftovers() == []


@pytest.mark.parametrize("state", [dict, _state], ids=["one request", "several parts"])
@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_answer_tells_what_is_stored(place, client, state):
    uri = f"{place.uri}/a folder/model.pt"
    saved = save_checkpoint(state(), uri, **place.arguments)
    stored = client.head_object(Bucket=place.uri[5:], Key="a folder/model.pt")

    assert (saved.uri, saved.bytes, f'"{saved.etag}"') == (uri, stored["ContentLength"], stored["ETag"])
    assert saved.etag == place.fs.info(uri)["ETag"]
    assert saved.seconds > 0


@pytest.mark.parametrize("place", ["memory", "file"], indirect=True)
def test_answer_has_no_etag_where_there_are_none(place):
    saved = save_checkpoint(_state(), f"{place.uri}/model.pt", **place.arguments)

    assert saved[:3] == (f"{place.uri}/model.pt", len(place.read("model.pt")), None)


@pytest.mark.parametrize("state", [dict, _state], ids=["one request", "several parts"])
def test_missing_bucket_is_not_found(s3, state):
    with pytest.raises(errors.NotFound) as caught:
        save_checkpoint(state(), "s3://no-such-bucket/x.pt", storage_options=s3.storage_options)

    assert caught.value.uri == "s3://no-such-bucket"


def test_missing_bucket_is_not_created_through_s3fs(s3, client):
    options = {name: value for name, value in s3.storage_options.items() if name != "client_kwargs"}
    fs = s3fs.S3FileSystem(**options, skip_instance_cache=True)

    with pytest.raises(errors.NotFound, match="s3://missing-for-s3fs"):
        save_checkpoint({}, "s3://missing-for-s3fs/model.pt", filesystem=fs)
    assert "missing-for-s3fs" not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]


@pytest.mark.parametrize(
    "uri",
    [
        "model.pt",
        "/folder/model.pt",
        "s3:/bucket/model.pt",
        "s3://",
        "s3://bucket",
        "s3://bucket/",
        "s3://bucket/folder/",
        "file:///folder/",
        "memory://folder/",
        "gopher://host/model.pt",
    ],
)
def test_uri_that_names_no_file_is_invalid(uri, s3):
    options = s3.storage_options if uri.startswith("s3") else None
    with pytest.raises(errors.InvalidUri) as caught:
        save_checkpoint({}, uri, storage_options=options)

    assert caught.value.uri.rstrip("/") == uri.rstrip("/")


def test_no_credentials_are_a_typed_error(s3, bucket):
    with pytest.raises(errors.NoCredentials, match=f"{bucket}/model.pt"):
        save_checkpoint({}, f"{bucket}/model.pt", storage_options={"endpoint_url": s3.endpoint_url})


@pytest.mark.parametrize("state", [dict, _state], ids=["one request", "several parts"])
@pytest.mark.parametrize("wrong", ["key", "secret"])
def test_wrong_credentials_are_denied_and_not_shown(rclone, state, wrong):
    with pytest.raises(errors.AccessDenied) as caught:
        save_checkpoint(state(), "s3://b/model.pt", storage_options=rclone.storage_options | {wrong: "Wr0ng"})

    assert caught.value.uri == "s3://b/model.pt"
    assert "rclone-secret" not in str(caught.value)
    assert "Wr0ng" not in str(caught.value)


@pytest.mark.parametrize("state", [dict, _state], ids=["one request", "several parts"])
def test_unreachable_endpoint_is_a_failed_transfer(s3, state):
    with socket.socket() as bound_but_deaf:
        bound_but_deaf.bind(("127.0.0.1", 0))
        endpoint = {"endpoint_url": f"http://127.0.0.1:{bound_but_deaf.getsockname()[1]}"}

        with pytest.raises(errors.TransferFailed) as caught:
            save_checkpoint(state(), "s3://b/model.pt", storage_options=s3.storage_options | endpoint | {"attempts": 2})

    assert caught.value.uri == "s3://b/model.pt"


def test_progress_is_shown_on_request_only(place, capsys):
    save_checkpoint({}, f"{place.uri}/model.pt", **place.arguments)
    assert capsys.readouterr() == ("", "")

    save_checkpoint(_state(), f"{place.uri}/model.pt", progress=True, **place.arguments)
    out, err = capsys.readouterr()
    assert out == ""
    assert "saving model.pt: 100%" in err
    assert "20.0M/20.0M" in err


def _save_250_mb(uri, options):
    """By how many bytes the process grows while it saves."""
    save_checkpoint(_state(), f"{uri}/warm.pt", storage_options=options)
    state = [torch.full((50 * _MIB,), number, dtype=torch.uint8) for number in range(5)]
    with measured_peak() as grown:
        save_checkpoint(state, f"{uri}/model.pt", storage_options=options)
    return grown()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_for_saving_does_not_grow_with_the_checkpoint(rclone):
    bucket = rclone.create_bucket("memory")

    assert in_new_process(_save_250_mb, bucket, rclone.storage_options) < 200_000_000


def test_folder_for_temporary_files_that_cannot_be_written_to_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))

    with pytest.raises(errors.NotFound, match=r"gone/model.pt.*, the temporary file for memory://bucket/model.pt'"):
        save_checkpoint({}, "memory://bucket/model.pt")


def test_uri_comes_second():
    with pytest.raises(TypeError, match="the uri is a dict"):
        save_checkpoint("s3://bucket/model.pt", {})
