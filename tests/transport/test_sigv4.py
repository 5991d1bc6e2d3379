import string
from base64 import b64encode
from datetime import UTC, datetime
from queue import SimpleQueue
from urllib.parse import unquote

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as BotocoreCredentials
from hypothesis import given
from hypothesis import strategies as st

from torch_s3.config import S3Config
from torch_s3.transport import sigv4
from torch_s3.transport.fields import headers_for
from torch_s3.transport.objects import Get, Put
from torch_s3.transport.sigv4 import Credentials
from torch_s3.transport.target import Origin, Patience, Target

KEYS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=60)
WORDS = st.text(string.ascii_letters + string.digits + "/+=-_", min_size=1, max_size=40)
VALUES = st.text(string.printable[:-6], max_size=40).map(lambda value: " ".join(value.split()))
REGIONS = st.sampled_from(["us-east-1", "eu-central-1", "auto"])
CREDENTIALS = st.builds(Credentials, WORDS, WORDS, st.none() | WORDS)


def _botocore_signs(method, path, query, headers, credentials, region):
    """The Authorization field that botocore would give this request."""
    url = f"https://{headers['host']}{path}?{query}"
    request = AWSRequest(method, url, {name: value for name, value in headers.items() if name != "host"})
    request.context["timestamp"] = headers["x-amz-date"]
    signer = S3SigV4Auth(BotocoreCredentials(credentials.key, credentials.secret, credentials.token), "s3", region)
    to_sign = signer.string_to_sign(request, signer.canonical_request(request))
    signed = signer.signed_headers(signer.headers_to_sign(request))
    scope = f"Credential={signer.scope(request)}"
    return f"AWS4-HMAC-SHA256 {scope},SignedHeaders={signed},Signature={signer.signature(to_sign, request)}"


@given(
    st.sampled_from(["GET", "PUT"]),
    KEYS,
    st.dictionaries(WORDS, VALUES, max_size=3),
    st.dictionaries(
        st.sampled_from(["if-match", "range", "x-amz-meta-a", "x-amz-request-payer", "content-length"]), VALUES
    ),
    CREDENTIALS,
    REGIONS,
)
def test_signature_is_botocores(method, key, query, headers, credentials, region):
    path = f"/bucket/{sigv4.encode_key(key)}"
    encoded = sorted((sigv4.encode_query(name), sigv4.encode_query(value)) for name, value in query.items())
    query = "&".join(f"{name}={value}" for name, value in encoded)
    headers |= {
        "host": "127.0.0.1:9000",
        "x-amz-content-sha256": sigv4.UNSIGNED_PAYLOAD,
        "x-amz-date": "20261120T093000Z",
    }

    ours = sigv4.Stamp(method, headers, credentials=credentials, region=region).authorization(path, query)

    assert ours == _botocore_signs(method, path, query, headers, credentials, region)


CONFIGS = st.sampled_from(
    [
        S3Config(),
        S3Config(requester_pays=True, customer_key=bytes(range(32))),
        S3Config(server_side_encryption="aws:kms", kms_key_id="arn:aws:kms:eu-west-1:123456789012:key/id"),
    ]
)


def _target(credentials, region, config=S3Config()):  # noqa: B008 - it is immutable
    origin = Origin("https", "host", 443, True, 1, 1.0)
    patience = Patience(1, 1.0, 1.0, 1.0, 1.0, 1.0)
    return Target(
        origin, "host", "/base/bucket/", region, credentials, patience, *headers_for(config), True, None, [], {}, None
    )


TRANSFERS = st.one_of(
    st.builds(
        lambda target, key, start, length, etag: Get(
            target, "bucket", key, SimpleQueue(), start=start, stop=start + length, etag=etag
        ),
        st.builds(_target, CREDENTIALS, REGIONS, CONFIGS),
        KEYS,
        st.integers(0, 10**13),
        st.integers(1, 10**13),
        st.none() | st.text(string.hexdigits + "-", min_size=1),
    ),
    st.builds(
        lambda target, key, body, part, write_id: Put(
            target, "bucket", key, SimpleQueue(), memoryview(body), algorithm="crc64nvme", part=part, write_id=write_id
        ),
        st.builds(_target, CREDENTIALS, REGIONS, CONFIGS),
        KEYS,
        st.binary(max_size=10),
        st.none() | st.tuples(st.text(string.printable, min_size=1), st.integers(1, 10_000)),
        st.none() | st.text(string.hexdigits, min_size=1),
    ),
)
NOW = 1.7e9


@given(TRANSFERS)
def test_requests_are_sent_as_botocore_would_sign_them(transfer):
    first, *lines = transfer.request(NOW).decode().split("\r\n")[:-2]
    method, where, version = first.split(" ")
    path, _, query = where.partition("?")
    headers = dict(line.split(": ", 1) for line in lines)
    ours = headers.pop("authorization")
    signed = {name: headers[name] for name in ours.partition("SignedHeaders=")[2].partition(",")[0].split(";")}

    assert (version, unquote(path)) == ("HTTP/1.1", f"/base/bucket/{transfer.key}")
    assert headers.keys() - signed.keys() == {"user-agent", "accept-encoding", *transfer.conditions()}
    target = transfer.target
    assert ours == _botocore_signs(method, path, query, signed, target.credentials, target.region)


def test_unsigned_request_has_no_signature():
    request = Get(_target(None, "us-east-1"), "bucket", "key", SimpleQueue()).request(NOW)

    assert b"authorization" not in request
    assert b"x-amz-date" not in request


@given(KEYS)
def test_encoded_key_is_plain_ascii_and_decodes_to_itself(key):
    encoded = sigv4.encode_key(key)

    assert set(encoded) <= set(string.ascii_letters + string.digits + "-._~/%")
    assert unquote(encoded) == key


@given(st.integers(0, 4 * 10**9))
def test_date_is_utc(second):
    assert sigv4.amz_date(second) == datetime.fromtimestamp(second, UTC).strftime("%Y%m%dT%H%M%SZ")


def test_credentials_show_nothing():
    credentials = Credentials("AKIDCANARY", "SECRETCANARY", "TOKENCANARY")

    target = _target(credentials, "us-east-1", S3Config(customer_key=b"CANARY".ljust(32)))
    assert "CANARY" not in f"{credentials} {credentials!r} {[credentials]} {target}"
    assert b64encode(b"CANARY").decode() not in repr(target)
