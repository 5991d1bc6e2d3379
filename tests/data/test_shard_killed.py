"""Training on shards that is killed, by SIGKILL at any point, and resumed sees the epoch once."""

import os
import random

import pytest
from records import number_in, put
from test_killed import COUNT, assert_an_epoch, run_and_kill, start, train

from torch_s3.data.tfrecords import S3TFRecordDataset


@pytest.fixture(scope="module")
def prefix(s3, fs):
    return put(fs, f"{s3.create_bucket('killed-shards')}/train", sizes=(100, 45, COUNT - 145))


def records(prefix, **options):
    return S3TFRecordDataset(prefix, transform=number_in, shuffle_buffer=30, **options)


def test_loader_killed_ten_times_resumes_to_exact_epochs(prefix, s3, tmp_path, monkeypatch):
    monkeypatch.setattr("torch_s3.data.chunks.piece_size", lambda fs: 500)
    rng = random.Random(0)
    log = tmp_path / "log"
    kills = 0
    while kills < 10:
        workers = rng.choice([4, 3, 1])
        if run_and_kill(
            rng, lambda steps, w=workers: [start(train, prefix, s3, log, steps, workers=w, dataset_of=records)], list
        ):
            assert_an_epoch(log)
            log.unlink()
        else:
            kills += 1
    reading, writing = os.pipe()
    assert os.waitpid(start(train, prefix, s3, log, writing, workers=2, dataset_of=records), 0)[1] == 0
    os.close(reading)
    os.close(writing)
    assert_an_epoch(log)
