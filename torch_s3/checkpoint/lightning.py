"""Lightning's checkpoints, saved and loaded as ours are. Needs ``lightning``: ``pip install 'torch-s3[lightning]'``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
from lightning.fabric.plugins import CheckpointIO

from torch_s3.checkpoint.load import load_checkpoint
from torch_s3.checkpoint.save import save_checkpoint
from torch_s3.uris import resolve, translated


class S3CheckpointIO(CheckpointIO):
    """What a Trainer saves and loads checkpoints by::

        torch_s3.register()  # Lightning asks fsspec for what is there
        keep = ModelCheckpoint("s3://bucket/run-1", every_n_train_steps=500, save_last=True)
        trainer = Trainer(plugins=[S3CheckpointIO()], callbacks=[keep])
        last = "s3://bucket/run-1/last.ckpt"
        trainer.fit(model, ckpt_path=last if fsspec.filesystem("s3").exists(last) else None)

    Checkpoints appear whole or not at all, uploads take the place of temporary files, and loading is
    ``weights_only=True`` unless the Trainer is told otherwise. Local paths stay local.

    Args:
        storage_options: For the filesystem, see :class:`~torch_s3.S3FileSystem`. Lightning lists and deletes by
            fsspec's own, whose credentials come from the environment.
        filesystem: Used instead of one made for each path.
    """

    def __init__(
        self,
        *,
        storage_options: Mapping[str, Any] | None = None,
        filesystem: fsspec.AbstractFileSystem | None = None,
    ) -> None:
        self._place: dict[str, Any] = {"storage_options": storage_options, "filesystem": filesystem}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Save, replacing what is there. ``storage_options``, where given, is used instead of this object's."""
        place = self._place if storage_options is None else self._place | {"storage_options": storage_options}
        save_checkpoint(checkpoint, self._uri(path), **place)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load, to the CPU unless told otherwise."""
        location = "cpu" if map_location is None else map_location
        loaded: dict[str, Any] = load_checkpoint(
            self._uri(path), map_location=location, weights_only=weights_only is not False, **self._place
        )
        return loaded

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete, if it is there."""
        uri = self._uri(path)
        fs, where = resolve(uri, **self._place)
        with translated(uri), suppress(FileNotFoundError):
            fs.rm_file(where)

    def _uri(self, path: str | os.PathLike[str]) -> str:
        name = os.fspath(path)
        return name if "://" in name or self._place["filesystem"] is not None else f"file://{Path(name).absolute()}"
