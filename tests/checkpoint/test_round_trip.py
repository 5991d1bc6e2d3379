"""What comes back is what was saved, exactly as if torch itself had kept it."""

import io
import random
import zipfile

import pytest
import torch
from archives import torch_saved
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.serialization import config

from torch_s3 import S3FileSystem, load_checkpoint, save_checkpoint

_KIB, _MIB = 1024, 1024 * 1024
_DTYPES = [
    torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex32, torch.complex64,
    torch.complex128, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu, torch.float4_e2m1fn_x2, torch.bits8, torch.bits16,
]  # fmt: skip

few = settings(max_examples=25, derandomize=True)


def _bits(tensor):
    """All of its storage as uint8, whatever the dtype: NaNs are equal too."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _assert_same(got, wanted):
    """Same types, values and memory layout, to the last bit."""
    assert type(got) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        for attribute in ("dtype", "shape", "layout", "device", "requires_grad", "is_quantized"):
            assert getattr(got, attribute) == getattr(wanted, attribute), attribute
        if wanted.layout is torch.sparse_coo:
            _assert_same([got._indices(), got._values()], [wanted._indices(), wanted._values()])
        elif wanted.layout is torch.sparse_csr:
            _assert_same(
                [got.crow_indices(), got.col_indices(), got.values()],
                [wanted.crow_indices(), wanted.col_indices(), wanted.values()],
            )
        else:
            for method in ("stride", "storage_offset", "is_conj", "is_neg"):
                assert getattr(got, method)() == getattr(wanted, method)(), method
            assert torch.equal(_bits(got), _bits(wanted))
        if wanted.is_quantized:
            assert (got.q_scale(), got.q_zero_point()) == (wanted.q_scale(), wanted.q_zero_point())
    elif isinstance(wanted, dict):
        assert list(got) == list(wanted)
        _assert_same(list(got.values()), list(wanted.values()))
    elif isinstance(wanted, list | tuple):
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            _assert_same(one, other)
    else:
        assert got == wanted


def _random(dtype, *shape):
    """A tensor of random bits."""
    count = torch.empty(shape, dtype=dtype).untyped_storage().nbytes()
    bits = torch.randint(2 if dtype is torch.bool else 256, (count,), dtype=torch.uint8)
    return torch.empty(0, dtype=dtype).set_(bits.untyped_storage(), 0, shape)


@pytest.fixture(scope="module")
def round_trip(s3):
    """Saves to S3 and loads again."""
    uri = f"{s3.create_bucket('round-trips')}/model.pt"

    def saved_and_loaded(obj):
        save_checkpoint(obj, uri, storage_options=s3.storage_options)
        return load_checkpoint(uri, storage_options=s3.storage_options)

    return saved_and_loaded


def _training_state():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2))
    return {"model": model.state_dict(), "epoch": 3, "best": 0.25, "name": "ä", "history": [1, (2.5, None, True)]}


def test_checkpoint_comes_back_through_any_filesystem(place):
    state, uri = _training_state(), f"{place.uri}/runs/1/model.pt"
    save_checkpoint(state, uri, **place.arguments)

    _assert_same(load_checkpoint(uri, **place.arguments), state)


def test_path_without_scheme_is_the_given_filesystems(place):
    state, path = _training_state(), place.fs._strip_protocol(f"{place.uri}/model.pt")
    save_checkpoint(state, path, filesystem=place.fs)

    _assert_same(load_checkpoint(path, filesystem=place.fs), state)


def test_old_format_loads_through_any_filesystem(place):
    state = _training_state() | {"large": _random(torch.float32, 300_000), "small": _random(torch.bfloat16, 3)}
    place.put("old.pt", torch_saved(state, _use_new_zipfile_serialization=False))

    _assert_same(load_checkpoint(f"{place.uri}/old.pt", **place.arguments), state)


def test_stored_bytes_are_those_that_torch_writes(place):
    state = {"large": torch.arange(300_000.0), "small": torch.ones(3, dtype=torch.bfloat16), "epoch": 3}
    save_checkpoint(state, f"{place.uri}/model.pt", **place.arguments)

    assert place.read("model.pt") == torch_saved(state)


def test_stored_file_is_whole_without_our_help(s3, bucket, client):
    state = {"large": _random(torch.float32, 3 * _MIB), "small": _random(torch.float16, 3), "epoch": 3}
    save_checkpoint(state, f"{bucket}/model.pt", storage_options=s3.storage_options | {"part_size": 5 * _MIB})
    file = io.BytesIO(client.get_object(Bucket=bucket[5:], Key="model.pt")["Body"].read())

    assert zipfile.ZipFile(file).testzip() is None
    file.seek(0)
    _assert_same(torch.load(file, weights_only=True), state)


def test_what_torch_saved_loads(s3, bucket, client):
    state = _training_state()
    client.put_object(Bucket=bucket[5:], Key="model.pt", Body=torch_saved(state))

    _assert_same(load_checkpoint(f"{bucket}/model.pt", storage_options=s3.storage_options), state)


@pytest.mark.parametrize(
    "make",
    {
        "transposed": lambda: torch.arange(12.0).reshape(3, 4).t(),
        "strided": lambda: torch.arange(100)[7:90:3],
        "expanded": lambda: torch.arange(3.0).reshape(3, 1).expand(3, 1000),
        "channels last": lambda: torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "no dimension": lambda: torch.tensor(2.5),
        "empty": lambda: torch.empty(0),
        "empty of some shape": lambda: torch.empty(3, 0, 2, dtype=torch.int64),
        "conjugated": lambda: torch.rand(3, dtype=torch.complex64).conj(),
        "negated": lambda: torch.rand(3, dtype=torch.complex64).conj().imag,
        "NaN and infinity": lambda: torch.tensor([float("nan"), float("inf"), -0.0]),
        "requires grad": lambda: torch.rand(3, requires_grad=True),
        "parameter": lambda: nn.Parameter(torch.rand(3)),
        "frozen parameter": lambda: nn.Parameter(torch.rand(3), requires_grad=False),
        "buffer": lambda: nn.Buffer(torch.rand(3)),
        "sparse": lambda: torch.eye(5).to_sparse(),
        "sparse, of compressed rows": lambda: torch.eye(5).to_sparse_csr(),
        "quantized": lambda: torch.quantize_per_tensor(torch.rand(9), 0.1, 3, torch.qint8),
        "size, dtype, device": lambda: [torch.Size([1, 2]), torch.bfloat16, torch.device("cpu")],
        "numbers and strings": lambda: [0, -1, 2**70, 0.1, float("inf"), True, None, "", "ä\n", 1 + 2j],
        "nested": lambda: {"a": [{"b": ({"c": [torch.ones(1)]},)}], 1: {(1, "x"): []}},
        "bytes": lambda: bytearray(b"\0\xff"),
        "nothing": lambda: None,
    }.items(),
    ids=lambda item: item[0],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")
@pytest.mark.filterwarnings("ignore:(torch.quantize_per_tensor|TypedStorage is deprecated):UserWarning")
def test_object_comes_back_as_from_torch(round_trip, make):
    obj = make[1]()
    got = round_trip(obj)

    _assert_same(got, obj)
    _assert_same(got, torch.load(io.BytesIO(torch_saved(obj)), weights_only=True))


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("dtype", _DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_dtype_comes_back(round_trip, dtype):
    tensor = _random(dtype, 3, 5)

    _assert_same(round_trip({"tensor": tensor}), {"tensor": tensor})


_shapes = st.lists(st.sampled_from([0, 1, 2, 3, 5, 8, 64, 257]), max_size=3)
_views = st.sampled_from(
    [lambda t: t, lambda t: t.mT if t.dim() > 1 else t, lambda t: t[1::2], lambda t: t.expand(2, *t.shape)]
)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@few
@given(st.lists(st.tuples(st.sampled_from(_DTYPES), _shapes, _views), max_size=5))
def test_any_dtypes_and_shapes_come_back(round_trip, drawn):
    tensors = []
    for dtype, shape, view in drawn:
        tensor = _random(dtype, *shape)
        tensors.append(view(tensor) if shape else tensor)

    _assert_same(round_trip(tensors), tensors)


# Around what the reader and the writer treat differently: blocks of 64 KiB, direct reads from 256 KiB, ranges of 1 MiB.
_sizes = st.builds(
    lambda size, more: max(0, size + more),
    st.sampled_from([0, 64, 64 * _KIB, 128 * _KIB, 256 * _KIB, 320 * _KIB, _MIB, 3 * _MIB]),
    st.integers(-70, 70),
)


@few
@given(st.lists(_sizes, max_size=6))
def test_storages_of_any_size_come_back(round_trip, sizes):
    tensors = [_random(torch.uint8, size) for size in sizes]

    _assert_same(round_trip(tensors), tensors)


def test_shared_storage_stays_shared_and_is_stored_once(s3, bucket):
    base = torch.arange(1000.0)
    state = {"all": base, "first": base[:10], "matrix": base.view(10, 100), "again": base}
    saved = save_checkpoint(state, f"{bucket}/model.pt", storage_options=s3.storage_options)
    got = load_checkpoint(f"{bucket}/model.pt", storage_options=s3.storage_options)

    assert saved.bytes < 2 * 4000
    got["first"][3] = -1
    assert got["all"][3] == got["matrix"][0, 3] == -1
    assert got["again"] is got["all"]


def test_tied_parameters_stay_tied(round_trip):
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model[1].weight = model[0].weight
    got = round_trip({"parameters": list(model.parameters(recurse=True)), "state": model.state_dict(keep_vars=True)})

    assert got["state"]["0.weight"] is got["state"]["1.weight"] is got["parameters"][0]
    _assert_same(got["parameters"][0], model[0].weight)


def test_checkpoint_of_several_parts_comes_back(s3, bucket, client):
    state = {"a": _random(torch.float32, 3 * _MIB), "b": _random(torch.int16, 7), "c": _random(torch.uint8, 6 * _MIB)}
    options = s3.storage_options | {"part_size": 5 * _MIB}
    save_checkpoint(state, f"{bucket}/model.pt", storage_options=options)

    assert client.head_object(Bucket=bucket[5:], Key="model.pt")["ETag"].endswith('-4"')
    _assert_same(load_checkpoint(f"{bucket}/model.pt", storage_options=options), state)


def test_thousands_of_small_tensors_come_back(round_trip):
    state = {f"layer.{number}": _random(torch.float32, number % 300) for number in range(2000)}

    _assert_same(round_trip(state), state)


@pytest.mark.parametrize("setting", [("save.compute_crc32", False), ("save.storage_alignment", 4096)], ids=str)
def test_torchs_settings_for_saving_are_followed(s3, bucket, setting):
    state, uri = _training_state(), f"{bucket}/model.pt"
    with config.patch(*setting):
        save_checkpoint(state, uri, storage_options=s3.storage_options)
        assert S3FileSystem(**s3.storage_options).cat_file(uri) == torch_saved(state)

    _assert_same(load_checkpoint(uri, storage_options=s3.storage_options), state)


def test_training_goes_on_exactly_as_without_a_break(round_trip):
    def new():
        model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)

    def train(model, optimizer, scheduler):
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.rand(8, 6)).square().sum().backward()
            optimizer.step()
            scheduler.step()

    def everything(parts):
        return {"parts": [part.state_dict() for part in parts], "rng": torch.get_rng_state()}

    torch.manual_seed(1)
    uninterrupted = new()
    train(*uninterrupted)
    checkpoint = round_trip(everything(uninterrupted))
    train(*uninterrupted)

    torch.manual_seed(2)
    resumed = new()
    for part, state in zip(resumed, checkpoint["parts"], strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(checkpoint["rng"])
    train(*resumed)

    _assert_same(everything(resumed), everything(uninterrupted))


def test_random_generators_come_back(round_trip):
    generator = torch.Generator().manual_seed(5)
    got = round_trip({"torch": torch.get_rng_state(), "own": generator.get_state(), "python": random.getstate()})
    wanted = torch.rand(3), torch.rand(3, generator=generator), random.random()
    torch.set_rng_state(got["torch"])
    generator.set_state(got["own"])
    random.setstate(got["python"])

    _assert_same((torch.rand(3), torch.rand(3, generator=generator), random.random()), wanted)
