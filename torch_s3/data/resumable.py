"""A dataset that can say where it is, and go on from there, whoever asks: training, or a loader's worker."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.utils.data
from numpy.typing import NDArray

from torch_s3 import given
from torch_s3.data import order, policy, resume
from torch_s3.data.dealing import Dealing, Interleaved, Split
from torch_s3.data.manifest import Manifest
from torch_s3.data.progress import Rest, batches_of_workers, taken_with
from torch_s3.data.stats import Board, Column
from torch_s3.errors import EmptyDataset, StateMismatch


class Run:
    """An iteration under way: where it began, and how far it is."""

    def __init__(
        self, start: resume.Start, taken: int, rank: int, world_size: int, slot: int, workers: int, group: int
    ) -> None:
        self.start, self.taken = start, taken
        self.rank, self.world_size = rank, world_size
        self.slot, self.workers, self.group = slot, workers, group


class Resumable(torch.utils.data.IterableDataset[Any]):
    """Epochs, ranks and states of the iterable datasets.

    Args:
        manifest: What is read.
        samples: Indices of the manifest that are samples; ``None`` for all.
        shuffle: A new permutation each epoch.
        seed: Of the shuffling.
        batch_size: The loader's.
        drop_last: Leave out what fills no batch of all ranks together.
        rank: Of this process, with ``world_size``; ``None``: as ``torch.distributed`` or the environment says.
        world_size: Number of ranks.
        on_error: One of :data:`~torch_s3.data.policy.POLICIES`.

    Attributes:
        manifest: What is read.
    """

    _dealing: Dealing = Interleaved()  # what is left; who changes it deals anew too

    def __init__(
        self,
        manifest: Manifest,
        *,
        samples: NDArray[np.int64] | None,
        shuffle: bool,
        seed: int,
        batch_size: int | None,
        drop_last: bool,
        rank: int | None,
        world_size: int | None,
        on_error: str,
    ) -> None:
        self._batch_size = None if batch_size is None else given.whole("batch_size", batch_size, least=1)
        if (rank is None) != (world_size is None):
            raise ValueError(f"rank={rank} and world_size={world_size}: give both or none")
        if rank is not None and world_size is not None and not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} and world_size={world_size}: ranks count from 0")
        self.manifest = manifest
        self._samples = samples
        self._shuffle, self._seed = given.flag("shuffle", shuffle), given.whole("seed", seed)  # plain ones, for states
        self._drop_last = given.flag("drop_last", drop_last)
        self._given_ranks = None if rank is None or world_size is None else (rank, world_size)
        self._found_ranks: tuple[int, int] | None = None
        self._on_error = on_error
        self._prepare()
        self._course, self._board = resume.Course(self._count), Board()
        self._record = policy.Record() if on_error != "raise" else None
        self._own_start: resume.Start | None = None  # what a worker was told by load_state_dict
        self._run: Run | None = None  # the iteration that this process began last
        self._rank_and_world_size()  # so that ranks without samples are known before the first batch

    def _prepare(self) -> None:
        """Find out what must be known before the first sample; the arguments have been looked at."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration has. Reaches persistent workers too.

        A state that was loaded for another epoch, of which nothing was read yet, waits for that one, with a warning.
        """
        if (number := given.whole("epoch", epoch)) < 0:
            raise ValueError(f"epoch={epoch}: count from 0")
        waiting = self._course.waiting
        begun = self._board.rows()[:, Column.START]
        unread = waiting is not None and bool(self._course.loaded().runs) and waiting[1] not in begun
        if waiting is not None and unread and number != waiting[0]:
            warnings.warn(
                f"a state of epoch {waiting[0]} was loaded, and epoch {number} comes first, whole: let the loop begin "
                "with state['epoch']",
                stacklevel=2,
            )
        self._course.set_epoch(number, keep=unread)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.manifest.root}: {self._count:,} samples>"

    def __len__(self) -> int:
        """Samples of this rank in a whole epoch, the same for every rank."""
        _, world_size = self._rank_and_world_size()
        return order.length(self._count, **self._split(world_size)._asdict())

    def __getitem__(self, index: Any) -> Any:
        name = type(self).__name__
        raise TypeError(f"{name} has an order of its own: iterate it, or use S3ImageFolder or S3MapDataset")

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """Where this epoch is, so that another process can go on from there, with other workers, ranks and batch sizes.

        The same on every rank, and small: numbers, strings and short lists, which JSON takes too. With
        ``on_error="skip"`` ranks may differ in what they have used: gather the states of all
        (``torch.distributed.all_gather_object``) and give :meth:`load_state_dict` the list.

        In a loader's worker, where torchdata's ``StatefulDataLoader`` calls it, it is the worker's own state.

        Args:
            batches: How many batches training has taken from the ``DataLoader`` since this epoch began, or was resumed.
                What workers have read beyond that is not lost. ``None``: what was iterated in this process, without
                workers, is counted to the sample.

        Raises:
            ValueError: It can't be known, or that many batches of ``batch_size`` haven't been read.
        """
        if torch.utils.data.get_worker_info() is not None:
            return self._state_of_worker()
        rows = self._board.rows()
        slot = int(rows[:, Column.BEGAN].argmax())  # of the latest iteration
        group, epoch = rows[slot, Column.GROUP], self._course.epoch
        if batches == 0 or not rows[slot, Column.BEGAN]:
            if batches:
                raise ValueError(f"batches={batches}: none has been read yet")
            # Workers may have read all of what was loaded while training has had nothing of it.
            unused = batches == 0 and 0 < self._course.loads == rows[slot, Column.START]
            return self._state(epoch, self._course.loaded() if unused else self._start().rest)
        if batches is None:
            if slot:
                raise ValueError("workers read ahead of training: say how many batches it took, state_dict(batches=…)")
            run = self._run
            if run is None or run.start.epoch != epoch:
                return self._state(epoch, self._start().rest)
            return self._state_after(epoch, run.start.rest, [run.taken], [run.taken], None)
        if batches < 0:
            raise ValueError(f"batches={batches}: count from 0")
        if self._batch_size is None:
            raise ValueError("state_dict(batches=…) needs the dataset's batch_size, the same as the DataLoader's")
        began, used, loads = int(rows[slot, Column.START]), rows[slot, Column.USED], self._course.loads
        if rows[slot, Column.EPOCH] != epoch or (began != loads and (began or used != loads)):
            raise ValueError(f"batches={batches}: of epoch {epoch}, none has been read by this loader yet")
        rest = self._course.loaded() if began else self._course.whole()
        slots = range(1, 1 + int(rows[slot, Column.WORKERS])) if slot else range(1)
        mine = [rows[s] if (rows[s, Column.GROUP], rows[s, Column.EPOCH]) == (group, epoch) else None for s in slots]
        return self._state_after(epoch, rest, *self._taken(batches, mine, group), batches)

    def _taken(
        self, batches: int, rows: Sequence[NDArray[np.float64] | None], group: float
    ) -> tuple[list[int], list[int]]:
        """How many of its places each worker has behind it in the first ``batches``; and where it skips nothing."""
        size = self._batch_size
        assert size is not None
        yielded = [0 if row is None else int(row[Column.YIELDED]) for row in rows]
        ended = [row is not None and bool(row[Column.ENDED]) for row in rows]
        totals = [-(-good // size) if end else None for good, end in zip(yielded, ended, strict=True)]
        given = batches_of_workers(batches, totals)
        enough = all(n * size <= good or end for n, good, end in zip(given, yielded, ended, strict=True))
        if sum(given) < batches or not enough:
            raise ValueError(
                f"batches={batches}, but only {sum(yielded)} samples were read, and batch_size={size}: count the "
                "batches since the epoch began or was resumed, and give the dataset the DataLoader's batch_size"
            )
        skipped: list[list[int]] = [[] for _ in rows]
        if self._on_error == "skip" and self._record is not None:
            for entry in self._record.entries():
                if entry.group == group:
                    skipped[max(0, entry.slot - 1)].append(entry.place)
        taken = []
        for n, total, good, places in zip(given, totals, yielded, skipped, strict=True):
            whole = total == n  # the worker's end, and what it skipped there
            taken.append(good + len(places) if whole else taken_with(n * size, places))
        return taken, [n * size for n in given]

    def _state_after(
        self, epoch: int, rest: Rest, taken: list[int], in_step: list[int], batches: int | None
    ) -> dict[str, Any]:
        """The state with the workers at these points of ``rest``; and those of ranks that skip nothing, at these."""
        rank, world_size = self._rank_and_world_size()
        split = self._split(world_size)
        state = self._state(epoch, self._dealing.left_in_step(rest, in_step, split))
        if self._on_error != "skip":
            return state
        left, untouched = self._dealing.left_of_rank(len(rest), taken, split, rank=rank)
        if world_size == 1:
            return self._state(epoch, self._dealing.left_of_all(rest, [(left, untouched)]))
        mine = {"rank": rank, "world_size": world_size, "left": list(map(list, left)), "untouched": untouched}
        return state | {"rank": mine | {"from": list(map(list, rest.runs)), "batches": batches}}

    def _state(self, epoch: int, rest: Rest) -> dict[str, Any]:
        runs = list(map(list, rest.runs))
        return {"version": resume.VERSION, **self._identity()._asdict(), "epoch": epoch, "rest": runs}

    def _state_of_worker(self) -> dict[str, Any]:
        worker = torch.utils.data.get_worker_info()
        assert worker is not None
        run = self._run
        start = self._start() if run is None else run.start
        taken = start.taken if run is None else run.taken
        return self._state(start.epoch, start.rest) | {"worker": self._worker_identity(worker) | {"taken": taken}}

    def _worker_identity(self, worker: Any) -> dict[str, int]:
        rank, world_size = self._rank_and_world_size()
        identity = {
            "rank": rank,
            "worker": worker.id,
            "workers": worker.num_workers,
            **self._split(world_size)._asdict(),
        }
        return {name: int(value) for name, value in identity.items()}

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Let the epoch of :meth:`state_dict` go on from there; epochs after it are whole again.

        Sets the epoch too. Call it before the loader's iteration begins.

        Args:
            state: What :meth:`state_dict` gave; with ``on_error="skip"`` on several ranks, the list of all ranks'. One
                rank's alone is taken with a warning: as many samples as were skipped may come twice.

        Raises:
            StateMismatch: It is of other data, another seed or version, or not of all ranks.
        """
        opened = resume.opened(state, self._identity(), self._dealing)
        epoch, rest = int(opened["epoch"]), Rest(opened["rest"])
        worker, said = torch.utils.data.get_worker_info(), opened.get("worker")
        if said is None:
            if "rank" in opened:
                own = opened["rank"]
                warnings.warn(
                    f"this is the state of rank {own['rank']} alone, of {own['world_size']} that skip errors: as many "
                    "samples as were skipped may come twice. Gather the states of all ranks, and load the list",
                    stacklevel=2,
                )
            self._course.load(epoch, rest)
            self._run = None
            return
        if worker is None:
            raise StateMismatch("this is the state of a loader's worker: give it to StatefulDataLoader")
        here = self._worker_identity(worker)
        differs = [f"{name} {said.get(name)}, here {value}" for name, value in here.items() if said.get(name) != value]
        if differs:
            raise StateMismatch(f"the worker's state does not fit: {'; '.join(differs)}")
        self._course.set_epoch(epoch)
        self._own_start = resume.Start(epoch, rest, -1, said["taken"])
        self._run = None

    def _identity(self) -> resume.Identity:
        return resume.Identity(self.manifest.fingerprint, self._count, self._shuffle, self._seed)

    def _start(self, group: float = -1) -> resume.Start:
        """How an iteration begins: as the first worker of its ``group`` has found, where one has begun already.

        What was loaded is used up once all workers of an iteration have yielded it to the end. Each alone must not
        judge: where one was broken off, some have ended, having read ahead, and others have not.
        """
        if self._own_start is not None and self._own_start.epoch == self._course.epoch:
            return self._own_start
        rows, loads = self._board.rows(), self._course.loads
        begun = rows[(rows[:, Column.GROUP] == group) & (rows[:, Column.BEGAN] > 0)]
        if len(begun):
            return self._course.start(used=begun[0, Column.START] != loads)
        latest = max(rows[rows[:, Column.START] == loads], key=lambda row: float(row[Column.BEGAN]), default=None)
        used = bool((rows[:, Column.USED] == loads).any())
        if latest is not None:
            # A worker that is about to begin has its start in its row, and the group of the iteration before.
            its = rows[(rows[:, Column.GROUP] == latest[Column.GROUP]) & (rows[:, Column.START] == loads)]
            used |= len(its) == latest[Column.WORKERS] and bool(its[:, Column.ENDED].all())
        return self._course.start(used=used)

    def _used_up(self, group: float) -> int:
        """The load that an iteration which begins whole finds used up: late workers, what the first one has found."""
        rows = self._board.rows()
        begun = rows[(rows[:, Column.GROUP] == group) & (rows[:, Column.BEGAN] > 0)]
        return int(begun[0, Column.USED]) if len(begun) else self._course.loads

    @property
    def _count(self) -> int:
        """Samples of an epoch."""
        return len(self.manifest) if self._samples is None else len(self._samples)

    def _split(self, world_size: int) -> Split:
        return Split(world_size, self._batch_size or 1, self._drop_last)

    def _rank_and_world_size(self) -> tuple[int, int]:
        if self._given_ranks is not None:
            rank, world_size = self._given_ranks
        elif torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        elif self._found_ranks is not None:
            rank, world_size = self._found_ranks
        else:
            rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if not 0 <= rank < world_size:
            raise ValueError(f"RANK={rank} and WORLD_SIZE={world_size} in the environment: ranks count from 0")
        if not self._count:
            raise EmptyDataset("there are no samples", uri=self.manifest.root)
        if world_size > self._count:
            raise EmptyDataset(
                f"{self._count} samples for {world_size} ranks: some would have none", uri=self.manifest.root
            )
        if not order.length(self._count, **self._split(world_size)._asdict()):
            raise EmptyDataset(
                f"{self._count} samples fill no batch of {self._batch_size} on {world_size} ranks, and drop_last=True",
                uri=self.manifest.root,
            )
        return rank, world_size

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker has no group to ask, and a forkserver's has the environment of when that was started.
        known = "RANK" in os.environ or (torch.distributed.is_available() and torch.distributed.is_initialized())
        ranks = self._rank_and_world_size() if known else self._found_ranks
        return {**self.__dict__, "_found_ranks": ranks, "_run": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        if self._record is not None and self._course.copied:
            self._record = policy.Record()
