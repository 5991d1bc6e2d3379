"""What a folder of checkpoints holds: names, manifests, and which steps to keep. Pure, no I/O.

::

    ROOT/step-00000100/state-1f0c9a2b-4711-88123-5c0d….pt     the checkpoint, written first, under a name of its own
    ROOT/step-00000100/manifest.json                          written last, where there is none: now the step exists
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, Literal, NamedTuple

from torch_s3 import errors

MANIFEST = "manifest.json"
FORMAT = 1
"""Of the manifests that are written here. Readers refuse those of a later one."""
_MANIFEST_KEY = re.compile(r"step-(\d{8,})/manifest\.json")
_DATA_KEY = re.compile(
    r"step-\d{8,}/state-(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<start>\d+)-[0-9a-f]{8}\.pt(?:\.[0-9a-f]{32}\.partial)?"
)


class Owner(NamedTuple):
    """A process, as it stands in the names of what it writes.

    Attributes:
        machine: 8 hexadecimal digits: of its boot, and of the namespace of its process ids.
        pid: Its process id there.
        start: When it started, by the machine's clock; 0 where that is not known. Ids come again.
    """

    machine: str
    pid: int
    start: int


class KeepBest(NamedTuple):
    """Which steps to keep for their metrics: ``("loss", "min", 2)``.

    Attributes:
        metric: The name that ``save`` gave it. Steps without it, or with NaN, are not among the best.
        mode: Whether ``"min"`` or ``"max"`` is best.
        steps: How many to keep.
    """

    metric: str
    mode: Literal["min", "max"] = "min"
    steps: int = 1


def checked_rule(rule: Any) -> KeepBest | None:
    """What ``keep_best`` says.

    Raises:
        ValueError: It says no rule.
    """
    if rule is None:
        return None
    if isinstance(rule, tuple | list) and 1 <= len(rule) <= len(KeepBest._fields):
        found: Any = KeepBest(*rule)
        if found.mode in ("min", "max") and isinstance(found.steps, int) and found.steps >= 1:
            return KeepBest(*found)
    raise ValueError(f"keep_best={rule!r}: give a metric, 'min' or 'max', and how many: ('loss', 'min', 2)")


def checked_step(step: Any) -> int:
    """The number of a step.

    Raises:
        ValueError: It is none.
    """
    with suppress(TypeError):
        if not isinstance(step, bool) and (number := operator.index(step)) >= 0:
            return number
    raise ValueError(f"step {step!r}: give a whole number from 0")


class Manifest(NamedTuple):
    """What is known of a step. It exists as soon as this is stored, and is never changed.

    Attributes:
        step: Its number.
        file: Name of the checkpoint beside the manifest.
        size: Bytes of it.
        etag: Its version, ``None`` where the filesystem has none.
        checksum: ``(algorithm, value in base64)`` of all of it, ``None`` where none was computed.
        metrics: Numbers by name; of one that was not finite, NaN.
        metadata: The user's own: whatever JSON holds.
        version: Of torch_s3 that wrote it.
        saved_at: When, as ISO 8601 in UTC.
    """

    step: int
    file: str
    size: int
    etag: str | None
    checksum: tuple[str, str] | None
    metrics: dict[str, float]
    metadata: Any
    version: str
    saved_at: str


def folder(step: int) -> str:
    """The name of a step's folder: in order of their numbers, up to 99,999,999."""
    return f"step-{step:08d}"


def data_name(owner: Owner, token: str) -> str:
    """The name of a checkpoint in its folder: of its writer, and no other's.

    Args:
        owner: Who writes it.
        token: 8 hexadecimal digits that this process uses once.
    """
    return f"state-{owner.machine}-{owner.pid}-{owner.start}-{token}.pt"


def step_of_manifest(key: str) -> int | None:
    """The step that a name under the root commits, ``None`` if it is no manifest's."""
    found = _MANIFEST_KEY.fullmatch(key)
    return int(found[1]) if found and key.startswith(folder(int(found[1]))) else None


def steps_in(keys: Iterable[str]) -> list[int]:
    """The steps that exist where there are such names under the root, in order."""
    return sorted(step for key in keys if (step := step_of_manifest(key)) is not None)


def owner_of_data(key: str) -> Owner | None:
    """Who wrote, or began, what has this name under the root; ``None`` if it is no checkpoint of ours."""
    found = _DATA_KEY.fullmatch(key)
    return Owner(found["machine"], int(found["pid"]), int(found["start"])) if found else None


def write(manifest: Manifest) -> bytes:
    """A manifest as JSON.

    Raises:
        ValueError: Metrics or metadata are nothing that JSON can hold.
    """
    metrics = {name: value if math.isfinite(value) else None for name, value in manifest.metrics.items()}
    said = {"format": FORMAT} | manifest._asdict() | {"metrics": metrics}
    try:
        return json.dumps(said, indent=1, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"metadata must be what JSON holds: dicts, lists, strings, finite numbers ({error})") from None


def read(content: bytes, uri: str) -> Manifest:
    """A manifest from JSON.

    Raises:
        CheckpointError: It is not one, or was written by a later version of this package.
    """
    try:
        said = json.loads(content)
        if later := said["format"] > FORMAT:
            said = dict.fromkeys(Manifest._fields) | {"version": said["version"], "metrics": {}}
        manifest = Manifest(**{name: said[name] for name in Manifest._fields})
        checksum = manifest.checksum and (str(manifest.checksum[0]), str(manifest.checksum[1]))
        metrics = {name: math.nan if value is None else float(value) for name, value in said["metrics"].items()}
        sound = type(manifest.step) is type(manifest.size) is int and _is_name(manifest.file)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise errors.CheckpointError(f"not the manifest of a checkpoint ({type(error).__name__})", uri=uri) from None
    if later:
        message = f"written by torch_s3 {manifest.version}, whose manifests are newer: update torch_s3"
        raise errors.CheckpointError(message, uri=uri)
    if not sound:
        raise errors.CheckpointError("not the manifest of a checkpoint", uri=uri)
    return manifest._replace(checksum=checksum, metrics=metrics)


def _is_name(file: object) -> bool:
    """Whether it names a checkpoint in the manifest's own folder, and nothing elsewhere."""
    return isinstance(file, str) and _DATA_KEY.fullmatch(f"{folder(0)}/{file}") is not None


def checked_metrics(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """Metrics as plain numbers; tensors of one element are welcome.

    Raises:
        ValueError: One is no number.
    """
    checked = {}
    for name, value in (metrics or {}).items():
        try:
            checked[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise ValueError(f"metric {name!r} is a {type(value).__name__}: give numbers") from None
    return checked


def kept(
    metrics: Mapping[int, Mapping[str, float]],
    *,
    newest: int,
    keep_last: int | None,
    keep_every: int | None,
    keep_best: KeepBest | None,
) -> set[int]:
    """Which steps stay.

    Args:
        metrics: Of each step that exists and can be read.
        newest: The step that was just saved, and so is known to be good. It stays.
        keep_last: How many of the highest stay, ``None`` for all.
        keep_every: Multiples of this stay.
        keep_best: These stay.
    """
    if keep_last is None:
        return set(metrics) | {newest}
    stay = {newest, *sorted(metrics)[-keep_last:]}
    if keep_every is not None:
        stay |= {step for step in metrics if step % keep_every == 0}
    if keep_best is not None:
        stay |= set(best(metrics, keep_best)[: keep_best.steps])
    return stay


def best(metrics: Mapping[int, Mapping[str, float]], rule: KeepBest) -> list[int]:
    """The steps that have the metric, the best first; of equal ones, the latest."""
    sign = 1 if rule.mode == "min" else -1
    values = {step: sign * found.get(rule.metric, math.nan) for step, found in metrics.items()}
    return sorted((step for step in values if not math.isnan(values[step])), key=lambda step: (values[step], -step))
