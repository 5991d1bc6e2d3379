"""The I/O thread's promise: what is submitted comes back, whatever happens to the thread, the process or the caller."""

import gc
import io
import logging
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import pytest
from faults import Faults, answer, hold, reset, serve, stall
from processes import in_child, program

from torch_s3 import errors
from torch_s3.config import S3Config
from torch_s3.filesystem import S3FileSystem
from torch_s3.transport import loop
from torch_s3.transport.client import Client
from torch_s3.transport.endpoint import Account
from torch_s3.transport.objects import Get
from torch_s3.uris import Read, read_ahead

CONTENT = os.urandom(300_000)
OBJECTS = {"/bucket/key": CONTENT}


def _client(server, **settings):
    return Client(S3Config.from_storage_options(server.storage_options | settings))


def _fetch(client):
    with client.batch() as batch:
        return bytes(batch.fetch("bucket", "key").result())


class BugError(BaseException):
    """What no code is prepared for."""


class Broken(Get):
    def receive(self, head):
        raise BugError


def _submit(batch, kind):
    """As ``batch.get`` does, but a transfer of another kind."""
    transfer = kind(batch._client.target("bucket", "s3://bucket/key"), "bucket", "key", batch._sink)
    batch._new.append(transfer)
    batch.start()
    return transfer


# ---------------------------------------------------------------------- the thread


def test_one_thread_serves_all_clients():
    with Faults(objects=OBJECTS) as server:
        for _ in range(3):
            assert _fetch(_client(server)) == CONTENT

    assert [thread.name for thread in threading.enumerate()].count("torch_s3-io") == 1


def test_transfer_that_was_waited_for_is_given_to_nobody_when_it_comes_late():
    with Faults(objects=OBJECTS) as server, _client(server).batch() as batch:
        first = batch.get("bucket", "key")
        batch.wait(first)
        batch._sink.put([first])  # as where it is seen to be finished before the thread hands it back
        assert batch.finished() == []
        batch._sink.put([first])
        second = batch.get("bucket", "key")

        assert batch.wait_any() == [second]


@pytest.mark.timeout(60)
def test_cancelled_transfers_leave_room_for_those_who_wait():
    loop.running().stop()  # a new one, which no other connection keeps awake
    with Faults([stall], objects=OBJECTS) as server:
        client = _client(server, max_connections=1)
        with client.batch() as first, client.batch() as second:
            first.fetch("bucket", "key")
            first.start()
            server.wait_for_requests(1)
            fetch = second.fetch("bucket", "key")
            second.start()
            first.close()

            assert fetch.result() == CONTENT


def test_failed_thread_fails_all_who_wait():
    with (
        Faults(repeat(stall), objects=OBJECTS) as stuck,
        Faults(repeat(answer(503))) as throttling,
        Faults(objects=OBJECTS) as healthy,
        _client(stuck, max_connections=1).batch() as batch,
        _client(throttling, attempts=1000).batch() as throttled,
    ):
        waiting = [batch.get("bucket", "key") for _ in range(3)]
        batch.start()
        retried = throttled.get("bucket", "key")
        throttled.start()
        stuck.wait_for_requests(1)
        throttling.wait_for_requests(1)
        with _client(healthy).batch() as last, pytest.raises(errors.S3Error, match="I/O thread failed"):
            last.wait(_submit(last, Broken))

        for transfer in waiting:
            with pytest.raises(errors.S3Error, match="I/O thread failed"):
                batch.wait(transfer)
        with pytest.raises(errors.S3Error, match="I/O thread failed"):
            throttled.wait(retried)


def test_failed_thread_fails_what_it_had_in_hand():
    class Unanswerable:
        def __gt__(self, attempt):
            raise BugError

    def wait():
        with Faults([reset], objects=OBJECTS) as server, _client(server).batch() as batch:
            transfer = batch.get("bucket", "key")
            patience = transfer.target.patience._replace(attempts=Unanswerable())
            transfer.target = transfer.target._replace(patience=patience)
            with pytest.raises(errors.S3Error, match="I/O thread failed"):
                batch.wait(transfer)

    assert in_child(wait) == 0


def test_failed_thread_is_replaced():
    with Faults(objects=OBJECTS) as server:
        client = _client(server)
        with client.batch() as batch, pytest.raises(errors.S3Error, match="I/O thread failed"):
            batch.wait(_submit(batch, Broken))

        assert _fetch(client) == CONTENT


def test_failed_thread_leaves_no_descriptor():
    loop.running().stop()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with Faults(objects=OBJECTS) as server:
        client = _client(server)
        assert _fetch(client) == CONTENT
        with client.batch() as batch, pytest.raises(errors.S3Error, match="I/O thread failed"):
            batch.wait(_submit(batch, Broken))
    loop.running().stop()

    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_failed_transfer_leaves_the_thread_alone():
    class Buggy(Get):
        def receive(self, head):
            raise ZeroDivisionError

    with Faults(objects=OBJECTS) as server:
        client = _client(server)
        thread = loop.running()
        with client.batch() as batch, pytest.raises(errors.S3Error, match="ZeroDivisionError"):
            batch.wait(_submit(batch, Buggy))

        assert _fetch(client) == CONTENT
        assert loop.running() is thread


def test_transfer_that_cannot_be_queued_comes_back():
    def wait():
        client = Client(S3Config(key="id", secret="secret", endpoint_url="http://127.0.0.1:9", verify=["no hash"]))
        with pytest.raises(Exception):  # noqa: B017 - any error is better than to wait for ever
            _fetch(client)

    assert in_child(wait) == 0


def test_attempts_may_be_as_good_as_endless():
    class Late(Get):
        """One that has failed for hours already."""

        def request(self, now):
            self.attempt = max(self.attempt, 5000)
            return super().request(now)

    was_reset = threading.Event()

    def reset_and_tell(exchange):
        reset(exchange)
        was_reset.set()

    with Faults([reset_and_tell], objects=OBJECTS) as server, _client(server, attempts=10**6).batch() as batch:
        _submit(batch, Late)
        thread = loop.running()
        assert was_reset.wait(60)
        assert _fetch(_client(server)) == CONTENT

        assert loop.running() is thread


def test_stopped_thread_gives_back_what_is_under_way():
    with Faults(repeat(stall), objects=OBJECTS) as server, _client(server, max_connections=2).batch() as batch:
        transfers = [batch.get("bucket", "key") for _ in range(4)]
        batch.start()
        server.wait_for_requests(2)
        loop.running().stop()

        assert all(transfer.finished for transfer in transfers)
        for transfer in transfers:
            with pytest.raises(errors.S3Error):
                batch.wait(transfer)


def test_garbage_with_transfers_under_way_may_be_collected_in_the_io_thread():
    class Collector(logging.Handler):
        def emit(self, record):
            if threading.current_thread().name == "torch_s3-io":
                gc.collect()
                collected.set()

    class Holder:
        pass

    collected = threading.Event()

    def check():
        gc.disable()
        log = logging.getLogger("torch_s3")
        log.setLevel(logging.DEBUG)
        log.addHandler(Collector())
        with Faults([serve, stall, reset], objects=OBJECTS) as server:
            fs = S3FileSystem(**server.storage_options, max_connections=1)
            holder = Holder()
            holder.itself = holder
            holder.reads = read_ahead(fs, [Read("bucket/key", len(CONTENT))] * 2, window=2)
            assert next(holder.reads) == CONTENT
            server.wait_for_requests(2)  # the second read stalls
            del holder

            assert _fetch(_client(server)) == CONTENT  # its first attempt is reset, and that is logged
            assert collected.is_set()

    assert in_child(check) == 0


# ---------------------------------------------------------------------- fork


def test_child_of_a_parent_that_has_read_reads():
    with Faults(objects=OBJECTS) as server:
        client = _client(server)
        assert _fetch(client) == CONTENT

        def read_in_child():
            assert _fetch(client) == CONTENT

        assert in_child(read_in_child) == 0


def test_grandchild_reads():
    with Faults(objects=OBJECTS) as server:
        client = _client(server)
        assert _fetch(client) == CONTENT

        def read_in_child():
            assert _fetch(client) == CONTENT

        def fork_again():
            assert _fetch(client) == CONTENT
            assert in_child(read_in_child) == 0

        assert in_child(fork_again) == 0


def test_parents_connections_outlive_a_child():
    with Faults(objects=OBJECTS) as server:
        client = _client(server)
        assert _fetch(client) == CONTENT

        def read_in_child():
            assert _fetch(client) == CONTENT

        assert in_child(read_in_child) == 0
        assert _fetch(client) == CONTENT
        assert server.connections == 2  # the parent's and the child's


def test_fork_amid_another_threads_request_disturbs_neither():
    go_on = threading.Event()
    with Faults([hold(go_on)], objects=OBJECTS) as server:
        client = _client(server)
        read = []
        thread = threading.Thread(target=lambda: read.append(_fetch(client)))
        thread.start()
        server.wait_for_requests(1)

        def read_in_child():
            assert _fetch(client) == CONTENT

        assert in_child(read_in_child) == 0
        go_on.set()
        thread.join()

        assert read == [CONTENT]


def test_fork_amid_another_threads_first_call_of_boto3_leaves_the_child_able_to_call(monkeypatch):
    entered, go_on = threading.Event(), threading.Event()
    make = Account.make_client

    def make_slowly(self, **settings):
        if self.pid == os.getpid() == parent:
            entered.set()
            go_on.wait(60)
        return make(self, **settings)

    parent = os.getpid()
    monkeypatch.setattr(Account, "make_client", make_slowly)
    with Faults(objects=OBJECTS) as server:
        fs = S3FileSystem(**server.storage_options)
        thread = threading.Thread(target=fs.info, args=["bucket/key"])
        thread.start()
        assert entered.wait(60)

        def call_in_child():
            assert fs.info("bucket/key")["size"] == len(CONTENT)

        try:
            assert in_child(call_in_child) == 0
        finally:
            go_on.set()
            thread.join()


def test_batch_made_before_fork_is_refused_in_the_child():
    with Faults(objects=OBJECTS) as server, _client(server).batch() as batch:

        def use_in_child():
            fetch = batch.fetch("bucket", "key")
            with pytest.raises(RuntimeError, match="before fork"):
                fetch.result()

        assert in_child(use_in_child) == 0


def test_child_that_leaves_its_parents_batch_does_not_disturb_it():
    go_on = threading.Event()
    with Faults([hold(go_on)], objects=OBJECTS) as server, _client(server).batch() as batch:
        fetch = batch.fetch("bucket", "key")
        batch.start()
        server.wait_for_requests(1)

        def wait_and_close():
            with pytest.raises(RuntimeError, match="before fork"):
                fetch.result()
            batch.close()

        assert in_child(wait_and_close) == 0
        go_on.set()

        assert fetch.result() == CONTENT


# ---------------------------------------------------------------------- the caller


@pytest.mark.timeout(60)
@pytest.mark.parametrize("wait", [lambda batch, get: batch.wait(get), lambda batch, _: batch.wait_any()])
def test_batch_closed_by_another_thread_holds_up_neither(wait):
    with Faults([stall], objects=OBJECTS) as server, ThreadPoolExecutor(1) as other:
        batch = _client(server).batch()
        get = batch.get("bucket", "key")
        batch.start()
        waiting = other.submit(wait, batch, get)
        server.wait_for_requests(1)
        batch.close()

        with pytest.raises(errors.S3Error, match="cancelled"):
            waiting.result()


@pytest.mark.timeout(60)
def test_batch_is_closed_while_its_thread_writes_to_the_log():  # as garbage is, at any time
    handler = logging.StreamHandler(io.StringIO())
    loop.log.addHandler(handler)
    loop.log.setLevel(logging.DEBUG)
    try:
        with Faults(repeat(answer(503)), objects=OBJECTS) as server:
            batch = _client(server, attempts=1000).batch()
            batch.get("bucket", "key")
            handler.acquire()
            try:
                batch.start()
                server.wait_for_requests(3)
                batch.close()
            finally:
                handler.release()
            with pytest.raises(errors.Throttled):
                _fetch(_client(server, attempts=2))
    finally:
        loop.log.removeHandler(handler)
        loop.log.setLevel(logging.NOTSET)

    assert handler.stream.getvalue().count("again in") >= 3  # what could not be said then


@pytest.mark.timeout(60)
def test_failed_thread_hands_back_what_was_held_for_another():
    class Last(Get):
        """Fails the thread at the moment when its caller sleeps for one that the thread hasn't taken yet."""

        def receive(self, head):
            batch._new = [wanted]
            batch.start()
            batch._sink.wanted = wanted
            raise BugError

    with Faults(objects=OBJECTS) as server, _client(server).batch() as batch:
        wanted = batch.get("bucket", "key")
        batch._new = []
        last = _submit(batch, Last)

        assert {*batch._sink.get(), *batch._sink.get()} == {last, wanted}


# ---------------------------------------------------------------------- the end of the process


def test_interrupted_wait_leaves_cleanly():
    text = """
        fs.client.target("bucket", "s3://bucket")
        buffer = bytearray(100)
        try:
            fs.read_into("bucket/key", 0, buffer)
        except KeyboardInterrupt:
            pass
        else:
            raise AssertionError("it was not interrupted")
        del buffer[:]  # nobody holds it any more
        print(len(fs.cat_file("bucket/key")))
    """
    with Faults([stall], objects=OBJECTS) as server, program(text, server.storage_options) as process:
        server.wait_for_requests(1)
        process.send_signal(signal.SIGINT)

        assert process.communicate(timeout=60) == (f"{len(CONTENT)}\n", "")
        assert process.returncode == 0


@pytest.mark.parametrize(
    "text",
    [
        """
        batch = fs.client.batch()
        batch.fetch("bucket", "key")
        batch.start()
        sys.stdin.read()
        """,
        """
        import threading
        threading.Thread(target=fs.cat_file, args=["bucket/key"], daemon=True).start()
        sys.stdin.read()
        """,
    ],
    ids=["of a batch", "of another thread"],
)
def test_process_ends_with_transfers_under_way(text):
    with Faults(repeat(stall), objects=OBJECTS) as server, program(text, server.storage_options) as process:
        server.wait_for_requests(1)
        _, wrote = process.communicate(timeout=60)

        assert process.returncode == 0
        assert "Fatal" not in wrote
