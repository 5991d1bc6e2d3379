"""Files that other versions of torch wrote, made by hand, and those that are programs."""

import collections
import io
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib

import fsspec
import pytest
import torch

from torch_s3 import errors, inspect_checkpoint, load_checkpoint, save_checkpoint
from torch_s3.checkpoint import zipped

_URI = "memory://other/model.pt"


def _load(content, **arguments):
    fsspec.filesystem("memory").pipe_file("/other/model.pt", content)
    return load_checkpoint(_URI, **arguments)


class _Storage:
    """What old torch called a storage: a key, and elements of a type."""

    def __init__(self, kind, key, tensor, location="cpu"):
        self.kind, self.key, self.tensor, self.location = kind, key, tensor, location

    @property
    def bytes(self):
        return self.tensor.contiguous().view(torch.uint8).numpy().tobytes()


class _View:
    """A tensor over an old storage."""

    def __init__(self, storage, offset, shape, strides, *, grad=False):
        self.arguments = storage, offset, shape, strides, grad, collections.OrderedDict()

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


class _Parameter:
    def __init__(self, view):
        self.view = view

    def __reduce__(self):
        return torch._utils._rebuild_parameter, (self.view, True, collections.OrderedDict())


def _pickled(obj, *more):
    """As torch pickled: protocol 2, storages by a tuple that ``more`` ends."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            if isinstance(obj, _Storage):
                return "storage", obj.kind, obj.key, obj.location, obj.tensor.numel(), *more
            return None

    file = io.BytesIO()
    Pickler(file, protocol=2).dump(obj)
    return file.getvalue()


def _zip(folder, records):
    """As caffe2/serialize/inline_container.cc of torch 1.6 to 1.13 has it written by miniz, byte by byte."""
    made, directory = bytearray(), bytearray()
    for name, content in records:
        path, start = f"{folder}/{name}".encode(), len(made)
        crc = zlib.crc32(content)
        pad = -(start + 30 + len(path) + 4) % 64
        extra = b"FB" + struct.pack("<H", pad) + b"Z" * pad
        made += struct.pack("<4s5H3L2H", b"PK\3\4", 0, 0x808, 0, 0, 0, 0, 0, 0, len(path), len(extra)) + path + extra
        assert len(made) % 64 == 0
        made += content
        if content:
            made += struct.pack("<4s3L", b"PK\7\10", crc, len(content), len(content))
        directory += struct.pack(
            "<4s6H3L5H2L",
            b"PK\1\2",
            0,
            0,
            0x808,
            0,
            0,
            0,
            crc,
            len(content),
            len(content),
            len(path),
            0,
            0,
            0,
            0,
            0,
            start,
        )
        directory += path
    start, count = len(made), len(records)
    made += directory
    end = len(made)
    made += struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 0x1E, 0x2D, 0, 0, count, count, len(directory), start)
    made += struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    made += struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory), start, 0)
    return bytes(made)


def _old_state(key=str):
    """An object of old storages, and what it is."""
    weight, counts, half = torch.arange(12.0), torch.arange(5), torch.ones(3, dtype=torch.bfloat16)
    storages = [
        _Storage(torch.FloatStorage, key(0), weight),
        _Storage(torch.LongStorage, key(1), counts),
        _Storage(torch.BFloat16Storage, key(2), half),
    ]
    state = collections.OrderedDict(
        weight=_Parameter(_View(storages[0], 0, (3, 4), (4, 1))),
        transposed=_View(storages[0], 0, (4, 3), (1, 4)),
        some=_View(storages[0], 5, (2,), (3,)),
        counts=_View(storages[1], 0, (5,), (1,)),
        half=_View(storages[2], 0, (3,), (1,)),
        epoch=7,
    )
    wanted = {
        "weight": torch.nn.Parameter(weight.view(3, 4)),
        "transposed": weight.view(3, 4).t(),
        "some": weight[5::3][:2],
        "counts": counts,
        "half": half,
        "epoch": 7,
    }
    return state, storages, wanted


def _assert_same(got, wanted):
    assert list(got) == list(wanted)
    for name, tensor in wanted.items():
        if isinstance(tensor, torch.Tensor):
            assert type(got[name]) is type(tensor)
            assert (got[name].dtype, got[name].stride()) == (tensor.dtype, tensor.stride())
            assert torch.equal(got[name], tensor)
        else:
            assert got[name] == tensor
    assert got["some"].untyped_storage().data_ptr() == got["weight"].untyped_storage().data_ptr()


def _number(place):
    return str(94_404_212_345_000 + 64 * place)


@pytest.mark.parametrize("folder", ["archive", "model", "model_best", "ünicode"])
@pytest.mark.parametrize("key", [str, _number], ids=["torch 1.8", "torch 1.6"])
@pytest.mark.parametrize("version", [b"2\n", b"3\n"])
def test_zip_file_of_torch_1_loads(monkeypatch, folder, key, version):
    state, storages, wanted = _old_state(key)
    records = [("data.pkl", _pickled(state)), *((f"data/{each.key}", each.bytes) for each in storages)]
    content = _zip(folder, [*records, ("version", version)])

    assert zipfile.ZipFile(io.BytesIO(content)).testzip() is None
    _assert_same(torch.load(io.BytesIO(content), weights_only=True), wanted)
    monkeypatch.setattr(zipped, "torch_load", None)  # torch need not be asked
    _assert_same(_load(content), wanted)
    assert _load(content, keys=["counts"])["counts"].tolist() == list(range(5))
    assert [tensor.name for tensor in inspect_checkpoint(_URI).tensors] == list(wanted)[:-1]


def test_wrong_byte_in_a_zip_file_of_torch_1_is_an_integrity_error():
    state, storages, _ = _old_state()
    content = bytearray(
        _zip(
            "model",
            [
                ("data.pkl", _pickled(state)),
                *((f"data/{each.key}", each.bytes) for each in storages),
                ("version", b"3\n"),
            ],
        )
    )
    content[content.index(storages[0].bytes) + 9] ^= 1

    with pytest.raises(errors.IntegrityError, match="data/0"):
        _load(bytes(content))


def test_zip_file_of_torch_1_on_a_gpu_loads_where_it_is_told():
    storage = _Storage(torch.FloatStorage, "0", torch.arange(4.0), "cuda:0")
    records = [
        ("data.pkl", _pickled({"x": _View(storage, 0, (4,), (1,))})),
        ("data/0", storage.bytes),
        ("version", b"3\n"),
    ]

    assert _load(_zip("model", records), map_location="cpu")["x"].tolist() == [0, 1, 2, 3]


def test_file_of_before_zip_files_loads():
    state, storages, wanted = _old_state(_number)
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    content = b"".join(pickle.dumps(each, protocol=2) for each in (0x1950A86A20F9469CFC6C, 1001, system))
    content += _pickled(state, None) + pickle.dumps(sorted(each.key for each in storages), protocol=2)
    for each in storages:
        content += struct.pack("<q", each.tensor.numel()) + each.bytes

    _assert_same(torch.load(io.BytesIO(content), weights_only=True), wanted)
    _assert_same(_load(content), wanted)


class _Twice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(300_000.0))

    def forward(self, x):
        return x * self.weight


@pytest.fixture(scope="module")
def script():
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(_Twice()), file)
    return file.getvalue()


def test_torchscript_loads_with_the_callers_word(script):
    loaded = _load(script, weights_only=False, map_location="cpu")

    assert torch.equal(loaded(torch.tensor(2.0)), torch.arange(300_000.0) * 2)


def test_torchscript_is_refused_without_it_and_both_ways_are_named(script):
    with pytest.raises(errors.UnsafeCheckpoint, match=r"weights_only=False.*torch\.jit\.load"):
        _load(script)
    with pytest.raises(errors.CheckpointError, match="TorchScript"):
        inspect_checkpoint(_URI)


def test_wrong_byte_in_torchscript_is_an_integrity_error(script):
    with zipfile.ZipFile(io.BytesIO(script)) as archive:
        name = next(info for info in archive.infolist() if info.file_size > 1_000_000)
    content = bytearray(script)
    content[name.header_offset + 500_000] ^= 1

    with pytest.raises(errors.IntegrityError, match="CRC32"):
        _load(bytes(content), weights_only=False)
    assert _load(bytes(content), weights_only=False, verify=False) is not None


def test_truncated_torchscript_is_a_checkpoint_error(script):
    with pytest.raises(errors.CheckpointError):
        _load(script[:-40], weights_only=False)


def test_torchscript_goes_to_one_device(script):
    with pytest.raises(errors.CheckpointError, match="one device"):
        _load(script, weights_only=False, map_location={"cpu": "cpu"})


def test_exported_program_is_told_where_to_be_loaded(tmp_path):
    # In a process of its own: it starts threads, after which no process that is forked can train.
    program = "import sys, torch; p = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)); "
    program += "torch.export.save(p, sys.argv[1])"
    path = tmp_path / "model.pt2"
    subprocess.run([sys.executable, "-W", "ignore", "-c", program, str(path)], check=True, timeout=100)

    for weights_only in (True, False):
        with pytest.raises(errors.CheckpointError, match=r"torch\.export\.load"):
            _load(path.read_bytes(), weights_only=weights_only)


@pytest.mark.skipif("TORCH_S3_TEST_LARGE" not in os.environ, reason="needs 9 GB of memory and 5 of disk, and a minute")
def test_record_of_more_than_4_gb_comes_back(tmp_path):
    state = {"before": torch.arange(10), "large": torch.arange(2**29 + 100).view(torch.uint8), "after": torch.ones(3)}
    uri = (tmp_path / "large.pt").as_uri()
    save_checkpoint(state, uri)
    got = load_checkpoint(uri)

    assert all(torch.equal(got[name], state[name]) for name in state)
    assert load_checkpoint(uri, keys=["after"])["after"].tolist() == [1, 1, 1]


def test_pickle_of_others_is_no_checkpoint_and_the_message_gives_no_unsafe_advice():
    fsspec.filesystem("memory").pipe_file("/others/model.joblib", pickle.dumps({"a": zipfile.ZipInfo()}, protocol=4))

    with (
        pytest.warns(UserWarning, match="protocol 4"),
        pytest.raises(errors.CheckpointError, match="load_estimator") as caught,
    ):
        load_checkpoint("memory://others/model.joblib")

    assert "weights_only" not in str(caught.value)
