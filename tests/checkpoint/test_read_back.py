"""A save that returns is one that was seen to be there; and what it says of itself."""

import itertools
import shutil
import subprocess
import threading

import faults
import pytest
import torch

from torch_s3 import S3FileSystem, errors, load_checkpoint, publish, save_checkpoint

_MIB = 1024 * 1024
_STATES = {
    "one request": lambda: {"x": torch.arange(10)},
    "several parts": lambda: {"x": torch.arange(3 * _MIB, dtype=torch.float32)},
}


@pytest.mark.parametrize("state", _STATES)
def test_saved_says_what_s3_says(s3, bucket, client, state):
    saved = save_checkpoint(
        _STATES[state](), f"{bucket}/x.pt", storage_options=s3.storage_options | {"part_size": 5 * _MIB}
    )
    head = client.head_object(Bucket=bucket[5:], Key="x.pt", ChecksumMode="ENABLED")

    assert saved.etag == head["ETag"].strip('"')
    assert saved.checksum[0] == "crc64nvme"
    assert head.get("ChecksumCRC64NVME") in (saved.checksum[1], None)  # moto keeps none of single PUTs
    assert min(saved.timings) >= 0
    assert sum(saved.timings) <= saved.seconds


@pytest.mark.parametrize("state", _STATES)
def test_saved_says_what_another_server_says(rclone, state):
    """One that answers the end of an upload with another ETag than it has from then on."""
    bucket = rclone.create_bucket(f"read-back-{len(state)}")
    options = rclone.storage_options | {"part_size": 5 * _MIB}
    saved = save_checkpoint(_STATES[state](), f"{bucket}/x.pt", storage_options=options)

    assert saved.etag == S3FileSystem(**options).info(f"{bucket}/x.pt")["ETag"]
    assert torch.equal(load_checkpoint(f"{bucket}/x.pt", storage_options=options)["x"], _STATES[state]()["x"])


@pytest.mark.parametrize("state", _STATES)
def test_without_checksums_none_is_told(s3, bucket, state):
    options = s3.storage_options | {"part_size": 5 * _MIB, "checksums": False}

    assert save_checkpoint(_STATES[state](), f"{bucket}/x.pt", storage_options=options).checksum is None


_LIES = {
    "size": ({"content_length": "5"}, errors.IntegrityError),
    "etag": ({"etag": '"other"', "x_amz_meta_torch_s3_write_id": "other"}, errors.ObjectChanged),
    "checksum": ({"x_amz_checksum_crc64nvme": "AAAAAAAAAAA="}, errors.IntegrityError),
}


@pytest.mark.parametrize("state", _STATES)
@pytest.mark.parametrize("lie", _LIES)
def test_what_is_there_is_not_what_was_sent(s3, bucket, state, lie):
    fields, error = _LIES[lie]
    fields = {name.replace("_", "-"): value for name, value in fields.items()}
    behave = faults.aim("head", faults.edit(**fields))
    with faults.Faults(itertools.repeat(behave), upstream=s3.endpoint_url) as proxy:
        options = proxy.storage_options | {"part_size": 5 * _MIB}
        with pytest.raises(error, match=f"^{bucket}/x.pt: "):
            save_checkpoint(_STATES[state](), f"{bucket}/x.pt", storage_options=options)


def test_who_may_not_read_has_the_servers_word(s3, bucket, caplog):
    behave = faults.aim("head", faults.answer(403))
    with faults.Faults(itertools.repeat(behave), upstream=s3.endpoint_url) as proxy:
        saved = save_checkpoint({"x": 1}, f"{bucket}/x.pt", storage_options=proxy.storage_options)

    assert saved.etag
    assert "could not be read back" in caplog.text


@pytest.mark.parametrize("place", ["file", "memory", "s3fs"], indirect=True)
def test_short_file_is_no_success_in_any_filesystem(place, monkeypatch):
    monkeypatch.setattr(place.fs, "info", lambda path, **_: {"size": 5, "type": "file"})
    with pytest.raises(errors.IntegrityError, match="5 are there"):
        save_checkpoint({"x": 1}, f"{place.uri}/x.pt", filesystem=place.fs)


@pytest.mark.parametrize("place", ["file", "memory", "s3fs"], indirect=True)
def test_new_file_that_appears_under_way_is_not_overwritten(place):
    with pytest.raises(errors.AlreadyExists):
        path = place.fs._strip_protocol(f"{place.uri}/x.pt")
        with publish.publishing(place.fs, path, f"{place.uri}/x.pt", only_new=True) as file:
            file.write(b"mine")
            place.put("x.pt", b"somebody else's")

    assert place.read("x.pt") == b"somebody else's"
    assert place.names() == ["x.pt"]


def test_progress_is_told_to_a_function_in_the_same_thread(place):
    told = []
    state = {"a": torch.zeros(5 * _MIB, dtype=torch.uint8), "b": torch.ones(5 * _MIB, dtype=torch.uint8)}
    saved = save_checkpoint(
        state,
        f"{place.uri}/x.pt",
        progress=lambda count, total: told.append((count, total, threading.current_thread())),
        **place.arguments,
    )
    counts = [count for count, _, _ in told]

    assert counts == sorted(counts)
    assert counts[-1] == saved.bytes
    assert all(10 * _MIB <= total <= saved.bytes for _, total, _ in told)
    assert {thread for _, _, thread in told} == {threading.current_thread()}


@pytest.mark.skipif(shutil.which("unzip") is None, reason="needs unzip")
def test_unzip_finds_nothing_wrong(tmp_path):
    state = {f"layer.{number}": torch.rand(number * 1000) for number in range(20)}
    save_checkpoint(state, f"file://{tmp_path}/x.pt")

    assert "No errors detected" in subprocess.check_output(["unzip", "-t", tmp_path / "x.pt"], text=True)
    assert all(map(torch.equal, torch.load(tmp_path / "x.pt", weights_only=True).values(), state.values()))


# ---------------------------------------------------------------------- safetensors


def _tensors():
    return {
        "weight": torch.arange(12.0).reshape(3, 4),
        "transposed": torch.arange(6, dtype=torch.int16).reshape(2, 3).t(),
        "half": torch.rand(7, dtype=torch.float32).to(torch.bfloat16),
        "flags": torch.tensor([True, False, True]),
        "number": torch.tensor(5),
        "nothing": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.rand(2)),
        "complex": torch.rand(3, dtype=torch.complex64).conj(),
        "large": torch.arange(3 * _MIB, dtype=torch.float32),
    }


def test_safetensors_are_those_that_everyone_reads(place):
    safetensors = pytest.importorskip("safetensors.torch")
    wanted = _tensors()
    saved = save_checkpoint(wanted, f"{place.uri}/x.safetensors", metadata={"format": "pt"}, **place.arguments)
    content = place.read("x.safetensors")
    found = safetensors.load(content)

    assert saved.bytes == len(content)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert b'"__metadata__":{"format":"pt"}' in content[:2000]


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ([torch.ones(1)], "not list"),
        ({"epoch": 3}, "'epoch' is int"),
        ({"model": {"a": torch.ones(1)}}, "'model' is dict"),
        ({1: torch.ones(1)}, "not 1"),
        ({"s": torch.eye(3).to_sparse()}, "'s' is sparse"),
        ({"m": torch.ones(1, device="meta")}, "'m' is on no device"),
        ({"c": torch.ones(1, dtype=torch.complex128)}, "complex128"),
    ],
    ids=lambda each: each if isinstance(each, str) else None,
)
def test_what_safetensors_cannot_hold_is_named_before_anything_is_written(place, state, said):
    place.put("x.safetensors", b"what was there")
    with pytest.raises(ValueError, match=said):
        save_checkpoint(state, f"{place.uri}/x.safetensors", **place.arguments)

    assert place.read("x.safetensors") == b"what was there"


def test_shared_memory_is_refused_as_the_safetensors_package_does(tmp_path):
    base = torch.arange(10.0)
    uri = f"file://{tmp_path}/x.safetensors"

    with pytest.raises(ValueError, match="'all' and 'part'"):
        save_checkpoint({"all": base, "part": base[2:4]}, uri)
    save_checkpoint(
        {"first": base[:5], "second": base[5:], "empty": base[:0]}, uri
    )  # they share a storage, but no byte


def test_metadata_are_for_safetensors(tmp_path):
    with pytest.raises(ValueError, match=r"\.safetensors"):
        save_checkpoint({}, f"file://{tmp_path}/x.pt", metadata={"a": "b"})
    assert list(tmp_path.iterdir()) == []


def test_failed_safetensors_leave_what_was_there(s3, bucket, client, open_uploads):
    client.put_object(Bucket=bucket[5:], Key="x.safetensors", Body=b"what was there")

    def fail(count, total):
        if count > 6 * _MIB:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        save_checkpoint(
            {str(number): torch.rand(_MIB) for number in range(4)},
            f"{bucket}/x.safetensors",
            progress=fail,
            storage_options=s3.storage_options | {"part_size": 5 * _MIB},
        )

    assert open_uploads() == []
    assert client.get_object(Bucket=bucket[5:], Key="x.safetensors")["Body"].read() == b"what was there"
