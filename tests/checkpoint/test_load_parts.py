"""Parts of checkpoints, and into tensors that exist: torch's and safetensors alike."""

import gc
import io
import json
import zipfile
from collections import OrderedDict

import fsspec
import pytest
import safetensors.torch
import torch
from archives import torch_saved
from torch import nn

from torch_s3 import S3FileSystem, errors, inspect_checkpoint, load_checkpoint

_MIB = 1024 * 1024


_FORMATS = {
    "torch": torch_saved,
    "old": lambda state: torch_saved(state, _use_new_zipfile_serialization=False),
    "compressed": lambda state: _rezipped(torch_saved(state), zipfile.ZIP_DEFLATED),
    "zipped by others": lambda state: _rezipped(torch_saved(state), zipfile.ZIP_STORED),
    "safetensors": safetensors.torch.save,
}


def _rezipped(content, method, **changed):
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, changed.get(name.rpartition("/")[2], old.read(name)))
    return file.getvalue()


@pytest.fixture(params=_FORMATS)
def stored(request):
    """Stores a flat dict of tensors in some format; its uri."""

    def store(state):
        fsspec.filesystem("memory").pipe_file("/test_load_parts/model", _FORMATS[request.param](state))
        return "memory://test_load_parts/model"

    return store


def _state():
    return {
        "layers.0.weight": torch.rand(300, 1000),
        "layers.0.bias": torch.rand(3),
        "layers.1.weight": torch.rand(70, 5).to(torch.bfloat16),
        "layers.1.bias": torch.arange(7),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
    }


def _same(got, wanted):
    assert list(got) == list(wanted) or sorted(got) == sorted(wanted)
    assert all(torch.equal(got[name], wanted[name]) and got[name].dtype == wanted[name].dtype for name in wanted)


def test_everything_comes_back(stored):
    state = _state()

    _same(load_checkpoint(stored(state)), state)


def test_keys_choose_by_pattern(stored):
    state = _state()

    got = load_checkpoint(stored(state), keys=["layers.1.*", "scalar"])

    _same(got, {name: state[name] for name in ("layers.1.weight", "layers.1.bias", "scalar")})


def test_key_that_matches_nothing_is_an_error(stored):
    with pytest.raises(errors.CheckpointMismatch, match=r"nothing in it matches 'layers\.7\.\*'"):
        load_checkpoint(stored(_state()), keys=["layers.0.*", "layers.7.*"])


def test_existing_tensors_are_filled(stored):
    state = _state()
    into = {name: torch.zeros_like(tensor) for name, tensor in state.items()}

    got = load_checkpoint(stored(state), into=into)

    _same(into, state)
    assert all(got[name] is into[name] for name in state)


def test_with_keys_only_those_that_match_are_filled(stored):
    state = _state()
    into = {name: torch.zeros_like(tensor) for name, tensor in state.items()}

    load_checkpoint(stored(state), into=into, keys=["layers.0.*"])

    assert torch.equal(into["layers.0.weight"], state["layers.0.weight"])
    assert not into["layers.1.bias"].any()


def test_memory_of_any_layout_is_filled(stored):
    state = _state()
    base = torch.zeros(10, 1000, 300)
    into = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    into["layers.0.weight"] = base[3].t()
    into["layers.1.bias"] = torch.zeros(20, dtype=torch.int64)[1:15:2]
    into["layers.1.weight"] = nn.Parameter(into["layers.1.weight"])

    load_checkpoint(stored(state), into=into)

    _same(into, state)
    assert not base[2].any()
    assert not base[4].any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda into: into.pop("scalar"), "it has also scalar"),
        (lambda into: into.update(other=torch.zeros(1)), "it has no other"),
        (
            lambda into: into.update(scalar=torch.zeros(1)),
            r"scalar in it is torch.float32 \(\), not torch.float32 \(1,\)",
        ),
        (lambda into: into.update(scalar=torch.tensor(1)), r"not torch.int64"),
    ],
)
def test_tensors_that_differ_are_an_error_before_any_is_written(stored, change, words):
    state = _state()
    into = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    change(into)

    with pytest.raises(errors.CheckpointMismatch, match=words):
        load_checkpoint(stored(state), into=into)
    assert not any(tensor.any() for name, tensor in into.items() if name != "scalar")


def test_into_and_map_location_exclude_each_other(stored):
    with pytest.raises(ValueError, match="leave out map_location"):
        load_checkpoint(stored(_state()), into={}, map_location="cpu")


@pytest.mark.parametrize("location", ["cpu", torch.device("cpu"), {"cpu": "cpu"}, lambda storage, _: storage.clone()])
def test_map_location_may_be_anything(stored, location):
    state = _state()

    _same(load_checkpoint(stored(state), map_location=location), state)
    _same(load_checkpoint(stored(state), map_location=location, keys=["scalar"]), {"scalar": state["scalar"]})


def test_meta_has_shapes_and_no_bytes(stored):
    got = load_checkpoint(stored(_state()), map_location="meta")

    assert {name: (tensor.shape, tensor.device.type) for name, tensor in got.items()} == {
        name: (tensor.shape, "meta") for name, tensor in _state().items()
    }


def test_progress_can_be_a_call_and_the_report_adds_up(stored):
    told, reports = [], []
    uri = stored(_state())
    load_checkpoint(uri, progress=lambda *now: told.append(now), report=reports.append)
    [report] = reports

    assert not told or told[-1][0] == told[-1][1] == report.received  # compressed ones are not counted
    assert (report.uri, report.bytes) == (uri, fsspec.filesystem("memory").size("/test_load_parts/model"))
    assert report.seconds >= report.reading_layout + report.receiving >= 0


# ---------------------------------------------------------------------- torch's


def _nested():
    weight = torch.rand(40, 3)
    return {
        "model": {"tied": weight, "again": weight, "view": weight[3:5], "parameter": nn.Parameter(torch.rand(4))},
        "optimizer": {"state": {0: {"exp_avg": torch.rand(2)}, 1: {"exp_avg": torch.rand(3)}}, "groups": [{"lr": 0.1}]},
        "history": [torch.ones(2), (torch.zeros(1), "x")],
        "epoch": 7,
    }


def _loaded(content, **arguments):
    fsspec.filesystem("memory").pipe_file("/test_load_parts/nested.pt", content)
    return load_checkpoint("memory://test_load_parts/nested.pt", **arguments)


def test_keys_keep_the_nesting_and_take_all_below_a_match():
    state = _nested()
    got = _loaded(torch_saved(state), keys=["optimizer.state.1", "history.1.1", "epoch", "model.v*"])

    assert got["epoch"] == 7
    assert got["history"] == [("x",)]
    assert torch.equal(got["optimizer"]["state"][1]["exp_avg"], state["optimizer"]["state"][1]["exp_avg"])
    assert list(got["optimizer"]["state"]) == [1]
    assert torch.equal(got["model"]["view"], state["model"]["view"])


def test_into_fills_nested_and_tied_tensors():
    state, into = _nested(), _nested()
    got = _loaded(torch_saved(state), into=into)

    assert torch.equal(into["model"]["tied"], state["model"]["tied"])
    assert torch.equal(into["model"]["view"], state["model"]["view"])
    assert torch.equal(into["optimizer"]["state"][0]["exp_avg"], state["optimizer"]["state"][0]["exp_avg"])
    assert got["history"][1][0] is into["history"][1][0]
    assert got["epoch"] == 7


def _put(obj):
    fsspec.filesystem("memory").pipe_file("/test_load_parts/model.pt", torch_saved(obj))
    return "memory://test_load_parts/model.pt"


_HIDDEN = {
    "storage": (lambda: torch.arange(5.0).untyped_storage(), list),
    "typed storage": (lambda: torch.arange(5.0).storage(), list),
    "set": (lambda: {torch.arange(5.0)}, lambda found: [each.tolist() for each in found]),
    "key": (lambda: {torch.arange(5.0): 1}, lambda found: [each.tolist() for each in found]),
    "attribute": (lambda: _with_attribute(torch.arange(5.0)), lambda found: found.extra.tolist()),
}


def _with_attribute(value):
    made = OrderedDict(a=1)
    made.extra = value
    return made


@pytest.mark.parametrize("where", _HIDDEN)
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_what_no_path_leads_to_is_loaded_with_what_holds_it(where):
    """It has memory too, that would have been left as it was."""
    make, content = _HIDDEN[where]
    tensor = torch.arange(9.0)
    uri = _put({"it": make(), "tensor": tensor, "not": torch.ones(3)})
    target = torch.zeros(9)

    assert content(load_checkpoint(uri, keys=["it"])["it"]) == content(make())
    found = load_checkpoint(uri, into={"tensor": target, "not": torch.zeros(3)})
    assert content(found["it"]) == content(make())
    assert found["tensor"] is target
    assert torch.equal(target, tensor)


def test_keys_of_one_path_are_all_loaded():
    state = {"a": {"b": torch.full((5,), 1.0)}, "a.b": torch.full((5,), 2.0), 0: torch.ones(2), "0": torch.zeros(2)}
    found = load_checkpoint(_put(state), keys=["a*", "0"])

    assert all(torch.equal(found[key], state[key]) for key in ("a.b", 0, "0"))
    assert torch.equal(found["a"]["b"], state["a"]["b"])


def test_into_refuses_two_tensors_of_one_path():
    state = {"a": {"b": torch.ones(5)}, "a.b": torch.zeros(5)}

    with pytest.raises(errors.CheckpointError, match=r"path 'a\.b'"):
        load_checkpoint(_put(state), into=state)


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_tensors_apart_fill_targets_that_are_one(size):
    """Which has one of the two contents then, whole, and is not taken for damaged."""
    memory = torch.zeros(size + 5)
    into = {"a": memory[5:], "b": memory[:size], "c": memory[5:]}
    load_checkpoint(_put({name: torch.full((size,), ord(name) * 1.0) for name in into}), into=into)

    assert memory[0] == ord("b")
    assert memory[-1] in (ord("a"), ord("c"))


def test_into_fills_tied_targets_of_tied_tensors_once():
    weight = torch.rand(1000)
    target = torch.zeros(1000)
    reports = []
    load_checkpoint(_put({"a": weight, "b": weight}), into={"a": target, "b": target}, report=reports.append)

    assert torch.equal(target, weight)
    assert reports[0].received == weight.nbytes


@pytest.mark.parametrize(
    ("target", "words"),
    [(torch.zeros(1).expand(5), "expanded"), (torch.zeros(5, device="meta"), "meta")],
    ids=["expanded", "meta"],
)
def test_what_cannot_be_filled_is_refused_before_anything_is_written(target, words):
    other = torch.zeros(5)
    with pytest.raises(errors.CheckpointMismatch, match=words):
        load_checkpoint(_put({"a": torch.ones(5), "b": torch.ones(5)}), into={"a": other, "b": target})

    assert not other.any()


@pytest.mark.filterwarnings("ignore:Validating sparse:UserWarning", "ignore:Sparse CSR:UserWarning")
def test_sparse_tensors_are_filled_where_they_can_be():
    sparse = torch.eye(5).to_sparse()
    into = {"a": torch.zeros(5, 5).to_sparse()}
    load_checkpoint(_put({"a": sparse}), into=into)
    assert torch.equal(into["a"].to_dense(), torch.eye(5))

    compressed = torch.zeros(5, 5).to_sparse_csr()
    with pytest.raises(errors.CheckpointMismatch, match="number of specified elements"):
        load_checkpoint(_put({"a": torch.eye(5).to_sparse_csr()}), into={"a": compressed})


def test_state_dict_keeps_the_versions_of_its_modules():
    state = nn.BatchNorm1d(3).state_dict()
    uri = _put({"model": state})

    assert load_checkpoint(uri, keys=["model.weight"])["model"]._metadata == state._metadata
    assert load_checkpoint(uri, into={"model": nn.BatchNorm1d(3).state_dict()})["model"]._metadata == state._metadata


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_of_garbage_is_afterwards_as_it_was(enabled):
    uri, bad = _put([torch.ones(3)]), "memory://test_load_parts/bad.pt"
    fsspec.filesystem("memory").pipe_file(bad, _rezipped(torch_saved([torch.ones(3)]), 0, **{"data.pkl": b"x"}))
    (gc.enable if enabled else gc.disable)()
    try:
        load_checkpoint(uri)
        with pytest.raises(errors.CheckpointError):
            load_checkpoint(bad)
        assert gc.isenabled() is enabled
    finally:
        gc.enable()


def test_one_tensor_costs_its_own_bytes_and_a_little(s3, bucket):
    state = {f"layer.{number}": torch.full((500_000,), number, dtype=torch.uint8) for number in range(20)}
    fs = S3FileSystem(**s3.storage_options, skip_instance_cache=True)
    for name, content in (("m.pt", torch_saved(state)), ("m.safetensors", safetensors.torch.save(state))):
        fs.pipe_file(f"{bucket}/{name}", content)
        before = fs.stats()["bytes_received"]

        got = load_checkpoint(f"{bucket}/{name}", filesystem=fs, keys=["layer.11"])

        assert torch.equal(got["layer.11"], state["layer.11"])
        assert fs.stats()["bytes_received"] - before < 500_000 + 256 * 1024


def test_foreign_byte_order_is_turned():
    state = {"a": torch.arange(1000.0), "b": torch.arange(5), "c": torch.ones(3, dtype=torch.uint8)}
    swapped = {}
    for name, tensor in state.items():
        swapped[name] = tensor.clone()
        swapped[name].untyped_storage().byteswap(tensor.dtype)
    content = _rezipped(torch_saved(swapped), zipfile.ZIP_STORED, byteorder=b"big")

    _same(_loaded(content), state)
    _same(_loaded(content, keys=["b"]), {"b": state["b"]})
    into = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    _loaded(content, into=into)
    _same(into, state)


class _Scaled(torch.Tensor):
    """A subclass that looks at values when it is made."""

    def __setstate__(self, state):
        self.total = float(self.as_subclass(torch.Tensor).sum())


def test_what_looks_at_values_while_it_is_unpickled_sees_them():
    tensor = torch.ones(5000).as_subclass(_Scaled)
    tensor.mark = 1

    got = _loaded(torch_saved({"a": tensor, "b": torch.ones(2)}), weights_only=False)

    assert got["a"].total == 5000


def test_sum_that_was_never_made_is_not_compared():
    from torch.utils.serialization import config

    with config.patch("save.compute_crc32", False):
        content = torch_saved({"a": torch.ones(3)})
    reports = []
    _same(_loaded(content, report=reports.append), {"a": torch.ones(3)})

    assert not reports[0].verified


def test_safe_globals_are_allowed_for_one_load():
    got = _loaded(torch_saved({"p": complex, "t": torch.ones(2)}), safe_globals=[(complex, "builtins.complex")])
    assert got["p"] is complex


# ---------------------------------------------------------------------- inspecting, shards


@pytest.mark.parametrize("way", ["torch", "compressed", "zipped by others", "safetensors"])
def test_what_is_in_a_file_is_told(way):
    state = _state()
    content = _FORMATS[way](state)
    fsspec.filesystem("memory").pipe_file("/test_load_parts/inspected", content)

    info = inspect_checkpoint("memory://test_load_parts/inspected")

    assert {tensor.name: (tensor.dtype, tensor.shape) for tensor in info.tensors} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()
    }
    assert (info.bytes, info.unsafe_globals) == (len(content), ())
    if way != "compressed":
        for tensor in info.tensors:
            found = content[tensor.offset : tensor.offset + tensor.bytes]
            assert found == state[tensor.name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_what_is_nested_is_told_by_the_paths_that_keys_take():
    fsspec.filesystem("memory").pipe_file("/test_load_parts/nested.pt", torch_saved(_nested()))
    names = [tensor.name for tensor in inspect_checkpoint("memory://test_load_parts/nested.pt").tensors]

    assert "optimizer.state.1.exp_avg" in names
    assert {"model.tied", "model.again", "model.view", "model.parameter", "history.0", "history.1.0"} <= set(names)


@pytest.fixture
def sharded():
    """The uri of a checkpoint in three files, of two formats, and what is in it."""
    state = _state()
    names = list(state)
    fs = fsspec.filesystem("memory")
    files = {}
    for number, ending in enumerate(("safetensors", "safetensors", "bin")):
        part = {name: state[name] for name in names[number::3]}
        write = safetensors.torch.save if ending == "safetensors" else torch_saved
        fs.pipe_file(f"/test_sharded/part-{number}.{ending}", write(part))
        files |= dict.fromkeys(part, f"part-{number}.{ending}")
    index = {"metadata": {}, "weight_map": {name: files[name] for name in names}}
    fs.pipe_file("/test_sharded/model.safetensors.index.json", json.dumps(index).encode())
    return "memory://test_sharded/model.safetensors.index.json", state


def test_shards_load_as_one(sharded):
    uri, state = sharded

    got = load_checkpoint(uri)
    assert list(got) == list(state)
    _same(got, state)
    _same(load_checkpoint(uri, keys=["layers.*.bias"]), {name: state[name] for name in state if "bias" in name})
    into = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    load_checkpoint(uri, into=into)
    _same(into, state)
    assert {tensor.name for tensor in inspect_checkpoint(uri).tensors} == set(state)


def test_shard_that_lacks_a_tensor_is_an_error(sharded):
    uri, _ = sharded
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/test_sharded/part-0.safetensors", safetensors.torch.save({"other": torch.ones(1)}))

    with pytest.raises(errors.CheckpointMismatch, match=r"part-0\.safetensors: nothing in it matches"):
        load_checkpoint(uri)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gets_what_was_saved(stored):
    state = _state()
    got = load_checkpoint(stored(state), map_location="cuda")

    assert {tensor.device.type for tensor in got.values()} == {"cuda"}
    _same({name: tensor.cpu() for name, tensor in got.items()}, state)
    into = {name: torch.zeros_like(tensor, device="cuda") for name, tensor in state.items()}
    load_checkpoint(stored(state), into=into)
    _same({name: tensor.cpu() for name, tensor in into.items()}, state)
