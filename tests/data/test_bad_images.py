"""What goes wrong with a source or an object is an error of its own that names it, in whatever process it happens."""

import os
import subprocess
import sys
import textwrap

import fsspec
import pytest
import s3fs
from loaders import error_of_worker
from pictures import number_of, picture, tree, write

from torch_s3 import (
    AccessDenied,
    DecodeError,
    EmptyDataset,
    InvalidUri,
    NoCredentials,
    NotFound,
    ObjectChanged,
    S3Error,
    S3ImageDataset,
    TransferFailed,
)
from torch_s3.data import policy

pytestmark = pytest.mark.timeout(60)

NOBODY = "http://127.0.0.1:1"


@pytest.fixture
def no_credentials(s3):
    return {"endpoint_url": s3.endpoint_url, "region": "us-east-1"}


@pytest.fixture
def train(folder, fs):
    """The uri of a prefix with samples 0 … 3, one class each."""
    fs.pipe({f"{folder}/train/{number}/{number}.png": picture(number) for number in range(4)})
    return f"{folder}/train"


# ------------------------------------------------------------------ before anything is read


def test_missing_bucket(s3):
    with pytest.raises(NotFound, match="no such bucket") as caught:
        S3ImageDataset("s3://no-such-bucket-here/train/", storage_options=s3.storage_options)

    assert caught.value.uri == "s3://no-such-bucket-here"
    assert caught.value.bucket == "no-such-bucket-here"


def test_empty_prefix(s3, train):
    with pytest.raises(EmptyDataset, match="nothing is stored here") as caught:
        S3ImageDataset(f"{train}ing/", storage_options=s3.storage_options)

    assert caught.value.uri == f"{train}ing/"


def test_prefix_without_class_folders(s3, train):
    with pytest.raises(EmptyDataset, match="pass labels=") as caught:
        S3ImageDataset(f"{train}/0", storage_options=s3.storage_options)

    assert caught.value.uri == f"{train}/0/"


def test_no_credentials(no_credentials, train):
    with pytest.raises(NoCredentials, match="AWS_ACCESS_KEY_ID") as caught:
        S3ImageDataset(train, storage_options=no_credentials)

    assert caught.value.uri.startswith(train)


def test_wrong_credentials(rclone):
    rclone.create_bucket("refused-listing")
    options = rclone.storage_options | {"secret": "a-wrong-secret"}

    with pytest.raises(AccessDenied, match="credentials") as caught:
        S3ImageDataset("s3://refused-listing/train", storage_options=options)

    assert caught.value.uri.startswith("s3://refused-listing")
    assert "a-wrong-secret" not in str(caught.value)


def test_unreachable_endpoint(s3, train):
    with pytest.raises(TransferFailed, match=NOBODY) as caught:
        S3ImageDataset(train, storage_options=s3.storage_options | {"endpoint_url": NOBODY})

    assert caught.value.uri.startswith(train)


@pytest.mark.parametrize("source", ["bucket/train", ["bucket/a.png"]])
def test_uri_without_scheme(source):
    with pytest.raises(InvalidUri, match="no scheme"):
        S3ImageDataset(source)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"on_error": "ignore"}, "use 'raise', 'skip' or 'replace'"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"lookahead": 0}, "lookahead=0: must be at least 1"),
        ({"lookahead_bytes": 0}, "lookahead_bytes=0: must be at least 1"),
        ({"decode_threads": 0}, "decode_threads=0: must be at least 1"),
        ({"max_errors": 3}, "max_errors is for on_error='skip' or 'replace'"),
        ({"on_error": "skip", "max_errors": 1.5}, "max_errors=1.5: a count from 0, or a share"),
        ({"on_error": "skip", "max_errors": -1}, "max_errors=-1: a count from 0, or a share"),
        ({"rank": 0}, "rank=0 and world_size=None: give both or none"),
        ({"rank": 2, "world_size": 2}, "rank=2 and world_size=2: ranks count from 0"),
        ({"rank": 0, "world_size": 5}, "4 samples for 5 ranks"),
        ({"mode": "CMYK"}, "use 'RGB' or 'GRAY'"),
        ({"labels": "folders"}, "use 'auto', 'folder', a sequence, a callable or None"),
        ({"labels": [1, 2, None, 4]}, "2/2.png: no label, as 1 of 4 have none"),
        ({"labels": [1, 2, 3]}, "3 labels for 4 images"),
        ({"filesystem": fsspec.filesystem("memory")}, "leave them out with filesystem="),
        ({"storage_options": {"endpoint": "http://…"}}, "did you mean 'endpoint_url'"),
    ],
)
def test_wrong_argument(s3, train, wrong, words):
    with pytest.raises(ValueError, match=words):
        S3ImageDataset(train, **{"storage_options": s3.storage_options} | wrong)


def test_negative_epoch(s3, train):
    with pytest.raises(ValueError, match="epoch=-1: count from 0"):
        S3ImageDataset(train, storage_options=s3.storage_options).set_epoch(-1)


# ------------------------------------------------------------------ while reading, in the process or in a worker


def _no_such_bucket(**given):
    uri = "s3://no-such-bucket-here/1.png"
    return S3ImageDataset([uri], labels=None, storage_options=given["s3"].storage_options), "s3://no-such-bucket-here"


def _no_such_key(*, s3, train, **_):
    return S3ImageDataset([f"{train}/none.png"], labels=None, storage_options=s3.storage_options), f"{train}/none.png"


def _no_key(*, s3, **_):
    return S3ImageDataset(["s3://images"], labels=None, storage_options=s3.storage_options), "s3://images"


def _no_credentials_to_read(*, train, request, **_):
    options = request.getfixturevalue("no_credentials")
    return S3ImageDataset([f"{train}/0/0.png"], labels=None, storage_options=options), f"{train}/0/0.png"


def _refused(*, request, **_):
    rclone = request.getfixturevalue("rclone")
    (rclone.root / "refused-reading").mkdir(exist_ok=True)
    (rclone.root / "refused-reading" / "1.png").write_bytes(picture(1))
    options = rclone.storage_options | {"secret": "a-wrong-secret"}
    uri = "s3://refused-reading/1.png"
    return S3ImageDataset([uri], labels=None, storage_options=options), uri


def _unreachable(*, s3, train, **_):
    options = s3.storage_options | {"endpoint_url": NOBODY, "attempts": 2}
    return S3ImageDataset([f"{train}/0/0.png"], labels=None, storage_options=options), f"{train}/0/0.png"


def _no_image(*, s3, fs, train, **_):
    fs.pipe_file(f"{train}/2/2.png", b"no image at all")
    return S3ImageDataset(train, storage_options=s3.storage_options), f"{train}/2/2.png"


def _oddly_named(*, s3, fs, train, **_):
    uri = f'{train}/2/it\'s: "odd" bytes 0-9: ü\t(attempt 3 of 5).png'
    fs.pipe_file(uri, b"no image at all")
    return S3ImageDataset(train, storage_options=s3.storage_options), uri


def _deleted(*, s3, fs, train, **_):
    dataset = S3ImageDataset(train, storage_options=s3.storage_options)
    fs.rm_file(f"{train}/1/1.png")
    return dataset, f"{train}/1/1.png"


def _overwritten(*, s3, fs, train, **_):
    dataset = S3ImageDataset(train, storage_options=s3.storage_options)
    fs.pipe_file(f"{train}/1/1.png", picture(1) + b"more")
    return dataset, f"{train}/1/1.png"


def _overwritten_in_its_size(*, s3, fs, train, **_):
    dataset = S3ImageDataset(train, storage_options=s3.storage_options)
    fs.pipe_file(f"{train}/1/1.png", picture(1)[::-1])
    return dataset, f"{train}/1/1.png"


def _gone_from_s3fs(*, s3, fs, train, **_):
    dataset = S3ImageDataset(train, filesystem=s3fs.S3FileSystem(**s3.storage_options))
    fs.rm_file(f"{train}/1/1.png")
    return dataset, f"{train}/1/1.png"


def _gone_from_disk(*, tmp_path, **_):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(picture(1))
    dataset = S3ImageDataset(f"file://{tmp_path}")
    (tmp_path / "a" / "1.png").unlink()
    return dataset, f"file://{tmp_path}/a/1.png"


def _grown_on_disk(*, tmp_path, **_):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(picture(1))
    dataset = S3ImageDataset(f"file://{tmp_path}")
    (tmp_path / "a" / "1.png").write_bytes(picture(1) + b"more")
    return dataset, f"file://{tmp_path}/a/1.png"


KINDS = {
    _no_such_bucket: NotFound,
    _no_such_key: NotFound,
    _no_key: InvalidUri,
    _no_credentials_to_read: NoCredentials,
    _refused: AccessDenied,
    _unreachable: TransferFailed,
    _no_image: DecodeError,
    _oddly_named: DecodeError,
    _deleted: NotFound,
    _overwritten: ObjectChanged,
    _overwritten_in_its_size: ObjectChanged,
    _gone_from_s3fs: NotFound,
    _gone_from_disk: NotFound,
    _grown_on_disk: ObjectChanged,
}


@pytest.fixture(params=KINDS, ids=lambda make: make.__name__.strip("_").replace("_", " "))
def broken(request, s3, fs, train, tmp_path):
    """A dataset that can't be read, the type of the error and the uri it is to name."""
    dataset, uri = request.param(request=request, s3=s3, fs=fs, train=train, tmp_path=tmp_path)
    return dataset, KINDS[request.param], uri


def test_error_names_the_object(broken):
    dataset, kind, uri = broken

    with pytest.raises(S3Error) as caught:
        list(dataset)

    assert type(caught.value) is kind
    assert caught.value.uri == uri
    assert str(caught.value).startswith((uri, repr(uri)))
    assert "a-wrong-secret" not in str(caught.value)


def test_error_of_a_worker_is_that_of_the_process(broken):
    dataset, kind, uri = broken
    with pytest.raises(S3Error) as direct:
        list(dataset)

    error = error_of_worker(dataset)

    assert type(error) is kind
    assert error.uri == uri
    assert error.range == direct.value.range
    assert error.attempts == direct.value.attempts
    assert str(error).startswith((uri, repr(uri)))
    assert str(error).endswith("[DataLoader worker process 0]")
    assert "\n" not in str(error)
    assert "Traceback" in error.worker_traceback
    assert "a-wrong-secret" not in error.worker_traceback


def run(program, *arguments):
    """Run a program as a user does, and return what it writes to stderr, in lines."""
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    return done.stderr.splitlines()


def test_printed_error_of_a_source_is_short(s3):
    lines = run(
        """
        import sys
        from torch_s3 import S3ImageDataset
        S3ImageDataset("s3://no-such-bucket-here/train/", storage_options={
            "key": "testing", "secret": "testing", "endpoint_url": sys.argv[1], "region": "us-east-1"
        })
        """,
        s3.endpoint_url,
    )

    assert lines[-1] == "torch_s3.errors.NotFound: s3://no-such-bucket-here: no such bucket"
    assert len(lines) < 30
    assert not any("botocore" in line for line in lines)


def test_printed_error_of_a_worker_is_short(s3, fs, train):
    fs.pipe_file(f"{train}/2/2.png", b"no image at all")
    lines = run(
        """
        import sys
        from torch.utils.data import DataLoader
        from torch_s3 import S3ImageDataset
        dataset = S3ImageDataset(sys.argv[2], storage_options={
            "key": "testing", "secret": "testing", "endpoint_url": sys.argv[1], "region": "us-east-1"
        })
        for batch in DataLoader(dataset, num_workers=2):
            pass
        """,
        s3.endpoint_url,
        train,
    )

    assert lines[-1].startswith(f"torch_s3.errors.DecodeError: {train}/2/2.png: not an image")
    assert len(lines) < 30


# ------------------------------------------------------------------ skipping


@pytest.mark.parametrize("make", [_refused, _no_credentials_to_read, _unreachable, _no_key], ids=lambda m: m.__name__)
def test_what_is_not_about_one_object_is_not_skipped(make, request, s3, fs, train):
    dataset, _ = make(request=request, s3=s3, fs=fs, train=train)
    dataset._on_error, dataset._record = "skip", policy.Record()

    with pytest.raises(KINDS[make]):
        list(dataset)


# ------------------------------------------------------------------ what the caller's functions raise


def raise_for_two(image):
    if number_of(image) == 2:
        raise ZeroDivisionError("by what?")
    return image


def raise_for_label_two(label):
    if str(label)[-5:] in ("2", "2.png"):
        raise ZeroDivisionError("by what?")
    return label


@pytest.mark.parametrize(
    "functions",
    [{"transform": raise_for_two}, {"target_transform": raise_for_label_two}, {"labels": raise_for_label_two}],
    ids=lambda functions: next(iter(functions)),
)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_raising_function_is_shown_with_its_sample(s3, train, functions, on_error):
    dataset = S3ImageDataset(train, on_error=on_error, storage_options=s3.storage_options, **functions)

    with pytest.raises(ZeroDivisionError, match="by what") as caught:
        list(dataset)

    assert caught.value.__notes__ == [f"while transforming {train}/2/2.png"]


def test_raising_function_in_a_worker_is_shown_with_its_sample(s3, train):
    dataset = S3ImageDataset(train, transform=raise_for_two, storage_options=s3.storage_options)

    error = error_of_worker(dataset)

    assert type(error) is ZeroDivisionError
    assert f"while transforming {train}/2/2.png" in str(error)


# ------------------------------------------------------------------ other filesystems


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(S3Error, match=r"nothing is stored here|no such") as caught:
        S3ImageDataset(f"file://{tmp_path}/train")

    assert caught.value.uri.startswith(f"file://{tmp_path}/train")


def test_broken_image_on_disk(tmp_path):
    write(tree(), tmp_path)
    (tmp_path / "ant" / "broken.png").write_bytes(os.urandom(100))

    with pytest.raises(DecodeError) as caught:
        list(S3ImageDataset(f"file://{tmp_path}"))

    assert caught.value.uri == f"file://{tmp_path}/ant/broken.png"
