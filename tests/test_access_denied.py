"""A refusal names the permission that was missing, where S3 says it, and else the one that the call needs."""

import pickle
from itertools import repeat

import pytest
from faults import Faults, aim, answer, refusal
from torch._utils import ExceptionWrapper

from torch_s3 import S3FileSystem, errors, load_checkpoint, save_checkpoint
from torch_s3.transport.failures import error_for
from torch_s3.uris import translated

MIB = 1024 * 1024
WHO = "arn:aws:sts::111122223333:assumed-role/training/run-7"
CALLS = {
    "get": (lambda fs: fs.cat_file("s3://bucket/key"), "GetObject", "s3:GetObject"),
    "head": (lambda fs: fs.info("s3://bucket/key"), "HeadObject", "s3:GetObject"),
    "put": (lambda fs: fs.pipe_file("s3://bucket/key", b"x"), "PutObject", "s3:PutObject"),
    "list": (lambda fs: fs.find("s3://bucket/run/"), "ListObjectsV2", "s3:ListBucket"),
    "create": (lambda fs: fs.pipe_file("s3://bucket/key", bytes(12 * MIB)), "CreateMultipartUpload", "s3:PutObject"),
    "part": (lambda fs: fs.pipe_file("s3://bucket/key", bytes(12 * MIB)), "UploadPart", "s3:PutObject"),
    "complete": (
        lambda fs: fs.pipe_file("s3://bucket/key", bytes(12 * MIB)),
        "CompleteMultipartUpload",
        "s3:PutObject",
    ),
    "delete": (lambda fs: fs.rm_file("s3://bucket/key"), "DeleteObject", "s3:DeleteObject"),
}


def _words(action, on="arn:aws:s3:::bucket/key"):
    """As S3 says it: "Troubleshoot access denied (403 Forbidden) errors in Amazon S3", Amazon S3 User Guide."""
    return (
        f"User: {WHO} is not authorized to perform: {action} on resource: &quot;{on}&quot; "
        f"because no identity-based policy allows the {action} action"
    )


def _deny(message):
    def behave(exchange):
        exchange.read_body()
        said = refusal(403, "AccessDenied", message)
        exchange.send(said.head, b"" if exchange.method == "HEAD" else said.body)

    return behave


@pytest.fixture
def refused(s3):
    """What an operation raises where one kind of its requests is refused."""

    def attempt(kind, behaviour):
        s3.create_bucket("bucket")
        S3FileSystem(**s3.storage_options).pipe_file("s3://bucket/key", b"content")
        with Faults(repeat(aim(kind, behaviour)), upstream=s3.endpoint_url) as proxy:
            fs = S3FileSystem(**s3.storage_options | {"endpoint_url": proxy.endpoint_url})
            with pytest.raises(errors.AccessDenied) as caught:
                CALLS[kind][0](fs)
        return caught.value

    return attempt


@pytest.mark.parametrize("kind", [kind for kind in CALLS if kind != "head"])
def test_missing_permission_is_named_as_s3_names_it(refused, kind):
    action = CALLS[kind][2]

    error = refused(kind, _deny(_words(action)))

    assert error.action == action
    why = f"because no identity-based policy allows the {action} action: have it allowed"
    assert str(error).endswith(f": AccessDenied: User: {WHO} is not authorized to perform: {action} {why}")
    assert error.uri.startswith("s3://bucket")


@pytest.mark.parametrize("kind", CALLS)
def test_permission_that_the_call_needs_is_said_where_s3_names_none(refused, kind):
    _, operation, action = CALLS[kind]

    error = refused(kind, _deny("Access Denied"))

    assert error.action is None
    assert f": check the credentials and their permissions ({operation} needs {action}" in str(error)


@pytest.mark.parametrize("whose", ["no body", "another server's"])
def test_refusal_without_a_code_says_what_the_call_needs(refused, whose):
    behave = answer(403) if whose == "no body" else answer(403, "Forbidden")

    assert "(GetObject needs s3:GetObject)" in str(refused("get", behave))


def test_refusal_of_an_object_that_may_not_be_there_says_so(refused):
    error = refused("get", _deny(_words("s3:ListBucket", on="arn:aws:s3:::bucket")))

    assert error.action == "s3:ListBucket"
    assert str(error).endswith("have it allowed; S3 asks for that where there is no such object")


def test_missing_permission_for_a_key_of_kms_is_named_with_the_key(refused):
    key = "arn:aws:kms:us-east-1:111122223333:key/1234abcd"

    error = refused("get", _deny(_words("kms:Decrypt", on=key)))

    assert error.action == "kms:Decrypt"
    assert f"perform: kms:Decrypt on resource: &quot;{key}&quot; because".replace("&quot;", '"') in str(error)


@pytest.mark.parametrize("policy", ["an identity-based policy", "a service control policy", "a VPC endpoint policy"])
def test_explicit_denial_is_to_be_lifted_since_allowing_does_not_help(refused, policy):
    said = _words("s3:GetObject").partition(" because ")[0]

    error = refused("get", _deny(f"{said} with an explicit deny in {policy}"))

    assert error.action == "s3:GetObject"
    assert str(error).endswith(f"with an explicit deny in {policy}: have that denial lifted")


def test_archived_object_is_no_matter_of_permissions():
    error = error_for(403, "InvalidObjectState", "InvalidObjectState: not valid", uri="s3://b/k", operation="GetObject")

    assert not isinstance(error, errors.AccessDenied)
    assert "it is archived: restore it" in str(error)


def test_refusal_of_the_credentials_themselves_names_no_permission(refused):
    error = refused("get", answer(403, "SignatureDoesNotMatch"))

    assert error.action is None
    assert "needs" not in str(error)


def test_missing_permission_to_delete_some_of_many_is_named(s3):
    def deny(exchange):
        exchange.read_body()
        said = f"<Error><Key>b</Key><Code>AccessDenied</Code><Message>{_words('s3:DeleteObject')}</Message></Error>"
        right = refusal(200, "")._replace(body=f"<DeleteResult>{said}</DeleteResult>".encode())
        right.fields["Content-Length"] = str(len(right.body))
        exchange.send(right.head, right.body)

    bucket = s3.create_bucket("bucket")
    with Faults(repeat(aim("post", deny)), upstream=s3.endpoint_url) as proxy:
        fs = S3FileSystem(**s3.storage_options | {"endpoint_url": proxy.endpoint_url})
        fs.pipe({f"{bucket}/a": b"", f"{bucket}/b": b""})
        with pytest.raises(errors.AccessDenied, match=r"^s3://bucket/b: not deleted: ") as caught:
            fs.rm([f"{bucket}/a", f"{bucket}/b"])

    assert caught.value.action == "s3:DeleteObject"


def test_missing_permission_is_named_by_checkpoints(s3):
    script = repeat(_deny(_words("s3:GetObject")))
    with Faults(script) as server, pytest.raises(errors.AccessDenied) as caught:
        load_checkpoint("s3://bucket/key.pt", storage_options=server.storage_options)
    assert caught.value.action == "s3:GetObject"

    script = repeat(_deny(_words("s3:PutObject")))
    with Faults(script) as server, pytest.raises(errors.AccessDenied) as caught:
        save_checkpoint({"a": 1}, "s3://bucket/key.pt", storage_options=server.storage_options)
    assert caught.value.action == "s3:PutObject"


def test_missing_permission_survives_pickling_and_the_way_from_a_worker():
    error = errors.AccessDenied("User: a is not authorized to perform: s3:GetObject because", uri="s3://b/k")
    try:
        try:
            raise error
        except errors.AccessDenied:
            wrapper = ExceptionWrapper(where="in DataLoader worker process 3")
        wrapper.reraise()
    except errors.AccessDenied as caught:
        arrived = caught

    assert pickle.loads(pickle.dumps(error)).action == arrived.action == "s3:GetObject"


def test_key_that_reads_like_a_refusal_is_none():
    uri = "s3://b/a is not authorized to perform: s3:Nothing"

    assert errors.AccessDenied("no", uri=uri).action is None


def test_missing_permission_is_named_by_other_filesystems_too():
    with pytest.raises(errors.AccessDenied) as caught, translated("s3://b/k"):
        raise PermissionError(f"User: {WHO} is not authorized to perform: s3:GetObject on resource: x because")

    assert caught.value.action == "s3:GetObject"
