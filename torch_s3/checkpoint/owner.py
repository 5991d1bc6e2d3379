"""Whose process wrote something, and whether it still runs."""

from __future__ import annotations

import hashlib
import os
import socket
import uuid
from pathlib import Path

from torch_s3.checkpoint.steps import Owner


def this_process() -> Owner:
    """The process that calls."""
    return Owner(_machine(), os.getpid(), _started(os.getpid()) or 0)


def is_alive(owner: Owner) -> bool | None:
    """Whether a process runs; ``None`` where that cannot be told: on another machine, in another container."""
    if owner.machine != _machine():
        return None
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's, so it is there
        pass
    started = _started(owner.pid)
    return started is None or owner.start in (0, started)


def _machine() -> str:
    """8 hexadecimal digits that two places have in common only if a process id means the same in both."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        boot, namespace = str(uuid.getnode()), ""
    return hashlib.sha256(f"{boot} {namespace} {socket.gethostname()}".encode()).hexdigest()[:8]


def _started(pid: int) -> int | None:
    """When a process started, in ticks since the machine did; -1 of one that is dead but not yet waited for.

    Source: proc_pid_stat(5), fields 3 and 22.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if fields[0] in "ZX" else int(fields[19])
