"""Images in class folders, map-style."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any, overload

import fsspec
import numpy as np
import torch.utils.data
from numpy.typing import NDArray

from torch_s3 import errors, given
from torch_s3.data import order, policy
from torch_s3.data.cache import open_cache
from torch_s3.data.decode import MAX_PIXELS, MODES, SUFFIXES, decode_image
from torch_s3.data.manifest import Manifest
from torch_s3.data.objects import OwnFilesystem, S3Object, checked, read_batch, transformed
from torch_s3.uris import resolve

_MOST_THREADS = 4
_ATTEMPTS = 10  # at replacing a sample: then none will be read


class S3ImageFolder(torch.utils.data.Dataset[Any]):
    """Images in class folders, with the interface of torchvision's ``ImageFolder``: for samplers that choose what comes
    next, such as ``WeightedRandomSampler``, ``SubsetRandomSampler`` or ``DistributedSampler``, for ``Subset`` and
    ``random_split``.

    A ``DataLoader`` asks for a batch at a time, whose images are then read concurrently, and decoded while others are
    still on their way. Where the order needn't be a sampler's, :class:`~torch_s3.S3ImageDataset` is faster: it reads
    ahead from batch to batch. Works under fork, forkserver and spawn.

    Args:
        root: ``s3://bucket/prefix/`` (or any uri that fsspec lists), or a :class:`~torch_s3.Manifest`. The first
            folders under it are the classes; images outside any are left out.
        transform: Called with the uint8 (3, H, W) tensor, or with what ``loader`` returned.
        target_transform: Called with the index of the class.
        loader: Called with an :class:`~torch_s3.S3Object` whose bytes are there, instead of decoding them; for a PIL
            image: ``lambda object: Image.open(object.open()).convert("RGB")``.
        is_valid_file: Says of a uri whether it is one of the images. ``None``: its suffix does.
        mode: ``"RGB"``, or ``"GRAY"`` for uint8 (1, H, W) tensors.
        max_pixels: Images that say that they have more are not decoded.
        on_error: What becomes of an image that is missing, changed or broken: ``"raise"``; or ``"replace"`` by another
            one of its batch, or by any other where the batch has none, so that batches stay whole; :attr:`errors` and
            warnings tell which. Errors that aren't about one object, like refused credentials, are always raised.
        max_errors: How many different samples may fail, or which share of them (a float below 1), before
            :class:`~torch_s3.TooManyErrors` is raised. ``None``: any number.
        decode_threads: Images decoded at once. ``None``: as many as cores are left for each worker, 4 at most. The
            transform is always called by the worker's own thread, in order.
        cache_dir: A local folder to keep the objects in, see :class:`~torch_s3.data.cache.Cache`.
        cache_size: The most bytes to keep there, ``None`` for as much as there is room for.
        storage_options: For the filesystem, see :class:`~torch_s3.S3FileSystem`.
        filesystem: Any fsspec filesystem to use instead.

    Raises:
        NotFound, EmptyDataset, AccessDenied, CacheError, …: The images can't be listed; here, before training starts.
            From reading samples, in any worker: what went wrong with an object, naming its uri.

    Attributes:
        classes: Sorted names of the folders.
        class_to_idx: Their indices.
        samples: ``(uri, class index)`` of each sample, a sequence that makes them when they are asked for; also
            ``imgs``.
        targets: int64 (n,), the class index of each sample.
        manifest: What is read.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | Manifest,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        loader: Callable[[S3Object], Any] | None = None,
        is_valid_file: Callable[[str], bool] | None = None,
        *,
        mode: str = "RGB",
        max_pixels: int = MAX_PIXELS,
        on_error: str = "raise",
        max_errors: float | None = None,
        decode_threads: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_size: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
        filesystem: fsspec.AbstractFileSystem | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: use 'RGB' or 'GRAY'")
        if on_error == "skip":
            raise ValueError("on_error='skip': who asks for a batch must get one; use 'raise' or 'replace'")
        policy.check(on_error, max_errors)
        if decode_threads is not None:
            given.whole("decode_threads", decode_threads, least=1)
        if isinstance(root, Manifest):
            self.manifest = root
        else:
            chosen: dict[str, Any] = {"suffixes": SUFFIXES}
            if is_valid_file is not None:
                chosen = {"keep": lambda uri, _: is_valid_file(uri)}
            self.manifest = Manifest.from_prefix(
                os.fspath(root), **chosen, storage_options=storage_options, filesystem=filesystem
            )
        self.root = self.manifest.root
        self.transform, self.target_transform, self.loader = transform, target_transform, loader
        self.classes, labels = folder_labels(self.manifest)
        self.class_to_idx = {name: index for index, name in enumerate(self.classes)}
        self._places = np.flatnonzero(labels >= 0)  # of the samples in the manifest
        self.targets = labels[self._places]
        self.samples = self.imgs = Samples(self.manifest, self._places, self.targets)
        self._mode, self._max_pixels, self._threads = mode, max_pixels, decode_threads
        self._max_errors = max_errors
        self._record = policy.Record() if on_error == "replace" else None
        self._cache = open_cache(cache_dir, cache_size)
        fs, _ = resolve(self.root, storage_options=storage_options, filesystem=filesystem)
        self._filesystem = OwnFilesystem(fs)

    def __len__(self) -> int:
        return len(self.targets)

    def __repr__(self) -> str:
        return f"S3ImageFolder({len(self):,} images in {len(self.classes):,} classes under {self.root})"

    def __getitem__(self, index: int) -> Any:
        """The sample: ``(image after transform, class index after target_transform)``."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The samples at these indices, in this order, read concurrently.

        Raises:
            IndexError: There is no such sample.
            S3Error: One could not be used.
        """
        numbers = [checked(index, len(self)) for index in indices]
        todo = dict(enumerate(numbers))  # place in the batch → sample to put there
        used: dict[int, int] = {}
        samples: dict[int, Any] = {}
        error: errors.S3Error | None = None
        for attempt in range(_ATTEMPTS):
            failed = []
            with closing(self._images(list(todo.values()))) as images:
                for (place, number), image in zip(todo.items(), images, strict=True):
                    if isinstance(image, errors.S3Error):
                        self._failed(number, error := image)
                        failed.append(place)
                    else:
                        samples[place], used[place] = self._sample(number, image), number
            if not failed:
                return [samples[place] for place in range(len(numbers))]
            good = [used[place] for place in sorted(used)]
            todo = {
                place: good[place % len(good)] if good else self._other(numbers[place], attempt) for place in failed
            }
        assert error is not None
        raise error

    def _failed(self, number: int, error: errors.S3Error) -> None:
        """Note it, or raise it where it can't be passed over."""
        if self._record is None or not isinstance(error, policy.OF_ONE_OBJECT):
            raise error
        worker = torch.utils.data.get_worker_info()
        failure = policy.Failure(
            error.uri or "", type(error).__name__, str(error), worker.id if worker else None, 0, number
        )
        self._record.append(policy.Entry(0, worker.id + 1 if worker else 0, number, failure))
        failed = len({entry.place for entry in self._record.entries()})
        if failed > policy.limit(self._max_errors, len(self)):
            message = f"{failed} samples failed, max_errors={self._max_errors}; the last: {error}"
            raise errors.TooManyErrors(message, uri=error.uri) from error
        warnings.warn(f"replaced {error}", stacklevel=3)

    def _other(self, number: int, attempt: int) -> int:
        """Another sample than this one, the same whenever it is asked for."""
        other = int(order.permute(np.array([number]), len(self), seed=0, epoch=attempt)[0])
        return other if other != number else (number + 1) % len(self)

    @property
    def errors(self) -> list[policy.Failure]:
        """Each sample that could not be used, by any worker, with ``on_error="replace"``; its index is ``position``."""
        return [] if self._record is None else [entry.failure for entry in self._record.entries()]

    def _sample(self, number: int, image: Any) -> tuple[Any, Any]:
        target: Any = int(self.targets[number])
        uri = self.samples[number][0]
        if self.transform is not None:
            image = transformed(self.transform, image, uri)
        if self.target_transform is not None:
            target = transformed(self.target_transform, target, uri)
        return image, target

    def _images(self, numbers: Sequence[int]) -> Generator[Any]:
        """The images of these samples in order, or the error in its place."""
        fs, threads = self._filesystem(), min(len(numbers), self._threads or threads_to_spare())
        places = self._places[list(numbers)].tolist()
        with ExitStack() as stack:
            bodies = stack.enter_context(closing(read_batch(self.manifest, places, fs, self._cache)))
            if threads <= 1:
                for place, body in zip(places, bodies, strict=True):
                    yield self._image(place, body, fs)
                return
            pool = stack.enter_context(ThreadPoolExecutor(threads, thread_name_prefix="torch_s3-decode"))
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            flying: deque[Future[Any]] = deque()
            for place, body in zip(places, bodies, strict=True):
                flying.append(pool.submit(self._image, place, body, fs))
                if len(flying) > 2 * threads:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()

    def _image(self, place: int, body: Any, fs: fsspec.AbstractFileSystem) -> Any:
        if isinstance(body, errors.S3Error):
            return body
        uri = self.manifest.uri(place)
        if self.loader is not None:
            read = self.manifest.read(place, fs)
            return transformed(self.loader, S3Object(uri, fs, size=read.size, etag=read.etag, data=body), uri)
        try:
            return decode_image(body, uri, mode=self._mode, max_pixels=self._max_pixels)
        except errors.DecodeError as error:
            return error


class Samples(Sequence[tuple[str, int]]):
    """``(uri, class index)`` of each sample, made when it is asked for."""

    def __init__(self, manifest: Manifest, places: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        self._manifest, self._places, self._targets = manifest, places, targets

    def __len__(self) -> int:
        return len(self._targets)

    @overload
    def __getitem__(self, index: int) -> tuple[str, int]: ...

    @overload
    def __getitem__(self, index: slice) -> list[tuple[str, int]]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return self._manifest.uri(int(self._places[index])), int(self._targets[index])

    def __repr__(self) -> str:
        return f"<{len(self):,} samples, from {self[0]} to {self[-1]}>"


def folder_labels(manifest: Manifest) -> tuple[list[str], NDArray[np.int64]]:
    """The sorted names of the class folders, and of each object the index of its own, -1 outside any.

    Raises:
        EmptyDataset: There are no folders.
    """
    seen: dict[str, int] = {}  # folder → its number, in order of appearance
    numbers = np.fromiter((seen.setdefault(name, len(seen)) for name in manifest.folders()), dtype=np.int64)
    classes = sorted(name for name in seen if name)
    if not classes:
        message = "no class folders here: images must lie in one; S3ImageDataset takes labels="
        raise errors.EmptyDataset(message, uri=manifest.root)
    indices = {name: index for index, name in enumerate(classes)}
    return classes, np.array([indices.get(name, -1) for name in seen], dtype=np.int64)[numbers]


def threads_to_spare() -> int:
    """How many threads a worker, or a process without any, has cores for; 4 at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    worker = torch.utils.data.get_worker_info()
    return max(1, min(_MOST_THREADS, cores // (worker.num_workers if worker else 1)))
