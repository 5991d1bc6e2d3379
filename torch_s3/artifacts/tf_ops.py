"""What a TensorFlow graph may do besides computing: files, Python, the network. Pure, and without TensorFlow."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch_s3 import errors
from torch_s3.wording import listed

# Of the operations that TensorFlow 2.21 registers.
_REACHES_OUT = re.compile(
    r"""
    .*PyFunc.* | XlaCustomCall.* | XlaCallModule | MlirPassthroughOp                               # code of others
    | DatasetFromGraph | _?XlaHostCompute.*
    | (Read|Write)File | .*MatchingFiles.* | RecordInput | DumpTensor | CalibrationStatisticsSaver   # files
    | (WholeFile|FixedLengthRecord|TextLine|TFRecord|LMDB)Reader(V\d)?
    | (Experimental)?(FixedLengthRecord|TextLine|TFRecord|CSV|LMDB|Sql|Save|Load|Cache)Dataset(V\d)?
    | (Experimental)?DatasetToTFRecord | .*Snapshot.+
    | Save | SaveSlices | SaveV2 | Restore | RestoreSlice | RestoreV2 | MergeV2Checkpoints | DistributedSave
    | Skipgram | GenerateVocabRemapping | FixedUnigramCandidateSampler | (Encode|Decode)Proto(V\d)?
    | DTensorRestoreV\d | LoadAndRemapMatrix | InitializeTableFromTextFile(V\d)? | FileSystemSetConfiguration
    | PrintV2 | Debug(Identity|NanCount|NumericSummary)(V\d)? | SummaryWriter | CreateSummary(File|Db)Writer
    | ImportEvent
    | Rpc.* | RegisterDataset(V\d)? | DataServiceDataset(V\d)? | Bigtable.* | BigQuery.* | GRPC.*     # the network
    """,
    re.VERBOSE,
)
READS_ITS_OWN = frozenset({"InitializeTableFromTextFileV2", "RestoreV2"})
"""Operations on files by which nearly every SavedModel reads its variables and vocabularies."""
_SAVES = frozenset({"MergeV2Checkpoints", "SaveV2"})
_LISTED = 20  # names in a message


def named_ops(trusted_ops: Any) -> frozenset[str]:
    """The operations that a caller trusts.

    Raises:
        TypeError: They are given otherwise than by name.
    """
    given = [trusted_ops] if isinstance(trusted_ops, str) else trusted_ops
    if not isinstance(given, Collection) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"trusted_ops={trusted_ops!r:.100}: a list of operations' names, such as ['ReadFile']")
    return frozenset(given)


def ops_in(graph_def: Any) -> Counter[str]:
    """How often a ``GraphDef`` has each operation, in its functions too."""
    return Counter(node.op for node in _nodes(graph_def))


def _nodes(graph_def: Any) -> Iterator[Any]:
    yield from graph_def.node
    for function in graph_def.library.function:
        yield from function.node_def


def without_saving(graph_def: Any, *, trusted: Collection[str]) -> None:
    """Have the operations by which nearly every SavedModel can save itself do nothing, unless they are trusted.

    They can be put where they run at load, and write wherever they like. A loaded model is saved without them.
    """
    for node in _nodes(graph_def):
        if node.op in _SAVES - set(trusted):
            control = [name for name in node.input if name.startswith("^")]
            node.op = "NoOp"
            node.ClearField("attr")
            del node.input[:]
            node.input.extend(control)


def check_ops(ops: Iterable[str], *, trusted: Collection[str], uri: str) -> None:
    """Refuse operations that reach out of the graph.

    Raises:
        UnsafeArtifact: There are some that are not trusted. The message names them.
    """
    refused = sorted(op for op in set(ops) - set(trusted) if _REACHES_OUT.fullmatch(op))
    if refused:
        message = (
            f"the graph has operations that reach files, Python or the network: {listed(refused, _LISTED)} "
            f"(if you trust whoever made it: trusted_ops={refused[:_LISTED]})"
        )
        raise errors.UnsafeArtifact(message, asks_for=refused, uri=uri)
