"""Pack images into shards in S3, and train from those: shuffled, on several workers, resumed in the middle of an epoch.

    python examples/read_shards.py

starts an S3 server of its own, puts scikit-learn's 1,797 scanned digits there as PNG files, packs them into tars as
WebDataset has them and into TFRecords, and reads both. It needs torch-s3[demo].

    python examples/read_shards.py --shards 's3://bucket/train-{000000..000127}.tar'

reads your shards, tars or TFRecords, one epoch, and says how fast that was. Credentials are found where boto3 finds
them (AWS_ACCESS_KEY_ID, AWS_PROFILE, an instance role …).
"""

import argparse
import functools
import io
import itertools
import sys
from collections import Counter
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from torch_s3 import FixedFeature, S3Error, S3FileSystem, S3TarDataset, S3TFRecordDataset, pack
from torch_s3.testing import serve_s3

say = functools.partial(print, flush=True)


def name_and_label(sample: dict[str, Any]) -> tuple[str, int]:
    """Of a tar's sample: ``__key__`` is the name without its extension, the rest are the members by extension."""
    return sample["__key__"], sample["cls"]


def picture_and_label(record: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of an Example: its features."""
    pixels = np.asarray(Image.open(io.BytesIO(record["data"])))
    return torch.from_numpy(pixels.copy()), record["label"]


def demo(workers: int) -> None:
    """Put digits into an S3 of our own, pack them, and read the shards."""
    with serve_s3() as s3:
        bucket, fs = s3.create_bucket("demo"), S3FileSystem(**s3.storage_options)
        files = digits(f"{bucket}/digits")
        fs.pipe(files)
        for format in ("tar", "tfrecord"):
            packed = pack(
                f"{bucket}/digits/",
                f"{bucket}/{format}/",
                format=format,
                labels="folder",
                shuffle=True,
                shard_size=500_000,
                filesystem=fs,
            )
            say(f"{len(files):,} objects are {len(packed.shards)} shards now: {packed.uris}")
        read_tars(f"{bucket}/tar/", fs, workers, len(files))
        read_tfrecords(f"{bucket}/tfrecord/", fs, workers)


def read_tars(prefix: str, fs: S3FileSystem, workers: int, count: int) -> None:
    """One epoch, broken off after ten batches and gone on with by other workers, has each sample once."""

    def dataset() -> S3TarDataset:
        return S3TarDataset(
            prefix, transform=name_and_label, shuffle=True, shuffle_buffer=500, batch_size=32, filesystem=fs
        )

    first = dataset()
    seen = Counter[str]()
    for names, _ in itertools.islice(DataLoader(first, batch_size=32, num_workers=workers), 10):
        seen.update(names)
    state = first.state_dict(batches=10)  # into the checkpoint, beside the model's
    say(f"broken off after {seen.total()} samples; what is left of the epoch: {state['rest']}")

    again = dataset()
    again.load_state_dict(state)
    for names, _ in DataLoader(again, batch_size=64, num_workers=workers - 1):
        seen.update(names)
    if len(seen) != count or seen.total() != count:
        sys.exit(f"{seen.total()} samples were read, {len(seen)} different ones, of {count}")
    say(f"resumed with {workers - 1} worker(s): each of the {count:,} samples came once")
    say(f"the first one, by one range: {again.read(0)}")


def read_tfrecords(prefix: str, fs: S3FileSystem, workers: int) -> None:
    """The features of each Example, decoded without TensorFlow."""
    features = {"data": FixedFeature((), dtype=bytes), "label": FixedFeature((), dtype=torch.int64)}
    dataset = S3TFRecordDataset(
        prefix, features=features, transform=picture_and_label, shuffle=True, batch_size=64, filesystem=fs
    )
    labels = Counter[int]()
    for pictures, numbers in DataLoader(dataset, batch_size=64, num_workers=workers):
        if pictures.shape[1:] != (8, 8):
            sys.exit(f"pictures of {tuple(pictures.shape[1:])}")
        labels.update(numbers.tolist())
    say(f"digits in the TFRecords: {dict(sorted(labels.items()))}")
    say(f"loading: {dataset.stats()}")


def measure(shards: str, workers: int, endpoint_url: str | None) -> None:
    """Read one's own shards once."""
    options: dict[str, Any] = {"shuffle": True, "batch_size": 64, "storage_options": {"endpoint_url": endpoint_url}}
    dataset: Any
    if ".tar" in shards or ".tgz" in shards:
        dataset = S3TarDataset(shards, decode=False, **options)
    else:
        dataset = S3TFRecordDataset(shards, **options)
    say(f"{len(dataset):,} samples in {len(dataset.manifest):,} shards")
    for _ in DataLoader(dataset, batch_size=64, num_workers=workers, collate_fn=len):
        pass
    say(dataset.stats())


def digits(prefix: str) -> dict[str, bytes]:
    """scikit-learn's scans of handwritten digits as PNG files of 8 x 8 pixels, in class folders."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    files: dict[str, bytes] = {}
    for number, (pixels, digit) in enumerate(zip(scans.images, scans.target, strict=True)):
        png = io.BytesIO()
        Image.fromarray((pixels * (255 / 16)).astype(np.uint8)).save(png, "png")
        files[f"{prefix}/{digit}/{number:04d}.png"] = png.getvalue()
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", metavar="URI", help="a prefix, one shard, or many by braces")
    parser.add_argument("--endpoint-url", metavar="URL", help="of an S3 that isn't AWS")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if options.workers < 1:
        parser.error("--workers: at least 1")
    try:
        measure(options.shards, options.workers, options.endpoint_url) if options.shards else demo(options.workers)
    except S3Error as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
