"""Pickles made to do harm: none runs code, each is a typed error, in bounded memory and little time."""

import codecs
import collections
import contextlib
import copyreg
import functools
import io
import json
import operator
import os
import pickle
import random
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib

import fsspec
import joblib
import numpy as np
import pytest
import scipy.sparse
import skops.io
from archives import tar_of, zip_of
from sklearn.preprocessing import FunctionTransformer

from torch_s3 import errors
from torch_s3.artifacts import follow, load_estimator, load_state_dict

URI = "memory://hostile/model.pkl"
LOADERS = {"estimator": functools.partial(load_estimator, trusted=["sklearn"]), "state": load_state_dict}


def load(content, uri=URI, **arguments):
    fsspec.filesystem("memory").pipe_file(uri.removeprefix("memory://"), content)
    return load_estimator(uri, **arguments)


class Call:
    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


def ways(marker):
    """Code that makes a file, by every way known."""
    code = f"open({str(marker)!r}, 'w').close()"
    touch = f"touch {marker}"
    return {
        "os.system": Call(os.system, touch),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "subprocess": Call(subprocess.call, ["touch", str(marker)]),
        "Popen": Call(subprocess.Popen, ["touch", str(marker)]),
        "eval through functools": Call(functools.reduce, eval, [code, {}]),
        "partial": Call(list, Call(map, Call(functools.partial, eval), [code])),
        "partial of system": Call(functools.partial, os.system, touch),
        "methodcaller": Call(list, Call(map, Call(operator.methodcaller, "__call__", code), [eval])),
        "attrgetter": Call(operator.attrgetter("system"), os),
        "getattr": Call(getattr, Call(__import__, "os"), "system"),
        "import": Call(__import__, "antigravity"),
        "nested": Call(list, Call(map, eval, [code])),
        "in a dict": {"a": {"b": [(Call(os.system, touch),)]}},
        "as a key": {Call(os.system, touch): 1},
        "as state": Call(dict, state=Call(os.system, touch)),
        "numpy's loader": Call(np.load, str(marker), None, True),
        "numpy's memmap": Call(np.memmap, str(marker), "u1", "w+", 0, (1,)),
        "joblib's loader": Call(joblib.load, str(marker)),
        "a codec": Call(codecs.encode, touch, "rot13"),
        "in an array of objects": np.array([Call(os.system, touch)], dtype=object),
        "compile": Call(compile, code, "x", "exec"),
        "reconstructor": Call(copyreg._reconstructor, type(ways), object, None),
    }


def dumped(thing, how):
    if how == "joblib":
        file = io.BytesIO()
        joblib.dump(thing, file)
        return file.getvalue()
    if how == "zlib":
        return zlib.compress(dumped(thing, "joblib"))
    return pickle.dumps(thing, protocol=how)


@pytest.mark.parametrize("way", list(ways("x")))
def test_code_is_not_run_but_named(tmp_path, way):
    marker = tmp_path / "ran"
    for how in (0, 2, 4, 5, "joblib", "zlib"):
        try:
            content = dumped(ways(marker)[way], how)
        except (pickle.PicklingError, TypeError):  # some have no such pickle
            continue
        for name, loader in LOADERS.items():
            if how == "zlib" and name == "state":
                continue
            fsspec.filesystem("memory").pipe_file("/hostile/model.pkl", content)
            with pytest.raises(errors.UnsafeArtifact, match=URI) as caught:
                loader(URI)
            assert caught.value.asks_for
            assert not marker.exists()
    assert "antigravity" not in sys.modules


def test_all_that_is_asked_for_is_listed_also_after_pickling_the_error():
    content = pickle.dumps([Call(os.system, "true"), Call(print, 1), Call(subprocess.call, [])])
    with pytest.raises(errors.UnsafeArtifact) as caught:
        load(content)

    assert caught.value.asks_for == ("builtins.print", "posix.system", "subprocess.call")
    assert all(name in str(caught.value) for name in caught.value.asks_for)
    assert pickle.loads(pickle.dumps(caught.value)).asks_for == caught.value.asks_for


def op(*parts):
    """A pickle of protocol 4 out of opcodes and short strings."""
    return b"\x80\x04" + b"".join(b"\x8c" + bytes([len(p)]) + p.encode() if isinstance(p, str) else p for p in parts)


GLOBAL, MEMO, CALL = b"\x93", b"\x94", b"\x85R."


@pytest.mark.parametrize(
    "content",
    [
        op("os", MEMO, "system", MEMO, b"00", b"h\x00h\x01", GLOBAL, "touch MARKER", CALL),  # by way of the memo
        b"\x80\x04\x8c\x02os2\x8c\x06systemq\x050\x8c\x06systemq\x060h\x06\x93\x8c\x0ctouch MARKER\x85R.",
        op(b"c_codecs\nencode\n", "os", "latin1", b"\x86R", "system", GLOBAL, "touch MARKER", CALL),  # it is made
        op(b"cbuiltins\nstr\n", "os", b"\x85R", "system", GLOBAL, "touch MARKER", CALL),
        op("sklearn", "os.system", GLOBAL, "touch MARKER", CALL),  # what a trusted module has imported
        op("sklearn.datasets", "_base.os.system", GLOBAL, "touch MARKER", CALL),
        op("sklearn.datasets._openml", "gzip.GzipFile", GLOBAL, b"(", "MARKER", "w", b"tR."),
        op("sklearn.base", "BaseEstimator.get_params.__globals__", GLOBAL, b"."),
        op("sklearn.utils._testing", "assert_run_python_script_without_output", GLOBAL, "open('MARKER', 'w')", CALL),
        op("sklearn.datasets", "load_files", GLOBAL, "/", CALL),  # a function
        b"(S'touch MARKER'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch MARKER'\no.",
        b"cos\nsystem\n(S'touch MARKER'\ntR.",
        b'c__builtin__\neval\n(S\'open("MARKER", "w")\'\ntR.',
        b"\x80\x02c__builtin__\neval\nX\x13\x00\x00\x00open('MARKER', 'w')\x85R.",
        op("os", "system", GLOBAL, b"(", "touch MARKER", b"t\x81."),
        op("os", "system", GLOBAL, b"(", "touch MARKER", b"t}\x92."),
    ],
)
def test_names_are_found_however_they_are_put_together(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.UnsafeArtifact, match=URI):
        load(content.replace(b"MARKER", b"ran"[:6].ljust(6, b"_")), trusted=["sklearn"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"Pabc\n.", "persistent ids"),
        (b"\x80\x02X\x01\x00\x00\x00aQ.", "persistent ids"),
        (b"\x80\x02\x82\x01.", "by number"),
        (b"\x80\x02\x83\x01\x00.", "by number"),
        (b"\x80\x02\x84\x01\x00\x00\x00.", "by number"),
        (b"\x80\x05\x97.", "buffers from elsewhere"),
        (op("sklearn.base", "BaseEstimator", GLOBAL, b"N}", "predict", b"K\x01s\x86b."), "changes"),
        (op("sklearn.base", "BaseEstimator", GLOBAL, b"K\x01a."), "changes"),
        (op("builtins", "list", GLOBAL, b")RK\x01\x85R."), "calls what is no name"),
        (op("builtins", "list", GLOBAL, "builtins", "dict", GLOBAL, b"R."), "with no tuple"),
    ],
)
def test_what_no_pickle_of_data_needs_is_refused(content, why):
    with pytest.raises(errors.UnsafeArtifact, match=why):
        load(content, trusted=["sklearn"])


@pytest.mark.parametrize(
    "thing",
    [
        Call(bytearray, 10**12),
        Call(bytes, 10**12),
        Call(list, Call(range, 10**12)),
        Call(set, Call(range, 10**12)),
        Call(np.ndarray, (10**12,)),
        Call(np.dtype, np.dtype("f8")),
        Call(np._core.multiarray._reconstruct, np.ndarray, (10**12,), b"b"),
        Call(np._core.multiarray.scalar, np.dtype("O"), b"12345678"),
        Call(np._core.numeric._frombuffer, b"12345678", np.dtype("O"), (1,), "C"),
        Call(np.random._pickle.__randomstate_ctor, "x", Call),
        Call(copyreg._reconstructor, dict, bytearray, 10**12),
    ],
)
def test_harmless_functions_are_not_given_what_makes_them_harmful(thing):
    tracemalloc.start()
    try:
        with pytest.raises(errors.UnsafeArtifact):
            load(pickle.dumps(thing), trusted=["sklearn"])
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


_RANDOM = np.random.RandomState(0)
_MAKE_RANDOM, _MAKE_BITS = np.random._pickle.__randomstate_ctor, np.random._pickle.__bit_generator_ctor


def _random_state(kind, *, outer=(), inner=()):
    state = kind(0).state
    return {**state, "state": {**state["state"], **dict(inner)}, **dict(outer)}


@pytest.mark.parametrize("position", [-1, 625, 10**7, 600.5, np.int64(10**7), "x"])
@pytest.mark.parametrize(
    "make",
    [
        lambda at: Call(_MAKE_RANDOM, state=_random_state(np.random.MT19937, inner={"pos": at})),
        lambda at: Call(_MAKE_RANDOM, state=("MT19937", _RANDOM.get_state()[1], at, 0, 0.0)),
        lambda at: Call(_MAKE_BITS, state=_random_state(np.random.MT19937, inner={"pos": at})),
        lambda at: Call(_MAKE_BITS, state=(_random_state(np.random.MT19937, inner={"pos": at}), None)),
        lambda at: Call(
            _MAKE_BITS, np.random.Philox, state=(_random_state(np.random.Philox, outer={"buffer_pos": at}), None)
        ),
        lambda at: Call(
            _MAKE_RANDOM, state=collections.OrderedDict(_random_state(np.random.MT19937, inner={"pos": at}))
        ),
    ],
)
def test_random_generators_that_go_on_beyond_their_numbers_are_refused(make, position):
    with pytest.raises(errors.UnsafeArtifact, match="a random generator of no such state"):
        load(pickle.dumps(make(position)))


def test_random_generators_of_old_numpy_go_on():
    assert load(pickle.dumps(Call(_MAKE_RANDOM, state=_RANDOM.get_state()))).rand() == np.random.RandomState(0).rand()


def _dtype(kind, *state):
    return Call(np.dtype, kind, False, True, state=state)


@pytest.mark.parametrize(
    "dtype",
    [
        _dtype("V8", 3, "|", None, ("a",), {"a": (np.dtype("f8"), 4096)}, 8, 1, 16),  # a field outside of it
        _dtype("V8", 3, "|", None, ("a",), {"a": (np.dtype("f8"), -8)}, 8, 1, 16),
        _dtype("V8", 3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 16),  # objects that are said to be none
        _dtype("S8", 3, "|", None, None, None, 10**9, 1, 0),  # larger than it was
        _dtype("V8", 3, "|", (np.dtype("f8"), (100,)), None, None, 800, 1, 0),
        _dtype("f8", 3, "<", None, None, None, -1, -1, 63),  # numbers that are said to be objects
        Call(np.dtype, "f8", False, False, state=(3, ">", None, None, None, -1, -1, 0)),  # numpy's own one
    ],
)
def test_dtypes_that_let_numpy_read_what_is_not_theirs_are_refused(dtype):
    before = np.dtype("f8").byteorder
    array = Call(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b", state=(1, (1,), dtype, False, b"12345678"))
    with pytest.raises(errors.UnsafeArtifact, match="dtype"):
        load(pickle.dumps(array))
    assert np.dtype("f8").byteorder == before


def test_dtype_that_is_changed_while_it_is_used_is_refused():
    made = pickle.dumps(_dtype("V8", 3, "|", None, None, None, 8, 1, 0), protocol=2)[2:-1]
    twice = b"\x80\x02(" + made + b"2" + made[made.index(b"(K\x03") :] + b"l."
    with pytest.raises(errors.UnsafeArtifact, match="dtype"):
        load(twice)


@pytest.mark.parametrize("shape", [b"K\x64", b"\x8a\x08" + b"\xff" * 7 + b"\x7f"])
def test_array_of_joblib_that_claims_more_than_there_is_is_truncated(shape):
    file = io.BytesIO()
    joblib.dump(np.arange(9.0), file)
    content = file.getvalue().replace(b"K\x09\x85", shape + b"\x85", 1)
    assert content != file.getvalue()

    with pytest.raises(errors.ArtifactError, match=r"truncated|no such|frame"):
        load(content)


@pytest.mark.parametrize("how", [0, 2, 3, 4, 5, "joblib", "zlib"])
def test_truncated_files_are_errors(how):
    content = dumped({"a": np.arange(100_000.0), "b": "text" * 100, "c": [1, 2.5, None]}, how)
    for part in (0, 0.0001, 0.001, 0.1, 0.5, 0.99):
        with pytest.raises(errors.ArtifactError):
            load(content[: int(part * len(content))])
    with pytest.raises(errors.ArtifactError):
        load(content[:-1])


@pytest.mark.parametrize("how", [2, 5, "joblib"])
def test_flipped_bits_are_errors_or_other_values(how):
    content = dumped({"a": np.arange(10), "b": "text", "c": [1, (2.5, None)], "d": {1, 2}}, how)
    for at in range(len(content)):
        for bit in (1, 128):
            flipped = bytearray(content)
            flipped[at] ^= bit
            with contextlib.suppress(errors.ArtifactError):
                load(bytes(flipped))


def test_fields_of_a_dtype_that_is_made_are_not_changed():
    """numpy keeps the very dict."""
    content = pickle.dumps(np.zeros(3, [("a", "f8"), ("b", "f8")]), protocol=2)
    at = content.index(b"}q")  # the fields, and where they are kept
    change = b"h" + content[at + 2 : at + 3] + b"X\x01\x00\x00\x00aNs0."
    with pytest.raises(errors.UnsafeArtifact, match="fields"):
        load(content[:-1] + change)


def _array_of_joblib(*changes):
    file = io.BytesIO()
    joblib.dump(np.arange(9.0), file, protocol=2)
    content = file.getvalue()
    for old, new in changes:
        assert old in content
        content = content.replace(old, new, 1)
    return content


def test_array_of_joblib_is_made_as_joblib_makes_it():
    assert load(_array_of_joblib()).shape == (9,)
    for changes in (
        [(b"X\x0a\x00\x00\x00allow_mmap", b"X\x04\x00\x00\x00read")],  # a method
        [(b"X\x05\x00\x00\x00order", b"X\x05\x00\x00\x00odder")],
        [(b"K\x09\x85", b"J\xff\xff\xff\xff\x85")],
        [
            (
                b"joblib.numpy_pickle\nNumpyArrayWrapper\nq\x00)",
                b"joblib.numpy_pickle\nNumpyArrayWrapper\nq\x00K\x01\x85",
            )
        ],
    ):
        with pytest.raises(errors.UnsafeArtifact):
            load(_array_of_joblib(*changes))
    again = _array_of_joblib()[:-1] + b"0h\x01}b."
    with pytest.raises(errors.UnsafeArtifact, match="twice"):
        load(again)


def test_memo_with_holes_takes_no_memory():
    with pytest.raises(errors.ArtifactError, match="holes"):
        load(b"\x80\x02]r\xff\xff\xff\xff.")


def test_long_claims_take_no_memory():
    for opcode in (b"\x8e", b"\x96", b"\x8d", b"\x95"):
        with pytest.raises(errors.ArtifactError, match="truncated"):
            load(b"\x80\x05" + opcode + struct.pack("<Q", 10**12) + b".")


def test_deep_nesting_is_followed_without_recursion():
    deep = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."

    assert isinstance(load(deep), list)
    with pytest.raises(errors.UnsafeArtifact, match="nested too deeply"):
        load(b"\x80\x02})" + b"\x85" * 100_000 + b"K\x01s.")
    with pytest.raises(errors.UnsafeArtifact, match="nested too deeply"):  # 2 to the 60 nodes
        load(b"\x80\x02})q\x00" + b"".join(b"h\x00h\x00\x86q\x00" for _ in range(60)) + b"K\x01s.")


def test_frames_that_end_elsewhere_are_refused():
    """joblib's unpickler reads frames whole, ours reads through them: they must not find different arrays."""
    file = io.BytesIO()
    joblib.dump([np.arange(9.0)], file)
    content = bytearray(file.getvalue())
    at = content.index(b"\x95")
    size = struct.unpack_from("<Q", content, at + 1)[0]
    for other in (size + 1, size + 8):
        struct.pack_into("<Q", content, at + 1, other)
        with pytest.raises(errors.ArtifactError, match=r"frame"):
            load(bytes(content))


def test_pickle_by_another_name_is_no_skops():
    content = pickle.dumps([1, 2])
    with pytest.raises(errors.ArtifactError, match="its name says skops"):
        load(content, uri="memory://hostile/model.skops")
    with pytest.raises(errors.ArtifactError, match="format= says skops"):
        load(content, format="skops")

    assert load(content, uri="memory://hostile/model.skops", format="pickle") == [1, 2]


def test_code_in_an_archive_is_not_run(tmp_path):
    content = tar_of({"model.pkl": pickle.dumps(ways(tmp_path / "ran")["os.system"])}, "w:gz")

    with pytest.raises(errors.UnsafeArtifact, match=r"model\.tar\.gz#model\.pkl") as caught:
        load(content, uri="memory://hostile/model.tar.gz")
    assert caught.value.asks_for == ("posix.system",)
    assert not (tmp_path / "ran").exists()


def test_bomb_of_zlib_is_refused_in_bounded_memory():
    content = zlib.compress(bytes(300_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(errors.ArtifactError, match="raise max_ratio"):
            load(content, max_ratio=100)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


def test_trust_in_a_module_is_no_trust_in_pythons_own():
    for name in ("os", "subprocess", "builtins", "functools", "operator", "posix"):
        with pytest.raises(errors.UnsafeArtifact):
            load(
                pickle.dumps([Call(subprocess.Popen, ["true"]), Call(os.system, "true"), Call(eval, "1")]),
                trusted=[name],
            )
    with pytest.raises(errors.UnsafeArtifact):
        load(pickle.dumps(Call(functools.partial, print)), trusted=["functools"])


def test_exact_names_are_trusted():
    found = load(pickle.dumps(functools.partial(print, 1)), trusted=["functools.partial", "builtins.print"])

    assert found.func is print


def test_whole_trust_is_refused():
    with pytest.raises(TypeError, match="nobody can trust all"):
        load(b"N.", trusted=True)


def test_old_files_of_joblib_are_refused():
    content = op("joblib.numpy_pickle", "NDArrayWrapper", GLOBAL, b")\x81}", "filename", "/etc/passwd", b"sb.")
    with pytest.raises(errors.UnsafeArtifact, match=r"before 0\.10"):
        load(content, trusted=["joblib.numpy_pickle.NDArrayWrapper"])


class _Stub:
    """Stands for whatever a pickle asks for."""

    def __new__(cls, *_, **__):
        return object.__new__(cls)

    def __init__(self, *_, **__): ...

    def take(self, *_): ...

    __setstate__ = __setitem__ = append = extend = update = add = take


def _asked_by(unpickler, content):
    names = set()

    class Recording(unpickler):
        def find_class(self, module, name):
            names.add((module, name))
            return _Stub

    with contextlib.suppress(Exception):
        Recording(io.BytesIO(content)).load()
    return names


def test_unpicklers_ask_for_no_name_that_was_not_found():
    """Of what is left of pickles after random edits, those that can be followed."""
    rng = random.Random(0)
    things = [
        {"a": [1, 2.5, b"y"], "b": (1, (2, 3))},
        [np.arange(3), np.float32(2)],
        {1, 2},
        [Call(_Stub, 1, state={})] * 2,
    ]
    followed = 0
    for _ in range(6000):
        content = bytearray(pickle.dumps(rng.choice(things), protocol=rng.randrange(6)))
        for _ in range(rng.randrange(5)):
            at, other = rng.randrange(len(content)), rng.randrange(len(content))
            content[at : at + rng.randrange(2)] = rng.choice([rng.randbytes(1), content[other : other + 12]])
        try:
            found = follow.outline(memoryview(bytes(content)), is_free=lambda _: True)
        except (EOFError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, struct.error):
            continue
        if found.refused is None:
            followed += 1
            for unpickler in (pickle.Unpickler, pickle._Unpickler):
                assert _asked_by(unpickler, bytes(content)) <= set(found.names), content
    assert followed > 1000


def test_matrix_that_is_a_bomb_within_a_skops_is_refused_in_bounded_memory():
    matrix = scipy.sparse.csr_matrix((np.zeros(4_000_000), (np.zeros(4_000_000, int), np.arange(4_000_000))))
    both = {"small": scipy.sparse.eye_array(3, format="csr"), "large": matrix}
    content = skops.io.dumps(both, compression=zipfile.ZIP_DEFLATED, compresslevel=9)
    del matrix, both
    tracemalloc.start()
    try:
        with pytest.raises(errors.ArtifactError, match="what its arrays are in unpacks to more than 50 times its"):
            load(content, uri="memory://hostile/model.skops", max_ratio=50)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()

    assert load(content, uri="memory://hostile/model.skops", trusted=["scipy.sparse"])["small"].shape == (3, 3)


def test_skops_of_one_array_many_times_is_refused_in_bounded_memory():
    with zipfile.ZipFile(io.BytesIO(skops.io.dumps([np.zeros(1_000_000)]))) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    schema = json.loads(members["schema.json"])
    schema["content"] = [{**schema["content"][0], "__id__": 10**9 + number} for number in range(100)]
    content = zip_of({**members, "schema.json": json.dumps(schema)})
    del members
    tracemalloc.start()
    try:
        with pytest.raises(errors.ArtifactError, match="what its arrays are in unpacks to more than 1100 times its"):
            load(content, uri="memory://hostile/model.skops")
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_skops_that_asks_for_a_function_is_refused():
    saved = io.BytesIO(skops.io.dumps(FunctionTransformer(np.log1p)))
    with zipfile.ZipFile(saved) as archive:
        schema = json.loads(archive.read("schema.json"))
    schema["content"]["content"]["func"] |= {"__class__": "system", "__module__": "os"}
    changed = zip_of({"schema.json": json.dumps(schema)})

    for trusted in ([], ["sklearn"], ["os"]):
        with pytest.raises(errors.UnsafeArtifact, match=r"os\.system") as caught:
            load(changed, uri="memory://hostile/model.skops", trusted=trusted)
        assert caught.value.asks_for == ("os.system",)


@pytest.mark.parametrize("schema", [b"", b"[]", b"{}", b"[" * 100_000, b'{"__class__": "x"}', b"\xff"])
def test_skops_of_another_schema_is_an_error(schema):
    with pytest.raises(errors.ArtifactError, match=r"model\.skops"):
        load(zip_of({"schema.json": schema}), uri="memory://hostile/model.skops")


ORDERED = op("collections", "OrderedDict", GLOBAL, b")R")
MANY = b"cbuiltins\nrange\n\x8a\x05" + (10**10).to_bytes(5, "little") + b"\x85R"
HEAVY = b")\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(60))  # tuples of 2 to the 60 nodes


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (ORDERED + op(b"}", "__setstate__", "builtins", "list", GLOBAL, b"sb")[2:] + MANY + b"b.", "twice"),
        (ORDERED + op(b"}", "__setstate__", "numpy", "memmap", GLOBAL, b"sb", "/etc/hostname", b"b.")[2:], "twice"),
        (ORDERED + op(b"}", "append", "builtins", "list", GLOBAL, b"sb")[2:] + MANY + b"a.", "adds"),
        (
            op("sklearn.utils._bunch", "Bunch", GLOBAL, b")\x81", "append", "builtins", "list", GLOBAL, b"s")
            + MANY
            + b"a.",
            "adds",
        ),
        (
            op("copyreg", "_reconstructor", GLOBAL, "sklearn.utils._bunch", "Bunch", GLOBAL, "builtins", "dict", GLOBAL)
            + op(b"}", "append", "builtins", "list", GLOBAL, b"s\x87R")[2:]
            + MANY
            + b"a.",
            "adds",
        ),
    ],
)
def test_methods_that_a_pickle_has_set_are_not_called(content, why):
    with pytest.raises(errors.UnsafeArtifact, match=why):
        load(content, trusted=["sklearn"])


def test_file_is_not_written_by_what_trusted_types_call(tmp_path):
    marker = tmp_path / "ran"
    content = ORDERED + op(b"}", "__setstate__", "sklearn.utils.parallel", "Parallel", GLOBAL, b")Rsb")[2:]
    content += op("numpy", "memmap", GLOBAL, b"(X" + struct.pack("<I", len(str(marker))) + str(marker).encode())[2:]
    content += op("uint8", "w+", b"K\x00K\x64\x85t}\x87\x85b.")[2:]
    with pytest.raises(errors.UnsafeArtifact, match="twice"):
        load(content, trusted=["sklearn"])
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        op(b"(", HEAVY, b"1", "builtins", "set", GLOBAL, b"]h\x3ca\x85R."),
        op(b"(", HEAVY, b"1", "collections", "OrderedDict", GLOBAL, b"]]h\x3caNaa\x85R."),
        op(b")\x94", b"".join(b"cbuiltins\ntuple\n]h%cah%ca\x85R\x94" % (i, i) for i in range(60)), b"}h\x3cNs."),
        op(b"(", b"K\x01" * 30_000, b"t\x940}(", b"h\x00N" * 30_000, b"u."),  # a long key, over and over
        op(b"\x8b", struct.pack("<i", 300_000), b"\x01" * 300_000, b"\x940}(", b"h\x00N" * 200_000, b"u."),
        op(b"](NNNNe\x94", b"".join(b"](h%ch%ce\x94" % (i, i) for i in range(60)), b"ccopyreg\n_reconstructor\n")
        + b"cbuiltins\nstr\n2h\x3c\x87R.",  # str of a list of lists of lists
        op(b"B", struct.pack("<I", 10**6), bytes(10**6), b"\x940(", b"cbuiltins\nbytearray\nh\x00\x85R" * 5000, b"l."),
    ],
)
def test_little_that_is_used_over_and_over_takes_little_time_and_memory(content):
    with pytest.raises(errors.UnsafeArtifact):
        load(content)


def test_array_of_objects_that_claims_more_than_it_has_is_refused():
    """numpy took the memory, cleared it, and crashed where there was none."""
    state = (1, (10**10,), np.dtype("O"), False, [None])
    with pytest.raises(errors.UnsafeArtifact, match="isn't what it says"):
        load(pickle.dumps(Call(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b", state=state)))


def test_shape_of_a_state_dict_is_no_range():
    fsspec.filesystem("memory").pipe_file("/hostile/model.pkl", op("torch", "Size", GLOBAL) + MANY + b"\x85R.")
    with pytest.raises(errors.ArtifactError, match="no sizes"):
        load_state_dict(URI)
