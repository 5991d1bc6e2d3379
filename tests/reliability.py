"""A randomized run: many operations by threads and a forked child, through a proxy at its worst, every byte checked.

    python tests/reliability.py --seed 7 --operations 10000
    python tests/reliability.py --soak 100000

The seed decides what each worker does, and how each request is met: by its kind, path and range, and how often it has
come before. So a run is repeated up to the workers' races, and one with ``--workers 1`` up to what time-outs cut off.
"""

import argparse
import collections
import faulthandler
import itertools
import os
import pickle
import random
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

import boto3
import numpy as np
from faults import Faults, answer, cut, drip, edit, ignore_range, lose, reset, say, serve, serve_then_close, stall
from processes import in_child

from torch_s3 import S3FileSystem, errors
from torch_s3.testing import serve_s3

BUCKET = "reliability"
KIB, MIB = 1024, 1024 * 1024
SIZES = {f"read/{number:02}": size for number, size in enumerate([0, 1, 1000, 90 * KIB, 300 * KIB, 3 * MIB] * 3)}
PATIENCE = {
    "connect_timeout": 2,
    "first_byte_timeout": 1,
    "read_timeout": 1,
    "completion_timeout": 1,
    "total_timeout": 30,
    "slow_after": 0.5,
}
SHARE = 0.2  # of the requests that meet a fault


def ramp(key, start, stop, version=0):
    """Bytes ``[start, stop)`` of an object: 8-byte words that count, and say whose they are."""
    words = np.arange(start // 8, -(-stop // 8), dtype="<u8")
    words |= np.uint64(zlib.crc32(key.encode()) << 32 | version << 24)
    return words.tobytes()[start % 8 : start % 8 + stop - start]


# ---------------------------------------------------------------------- faults


QUICK = {
    "reset before the head": reset,
    "reset within the head": cut(0.5),
    "reset within the body": cut(1, 0.5),
    "closed within the body": cut(1, 0.9, then=lambda exchange: exchange.close()),
    "answer lost": lose,
    "closed after the answer": serve_then_close,
    "garbage": say(b"SSH-2.0-OpenSSH_9.9\r\n\r\n"),
    "500": answer(500, "InternalError"),
    "500, although done": edit(status=500),
    "502": answer(502),
    "503": answer(503, "SlowDown"),
    "503 with Retry-After": answer(503, "SlowDown", Retry_After="1"),
    "429": answer(429),
    "200 with an error": answer(200, "InternalError"),
    "range ignored": ignore_range,
    "flipped byte": edit(body=lambda body: body[:-1] + bytes([body[-1] ^ 1]) if body else body),
    "ExpiredToken": answer(403, "ExpiredToken"),
}
SLOW = {
    "stall before the head": stall,
    "stall within the body": cut(1, 0.5, then=stall),
    "a byte at a time": drip(0.2, head=0.9),
    "Content-Length too large": edit(Content_Length="99999999"),
}


def _bearable(exchange, fault):
    """Whether there is such a fault of this request, and something can be done about it.

    Nothing can about an upload that nobody was told of, or that the server doesn't abort, nor about bytes or a size
    that nothing else tells.
    """
    kind, part = exchange.kind, "range" in exchange.fields
    if kind == "create":
        return fault in {"reset before the head", "500", "502", "503", "garbage"}  # which don't do what is asked
    if fault in {"flipped byte", "range ignored"}:
        return kind == "get" and part is (fault == "range ignored")  # S3 has no checksum of a range
    return kind != "abort" and (kind, fault) != ("head", "Content-Length too large")


class Chaos:
    """The behaviour for every request. ``counts`` says which faults there were."""

    def __init__(self, seed):
        self.counts = collections.Counter()
        self._seed = seed
        self._seen = collections.Counter()
        self._lock = threading.Lock()

    def __call__(self, exchange):
        request = (exchange.kind, exchange.path, exchange.fields.get("range"))
        with self._lock:
            self._seen[request] += 1
            rng = random.Random(f"{self._seed} {request} {self._seen[request]}")
            name = rng.choice([*SLOW] if rng.random() < 0.05 else [*QUICK]) if rng.random() < SHARE else None
            if not _bearable(exchange, name):
                name = None
            self.counts[name] += 1
        (QUICK | SLOW).get(name, serve)(exchange)


# ---------------------------------------------------------------------- operations


class Worker:
    """Does random operations and judges each.

    Attributes:
        done: Operations by name.
        errors: Typed errors by type: no result, which is right where the fault lasts.
        wrong: What must not be: other bytes, other errors, half a write.
    """

    def __init__(self, name, seed, fs, direct):
        self.done, self.errors, self.wrong = collections.Counter(), collections.Counter(), []
        self._name, self._fs, self._direct = name, fs, direct
        self._rng = random.Random(f"{seed} {name}")

    def run(self, operations):
        """Do those of these numbers."""
        kinds = [self._get, self._range, self._ranges, self._file, self._list, self._info, self._put, self._put_new]
        kinds += [self._put_old, self._changing]
        for number in operations:
            operation = self._put_parts if self._rng.random() < 0.01 else self._rng.choice(kinds)
            name = operation.__name__.strip("_")
            self.done[name] += 1
            try:
                right = operation(f"{self._name}-{number}")
            except errors.S3Error as error:
                self.errors[type(error).__name__] += 1
            except Exception as error:
                self.wrong.append(f"{self._name} {number} {name}: {error!r}")
            else:
                if not right:
                    self.wrong.append(f"{self._name} {number} {name}: not what is there")

    def _object(self):
        key = self._rng.choice([*SIZES])
        return key, f"{BUCKET}/{key}", SIZES[key]

    def _span(self, size):
        start, stop = sorted(self._rng.choices(range(size + 1), k=2))
        return start, stop

    def _get(self, _):
        key, path, size = self._object()
        return self._fs.cat_file(path) == ramp(key, 0, size)

    def _range(self, _):
        key, path, size = self._object()
        start, stop = self._span(size)
        return self._fs.cat_file(path, start, stop) == ramp(key, start, stop)

    def _ranges(self, _):
        wanted = [self._object() for _ in range(4)]
        spans = [self._span(size) for _, _, size in wanted]
        got = self._fs.cat_ranges([path for _, path, _ in wanted], *zip(*spans, strict=True))
        self.errors.update(type(one).__name__ for one in got if isinstance(one, errors.S3Error))
        return all(
            isinstance(one, errors.S3Error) or one == ramp(key, *span)
            for one, (key, _, _), span in zip(got, wanted, spans, strict=True)
        )

    def _file(self, _):
        key, path, size = self._object()
        start, stop = self._span(size)
        buffer = bytearray(stop - start)
        with self._fs.open(path) as file:
            file.seek(start)
            return file.readinto(buffer) == len(buffer) and buffer == ramp(key, start, stop)

    def _list(self, _):
        found = self._fs.find(f"{BUCKET}/read", detail=True)
        return {name: entry["size"] for name, entry in found.items()} == {
            f"{BUCKET}/{key}": SIZES[key] for key in SIZES
        }

    def _info(self, _):
        _, path, size = self._object()
        return self._fs.info(path)["size"] == size

    def _put(self, key, mode="overwrite", size=None):
        size = self._rng.randrange(64 * KIB) if size is None else size
        body = ramp(key, 0, size)
        try:
            with self._fs.open(f"{BUCKET}/{key}", "xb" if mode == "create" else "wb") as file:
                file.write(body)
        except errors.AlreadyExists as error:
            raise AssertionError("refused, but nobody else writes there") from error
        except errors.S3Error:
            assert self._there(key) in (None, body), "half a write"
            raise
        return self._there(key) == body

    def _put_new(self, key):
        return self._put(key, "create")

    def _put_parts(self, key):
        return self._put(key, "create", 6 * MIB)

    def _put_old(self, _):
        _, path, _ = self._object()
        try:
            self._fs.pipe_file(path, b"other", mode="create")
        except errors.AlreadyExists:
            return True
        return False

    def _changing(self, _):
        """Read what is overwritten all the time: one version, whole."""
        size, version = 2 * MIB, self._rng.randrange(256)
        if self._rng.random() < 0.3:
            self._direct.put_object(Bucket=BUCKET, Key="changing", Body=ramp("changing", 0, size, version))
        with self._fs.open(f"{BUCKET}/changing") as file:
            got = file.read()
        return got == ramp("changing", 0, size, got[3])

    def _there(self, key):
        try:
            body = self._direct.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        except self._direct.exceptions.NoSuchKey:
            return None
        self._direct.delete_object(Bucket=BUCKET, Key=key)
        return body


# ---------------------------------------------------------------------- runs


def run(seed, operations, workers=8):
    """Do it: figures, as a dict; ``wrong`` must be empty, and ``uploads left open`` 0."""
    began = time.monotonic()
    with serve_s3() as s3:
        direct = _boto3(s3)
        direct.create_bucket(Bucket=BUCKET)
        for key, size in SIZES.items():
            direct.put_object(Bucket=BUCKET, Key=key, Body=ramp(key, 0, size))
        direct.put_object(Bucket=BUCKET, Key="changing", Body=ramp("changing", 0, 2 * MIB))
        chaos = Chaos(seed)
        with Faults(itertools.repeat(chaos), upstream=s3.endpoint_url) as proxy:
            fs = S3FileSystem(
                skip_instance_cache=True, part_size=5 * MIB, max_connections=16, **proxy.storage_options | PATIENCE
            )
            team = [Worker(f"worker-{number}", seed, fs, direct) for number in range(workers)]
            share = operations // (workers + (workers > 1))
            _together(team, range(share // 4))
            proxy.requests.clear()
            before = rss()
            child = Worker("child", seed, fs, direct)
            left = operations - share * workers
            _together(team, range(share // 4, share), lambda: _forked(child, left, s3, proxy) if left else None)
            team.append(child)
            proxy.requests.clear()
            grown = rss() - before
        uploads = direct.list_multipart_uploads(Bucket=BUCKET).get("Uploads", ())
    faults = dict(sorted((str(name), count) for name, count in chaos.counts.items() if name))
    return {
        "seed": seed,
        "operations": sum((worker.done for worker in team), collections.Counter()),
        "requests": chaos.counts.total(),
        "faults": faults,
        "retries": fs.stats()["retries"],
        "typed errors": sum((worker.errors for worker in team), collections.Counter()),
        "uploads left open": len(uploads),
        "seconds": round(time.monotonic() - began, 1),
        "RSS growth, MiB": round(grown / MIB, 1),
        "wrong": [line for worker in team for line in worker.wrong],
    }


def _together(team, operations, meanwhile=lambda: None):
    threads = [threading.Thread(target=worker.run, args=(operations,)) for worker in team]
    for thread in threads:
        thread.start()
    meanwhile()
    for thread in threads:
        thread.join()


def _forked(worker, operations, s3, proxy):
    """Let a fork of this process work, while this one's threads do."""
    with tempfile.TemporaryFile() as file:

        def work():
            proxy.abandon()
            worker._direct = _boto3(s3)
            worker.run(range(operations))
            pickle.dump((worker.done, worker.errors, worker.wrong), file)
            file.flush()

        if status := in_child(work, seconds=1200):
            worker.wrong.append(f"the forked child ended with status {status}")
        else:
            file.seek(0)
            worker.done, worker.errors, worker.wrong = pickle.load(file)


def soak(requests):
    """GET small objects for long: figures, as a dict."""
    objects = {f"/{BUCKET}/{number:03}": ramp(str(number), 0, 10 * KIB) for number in range(500)}
    sizes = []
    began = time.monotonic()
    with Faults(objects=objects) as server:
        fs = S3FileSystem(skip_instance_cache=True, **server.storage_options)
        for _ in range(requests // len(objects)):
            assert fs.cat_ranges([path[1:] for path in objects], None, None) == list(objects.values())
            server.requests.clear()
            sizes.append(rss())
    return {
        "GETs": len(sizes) * len(objects),
        "seconds": round(time.monotonic() - began, 1),
        "RSS growth after the first tenth, MiB": round((sizes[-1] - sizes[len(sizes) // 10]) / MIB, 1),
    }


def rss():
    """This process's memory, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def _boto3(s3):
    session = boto3.Session("testing", "testing", region_name="us-east-1")
    return session.client("s3", endpoint_url=s3.endpoint_url)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--operations", type=int, default=10_000)
    parser.add_argument(
        "--workers", type=int, default=8, help="threads; where there are several, a forked child comes on top"
    )
    parser.add_argument("--soak", type=int, metavar="GETS", help="read small objects so often instead")
    options = parser.parse_args()
    faulthandler.dump_traceback_later(3000, exit=True)  # a hang is an error that says where
    figures = soak(options.soak) if options.soak else run(options.seed, options.operations, options.workers)
    for name, value in figures.items():
        print(f"{name}: {_said(value)}", flush=True)
    sys.exit(bool(figures.get("wrong") or figures.get("uploads left open")))


def _said(value):
    if isinstance(value, dict):
        return ", ".join(f"{count:,} {kind}" for kind, count in sorted(value.items())) or "none"
    if isinstance(value, list):
        return "".join(f"\n  {line}" for line in value) or "none"
    return f"{value:,}"


if __name__ == "__main__":
    main()
