"""Frozen TensorFlow graphs: from S3 into memory, and run there."""

from __future__ import annotations

import difflib
import os
import re
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import fsspec

from torch_s3 import errors
from torch_s3.artifacts.extras import needed
from torch_s3.artifacts.feeds import fed
from torch_s3.artifacts.source import MAX_MESSAGE, read_whole
from torch_s3.artifacts.tf_ops import check_ops, named_ops, ops_in
from torch_s3.wording import brief, listed

_LISTED = 10  # names in a message
_SAVED_MODEL = b"\x08\x01"  # how one starts: saved_model_schema_version, which a graph has not
_TEXT = 1000  # bytes that are looked at
_KEPT = "_torch_s3"  # what we keep with a graph, as its attribute: so it goes when the graph goes
_lock = threading.Lock()


class _Kept:
    """What is kept with a graph. Session and graph refer to each other, so that garbage collection takes both."""

    def __init__(self, uri: str | None) -> None:
        self.uri = uri
        self.session: Any = None


def load_graph(
    uri: str | os.PathLike[str],
    *,
    trusted_ops: Collection[str] = (),
    storage_options: Mapping[str, Any] | None = None,
    filesystem: fsspec.AbstractFileSystem | None = None,
) -> Any:
    """Load a frozen graph, such as ``model.pb``. Nothing touches a disk.

    Source of the format: ``tensorflow/core/framework/graph.proto``, serialized, at most 2 GiB.

    Args:
        uri: The object, or file of any filesystem.
        trusted_ops: Operations that the graph may have although they reach files, Python or the network.
        storage_options: For the filesystem that the uri asks for.
        filesystem: Any fsspec filesystem to read from instead.

    Returns:
        A ``tf.Graph``, for :func:`run_graph` or a session of your own.

    Raises:
        ImportError: TensorFlow isn't installed.
        NotFound: There is no such object.
        ArtifactError: It is no graph, or none of this TensorFlow.
        UnsafeArtifact: It has operations that reach out of the graph and are not trusted.
    """
    tf = needed("tensorflow", extra="tensorflow", by="load_graph")
    uri, trusted_ops = os.fspath(uri), named_ops(trusted_ops)
    content = read_whole(uri, max_bytes=MAX_MESSAGE, storage_options=storage_options, filesystem=filesystem)
    if words := _other_form(content, uri):
        raise errors.ArtifactError(f"not a frozen graph: {words}", uri=uri)
    graph_def = parsed(tf.compat.v1.GraphDef(), content, what="a frozen graph", uri=uri)
    del content
    if not graph_def.node:
        raise errors.ArtifactError("not a frozen graph: it has no nodes", uri=uri)
    check_ops(ops_in(graph_def), trusted=trusted_ops, uri=uri)
    graph = tf.Graph()
    try:
        with graph.as_default():
            tf.import_graph_def(graph_def, name="")
    except (tf.errors.OpError, ValueError, TypeError, KeyError) as error:
        words = f"not a graph that TensorFlow {tf.__version__} can use ({brief(error)})"
        raise errors.ArtifactError(words, uri=uri) from None
    setattr(graph, _KEPT, _Kept(uri))
    return graph


def _other_form(content: memoryview, uri: str) -> str | None:
    """What else a file is that is often called a graph."""
    if uri.rpartition("/")[2] == "saved_model.pb" or bytes(content[:2]) == _SAVED_MODEL:
        return "it is of a SavedModel, whose folder load_saved_model loads"
    start = bytes(content[:_TEXT])
    if start and start.isascii() and start.translate(None, b"\t\r\n").decode().isprintable():
        return "it is text, as .pbtxt files are: write graph_def.SerializeToString()"
    return None


def parsed(message: Any, content: memoryview | bytes, *, what: str, uri: str) -> Any:
    """A message of protobuf, filled.

    Raises:
        ArtifactError: The bytes are no such message.
    """
    try:
        message.ParseFromString(content)
    except Exception as error:  # noqa: BLE001 - protobuf's DecodeError, of a package that isn't ours to import
        words = f"not {what}, or damaged ({brief(error)})"
        raise errors.ArtifactError(words, uri=uri) from None
    return message


def run_graph(graph: Any, *, inputs: Mapping[str, Any], outputs: Sequence[Any]) -> list[Any]:
    """Compute some of a graph's tensors.

    A session is made at a graph's first run, and kept as long as the graph is. Safe to use from any thread. On a GPU,
    the session takes memory as it needs it, and not all there is.

    Args:
        graph: A ``tf.Graph``, of :func:`load_graph` or of your own.
        inputs: Arrays by the names of the tensors that they replace, such as ``"input_1:0"``; ``:0`` may be left out.
        outputs: Names of the tensors to compute; or tensors, for theirs.

    Returns:
        Their values, numpy arrays, in this order.

    Raises:
        TypeError: An argument is of another kind.
        ArtifactMismatch: The graph has no such tensor, or an input doesn't fit its shape or its type, or a placeholder
            that the outputs need was not fed. The message has the graph's own names, the closest first.
    """
    tf = needed("tensorflow", extra="tensorflow", by="run_graph")
    if not isinstance(graph, tf.Graph):
        raise TypeError(f"graph={graph!r:.100}: a tf.Graph, as load_graph gives")
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs: a dict of arrays by the names of tensors, not a {type(inputs).__name__}")
    if isinstance(outputs, str) or not isinstance(outputs, Sequence):
        like = getattr(outputs, "name", outputs)
        raise TypeError(f"outputs={outputs!r:.100}: a list of names, such as [{like!r:.100}]")
    kept = _kept(tf, graph)
    fetched = [_tensor(graph, name, role="output", uri=kept.uri) for name in outputs]
    feeds = {}
    for name, value in inputs.items():
        tensor = _tensor(graph, name, role="input", uri=kept.uri)
        feeds[tensor] = fed(tensor, value, is_text=tensor.dtype == tf.string, uri=kept.uri)
    try:
        found: list[Any] = kept.session.run(fetched, feeds)
    except tf.errors.InvalidArgumentError:
        if missing := _not_fed(fetched, feeds):
            wanted = listed([tensor.name for tensor in fetched], _LISTED)
            message = f"{wanted} cannot be computed without an input for {listed(missing, _LISTED)}"
            raise errors.ArtifactMismatch(message, uri=kept.uri) from None
        raise
    return found


def _kept(tf: Any, graph: Any) -> _Kept:
    """What is kept with a graph, its session made."""
    with _lock:
        kept: _Kept | None = getattr(graph, _KEPT, None)
        if kept is None:
            kept = _Kept(None)
            setattr(graph, _KEPT, kept)
        if kept.session is None:
            config = tf.compat.v1.ConfigProto(allow_soft_placement=True)  # it may name devices of where it was made
            config.gpu_options.allow_growth = True
            kept.session = tf.compat.v1.Session(graph=graph, config=config)
    return kept


def _tensor(graph: Any, name: Any, *, role: str, uri: str | None) -> Any:
    name = getattr(name, "name", name)  # of a tensor
    if not isinstance(name, str):
        raise TypeError(f"{role}s: {name!r:.100} is no tensor's name")
    whole = name if ":" in name else f"{name}:0"
    try:
        return graph.get_tensor_by_name(whole)
    except (KeyError, ValueError):
        ops = graph.get_operations()
        first = {tensor.name for tensor in _placeholders(ops)} if role == "input" else set()
        names = _closest(whole, [tensor.name for op in ops for tensor in op.outputs], first=first)
        message = f"the graph has no tensor {name!r} for an {role}; it has {listed(names, _LISTED)}"
        raise errors.ArtifactMismatch(message, uri=uri) from None


def _closest(name: str, names: list[str], *, first: Collection[str]) -> list[str]:
    """Names: the ``first`` ones, and those that look like ``name``, which may stand in another scope or be misspelt."""
    last = name.rpartition("/")[2]
    alike = difflib.SequenceMatcher(b=name)

    def distance(other: str) -> tuple[bool, bool, float]:
        alike.set_seq1(other)
        return other not in first, other.rpartition("/")[2] != last, -alike.quick_ratio()

    return sorted(names, key=distance)


def _placeholders(ops: Iterable[Any]) -> list[Any]:
    return [op.outputs[0] for op in ops if re.fullmatch(r"Placeholder(V2)?", op.type)]


def _not_fed(fetched: Iterable[Any], fed: Collection[Any]) -> list[str]:
    """The placeholders that ``fetched`` need and that are not fed."""
    known = {tensor.ref() for tensor in fed}
    waiting = [tensor for tensor in fetched if tensor.ref() not in known]
    seen: dict[str, Any] = {}
    while waiting:
        op = waiting.pop()
        op = getattr(op, "op", op)  # a control input is an operation already
        if op.name in seen:
            continue
        seen[op.name] = op
        waiting += [tensor for tensor in op.inputs if tensor.ref() not in known]
        waiting += op.control_inputs
    return sorted(tensor.name for tensor in _placeholders(seen.values()))
