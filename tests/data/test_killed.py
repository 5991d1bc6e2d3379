"""Training that is killed, by SIGKILL at any point, and resumed from its last checkpoint sees the epoch once."""

import contextlib
import faulthandler
import gc
import itertools
import json
import os
import random
import signal
import traceback
from collections import Counter

import pytest
import torch
import torch.distributed
from torch.utils.data import DataLoader

from torch_s3 import Manifest, S3IterableDataset

COUNT = 160
BATCH = 4
EVERY = 2  # steps between checkpoints


@pytest.fixture(scope="module")
def manifest(s3, fs):
    bucket = s3.create_bucket("killed")
    fs.pipe({f"{bucket}/{number:03}": b"%d" % number for number in range(COUNT)})
    return Manifest.from_prefix(bucket, storage_options=s3.storage_options)


def number_in(thing):
    return int(thing.read())


def objects(manifest, **options):
    return S3IterableDataset(manifest, transform=number_in, **options)


def train(manifest, s3, log, steps, *, workers, rank=0, world_size=1, dataset_of=objects):
    """One epoch. A checkpoint is a line of ``log``: what was seen since the one before, and the state."""
    options = {"rank": rank, "world_size": world_size, "storage_options": s3.storage_options}
    dataset = dataset_of(manifest, shuffle=True, batch_size=BATCH, **options)
    if log.exists() and (lines := log.read_text().splitlines()):
        dataset.load_state_dict(json.loads(lines[-1])["state"])
    seen, step = [], 0
    for batch in DataLoader(dataset, batch_size=BATCH, num_workers=workers):
        step += 1
        seen.append(batch.tolist())
        os.write(steps, b".")
        if step % EVERY == 0:
            checkpoint(log, seen, dataset.state_dict(batches=step), rank, world_size)
            seen = []
    checkpoint(log, seen, dataset.state_dict(batches=step), rank, world_size)


def checkpoint(log, seen, state, rank, world_size):
    if world_size > 1:
        of_all = [None] * world_size
        torch.distributed.all_gather_object(of_all, seen)
        seen = list(itertools.chain(*of_all))
    if rank == 0:
        with log.open("a") as file:
            file.write(json.dumps({"seen": seen, "state": state}) + "\n")


def start(work, *arguments, **options):
    """Run ``work`` in a fork with a group of its own; gives its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setpgid(0, 0)
        gc.freeze()  # as in processes.in_child
        faulthandler.dump_traceback_later(60, exit=True)  # a hang is an error that says where
        torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2  # seconds until a loader sees that a worker was killed
        with contextlib.suppress(RuntimeError):  # a worker was killed
            work(*arguments, **options)
            status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def run_and_kill(rng, begin, victims_of):
    """Start processes, and kill at a random step; whether they had finished before."""
    reading, writing = os.pipe()
    pids = begin(writing)
    os.close(writing)
    for _ in range(rng.randrange(1, 12)):
        if not os.read(reading, 1):
            break
    for victim in victims_of(pids):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(victim, signal.SIGKILL) if victim in pids else os.kill(victim, signal.SIGKILL)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what is left of workers
    os.close(reading)
    return all(status == 0 for status in statuses)


def children_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:  # noqa: PTH123
        return list(map(int, file.read().split()))


def assert_an_epoch(log):
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    seen = Counter(itertools.chain.from_iterable(itertools.chain(*(line["seen"] for line in lines))))
    assert seen == Counter(range(COUNT))


@pytest.mark.parametrize("victim", ["all", "a worker"])
def test_loader_of_four_workers_killed_ten_times_resumes_to_exact_epochs(manifest, s3, tmp_path, victim):
    rng = random.Random(victim)
    log = tmp_path / "log"
    kills = 0

    def victims(pids):
        return pids if victim == "all" else [rng.choice(children_of(pids[0]) or pids)]

    while kills < 10:
        finished = run_and_kill(
            rng, lambda steps: [start(train, manifest, s3, log, steps, workers=rng.choice([4, 4, 3]))], victims
        )
        if finished:
            assert_an_epoch(log)
            log.unlink()
        else:
            kills += 1
    reading, writing = os.pipe()
    assert os.waitpid(start(train, manifest, s3, log, writing, workers=4), 0)[1] == 0
    os.close(reading)
    os.close(writing)
    assert_an_epoch(log)


def be_rank(manifest, s3, log, steps, rendezvous, rank, world_size):
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    train(manifest, s3, log, steps, workers=rank, rank=rank, world_size=world_size)


def test_job_of_two_ranks_killed_ten_times_resumes_to_exact_epochs(manifest, s3, tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    rng = random.Random(2)
    log = tmp_path / "log"
    attempts = itertools.count()
    kills = 0

    def begin(steps, world_size=2):
        rendezvous = tmp_path / f"rendezvous-{next(attempts)}"
        return [start(be_rank, manifest, s3, log, steps, rendezvous, rank, world_size) for rank in range(world_size)]

    while kills < 10:
        if run_and_kill(rng, begin, lambda pids: pids):
            assert_an_epoch(log)
            log.unlink()
        else:
            kills += 1
    reading, writing = os.pipe()
    assert [os.waitpid(pid, 0)[1] for pid in begin(writing)] == [0, 0]
    os.close(reading)
    os.close(writing)
    assert_an_epoch(log)
