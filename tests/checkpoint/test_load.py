"""What is loaded is what was asked for, or an error that says why not."""

import collections
import contextlib
import functools
import gzip
import io
import itertools
import operator
import os
import pickle
import socket
import sys

import faults
import fsspec
import pytest
import safetensors.torch
import torch
from archives import torch_saved, zip_of
from PIL import Image
from processes import in_new_process, measured_peak
from torch.utils.serialization import config

from torch_s3 import S3FileSystem, errors, load_checkpoint, save_checkpoint
from torch_s3.source import opened
from torch_s3.testing import serve_s3
from torch_s3.transport.client import Batch, Client

_MIB = 1024 * 1024


def _jpeg():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def load(s3, bucket, client):
    """Stores bytes, if any are given, as an object of S3, and loads it."""

    def stored_and_loaded(content=None, key="model.pt", **arguments):
        if content is not None:
            client.put_object(Bucket=bucket[5:], Key=key, Body=content)
        options = s3.storage_options | {name: arguments.pop(name) for name in ("max_connections",) if name in arguments}
        return load_checkpoint(f"{bucket}/{key}", storage_options=options, **arguments)

    return stored_and_loaded


def _load_from_memory(content, **arguments):
    """As `load`, a hundred times as fast."""
    fsspec.filesystem("memory").pipe_file("/test_load.pt", content)
    return load_checkpoint("memory://test_load.pt", **arguments)


class _Custom:
    """Anything that is not torch's."""

    def __init__(self):
        self.value = 5


class _Call:
    """Becomes what a call returns when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


# ---------------------------------------------------------------------- map_location


@pytest.mark.parametrize("location", ["meta", torch.device("meta"), {"cpu": "meta"}], ids=str)
def test_map_location_is_followed(load, location):
    assert load(torch_saved([torch.ones(3)]), map_location=location)[0].device.type == "meta"


def test_map_location_is_called_for_each_storage(load):
    called = []

    def keep(storage, location):
        called.append((storage.nbytes(), location))
        return storage

    load(torch_saved([torch.ones(3), torch.ones(5)]), map_location=keep)

    assert called == [(12, "cpu"), (20, "cpu")]


def test_device_that_is_not_there_is_not_the_files_fault(load):
    with pytest.raises(RuntimeError, match="no-such-device") as caught:
        load(torch_saved([torch.ones(3)]), map_location="no-such-device")

    assert not isinstance(caught.value, errors.S3Error)
    assert "s3://" in caught.value.__notes__[0]


@pytest.mark.parametrize("error", [ValueError("mine"), RuntimeError("mine"), FileNotFoundError("mine")], ids=repr)
def test_error_of_map_location_arrives_as_it_is(load, error):
    def fail(storage, location):
        raise error

    with pytest.raises(type(error)) as caught:
        load(torch_saved([torch.ones(3)]), map_location=fail)

    assert caught.value is error


def test_keyboard_interrupt_while_loading_arrives_as_it_is(load):
    def interrupt(storage, location):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(torch_saved([torch.ones(3)]), map_location=interrupt)


# ---------------------------------------------------------------------- what it may run


@pytest.mark.parametrize("new", [True, False], ids=["zip", "old format"])
def test_code_in_a_checkpoint_is_refused_by_name_and_not_run(load, tmp_path, new):
    marker = tmp_path / "ran"
    content = torch_saved(
        {"a": torch.ones(3), "b": _Call(os.system, f"touch {marker}")}, _use_new_zipfile_serialization=new
    )

    with pytest.raises(errors.UnsafeCheckpoint, match=r"posix\.system"):
        load(content)
    assert not marker.exists()


def test_environment_cannot_turn_the_refusal_off(load, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "ran"

    with pytest.raises(errors.UnsafeCheckpoint):
        load(torch_saved(_Call(os.system, f"touch {marker}")))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("obj", "name"),
    [
        (_Custom(), r"test_load\._Custom"),
        (functools.partial(print), r"functools\.partial"),
        (torch.nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
    ],
    ids=["own class", "function", "module"],
)
def test_type_that_is_not_allowed_is_refused_by_name(load, obj, name):
    with pytest.raises(errors.UnsafeCheckpoint, match=name) as caught:
        load(torch_saved(obj))

    assert str(caught.value).startswith(f"{caught.value.uri}: ")
    assert "safe_globals=[" in str(caught.value)


def test_type_that_is_allowed_loads(load):
    with torch.serialization.safe_globals([_Custom]):
        assert load(torch_saved(_Custom())).value == 5


def test_without_weights_only_any_type_loads(load):
    got = load(torch_saved({"a": _Custom(), "b": collections.defaultdict(list)}), weights_only=False)

    assert type(got["a"]) is _Custom
    assert got["b"] == {}


@pytest.mark.parametrize(
    ("call", "error"),
    [(_Call(operator.truediv, 1, 0), ZeroDivisionError), (_Call(os.stat, "/no/such/file"), FileNotFoundError)],
    ids=["ZeroDivisionError", "FileNotFoundError"],
)
def test_error_of_unpickled_code_arrives_as_it_is(load, call, error):
    with pytest.raises(error) as caught:
        load(torch_saved(call), weights_only=False)

    assert type(caught.value) is error


def test_torchs_setting_to_map_files_into_memory_does_not_matter(load):
    with config.patch("load.mmap", True):
        assert load(torch_saved({"epoch": 1})) == {"epoch": 1}


# ---------------------------------------------------------------------- bad input


_STRANGERS = {
    "nothing": lambda: b"",
    "text": lambda: b"hello world\n" * 10,
    "image": _jpeg,
    "compressed checkpoint": lambda: gzip.compress(torch_saved({"epoch": 1})),
    "zip of a file": lambda: zip_of({"name": "content"}),
    "zip of a folder": lambda: zip_of({"folder/name": "content"}),
    "zip of nothing": lambda: zip_of({}),
    "old pickle": lambda: pickle.dumps({"epoch": 1}, protocol=2),
    "pickle": lambda: pickle.dumps({"epoch": 1}),
}


@pytest.mark.parametrize("weights_only", [True, False], ids=["weights only", "all"])
@pytest.mark.parametrize("stranger", _STRANGERS)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_what_is_no_checkpoint_is_a_checkpoint_error(load, bucket, stranger, weights_only):
    with pytest.raises(errors.CheckpointError) as caught:
        load(_STRANGERS[stranger](), weights_only=weights_only)

    assert type(caught.value) is errors.CheckpointError
    assert caught.value.uri == f"{bucket}/model.pt"
    assert str(caught.value).startswith(f"{bucket}/model.pt: ")


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file that looks like a TorchScript:UserWarning")
def test_torchscript_is_a_checkpoint_error(load):
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)

    with pytest.raises(errors.CheckpointError, match="TorchScript"):
        load(file.getvalue())


_STATE = {"a": torch.arange(40.0), "b": torch.ones(3, dtype=torch.bfloat16), "c": [1, "x", torch.zeros(0)]}


def _is_state(got):
    """Whether it is `_STATE`."""
    return torch.equal(got["a"], _STATE["a"]) and torch.equal(got["b"], _STATE["b"]) and got["c"][:2] == [1, "x"]


def _outcome(content, **arguments):
    """What loading comes to, in a word or two."""
    try:
        got = _load_from_memory(content, **arguments)
    except (errors.CheckpointError, errors.IntegrityError) as error:
        return type(error).__name__
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    with contextlib.suppress(Exception):
        if _is_state(got):
            return "loaded"
    return "loaded something else"


@pytest.mark.parametrize("weights_only", [True, False], ids=["weights only", "all"])
@pytest.mark.parametrize("new", [True, False], ids=["zip", "old format"])
def test_checkpoint_truncated_anywhere_is_a_checkpoint_error(new, weights_only):
    whole = torch_saved(_STATE, _use_new_zipfile_serialization=new)
    outcomes = {_outcome(whole[:size], weights_only=weights_only) for size in range(len(whole))}

    assert outcomes == {"CheckpointError"}  # and not UnsafeCheckpoint, which tells to allow some type


def test_checkpoint_that_holds_one_and_is_truncated_anywhere_is_a_checkpoint_error():
    """The end of the inner one looks like the outer one's."""
    inner = torch.frombuffer(bytearray(torch_saved(_STATE)), dtype=torch.uint8)
    whole = torch_saved([inner, torch.arange(100)])
    outcomes = {_outcome(whole[:size]) for size in range(len(whole))}

    assert outcomes == {"CheckpointError"}


@pytest.mark.parametrize("share", [0.001, 0.3, 0.99, 0.9999])
@pytest.mark.parametrize("new", [True, False], ids=["zip", "old format"])
def test_large_checkpoint_truncated_is_a_checkpoint_error(load, new, share):
    whole = torch_saved([torch.rand(500_000) for _ in range(2)], _use_new_zipfile_serialization=new)
    with pytest.raises(errors.CheckpointError) as caught:
        load(whole[: int(len(whole) * share)])

    assert type(caught.value) is errors.CheckpointError


def _damaged_directories():
    """Checkpoints with one byte changed of what a zip file ends with: its directory, and where that is."""
    whole = torch_saved(_STATE)
    for at in range(whole.index(b"PK\x01\x02"), len(whole)):
        for mask in (0x01, 0x20, 0x80, 0xFF):
            damaged = bytearray(whole)
            damaged[at] ^= mask
            yield bytes(damaged)


@pytest.mark.parametrize("weights_only", [True, False], ids=["weights only", "all"])
def test_damaged_zip_directory_raises_nothing_but_checkpoint_errors(weights_only):
    outcomes = {_outcome(damaged, weights_only=weights_only) for damaged in _damaged_directories()}

    assert outcomes == {"CheckpointError", "IntegrityError", "loaded"}


@pytest.mark.parametrize("new", [True, False], ids=["zip", "old format"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_damaged_records_raise_nothing_but_checkpoint_errors(new):
    whole = torch_saved(_STATE, _use_new_zipfile_serialization=new)
    outcomes = set()
    for at in range(whole.index(b"PK\x01\x02") if new else len(whole)):
        for mask in (0x01, 0xFF):
            damaged = bytearray(whole)
            damaged[at] ^= mask
            outcomes.add(_outcome(bytes(damaged)))
    unknown_device = {outcome for outcome in outcomes if "don't know how to restore data location" in outcome}

    if new:
        assert outcomes <= {"CheckpointError", "IntegrityError", "loaded"}
    else:  # which has no checksums
        assert outcomes - unknown_device <= {"CheckpointError", "UnsafeCheckpoint", "loaded", "loaded something else"}


@pytest.mark.parametrize(
    "uri",
    [
        "model.pt",
        "/folder/model.pt",
        "s3:/bucket/model.pt",
        "s3://",
        "s3://bucket",
        "s3://bucket/",
        "gopher://host/model.pt",
    ],
)
def test_uri_that_names_no_file_is_invalid(uri, s3):
    with pytest.raises(errors.InvalidUri) as caught:
        load_checkpoint(uri, storage_options=s3.storage_options)

    assert caught.value.uri.rstrip("/") == uri.rstrip("/")


def test_missing_checkpoint_is_not_found(place):
    place.put("other.pt", b"")

    with pytest.raises(errors.NotFound) as caught:
        load_checkpoint(f"{place.uri}/model.pt", **place.arguments)
    assert caught.value.uri == f"{place.uri}/model.pt"
    assert isinstance(caught.value, FileNotFoundError)


def test_missing_bucket_is_not_found(s3):
    with pytest.raises(errors.NotFound) as caught:
        load_checkpoint("s3://no-such-bucket/model.pt", storage_options=s3.storage_options)

    assert caught.value.uri == "s3://no-such-bucket"


@pytest.mark.parametrize("end", ["", "/"])
def test_folder_is_a_typed_error(place, end):
    save_checkpoint({"epoch": 1}, f"{place.uri}/folder/model.pt", **place.arguments)

    with pytest.raises(errors.S3Error, match=f"{place.uri}/folder"):
        load_checkpoint(f"{place.uri}/folder{end}", **place.arguments)


def test_no_credentials_are_a_typed_error(s3, bucket):
    with pytest.raises(errors.NoCredentials) as caught:
        load_checkpoint(f"{bucket}/model.pt", storage_options={"endpoint_url": s3.endpoint_url})

    assert caught.value.uri == f"{bucket}/model.pt"


@pytest.mark.parametrize("wrong", ["key", "secret"])
def test_wrong_credentials_are_denied_and_not_shown(rclone, wrong):
    with pytest.raises(errors.AccessDenied) as caught:
        load_checkpoint("s3://b/model.pt", storage_options=rclone.storage_options | {wrong: "Wr0ng"})

    assert caught.value.uri == "s3://b/model.pt"
    assert "rclone-secret" not in str(caught.value)
    assert "Wr0ng" not in str(caught.value)


@pytest.mark.parametrize("backlog", [None, 8], ids=["refuses", "never answers"])
def test_unreachable_endpoint_is_a_failed_transfer(s3, backlog):
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        if backlog:
            deaf.listen(backlog)
        endpoint = {
            "endpoint_url": f"http://127.0.0.1:{deaf.getsockname()[1]}",
            "attempts": 2,
            "first_byte_timeout": 0.2,
            "read_timeout": 0.2,
        }

        with pytest.raises(errors.TransferFailed) as caught:
            load_checkpoint("s3://b/model.pt", storage_options=s3.storage_options | endpoint)

    assert caught.value.uri == "s3://b/model.pt"


# ---------------------------------------------------------------------- one version, whole


def _on_first_storage(then):
    """A map_location that calls ``then`` when one storage has been read."""
    left = [then]

    def keep(storage, location):
        if left:
            left.pop()()
        return storage

    return keep


def _large(value):
    return torch_saved([torch.full((_MIB,), value) for _ in range(5)])


_ONE_AT_A_TIME = {"max_connections": 1}


@pytest.mark.parametrize("new", [True, False], ids=["zip", "old format"])
def test_checkpoint_overwritten_while_it_is_read_is_an_error(load, client, bucket, new):
    def overwrite():
        client.put_object(Bucket=bucket[5:], Key="model.pt", Body=_large(2))

    content = torch_saved([torch.ones(_MIB) for _ in range(3)], _use_new_zipfile_serialization=new)
    with pytest.raises(errors.ObjectChanged) as caught:
        load(content, map_location=_on_first_storage(overwrite), **_ONE_AT_A_TIME)
    assert caught.value.uri == f"{bucket}/model.pt"


def test_checkpoint_overwritten_after_it_was_opened_is_an_error(s3, client, bucket):
    client.put_object(Bucket=bucket[5:], Key="model.pt", Body=_large(1))
    fs = S3FileSystem(**s3.storage_options, skip_instance_cache=True)

    with opened(fs, f"{bucket[5:]}/model.pt", "s3://it") as source:
        client.put_object(Bucket=bucket[5:], Key="model.pt", Body=_large(2))
        with pytest.raises(errors.ObjectChanged, match="s3://"):
            source.read([(_MIB, 2 * _MIB)])


def test_overwriting_is_noticed_where_the_server_ignores_if_match(rclone):
    uri = f"{rclone.create_bucket('overwritten')}/model.pt"
    file = rclone.root / "overwritten" / "model.pt"
    file.write_bytes(_large(1))

    with pytest.raises(errors.ObjectChanged):
        load_checkpoint(
            uri,
            map_location=_on_first_storage(lambda: file.write_bytes(_large(2))),
            storage_options=rclone.storage_options | _ONE_AT_A_TIME,
        )


def test_checkpoint_deleted_while_it_is_read_is_not_found(load, client, bucket):
    with pytest.raises(errors.NotFound):
        delete = _on_first_storage(lambda: client.delete_object(Bucket=bucket[5:], Key="model.pt"))
        load(_large(1), map_location=delete, **_ONE_AT_A_TIME)


def test_server_gone_while_it_is_read_is_a_failed_transfer():
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serve_s3())
        uri = f"{server.create_bucket('bucket')}/model.pt"
        fs = S3FileSystem(**server.storage_options, attempts=2, **_ONE_AT_A_TIME)
        fs.pipe_file(uri, _large(1))

        with pytest.raises(errors.TransferFailed) as caught:
            load_checkpoint(uri, map_location=_on_first_storage(stack.close), filesystem=fs)

    assert caught.value.uri == uri


# ---------------------------------------------------------------------- faults under way


def _flipped(body):
    return body[:-1] + bytes([body[-1] ^ 1])


_FAULTS = {
    "reset": faults.reset,
    "cut": faults.cut(body=0.5),
    "slow down": faults.answer(503, "SlowDown"),
    "closed after": faults.serve_then_close,
}
_SAVED = [
    torch.arange(5_000_000.0),
    *(torch.full((1000,), number * 1.0) for number in range(300)),
    torch.ones(9).bool(),
]


@pytest.mark.parametrize(
    ("way", "fault"), [("pt", fault) for fault in _FAULTS] + [(way, "cut") for way in ("safetensors", "into", "old")]
)
def test_load_through_faults_is_whole(fault, way):
    if way == "safetensors":
        content = safetensors.torch.save({str(number): tensor for number, tensor in enumerate(_SAVED)})
    else:
        content = torch_saved(_SAVED, _use_new_zipfile_serialization=way != "old")
    targets = {"into": [torch.zeros_like(tensor) for tensor in _SAVED]} if way == "into" else {}
    script = itertools.cycle([faults.serve, _FAULTS[fault], faults.serve])
    with faults.Faults(script, objects={"/bucket/model.pt": content}) as server:
        options = server.storage_options | {"part_size": 5 * _MIB, "first_byte_timeout": 5}
        got = load_checkpoint("s3://bucket/model.pt", storage_options=options, **targets)

    found = [got[str(number)] for number in range(len(_SAVED))] if way == "safetensors" else got
    assert all(map(torch.equal, found, _SAVED))


@pytest.mark.parametrize("at", [3, 5])
def test_byte_that_is_flipped_on_its_way_is_an_integrity_error(at):
    script = [*[faults.serve] * at, faults.edit(body=_flipped)]
    with faults.Faults(script, objects={"/bucket/model.pt": torch_saved(_SAVED[0])}) as server:
        options = server.storage_options | {"part_size": 5 * _MIB, **_ONE_AT_A_TIME}
        with pytest.raises(errors.IntegrityError, match="is damaged"):
            load_checkpoint("s3://bucket/model.pt", storage_options=options)


def test_server_that_fails_for_good_under_way_is_a_typed_error():
    script = itertools.chain([faults.serve] * 3, itertools.repeat(faults.answer(500)))
    with faults.Faults(script, objects={"/bucket/model.pt": torch_saved(_SAVED)}) as server:
        options = server.storage_options | {"part_size": 5 * _MIB, "attempts": 2}
        with pytest.raises(errors.TransferFailed):
            load_checkpoint("s3://bucket/model.pt", storage_options=options)


# ---------------------------------------------------------------------- what it costs


class _RecordingClient(Client):
    """Keeps the ranges that are asked for."""

    def __init__(self, config):
        super().__init__(config)
        self.ranges = []

    def batch(self):
        return _RecordingBatch(self)


class _RecordingBatch(Batch):
    def get(self, *arguments, **settings):
        transfer = super().get(*arguments, **settings)
        self._client.ranges.append(transfer.range)
        return transfer


@pytest.mark.parametrize(
    ("count", "size", "share"),
    [(24, _MIB, 1.05), (60, 200_000, 1.05), (2000, 1000, 1.25)],
    ids=["large", "medium", "small"],
)
def test_hardly_more_is_fetched_than_there_is(s3, bucket, client, count, size, share):
    content = torch_saved([torch.zeros(size, dtype=torch.uint8) for _ in range(count)])
    client.put_object(Bucket=bucket[5:], Key="model.pt", Body=content)
    fs = S3FileSystem(**s3.storage_options, skip_instance_cache=True)
    fs.client = _RecordingClient(fs.config)
    load_checkpoint(f"{bucket}/model.pt", filesystem=fs)

    assert sum(stop - start for start, stop in fs.client.ranges) < share * len(content)


def _load_200_mb(uri, options):
    """By how many bytes the process grows while it loads."""
    load_checkpoint(f"{uri}/warm.pt", storage_options=options)
    with measured_peak() as grown:
        got = load_checkpoint(f"{uri}/model.pt", storage_options=options)
        assert len(got) == 200_000_000
    return grown()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_second_copy_is_made_in_memory(rclone):
    uri = rclone.create_bucket("no-second-copy")
    folder = rclone.root / "no-second-copy"
    (folder / "model.pt").write_bytes(torch_saved(torch.ones(200_000_000, dtype=torch.uint8)))
    (folder / "warm.pt").write_bytes(_large(1))

    assert 150_000_000 < in_new_process(_load_200_mb, uri, rclone.storage_options) < 300_000_000


def test_progress_is_shown_on_request_only(load, capsys):
    load(_large(1))
    assert capsys.readouterr() == ("", "")

    load(progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "loading model.pt: " in err
    assert "40.0M/40.0M" in err


@pytest.mark.parametrize("given", [dict, ["collections.Counter"], "collections.Counter"])
def test_safe_globals_are_the_things_themselves(given):
    with pytest.raises(TypeError, match="give a list of the types and functions themselves"):
        load_checkpoint("memory://nowhere/model.pt", safe_globals=given)
