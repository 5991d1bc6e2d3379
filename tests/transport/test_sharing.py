"""Many processes, and many callers of one process, that read from one server: none is left behind."""

import contextlib
import multiprocessing
import os
import threading
from collections import Counter

from torch_s3.filesystem import S3FileSystem
from torch_s3.uris import Read, read_ahead

READERS = 4
CONTENT = os.urandom(200_000)


def _read_for_ever(options, path, number, done):
    fs = S3FileSystem(**options)
    while True:
        for body in read_ahead(fs, [Read(path)] * 50, window=32):
            assert bytes(body) == CONTENT
            done.send(number)


def _shares(done, total):
    return Counter(done.recv() for _ in range(total))


def test_processes_that_read_from_one_server_have_like_shares_of_it(rclone):
    uri = rclone.create_bucket("shares")
    (rclone.root / "shares" / "key").write_bytes(CONTENT)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with contextlib.ExitStack() as stack:
        for number in range(READERS):
            arguments = (rclone.storage_options, f"{uri[5:]}/key", number, sender)
            process = context.Process(target=_read_for_ever, args=arguments, daemon=True)
            process.start()
            stack.callback(process.join)
            stack.callback(process.kill)
        while len(_shares(receiver, 10 * READERS)) < READERS:
            pass  # until all have begun
        shares = _shares(receiver, 2000)

    assert min(shares[number] for number in range(READERS)) > 2000 / READERS / 3


def test_callers_of_one_process_have_like_shares_of_its_thread(rclone):
    uri = rclone.create_bucket("callers")
    (rclone.root / "callers" / "key").write_bytes(CONTENT)
    fs = S3FileSystem(**rclone.storage_options, max_connections=8)
    shares, enough = Counter(), threading.Event()

    def read(number):
        while not enough.is_set():
            for body in read_ahead(fs, [Read(f"{uri[5:]}/key")] * 50, window=32):
                assert bytes(body) == CONTENT
                shares[number] += 1
                if sum(list(shares.values())) > 2000:
                    enough.set()

    threads = [threading.Thread(target=read, args=(number,)) for number in range(READERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert min(shares[number] for number in range(READERS)) > sum(shares.values()) / READERS / 3
