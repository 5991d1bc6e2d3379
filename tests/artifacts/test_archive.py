"""Archives made by the standard library's and other people's writers, read from the embedded S3 and beside it."""

import bz2
import gzip
import io
import lzma
import os
import struct
import tarfile
import tracemalloc
import zipfile

import fsspec
import pytest
import zstandard
from archives import tar_of, zip_of

from torch_s3 import S3FileSystem, errors
from torch_s3.artifacts import open_artifact

FILES = {"model/weights.bin": os.urandom(700_000), "model/a b.json": b"{}" * 1000, "empty": b""}
PACK = {
    "tar": bytes,
    "tar.gz": gzip.compress,
    "tar.bz2": bz2.compress,
    "tar.xz": lzma.compress,
    "tar.zst": zstandard.compress,
}
URI = "memory://archives/it"


def opened(content, **caps):
    fsspec.filesystem("memory").pipe_file("/archives/it", content)
    return open_artifact(URI, **caps)


@pytest.mark.parametrize("kind", [*PACK, "zip", "stored zip"])
@pytest.mark.parametrize("library", ["s3", "s3fs"])
def test_members_are_read_back(s3, bucket, kind, library):
    method = zipfile.ZIP_STORED if "stored" in kind else zipfile.ZIP_DEFLATED
    content = zip_of(FILES, method) if "zip" in kind else PACK[kind](tar_of(FILES))
    fs = S3FileSystem(**s3.storage_options) if library == "s3" else fsspec.filesystem("s3", **s3.storage_options)
    fs.pipe_file(f"{bucket}/named-otherwise", content)

    with open_artifact(f"{bucket}/named-otherwise", filesystem=fs) as artifact:
        assert dict(artifact) == FILES
        assert len(artifact) == 3
        assert artifact.size("model/weights.bin") == 700_000
        with artifact.open("model/weights.bin") as file:
            file.seek(-10, os.SEEK_END)
            assert file.read() == FILES["model/weights.bin"][-10:]
        assert "model/weights.bin" in artifact
        with pytest.raises(KeyError, match=r"named-otherwise: it has no member 'weights.bin'; it has .*model/weights"):
            artifact["weights.bin"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_folders_of_every_tar_format(format):
    folder = tarfile.TarInfo("./folder/")
    folder.type = tarfile.DIRTYPE
    long = "./folder/" + "/".join(["n" * 40] * 5) + "/é.pkl"

    artifact = opened(tar_of({folder: b"", long: b"1", "x-first.txt": b"2"}, format=format))

    assert dict(artifact) == {long[2:]: b"1", "x-first.txt": b"2"}


def test_only_the_members_of_a_zip_that_are_asked_for_are_fetched(s3, bucket):
    fs = S3FileSystem(**s3.storage_options, skip_instance_cache=True)
    content = zip_of(
        {"large": os.urandom(30_000_000), "small": b"1", "last": os.urandom(1_000_000)}, zipfile.ZIP_STORED
    )
    fs.pipe_file(f"{bucket}/model.zip", content)
    before = fs.stats()["bytes_received"]

    with open_artifact(f"{bucket}/model.zip", filesystem=fs) as artifact:
        assert sorted(artifact) == ["large", "last", "small"]
        assert artifact["small"] == b"1"
        assert fs.stats()["bytes_received"] - before < 1_000_000
        assert len(artifact["last"]) == 1_000_000
        assert fs.stats()["bytes_received"] - before < 3_000_000


@pytest.mark.parametrize("pack", [tar_of, zip_of])
@pytest.mark.parametrize(
    "use", [list, len, lambda it: "a" in it, lambda it: it["a"], lambda it: it.open("a"), lambda it: it.size("a")]
)
def test_closed_archive_is_no_empty_one(pack, use):
    with opened(pack({"a": b"1"})) as artifact:
        assert repr(artifact) == f"<torch_s3 archive {URI}: 1 members>"

    with pytest.raises(ValueError, match=f"{URI}: this archive is closed"):
        use(artifact)
    assert repr(artifact) == f"<torch_s3 archive {URI}: closed>"


@pytest.mark.parametrize("magic", [0x184D2A50, 0x184D2A5F])
@pytest.mark.parametrize("length", [0, 7, 100_000])
def test_zstd_with_frames_to_skip_is_read(magic, length):
    skipped, tar = struct.pack("<II", magic, length) + b"x" * length, tar_of(FILES)

    content = skipped + zstandard.compress(tar[:1000]) + skipped + skipped + zstandard.compress(tar[1000:]) + skipped
    assert dict(opened(content)) == FILES


def test_zip64_is_read():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive, archive.open("a", "w", force_zip64=True) as member:
        member.write(b"abc" * 1000)
    many = zip_of({f"{number}": b"" for number in range(70_000)}, zipfile.ZIP_STORED)  # more than 16 bits count

    assert opened(file.getvalue())["a"] == b"abc" * 1000
    assert len(opened(many)) == 70_000


def test_members_are_of_the_version_that_was_opened(s3, bucket):
    fs = S3FileSystem(**s3.storage_options)
    fs.pipe_file(f"{bucket}/model.zip", zip_of({"a": b"1"}))

    with open_artifact(f"{bucket}/model.zip", filesystem=fs) as artifact:
        fs.pipe_file(f"{bucket}/model.zip", zip_of({"a": b"2"}))
        with pytest.raises(errors.ObjectChanged):
            artifact["a"]


# ---------------------------------------------------------------------- made to do harm


def _special(kind, name="link", target="/etc/passwd"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("member", "why"),
    [
        (_special(tarfile.SYMTYPE), "is a link"),
        (_special(tarfile.LNKTYPE), "is a link"),
        (_special(tarfile.CHRTYPE), "is a device"),
        (_special(tarfile.BLKTYPE), "is a device"),
        (_special(tarfile.FIFOTYPE), "is a pipe"),
        (_special(tarfile.GNUTYPE_SPARSE), "no regular file"),
        ("/etc/cron.d/x", "leaves the archive"),
        ("../x", "leaves the archive"),
        ("a/../../x", "leaves the archive"),
        ("a\\..\\..\\x", "leaves the archive"),
        ("C:/x", "leaves the archive"),
        ("good", "is there twice"),
        ("./good", "is there twice"),
        ("a//../x", "leaves the archive"),
    ],
)
def test_tar_with_what_no_archive_needs_is_refused(member, why):
    content = tar_of({"good": b"1"})[:1024] + tar_of({member: b""})
    with pytest.raises(errors.ArtifactError, match=f"{URI}: .*{why}"):
        opened(gzip.compress(content))


def _zip_with(name, **attributes):
    info = zipfile.ZipInfo(name)
    for key, value in attributes.items():
        setattr(info, key, value)
    return zip_of({info: b"target"})


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (_zip_with("link", external_attr=0o120777 << 16), "is a link"),
        (_zip_with("device", external_attr=0o020777 << 16), "is no regular file"),
        (_zip_with("../x"), "leaves the archive"),
        (_zip_with("/x"), "leaves the archive"),
        (zip_of({"a": b"1"}, zipfile.ZIP_LZMA), "compressed by method 14"),
        (zip_of({"a": b"1"}).replace(b"PK\x01\x02\x14\x03\x14\0\0\0", b"PK\x01\x02\x14\x03\x14\0\1\0"), "is encrypted"),
    ],
)
def test_zip_with_what_no_archive_needs_is_refused(content, why):
    with pytest.raises(errors.ArtifactError, match=f"{URI}: .*{why}"):
        opened(content)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_with_a_name_twice_is_refused():
    with pytest.raises(errors.ArtifactError, match="'a' is there twice"):
        opened(zip_of([("a", b"1"), ("a", b"2")]))


@pytest.mark.parametrize("kind", [*list(PACK)[1:], "zip"])
def test_bomb_is_refused_in_bounded_memory(kind):
    zeros = bytes(300_000_000)
    content = zip_of({"a": zeros}) if kind == "zip" else PACK[kind](tar_of({"a": zeros}))
    assert len(content) < 1_000_000
    tracemalloc.start()
    try:
        with pytest.raises(errors.ArtifactError, match="unpacks to more than 100 times"):
            opened(content, max_ratio=100)
        with pytest.raises(errors.ArtifactError, match=r"max_bytes|bytes that are allowed"):
            opened(content, max_bytes=50_000_000, max_member_bytes=50_000_000, max_ratio=1e9)
        assert tracemalloc.get_traced_memory()[1] < 250e6
    finally:
        tracemalloc.stop()


def test_zip_that_lies_about_its_sizes_is_refused_in_bounded_memory():
    content = zip_of({"a": bytes(200_000_000)})
    at = content.index(b"PK\x01\x02")
    content = content[: at + 24] + struct.pack("<L", 1000) + content[at + 28 :]
    tracemalloc.start()
    try:
        with pytest.raises(errors.ArtifactError, match="more than the 1000 bytes"):
            opened(content)["a"]
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_zip_whose_members_overlap_is_refused():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", b"x" * 1000)
        archive.writestr("b", b"y" * 1000)
        archive.getinfo("b").header_offset = 10

    with pytest.raises(errors.ArtifactError, match="don't agree"):
        opened(file.getvalue())["a"]


def _pax(count, kind):
    records = b"".join(b"%d %06d=\n" % (len(b"11 000000=\n"), number) for number in range(count))
    info = tarfile.TarInfo("pax")
    info.type, info.size = kind, len(records)
    return info.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512)


@pytest.mark.parametrize(
    ("headers", "members", "why"),
    [
        (_pax(4000, tarfile.XGLTYPE), 2000, "more than 100 headers for all"),
        (_pax(2_000_000, tarfile.XGLTYPE), 1, "too many bytes of headers"),
        (_pax(2_000_000, tarfile.XHDTYPE), 1, "too many bytes of headers"),
        (_pax(5000, tarfile.XHDTYPE) * 100, 1, "too many bytes of headers"),
    ],
)
def test_tar_with_very_many_headers_is_refused_in_bounded_memory(headers, members, why):
    content = headers + b"".join(tarfile.TarInfo(f"m{number}").tobuf() for number in range(members)) + bytes(1024)
    tracemalloc.start()
    try:
        with pytest.raises(errors.ArtifactError, match=why):
            opened(content)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(content) + 10e6
    finally:
        tracemalloc.stop()


def test_tar_with_a_header_for_all_members_is_read():
    content = _pax(50, tarfile.XGLTYPE) + tar_of(FILES)
    assert dict(opened(content)) == FILES


def test_caps_on_members():
    content = tar_of({f"{number}": b"12" for number in range(10)})

    assert len(opened(content, max_members=10, max_bytes=20_480)) == 10
    for caps in ({"max_members": 9}, {"max_member_bytes": 1}, {"max_bytes": 19}):
        with pytest.raises(errors.ArtifactError, match=next(iter(caps))):
            opened(content, **caps)
        with pytest.raises(errors.ArtifactError, match=next(iter(caps))):
            opened(zip_of({f"{number}": b"12" for number in range(10)}), **caps)


def test_folders_are_counted():
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    for content in (folder.tobuf() * 10 + bytes(1024), zip_of({f"{number}/": b"" for number in range(10)})):
        assert len(opened(content, max_members=10)) == 0
        with pytest.raises(errors.ArtifactError, match="more than max_members=9"):
            opened(content, max_members=9)


def test_object_larger_than_max_bytes_is_refused_before_it_is_received(s3, bucket):
    fs = S3FileSystem(**s3.storage_options, skip_instance_cache=True)
    fs.pipe_file(f"{bucket}/model.tar", bytes(5_000_000))

    with pytest.raises(errors.ArtifactError, match="5000000 bytes, and max_bytes=1000000"):
        open_artifact(f"{bucket}/model.tar", max_bytes=1_000_000, filesystem=fs)
    assert fs.stats()["bytes_received"] < 1_000_000


@pytest.mark.parametrize("kind", [*PACK, "zip"])
@pytest.mark.parametrize("part", [0.0001, 0.3, 0.9, 0.9999])
def test_truncated_archive_is_an_error(kind, part):
    whole = zip_of(FILES) if kind == "zip" else PACK[kind](tar_of(FILES)[:-9000])
    cut = whole[: int(len(whole) * part)]
    with pytest.raises(errors.ArtifactError, match=URI):
        dict(opened(cut))


def test_tar_cut_between_members_is_an_error():
    with pytest.raises(errors.ArtifactError, match="truncated"):
        opened(tar_of({"a": b"1", "b": b"2"})[:1024])


def test_tar_with_a_damaged_header_is_an_error():
    content = bytearray(tar_of({"a": b"1", "b": b"2"}))
    content[1024 + 148] ^= 1

    with pytest.raises(errors.ArtifactError, match="damaged"):
        opened(bytes(content))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_wrong_crc_is_an_integrity_error(method):
    content = bytearray(zip_of({"a": os.urandom(10_000)}, method))
    content[5000] ^= 1

    with pytest.raises((errors.IntegrityError, errors.ArtifactError), match="damaged"):
        opened(bytes(content))["a"]


def test_what_is_no_archive_is_an_error_that_says_so():
    for content in (b"", b"hello", os.urandom(5000), gzip.compress(b"hello" * 1000), b"PK\x03\x04" + bytes(100)):
        with pytest.raises(errors.ArtifactError, match=URI):
            opened(content)


def test_missing_object_is_not_found(s3, bucket):
    with pytest.raises(errors.NotFound):
        open_artifact(f"{bucket}/nothing.zip", storage_options=s3.storage_options)


def test_missing_zstandard_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(ImportError, match=r"torch-s3\[zstd\]"):
        opened(zstandard.compress(tar_of(FILES)))
