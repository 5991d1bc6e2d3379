"""A prefix of objects into shards: pack, on one machine or as Ray tasks."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from typing import Any, NamedTuple

import fsspec
import numpy as np
from tqdm import tqdm

from torch_s3 import errors, given
from torch_s3.data import index_file, pack_plan, policy, tar
from torch_s3.data.braces import expand
from torch_s3.data.manifest import Manifest
from torch_s3.data.objects import manifest_of
from torch_s3.data.pack_shard import Job, Shard, Skipped, Stop, write
from torch_s3.publish import PARTIAL, publishing
from torch_s3.transport.answer import bare_etag
from torch_s3.uris import resolve, translated

MANIFEST = "manifest.json"


class Packed(NamedTuple):
    """What :func:`pack` has made.

    Attributes:
        uris: All shards' names in one, for the datasets: ``s3://b/out/shard-{000000..000041}.tar``.
        manifest: Uri of the file that says all this.
        plan: Says which objects were to go into which shard, in 32 hex digits.
        format: ``"tar"`` or ``"tfrecord"``.
        shards: In their order.
        classes: What the labels count, ``None`` where they stand for themselves or there are none.
        records: Samples in all.
        bytes: Of all shards.
        resumed: How many shards were there already.
        skipped: What was left out of those that were not.
    """

    uris: str
    manifest: str
    plan: str
    format: str
    shards: tuple[Shard, ...]
    classes: list[str] | None
    records: int
    bytes: int
    resumed: int
    skipped: tuple[Skipped, ...]


def pack(
    source: str | os.PathLike[str] | Sequence[str] | Manifest,
    out: str,
    *,
    format: str = "tar",
    shard_size: int = 256 << 20,
    labels: str | Sequence[Any] | Callable[[str], Any] | None = "auto",
    suffixes: str | Sequence[str] | None = None,
    shuffle: bool = False,
    seed: int = 0,
    on_error: str = "raise",
    workers: int = 4,
    ray: bool = False,
    progress: bool | None = None,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: fsspec.AbstractFileSystem | None = None,
    out_storage_options: Mapping[str, Any] | None = None,
    out_filesystem: fsspec.AbstractFileSystem | None = None,
) -> Packed:
    """Turn many objects into few shards: ``shard-000000.tar …`` in ``out``, an index beside each, and a manifest.

    Objects stream through memory, 200 MB a worker or two of the largest objects; nothing touches a disk. A shard
    appears whole or not at all. Which object goes into which shard follows from the source's listing and the options:
    the same call goes on where one before was stopped, and makes only the shards that aren't there. Every object is
    read in the version listed.

    In a tar, an object keeps its name after the prefix, and those alike up to the first dot are one sample. In a
    TFRecord, each is a ``tf.train.Example`` with the features ``key`` (that name), ``data`` and, if any, ``label``.

    Args:
        source: ``s3://bucket/prefix/`` (or any uri that fsspec lists), of which empty and hidden objects are left out;
            a list of uris, or a :class:`~torch_s3.Manifest`. Of those without sizes, each is asked for.
        out: Where to, a prefix with nothing else in it.
        format: ``"tar"`` (WebDataset's conventions) or ``"tfrecord"``.
        shard_size: Most bytes of a shard, unless it is a single sample.
        labels: ``"auto"``: the manifest's, if any; ``"folder"``: an index into the sorted class folders; one for each
            object; a callable of its uri; ``None``: none. Strings are numbered in sorted order. A tar has them as
            ``.cls``, of a sample's first object.
        suffixes: Of a prefix, keep only keys that end in one of these, in upper or lower case.
        shuffle: Write samples in a random order, so that each shard holds a bit of everything.
        seed: Of that order.
        on_error: ``"raise"``, or ``"skip"`` samples of which an object is gone, has changed or is damaged.
        workers: Shards that are written at once, in threads.
        ray: Write each shard in a Ray task instead, in the cluster that this process is connected to, else in the one
            that ``RAY_ADDRESS`` names or a local one. torch_s3 has to be installed there.
        progress: Show a bar. ``None``: on a terminal.
        storage_options: For the filesystem, see :class:`~torch_s3.S3FileSystem`.
        filesystem: Used instead of one made for the source.
        out_storage_options: For that of ``out``. ``None``: it is the source's where both have the same scheme.
        out_filesystem: Used instead.

    Raises:
        AlreadyExists: Something else is in ``out``, such as shards of another plan.
        InvalidUri: An object can't be in such a shard under its name, or ``out`` lies in the source or has braces.
        EmptyDataset: There is nothing to pack, or nothing could be.
        ObjectChanged, NotFound, AccessDenied, …: An object could not be read, with ``"raise"``, or a shard not written.
    """
    if format not in pack_plan.FORMATS:
        raise ValueError(f"format={format!r}: use 'tar' or 'tfrecord'")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r}: use 'raise' or 'skip'")
    if isinstance(labels, bool):
        raise TypeError(f"labels={labels}: use 'auto', 'folder', None, one for each object, or a callable of its uri")
    shard_size, workers = given.whole("shard_size", shard_size, least=1), given.whole("workers", workers, least=1)
    seed, shuffle = given.whole("seed", seed), given.flag("shuffle", shuffle)
    if suffixes is not None and not isinstance(source, (str, os.PathLike)):
        raise ValueError("suffixes are for a prefix: take what is to be packed from the manifest or list")
    if ray:
        _ray()
    manifest = manifest_of(source, suffixes=suffixes, storage_options=storage_options, filesystem=filesystem)
    if not len(manifest):
        raise errors.EmptyDataset("the manifest has no objects", uri=manifest.root)
    fs, _ = resolve(manifest.root, storage_options=storage_options, filesystem=filesystem)
    if out_storage_options is None and out.partition("://")[0] == manifest.root.partition("://")[0]:
        out_filesystem = out_filesystem or fs
    target, path = resolve(out, storage_options=out_storage_options, filesystem=out_filesystem)
    out = str(target.unstrip_protocol(path)).rstrip("/")
    if isinstance(source, (str, os.PathLike)) and f"{out}/".startswith(manifest.root):
        raise errors.InvalidUri(
            f"the shards would lie among what is packed, {manifest.root}: choose another place", uri=out
        )
    numbered = pack_plan.labels_of(manifest, labels)
    manifest = manifest.known(fs)
    options: dict[str, Any] = {"format": format, "shard_size": shard_size, "shuffle": shuffle, "seed": seed}
    plan = pack_plan.make(manifest, numbered, **options)
    jobs = [
        Job(
            uri=f"{out}/shard-{number:06}.{format}",
            index_uri=f"{out}/shard-{number:06}.idx",
            objects=manifest[members],
            labels=None if numbered is None else numbered.numbers[members].tolist(),
            format=format,
            size=size,
            skip=on_error == "skip",
            source=fs,
            target=target,
        )
        for number, (members, size) in enumerate(
            zip(np.split(plan.order, plan.starts[1:-1]), plan.sizes.tolist(), strict=True)
        )
    ]
    uris = jobs[0].uri if len(jobs) == 1 else f"{out}/shard-{{000000..{len(jobs) - 1:06}}}.{format}"
    if expand(uris) != [job.uri for job in jobs]:
        raise errors.InvalidUri("who reads the shards would expand the braces: choose another place", uri=out)
    classes = None if numbered is None else numbered.classes
    about = {"version": 1, "plan": plan.id, "source": manifest.root, "objects": len(manifest), "classes": classes}
    there, complete = _there(target, out, plan.id)
    if there is None:
        _save(target, out, about | options | {"complete": False}, only_new=True)  # of two at once, one goes on
        there = {}
    shards = {number: shard for number, job in enumerate(jobs) if (shard := _made(job, there)) is not None}
    resumed, records = len(shards), sum(shard.records for shard in shards.values())
    lost: list[Skipped] = []
    sizes = [int(job.objects.sizes.sum()) for job in jobs]
    disable = None if progress is None else not progress
    with tqdm(desc=f"packing {out}", total=sum(sizes), unit="B", unit_scale=True, disable=disable) as bar:
        bar.update(sum(sizes[number] for number in shards))
        todo = {number: job for number, job in enumerate(jobs) if number not in shards}
        with closing(_with_ray(todo, bar) if ray else _with_threads(todo, workers, bar)) as made:
            for number, shard in made:
                shards[number] = shard
                records += shard.records
                lost += shard.skipped
                if policy.hopeless(len(lost), records):
                    break
    if not records:
        raise errors.EmptyDataset(f"nothing could be packed: {lost[0].message}", uri=manifest.root)
    ordered = tuple(shards[number] for number in range(len(jobs)))
    skipped = tuple(each for shard in ordered for each in shard.skipped)
    result = Packed(
        uris=uris,
        manifest=f"{out}/{MANIFEST}",
        plan=plan.id,
        format=format,
        shards=ordered,
        classes=classes,
        records=records,
        bytes=sum(shard.bytes for shard in ordered),
        resumed=resumed,
        skipped=skipped,
    )
    listed = [{"uri": each.uri, "records": each.records, "bytes": each.bytes, "etag": each.etag} for each in ordered]
    left_out = [each._asdict() for each in skipped]
    done = {"complete": True, "uris": result.uris, "records": result.records, "shards": listed, "skipped": left_out}
    if todo or not complete:  # else it says more: what was left out, too
        _save(target, out, about | options | done)
    return result


def _there(fs: fsspec.AbstractFileSystem, out: str, plan: str) -> tuple[dict[str, dict[str, Any]] | None, bool]:
    """What is in ``out`` already, by uri, ``None`` for nothing; and whether its manifest says that it is all.

    Raises:
        AlreadyExists: It is not of this plan.
    """
    path = fs._strip_protocol(out)
    with translated(out):
        fs.invalidate_cache(path)
        try:
            entries = fs.ls(path, detail=True)
        except FileNotFoundError:
            entries = []
    others = [each for each in entries if each["name"].rstrip("/") != path and not each["name"].endswith(PARTIAL)]
    found = {str(fs.unstrip_protocol(each["name"])): each for each in others}
    uri = f"{out}/{MANIFEST}"
    if uri not in found:
        if found:
            raise errors.AlreadyExists(f"other things are there, such as {min(found)}: choose an empty place", uri=out)
        return None, False
    with translated(uri):
        text = fs.cat_file(fs._strip_protocol(uri))
    try:
        manifest = json.loads(text)
        theirs, complete = manifest["plan"], bool(manifest["complete"])
    except (ValueError, KeyError, TypeError):
        raise errors.AlreadyExists("it was not written by pack: choose another place", uri=uri) from None
    if theirs != plan:
        message = "these shards are of other objects, versions or options: choose another place, or delete them"
        raise errors.AlreadyExists(message, uri=uri)
    return found, complete


def _made(job: Job, there: Mapping[str, Mapping[str, Any]]) -> Shard | None:
    """The shard, if it is there, whole, with its index: what was written last."""
    if job.uri not in there or job.index_uri not in there:
        return None
    try:
        with translated(job.index_uri):
            text = job.target.cat_file(job.target._strip_protocol(job.index_uri))
        bounds = index_file.parse(text, job.format, job.index_uri)
    except errors.IntegrityError:
        return None
    size, tail = int(there[job.uri]["size"]), len(tar.END) if job.format == "tar" else 0
    if size != bounds[-1] + tail or (size != job.size and not job.skip):  # what was left out is wanted now
        return None
    if len(bounds) == 1:  # nothing could be read then: perhaps now
        return None
    return Shard(job.uri, len(bounds) - 1, size, bare_etag(there[job.uri].get("ETag") or "") or None)


def _save(fs: fsspec.AbstractFileSystem, out: str, content: Mapping[str, Any], *, only_new: bool = False) -> None:
    uri = f"{out}/{MANIFEST}"
    with publishing(fs, fs._strip_protocol(uri), uri, only_new=only_new) as file:
        file.write(json.dumps(content, indent=1).encode())


def _with_threads(todo: Mapping[int, Job], workers: int, bar: tqdm[Any]) -> Generator[tuple[int, Shard]]:
    """Write shards in threads; closing it, or an error of one, drops those that aren't whole."""
    stop, lock = Stop(), threading.Lock()

    def progress(count: int) -> None:
        with lock:
            bar.update(count)

    with ThreadPoolExecutor(workers, thread_name_prefix="torch_s3-pack") as executor:
        flying: dict[Future[Shard], int] = {}
        try:
            for number, job in todo.items():
                flying[executor.submit(write, job, progress, stop)] = number
                while len(flying) >= workers:
                    yield from _finished(flying)
            while flying:
                yield from _finished(flying)
        finally:
            stop.set()
            executor.shutdown(wait=True, cancel_futures=True)


def _finished(flying: dict[Future[Shard], int]) -> Iterator[tuple[int, Shard]]:
    for future in wait(flying, return_when=FIRST_COMPLETED).done:
        yield flying.pop(future), future.result()


def _with_ray(todo: Mapping[int, Job], bar: tqdm[Any]) -> Generator[tuple[int, Shard]]:
    """Write shards in Ray tasks."""
    ray = _ray()
    if not ray.is_initialized():
        ray.init()
    task = ray.remote(num_cpus=1)(write)
    most = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    flying: dict[Any, int] = {}
    left = iter(todo.items())
    try:
        while True:
            while len(flying) < most and (following := next(left, None)) is not None:
                flying[task.remote(following[1])] = following[0]
            if not flying:
                return
            (done,), _ = ray.wait(list(flying), num_returns=1)
            number = flying.pop(done)
            try:
                shard = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None  # Ray's own has the traceback of the task as its message
            except ray.exceptions.RayError as error:
                raise errors.S3Error(f"its Ray task ended: {error}", uri=todo[number].uri) from None
            bar.update(int(todo[number].objects.sizes.sum()))
            yield number, shard
    finally:
        for reference in flying:
            ray.cancel(reference)


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ImportError("packing with Ray needs it installed: pip install 'torch-s3[ray]'") from None
    return ray
