"""Images whose pixels say which sample they are."""

import io
from collections import Counter

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

CLASSES = ("Zebra", "ant", "öre 50%+")
SUFFIXES = (".png", ".jpg", ".JPEG", ".bmp")
COUNT = 23  # shared out evenly by no number of ranks, workers or batches
EACH_ONCE = Counter(range(COUNT))
BATCH = 4


def picture(number, suffix=".png"):
    """A file whose pixels are all ``10 * number``, as JPEG too, give or take one."""
    file = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), 10 * number, np.uint8)).save(file, Image.registered_extensions()[suffix.lower()])
    return file.getvalue()


def number_of(image):
    """Which :func:`picture` the tensor is."""
    return (int(image.flatten()[0]) + 5) // 10


def tree():
    """``{name: bytes}``: the samples 0 … COUNT-1, in class folders or deeper, named in another order than numbered."""
    files = {}
    for number in range(COUNT):
        suffix = SUFFIXES[number % len(SUFFIXES)]
        deeper = "more/" if number % 5 == 0 else ""
        files[f"{CLASSES[number % len(CLASSES)]}/{deeper}{7 * number % COUNT:02}{suffix}"] = picture(number, suffix)
    return files


def at_least_once(seen, world_size):
    """Whether ranks together saw each sample, and no more repeats than make them equal."""
    return set(seen) == set(EACH_ONCE) and seen.total() == COUNT + -COUNT % world_size


def write(files, folder):
    """Write ``{name: bytes}`` under a folder on disk."""
    for name, body in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)


def read(dataset, **options):
    """The batches of one epoch, as lists of `(number, label)`."""
    loader = DataLoader(dataset, **{"batch_size": BATCH, **options})
    return [list(zip(map(number_of, images), labels.tolist(), strict=True)) for images, labels in loader]


def numbers(dataset, **options):
    return [number for batch in read(dataset, **options) for number, _ in batch]


def be_rank(monkeypatch, rank, world_size):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
