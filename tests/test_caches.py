"""Under fsspec's caching filesystems."""

import os
import uuid

import fsspec
import pytest

from torch_s3 import S3FileSystem, errors

CONTENT = os.urandom(700_001)
pytestmark = [  # fsspec's blockcache leaves its file to the garbage collector
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(params=["moto", "rclone"])
def options(request, registered):
    return request.getfixturevalue("s3" if request.param == "moto" else "rclone").storage_options


@pytest.fixture
def fs(options):
    return S3FileSystem(**options)


@pytest.fixture
def path(fs):
    bucket = str(uuid.uuid4())
    fs.mkdir(bucket)
    fs.pipe_file(f"{bucket}/key", CONTENT)
    return f"{bucket}/key"


@pytest.mark.parametrize("cache", ["blockcache", "filecache", "simplecache"])
def test_object_is_read_through_a_cache(options, path, tmp_path, cache):
    settings = {cache: {"cache_storage": str(tmp_path)}, "s3": options}
    for _ in "12":
        with fsspec.open(f"{cache}::s3://{path}", **settings) as file:
            file.seek(300_000)
            assert file.read(1000) == CONTENT[300_000:301_000]
            file.seek(-5, 2)
            assert file.read() == CONTENT[-5:]
            file.seek(0)
            assert file.read() == CONTENT


@pytest.mark.parametrize("cache", ["filecache", "simplecache"])
def test_object_is_written_through_a_cache(options, fs, path, tmp_path, cache):
    settings = {cache: {"cache_storage": str(tmp_path)}, "s3": options}
    with fsspec.open(f"{cache}::s3://{path}-new", "wb", **settings) as file:
        file.write(CONTENT)

    assert fs.cat(f"{path}-new") == CONTENT


def test_block_that_was_read_is_asked_for_once(fs, path, tmp_path):
    cached = fsspec.filesystem("blockcache", fs=fs, cache_storage=str(tmp_path))
    with cached.open(path, block_size=100_000) as file:
        file.seek(250_000)
        file.read(1000)
        before = fs.stats()
        file.seek(250_000)

        assert file.read(1000) == CONTENT[250_000:251_000]
        assert fs.stats()["requests"] == before["requests"]
        assert before["bytes_received"] < len(CONTENT)


def test_block_of_an_overwritten_object_is_an_error(fs, path, tmp_path):
    with fs.open(path, block_size=100_000, cache_type="none") as file:
        assert file.read(10) == CONTENT[:10]
        fs.pipe_file(path, CONTENT[::-1])

        with pytest.raises(errors.ObjectChanged):
            file.read(10)


def test_changed_object_is_got_anew(fs, path, tmp_path):
    cached = fsspec.filesystem("filecache", fs=fs, cache_storage=str(tmp_path), check_files=True)
    assert cached.cat_file(path) == CONTENT
    fs.pipe_file(path, b"other")

    assert cached.cat_file(path) == b"other"
