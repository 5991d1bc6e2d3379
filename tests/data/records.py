"""Shards whose records say which they are."""

import gzip
from collections import Counter

import zstandard
from archives import tar_of

from torch_s3.data import tfrecord

SIZES = (20, 1, 25, 7)  # records of each shard; shared out evenly by no number of ranks, workers or batches
COUNT = sum(SIZES)
EACH_ONCE = Counter(range(COUNT))
BATCH = 4


def content(number):
    """Of a record."""
    return b"%d" % number + b"." * (number % 50)


def number_in(record):
    """Which :func:`content` it is: of a record, or of a sample's ``txt``."""
    text = record if isinstance(record, bytes) else record["txt"]
    return int(text.rstrip(b"."))


def framed(record):
    return b"".join(map(bytes, tfrecord.frame(record)))


def shards(kind="tfrecord", sizes=SIZES):
    """The bytes of shards that together have the records 0 … n-1."""
    bodies, number = [], 0
    for size in sizes:
        numbers = range(number, number + size)
        number += size
        if kind == "tfrecord":
            bodies.append(b"".join(framed(content(n)) for n in numbers))
        else:
            bodies.append(
                tar_of({f"{n:06}.{ext}": b for n in numbers for ext, b in (("txt", content(n)), ("json", b"1"))})
            )
    return bodies


def compressed(body, suffix):
    """As ``.gz``, of two members, or as ``.zst``, of two frames; or as it is."""
    half = len(body) // 2
    if suffix == ".gz":
        return gzip.compress(body[:half], 1) + gzip.compress(body[half:], 1)
    if suffix == ".zst":
        return zstandard.compress(body[:half]) + zstandard.compress(body[half:])
    return body


def names(kind="tfrecord", suffix="", sizes=SIZES):
    return [f"s-{number:03}.{kind}{suffix}" for number in range(len(sizes))]


def put(fs, prefix, kind="tfrecord", suffix="", sizes=SIZES):
    """Store :func:`shards` under a prefix."""
    bodies = [compressed(body, suffix) for body in shards(kind, sizes)]
    fs.pipe({f"{prefix}/{name}": body for name, body in zip(names(kind, suffix, sizes), bodies, strict=True)})
    return f"{prefix}/"


def damaged(body, number, *, at=12):
    """A TFRecord shard with a bit flipped in the data of its record ``number``, or at another byte of its frame."""
    start = 0
    for _ in range(number):
        start += int.from_bytes(body[start : start + 8], "little") + 16
    changed = bytearray(body)
    changed[start + at] ^= 1
    return bytes(changed)
