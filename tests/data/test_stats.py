import pytest
from pictures import BATCH, COUNT, picture, read
from PIL import Image

from torch_s3.data import stats
from torch_s3.data.stats import Board, Column


@pytest.mark.parametrize("workers", [0, 2])
def test_numbers_of_all_workers_come_together(dataset, workers):
    train = dataset(batch_size=BATCH)
    for epoch in range(2):
        train.set_epoch(epoch)
        read(train, num_workers=workers)

    found = train.stats()

    assert found.samples == 2 * COUNT
    assert found.bytes == 2 * train.manifest.sizes.sum()
    assert found.errors == found.retries == found.cache_hits == 0
    assert found.samples_per_second == found.samples / found.seconds
    assert found.bytes_per_second == found.bytes / found.seconds
    shares = found.waiting, found.decoding, found.transforming, found.consuming
    assert all(share > 0 for share in shares)
    assert sum(shares) <= 1.0


def test_numbers_before_the_first_sample(dataset):
    assert dataset().stats()[:5] == (0, 0, 0.0, 0.0, 0.0)


def test_numbers_print_as_one_line(dataset):
    train = dataset()
    list(train)

    line = str(train.stats())

    assert "\n" not in line
    assert line.startswith("23 samples, ")
    assert "waiting for reads" in line


def test_what_a_slow_transform_takes_is_its_share(dataset):
    def transform(image):
        sum(range(300_000))
        return image

    train = dataset(transform=transform)
    list(train)
    found = train.stats()

    assert found.transforming > max(found.decoding, found.consuming)


def test_stats_are_plotted(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(stats, "_INTERVAL", 0.0)
    train = dataset(batch_size=BATCH)
    read(train, num_workers=2)

    train.plot_stats(tmp_path / "stats.png")

    with Image.open(tmp_path / "stats.png") as image:
        assert len(image.convert("RGB").getcolors(2**24)) > 100  # something is drawn


def test_nothing_to_plot_is_an_error(dataset, tmp_path):
    with pytest.raises(ValueError, match="nothing to plot yet"):
        dataset().plot_stats(tmp_path / "stats.png")


def test_history_of_any_length_fits(monkeypatch):
    """When it is full, every other snapshot goes, and they are taken half as often."""
    now = iter(range(1_000_000))
    monkeypatch.setattr(stats.time, "monotonic", lambda: float(next(now)))
    board = Board()
    row = board.writer(1)
    row.begin(group=1, epoch=0, workers=1, start=0, used=0, ended=False)
    for _ in range(10_000):
        row.add(Column.SAMPLES, 2)
        row.tick()
    kept = board._history.numpy()[1]
    kept = kept[kept[:, 0] > 0]

    assert stats._SNAPSHOTS / 2 <= len(kept) <= stats._SNAPSHOTS
    assert (abs(kept[:, 1] - 2 * kept[:, 0]) <= 4).all()
    assert kept[0, 0] < 10
    assert kept[-1, 0] > 9_500


def test_more_workers_than_can_be_counted_are_refused():
    with pytest.raises(ValueError, match="at most 128"):
        Board().writer(129)


def test_bytes_of_broken_objects_count_too(fs, folder, dataset):
    files = {f"{folder}/a/1.png": picture(1), f"{folder}/a/2.png": b"no image"}
    fs.pipe(files)
    train = dataset(folder, on_error="skip")
    with pytest.warns(UserWarning, match="skipped 1"):
        list(train)

    assert (train.stats().samples, train.stats().errors) == (1, 1)
    assert train.stats().bytes == sum(map(len, files.values()))
