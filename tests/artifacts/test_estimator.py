"""Files made by scikit-learn, joblib, pickle and skops, read from the embedded S3, beside s3fs, and back."""

import gc
import io
import os
import pickle
import subprocess
import sys
import textwrap
import warnings
import weakref
from functools import partial
from pathlib import Path

import fsspec
import joblib
import numpy as np
import pytest
import s3fs
import sklearn
import skops.io
import torch
from archives import tar_of, torch_saved, zip_of
from processes import in_new_process, measured_peak
from sklearn.datasets import load_digits
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.exceptions import InconsistentVersionWarning
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from sklearn.svm import SVC

import torch_s3
from torch_s3 import S3FileSystem, errors
from torch_s3.artifacts import load_estimator, save_estimator

X, Y = (part[:200] for part in load_digits(return_X_y=True))
PACKAGE = Path(torch_s3.__file__).parent.parent
MAKERS = {
    "linear": LinearRegression,
    "pipeline": lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=20, tol=1)),
    "forest": lambda: RandomForestClassifier(3, random_state=np.random.RandomState(1)),
    "boosting": lambda: HistGradientBoostingClassifier(max_iter=2),
    "svm": SVC,
    "neighbors": lambda: KNeighborsClassifier(algorithm="kd_tree"),
}
COMPRESSIONS = [0, 3, "zlib", "gzip", "bz2", "xz", "lzma", "lz4"]


@pytest.fixture(scope="module")
def fitted():
    return {name: make().fit(X, Y) for name, make in MAKERS.items()}


@pytest.fixture
def fs(s3):
    return S3FileSystem(**s3.storage_options)


def put(content, name="model.joblib"):
    fsspec.filesystem("memory").pipe_file(f"/models/{name}", content)
    return f"memory://models/{name}"


def dumped(estimator, **options):
    file = io.BytesIO()
    joblib.dump(estimator, file, **options)
    return file.getvalue()


def same(one, other):
    return type(one) is type(other) and np.array_equal(one.predict(X), other.predict(X))


@pytest.mark.parametrize("name", list(MAKERS))
def test_estimators_come_back_from_every_format(fitted, name):
    wanted = fitted[name]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        uri = put(pickle.dumps(wanted, protocol=protocol), "model.pkl")
        assert same(load_estimator(uri, trusted=["sklearn"]), wanted)
    for compress in COMPRESSIONS:
        assert same(load_estimator(put(dumped(wanted, compress=compress)), trusted=["sklearn"]), wanted)
    uri = put(skops.io.dumps(wanted), "model.skops")
    assert same(load_estimator(uri, trusted=["sklearn"]), wanted)


@pytest.mark.parametrize("name", ["model.joblib", "model.pkl", "model.pickle", "model.skops"])
@pytest.mark.parametrize("where", ["s3", "s3fs", "memory", "file"])
def test_what_is_saved_is_loaded(s3, bucket, fs, fitted, name, where, tmp_path):
    folder, options = bucket, {"filesystem": fs}
    if where == "s3fs":
        options = {"filesystem": s3fs.S3FileSystem(**s3.storage_options)}
    elif where != "s3":
        folder, options = ("memory://saved" if where == "memory" else tmp_path.as_uri()), {}

    stored = save_estimator(fitted["pipeline"], f"{folder}/{name}", **options)

    assert stored.etag or where not in ("s3", "s3fs")
    assert same(load_estimator(f"{folder}/{name}", trusted=["sklearn"], **options), fitted["pipeline"])


def test_saved_files_are_those_of_the_libraries(bucket, fs, fitted, s3):
    other = s3fs.S3FileSystem(**s3.storage_options)
    for compress in [None, *COMPRESSIONS[1:], ("xz", 1)]:
        save_estimator(fitted["linear"], f"{bucket}/m.joblib", compress=compress, filesystem=fs)
        with other.open(f"{bucket}/m.joblib") as file:
            assert same(joblib.load(file), fitted["linear"])
        other.invalidate_cache()
    save_estimator(fitted["linear"], f"{bucket}/m.skops", compress=9, filesystem=fs)
    assert same(skops.io.loads(fs.cat_file(f"{bucket}/m.skops")), fitted["linear"])
    save_estimator(fitted["linear"], f"{bucket}/m", format="pickle", filesystem=fs)
    assert same(pickle.loads(fs.cat_file(f"{bucket}/m")), fitted["linear"])


def test_failed_save_leaves_what_was_there(bucket, fs, fitted):
    uri = f"{bucket}/m.pkl"
    save_estimator(fitted["linear"], uri, filesystem=fs)

    with pytest.raises((pickle.PicklingError, AttributeError)):
        save_estimator([np.zeros(2_000_000), lambda: None], uri, filesystem=fs)
    with pytest.raises(errors.AlreadyExists):
        save_estimator(fitted["svm"], uri, overwrite=False, filesystem=fs)

    assert same(load_estimator(uri, trusted=["sklearn"], filesystem=fs), fitted["linear"])


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("m.h5", {}, "name it .skops"),
        ("m.pkl", {"compress": 3}, "compress= is for"),
        ("m.skops", {"compress": "xz"}, "level from 1 to 9"),
        ("m.skops", {"format": "sk"}, "format='sk': use one of skops, joblib, pickle"),
    ],
)
def test_save_of_what_there_is_no_way_for_is_refused(name, options, match):
    with pytest.raises(ValueError, match=match):
        save_estimator(1, f"memory://saved/{name}", **options)


def test_refusal_lists_what_to_trust(fitted):
    for uri in (
        put(dumped(fitted["forest"])),
        put(pickle.dumps(fitted["forest"]), "m.pkl"),
        put(skops.io.dumps(fitted["forest"]), "m.skops"),
    ):
        with pytest.raises(errors.UnsafeArtifact, match=r"sklearn\.tree\._tree\.Tree.*trusted=") as caught:
            load_estimator(uri)
        assert same(load_estimator(uri, trusted=caught.value.asks_for), fitted["forest"])
        if uri.endswith("skops"):
            assert caught.value.asks_for == ("sklearn.tree._tree.Tree",)


def test_types_are_trusted_by_name_by_module_and_as_types(fitted):
    uri = put(dumped(fitted["linear"]))
    for trusted in (
        "sklearn.linear_model._base.LinearRegression",
        ["sklearn"],
        ["sklearn.linear_model"],
        [LinearRegression],
        {LinearRegression},
        sklearn,
        [sklearn.linear_model],
    ):
        assert same(load_estimator(uri, trusted=trusted), fitted["linear"])
    for trusted in ([], ["sklearn.linear"], ["sklearn.tree"], [Ridge], ["sklearn.linear_model._base.LinearModel"]):
        with pytest.raises(errors.UnsafeArtifact, match=r"_base\.LinearRegression"):
            load_estimator(uri, trusted=trusted)


@pytest.mark.parametrize("name", ["m.joblib", "m.skops"])
def test_what_is_trusted_in_vain_is_named(fitted, name):
    content = skops.io.dumps(fitted["forest"]) if name.endswith("skops") else dumped(fitted["forest"])
    trusted = ["sklern", "sklearn.*", "builtins", "sklearn.ensemble"]

    with pytest.raises(errors.UnsafeArtifact, match=r"trusted, 'builtins', 'sklearn\.\*', 'sklern' names none of it"):
        load_estimator(put(content, name), trusted=trusted)


@pytest.mark.parametrize("trusted", [LinearRegression(), [LinearRegression()]])
def test_instance_is_nothing_to_trust(trusted):
    with pytest.raises(TypeError, match=r"LinearRegression\(\)\]: give its type, sklearn\.linear_model\._base\."):
        load_estimator("memory://models/none.pkl", trusted=trusted)


def test_refusal_of_a_module_of_torch_advises_to_save_its_state_dict():
    with pytest.raises(errors.UnsafeArtifact, match=r"state_dict\(\) saved") as caught:
        load_estimator(put(pickle.dumps(torch.nn.Linear(1, 1)), "m.pkl"))
    assert "skops" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (b"", "m.skops", "it is empty"),
        (b"", "m.pkl", "it is empty"),
        (b"junk", "m.skops", "it is no zip, and its name says skops"),
        (pickle.dumps(1), "m.skops", "it is a pickle file, and its name says skops"),
    ],
)
def test_what_is_no_estimator_is_told(content, name, words):
    with pytest.raises(errors.ArtifactError, match=f"{name}: {words}"):
        load_estimator(put(content, name))


def test_argument_that_is_given_is_the_one_that_is_named(fitted):
    with pytest.raises(errors.ArtifactError, match="max_bytes=100"):
        load_estimator(put(skops.io.dumps(fitted["linear"]), "m.skops"), max_bytes=100)


def test_functions_are_trusted_one_by_one():
    search = GridSearchCV(Ridge(), {"alpha": [1, 2]}, scoring="r2", cv=2).fit(X, Y)
    logs = make_pipeline(FunctionTransformer(np.log1p), LinearRegression()).fit(X, Y)
    for wanted, names in ((search, {"sklearn.metrics._regression.r2_score"}), (logs, {"numpy.log1p"})):
        with pytest.raises(errors.UnsafeArtifact) as caught:
            load_estimator(put(dumped(wanted)), trusted=["sklearn"])
        assert set(caught.value.asks_for) == names
        assert same(load_estimator(put(dumped(wanted)), trusted=["sklearn", *names]), wanted)


def test_arrays_of_objects_are_read_by_the_same_rules():
    encoder = OneHotEncoder(sparse_output=False).fit(np.array([["a", 1], ["b", 2]], dtype=object))
    for content in (dumped(encoder), pickle.dumps(encoder)):
        found = load_estimator(put(content), trusted=["sklearn"])
        assert [list(each) for each in found.categories_] == [["a", "b"], [1, 2]]


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12.0).reshape(3, 4),
        np.asfortranarray(np.arange(300_000.0).reshape(300, 1000)),
        np.arange(100_000, dtype=">i4"),
        np.array(7),
        np.zeros((0, 3)),
        np.array([("a", 1.5)], dtype=[("name", "U3"), ("value", "f4")]),
        np.array(["2026-01-01"], "M8[D]"),
        np.ma.masked_array([1.0, 2.0], [True, False]),
        np.array([True, False]),
        np.arange(6).reshape(2, 3)[:, ::2],
        np.array([None, [1, (2,)], {"a": {3}}], dtype=object),
        np.float32(1.5),
        np.str_("x"),
        np.matrix([[1, 2]]),
    ],
    ids=lambda array: f"{array.dtype} {array.shape}",
)
def test_data_is_loaded_without_trust(array):
    for content in (dumped([array]), dumped([array], compress=3), *(pickle.dumps([array], p) for p in range(6))):
        (found,) = load_estimator(put(content))
        assert np.array_equal(found, array)
        assert found.dtype == array.dtype.newbyteorder("=") or found.dtype == array.dtype
        assert not isinstance(found, np.ndarray) or (found.flags.writeable and found.flags.aligned) or not found.shape


def test_random_generators_go_on_where_they_were():
    kinds = [np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64]
    for rng in (np.random.RandomState(3), np.random.default_rng(3), *(np.random.Generator(kind(3)) for kind in kinds)):
        (found,) = load_estimator(put(pickle.dumps([rng])))
        assert found.normal() == rng.normal()


def test_large_arrays_stay_where_they_were_received(bucket, fs):
    one, other = np.arange(500_000.0), np.ones(300_000, np.float32)
    fs.pipe_file(f"{bucket}/m.joblib", dumped([one, other]))

    first, second = load_estimator(f"{bucket}/m.joblib", filesystem=fs)

    assert not first.flags.owndata
    assert not second.flags.owndata
    first[:] = 0
    assert np.array_equal(second, other)
    alive = weakref.ref(memoryview(first.base).obj)
    del first, second
    gc.collect()
    assert alive() is None


def test_one_array_among_others_does_not_keep_all_of_them():
    content = dumped([np.arange(500_000.0), ["text"] * 10, b"x" * 5_000_000])

    assert load_estimator(put(content))[0].flags.owndata


# ---------------------------------------------------------------------- archives


@pytest.mark.parametrize(("pack", "name"), [(partial(tar_of, mode="w:gz"), "model.tar.gz"), (zip_of, "model.zip")])
@pytest.mark.parametrize("suffix", [".joblib", ".pkl", ".skops", ".joblib.gz"])
def test_only_candidate_in_an_archive_is_loaded(bucket, fs, fitted, pack, name, suffix):
    content = {
        ".joblib": dumped(fitted["linear"]),
        ".pkl": pickle.dumps(fitted["linear"]),
        ".skops": skops.io.dumps(fitted["linear"]),
        ".joblib.gz": dumped(fitted["linear"], compress="gzip"),
    }[suffix]
    fs.pipe_file(f"{bucket}/{name}", pack({"code/inference.py": b"", f"model{suffix}": content, "._model.pkl": b"x"}))

    assert same(load_estimator(f"{bucket}/{name}", trusted=["sklearn"], filesystem=fs), fitted["linear"])


def test_member_of_an_archive_is_chosen_by_name(fitted):
    members = {"a.joblib": dumped(fitted["linear"]), "b.joblib": dumped(fitted["svm"]), "c": pickle.dumps([1])}
    uri = put(tar_of(members, "w:gz"), "model.tar.gz")

    assert same(load_estimator(uri, member="b.joblib", trusted=["sklearn"]), fitted["svm"])
    assert load_estimator(uri, member="c") == [1]
    assert load_estimator(uri, member="./c") == [1]
    with pytest.raises(errors.ArtifactError, match=r"choose one by member=: a\.joblib, b\.joblib"):
        load_estimator(uri, trusted=["sklearn"])
    with pytest.raises(errors.ArtifactError, match=r"no member 'd'; it has a\.joblib, b\.joblib, c"):
        load_estimator(uri, member="d")
    with pytest.raises(errors.ArtifactError, match=r"none of its members .* it has README"):
        load_estimator(put(zip_of({"README": b""}), "model.zip"))
    with pytest.raises(errors.ArtifactError, match="no archive"):
        load_estimator(put(dumped([1])), member="a")


# ---------------------------------------------------------------------- what goes wrong


def test_estimator_of_another_version_warns_with_the_uri(fitted):
    old = pickle.dumps(fitted["linear"]).replace(b"1.9.1", b"1.8.0")
    assert old != pickle.dumps(fitted["linear"])

    with pytest.warns(InconsistentVersionWarning, match=r"memory://models/m\.pkl: .*1\.8\.0") as caught:
        found = load_estimator(put(old, "m.pkl"), trusted=["sklearn"])
    assert same(found, fitted["linear"])
    assert caught[0].message.original_sklearn_version == "1.8.0"
    assert caught[0].filename == __file__
    with warnings.catch_warnings(), pytest.raises(InconsistentVersionWarning, match="memory://models"):
        warnings.simplefilter("error")
        load_estimator(put(old, "m.pkl"), trusted=["sklearn"])


def test_type_that_is_not_there_is_named():
    content = pickle.dumps(LinearRegression()).replace(b"LinearRegression", b"LinearRegretting")
    with pytest.raises(errors.ArtifactError, match=r"asks for sklearn\.linear_model\._base\.LinearRegretting"):
        load_estimator(put(content), trusted=["sklearn"])


@pytest.mark.parametrize(("package", "name"), [("skops.io", "m.skops"), ("joblib", "m.joblib")])
def test_missing_package_names_the_extra(monkeypatch, package, name, fitted):
    content = skops.io.dumps(fitted["linear"]) if name == "m.skops" else dumped(fitted["linear"])
    monkeypatch.setitem(sys.modules, package, None)
    if package == "skops.io":
        with pytest.raises(ImportError, match=r"torch-s3\[sklearn\]"):
            load_estimator(put(content, name))
    with pytest.raises(ImportError, match=r"torch-s3\[sklearn\]"):
        save_estimator(1, f"memory://saved/{name}")


def test_missing_scikit_learn_names_the_extra(tmp_path, fitted):
    (tmp_path / "m.joblib").write_bytes(dumped(fitted["linear"]))
    code = f"""
        import sys
        sys.modules.update(dict.fromkeys(["sklearn", "joblib", "joblib.numpy_pickle"]))
        from torch_s3.artifacts import load_estimator
        load_estimator("file://{tmp_path}/m.joblib", trusted=["sklearn"])
    """
    done = _python(code)
    assert "torch-s3[sklearn]" in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.parametrize("name", ["m.joblib", "m.skops", "m.zip"])
def test_damaged_files_are_errors(fitted, name):
    content = {
        "m.joblib": dumped(fitted["forest"], compress=3),
        "m.skops": skops.io.dumps(fitted["forest"]),
        "m.zip": zip_of({"m.pkl": pickle.dumps(fitted["forest"])}),
    }[name]
    for part in (0.0, 0.1, 0.5, 0.99):
        with pytest.raises(errors.ArtifactError, match=name):
            load_estimator(put(content[: int(part * len(content))], name), trusted=["sklearn"])
    flipped = bytearray(content)
    flipped[len(content) // 3] ^= 255
    with pytest.raises((errors.ArtifactError, errors.IntegrityError), match=name):
        load_estimator(put(bytes(flipped), name), trusted=["sklearn"])


def test_missing_object_is_not_found(bucket, fs):
    with pytest.raises(errors.NotFound):
        load_estimator(f"{bucket}/nothing.joblib", filesystem=fs)


def test_unknown_format_is_refused_before_anything_is_read():
    with pytest.raises(ValueError, match="skops, joblib, pickle"):
        load_estimator("memory://models/nothing", format="onnx")


# ---------------------------------------------------------------------- in memory alone


def _python(code, **environment):
    path = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def test_nothing_is_written_to_a_disk(s3, bucket, fs, fitted):
    save_estimator(fitted["forest"], f"{bucket}/m.pkl", filesystem=fs)
    save_estimator(fitted["forest"], f"{bucket}/m.joblib", filesystem=fs)
    save_estimator(fitted["forest"], f"{bucket}/m.joblib.gz", format="joblib", compress="gzip", filesystem=fs)
    save_estimator(fitted["forest"], f"{bucket}/m.skops", filesystem=fs)
    fs.pipe_file(f"{bucket}/m.tar.gz", tar_of({"m.joblib": dumped(fitted["forest"])}, "w:gz"))
    fs.pipe_file(f"{bucket}/m.zip", zip_of({"m.joblib": dumped(fitted["forest"])}))
    code = f"""
        import os, pickle, sys
        import torch
        from torch_s3 import S3FileSystem
        from torch_s3.artifacts import load_estimator, load_state_dict, open_artifact

        fs = S3FileSystem(**{s3.storage_options!r})
        fs.pipe_file("{bucket}/state.pkl", pickle.dumps(torch.nn.Linear(3, 3).state_dict()))

        def watch(event, arguments):
            if event == "open":
                mode, flags = arguments[1:]
                writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if isinstance(flags, int) else 0
                if writes and arguments[0] != "/dev/null":
                    os._exit(print("wrote", arguments, file=sys.stderr, flush=True) or 9)
            elif event in ("os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate", "tempfile.mkstemp",
                           "tempfile.mkdtemp", "os.system", "subprocess.Popen", "shutil.copyfile"):
                os._exit(print(event, arguments, file=sys.stderr, flush=True) or 9)

        sys.dont_write_bytecode = True
        sys.addaudithook(watch)
        for name in ("m.pkl", "m.joblib", "m.joblib.gz", "m.skops", "m.tar.gz", "m.zip"):
            print(type(load_estimator("{bucket}/" + name, trusted=["sklearn"], filesystem=fs)).__name__)
        print(list(load_state_dict("{bucket}/state.pkl", filesystem=fs)))
        print(list(open_artifact("{bucket}/m.tar.gz", filesystem=fs)))
        try:
            open("watched", "w")
        finally:
            print("not watched")
    """
    done = _python(code, JOBLIB_MULTIPROCESSING="0")

    said = done.stdout.split("\n")
    assert said == ["RandomForestClassifier"] * 6 + ["['weight', 'bias']", "['m.joblib']", ""], done.stderr
    assert done.returncode == 9
    assert "watched" in done.stderr


def _memory_to_load(uri, options):
    """By how many bytes the process grows while it loads."""
    fs = S3FileSystem(**options)
    fs.info(uri)
    with measured_peak() as grown:
        found = load_estimator(uri, filesystem=fs)
        assert found[1].sum() == len(found[1])
    return grown()


def test_memory_is_that_of_the_object(s3, bucket, fs):
    size = 120_000_000
    save_estimator([np.ones(size // 16), np.ones(size // 16)], f"{bucket}/m.joblib", filesystem=fs)

    assert in_new_process(_memory_to_load, f"{bucket}/m.joblib", s3.storage_options) / size < 1.1


def test_checkpoint_is_named_as_one():
    fsspec.filesystem("memory").pipe_file("/checkpoint/model.pt", torch_saved({"a": torch.ones(3)}))

    with pytest.raises(errors.ArtifactError, match="load_checkpoint"):
        load_estimator("memory://checkpoint/model.pt")
