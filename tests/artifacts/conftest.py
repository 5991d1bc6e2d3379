"""Buckets that are made quickly."""

import functools
import uuid

import boto3
import botocore.session
import pytest


@pytest.fixture(scope="session", autouse=True)
def _botocore_reads_its_models_once():
    """Each client would parse a megabyte of JSON anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.session, "create_loader", functools.lru_cache(botocore.session.create_loader))
        yield


@pytest.fixture(scope="session")
def client(s3):
    """boto3's, to `s3`."""
    options = s3.storage_options
    session = boto3.Session(options["key"], options["secret"], **options["client_kwargs"])
    return session.client("s3", endpoint_url=options["endpoint_url"])


@pytest.fixture
def bucket(client):
    """As everywhere in the tests, but from one boto3 client: to make one takes longer than most tests here."""
    name = str(uuid.uuid4())
    client.create_bucket(Bucket=name)
    return f"s3://{name}"
