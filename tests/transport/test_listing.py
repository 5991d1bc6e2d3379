"""Listings against a server with small pages, which can be told to spoil some: every key once, or an error."""

import datetime as dt
import functools
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote_plus, urlsplit
from xml.sax.saxutils import escape

import botocore.handlers
import botocore.parsers
import botocore.session
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import running

from torch_s3 import errors
from torch_s3.config import S3Config
from torch_s3.transport import listing
from torch_s3.transport.client import Client
from torch_s3.transport.listing import entry, list_objects, list_pages

AWKWARD = [
    "+plus %25 percent",
    "a//b/",
    "a/\x01\x1f\x7f control\t\r\n",
    "amp&amp;<tag>]]>'\"",
    "back\\slash",
    "x" * 1024,
    "~öl/日本/🙂",
    "\uffff",
]


class Server(ThreadingHTTPServer):
    """ListObjectsV2 of one bucket, "bucket".

    Attributes:
        keys: What is in it. Sizes are the keys' lengths.
        page_size: Keys and common prefixes in an answer.
        spoil: What is done to the next answers' bodies, in order of arrival; ``None`` spares one.
        asked: The queries that came.
    """

    def __init__(self, keys=(), page_size=1000, spoil=()):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.keys, self.page_size, self.spoil, self.asked = list(keys), page_size, list(spoil), []

    @functools.cache  # noqa: B019 - a server is soon gone
    def client(self, **settings):
        url = f"http://127.0.0.1:{self.server_port}"
        options = {"key": "id", "secret": "secret", "region": "us-east-1", "endpoint_url": url}
        return Client(S3Config.from_storage_options(options | settings))

    def handle_error(self, request, client_address):
        """A client may hang up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        self.server.asked.append(query)
        body, status = answer(self.server.keys, self.server.page_size, query), 200
        if url.path != "/bucket/":
            body, status = "<Error><Code>NoSuchBucket</Code></Error>", 404
        spoil = self.server.spoil.pop(0) if self.server.spoil else None
        if spoil is not None:
            body = spoil(body)
        self.send_response(status)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        raw = body.encode()
        for at in range(0, len(raw), 4096):
            piece = raw[at : at + 4096]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_):
        """Nobody wants to know."""


def answer(keys, page_size, query):
    """What S3 answers, in the plainest way."""
    prefix, delimiter, token = (query.get(name, "") for name in ("prefix", "delimiter", "continuation-token"))
    items = set()
    for key in keys:
        if key.startswith(prefix):
            end = key.find(delimiter, len(prefix)) if delimiter else -1
            items.add(key if end < 0 else key[: end + 1])
    rest = sorted(item for item in items if item > token)
    parts = []
    for item in rest[:page_size]:
        if delimiter and item.find(delimiter, len(prefix)) >= 0:
            parts.append(f"<CommonPrefixes><Prefix>{quote_plus(item)}</Prefix></CommonPrefixes>")
        else:
            parts.append(contents(quote_plus(item), len(item)))
    more = len(rest) > page_size
    next_token = f"<NextContinuationToken>{escape(rest[page_size - 1])}</NextContinuationToken>" if more else ""
    return document("".join(parts), f"<IsTruncated>{str(more).lower()}</IsTruncated>{next_token}")


def contents(key, size, etag='"e"'):
    said = (
        f"<Key>{key}</Key><LastModified>2026-01-02T03:04:05.000Z</LastModified><ETag>{etag}</ETag><Size>{size}</Size>"
    )
    return f"<Contents>{said}</Contents>"


def document(content, said="<IsTruncated>false</IsTruncated>"):
    space = "http://s3.amazonaws.com/doc/2006-03-01/"
    head = f'<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult xmlns="{space}">{said}'
    return f"{head}<EncodingType>url</EncodingType>{content}</ListBucketResult>"


def serve(*args, **kwargs):
    return running(Server(*args, **kwargs))


@pytest.fixture(scope="module")
def shared():
    """A server for tests that set all of its attributes."""
    with serve() as server:
        yield server


def keys_of(pages):
    return [key for page in pages for key, *_ in page.objects]


# ------------------------------------------------------------------ everything is listed


@settings(max_examples=60)
@given(
    keys=st.sets(st.text("ab/é+", min_size=1, max_size=6), max_size=40),
    prefix=st.text("ab/", max_size=2),
    page_size=st.integers(1, 7),
)
def test_every_key_is_listed_once_in_order(shared, keys, prefix, page_size):
    shared.keys, shared.page_size = keys, page_size

    found = keys_of(list_objects(shared.client(), "bucket", prefix))

    assert found == sorted(key for key in keys if key.startswith(prefix))


def test_every_awkward_key_is_listed_as_it_is(shared):
    shared.keys, shared.page_size = AWKWARD, 1000

    assert keys_of(list_objects(shared.client(), "bucket")) == sorted(AWKWARD)


@pytest.mark.parametrize("key", AWKWARD)
def test_prefix_may_be_awkward(shared, key):
    shared.keys, shared.page_size = AWKWARD, 1000

    assert keys_of(list_objects(shared.client(), "bucket", key)) == [key]


def test_page_of_the_longest_keys_is_read(shared):
    shared.keys, shared.page_size = [f"{number:04}" + "ö" * 510 for number in range(1000)], 1000

    assert keys_of(list_objects(shared.client(), "bucket")) == shared.keys


def test_prefixes_are_listed_concurrently():
    everyone_asks = threading.Barrier(4, timeout=60)

    def meet(body):
        everyone_asks.wait()
        return body

    keys = [f"{folder}/{number}" for folder in "abcd" for number in range(3)]
    with serve(keys, 4, [None, None, meet, meet, meet, meet]) as server:
        assert keys_of(list_objects(server.client(), "bucket")) == keys

    assert not everyone_asks.broken


def test_what_fits_a_page_is_one_request():
    with serve(["a/1", "b/2"]) as server:
        assert keys_of(list_objects(server.client(), "bucket")) == ["a/1", "b/2"]

    assert len(server.asked) == 1


def test_many_small_prefixes_are_not_listed_one_by_one():
    keys = [f"{number:03}/x" for number in range(200)]
    with serve(keys, 50) as server:
        assert keys_of(list_objects(server.client(), "bucket")) == keys

    assert len(server.asked) == 4


def test_delimiter_gives_common_prefixes(shared):
    shared.keys, shared.page_size = ["a", "b/1", "b/2", "c+/3", "d"], 2

    pages = list(list_pages(shared.client(), "bucket", delimiter="/"))

    assert keys_of(pages) == ["a", "d"]
    assert [prefix for page in pages for prefix in page.prefixes] == ["b/", "c+/"]


def test_entry_is_what_fsspec_calls_a_file(shared):
    shared.keys, shared.page_size = ["a/key"], 1

    (page,) = list_pages(shared.client(), "bucket")

    modified = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
    expected = {"name": "bucket/a/key", "size": 5, "type": "file", "ETag": "e", "LastModified": modified}
    assert entry("bucket", page.objects[0]) == expected


@pytest.mark.parametrize("waiting", [1, 4, 200])
def test_pages_that_wait_for_their_turn_are_limited(monkeypatch, waiting):
    monkeypatch.setattr("torch_s3.transport.listing._WAITING", waiting)
    keys = [f"{folder}/{number:03}" for folder in "abcdefgh" for number in range(100)]
    with serve(keys, 10) as server:
        found, most = [], 0
        for taken, page in enumerate(list_objects(server.client(), "bucket")):
            found += keys_of([page])
            most = max(most, sum("delimiter" not in query for query in server.asked) - taken)

    assert found == keys
    # Besides, the first page is asked for again by its prefixes; and what comes next is asked for in any case.
    assert most <= waiting + 2
    assert most > 8 or waiting < 200


def test_leaving_early_cancels_the_rest():
    with serve([f"{folder}/{number}" for folder in "abcd" for number in range(100)], 10) as server:
        pages = list_objects(server.client(), "bucket")
        next(pages)
        pages.close()
        asked = len(server.asked)

    assert asked < 40


# ------------------------------------------------------------------ as botocore reads it

_SHAPE = botocore.session.get_session().get_service_model("s3").operation_model("ListObjectsV2").output_shape


def botocore_reads(body):
    parser = botocore.parsers.create_parser("rest-xml")
    said = parser.parse({"body": body, "headers": {}, "status_code": 200}, _SHAPE)
    botocore.handlers.decode_list_object_v2(said, {"encoding_type_auto_set": True})
    return said


def _raw(text):
    return escape(text, {"\r": "&#13;", '"': "&quot;"})


_STYLES = {
    "encoded": quote_plus,
    "escaped": _raw,
    "numeric": lambda text: "".join(f"&#{ord(character)};" for character in text),
    "CDATA": lambda text: "<![CDATA[" + text.replace("]]>", "]]]]><![CDATA[>").replace("\r", "") + "]]>",
    "commented": lambda text: "<!-- <Key>no</Key> -->" + _raw(text),
}
_TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffe\uffff"), min_size=1)


@given(
    keys=st.lists(st.one_of(_TEXT, st.sampled_from(AWKWARD[:2] + AWKWARD[3:7])), max_size=5),
    style=st.sampled_from(sorted(_STYLES)),
    between=st.sampled_from(["", "\n  ", "\r\n"]),
    etag=st.sampled_from(['"e"', "&quot;e&quot;", "&#34;e&#34;", "e", ""]),
    space=st.sampled_from([' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"', ""]),
    declared=st.sampled_from(['<?xml version="1.0" encoding="UTF-8"?>\n', "<?xml version='1.0'?>", ""]),
    owner=st.booleans(),
)
def test_page_says_what_botocore_reads_in_it(keys, style, between, etag, space, declared, owner):
    parts = [contents(_STYLES[style](key), number, etag) for number, key in enumerate(keys)]
    if owner:
        parts = [
            part.replace("<Size>", "<Owner><ID>i</ID><DisplayName>&amp;</DisplayName></Owner><Size>") for part in parts
        ]
    encoding = "<EncodingType>url</EncodingType>" if style == "encoded" else ""
    inner = f"<IsTruncated>false</IsTruncated><Prefix></Prefix>{encoding}{''.join(parts)}"
    inner = re.sub(r"(</\w+>)(?=<\w)", rf"\1{between}", inner)
    body = f"{declared}<ListBucketResult{space}>{between}{inner}{between}</ListBucketResult>".encode()

    page = listing._parse(body)

    expected = botocore_reads(body).get("Contents", [])
    assert [(key, size, etag) for key, size, etag, _ in page.objects] == [
        (said["Key"], said["Size"], said["ETag"].strip('"')) for said in expected
    ]


@given(keys=st.lists(_TEXT, min_size=1, max_size=5))
def test_both_readings_of_a_page_agree(keys):
    body = document("".join(contents(quote_plus(key), 1) for key in keys)).encode()

    plain = listing._parse_plain(body)

    assert plain is not None
    assert plain == listing._parse_any(body)


def test_object_without_etag_is_listed(shared):
    shared.keys, shared.page_size = ["a", "b"], 1000
    shared.spoil = [lambda body: body.replace('<ETag>"e"</ETag>', "", 1)]

    assert [etag for page in list_pages(shared.client(), "bucket") for _, _, etag, _ in page.objects] == ["", "e"]


# ------------------------------------------------------------------ never silently short


@pytest.mark.parametrize(
    "spoil",
    [
        lambda body: body[: len(body) // 2],
        lambda body: "",
        lambda body: "<Error><Code>InternalError</Code><Message>again</Message></Error>",
        lambda body: "<Error><Code>SlowDown</Code></Error>",
    ],
    ids=["cut", "empty", "error under 200", "SlowDown under 200"],
)
def test_spoiled_page_is_asked_for_again(shared, spoil):
    shared.keys, shared.page_size, shared.spoil = list("abcdef"), 2, [None, None, spoil]

    assert keys_of(list_objects(shared.client(), "bucket")) == list("abcdef")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda body: re.sub("<NextCont.*Token>", "", body), "NextContinuationToken"),
        (lambda body: body.replace("IsTruncated", "IsWhole"), "truncated"),
        (lambda body: body.replace("<Size>", "<Size>many"), "many"),
        (lambda body: body.replace("Key>", "Name>"), "no Key"),
        (lambda body: body.replace("</Contents>", "", 1), "XML"),
        (lambda body: body.replace("<Key>b", "<Key>x"), "prefix"),
    ],
    ids=["no token", "no IsTruncated", "no size", "no key", "unbalanced", "other keys"],
)
def test_page_that_makes_no_sense_is_an_error_that_names_the_prefix(shared, spoil, words):
    shared.keys, shared.page_size, shared.spoil = ["b/1", "b/2", "b/3"], 2, [spoil]

    with pytest.raises(errors.IntegrityError, match=words) as caught:
        list(list_objects(shared.client(), "bucket", "b/"))

    assert caught.value.uri == "s3://bucket/b/"


def test_repeated_token_is_an_error(shared):
    shared.keys, shared.page_size = list("abcdef"), 2
    shared.spoil = [None, None, lambda body: body.replace(">d</Next", ">b</Next")]

    with pytest.raises(errors.IntegrityError, match="token again"):
        list(list_objects(shared.client(), "bucket"))


def test_prefix_under_itself_is_an_error(shared):
    shared.keys, shared.page_size = ["a/1", "a/2"], 1
    itself = "<CommonPrefixes><Prefix>a/</Prefix></CommonPrefixes>"
    shared.spoil = [None, lambda body: document(itself)]

    with pytest.raises(errors.IntegrityError, match="lies under"):
        list(list_objects(shared.client(), "bucket", "a/"))


@pytest.mark.parametrize(
    ("code", "kind"),
    [("AccessDenied", errors.AccessDenied), ("ExpiredToken", errors.CredentialsExpired), ("Odd", errors.S3Error)],
)
def test_error_under_200_has_its_type(shared, code, kind):
    shared.spoil = [lambda body: f"<Error><Code>{code}</Code></Error>"]

    with pytest.raises(kind, match=code) as caught:
        list(list_objects(shared.client(), "bucket", "b/"))

    assert caught.value.uri == "s3://bucket/b/"


def test_page_that_stays_spoiled_is_an_error(shared):
    shared.spoil = [lambda body: "no XML"] * 2

    with pytest.raises(errors.TransferFailed, match="attempt 2 of 2"):
        list(list_objects(shared.client(attempts=2), "bucket"))


@pytest.mark.parametrize("prefix", ["", "b/"])
def test_missing_bucket_is_not_found(shared, prefix):
    with pytest.raises(errors.NotFound, match="no such bucket") as caught:
        list(list_objects(shared.client(), "nowhere", prefix))

    assert caught.value.uri == "s3://nowhere"


def test_refused_signature_is_access_denied(rclone):
    rclone.create_bucket("listed")
    wrong = Client(S3Config.from_storage_options(rclone.storage_options | {"secret": "wrong"}))

    with pytest.raises(errors.AccessDenied):
        list(list_objects(wrong, "listed", "some prefix/ü+"))


def test_right_signature_is_accepted(rclone):
    bucket = rclone.create_bucket("signed")[5:]
    (rclone.root / bucket / "some prefix" / "ü+&=").mkdir(parents=True)
    (rclone.root / bucket / "some prefix" / "ü+&=" / "key").write_bytes(b"body")
    client = Client(S3Config.from_storage_options(rclone.storage_options))

    assert keys_of(list_objects(client, bucket, "some prefix/ü+&=/")) == ["some prefix/ü+&=/key"]
