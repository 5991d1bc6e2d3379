"""Datasets of images."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import fsspec
import numpy as np
import torch
import torch.distributed
import torch.utils.data

from torch_s3 import errors
from torch_s3.data import order
from torch_s3.data.decode import SUFFIXES, decode_image
from torch_s3.data.manifest import Manifest
from torch_s3.filesystem import S3FileSystem
from torch_s3.uris import read_ahead, resolve

_LOOKAHEAD = 64
_HOPELESS = 10  # images skipped in a row at the start: then none will be read
_OF_ONE_OBJECT = (errors.DecodeError, errors.IntegrityError, errors.NotFound, errors.ObjectChanged)


class S3ImageDataset(torch.utils.data.IterableDataset[Any]):
    """Images streamed from a bucket into a plain ``DataLoader``.

    Each epoch yields every image exactly once over all ranks and workers, in an order that follows from ``seed`` and
    the epoch alone. Many reads are in flight in each worker along that order, so latency is hidden. The listing is made
    once, here; workers get it packed. Works under fork, forkserver and spawn.

    Ranks come from ``torch.distributed`` once it is initialized, else from ``RANK`` and ``WORLD_SIZE`` as torchrun sets
    them. Where they don't divide the images, the last ranks have one image less, and perhaps one batch: ranks that wait
    for each other at every step, as under DistributedDataParallel, need its ``join()``, or to stop after the same step.

    Args:
        source: ``s3://bucket/prefix/`` (or any uri that fsspec lists), a list of uris, or a :class:`Manifest`.
        transform: Called with the uint8 (3, H, W) RGB tensor.
        target_transform: Called with the label.
        labels: ``"folder"``: an index into ``classes``, the sorted folder names, as torchvision's ``ImageFolder`` does;
            images outside any folder are left out. A sequence: the label of each image, in order of the source. A
            callable: the label of a uri. ``None``: images alone are yielded, not pairs.
        shuffle: A new permutation each epoch; call :meth:`set_epoch` before each.
        seed: Of the shuffling, the same on every rank.
        batch_size: The ``DataLoader``'s. With it, batches are the same for any number of workers, and ``len(loader)``
            is right; without it, samples are dealt to workers one by one, and each may end with a smaller batch.
        on_error: ``"raise"``, or ``"skip"`` an image that is missing, changed or broken, with a warning. Errors that
            aren't about one object, like refused credentials, are always raised.
        lookahead: Reads in flight per worker, 64 by default.
        storage_options: For the filesystem, see :class:`~torch_s3.S3FileSystem`.
        filesystem: Any fsspec filesystem to use instead.

    Yields:
        ``(image after transform, label after target_transform)``

    Raises:
        NotFound, EmptyDataset, AccessDenied, …: The source can't be listed; here, before training starts. While
            iterating, in any worker: what went wrong with an object, naming its uri.

    Attributes:
        classes: Sorted class names, with ``labels="folder"``.
        class_to_idx: Their indices.
        manifest: What is read.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Sequence[str] | Manifest,
        *,
        transform: Callable[[torch.Tensor], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        labels: str | Sequence[Any] | Callable[[str], Any] | None = "folder",
        shuffle: bool = False,
        seed: int = 0,
        batch_size: int | None = None,
        on_error: str = "raise",
        lookahead: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
        filesystem: fsspec.AbstractFileSystem | None = None,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={on_error!r}: use 'raise' or 'skip'")
        for name, value in (("batch_size", batch_size), ("lookahead", lookahead)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if isinstance(labels, str) and labels != "folder":
            raise ValueError(f"labels={labels!r}: use 'folder', a sequence, a callable or None")
        if isinstance(source, Manifest):
            self.manifest = source
        elif isinstance(source, (str, os.PathLike)):
            options = {"storage_options": storage_options, "filesystem": filesystem}
            self.manifest = Manifest.from_prefix(os.fspath(source), suffixes=SUFFIXES, **options)
        else:
            whole = filesystem.unstrip_protocol if filesystem is not None else os.fspath
            self.manifest = Manifest.from_uris([whole(uri) for uri in source])
        self._fs, _ = resolve(self.manifest.root, storage_options=storage_options, filesystem=filesystem)
        self._pid = os.getpid()
        self.transform, self.target_transform = transform, target_transform
        self._shuffle, self._seed = shuffle, seed
        self._batch_size, self._on_error, self._lookahead = batch_size, on_error, lookahead or _LOOKAHEAD
        # Shared memory, so that set_epoch reaches workers that persist from epoch to epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._ranks: tuple[int, int] | None = None
        self._samples = np.arange(len(self.manifest))
        self._labels: Any = labels
        self.classes: list[str] = []
        self.class_to_idx: dict[str, int] = {}
        if isinstance(labels, str):
            self._label_by_folder()
        elif labels is not None and not callable(labels) and len(labels) != len(self.manifest):
            raise ValueError(f"{len(labels)} labels for {len(self.manifest)} images: give one each")

    def _label_by_folder(self) -> None:
        seen: dict[str, int] = {}  # folder → its number, in order of appearance
        numbers = np.fromiter((seen.setdefault(name, len(seen)) for name in self.manifest.folders()), dtype=np.int64)
        self.classes = sorted(name for name in seen if name)
        if not self.classes:
            message = "no class folders here: images must lie in one, or pass labels="
            raise errors.EmptyDataset(message, uri=self.manifest.root)
        self.class_to_idx = {name: index for index, name in enumerate(self.classes)}
        self._labels = np.array([self.class_to_idx.get(name, -1) for name in seen])[numbers]
        self._samples = np.flatnonzero(self._labels >= 0)  # an image outside any folder is no sample

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration has. Reaches persistent workers too."""
        if epoch < 0:
            raise ValueError(f"epoch={epoch}: count from 0")
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        """Samples of this rank."""
        rank, world_size = self._rank_and_world_size()
        return len(range(rank, len(self._samples), world_size))

    def __iter__(self) -> Iterator[Any]:
        fs = self._own_filesystem()
        indices, ahead = itertools.tee(self._order())
        bodies = read_ahead(fs, (self.manifest.read(index, fs) for index in ahead), window=self._lookahead)
        yielded, skipped = 0, 0
        try:
            for index, body in zip(indices, bodies, strict=True):
                uri = self.manifest.uri(index)
                try:
                    if isinstance(body, errors.S3Error):
                        raise body
                    image: Any = decode_image(body, uri)
                except _OF_ONE_OBJECT as error:
                    skipped += 1
                    # Where nothing at all can be read, that is no matter of single objects.
                    if self._on_error == "raise" or (skipped >= _HOPELESS and not yielded):
                        raise
                    warnings.warn(f"skipped {error}", stacklevel=2)
                    continue
                yield self._sample(index, uri, image)
                yielded += 1
        finally:
            bodies.close()  # type: ignore[attr-defined]  # a generator: cancels what is in flight

    def _sample(self, index: int, uri: str, image: Any) -> Any:
        try:
            if self.transform is not None:
                image = self.transform(image)
            if self._labels is None:
                return image
            label = self._labels(uri) if callable(self._labels) else self._labels[index]
            if isinstance(label, np.integer):
                label = int(label)
            return image, label if self.target_transform is None else self.target_transform(label)
        except Exception as error:
            error.add_note(f"while transforming {uri}")
            raise

    def _order(self) -> Iterator[int]:
        """The manifest's indices that this worker of this rank yields, in order."""
        rank, world_size = self._rank_and_world_size()
        worker = torch.utils.data.get_worker_info()
        count, epoch = len(self._samples), int(self._epoch)
        for positions in order.positions(
            count,
            rank=rank,
            world_size=world_size,
            worker=worker.id if worker else 0,
            workers=worker.num_workers if worker else 1,
            batch_size=self._batch_size or 1,
        ):
            chosen = order.permute(positions, count, seed=self._seed, epoch=epoch) if self._shuffle else positions
            yield from self._samples[chosen].tolist()

    def _rank_and_world_size(self) -> tuple[int, int]:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        if self._ranks is not None:
            return self._ranks
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if not 0 <= rank < world_size:
            raise ValueError(f"RANK={rank} and WORLD_SIZE={world_size} in the environment: ranks count from 0")
        return rank, world_size

    def _own_filesystem(self) -> fsspec.AbstractFileSystem:
        """The filesystem. In a forked child, other filesystems than ours are made anew: their threads don't fork."""
        if self._pid != os.getpid() and not isinstance(self._fs, S3FileSystem):
            remake, *arguments = self._fs.__reduce__()
            self._fs, self._pid = remake(*arguments[0]), os.getpid()
        return self._fs

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker has no group to ask, and a forkserver's has the environment of when that was started.
        known = "RANK" in os.environ or (torch.distributed.is_available() and torch.distributed.is_initialized())
        ranks = self._rank_and_world_size() if known else self._ranks
        return {**self.__dict__, "_ranks": ranks, "_pid": os.getpid()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        if not self._epoch.is_shared():  # a copy, not a worker's
            self._epoch.share_memory_()
