"""SavedModels and Keras models: from S3 through a private folder, since TensorFlow reads nothing but files."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import fsspec

from torch_s3 import errors
from torch_s3.artifacts.archive import check_zip, open_artifact
from torch_s3.artifacts.extras import needed
from torch_s3.artifacts.folder import place_in, private_folder
from torch_s3.artifacts.graph import parsed
from torch_s3.artifacts.source import MAX_BYTES, MemoryFile, read_whole
from torch_s3.artifacts.tf_ops import READS_ITS_OWN, check_ops, named_ops, ops_in, without_saving
from torch_s3.uris import resolve, translated
from torch_s3.wording import brief

_ARCHIVE = re.compile(r"\.(zip|tgz|tar(\.(gz|bz2|xz|zst))?)$", re.IGNORECASE)
_MODEL = "saved_model.pb"
_OTHER_FORMS = ("saved_model.cpb", "saved_model.pbtxt")  # which TensorFlow would read, and nobody has looked at
_MOST_FILES = 10_000


def load_saved_model(
    uri: str | os.PathLike[str],
    *,
    tags: Collection[str] | None = None,
    workdir: str | os.PathLike[str] | None = None,
    trusted_ops: Collection[str] = (),
    max_bytes: int = MAX_BYTES,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: fsspec.AbstractFileSystem | None = None,
) -> Any:
    """Load a SavedModel: a prefix, or a ``.tar``, ``.tar.gz`` or ``.zip`` that holds one.

    TensorFlow needs a folder, so its files are written to a private one, which is removed before this returns, in case
    of errors and interrupts too. Variables and vocabularies are read at load; nothing is needed of the folder later.

    Args:
        uri: The prefix that ``saved_model.pb`` lies under, directly or with one folder of it between, such as a
            version's number; or the archive.
        tags: Of the graph to load, for files that have several, such as ``["serve"]``, or one of them.
        workdir: Where the folder is made: in memory (``/dev/shm``) by default, where that has room.
        trusted_ops: Operations that the model may have although they reach files, Python or the network, in addition
            to those that read its own variables and vocabularies. Those that save it (``SaveV2``,
            ``MergeV2Checkpoints``) do nothing unless they are named; ``tf.saved_model.save`` needs none of them.
        max_bytes: Most bytes of all its files.
        storage_options: For the filesystem that the uri asks for.
        filesystem: Any fsspec filesystem to read from instead.

    Returns:
        What ``tf.saved_model.load`` does; its ``signatures`` are what is mostly called.

    Raises:
        ImportError: TensorFlow isn't installed.
        InvalidUri: It is one object, and no archive.
        NotFound: Nothing is there.
        ArtifactError: It is no SavedModel, or more than one, or a damaged one.
        UnsafeArtifact: It has operations that reach out of the graph and are not trusted.
    """
    tf = needed("tensorflow", extra="tensorflow", by="load_saved_model")
    uri, trusted_ops = os.fspath(uri), named_ops(trusted_ops)
    options: dict[str, Any] = {"storage_options": storage_options, "filesystem": filesystem}
    if _ARCHIVE.search(uri):
        with open_artifact(uri, max_bytes=max_bytes, **options) as archive:
            root = _root(archive, uri=uri)
            names = [name for name in archive if _belongs(name, root)]
            with private_folder(workdir, size=sum(map(archive.size, names)), uri=uri) as folder:
                for name in names:
                    with translated(uri):
                        place_in(folder, name[len(root) :], uri=uri).write_bytes(archive.view(name))
                archive.close()  # its memory is needed no more
                return _load(tf, folder, tags, trusted_ops, uri=uri)
    fs, path = resolve(uri, **options)
    with translated(uri):
        found = fs.find(path, detail=True)
    above = f"{path.rstrip('/')}/"
    sizes = {name[len(above) :]: info["size"] or 0 for name, info in found.items() if name.startswith(above)}
    if not sizes and path in found:
        raise errors.InvalidUri(f"this is one object: {_instead(path)}", uri=uri)
    if not sizes:
        raise errors.NotFound("no SavedModel: nothing is under this prefix", uri=uri)
    root = _root(sizes, uri=uri)
    sizes = {name: size for name, size in sizes.items() if _belongs(name, root)}
    if len(sizes) > _MOST_FILES or sum(sizes.values()) > max_bytes:
        message = f"{len(sizes)} files of {sum(sizes.values())} bytes are no SavedModel, or raise max_bytes={max_bytes}"
        raise errors.ArtifactError(message, uri=uri)
    with private_folder(workdir, size=sum(sizes.values()), uri=uri) as folder:
        places = [place_in(folder, name[len(root) :], uri=uri) for name in sizes]
        with translated(uri):
            fs.get([above + name for name in sizes], list(map(str, places)))
        for place, (name, size) in zip(places, sizes.items(), strict=True):
            if place.stat().st_size != size:
                raise errors.ObjectChanged("its size is not the one that was listed", uri=f"{uri.rstrip('/')}/{name}")
        return _load(tf, folder, tags, trusted_ops, uri=uri)


def _instead(name: str) -> str:
    """What to do with an object that is no archive."""
    if name.endswith(".keras"):
        return "load_keras loads such"
    if name.endswith(".pb") and not name.endswith(f"/{_MODEL}"):
        return "load_graph loads frozen graphs; a SavedModel is a folder"
    return f"give the folder that {_MODEL} is in"


def _root(names: Iterable[str], *, uri: str) -> str:
    """The folder that has the model, with its slash; "" where it is the uppermost.

    Raises:
        ArtifactError: There is none, or several.
    """
    names = list(names)
    if _MODEL in names:
        return ""
    roots = sorted(name.removesuffix(_MODEL) for name in names if name.endswith(f"/{_MODEL}"))
    if len(roots) == 1:
        return roots[0]
    if roots:
        some = ", ".join(roots[:10])
        raise errors.ArtifactError(f"there are {len(roots)} SavedModels: {some}; name one of them", uri=uri)
    other = [form for form in _OTHER_FORMS if any(name.rpartition("/")[2] == form for name in names)]
    hint = f", only {other[0]}: save it again with tf.saved_model.save" if other else ""
    raise errors.ArtifactError(f"not a SavedModel: there is no {_MODEL}{hint}", uri=uri)


def _belongs(name: str, root: str) -> bool:
    return name.startswith(root) and name[len(root) :] not in _OTHER_FORMS


def _load(tf: Any, folder: Path, tags: Collection[str] | None, trusted: Collection[str], *, uri: str) -> Any:
    _check(folder / _MODEL, trusted, uri=uri)
    try:
        return tf.saved_model.load(str(folder), tags=[tags] if isinstance(tags, str) else tags and list(tags))
    except (errors.S3Error, MemoryError, Warning):
        raise
    except Exception as error:  # noqa: BLE001 - some are of TensorFlow's own, of no common base
        words = brief(str(error).replace(str(folder), "…"), 300) or type(error).__name__
        message = f"not a SavedModel that TensorFlow {tf.__version__} can load ({words})"
        raise errors.ArtifactError(message, uri=uri) from None


def _check(file: Path, trusted: Collection[str], *, uri: str) -> None:
    """Look at a model before TensorFlow does, and leave it nothing to write files with.

    Raises:
        ArtifactError: It is damaged, or names files outside.
        UnsafeArtifact: It has operations that are not trusted.
    """
    messages = needed("tensorflow.core.protobuf.saved_model_pb2", extra="tensorflow", by="load_saved_model")
    model = parsed(messages.SavedModel(), file.read_bytes(), what="a SavedModel", uri=uri)
    if not model.meta_graphs:
        raise errors.ArtifactError("not a SavedModel: it has no graphs", uri=uri)
    for graph in model.meta_graphs:
        without_saving(graph.graph_def, trusted=trusted)
        check_ops(ops_in(graph.graph_def), trusted={*trusted, *READS_ITS_OWN}, uri=uri)
        for asset in graph.asset_file_def:
            place_in(file.parent / "assets", asset.filename, uri=uri)
    file.write_bytes(model.SerializeToString())


def load_keras(
    uri: str | os.PathLike[str],
    *,
    custom_objects: Mapping[str, Any] | None = None,
    compile: bool = True,
    safe_mode: bool = True,
    workdir: str | os.PathLike[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: fsspec.AbstractFileSystem | None = None,
) -> Any:
    """Load a model that Keras saved as ``.keras``; through a private folder, as :func:`load_saved_model`.

    Args:
        uri: The object, or file of any filesystem.
        custom_objects: Classes and functions by the names that the model has for them.
        compile: Whether it is made ready for training, if it was saved so.
        safe_mode: Refuse models that bring code of their own, such as Lambda layers.
        workdir: As in :func:`load_saved_model`.
        storage_options: For the filesystem that the uri asks for.
        filesystem: Any fsspec filesystem to read from instead.

    Returns:
        A ``keras.Model``.

    Raises:
        ImportError: Keras isn't installed.
        NotFound: There is no such object.
        ArtifactError: It is no ``.keras`` file, or a damaged one, or has classes that Keras does not know.
        UnsafeArtifact: It brings code of its own.
    """
    keras = needed("keras", extra="tensorflow", by="load_keras")
    uri = os.fspath(uri)
    content = read_whole(uri, storage_options=storage_options, filesystem=filesystem)
    size = _check_keras(content, uri=uri)
    with private_folder(workdir, size=len(content) + size, uri=uri) as folder:  # Keras may unpack beside it
        file = folder / "model.keras"
        with translated(uri):
            file.write_bytes(content)
        del content
        try:
            return keras.saving.load_model(
                file,
                custom_objects=dict(custom_objects) if custom_objects else None,
                compile=compile,
                safe_mode=safe_mode,
            )
        except (ValueError, TypeError, LookupError, OSError, AttributeError, ImportError) as error:
            said = " ".join(str(error).replace(str(folder), "…").split())
            words = said.rpartition("Exception encountered: ")[2][:300]
            if "safe_mode" in said:
                message = (
                    f"it brings code of its own: {words.split('. ')[0]} (pass safe_mode=False if you trust its maker)"
                )
                raise errors.UnsafeArtifact(message, uri=uri) from None
            message = f"not a model that Keras {keras.__version__} can load ({words})"
            raise errors.ArtifactError(message, uri=uri) from None


def _check_keras(content: memoryview, *, uri: str) -> int:
    """Look at a file before Keras does, whose loader for other formats runs what they hold.

    Returns:
        Bytes of its members, unpacked.

    Raises:
        ArtifactError: It isn't one, or unpacks to too much.
        IntegrityError: It is damaged.
    """
    if bytes(content[:4]) == b"\x89HDF":
        message = "this is HDF5, whose loader heeds no safe_mode: convert it with model.save('model.keras')"
        raise errors.ArtifactError(message, uri=uri)
    try:
        with zipfile.ZipFile(MemoryFile(content)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError) as error:
        raise errors.ArtifactError(f"not a .keras file, or truncated ({error})", uri=uri) from None
    if "config.json" not in [member.filename for member in members]:
        raise errors.ArtifactError("not a .keras file: it has no config.json", uri=uri)
    check_zip(content, uri=uri)
    return sum(member.file_size for member in members)
