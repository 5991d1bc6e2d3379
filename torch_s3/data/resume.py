"""Where an epoch begins: whole, or with what a state says is left of it."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from torch_s3 import errors
from torch_s3.data import shared
from torch_s3.data.dealing import Dealing
from torch_s3.data.progress import Rest
from torch_s3.wording import listed

VERSION = 1
_RUNS = 256  # kept in shared memory from the start; a state with more gets memory of its own
_HEAD = 4


class Start(NamedTuple):
    """What an iteration is to yield.

    Attributes:
        epoch: Whose order it has.
        rest: The positions, over all ranks.
        load: Number of the load_state_dict that it is from, from 1; 0 for a whole epoch, -1 for a worker's own.
        taken: How many of this worker's places are done already.
    """

    epoch: int
    rest: Rest
    load: int = 0
    taken: int = 0


class Course:
    """Epoch and start, in shared memory, so that workers that persist from epoch to epoch see what is set."""

    def __init__(self, samples: int) -> None:
        self._samples = samples
        # Epoch, number of loads, epoch of the start, how many runs it has, and those.
        self._shared = shared.zeros(_HEAD + 3 * _RUNS, dtype=torch.int64)
        self._shared[2] = -1
        self.copied = False

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration has."""
        return int(self._shared[0])

    @property
    def loads(self) -> int:
        """The number of the start that was loaded for this epoch, 0 if there is none."""
        return int(self._shared[1]) if self._shared[2] == self._shared[0] else 0

    @property
    def waiting(self) -> tuple[int, int] | None:
        """Epoch and number of the start that was loaded last, unless it is forgotten."""
        return (int(self._shared[2]), int(self._shared[1])) if self._shared[2] >= 0 else None

    def set_epoch(self, epoch: int, *, keep: bool = False) -> None:
        """Choose the epoch. What was loaded for another one is forgotten, unless it is to be kept for that."""
        if epoch != self.epoch and not keep:
            self._shared[2] = -1
        self._shared[0] = epoch

    def load(self, epoch: int, rest: Rest) -> None:
        """Let the epoch begin with ``rest``."""
        loads = int(self._shared[1]) + 1
        if 3 * len(rest.runs) > len(self._shared) - _HEAD:
            self._shared[3] = -1  # tells workers that have this memory
            self._shared = shared.zeros(_HEAD + 3 * len(rest.runs), dtype=torch.int64)
        flat = torch.tensor(rest.runs, dtype=torch.int64).flatten()
        self._shared[:_HEAD] = torch.tensor([epoch, loads, epoch, len(rest.runs)])
        self._shared[_HEAD : _HEAD + len(flat)] = flat

    def start(self, *, used: bool) -> Start:
        """How the next iteration begins.

        Args:
            used: What was loaded last has been yielded to the end: from then on epochs are whole.

        Raises:
            RuntimeError: It was loaded after the process had started, and doesn't fit into what it sees.
        """
        if self._shared[3] == -1:
            raise RuntimeError("a state was loaded that workers which persist cannot see: make the DataLoader anew")
        if used or not self.loads:
            return Start(self.epoch, self.whole())
        return Start(self.epoch, self.loaded(), self.loads)

    def whole(self) -> Rest:
        """All of an epoch."""
        return Rest([(0, self._samples, 1)])

    def loaded(self) -> Rest:
        """What was loaded."""
        return Rest(self._shared[_HEAD : _HEAD + 3 * int(self._shared[3])].reshape(-1, 3).tolist())

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        self.copied = not self._shared.is_shared()  # type: ignore[no-untyped-call] # else it is a worker's
        if self.copied:
            values = self._shared.numpy()
            self._shared = shared.zeros(len(values), dtype=torch.int64)
            self._shared.numpy()[:] = values


class Identity(NamedTuple):
    """What a state and a dataset must agree in, so that positions mean the same samples.

    ``shuffle`` is the number of records of a shuffle buffer where there is one.
    """

    data: str
    samples: int
    shuffle: bool | int
    seed: int


_SAID = {
    "data": "it is of another data set, or one that has changed (fingerprint {0}, here {1})",
    "samples": "it is of {0} samples, here are {1}",
    "shuffle": "it was taken with shuffle={0}, here is {1}",
    "seed": "it was taken with seed={0}, here is {1}",
}


def opened(states: Mapping[str, Any] | Sequence[Mapping[str, Any]], own: Identity, dealing: Dealing) -> dict[str, Any]:
    """One state that says what all ranks have left.

    Args:
        states: A state, or those of all ranks.
        own: The dataset's.
        dealing: The dataset's.

    Raises:
        StateMismatch: It can't be gone on from.
    """
    several: list[Any] = list(states) if isinstance(states, (list, tuple)) else [states]
    for state in several:
        if not isinstance(state, Mapping) or not {"version", "epoch", "rest", *Identity._fields} <= state.keys():
            keys = f" with {listed(list(map(repr, state)), 10)}" if isinstance(state, Mapping) else ""
            words = f"this is no state of a dataset of torch_s3, but a {type(state).__name__}{keys}"
            raise errors.StateMismatch(words)
        if state["version"] != VERSION:
            raise errors.StateMismatch(f"the state is of version {state['version']}, this torch_s3 has {VERSION}")
        for name, mine in own._asdict().items():
            if state[name] != mine:
                raise errors.StateMismatch(f"the state does not fit: {_SAID[name].format(state[name], mine)}")
        if not _is_sound(state["epoch"], state["rest"], own.samples):
            raise errors.StateMismatch("the state is damaged: its epoch or what it says is left can't be")
    if not several:
        raise errors.StateMismatch("an empty list of states")
    first = dict(several[0])
    if isinstance(states, Mapping):
        return first
    if any(_begun(state) != _begun(first) for state in several):
        raise errors.StateMismatch("the ranks' states were taken after different numbers of batches")
    if "rank" not in first:
        return first
    ranks = {state["rank"]["rank"]: state["rank"] for state in several if "rank" in state}
    world_size = first["rank"]["world_size"]
    if len(several) != world_size or sorted(ranks) != list(range(world_size)):
        raise errors.StateMismatch(
            f"these are {len(several)} states, of ranks {sorted(ranks)}: give one of each of the {world_size} ranks"
        )
    left = [(ranks[rank]["left"], ranks[rank]["untouched"]) for rank in range(world_size)]
    rest = dealing.left_of_all(Rest(first["rank"]["from"]), left)
    return {name: value for name, value in first.items() if name != "rank"} | {"rest": rest.runs}


def _begun(state: Mapping[str, Any]) -> tuple[Any, ...]:
    """What is the same for all ranks: where they skip errors, their workers may be at other places."""
    rank = state.get("rank")
    return (state["epoch"], state["rest"]) if rank is None else (state["epoch"], rank["from"], rank.get("batches"))


def _is_sound(epoch: Any, runs: Any, samples: int) -> bool:
    try:
        return operator.index(epoch) >= 0 and all(
            0 <= start <= stop <= samples and step > 0 for start, stop, step in runs
        )
    except (TypeError, ValueError):
        return False
