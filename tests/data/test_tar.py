"""Tar files of samples, against tarfile and webdataset."""

import contextlib
import io
import itertools
import json
import pickle
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from archives import tar_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from webdataset import tariterators

from torch_s3 import DecodeError, IntegrityError
from torch_s3.data import tar
from torch_s3.data.tar_decode import IMAGES

URI = "s3://b/shard.tar"
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def _special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def _bounds(data, step=1 << 30):
    scan = tar.TarScan(URI)
    for start in range(0, len(data), step):
        scan.feed(memoryview(data)[start : start + step])
    return scan.finish().tolist()


def _samples(data):
    bounds = _bounds(data)
    return [
        {
            name: value if isinstance(value, str) else bytes(value)
            for name, value in tar.sample(memoryview(data)[start:stop], URI, number, start).items()
        }
        for number, (start, stop) in enumerate(itertools.pairwise(bounds))
    ]


def _by_webdataset(path):
    with path.open("rb") as stream:  # its own opening leaves files open
        files = tariterators.tar_file_expander([{"url": "", "stream": stream}])
        return _without_url(tariterators.group_by_keys(files))


def _without_url(samples):
    return [{name: value for name, value in sample.items() if name != "__url__"} for sample in samples]


def test_reads_what_webdataset_has_written(tmp_path):
    path = tmp_path / "s.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(5):
            writer.write({"__key__": f"a.b/{number:04}", "txt": f"text {number}", "cls": number, "json": {"n": number}})

    samples = _samples(path.read_bytes())

    assert _without_url(samples) == _by_webdataset(path)
    assert samples[3] == {
        "__key__": "a.b/0003",
        "__url__": URI,
        "cls": b"3",
        "json": b'{"n": 3}',
        "txt": b"text 3",
    }


MIXTURE = [
    ("__meta__", b"of webdataset"),
    (_special("folder", tarfile.DIRTYPE), b""),
    ("folder/0.jpg", b"x" * 700),
    ("folder/0.SEG.png", b"y" * 512),
    ("README", b"no extension"),
    ("folder/1.jpg", b""),
    ("." + "/d.i.r/" * 3 + "x.txt", b"z"),
    ("é" * 70 + ".txt", "ü".encode()),
    ("n" * 90 + "/" + "m" * 90 + ".txt", b"prefix"),
    ("__sub__/x.txt", b"of webdataset"),
    ("folder/0.jpg", b"the same name once more"),
]


@pytest.mark.parametrize("form", FORMATS)
def test_samples_of_every_format_are_those_of_webdataset(form, tmp_path):
    members = [*MIXTURE, *([] if form == "ustar" else [("long" * 100 + ".cls", b"7")])]
    members = [member for member in members if form != "ustar" or not str(member[0]).startswith("é")]
    path = tmp_path / "s.tar"
    path.write_bytes(tar_of(members, format=FORMATS[form]))

    samples = _samples(path.read_bytes())

    assert _without_url(samples) == _by_webdataset(path)
    assert samples[0] == {"__key__": "folder/0", "__url__": URI, "jpg": b"x" * 700, "seg.png": b"y" * 512}


def test_hidden_files_belong_to_no_sample():
    data = tar_of([("a/._0.jpg", b"of a Mac"), (".b.jpg", b"hidden"), ("a/0.jpg", b"x")])

    assert [sample["__key__"] for sample in _samples(data)] == ["a/0"]


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b/c", "é" * 60]), st.integers(0, 1100)), min_size=1, max_size=6),
    st.sampled_from([1, 100, 511, 512, 513, 1024, 3000]),
    st.sampled_from(["gnu", "pax"]),
)
def test_bounds_are_the_same_however_the_bytes_are_cut(members, step, form):
    data = tar_of(
        [(f"{name}.{number}", b"x" * size) for number, (name, size) in enumerate(members)], format=FORMATS[form]
    )
    bounds = _bounds(data)

    assert _bounds(data, step) == bounds
    assert sum(len(sample) - 2 for sample in _samples(data)) == len(members)
    assert len(bounds) - 1 == sum(
        each[0] != before[0] for each, before in zip(members, [(None, 0), *members], strict=False)
    )


def test_a_sample_is_whole_when_the_next_one_begins():
    data = memoryview(tar_of([("0.a", b"x"), ("0.b", b"x"), ("1.a", b"x")]))
    scan = tar.TarScan(URI)
    scan.feed(data[:2047])
    assert scan.bounds().tolist() == [0]
    scan.feed(data[2047:2560])
    assert scan.bounds().tolist() == [0, 2048]


def test_the_end_mark_may_be_missing():
    data = tar_of([("0.a", b"x"), ("1.a", b"x")])

    assert _bounds(data[:2048]) == _bounds(data[:2560]) == _bounds(data) == [0, 1024, 2048]


def test_a_tar_without_samples_is_read():
    assert _bounds(tar_of([])) == [0]


@pytest.mark.parametrize("cut", [1, 511, 513, 1100, 1535, 1600, 1999])
def test_a_shard_that_is_cut_off_is_named(cut):
    data = tar_of([("0.a", b"x"), ("1.a", b"x")])[:cut]

    with pytest.raises(IntegrityError, match=rf"^{URI}: record [01], at byte (0|1024): .*cut off after {cut} bytes"):
        _bounds(data)


def test_a_shard_that_is_cut_off_after_a_long_name_is_named():
    data = tar_of([("é" * 60 + ".a", b"x")])

    for cut in (512, 700, 1024, 1200):
        with pytest.raises(IntegrityError, match="cut off"):
            _bounds(data[:cut])


@given(st.one_of(st.integers(0, 147), st.integers(156, 511)), st.integers(0, 7))  # a checksum has several forms
def test_no_flipped_bit_of_a_header_is_missed(byte, bit):
    data = bytearray(tar_of([("0.a", b"x"), ("1.a", b"x")]))
    data[1024 + byte] ^= 1 << bit

    with pytest.raises(IntegrityError, match="record 0, at byte 1024: "):
        _bounds(bytes(data))


def test_a_header_that_was_zeroed_is_an_error():
    data = bytearray(tar_of([("0.a", b"x"), ("1.a", b"x"), ("2.a", b"x")]))
    data[1024:1536] = bytes(512)

    with pytest.raises(IntegrityError, match="at byte 1536: "):
        _bounds(bytes(data))


def test_tars_that_were_concatenated_are_refused():
    data = tar_of([("0.a", b"x")])

    with pytest.raises(IntegrityError, match="something follows the end mark"):
        _bounds(data + data)


@pytest.mark.parametrize("data", [b"", b"\x1f\x8b" + b"x" * 600, b"PK\x03\x04" + bytes(600)])
def test_what_is_no_tar_is_refused(data):
    with pytest.raises(IntegrityError, match=r"not a tar|an empty one"):
        _bounds(data)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (_special("0.jpg", tarfile.SYMTYPE, "/etc/passwd"), "'0.jpg' is a symbolic link"),
        (_special("0.jpg", tarfile.LNKTYPE, "1.jpg"), "'0.jpg' is a hard link"),
        (_special("0.jpg", tarfile.CHRTYPE), "'0.jpg' is a device"),
        (_special("0.jpg", tarfile.FIFOTYPE), "'0.jpg' is a pipe"),
        ("../0.jpg", "'../0.jpg' leads out of its folder"),
        ("a/../../0.jpg", "'a/../../0.jpg' leads out of its folder"),
        ("/etc/0.jpg", "'/etc/0.jpg' leads out of its folder"),
    ],
)
def test_links_and_names_that_lead_elsewhere_are_refused(info, message):
    data = tar_of([("1.jpg", b"x"), (info, b"")])

    with pytest.raises(IntegrityError, match=rf"record 0, at byte 1024: {message}"):
        _bounds(data)


def test_a_header_that_says_it_is_huge_is_refused():
    block = bytearray(tar.member("0.a", 0)[0])
    for size in (b"\x80" + b"\xff" * 11, b"\x80" + bytes(4) + b"\xff" * 7, b"77777777777\0"):
        block[124:136] = size
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        with pytest.raises(IntegrityError, match=r"holds no number|cut off"):
            _bounds(bytes(block) + bytes(1024))


def test_a_long_name_is_bounded():
    info = _special("x", b"L")
    data = bytearray(tar_of([("0.a", b"")]))[:512]
    data[156:157] = info.type
    data[124:136] = b"%011o\0" % (1 << 30)
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)

    with pytest.raises(IntegrityError, match="says that it has 1073741824 bytes"):
        _bounds(bytes(data))


def _texts(kind, text):
    """A member that says something of others: a PAX header, or a long name."""
    return _special("x", kind), text


def test_a_long_name_ends_at_its_first_nul():
    data = tar_of([_texts(b"L", b"long.x\0junk.y\0"), ("0.a", b"x")])

    assert [sample["__key__"] for sample in _samples(data)] == ["long"]


def test_a_global_pax_header_is_read_over():
    data = tar_of([_texts(b"g", b"17 comment=hello\n"), ("0.a", b"x"), _texts(b"g", b"7 a=bc\n"), ("1.a", b"y")])

    assert [(sample["__key__"], sample["a"]) for sample in _samples(data)] == [("0", b"x"), ("1", b"y")]


@pytest.mark.parametrize("text", [b"12 path=1.b\n", b"10 size=0\n"])
def test_a_global_pax_header_that_changes_members_is_refused(text):
    data = tar_of([("0.a", b"x"), _texts(b"g", text), ("1.a", b"y")])

    with pytest.raises(IntegrityError, match=r"record 0, at byte 1536: a global PAX header sets the (path|size)"):
        _bounds(data)


def test_an_extension_that_is_there_twice_is_an_error():
    data = tar_of([("0.jpg", b"x"), ("0.JPG", b"y")])

    with pytest.raises(IntegrityError, match=rf"^{URI}: record 0, at byte 1024: sample '0' has 'jpg' twice"):
        _samples(data)


def test_a_slice_of_two_samples_is_no_sample():
    data = memoryview(tar_of([("0.a", b"x"), ("1.a", b"x")]))

    with pytest.raises(IntegrityError, match="is of another sample"):
        tar.sample(data, URI, 0, 0)
    with pytest.raises(IntegrityError, match="record 5, at byte 7000: it ends 511 bytes before"):
        tar.sample(data[:513], URI, 5, 7000)


@given(st.binary(max_size=1200))
def test_any_bytes_are_read_or_refused(noise):
    with contextlib.suppress(IntegrityError):
        _samples(noise)


@given(st.integers(0, 2047), st.binary(min_size=1, max_size=20))
def test_any_change_is_read_or_refused(at, noise):
    data = bytearray(tar_of([("é" * 60 + ".a", b"x")]))
    data[at : at + len(noise)] = noise
    with contextlib.suppress(IntegrityError):
        _samples(bytes(data))


# ---------------------------------------------------------------------- writing


@given(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=300),
    st.one_of(st.integers(0, 2000), st.integers(8**11 - 2, 8**11 + 2)),
)
def test_written_headers_are_those_that_tarfile_reads(name, size):
    name = name.strip("/").replace("..", "__") or "x"

    before, after = tar.member(name, size)

    info = tarfile.TarFile.open(fileobj=io.BytesIO(before + tar.END)).next()
    assert (info.name, info.size, info.isreg()) == (name, size, True)
    assert (size + len(after)) % 512 == 0
    assert len(before) % 512 == 0


def test_written_members_are_read_by_webdataset(tmp_path):
    names = ["a/0.txt", "a/1.txt", "é/" + "x" * 200 + ".txt"]
    pieces = []
    for name in names:
        before, after = tar.member(name, 3)
        pieces += [before, b"abc", after]
    path = tmp_path / "s.tar"
    path.write_bytes(b"".join([*pieces, tar.END]))

    assert [sample["__key__"] for sample in _by_webdataset(path)] == [name.partition(".")[0] for name in names]
    assert _without_url(_samples(path.read_bytes())) == _by_webdataset(path)


@pytest.mark.parametrize("name", ["", "/a", "../a", "a/../b", "a\0b"])
def test_a_name_that_would_be_refused_is_not_written(name):
    with pytest.raises(ValueError, match="is no name"):
        tar.member(name, 0)


# ---------------------------------------------------------------------- decoding


def _saved(save, value):
    file = io.BytesIO()
    save(file, value)
    return file.getvalue()


PICTURE = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))


def _sample(**members):
    return {
        "__key__": "0",
        "__url__": URI,
        **{name.replace("_", "."): memoryview(data) for name, data in members.items()},
    }


def test_members_are_decoded_by_their_extensions():
    png = _saved(lambda file, picture: picture.save(file, "png"), PICTURE)
    npz = io.BytesIO()
    np.savez(npz, a=np.arange(3))

    decoded = tar.decode(
        _sample(
            png=png,
            seg_png=png,
            cls=b" 7\n",
            txt="ü".encode(),
            json=b'{"a": [1]}',
            npy=_saved(np.save, np.arange(4)),
            npz=npz.getvalue(),
            pt=_saved(lambda file, value: torch.save(value, file), {"a": torch.ones(2)}),
            other=b"bytes",
        )
    )

    assert decoded["__key__"] == "0"
    assert decoded["png"].shape == (3, 2, 2)
    assert decoded["seg.png"].permute(1, 2, 0).tolist() == np.asarray(PICTURE).tolist()
    assert (decoded["cls"], decoded["txt"], decoded["json"]) == (7, "ü", {"a": [1]})
    assert decoded["npy"].tolist() == [0, 1, 2, 3]
    assert decoded["npz"]["a"].tolist() == [0, 1, 2]
    assert decoded["pt"]["a"].tolist() == [1, 1]
    assert decoded["other"] == b"bytes"


def test_images_come_as_asked_for():
    data = _saved(lambda file, picture: picture.save(file, "png"), PICTURE)

    assert tar.decode(_sample(png=data), "l")["png"].shape == (1, 2, 2)
    assert np.asarray(tar.decode(_sample(png=data), "pil")["png"]).tolist() == np.asarray(PICTURE).tolist()
    assert tar.decode(_sample(png=data), False)["png"] == data


def test_no_decoder_that_runs_programs_is_chosen():
    data = _saved(lambda file, picture: picture.save(file, "eps"), PICTURE)

    for how in IMAGES:
        with pytest.raises(DecodeError, match="'0', 'jpg'"):
            tar.decode(_sample(jpg=data), how)


def test_callables_decode_what_they_are_given():
    sample = _sample(cls=b"7", a_cls=b"8", pyd=pickle.dumps([1]), txt=b"x")

    assert tar.decode(sample, sorted) == ["__key__", "__url__", "a.cls", "cls", "pyd", "txt"]
    assert tar.decode(sample, {"cls": float, "a.cls": None, "pyd": pickle.loads}) == {
        "__key__": "0",
        "__url__": URI,
        "cls": 7.0,
        "a.cls": b"8",
        "pyd": [1],
        "txt": "x",
    }


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ({"pyd": pickle.dumps(1)}, "'0', 'pyd' is a pickle, which may run any code"),
        ({"a_pickle": pickle.dumps(1)}, "'0', 'a.pickle' is a pickle"),
        ({"cls": b"cat"}, "'0', 'cls' can't be decoded: ValueError"),
        ({"json": b"{"}, "'0', 'json' can't be decoded"),
        ({"txt": b"\xff"}, "'0', 'txt' can't be decoded"),
        ({"jpg": b"\xff\xd8\xff"}, "'0', 'jpg': not an image"),
        ({"npy": _saved(np.save, np.array([None]))}, "'0', 'npy' can't be decoded: .*allow_pickle"),
        ({"npy": _saved(np.savez, 1)}, "'0', 'npy' can't be decoded: ValueError"),
        ({"npz": b"PK"}, "'0', 'npz' can't be decoded"),
        ({"pt": pickle.dumps(print)}, "'0', 'pt' can't be decoded"),
    ],
)
def test_what_can_not_be_decoded_is_named(member, message):
    with pytest.raises(DecodeError, match=f"^{URI}: {message}"):
        tar.decode(_sample(**member))


@pytest.mark.parametrize("how", ["rgb8", 3, None, {"cls": "int"}])
def test_a_way_to_decode_that_can_not_be_meant_is_refused(how):
    with pytest.raises(ValueError, match="decode"):
        tar.check(how)


def test_json_of_webdatasets_writer_is_decoded(tmp_path):
    path = tmp_path / "s.tar"
    with webdataset.TarWriter(str(path)) as writer:
        writer.write({"__key__": "0", "json": {"n": [1]}, "jpg": np.zeros((4, 4, 3), np.uint8), "cls": 3})
    data = memoryview(path.read_bytes())
    start, stop = _bounds(data)

    decoded = tar.decode(tar.sample(data[start:stop], URI, 0, start))

    assert decoded["jpg"].shape == (3, 4, 4)
    assert (decoded["cls"], decoded["json"]) == (3, json.loads('{"n": [1]}'))
