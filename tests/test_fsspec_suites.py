"""fsspec's own tests of what any filesystem does."""

import os
import uuid

import pytest
from fsspec.tests import abstract

from torch_s3 import S3FileSystem


@pytest.fixture(scope="module", params=["moto", "rclone"])
def place(request):
    """A filesystem and a bucket; one for all tests, since each filesystem starts a boto3 client."""
    server = request.getfixturevalue({"moto": "s3", "rclone": "rclone_alone"}[request.param])
    fs = S3FileSystem(**server.storage_options)
    bucket = f"suite-{uuid.uuid4()}"
    fs.mkdir(bucket)
    return fs, bucket


class Fixtures(abstract.AbstractFixtures):
    @pytest.fixture
    def fs(self, place):
        return place[0]

    @pytest.fixture
    def fs_path(self, place):
        return f"{place[1]}/{os.urandom(8).hex()}"

    @pytest.fixture
    def fs_join(self):
        return lambda *parts: "/".join(parts)

    @pytest.fixture
    def supports_empty_directories(self):
        return False


class TestCopy(Fixtures, abstract.AbstractCopyTests):
    pass


class TestGet(Fixtures, abstract.AbstractGetTests):
    pass


class TestOpen(Fixtures, abstract.AbstractOpenTests):
    pass


class TestPipe(Fixtures, abstract.AbstractPipeTests):
    pass


class TestPut(Fixtures, abstract.AbstractPutTests):
    pass
