"""Our own unpickler gives what torch's gives, or leaves it to torch; and it can do nothing else."""

import collections
import io
import pickle
import struct
import zipfile

import fsspec
import pytest
import torch
from archives import torch_saved, zip_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from torch_s3 import errors, load_checkpoint
from torch_s3.checkpoint import zipped
from torch_s3.checkpoint.allowed import Unusual
from torch_s3.checkpoint.unpickler import unpickle

_URI = "memory://unpickled/model.pt"
many = settings(max_examples=150, derandomize=True)


def _pickle(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        return archive.read(name)


def _unpickled(obj):
    """What our unpickler makes of what torch.save writes, its storages filled by zipfile."""
    content = torch_saved(obj)
    pickled = _pickle(content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:

        def find(key, location, nbytes):
            assert location == "cpu"
            found = archive.read(f"archive/data/{key}")
            assert len(found) == nbytes
            return torch.frombuffer(bytearray(found), dtype=torch.uint8).untyped_storage() if found else _empty()

        return unpickle(pickled, find)


def _empty():
    return torch.UntypedStorage(0)


def _assert_same(got, wanted):
    assert type(got) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        assert (got.dtype, got.shape, got.requires_grad) == (wanted.dtype, wanted.shape, wanted.requires_grad)
        assert (got.stride(), got.storage_offset()) == (wanted.stride(), wanted.storage_offset())
        assert bytes(got.untyped_storage()) == bytes(wanted.untyped_storage())
    elif isinstance(wanted, dict):
        assert list(got) == list(wanted)
        assert [type(key) for key in got] == [type(key) for key in wanted]
        _assert_same(list(got.values()), list(wanted.values()))
        if type(wanted) is collections.OrderedDict:
            _assert_same(vars(got), vars(wanted))
    elif isinstance(wanted, list | tuple):
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            _assert_same(one, other)
    else:
        assert got == wanted or repr(got) == repr(wanted) == "nan"


_DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.uint16, torch.uint64, torch.float8_e4m3fn,
]  # fmt: skip
_tensors = st.builds(
    lambda dtype, shape, view: view(_random(dtype, shape)),
    st.sampled_from(_DTYPES),
    st.lists(st.sampled_from([0, 1, 2, 3, 300]), max_size=4).filter(lambda shape: len(shape) < 3 or 300 not in shape),
    st.sampled_from([lambda t: t, lambda t: t.mT if t.dim() > 1 else t, lambda t: t[1:] if t.dim() else t]),
)
_floats = st.builds(torch.rand, st.integers(0, 300))
_parameters = st.builds(nn.Parameter, _floats, st.booleans())
_scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**80), 2**80), st.floats(), st.text(max_size=300),
    st.sampled_from([*_DTYPES, torch.device("cpu"), torch.device("cuda", 1), torch.Size([2, 70_000])]),
)  # fmt: skip
_keys = st.one_of(st.text(max_size=5), st.integers(), st.tuples(st.integers(), st.text(max_size=3)))
_objects = st.recursive(
    st.one_of(_scalars, _tensors, _parameters, st.sets(st.integers(), max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(_keys, inner, max_size=4),
        st.dictionaries(_keys, inner, max_size=4).map(collections.OrderedDict),
        st.lists(inner, max_size=5).map(tuple),
        inner.map(lambda each: [each, each]),
    ),
    max_leaves=12,
)


def _random(dtype, shape):
    count = torch.empty(shape, dtype=dtype).untyped_storage().nbytes()
    bits = torch.randint(2 if dtype is torch.bool else 256, (count,), dtype=torch.uint8)
    return torch.empty(0, dtype=dtype).set_(bits.untyped_storage(), 0, shape)


@many
@given(_objects)
def test_any_object_is_what_torch_makes_of_it(obj):
    _assert_same(_unpickled(obj), torch.load(io.BytesIO(torch_saved(obj)), weights_only=True))


@many
@given(_objects)
def test_any_object_loads_as_from_torch(obj):
    content = torch_saved(obj)
    fsspec.filesystem("memory").pipe_file("/unpickled/model.pt", content)

    _assert_same(load_checkpoint(_URI), torch.load(io.BytesIO(content), weights_only=True))


def test_state_dicts_keep_their_metadata_and_ties():
    model = nn.Sequential(nn.Embedding(10, 4), nn.BatchNorm1d(4), nn.Linear(4, 10, bias=False))
    model[2].weight = model[0].weight
    optimizer = torch.optim.Adam(model.parameters())
    model[2](model[1](model[0](torch.tensor([1, 2])))).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(keep_vars=True), "optimizer": optimizer.state_dict()}
    got = _unpickled(state)

    _assert_same(got, torch.load(io.BytesIO(torch_saved(state)), weights_only=True))
    assert got["model"]._metadata == state["model"]._metadata
    assert got["model"]["0.weight"] is got["model"]["2.weight"]


def test_tensors_of_one_storage_share_it():
    base = torch.arange(1000.0)
    got = _unpickled([base, base[10:], base.view(10, 100), base])
    got[1].fill_(7)

    assert got[0][10] == got[2][0, 10] == 7
    assert got[3] is got[0]


def test_more_tensors_than_a_byte_can_number():
    state = {f"layer.{number}": torch.full((number % 3,), number) for number in range(70_000 // 7)}

    _assert_same(_unpickled(state), state)


@pytest.fixture
def without_torch(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("torch was asked")

    monkeypatch.setattr(zipped, "torch_load", refuse)


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize("arguments", [{}, {"keys": ["a", "b.*"]}, {"map_location": "cpu"}, {"verify": False}], ids=str)
def test_torch_is_not_asked_for_plain_tensors(arguments):
    state = {"a": torch.arange(9), "b": collections.OrderedDict(c=nn.Parameter(torch.rand(3)), d=(1, None))}
    fsspec.filesystem("memory").pipe_file("/unpickled/model.pt", torch_saved(state))

    _assert_same(load_checkpoint(_URI, **arguments), state)


def test_small_tensors_have_storages_of_their_own_that_cannot_be_resized():
    state = [torch.full((number,), float(number)) for number in range(1, 2000)]
    fsspec.filesystem("memory").pipe_file("/unpickled/model.pt", torch_saved(state))
    got = load_checkpoint(_URI)

    assert [each.untyped_storage().nbytes() for each in got] == [4 * len(each) for each in got]
    assert all(each.data_ptr() % 64 == 0 for each in got)
    assert not got[0].untyped_storage().resizable()
    got[0].fill_(-1)
    last = got[-1]
    del got
    assert torch.equal(last, state[-1])


def _storages(key, location, nbytes):
    return torch.UntypedStorage(nbytes)[:nbytes]


_TENSOR = _pickle(torch_saved(torch.arange(3.0)))[2:-1]
_ORDERED = b"ccollections\nOrderedDict\n"


@pytest.mark.parametrize(
    "body",
    {
        "a function": _ORDERED,
        "a function in a list": b"]" + _ORDERED + b"a",
        "a function in a dict": b"}K\x01" + _ORDERED + b"s",
        "a function as a key": b"}" + _ORDERED + b"K\x01s",
        "a function in a tuple": _ORDERED + b"\x85",
        "a function in a tuple in a list": b"]" + _ORDERED + b"\x85\x85a",
        "a function as an attribute": _ORDERED + b")R}X\1\0\0\0a" + _ORDERED + b"sb",
        "a storage": _TENSOR[_TENSOR.index(b"((") + 1 : _TENSOR.index(b"Q") + 1],
        "attributes of a function": _ORDERED + b"}X\1\0\0\0aK\1sb",
        "attributes of a list": b"]}X\1\0\0\0aK\1sb",
        "attributes of a tensor": _TENSOR + b"}X\1\0\0\0aK\1sb",
        "state of a tensor": _TENSOR + b"(K\0K\0K\0tb",
        "attributes by numbers": _ORDERED + b")R}K\1K\1sb",
        "slots": _ORDERED + b")R}}X\1\0\0\0aK\1s\x86b",
        "an item of a tensor": _TENSOR + b"K\0K\1s",
        "an item of a list": b"]K\0K\1s",
        "items put after a tensor": _TENSOR + b"(K\0K\1u",
        "items appended to a tensor": _TENSOR + b"(K\0e",
        "an item appended to a dict": b"}K\0a",
        "a tensor as a key": b"}" + _TENSOR + b"K\1s",
        "a call of a number": b"K\1)R",
        "a call of a tensor": _TENSOR + b")R",
        "a call with no tuple": _ORDERED + b"]R",
        "an OrderedDict of pairs": _ORDERED + b"](K\1K\2\x86e\x85R",
        "an OrderedDict of a tensor": _ORDERED + _TENSOR + b"\x85R",
        "a size of a tensor": b"ctorch\nSize\n" + _TENSOR + b"\x85R",
        "a size of truth": b"ctorch\nSize\n\x88\x85\x85R",
        "a device of a tensor": b"ctorch\ndevice\n" + _TENSOR + b"\x85R",
        "a set of a tensor": b"c__builtin__\nset\n" + _TENSOR + b"\x85R",
        "a storage that is made": b"ctorch.storage\nUntypedStorage\nK\1\x85R",
        "a new object": _ORDERED + b")\x81",
        "an instance": b"(icollections\nOrderedDict\n",
        "another name": b"cbuiltins\neval\n",
        "a name in another module": b"ctorch._utils\nOrderedDict\n",
        "a dotted name": b"ctorch\nSize.__new__\n",
        "an extension": b"\x82\x01",
        "a name from the stack": b"X\5\0\0\0torchX\4\0\0\0Size\x93",
        "a storage by another word": b"(X\1\0\0\0xctorch\nFloatStorage\nX\1\0\0\0aX\3\0\0\0cpuK\1tQ",
        "a storage by a number": b"K\1Q",
        "a huge text": b"X\xff\xff\xff\xffa",
        "a huge number": b"\x8b\xff\xff\xff\x7f1",
        "a huge place in the memo": b"]j\xff\xff\xff\xff",
        "bytes": b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fa",
        "nothing": b"",
        "two objects": b"NN",
        "a mark": b"(N",
        "an odd number of items": b"}(K\1u",
        "too few for a tuple": b"N\x86",
        "nothing to remember": b"q\0",
        "nothing to append to": b"(K\1e",
    }.items(),
    ids=lambda item: item[0],
)
def test_what_torch_would_not_write_is_left_to_torch(body):
    with pytest.raises(Unusual):
        unpickle(b"\x80\x02" + body[1] + b".", _storages)


def test_every_truncated_or_changed_pickle_is_left_to_torch_or_plain():
    pickled = _pickle(torch_saved({"a": torch.arange(3.0), "b": [nn.Parameter(torch.ones(2)), torch.Size([1]), 2**70]}))
    plain = {dict, list, str, int, float, bool, tuple, torch.Tensor, nn.Parameter, torch.Size, type(None)}
    plain |= {collections.OrderedDict, torch.dtype}

    def check(node):
        assert type(node) in plain
        for each in [*node, *node.values()] if isinstance(node, dict) else node if type(node) in (list, tuple) else ():
            check(each)

    for at in range(len(pickled)):
        for content in (pickled[:at], *(pickled[:at] + bytes([byte]) + pickled[at + 1 :] for byte in range(256))):
            try:
                check(unpickle(content, _bounded))
            except Unusual:
                continue


def _bounded(key, location, nbytes):
    if not 0 <= nbytes <= 64:
        raise Unusual
    return _storages(key, location, nbytes)


@pytest.mark.parametrize("shape", [b"K\x04\x85", b"J\xff\xff\xff\xff\x85", b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86"])
def test_tensor_outside_of_its_storage_is_left_to_torch(shape):
    assert _TENSOR.count(b"K\x03\x85") == 1
    with pytest.raises(Unusual):
        unpickle(b"\x80\x02" + _TENSOR.replace(b"K\x03\x85", shape) + b".", _storages)


def _put(pickled, storage=b""):
    """Store a checkpoint that is this pickle and one storage."""
    records = {"data.pkl": pickled, "data/0": storage, "version": b"3", "byteorder": b"little"}
    content = zip_of({f"archive/{name}": body for name, body in records.items()}, zipfile.ZIP_STORED)
    fsspec.filesystem("memory").pipe_file("/unpickled/model.pt", content)


@pytest.mark.parametrize("keys", [None, ["*"]])
def test_tensor_that_claims_what_its_empty_storage_lacks_gets_no_memory(keys):
    pickled = _pickle(torch_saved({"a": torch.empty(0)}))
    claimed = pickled.replace(b"K\0\x85", b"J\0\0\x10\0\x85")
    _put(claimed)

    assert claimed != pickled
    with pytest.raises(errors.CheckpointError, match="not resizable") as caught:
        load_checkpoint(_URI, keys=keys)
    assert type(caught.value) is errors.CheckpointError


@pytest.mark.parametrize("arguments", [{}, {"keys": ["a"]}, {"map_location": "cpu"}, {"map_location": "meta"}], ids=str)
def test_fake_tensors_are_made_of_it_in_fake_mode(arguments):
    fsspec.filesystem("memory").pipe_file("/unpickled/model.pt", torch_saved({"a": torch.ones(3)}))
    with FakeTensorMode():
        got = load_checkpoint(_URI, **arguments)["a"]

    assert isinstance(got, FakeTensor)
    assert (got.shape, got.device.type) == ((3,), arguments.get("map_location", "cpu"))


@pytest.mark.parametrize("key", [b"K" + struct.pack("<B", 200), b"\x85" * 1000], ids=["number", "nested"])
def test_a_key_is_not_hashed_in_depth(key):
    body = b"\x80\x02})" + key + b"K\x01s." if key.startswith(b"\x85") else b"\x80\x02}" + key + b"K\x01s."
    if key.startswith(b"\x85"):
        with pytest.raises(Unusual):
            unpickle(body, _storages)
    else:
        assert unpickle(body, _storages) == {200: 1}


@pytest.mark.parametrize("name", ["bytearray", "complex"])
def test_what_looks_at_values_is_given_them(name):
    """Under the names of Python 2 too, which pickle writes."""
    pickled = _pickle(torch_saved({"a": torch.tensor([7], dtype=torch.uint8)}))
    start = pickled.index(b"ctorch._utils")
    body = pickled[:start] + f"c__builtin__\n{name}\n".encode() + pickled[start:-2] + b"\x85Rs."
    _put(body, b"\7")

    assert load_checkpoint(_URI)["a"] == {"bytearray": bytearray(7), "complex": 7 + 0j}[name]


@pytest.mark.parametrize("name", ["torch.storage\nUntypedStorage", "torch\nFloatTensor", "__builtin__\nbytearray"])
def test_claim_of_memory_is_a_checkpoint_error(name):
    body = b"\x80\x02c" + name.encode() + b"\n\x8a\x07" + (2**50).to_bytes(7, "little") + b"\x85R."
    _put(body)

    with pytest.raises(errors.CheckpointError, match="more memory than"):
        load_checkpoint(_URI)


def test_a_pickle_of_another_protocol_is_left_to_torch():
    with pytest.raises(Unusual):
        unpickle(pickle.dumps({"a": 1}, protocol=4), _storages)
