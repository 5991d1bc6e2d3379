"""state_dicts that pickle wrote, read from the embedded S3 and beside s3fs."""

import collections
import gzip
import io
import os
import pickle
import tracemalloc
import zipfile

import fsspec
import numpy as np
import pytest
import s3fs
import safetensors.torch
import torch
from archives import tar_of, zip_of
from processes import in_new_process, measured_peak

from torch_s3 import S3FileSystem, errors
from torch_s3.artifacts import load_state_dict

URI = "memory://states/it.pkl"


def load(content):
    fsspec.filesystem("memory").pipe_file("/states/it.pkl", content)
    return load_state_dict(URI)


def _model():
    return torch.nn.Sequential(torch.nn.Linear(200, 300), torch.nn.BatchNorm1d(300), torch.nn.Embedding(5, 5))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("library", [S3FileSystem, s3fs.S3FileSystem])
def test_state_dict_is_read_back(s3, bucket, protocol, library):
    model = _model()
    fs = library(**s3.storage_options)
    fs.pipe_file(f"{bucket}/model.pkl", pickle.dumps(model.state_dict(), protocol=protocol))

    state = load_state_dict(f"{bucket}/model.pkl", filesystem=fs)

    assert type(state) is collections.OrderedDict
    other = _model()
    other.load_state_dict(state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor)
        assert state[name].dtype == tensor.dtype
    assert state._metadata == model.state_dict()._metadata


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint8])
def test_dtypes_views_and_parameters_come_back(dtype):
    tensor = torch.arange(120).to(dtype).reshape(10, 12)
    state = {"a": tensor, "t": tensor.T, "part": tensor[2:4, 1:3], "scalar": tensor[0, 1], "none": tensor[:0]}
    state["nested"] = {"lr": 0.1, "betas": (0.9, 0.999), "names": ["x"], "array": np.arange(3)}
    if dtype.is_floating_point:
        state["parameter"] = torch.nn.Parameter(tensor)
    found = load(pickle.dumps(state))

    for name in ("a", "t", "part", "scalar", "none"):
        assert torch.equal(found[name], state[name])
        assert found[name].stride() == state[name].stride()
    assert found["nested"]["betas"] == (0.9, 0.999)
    assert np.array_equal(found["nested"]["array"], np.arange(3))
    if dtype.is_floating_point:
        assert type(found["parameter"]) is torch.nn.Parameter


def test_map_location_is_kept():
    fsspec.filesystem("memory").pipe_file("/states/it.pkl", pickle.dumps(_model().state_dict()))

    assert load_state_dict(URI, map_location="meta")["0.weight"].device.type == "meta"


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("gpu", ValueError),
        ("cuda:99", ValueError),
        (torch.device("cuda:99"), ValueError),
        ({"cpu": "gpu"}, ValueError),
        (1, TypeError),
    ],
)
def test_map_location_that_is_no_device_is_refused_before_anything_is_read(place, error):
    with pytest.raises(error, match=r"^memory://states/none\.pkl: map_location="):
        load_state_dict("memory://states/none.pkl", map_location=place)


def test_whole_models_and_optimizers_of_other_types_are_refused():
    with pytest.raises(errors.UnsafeArtifact, match=r"torch\.nn\.modules\.linear\.Linear") as caught:
        load(pickle.dumps(torch.nn.Linear(2, 2)))
    assert "torch.nn.modules.linear.Linear" in caught.value.asks_for
    assert "of a whole module, save its state_dict(); an estimator is for load_estimator" in str(caught.value)
    assert "trusted=" not in str(caught.value)


def test_what_torch_save_wrote_is_sent_to_load_checkpoint():
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        file = io.BytesIO()
        torch.save({"a": torch.ones(3)}, file, **options)
        with pytest.raises(errors.ArtifactError, match="load_checkpoint"):
            load(file.getvalue())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (zip_of({"schema.json": b"{}"}), "a .skops file, for load_estimator"),
        (zip_of({"a": b"1"}), "a zip, for open_artifact"),
        (gzip.compress(pickle.dumps({})), "compressed by gzip, for load_estimator or open_artifact"),
        (tar_of({"a": b"1"}), "a tar, for load_estimator or open_artifact"),
        (safetensors.torch.save({"a": torch.ones(3)}), r"it looks like \.safetensors, for load_checkpoint"),
        (b"", "it is empty"),
    ],
    ids=[".skops", "zip", "gzip", "tar", ".safetensors", "empty"],
)
def test_other_format_is_named_with_what_loads_it(content, words):
    with pytest.raises(errors.ArtifactError, match=words):
        load(content)


def test_what_is_no_state_dict_is_an_error():
    for thing in ([torch.ones(2)], 3, torch.ones(2)):
        with pytest.raises(errors.ArtifactError, match="no state_dict"):
            load(pickle.dumps(thing))
    content = pickle.dumps(_model().state_dict())
    for part in (0, 0.01, 0.5, 0.999):
        with pytest.raises(errors.ArtifactError):
            load(content[: int(part * len(content))])


class _Nested:
    """Code in the torch.save that is in the pickle."""

    def __init__(self, content):
        self.content = content

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.content,)


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_nested_file_is_not_run(tmp_path, zipped):
    file = io.BytesIO()
    torch.save(_Touch(tmp_path / "ran"), file, _use_new_zipfile_serialization=zipped)

    with pytest.raises(errors.ArtifactError, match="cannot be built"):
        load(pickle.dumps({"a": _Nested(file.getvalue())}))
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("zipped", [True, False])
def test_one_storage_many_times_is_refused_in_bounded_memory(zipped):
    file = io.BytesIO()
    torch.save(torch.zeros(1_000_000).storage(), file, _use_new_zipfile_serialization=zipped)
    if zipped:
        with zipfile.ZipFile(file) as archive:
            file = io.BytesIO(zip_of({name: archive.read(name) for name in archive.namelist()}))
    inner = file.getvalue()
    content = pickle.dumps([_Nested(inner) for _ in range(300)])

    assert in_new_process(_growth_when_refused, content) < len(content) + 150e6


def _growth_when_refused(content):
    with measured_peak() as peak:
        with pytest.raises(errors.ArtifactError, match="a bomb: its tensors"):
            load(content)
        return peak()


def test_what_is_no_storage_where_one_should_be_is_refused():
    file = io.BytesIO()
    torch.save({"a": 1}, file)
    with pytest.raises(errors.ArtifactError, match="dict where a storage should be"):
        load(pickle.dumps({"a": _Nested(file.getvalue())}))


class _Tensor:
    def __init__(self, storage, *arguments):
        self.arguments = storage, *arguments

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(0, (10**10,), (1,)), (10, (1,), (1,)), (-1, (1,), (1,)), (0, (3,), (5,)), (0, (2,), (1, 1)), (0, (-1,), (1,))],
)
def test_tensor_that_goes_beyond_its_storage_is_refused(offset, shape, strides):
    storage = torch.arange(10.0).storage()
    tracemalloc.start()
    try:
        with pytest.raises(errors.ArtifactError, match="storage"):
            load(pickle.dumps({"a": _Tensor(storage, offset, shape, strides, False, {})}))
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_missing_object_is_not_found(s3, bucket):
    with pytest.raises(errors.NotFound):
        load_state_dict(f"{bucket}/nothing.pkl", storage_options=s3.storage_options)
