"""Steps of a training run: saved whole, and thinned out."""

from __future__ import annotations

import logging
import os
import signal
import threading
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal, Self

import fsspec

from torch_s3 import errors
from torch_s3.checkpoint import steps as plan
from torch_s3.checkpoint.abandoned import remove_abandoned
from torch_s3.checkpoint.owner import this_process
from torch_s3.checkpoint.preemption import Preemption
from torch_s3.checkpoint.run import Run
from torch_s3.checkpoint.save import Saved, save_checkpoint
from torch_s3.checkpoint.snapshot import Snapshots
from torch_s3.filesystem import S3FileSystem
from torch_s3.publish import publishing
from torch_s3.uris import translated

log = logging.getLogger("torch_s3")


class CheckpointManager(Run):
    """The checkpoints of one training run, a folder of them::

        with CheckpointManager("s3://bucket/run-1", keep_last=3, keep_best=("loss", "min", 2)) as manager:
            start = 0
            if manager.latest() is not None:
                start, state, _, _ = manager.load(map_location="cpu")
                ...
            for step in range(start + 1, 10_001):
                ...
                if step % 500 == 0:
                    manager.save_async(step, {"model": model.state_dict(), ...}, metrics={"loss": loss})

    A step exists from when its manifest is stored, which happens last and once: it is never changed, and of two
    writers of one step one wins and one is told. Until then, and after any failure, there is nothing of it to be found.

    One manager is for one thread; any number of them, of any processes, may work in one folder. Of a process group, let
    rank 0 save: the others would write the same.

    Args:
        root: ``s3://bucket/prefix``, or a folder of any filesystem that fsspec knows.
        keep_last: Delete all but so many of the highest steps, when one was saved; ``None`` deletes nothing.
        keep_every: Keep those that are multiples of this.
        keep_best: Keep the best by a metric, see :class:`~torch_s3.KeepBest`: ``("loss", "min", 2)``.
        abandoned_after: Seconds after which an unfinished upload under ``root`` is taken for abandoned although it
            cannot be told whether its process still runs, for that is on another machine.
        storage_options: For the filesystem, see :class:`~torch_s3.S3FileSystem`.
        filesystem: Used instead of one made for ``root``.
    """

    def __init__(
        self,
        root: str,
        *,
        keep_last: int | None = 3,
        keep_every: int | None = None,
        keep_best: plan.KeepBest | tuple[Any, ...] | None = None,
        abandoned_after: float = 24 * 3600.0,
        storage_options: Mapping[str, Any] | None = None,
        filesystem: fsspec.AbstractFileSystem | None = None,
    ) -> None:
        super().__init__(root, storage_options=storage_options, filesystem=filesystem)
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last={keep_last}: at least the last one is kept; None keeps all")
        if keep_every is not None and keep_every < 1:
            raise ValueError(f"keep_every={keep_every}: give a number of steps")
        self._best = plan.checked_rule(keep_best)
        self._rules: dict[str, Any] = {"keep_last": keep_last, "keep_every": keep_every, "keep_best": self._best}
        self._abandoned_after = abandoned_after
        self._snapshots = Snapshots()
        self._thread: threading.Thread | None = None
        self._done = threading.Event()  # the thread has nothing more to do
        self._outcome: Saved | BaseException | None = None  # of the thread
        self._pid = os.getpid()
        self._closed = False

    # ------------------------------------------------------------------ saving

    def save(
        self,
        step: int,
        state: Any,
        metrics: Mapping[str, Any] | None = None,
        metadata: Any = None,
        *,
        progress: bool | Callable[[int, int], object] = False,
    ) -> Saved:
        """Save a step, and delete what need not be kept. Waits first for the one that is being saved.

        Args:
            step: Its number, from 0.
            state: What :func:`~torch_s3.save_checkpoint` takes.
            metrics: Numbers by name, for ``keep_best`` and :meth:`best`.
            metadata: Whatever JSON holds, kept in the manifest.
            progress: As in ``save_checkpoint``.

        Raises:
            AlreadyExists: The step has been saved already.
            S3Error: It could not be saved; or an asynchronous save before it could not, and this one was not begun.
            ValueError: The step, a metric or the metadata is none.
        """
        write = self._prepared(step, metrics, metadata)
        self.wait()
        self._check_new(step)
        return write(state, progress)

    def save_async(
        self,
        step: int,
        state: Any,
        metrics: Mapping[str, Any] | None = None,
        metadata: Any = None,
        *,
        when_busy: Literal["wait", "skip"] = "wait",
    ) -> bool:
        """As :meth:`save`, but return as soon as the state is copied: a thread saves the copy.

        The copy is in host memory that is kept for the next one: as much as the state takes. Tensors on GPUs are saved
        as CPU tensors; ``load_state_dict`` puts them where they belong.

        Args:
            step: As in :meth:`save`.
            state: As in :meth:`save`. It may be changed as soon as this returns.
            metrics: As in :meth:`save`.
            metadata: As in :meth:`save`.
            when_busy: Whether to wait while another save is under way, or to skip this one.

        Returns:
            Whether it is being saved; ``False`` if it was skipped.

        Raises:
            S3Error: The asynchronous save before could not be done, and this one was not begun. Its own errors are
                raised by the next :meth:`save`, ``save_async``, :meth:`wait` or :meth:`close`, and logged at once.
            Exception: Something in ``state`` cannot be copied.
        """
        write = self._prepared(step, metrics, metadata)
        if when_busy == "skip" and self._busy():
            return False
        self.wait()
        snapshot = self._snapshots.take(state)
        done = self._done = threading.Event()

        def run() -> None:
            try:
                for event in snapshot.copied:
                    event.synchronize()
                self._check_new(step)
                self._outcome = write(snapshot.state, False)
            except BaseException as error:
                log.exception("%s: step %d was not saved", self.root, step)
                self._outcome = error
            finally:
                done.set()

        # Not a daemon: the interpreter waits for it before it ends.
        self._thread = threading.Thread(target=run, name="torch_s3-save")
        self._thread.start()
        return True

    def wait(self) -> Saved | None:
        """Wait for the save that is under way.

        Returns:
            What it saved, ``None`` if there was none since the last call.

        Raises:
            S3Error: It could not be saved.
            Exception: What pickling raised.
        """
        if self._pid != os.getpid():  # a fork has no part in its parent's save
            self._thread, self._outcome, self._pid = None, None, os.getpid()
        if self._closed:
            raise ValueError(f"{self.root}: this manager is closed")
        if self._thread is not None:
            self._done.wait()  # join() takes a thread for ended when Ctrl-C comes (bpo-45274), and exit kills it then
            self._thread.join()
            self._thread = None
        outcome, self._outcome = self._outcome, None
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def close(self) -> None:
        """Wait for the save that is under way, and end. Does nothing the second time.

        Raises:
            S3Error: It could not be saved.
            Exception: What pickling raised.
        """
        if self._closed:
            return
        try:
            self.wait()
        finally:
            self._closed = True
            self._snapshots = Snapshots()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception:
            if error is None:  # else it is logged, and not to hide that one
                raise

    def on_preemption(
        self,
        state: Callable[[], tuple[int, Any]] | None,
        *,
        signals: Iterable[signal.Signals] = (signal.SIGTERM,),
    ) -> Preemption:
        """Within the block, have SIGTERM save once more before it ends the process::

            with manager.on_preemption(lambda: (step, {"model": model.state_dict(), ...})) as preemption:
                for step, batch in enumerate(loader, start):
                    train(batch)
                    preemption.check()

        The signal is noted when it comes; ``check()``, where the state is whole, waits for the save that is under way,
        saves, and raises the signal again, so that the process ends as it would have. What is not reached before the
        machine is taken away is not saved. For the main thread.

        Args:
            state: Called for the step and what to save; ``None`` on ranks that don't save.
            signals: Which.
        """

        def save() -> None:
            try:
                self.wait()
            except Exception:  # noqa: BLE001 - it is logged, and a newer state is at hand
                log.warning("%s: going on to save the newest state", self.root)
            if state is not None:
                with suppress(errors.AlreadyExists):  # saved a moment ago
                    self.save(*state())

        return Preemption(save, signals)

    def best(self) -> int | None:
        """The best step by ``keep_best``; of equal ones the latest, ``None`` if none has the metric."""
        if self._best is None:
            raise ValueError("best by what? Give keep_best=(metric, 'min' or 'max', how many) to the manager")
        found = plan.best(self._metrics(self.steps()), self._best)
        return found[0] if found else None

    # ------------------------------------------------------------------ how

    def _prepared(
        self, step: int, metrics: Mapping[str, Any] | None, metadata: Any
    ) -> Callable[[Any, bool | Callable[[int, int], object]], Saved]:
        """What saves a state as this step, everything else about it being checked."""
        step = plan.checked_step(step)
        if self._best is not None and metrics and self._best.metric not in metrics:
            given = ", ".join(map(repr, metrics))
            message = f"step {step} has no metric {self._best.metric!r}, which keep_best goes by, but {given}"
            warnings.warn(message, stacklevel=3)
        name = plan.data_name(this_process(), uuid.uuid4().hex[:8])
        made = plan.Manifest(step, name, 0, None, None, plan.checked_metrics(metrics), metadata, _version(), "")
        plan.write(made)  # fails now, if it does

        def write(state: Any, progress: bool | Callable[[int, int], object]) -> Saved:
            saved = save_checkpoint(state, self._uri(step, name), progress=progress, filesystem=self._fs)
            now = datetime.now(UTC).isoformat(timespec="seconds")
            self._commit(made._replace(size=saved.bytes, etag=saved.etag, checksum=saved.checksum, saved_at=now))
            self._tidy(step)
            return saved

        return write

    def _commit(self, manifest: plan.Manifest) -> None:
        """Make a step exist."""
        step, content = manifest.step, plan.write(manifest)
        uri, path = self._uri(step, plan.MANIFEST), self._in(step, plan.MANIFEST)
        try:
            with publishing(self._fs, path, uri, only_new=True) as file:
                file.write(content)
            with translated(uri):
                if bytes(self._fs.cat_file(path)) != content:  # a server that does not heed the condition
                    raise errors.AlreadyExists("somebody else has saved this step at the same time", uri=uri)
        except errors.AlreadyExists:
            self._delete(self._in(step, manifest.file))
            raise
        self._manifests[step] = manifest

    def _tidy(self, newest: int) -> None:
        """Delete what need not be kept. What fails is logged: it is no reason to end a training."""
        try:
            listed = self._list()
            there = plan.steps_in(listed)
            metrics = self._metrics(there)
            stay = plan.kept(metrics, newest=newest, **self._rules)
            for step in sorted(set(metrics) - stay):
                self._delete_step(step)
            known = {f"{plan.folder(step)}/{found.file}" for step, found in self._manifests.items()}
            unread = {plan.folder(step) for step in there if step not in metrics}
            remove_abandoned(
                self._fs,
                self._path,
                {key: info for key, info in listed.items() if key not in known and key.partition("/")[0] not in unread},
                after=self._abandoned_after,
            )
        except Exception as error:  # noqa: BLE001 - see above
            log.warning("%s: could not delete old checkpoints: %s", self.root, error)

    def _delete_step(self, step: int) -> None:
        """Take a step back: its manifest first, so that it is never seen without its checkpoint."""
        self._manifests.pop(step, None)
        try:
            file = self.manifest(step).file  # as it is now
        except errors.NotFound:  # somebody else has done it, or does it
            return
        with translated(self._uri(step, plan.MANIFEST)), suppress(FileNotFoundError):
            self._fs.rm_file(self._in(step, plan.MANIFEST))
        self._delete(self._in(step, file))
        if not isinstance(self._fs, S3FileSystem):  # folders may be more than names
            with suppress(OSError, NotImplementedError):
                self._fs.rmdir(f"{self._path}/{plan.folder(step)}")

    def _delete(self, path: str) -> None:
        try:
            self._fs.rm_file(path)
        except FileNotFoundError:
            pass
        except Exception as error:  # noqa: BLE001 - whatever a filesystem raises
            log.warning("could not delete %s, which is not used any more: %s", path, error)

    def _check_new(self, step: int) -> None:
        path, uri = self._in(step, plan.MANIFEST), self._uri(step, plan.MANIFEST)
        with translated(uri):
            self._fs.invalidate_cache(self._fs._parent(path))
            if self._fs.exists(path):
                raise errors.AlreadyExists("this step has been saved already", uri=uri)

    def _busy(self) -> bool:
        return self._pid == os.getpid() and self._thread is not None and self._thread.is_alive()


def _version() -> str:
    from torch_s3 import __version__  # which imports this

    return __version__
