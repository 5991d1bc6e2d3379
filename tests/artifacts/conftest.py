import pytest

from torch_s3 import S3FileSystem


@pytest.fixture
def put(s3, bucket):
    """Stores bytes and gives their uri, and what to read it with."""

    def store(content, name="model"):
        S3FileSystem(**s3.storage_options).pipe_file(f"{bucket}/{name}", content)
        return f"{bucket}/{name}", {"storage_options": s3.storage_options}

    return store
