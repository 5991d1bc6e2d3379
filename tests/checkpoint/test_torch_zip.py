"""The layout of torch's zip files, beside zipfile's view of them."""

import io
import struct
import zipfile

import pytest
import torch
from archives import torch_saved, zip_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.serialization import config

from torch_s3 import errors
from torch_s3.checkpoint import torch_zip
from torch_s3.checkpoint.receive import plan

_URI = "s3://b/model.pt"


def _records(content):
    where = torch_zip.find_directory(content[-torch_zip.TAIL :], size=len(content), uri=_URI)
    return torch_zip.records(content[where.start : where.stop], where, uri=_URI)


def _start(record, content):
    return torch_zip.start_by_header(record, content[record.header :][: torch_zip.LOCAL_HEADER], uri=_URI)


_names = st.text(st.characters(codec="utf-8", exclude_characters="/\\\0"), min_size=1, max_size=8)


@given(st.dictionaries(_names, st.binary(max_size=300), max_size=6), st.booleans(), st.binary(max_size=40))
def test_records_are_those_that_zipfile_finds(contents, deflated, comment):
    file = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.comment = comment
        for name, content in contents.items():
            archive.writestr(f"folder/{name}", content)
    whole = file.getvalue()

    records = _records(whole)

    assert list(records) == list(contents)
    for info in archive.infolist():
        record = records[info.filename.removeprefix("folder/")]
        assert (record.size, record.length, record.crc) == (info.file_size, info.compress_size, info.CRC)
        start = _start(record, whole)
        if not deflated:
            assert whole[start : start + record.size] == contents[record.name]


@settings(max_examples=30)
@given(st.lists(st.integers(0, 300), max_size=8), st.sampled_from([1, 8, 64, 4096]))
def test_starts_of_torchs_records_are_known_without_their_headers(sizes, alignment):
    with config.patch("save.storage_alignment", alignment):
        whole = torch_saved([torch.ones(size, dtype=torch.uint8) for size in sizes])

    for record in _records(whole).values():
        assert torch_zip.start_by_rule(record, alignment) == _start(record, whole)


def test_starts_of_other_writers_records_are_not_guessed():
    content = zip_of({f"a/{size}": bytes(size) for size in range(200)}, zipfile.ZIP_STORED)

    assert {torch_zip.start_by_rule(record, 64) for record in _records(content).values()} == {None}


def test_records_of_more_than_4_gib_are_found():
    size, header = 5 << 30, 6 << 30
    entries = [(b"archive/data/0", 0, size), (b"archive/data/1", header, 7)]
    end = torch_zip.directory_of(entries)
    whole = header + torch_zip.local_header_size(b"archive/data/1") + 7 + len(end)

    where = torch_zip.find_directory(end, size=whole, uri=_URI)
    records = torch_zip.records(end[: where.stop - where.start], where, uri=_URI)

    assert [(record.header, record.size) for record in records.values()] == [(0, size), (header, 7)]


def test_start_after_4_gib_counts_the_longer_descriptor():
    path = b"archive/data/1"
    start = (5 << 30) + 64
    after = torch_zip.Record("data/1", 5 << 30, 100, 100, 0, torch_zip.STORED, start + 100 + 24, path)

    assert torch_zip.start_by_rule(after, 64) == start
    assert torch_zip.start_by_rule(after._replace(limit=start + 100 + 16), 64) is None


@given(st.data())
def test_any_damage_to_a_directory_is_found_or_harmless(data):
    whole = bytearray(torch_saved([torch.arange(30), torch.ones(5)]))
    first = whole.index(b"PK\x01\x02")
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(first, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        records = list(_records(bytes(whole)).values())
    except errors.CheckpointError:
        return

    ends = 0
    for record in sorted(records, key=lambda record: record.header):
        assert ends <= record.header
        ends = record.header + torch_zip.LOCAL_HEADER + len(record.path) + record.length
        assert ends <= record.limit <= len(whole)


@given(st.binary(max_size=200))
def test_no_bytes_make_more_than_a_checkpoint_error(tail):
    for content in (tail, tail + b"PK\x05\x06" + bytes(18), tail + b"PK\x06\x06" + bytes(52) + b"PK\x06\x07" + tail):
        with pytest.raises(errors.CheckpointError):
            where = torch_zip.find_directory(content, size=len(content), uri=_URI)
            torch_zip.records(b"\0" * (where.stop - where.start + 1), where._replace(entries=1), uri=_URI)


def test_comment_that_looks_like_an_end_is_none():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/b", b"x")
        archive.comment = b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 1, 1, 9, 9, 3)

    assert list(_records(file.getvalue())) == ["b"]


@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(1, 3_000_000), st.booleans()), max_size=8),
    st.integers(1 << 20, 3 << 20),
)
def test_every_wanted_byte_is_asked_for_once(gaps, part_size):
    wanted, at = [], 0
    for gap, nbytes, in_place in gaps:
        wanted.append((at + gap, nbytes, in_place))
        at += gap + nbytes

    pieces = []
    for start, stop, direct, some in plan(wanted, part_size=part_size):
        assert 0 < stop - start <= part_size
        for want, begin, offset, nbytes in some:
            assert start + offset == wanted[want][0] + begin
            assert offset + nbytes <= stop - start
            pieces.append((want, begin, nbytes))
        assert not direct or (len(some) == 1 and some[0].nbytes == stop - start and wanted[some[0].want][2])

    for number, (_, nbytes, _) in enumerate(wanted):
        covered = sorted((begin, length) for want, begin, length in pieces if want == number)
        assert [begin for begin, _ in covered] == [
            sum(length for _, length in covered[:i]) for i in range(len(covered))
        ]
        assert sum(length for _, length in covered) == nbytes
