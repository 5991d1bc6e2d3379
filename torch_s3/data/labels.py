"""Labels of a manifest, packed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_s3.data.strings import PackedStrings, StringsBuilder

Labels = NDArray[np.int64] | PackedStrings


def is_missing(label: Any) -> bool:
    """Whether a label is none: ``None``, "", or the NaN that tables have in its place."""
    return label is None or (isinstance(label, str) and not label) or (isinstance(label, float) and math.isnan(label))


def pack_labels(labels: Sequence[Any], uris: Sequence[str]) -> Labels:
    """One for each uri.

    Raises:
        ValueError: Some are missing, or larger than 64 bits.
        TypeError: They are neither all ints nor all strings.
    """
    labels = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    if len(labels) != len(uris):
        raise ValueError(f"{len(labels)} labels for {len(uris)} uris: give one each")
    if missing := [uri for uri, label in zip(uris, labels, strict=True) if is_missing(label)]:
        raise ValueError(f"{missing[0]}: no label, as {len(missing)} of {len(uris)} have none")
    if all(isinstance(label, int) for label in labels):
        if large := [uri for uri, label in zip(uris, labels, strict=True) if not -(2**63) <= label < 2**63]:
            raise ValueError(f"{large[0]}: its label has more than 64 bits")
        return np.array(labels, np.int64)
    if all(isinstance(label, str) for label in labels):
        return StringsBuilder(labels).packed()
    raise TypeError("labels of a manifest are all ints or all strings; datasets take others by labels=")
