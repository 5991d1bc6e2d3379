"""Many clients, soon made."""

import functools

import botocore.session
import pytest


@pytest.fixture(scope="session", autouse=True)
def _botocore_reads_its_models_once():
    """Each client would parse a megabyte of JSON anew, which takes longer than most of the tests here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.session, "create_loader", functools.lru_cache(botocore.session.create_loader))
        yield
