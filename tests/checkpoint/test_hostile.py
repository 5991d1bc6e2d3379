"""Files made to do harm: none runs code, none is believed, each is a typed error."""

import functools
import io
import json
import operator
import os
import pickle
import resource
import struct
import subprocess
import sys
import tracemalloc
import zipfile

import fsspec
import pytest
import torch
from archives import torch_saved, zip_of
from hypothesis import given
from hypothesis import strategies as st
from processes import in_new_process

from torch_s3 import errors, inspect_checkpoint, load_checkpoint
from torch_s3.checkpoint import nesting

_URI = "memory://hostile/model.pt"


def _load(content, **arguments):
    fsspec.filesystem("memory").pipe_file("/hostile/model.pt", content)
    return load_checkpoint(_URI, **arguments)


_WHOLE = torch_saved({"a": torch.arange(100.0), "b": torch.arange(50)})


def _records(content=_WHOLE):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


_zip = functools.partial(zip_of, method=zipfile.ZIP_STORED)


def _with_pickle(pickled):
    return _zip(_records() | {"archive/data.pkl": pickled})


class _Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _touch(marker):
    """Code that makes a file, by every way known."""
    code = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": _Call(os.system, f"touch {marker}"),
        "eval": _Call(eval, code),
        "exec": _Call(exec, code),
        "subprocess": _Call(subprocess.call, ["touch", str(marker)]),
        "eval through functools": _Call(functools.reduce, eval, [code, {}]),
        "partial": _Call(list, _Call(map, _Call(functools.partial, eval), [code])),
        "operator": _Call(list, _Call(map, _Call(operator.methodcaller, "__call__", code), [eval])),
        "getattr": _Call(list, _Call(map, _Call(getattr, int, "__add__"), [1])),
        "nested": _Call(list, _Call(map, eval, [code])),
        "in a dict": {"a": {"b": [(_Call(os.system, f"touch {marker}"),)]}},
        "as a key": {_Call(os.system, f"touch {marker}"): 1},
        "torch's own loader": _Call(torch.load, str(marker)),
        "import": _Call(__import__, "antigravity"),
    }


@pytest.mark.parametrize("way", list(_touch("x")))
def test_code_is_not_run_but_named(tmp_path, way):
    marker = tmp_path / "ran"
    pickled = pickle.dumps(_touch(marker)[way], protocol=2)

    with pytest.raises(errors.UnsafeCheckpoint, match=_URI):
        _load(_with_pickle(pickled))
    info = inspect_checkpoint(_URI)

    assert info.unsafe_globals
    assert not marker.exists()
    assert "antigravity" not in sys.modules


def test_all_that_is_asked_for_is_listed():
    with pytest.raises(errors.UnsafeCheckpoint) as caught:
        _load(torch_saved([_Call(os.system, "true"), _Call(print, 1), _Call(subprocess.call, [])]))

    for name in ("posix.system", ".print", ".call"):
        assert name in str(caught.value)


def _bomb(levels=60):
    """A few hundred bytes that are a list of 2 to the 60 lists."""
    node = []
    for _ in range(levels):
        node = [node, node]
    return pickle.dumps(node, protocol=2)


def test_bomb_of_references_is_looked_into_in_little_time():
    fsspec.filesystem("memory").pipe_file("/hostile/model.pt", _with_pickle(_bomb()))

    assert inspect_checkpoint(_URI).tensors == ()


def test_bomb_of_references_ends_when_parts_are_asked_for(monkeypatch):
    monkeypatch.setattr("torch_s3.checkpoint.tree._MOST", 10_000)
    with pytest.raises(errors.CheckpointError, match="more than 10000 entries"):
        _load(_with_pickle(_bomb()), keys=["*.weight"])


@pytest.mark.parametrize("what", ["keys", "inspect"])
def test_deep_nesting_is_an_error_or_nothing(what):
    content = _with_pickle(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    fsspec.filesystem("memory").pipe_file("/hostile/model.pt", content)
    if what == "inspect":
        assert inspect_checkpoint(_URI).tensors == ()
    else:
        with pytest.raises(errors.CheckpointError, match="deeply"):
            load_checkpoint(_URI, keys=["x"])


_DEEP_KEY = b"\x80\x02})" + b"\x85" * 500_000 + b"K\x01s."


def _legacy(pickled):
    numbers = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    return b"".join(pickle.dumps(each, 2) for each in numbers) + pickled + pickle.dumps([], 2)


@pytest.mark.parametrize("content", [_with_pickle(_DEEP_KEY), _legacy(_DEEP_KEY)], ids=["zip", "legacy"])
def test_key_that_would_end_the_process_is_an_error(content):
    with pytest.raises(errors.CheckpointError, match="nested too deeply"):
        _load(content)


@given(
    st.recursive(
        st.none() | st.integers(), lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple)
    ),
    st.integers(0, 5),
)
def test_depth_of_tuples_is_what_it_is(value, protocol):
    def depth(value):
        return 1 + max(map(depth, value), default=0) if isinstance(value, tuple) else 0

    def deepest(value):
        return max([depth(value), *map(deepest, value)]) if isinstance(value, tuple | list) else 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nesting, "_MOST", 2)
        patch.setattr(nesting, "_MAKERS", (b"",))
        assert nesting.is_too_deep(pickle.dumps(value, protocol)) == (deepest(value) > 2)


def _nested_long_keys():
    """A dict in a dict in a dict …, under one key of 200 kB: all paths together would take many gigabytes."""
    key = b"X" + struct.pack("<I", 200_000) + b"k" * 200_000 + b"q\x01"
    inner = b"](" + b"K\x01" * 100_000 + b"e"
    return b"\x80\x02}" + key + b"}" + b"h\x01}" * 400 + b"h\x01" + inner + b"s" * 402 + b"."


def test_long_keys_that_are_nested_take_no_memory():
    fsspec.filesystem("memory").pipe_file("/hostile/model.pt", _with_pickle(_nested_long_keys()))
    tracemalloc.start()
    try:
        assert inspect_checkpoint(_URI).tensors == ()
        with pytest.raises(errors.CheckpointError, match="entries"):
            load_checkpoint(_URI, keys=["x*"])
        assert tracemalloc.get_traced_memory()[1] < 500e6
    finally:
        tracemalloc.stop()


def test_tensor_under_a_path_too_long_is_an_error():
    memo = b"X" + struct.pack("<I", 200_000) + b"k" * 200_000 + b"q\x01"
    tensor = _records()["archive/data.pkl"][2:-1].replace(b"q\x01", b"q\x7f").replace(b"h\x01", b"h\x7f")
    content = b"\x80\x02}" + memo + b"}" + b"h\x01}" * 60 + b"h\x01" + tensor + b"s" * 62 + b"."
    fsspec.filesystem("memory").pipe_file("/hostile/model.pt", _with_pickle(content))

    with pytest.raises(errors.CheckpointError, match="names are too long"):
        inspect_checkpoint(_URI)


@pytest.mark.parametrize(
    "shape", [b"(" + b"K\x02" * 200_000 + b"t", b"K\x03\x8a\x01\xff\x86"], ids=["huge", "negative"]
)
def test_shape_that_no_tensor_has_is_an_error(shape):
    pickled = _records()["archive/data.pkl"]
    fsspec.filesystem("memory").pipe_file("/hostile/model.pt", _with_pickle(pickled.replace(b"Kd\x85", shape, 1)))
    assert b"Kd\x85" in pickled

    with pytest.raises(errors.CheckpointError):
        inspect_checkpoint(_URI)
    with pytest.raises(errors.CheckpointError):
        load_checkpoint(_URI)


def test_pickle_that_is_a_bomb_of_deflate_is_not_unpacked():
    content = zip_of(_records() | {"archive/data.pkl": b"\x80\x02" + b"]0" * 35_000_000})

    for attempt in (_load, lambda _: inspect_checkpoint(_URI)):
        with pytest.raises(errors.CheckpointError, match=r"data\.pkl of 70000002 bytes"):
            attempt(content)


def test_storage_that_is_made_and_not_loaded_does_no_harm():
    pickled = b"\x80\x02}X\x01\x00\x00\x00actorch.storage\nUntypedStorage\nM\xff\x7f\x85Rs."

    assert _load(_with_pickle(pickled), keys=["a"])["a"].nbytes() == 0x7FFF


@pytest.mark.parametrize("keys", [None, ["a"]])
def test_device_that_nobody_has_is_a_checkpoint_error(keys):
    content = _with_pickle(_records()["archive/data.pkl"].replace(b"cpu", b"xpq"))

    with pytest.raises(errors.CheckpointError, match="restore data location"):
        _load(content, keys=keys)
    assert torch.equal(_load(content, map_location="cpu")["a"], torch.arange(100.0))


def _claims(numel):
    pickled = _records()["archive/data.pkl"]
    assert b"Kd" in pickled
    return pickled.replace(b"Kd", b"\x8a\x08" + struct.pack("<q", numel), 1)


@pytest.mark.parametrize("numel", [101, 10**13, 2**62, -5])
@pytest.mark.parametrize("order", [b"little", b"big"])
@pytest.mark.parametrize("keys", [None, ["a"]])
def test_storage_that_claims_another_size_than_its_record_is_an_error(numel, order, keys):
    records = _records() | {"archive/data.pkl": _claims(numel), "archive/byteorder": order}

    with pytest.raises(errors.CheckpointError):
        _load(_zip(records), keys=keys)


def test_tensor_that_reaches_past_its_storage_is_an_error():
    pickled = _records()["archive/data.pkl"]
    longer = pickled.replace(b"Kd\x85", b"M\xff\x7f\x85", 1)
    assert longer != pickled

    with pytest.raises(errors.CheckpointError, match="resiz"):
        _load(_with_pickle(longer))


def _directory(content=_WHOLE):
    return content.index(b"PK\x01\x02")


def _entry(content, name):
    """Where a record's entry of the directory starts."""
    at = _directory(content)
    while content[at + 46 :][: len(name)] != name:
        name_size, extra, comment = struct.unpack_from("<3H", content, at + 28)
        at += 46 + name_size + extra + comment
    return at


def _changed(offset, layout, value, name=b"archive/data/0"):
    content = bytearray(_WHOLE)
    struct.pack_into(layout, content, _entry(_WHOLE, name) + offset, value)
    return bytes(content)


def _polyglot():
    return b"#!/bin/sh\necho\n" + _WHOLE, _WHOLE + torch_saved({"other": 1})


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def _twice():
    return _zip([*_records().items(), ("archive/data/0", bytes(400))])


def _overlapping():
    """Two records that start at one place."""
    first = struct.unpack_from("<L", _WHOLE, _entry(_WHOLE, b"archive/data/0") + 42)[0]
    return _changed(42, "<L", first, b"archive/data/1")


_DAMAGED = {
    "offset past the end": lambda: _changed(42, "<L", 2**31),
    "offset in the directory": lambda: _changed(42, "<L", _directory()),
    "huge size": lambda: _changed(24, "<L", 2**32 - 2),
    "huge sizes": lambda: bytes(_changed(20, "<Q", (2**32 - 2) << 32 | (2**32 - 2))),
    "overlapping": _overlapping,
    "duplicate": _twice,
    "shell script before it": lambda: _polyglot()[0],
    "another behind it": lambda: _polyglot()[1],
    "encrypted": lambda: _changed(8, "<H", 1),
    "strange compression": lambda: _changed(10, "<H", 14),
    "TorchScript": lambda: _zip(_records() | {"archive/constants.pkl": b""}),
    "no pickle": lambda: _zip({"archive/data/0": b""}),
    "huge version": lambda: _zip(_records() | {"archive/version": b"1" * 5000}),
}


@pytest.mark.parametrize("what", _DAMAGED)
@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_zip_that_lies_is_a_checkpoint_error(what):
    content = _DAMAGED[what]()

    with pytest.raises(errors.CheckpointError):
        _load(content)
    with pytest.raises(errors.CheckpointError):
        inspect_checkpoint(_URI)


def _record_10_tb():
    """A directory of zip64 that claims ten terabytes."""
    content, at = bytearray(_WHOLE), _entry(_WHOLE, b"archive/data/0")
    name, extra = struct.unpack_from("<2H", content, at + 28)
    wide = struct.pack("<2H2Q", 1, 16, 10**13, 10**13)
    struct.pack_into("<2L", content, at + 20, 2**32 - 1, 2**32 - 1)
    struct.pack_into("<H", content, at + 30, len(wide))
    content[at + 46 + name : at + 46 + name + extra] = wide
    grown = len(wide) - extra
    end64 = content.rindex(b"PK\x06\x06")
    struct.pack_into("<Q", content, end64 + 40, struct.unpack_from("<Q", content, end64 + 40)[0] + grown)
    locator = content.rindex(b"PK\x06\x07")
    struct.pack_into("<Q", content, locator + 8, end64)
    return bytes(content)


def test_claim_of_ten_terabytes_is_a_checkpoint_error():
    with pytest.raises(errors.CheckpointError, match="data/0"):
        _load(_record_10_tb())


def test_deflate_bomb_is_refused_before_it_is_unpacked():
    content = bytearray(zip_of(_records() | {"archive/data/0": bytes(400)}))
    at = _entry(bytes(content), b"archive/data/0")
    struct.pack_into("<L", content, at + 24, 2**32 - 2)

    with pytest.raises(errors.CheckpointError):
        _load(bytes(content))


@pytest.mark.parametrize("way", [{}, {"keys": ["a"]}, {"into": {"a": torch.zeros(100), "b": torch.zeros(50).long()}}])
def test_flipped_byte_is_an_integrity_error_that_names_its_record(way):
    content = bytearray(_WHOLE)
    content[_WHOLE.index(torch.arange(100.0).numpy().tobytes()) + 17] ^= 1

    with pytest.raises(errors.IntegrityError, match="data/0 is damaged") as caught:
        _load(bytes(content), **way)
    assert caught.value.uri == _URI
    assert caught.value.range is not None


def test_flipped_byte_loads_when_told_not_to_verify():
    content = bytearray(_WHOLE)
    content[_WHOLE.index(torch.arange(100.0).numpy().tobytes()) + 17] ^= 1

    assert not torch.equal(_load(bytes(content), verify=False)["a"], torch.arange(100.0))


def test_sparse_indices_out_of_bounds_are_an_error():
    tensor = torch.sparse_coo_tensor(torch.tensor([[2]]), torch.ones(1), (3,), check_invariants=True)
    content = torch_saved(tensor)
    records = _records(content)
    wrong = {name: struct.pack("<q", 2**40) if data == struct.pack("<q", 2) else data for name, data in records.items()}
    assert wrong != records

    with pytest.warns(UserWarning, match="Validating sparse"), pytest.raises(errors.CheckpointError):
        _load(_zip(wrong))


@pytest.mark.parametrize("header", [b'{"a":' + b"[" * 10**6, b"{" + b'"a":{},' * 10**6, b"{" + b" " * 10**6])
def test_bomb_of_a_header_is_a_checkpoint_error(header):
    with pytest.raises(errors.CheckpointError):
        _load(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "a/b", "", "..", "s3://other/x", "x?versionId=1"])
def test_index_cannot_name_files_elsewhere(file):
    with pytest.raises(errors.CheckpointError, match="not beside it"):
        _load(json.dumps({"weight_map": {"a": file}}).encode())


@pytest.mark.parametrize("index", [b"{", b"{}", b'{"weight_map": 1}', b'{"weight_map": []}', b'{"a":' * 10**5])
def test_json_that_is_no_index_is_a_checkpoint_error(index):
    with pytest.raises(errors.CheckpointError):
        _load(index)


def _load_in_little_memory(path):
    """Load every file of a folder where no more than 2 GB can be had."""
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    for file in sorted(path.iterdir()):
        with pytest.raises(errors.CheckpointError):
            load_checkpoint(file.as_uri())


def test_claims_take_no_memory(tmp_path):
    (tmp_path / "record").write_bytes(_record_10_tb())
    (tmp_path / "pickle").write_bytes(_with_pickle(_claims(10**13)))
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**13], "data_offsets": [0, 4 * 10**13]}}).encode()
    (tmp_path / "safetensors").write_bytes(len(header).to_bytes(8, "little") + header)

    in_new_process(_load_in_little_memory, tmp_path)


def test_code_of_a_public_bucket_is_warned_of(s3, bucket):
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/hostile/model.pt", _WHOLE)
    options = {"endpoint_url": s3.endpoint_url, "anon": True}

    with pytest.warns(UserWarning, match="weights_only=False runs code"), pytest.raises(errors.S3Error):
        load_checkpoint("s3://no-such-bucket/model.pt", weights_only=False, storage_options=options)
