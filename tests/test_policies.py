"""The policies in docs/access.md allow what the calls do, and no more than that."""

import json
import re
from itertools import repeat
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from faults import Faults, refusal

import torch_s3
from torch_s3 import S3FileSystem, errors
from torch_s3.artifacts import open_artifact

DOCS = (Path(__file__).parent.parent / "docs" / "access.md").read_text()
LARGE = {"weight": torch.zeros(6 << 20)}  # an upload by parts


def _allowed(heading):
    """The actions that the policy under a heading allows, sorted."""
    policy = json.loads(re.search(f"### {heading}\n.*?```json\n(.*?)```", DOCS, re.DOTALL)[1])
    actions = [statement["Action"] for statement in policy["Statement"]]
    return {each for some in actions for each in ([some] if isinstance(some, str) else some)}


def _actions(exchange):
    """What S3 asks of who makes a request."""
    in_bucket = urlsplit(exchange.path).path.strip("/").count("/") == 0
    if exchange.kind in ("get", "head"):
        return "s3:ListBucket" if in_bucket else "s3:GetObject"
    return {
        "list": "s3:ListBucket",
        "uploads": "s3:ListBucketMultipartUploads",
        "abort": "s3:AbortMultipartUpload",
        "delete": "s3:DeleteObject",
        "post": "s3:DeleteObject",  # of many
    }.get(exchange.kind, "s3:PutObject")


def _enforce(allowed, asked):
    """S3, for one whom the policy allows just this."""

    def behave(exchange):
        action = _actions(exchange)
        asked.add(action)
        said = exchange.answer() if action in allowed else None
        if said is None or (said.status == 404 and exchange.kind in ("get", "head") and "s3:ListBucket" not in allowed):
            said = refusal(403, "AccessDenied", f"User: me is not authorized to perform: {action} because")
        exchange.send(said.head, b"" if exchange.method == "HEAD" else said.body)

    return behave


def _read_named(options):
    torch_s3.load_checkpoint("s3://policies/run-1/a.pt", storage_options=options)
    torch_s3.inspect_checkpoint("s3://policies/run-1/a.pt", storage_options=options)
    open_artifact("s3://policies/run-1/a.pt", storage_options=options).close()
    dataset = torch_s3.S3IterableDataset(["s3://policies/run-1/data/0"], storage_options=options)
    assert len(list(dataset)) == 1
    with S3FileSystem(**options).open("s3://policies/run-1/a.pt") as file:
        file.read()


def _read_a_prefix(options):
    assert len(list(torch_s3.S3IterableDataset("s3://policies/run-1/data/", storage_options=options))) == 3
    assert len(S3FileSystem(**options).find("s3://policies/run-1/data/")) == 3


def _save(options):
    for state in ({"step": 1}, LARGE):
        torch_s3.save_checkpoint(state, "s3://policies/run-1/new.pt", storage_options=options)
    S3FileSystem(**options).pipe_file("s3://policies/run-1/new", b"x")


def _keep(options):
    manager = torch_s3.CheckpointManager("s3://policies/run-1", keep_last=1, storage_options=options)
    for step in range(3):
        manager.save(step, LARGE)
    manager.load()


CALLS = {
    "Reading objects that you name": _read_named,
    "Reading what is under a prefix": _read_a_prefix,
    "Saving": _save,
    "A run's checkpoints": _keep,
}


@pytest.fixture
def stored(s3):
    bucket = s3.create_bucket("policies")
    fs = S3FileSystem(**s3.storage_options)
    fs.pipe({f"{bucket}/run-1/data/{number}": b"content" for number in range(3)})
    torch_s3.save_checkpoint({"step": 1}, f"{bucket}/run-1/a.pt", storage_options=s3.storage_options)
    yield
    fs.rm(bucket, recursive=True)


@pytest.mark.parametrize("heading", CALLS)
def test_policy_is_enough_and_no_more(s3, stored, heading):
    allowed, asked = _allowed(heading), set()
    with Faults(repeat(_enforce(allowed, asked)), upstream=s3.endpoint_url) as server:
        CALLS[heading](s3.storage_options | {"endpoint_url": server.endpoint_url})

    assert asked == allowed - {"s3:AbortMultipartUpload"}  # which is for when something fails


@pytest.mark.parametrize("heading", CALLS)
def test_permission_that_is_taken_away_is_named(s3, stored, heading):
    missing = "s3:PutObject" if heading == "Saving" else "s3:GetObject"  # what can't be read back is saved all the same
    allowed = _allowed(heading) - {missing}
    with (
        Faults(repeat(_enforce(allowed, set())), upstream=s3.endpoint_url) as server,
        pytest.raises(errors.AccessDenied) as caught,
    ):
        CALLS[heading](s3.storage_options | {"endpoint_url": server.endpoint_url})

    assert caught.value.action == missing or f"needs {missing}" in str(caught.value)
