"""Memory that a dataset shares with its workers."""

from __future__ import annotations

import math

import torch


def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros in shared memory, which workers of every start method see.

    Made there, as DataLoader's batches are: ``share_memory_`` copies 32 KiB and more with OpenMP's threads, and so
    hangs in a fork of a process that has used them.
    """
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)  # type: ignore[no-untyped-call] # noqa: SLF001
    made: torch.Tensor = torch.empty(0, dtype=dtype).set_(storage).reshape(shape)
    made.numpy().fill(0)
    return made
