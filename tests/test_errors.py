import copy
import errno
import pickle

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from torch._utils import ExceptionWrapper

import torch_s3
from torch_s3 import errors
from torch_s3.transport.failures import error_for, given_up
from torch_s3.transport.retry import Cause

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.S3Error)]
URIS = st.one_of(
    st.text(min_size=1, max_size=40),
    st.text("ab :'\"\\\n\r\t\x85\u2028/0123456789-(", min_size=1, max_size=20),
).map(lambda rest: f"s3://{rest}")
WORDS = st.text(max_size=60)
RANGES = st.none() | st.tuples(st.integers(0, 10**13), st.integers(1, 10**13)).map(lambda ends: (ends[0], sum(ends)))


def _attributes(error):
    return type(error), error.uri, error.range, error.attempts, error.bucket, error.key


def _in_worker(error):
    """What becomes of it on its way from a DataLoader worker to the main process."""
    try:
        try:
            raise error
        except errors.S3Error:
            wrapper = ExceptionWrapper(where="in DataLoader worker process 3")
        pickle.loads(pickle.dumps(wrapper)).reraise()
    except errors.S3Error as arrived:
        return arrived


# ---------------------------------------------------------------------- what is said


def test_message_starts_with_the_object():
    error = errors.TransferFailed("connection reset", uri="s3://b/k", range=(0, 8388608), attempts=3)

    assert str(error) == "s3://b/k bytes 0-8388607: connection reset"
    assert (error.uri, error.range, error.attempts) == ("s3://b/k", (0, 8388608), 3)


def test_message_without_an_object_is_just_that():
    assert str(errors.S3Error("no such thing")) == "no such thing"


def test_message_is_one_line():
    error = errors.S3Error("one\ntwo\r\nthree", uri="s3://b/k\n\u2028l")

    assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize(
    ("uri", "bucket", "key"),
    [
        ("s3://b/k", "b", "k"),
        ("s3://b/k/l m", "b", "k/l m"),
        ("s3://b/", "b", None),
        ("s3://b", "b", None),
        ("file:///f", None, None),
        (None, None, None),
    ],
)
def test_bucket_and_key_are_the_uris(uri, bucket, key):
    error = errors.NotFound("gone", uri=uri)

    assert (error.bucket, error.key) == (bucket, key)


def test_given_up_says_how_often_and_how_long():
    error = given_up(Cause.CONNECTION, "Connection reset by peer", 3, 5, 12.44, uri="s3://b/k", range=(0, 10))

    assert str(error) == "s3://b/k bytes 0-9: Connection reset by peer (attempt 3 of 5, 12.4 s)"
    assert error.attempts == 3


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (Cause.CONNECTION, errors.TransferFailed),
        (Cause.SERVER, errors.TransferFailed),
        (Cause.TIMEOUT, errors.DeadlineExceeded),
        (Cause.THROTTLE, errors.Throttled),
        (Cause.INTEGRITY, errors.IntegrityError),
    ],
)
def test_given_up_is_of_its_causes_type(cause, kind):
    assert type(given_up(cause, "?", 1, 1, 0.0, uri="s3://b/k", range=None)) is kind


@given(st.integers(100, 599), WORDS, WORDS, URIS, RANGES, st.none() | WORDS)
def test_every_answer_is_a_typed_error_about_its_object(status, code, words, uri, range, region):
    error = error_for(status, code, words, uri=uri, range=range, region=region)

    assert isinstance(error, errors.S3Error)
    assert error.uri == uri or code == "NoSuchBucket"


# ---------------------------------------------------------------------- as what it can be caught


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.S3Error, OSError),
        (errors.InvalidUri, ValueError),
        (errors.NotFound, FileNotFoundError),
        (errors.AlreadyExists, FileExistsError),
        (errors.AccessDenied, PermissionError),
        (errors.NoCredentials, errors.AccessDenied),
        (errors.CredentialsExpired, errors.AccessDenied),
        (errors.TransferFailed, ConnectionError),
        (errors.DeadlineExceeded, TimeoutError),
        (errors.DeadlineExceeded, errors.TransferFailed),
        (errors.EmptyDataset, ValueError),
        (errors.DecodeError, ValueError),
        (errors.CheckpointError, ValueError),
        (errors.UnsafeCheckpoint, errors.CheckpointError),
    ],
)
def test_error_is_the_builtin_that_callers_expect(kind, builtin):
    assert issubclass(kind, builtin)


@pytest.mark.parametrize("kind", KINDS)
def test_error_is_public(kind):
    assert getattr(torch_s3, kind.__name__) is kind
    assert kind.__name__ in torch_s3.__all__


@pytest.mark.parametrize("kind", KINDS)
def test_error_is_drawn_in_the_tree_on_a_line_of_its_own(kind):
    lines = [line for line in errors.__doc__.splitlines() if f" {kind.__name__} " in line]

    assert len(lines) == 1
    assert sum(f" {other.__name__} " in lines[0] for other in KINDS) == 1


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        (errors.S3Error, None),
        (errors.InvalidUri, errno.EINVAL),
        (errors.NotFound, errno.ENOENT),
        (errors.AlreadyExists, errno.EEXIST),
        (errors.AccessDenied, errno.EACCES),
        (errors.NoCredentials, errno.EACCES),
        (errors.Throttled, errno.EBUSY),
        (errors.TransferFailed, errno.ECONNRESET),
        (errors.DeadlineExceeded, errno.ETIMEDOUT),
        (errors.ObjectChanged, errno.ESTALE),
        (errors.IntegrityError, errno.EIO),
        (errors.DecodeError, None),
    ],
)
def test_error_has_the_number_and_name_of_a_files(kind, number):
    error = kind("message", uri="s3://b/k")

    for one in (error, pickle.loads(pickle.dumps(error)), copy.copy(error), _in_worker(error)):
        assert (one.errno, one.filename) == (number, "s3://b/k")
        assert str(one).startswith("s3://b/k: message")


# ---------------------------------------------------------------------- on the way to another process


@given(st.sampled_from(KINDS), st.text(max_size=60), st.none() | URIS, RANGES, st.none() | st.integers(1, 99))
def test_error_survives_pickling(kind, message, uri, range, attempts):
    error = kind(message, uri=uri, range=range, attempts=attempts)
    error.worker_traceback = "as it was"

    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert _attributes(again) == _attributes(error)
        assert (str(again), again.args, again.worker_traceback) == (str(error), error.args, "as it was")


@given(st.sampled_from(KINDS), WORDS, URIS, RANGES)
@example(errors.S3Error, "message", "s3://b/k (attempt 2 of 3", None)
@example(errors.S3Error, "other: message", "s3://b/k:", (1, 2))
@example(errors.S3Error, "message", "s3://b/k bytes 1-2", None)
@example(errors.S3Error, "message\ntorch_s3.errors.S3Error: s3://b/other: message", "s3://b/k", None)
@example(errors.InvalidUri, "message", "", None)
def test_error_survives_the_way_from_a_dataloader_worker(kind, message, uri, range):
    error = kind(message, uri=uri, range=range)
    arrived = _in_worker(error)

    assert _attributes(arrived) == _attributes(error)
    assert str(arrived) == f"{error} [DataLoader worker process 3]"
    assert arrived.worker_traceback.startswith(f"Caught {kind.__name__} in DataLoader worker process 3")


@given(st.sampled_from(Cause), URIS, RANGES, st.integers(1, 99), WORDS)
def test_attempts_survive_the_way_from_a_dataloader_worker(cause, uri, range, attempt, words):
    error = given_up(cause, OSError(words), attempt, 99, 1.0, uri=uri, range=range)

    assert _attributes(_in_worker(error)) == _attributes(error)


def test_error_with_a_cause_survives_the_way_from_a_dataloader_worker():
    error = errors.NotFound("gone", uri="s3://b/k")
    try:
        raise errors.NotFound("other", uri="s3://b/other")
    except errors.NotFound as other:
        error.__cause__ = other

    assert _in_worker(error).uri == "s3://b/k"


def test_error_with_a_note_survives_the_way_from_a_dataloader_worker():
    error = errors.NotFound("gone", uri="s3://b/k")
    error.add_note("while reading\nthe manifest")

    assert (_in_worker(error).uri, str(_in_worker(error))) == ("s3://b/k", f"{error} [DataLoader worker process 3]")


class OurNotFound(errors.NotFound):
    """As a user may derive it."""


def test_users_own_error_survives_the_way_from_a_dataloader_worker():
    assert _attributes(_in_worker(OurNotFound("gone", uri="s3://b/k"))) == _attributes(
        OurNotFound("gone", uri="s3://b/k")
    )
