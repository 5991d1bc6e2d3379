"""The steps of a training run: found, and loaded."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import fsspec

from torch_s3 import errors
from torch_s3.checkpoint import steps as plan
from torch_s3.checkpoint.load import load_checkpoint
from torch_s3.uris import Read, read_ahead, resolve, translated
from torch_s3.wording import listed

log = logging.getLogger("torch_s3")

_WINDOW = 16  # manifests read at once


class LoadedStep(NamedTuple):
    """A step that was loaded.

    Attributes:
        step: Its number.
        state: What was saved.
        metrics: Those given to ``save``.
        metadata: Those given to ``save``.
    """

    step: int
    state: Any
    metrics: dict[str, float]
    metadata: Any


class Run:
    """A folder of steps.

    Args:
        root: As for :class:`~torch_s3.CheckpointManager`.
        storage_options: For the filesystem, see :class:`~torch_s3.S3FileSystem`.
        filesystem: Used instead of one made for ``root``.
    """

    def __init__(
        self,
        root: str,
        *,
        storage_options: Mapping[str, Any] | None = None,
        filesystem: fsspec.AbstractFileSystem | None = None,
    ) -> None:
        self.root = os.fspath(root).rstrip("/")
        self._fs, self._path = resolve(self.root, storage_options=storage_options, filesystem=filesystem)
        self._manifests: dict[int, plan.Manifest] = {}  # as read before; they don't change

    def steps(self) -> list[int]:
        """All that exist, in order."""
        with translated(self.root):
            return plan.steps_in(self._list())

    def latest(self) -> int | None:
        """The highest step, ``None`` if there is none."""
        return max(self.steps(), default=None)

    def manifest(self, step: int) -> plan.Manifest:
        """What is known of a step.

        Raises:
            NotFound: There is no such step.
            CheckpointError: Its manifest is damaged.
        """
        uri = self._uri(step, plan.MANIFEST)
        with translated(uri):
            return plan.read(bytes(self._fs.cat_file(self._in(step, plan.MANIFEST))), uri)

    def load(self, step: int | None = None, **options: Any) -> LoadedStep:
        """Load a step; without ``step``, the highest that is whole: of each that is not, a warning tells.

        Args:
            step: Its number.
            **options: Of :func:`~torch_s3.load_checkpoint`, such as ``map_location``.

        Raises:
            NotFound: There is no such step, or none at all.
            CheckpointError: It is damaged; without ``step``, all are.
            CheckpointMismatch: It is whole, but hasn't the ``keys``, or not those of ``into``.
            UnsafeCheckpoint: It needs ``weights_only=False``.
        """
        if step is not None:
            try:
                return self._load(step, options)
            except errors.NotFound as error:
                raise self._not_found(step, error) from None
        first: errors.S3Error | None = None
        tried: set[int] = set()
        # Listed anew each time: while one was tried, another process may have saved a later step, and deleted that.
        while left := [each for each in self.steps() if each not in tried]:
            tried.add(each := left[-1])
            try:
                return self._load(each, options)
            except (errors.UnsafeCheckpoint, errors.CheckpointMismatch):  # it is whole, and no older one is meant
                raise
            except (errors.CheckpointError, errors.NotFound, errors.IntegrityError, errors.ObjectChanged) as error:
                warnings.warn(f"step {each} cannot be loaded, trying the one before: {error}", stacklevel=2)
                first = first or error
        if first is not None:
            raise first
        raise errors.NotFound("no checkpoint is there", uri=self.root)

    def _load(self, step: int, options: Mapping[str, Any]) -> LoadedStep:
        manifest = self.manifest(step)
        uri = self._uri(step, manifest.file)
        with translated(uri):
            size = self._fs.info(self._in(step, manifest.file))["size"]
        if size != manifest.size:
            raise errors.CheckpointError(f"damaged: it has {size} bytes, {manifest.size} were saved", uri=uri)
        state = load_checkpoint(uri, filesystem=self._fs, **options)
        return LoadedStep(step, state, manifest.metrics, manifest.metadata)

    def _not_found(self, step: int, error: errors.NotFound) -> errors.NotFound:
        """What to say instead where the step isn't there, and others are."""
        with suppress(errors.S3Error):
            there = [str(each) for each in reversed(self.steps())]
            if there and str(step) not in there:
                words = f"there is no step {step}; there are, latest first: {listed(there, 10)}"
                return errors.NotFound(words, uri=self.root)
        return error

    def _metrics(self, steps: Iterable[int]) -> dict[int, dict[str, float]]:
        """Of the steps whose manifests can be read."""
        steps = list(steps)
        unread = [step for step in steps if step not in self._manifests]
        reads = [Read(self._in(step, plan.MANIFEST)) for step in unread]
        for step, content in zip(unread, read_ahead(self._fs, reads, window=_WINDOW), strict=True):
            try:
                if isinstance(content, errors.S3Error):
                    raise content
                self._manifests[step] = plan.read(bytes(content), self._uri(step, plan.MANIFEST))
            except (errors.CheckpointError, errors.NotFound) as error:
                log.warning("step %d is left out: %s", step, error)
        return {step: self._manifests[step].metrics for step in steps if step in self._manifests}

    def _list(self) -> dict[str, Any]:
        """What is under the root: names from there, and what the filesystem knows of each."""
        self._fs.invalidate_cache(self._path)
        found = self._fs.find(self._path, detail=True)
        return {name[len(self._path) + 1 :]: info for name, info in found.items() if name != self._path}

    def _in(self, step: int, name: str) -> str:
        return f"{self._path}/{plan.folder(step)}/{name}"

    def _uri(self, step: int, name: str) -> str:
        return f"{self.root}/{plan.folder(step)}/{name}"
