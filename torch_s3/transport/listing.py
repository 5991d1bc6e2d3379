"""What lies under a prefix: ListObjectsV2, its prefixes side by side.

Source: "ListObjectsV2", Amazon S3 API Reference. A page names the next one, so that one listing is one request at a
time; what makes a large one fast is to list the prefixes under it concurrently.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections import deque
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote_plus

from torch_s3 import errors
from torch_s3.transport import sigv4
from torch_s3.transport.answer import Head, bare_etag
from torch_s3.transport.retry import Cause, Retry
from torch_s3.transport.target import Target
from torch_s3.transport.transfer import Sink, Transfer

if TYPE_CHECKING:
    from torch_s3.transport.client import Client

_END = b"</ListBucketResult>"
_NEXT = "NextContinuationToken"
_FIELDS = "Key", "Size", "ETag", "LastModified"
_PLAIN = re.compile(r"(<\?xml version=.1\.0.( encoding=.utf-8.)? ?\?>\s*)?<ListBucketResult[ >]", re.IGNORECASE)
_WAITING = 200  # pages, asked for or there, of prefixes whose turn has not come
_MANY = 20  # prefixes in a page of 1,000 keys, beyond which a request for each would bring too little


Object = tuple[str, int, str, str]
"""Key, size in bytes, ETag without quotes, and time of the last change as the server wrote it, in ISO 8601; "" where it
gives none. A plain tuple, for the garbage collector soon stops looking at those: a listing has many.
"""


def entry(bucket: str, found: Object) -> dict[str, Any]:
    """An object as fsspec describes it."""
    key, size, etag, modified = found
    return {
        "name": f"{bucket}/{key}",
        "size": size,
        "type": "file",
        "ETag": etag or None,
        "LastModified": datetime.fromisoformat(modified) if modified else None,
    }


class Page(NamedTuple):
    """One answer.

    Attributes:
        objects: In the server's order, which on S3 is that of their keys' UTF-8, but not on every server.
        prefixes: What is between the listed prefix and the next delimiter, where one was given.
        token: Asks for the next page, ``None`` on the last one.
    """

    objects: list[Object]
    prefixes: list[str]
    token: str | None


class List(Transfer):
    """Ask for one page of the keys that start with ``prefix``.

    Args:
        delimiter: Give keys that have it after the prefix as one common prefix.
        token: The page before's.
    """

    __slots__ = ("_body", "delimiter", "prefix", "token")
    collect_limit = 16 * 1024 * 1024  # 1,000 keys of 1,024 bytes, each percent-encoded, are above 3 MB

    def __init__(
        self,
        target: Target,
        bucket: str,
        prefix: str,
        sink: Sink,
        *,
        delimiter: str = "",
        token: str | None = None,
    ) -> None:
        super().__init__(target, bucket, "", sink, None)
        self.uri = f"s3://{bucket}/{prefix}"
        self.prefix, self.delimiter, self.token = prefix, delimiter, token
        self._body = b""

    @property
    def operation(self) -> str:
        return "ListObjectsV2"

    @property
    def query(self) -> str:
        values = {
            "continuation-token": self.token,
            "delimiter": self.delimiter,
            "encoding-type": "url",  # XML has no way to write most control characters
            "list-type": "2",
            "prefix": self.prefix,
        }
        return "&".join([f"{name}={sigv4.encode_query(value)}" for name, value in values.items() if value])

    def headers(self) -> dict[str, str]:
        fields = {"x-amz-content-sha256": sigv4.EMPTY_SHA256}
        fields.update([field for field in self.target.get_fields if field[0] == "x-amz-request-payer"])
        return fields

    def receive(self, head: Head) -> memoryview | None:
        return None

    def collected(self, head: Head, body: bytes) -> None:
        super().collected(head, body)
        if not body.rstrip().endswith(_END):
            if b"<Error" in body:  # S3 may find out after it has sent its 200
                self.refuse(head, body)
            raise Retry(Cause.SERVER, "the server's answer is not a whole page of a listing")
        self._body = body

    def refuse(self, head: Head, body: bytes) -> None:
        if head.status == 404 and b"<Code>" not in body:
            raise errors.NotFound("no such bucket", uri=f"s3://{self.bucket}")
        super().refuse(head, body)

    def page(self) -> Page:
        """What the answer says; parsed here, in the caller's thread.

        Raises:
            IntegrityError: It is not the page that was asked for.
        """
        try:
            page = _parse(self._body)
        except ValueError as error:
            raise self._wrong(f"the server's page of a listing cannot be used: {error}") from None
        if page.token is not None and page.token == self.token:
            raise self._wrong("the server gave the same page's token again")
        found = [*(key for key, *_ in page.objects), *page.prefixes]
        if not all(key.startswith(self.prefix) for key in found):
            raise self._wrong("the server listed keys that do not start with the prefix")
        if self.prefix in page.prefixes:
            raise self._wrong("the server gave the prefix as one that lies under it")
        return page

    def _wrong(self, message: str) -> errors.IntegrityError:
        return errors.IntegrityError(message, uri=self.uri)


def _parse(body: bytes) -> Page:
    """A page from its XML.

    Raises:
        ValueError: It isn't one.
    """
    page = _parse_plain(body) or _parse_any(body)
    if page.truncated not in ("true", "false"):
        raise ValueError("it does not say whether it is truncated")
    if page.truncated == "true" and not page.token:
        raise ValueError(f"truncated, but without {_NEXT}: does the server know list-type=2?")
    columns, prefixes = page.columns, page.prefixes
    if page.encoding == "url":
        columns[0], prefixes = list(map(unquote_plus, columns[0])), list(map(unquote_plus, prefixes))
    keys, sizes, etags, modified = columns
    objects = list(zip(keys, map(int, sizes), map(bare_etag, etags), modified, strict=True))
    return Page(objects, prefixes, page.token if page.truncated == "true" else None)


class _Said(NamedTuple):
    """A page's texts as they stand in it; ``columns`` are those of the objects' ``_FIELDS``."""

    columns: list[list[str]]
    prefixes: list[str]
    truncated: str | None
    token: str | None
    encoding: str | None


def _parse_plain(body: bytes) -> _Said | None:
    """Read a page that is as plain as nearly all are, ten times as fast; ``None`` for any other.

    Where nothing is escaped, commented or quoted as CDATA, a ``<`` begins a tag, so that patterns find what a parser
    would. An object that lacks a field, or has one written in another way, shows in the counts.
    """
    try:
        text = body.decode().replace("&quot;", '"').replace("&#34;", '"')
    except UnicodeDecodeError:
        return None
    strange = ("&", "<!", "\r", "<CommonPrefixes")
    if not _PLAIN.match(text) or text.rfind("<?") > 0 or any(part in text for part in strange):
        return None
    columns = [re.findall(f"<{name}>([^<]*)</{name}>", text) for name in _FIELDS]
    if {text.count("<Contents>"), text.count("</Contents>"), *map(len, columns)} != {len(columns[0])}:
        return None
    found = [re.search(f"<{name}>([^<]*)</{name}>", text) for name in ("IsTruncated", _NEXT, "EncodingType")]
    return _Said(columns, [], *(match and match[1] for match in found))


def _parse_any(body: bytes) -> _Said:
    """Read any page.

    Raises:
        ValueError: It isn't one.
    """
    try:
        root = ET.fromstring(body)  # noqa: S314 - of the server whose data is used; expat limits what entities expand to
    except ET.ParseError as error:
        raise ValueError(f"no XML: {error}") from None
    space = root.tag.removesuffix("ListBucketResult")  # the namespace, which some servers leave out
    columns = [
        [_text(entry, f"{space}{name}", optional=name in _FIELDS[2:]) for entry in root.iterfind(f"{space}Contents")]
        for name in _FIELDS
    ]
    prefixes = [_text(entry, f"{space}Prefix") for entry in root.iterfind(f"{space}CommonPrefixes")]
    return _Said(columns, prefixes, *(root.findtext(space + name) for name in ("IsTruncated", _NEXT, "EncodingType")))


def _text(entry: ET.Element, name: str, *, optional: bool = False) -> str:
    text = entry.findtext(name, "" if optional else None)
    if text is None:
        raise ValueError(f"something in it has no {name.rpartition('}')[2]}")
    return text


def list_pages(client: Client, bucket: str, prefix: str = "", *, delimiter: str = "") -> Iterator[Page]:
    """What starts with ``prefix``, page by page; with a delimiter, only what has none after the prefix.

    Raises:
        NotFound: There is no such bucket. That nothing has the prefix is no error.
        S3Error: A page could not be had. A listing is never silently short.
    """
    uri = f"s3://{bucket}/{prefix}"
    if client.target(bucket, uri).fallback is not None:
        settings = {"Bucket": bucket, "Prefix": prefix, "Delimiter": delimiter}
        yield from map(_page_of, client.pages("list_objects_v2", uri, **settings))
        return
    token = None
    with client.batch() as batch:
        while True:
            request = batch.page(bucket, prefix, delimiter=delimiter, token=token)
            batch.wait(request)
            page = request.page()
            yield page
            if (token := page.token) is None:
                return


def _page_of(answer: dict[str, Any]) -> Page:
    """A page as boto3 has read it."""
    objects = [
        (found["Key"], found["Size"], bare_etag(found.get("ETag", "")), found["LastModified"].isoformat())
        for found in answer.get("Contents", ())
    ]
    return Page(objects, [found["Prefix"] for found in answer.get("CommonPrefixes", ())], None)


class _Run:
    """A stretch of the listing: the keys that start with ``prefix``, or pages that are there already."""

    def __init__(self, prefix: str, pages: tuple[Page, ...] = (), *, done: bool = False) -> None:
        self.prefix = prefix
        self.pages = deque(pages)
        self.done = done
        self.first: Page | None = None  # kept while it is asked which prefixes there are
        self.token: str | None = None  # of the page to ask for, and its delimiter
        self.delimiter = ""


def list_objects(client: Client, bucket: str, prefix: str = "") -> Iterator[Page]:
    """Every object whose key starts with ``prefix``.

    Where that is more than a page, the prefixes up to the next ``/`` are listed concurrently, and those under them in
    turn, unless they are so many that each holds little. Pages come in the order that one listing would have. Those of
    later prefixes wait in memory for the earlier, up to 200 pages: then a slow caller, or a long prefix, holds up the
    others.

    Raises:
        NotFound: There is no such bucket. That nothing has the prefix is no error.
        S3Error: A page could not be had. A listing is never silently short.
    """
    if client.target(bucket, f"s3://{bucket}/{prefix}").fallback is not None:
        yield from list_pages(client, bucket, prefix)
        return
    with client.batch() as batch:
        asked: dict[Transfer, _Run] = {}
        runs = [_Run(prefix)]  # in the order of their keys, reversed: the next one is the last
        held = 0  # pages that wait for their turn
        wanted = deque(runs)  # whose next page is not asked for yet

        def ask() -> None:
            """Ask for what is wanted, within the limit; for what comes next in any case."""
            if runs and runs[-1] in wanted:
                wanted.remove(runs[-1])
                wanted.appendleft(runs[-1])
            while wanted and (wanted[0] is runs[-1] or held + len(asked) < _WAITING):
                run = wanted.popleft()
                asked[batch.page(bucket, run.prefix, delimiter=run.delimiter, token=run.token)] = run

        ask()
        while runs:
            for request in batch.wait_any() if asked else ():
                assert isinstance(request, List)
                run, page = asked.pop(request), request.page()
                run.token, run.delimiter = page.token, ""
                if run.first is not None:  # this tells the prefixes
                    first, run.first = run.first, None
                    held -= 1
                    if page.token is None and page.prefixes:
                        parts, at = _split(page), runs.index(run)
                        runs[at : at + 1] = reversed(parts)
                        wanted.extend([part for part in parts if not part.done])
                        held += sum([len(part.pages) for part in parts])
                        continue
                    page, run.token = first, first.token
                elif page.token is not None and request.token is None and _holds_few(page, len(run.prefix)):
                    run.first, run.token, run.delimiter = page, None, "/"
                    held += 1
                    wanted.append(run)
                    continue
                run.pages.append(page)
                held += 1
                run.done = page.token is None
                if not run.done:
                    wanted.append(run)
            ask()
            batch.start()  # before the caller does something with what is there
            while runs and (runs[-1].pages or runs[-1].done):
                while runs[-1].pages:
                    held -= 1
                    yield runs[-1].pages.popleft()
                if not runs[-1].done:
                    break
                runs.pop()
            ask()


def _holds_few(page: Page, start: int) -> bool:
    """Whether a page's keys have few enough prefixes after ``start`` to be listed by them."""
    return len({key[start : key.find("/", start) + 1] for key, *_ in page.objects}) <= _MANY


def _split(page: Page) -> list[_Run]:
    """The stretches of a listing that has a delimiter: its prefixes, and its own keys before, between and after."""
    own = {found[0]: found for found in page.objects}
    runs: list[_Run] = []
    prefixes = set(page.prefixes)
    for key in sorted({*own, *page.prefixes}):
        if key in prefixes or key not in own:
            runs.append(_Run(key))
        elif runs and runs[-1].done:
            runs[-1].pages[0].objects.append(own[key])
        else:
            runs.append(_Run(key, (Page([own[key]], [], None),), done=True))
    return runs
