"""Copies on the host are what was there, and stay so."""

import copy
import threading
from collections import OrderedDict, namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torch_s3.checkpoint.snapshot import Snapshots
from torch_s3.checkpoint.staging import Ahead, Staging, StoragesAhead, storages_in, tensors_in

Pair = namedtuple("Pair", "first second")  # noqa: PYI024 as users have them
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_tensors_are_found_in_the_order_of_pickling_and_once():
    a, b, c, d = (torch.full((1,), float(number)) for number in range(4))
    state = {"a": a, "nested": [b, (c, {"again": a})], "d": Pair(d, b), "other": "text"}

    assert [tensor.item() for tensor in tensors_in(state)] == [0, 1, 2, 3]


def test_structure_that_contains_itself_ends():
    state = {"a": torch.ones(1)}
    state["self"] = [state]

    assert len(list(tensors_in(state))) == 1


def test_shared_storage_counts_once_and_sparse_tensors_not():
    base = torch.zeros(100)

    assert [each.nbytes() for each in storages_in([base, base[:10], torch.eye(3).to_sparse()])] == [400]


def _fill(state, value):
    for tensor in tensors_in(state):
        tensor.detach().fill_(value)


def test_snapshot_does_not_see_later_changes():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    state = {"model": model.state_dict(), "steps": [1, 2], "best": torch.tensor(0.5)}
    wanted = copy.deepcopy(state)
    taken = Snapshots().take(state).state
    _fill(state, 9)
    state["steps"].append(3)

    assert taken["steps"] == wanted["steps"]
    assert type(taken["model"]) is OrderedDict
    assert taken["model"]._metadata == wanted["model"]._metadata
    assert all(map(torch.equal, tensors_in(taken), tensors_in(wanted)))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(100)[7:90:3],
        torch.arange(3.0).reshape(3, 1).expand(3, 10),
        torch.tensor(2.5),
        torch.empty(3, 0),
        nn.Parameter(torch.rand(3)),
        nn.Parameter(torch.rand(3), requires_grad=False),
        nn.Buffer(torch.rand(3)),
        torch.rand(3, requires_grad=True),
        torch.rand(3, dtype=torch.complex64).conj(),
        torch.rand(3, dtype=torch.complex64).conj().imag,
        torch.eye(5).to_sparse(),
    ],
    ids=lambda tensor: f"{type(tensor).__name__} {tuple(tensor.shape)} {tensor.layout}",
)
def test_snapshot_of_a_tensor_is_like_it(tensor):
    found = Snapshots().take([tensor]).state[0]

    assert type(found) is type(tensor)
    assert (found.dtype, found.shape, found.requires_grad) == (tensor.dtype, tensor.shape, tensor.requires_grad)
    assert torch.equal(found.to_dense(), tensor.to_dense())
    if tensor.layout is torch.strided:
        assert found.data_ptr() != tensor.data_ptr() or tensor.numel() == 0


def test_snapshot_of_what_was_computed_needs_no_leaf():
    tensor = nn.Parameter(torch.ones(2)) * 2

    assert torch.equal(Snapshots().take({"x": tensor}).state["x"], tensor)


@pytest.mark.parametrize(
    "change",
    [lambda x: x.to(torch.complex64).conj(), torch.Tensor.to_sparse, lambda x: setattr(x, "note", 1) or x],
    ids=["conjugate", "sparse", "with an attribute"],
)
def test_snapshot_of_anything_that_was_computed_needs_no_leaf(change):
    tensor = change(nn.Parameter(torch.ones(2)) * 2)
    found = Snapshots().take({"x": tensor}).state["x"]

    assert torch.equal(found.to_dense(), tensor.to_dense())
    assert found.requires_grad
    assert vars(found) == vars(tensor)


def test_snapshot_keeps_attributes_of_tensors_and_what_they_are_of():
    weight = nn.Parameter(torch.ones(3))
    tied = nn.Parameter(weight.data)
    weight.of, weight.sharded = [weight, tied], True
    snapshots = Snapshots()
    taken, same = snapshots.take([weight, tied]).state

    assert taken.sharded
    assert taken.of[0] is taken
    assert taken.of[1] is same
    assert taken.data_ptr() == same.data_ptr() != weight.data_ptr()
    del weight.of, weight.sharded
    assert vars(snapshots.take([weight, tied]).state[0]) == {}


class _Made(dict):
    """A dict that makes its values when it is asked for them."""

    def values(self):
        return (torch.full((9,), float(key)) for key in self)

    def items(self):
        return zip(self, self.values(), strict=True)


def test_snapshot_of_tensors_that_exist_for_this_once():
    state = _Made.fromkeys(range(100))
    taken = Snapshots().take({"made": state}).state["made"]

    assert len(list(tensors_in(state))) == 100
    assert [dict.__getitem__(taken, key).tolist() for key in taken] == [[key] * 9 for key in range(100)]


def test_snapshot_keeps_shared_memory_shared_and_apart_from_the_original():
    base = torch.arange(10.0)
    module = nn.Linear(1, 1)
    module.extra = base[2:4]  # found by deepcopy, not by us
    taken = Snapshots().take({"a": base, "b": base[5:], "module": module}).state
    taken["a"].fill_(7)

    assert taken["b"].tolist() == [7] * 5
    assert taken["module"].extra.tolist() == [7] * 2
    assert base.tolist() == list(range(10))


def test_snapshots_use_their_memory_again():
    snapshots = Snapshots()
    state = {"a": torch.ones(1000), "b": torch.ones(10)}
    first = [tensor.data_ptr() for tensor in tensors_in(snapshots.take(state).state)]
    second = [tensor.data_ptr() for tensor in tensors_in(snapshots.take(state).state)]

    assert first == second
    assert snapshots.take({"a": torch.ones(5)}).state["a"].tolist() == [1] * 5


def test_what_cannot_be_copied_is_an_error_at_once():
    with pytest.raises(TypeError):
        Snapshots().take({"lock": threading.Lock()})


@given(st.lists(st.lists(st.integers(0, 20), max_size=4), max_size=6))
def test_loads_arrive_in_order(sizes):
    loads = [[torch.randint(256, (size,), dtype=torch.uint8) for size in load] for load in sizes]
    ahead = Ahead(loads)
    for number, load in enumerate(loads):
        for _ in range(2):  # as often as it has storages
            assert torch.equal(ahead.load(number), torch.cat([torch.empty(0, dtype=torch.uint8), *load]))
    ahead.close()


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.randoms())
def test_storages_are_right_in_any_order(sizes, random):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_s3.checkpoint.staging._CHUNK", 64)
        storages = [torch.randint(256, (size,), dtype=torch.uint8).untyped_storage() for size in sizes]
        for order in (list(storages), random.sample(storages, len(storages))):
            ahead = StoragesAhead(storages)
            for storage in order:
                assert ahead.take(storage).tolist() == storage.tolist()


@gpu
def test_gpu_state_is_saved_as_torch_does_and_its_storages_are_left_as_they_were(tmp_path):
    state = {"small": [torch.rand(9, device="cuda") for _ in range(50)], "large": torch.rand(20_000_000, device="cuda")}
    with Staging().of_storages(storages_in(state)):
        torch.save(state, tmp_path / "ours")
    torch.save(state, tmp_path / "torchs")

    assert (tmp_path / "ours").read_bytes() == (tmp_path / "torchs").read_bytes()
    assert all("cpu" not in storage.__dict__ for storage in storages_in(state))


@gpu
def test_snapshot_of_a_gpu_is_of_its_time():
    tensor = torch.zeros(50_000_000, device="cuda")
    taken = Snapshots().take({"x": tensor, "same": tensor[:5]})
    tensor.fill_(1)
    for event in taken.copied:
        event.synchronize()

    assert taken.state["x"].is_pinned()
    assert not taken.state["x"].any()
    assert taken.state["same"].untyped_storage().data_ptr() == taken.state["x"].untyped_storage().data_ptr()
