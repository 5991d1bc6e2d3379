"""SavedModels and Keras models: through a private folder, of which nothing stays."""

import io
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import s3fs
from archives import tar_of, zip_of

from torch_s3 import S3FileSystem, errors
from torch_s3.artifacts import archive as archive_module
from torch_s3.artifacts import (
    load_estimator,
    load_graph,
    load_keras,
    load_onnx,
    load_saved_model,
    load_state_dict,
    open_artifact,
)
from torch_s3.artifacts.folder import private_folder

BATCH = np.arange(12, dtype=np.float32).reshape(4, 3)

# Keras 3.15 with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def module(tf):
    class Model(tf.Module):
        def __init__(self):
            self.weights = tf.Variable(tf.reshape(tf.range(6.0), [3, 2]))
            words = tf.lookup.TextFileInitializer(
                str(self.vocabulary), tf.int64, tf.lookup.TextFileIndex.LINE_NUMBER, tf.string,
                tf.lookup.TextFileIndex.WHOLE_LINE,
            )  # fmt: skip
            self.table = tf.lookup.StaticHashTable(words, "?")

        @tf.function(input_signature=[tf.TensorSpec([None, 3])])
        def __call__(self, x):
            return {"y": x @ self.weights}

        @tf.function(input_signature=[tf.TensorSpec([], tf.int64)])
        def word(self, number):
            return {"word": self.table.lookup(number)}

    return Model


@pytest.fixture(scope="module")
def files(tf, module, tmp_path_factory):
    """The files of a SavedModel with variables and a vocabulary, by name."""
    folder = tmp_path_factory.mktemp("saved")
    module.vocabulary = folder / "words.txt"
    module.vocabulary.write_text("zero\none\ntwo\n")
    model = module()
    tf.saved_model.save(model, str(folder / "model"), signatures={"serve": model.__call__, "word": model.word})
    root = folder / "model"
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def keras_file(tf, tmp_path_factory):
    import keras

    path = tmp_path_factory.mktemp("keras") / "model.keras"
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, activation="relu"), keras.layers.Dense(2)])
    model.save(path)
    return path.read_bytes(), model(BATCH).numpy()


@pytest.fixture
def put(s3, bucket):
    """Stores files under the bucket, and says what to read them with."""

    def store(files):
        S3FileSystem(**s3.storage_options).pipe({f"{bucket}/{name}": content for name, content in files.items()})
        return {"storage_options": s3.storage_options}

    return store


def _below(prefix, files):
    return {f"{prefix}{name}": content for name, content in files.items()}


@pytest.fixture
def workdir(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


def _assert_it_works(tf, model):
    found = model.signatures["serve"](tf.constant(BATCH))["y"].numpy()
    np.testing.assert_array_equal(found, BATCH @ np.arange(6, dtype=np.float32).reshape(3, 2))
    assert model.signatures["word"](tf.constant(2, tf.int64))["word"].numpy() == b"two"


# ---------------------------------------------------------------------- SavedModels


@pytest.mark.parametrize("form", ["prefix", "prefix/", "below a version", "tar.gz", "zip", "SageMaker's", "s3fs"])
def test_saved_model_works_after_its_folder_is_gone(tf, put, files, s3, bucket, workdir, form):
    stored, name = {
        "prefix/": (_below("m/", files), "m/"),
        "below a version": (_below("m/1/", files), "m"),
        "tar.gz": ({"m.tar.gz": tar_of(_below("./", files), "w:gz")}, "m.tar.gz"),
        "zip": ({"m.zip": zip_of(files)}, "m.zip"),
        "SageMaker's": ({"model.tar.gz": tar_of(_below("export/Servo/1/", files), "w:gz")}, "model.tar.gz"),
    }.get(form, (_below("m/", files), "m"))
    where = put(stored)
    if form == "s3fs":
        where = {"filesystem": s3fs.S3FileSystem(**s3.storage_options, skip_instance_cache=True)}

    model = load_saved_model(f"{bucket}/{name}", workdir=workdir, **where)

    assert list(workdir.iterdir()) == []
    _assert_it_works(tf, model)


def test_folder_is_the_users_own_and_has_the_model_alone(tf, put, files, bucket, workdir, monkeypatch):
    where = put(_below("m/", files | {"saved_model.pbtxt": b"not looked at", "saved_model.cpb": b"nor this"}))
    seen = {}

    def load(folder, **_):
        root = Path(folder)
        seen["mode"] = stat.S_IMODE(root.stat().st_mode)
        seen["files"] = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}

    monkeypatch.setattr(tf.saved_model, "load", load)
    load_saved_model(f"{bucket}/m", workdir=workdir, **where)

    assert seen == {"mode": 0o700, "files": set(files)}


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError, ValueError])
def test_folder_is_removed_after_errors_and_interrupts(tf, put, files, bucket, workdir, monkeypatch, failure):
    where = put(_below("m/", files))

    def load(folder, **_):
        assert Path(folder, "saved_model.pb").exists()
        raise failure

    monkeypatch.setattr(tf.saved_model, "load", load)
    with pytest.raises(errors.ArtifactError if failure is ValueError else failure):
        load_saved_model(f"{bucket}/m", workdir=workdir, **where)


def test_folder_is_in_memory_where_there_is_room(tmp_path):
    with private_folder(None, size=1, uri="s3://b/k") as folder:
        assert folder.parent == (Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else folder.parent)
    assert not folder.exists()


def test_folder_that_has_no_room_is_an_error_before_anything_is_written(tmp_path):
    with (
        pytest.raises(errors.S3Error, match=r"bytes free, and it needs \d+: give another workdir="),
        private_folder(tmp_path, size=1 << 60, uri="s3://b/k"),
    ):
        pass
    with pytest.raises(errors.S3Error, match="give another workdir="), private_folder(tmp_path / "no", size=0, uri=""):
        pass


def test_what_tensorflow_raises_of_no_known_kind_names_the_model(tf, put, files, bucket, workdir, monkeypatch):
    class NotEncodableError(Exception):
        pass

    def fail(*_, **__):
        raise NotEncodableError

    monkeypatch.setattr(tf.saved_model, "load", fail)
    with pytest.raises(errors.ArtifactError, match=rf"^{bucket}/m: .*can load \(NotEncodableError\)"):
        load_saved_model(f"{bucket}/m", workdir=workdir, **put(_below("m/", files)))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("nothing", "nothing is under this prefix"),
        ("no model", "there is no saved_model.pb$"),
        ("text form", "only saved_model.pbtxt: save it again"),
        ("two", r"2 SavedModels: 1/, 2/; name one of them"),
        ("garbage", "not a SavedModel, or damaged"),
        ("no variables", "can load"),
        ("truncated variables", "can load"),
    ],
)
def test_what_is_no_saved_model_is_an_error_that_names_it(tf, put, files, bucket, workdir, damage, words):
    variables = "variables/variables.data-00000-of-00001"
    stored = {
        "nothing": {"other": b""},
        "no model": {"m/a.txt": b""},
        "text form": {"m/saved_model.pbtxt": b""},
        "two": _below("m/1/", files) | _below("m/2/", files),
        "garbage": {"m/saved_model.pb": b"\xff" * 100},
        "no variables": {"m/saved_model.pb": files["saved_model.pb"]},
        "truncated variables": _below("m/", files | {variables: files[variables][:-1000]}),
    }[damage]
    where = put(stored)

    with pytest.raises((errors.ArtifactError, errors.NotFound), match=f"^{bucket}/m: .*{words}") as caught:
        load_saved_model(f"{bucket}/m", workdir=workdir, **where)

    assert str(workdir) not in str(caught.value)


@pytest.mark.parametrize("reader", ["ours", "s3fs"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("m/saved_model.pb", r"give the folder that saved_model\.pb is in$"),
        ("model.pb", "load_graph loads frozen graphs"),
        ("m.keras", "load_keras loads such$"),
    ],
)
def test_one_object_is_no_saved_model(tf, put, bucket, s3, name, words, reader):
    where = put({name: b"1"})
    if reader == "s3fs":
        where = {"filesystem": s3fs.S3FileSystem(**s3.storage_options, skip_instance_cache=True)}

    with pytest.raises(errors.InvalidUri, match=f"^{bucket}/{name}: this is one object: {words}"):
        load_saved_model(f"{bucket}/{name}", **where)


@pytest.mark.parametrize("tags", ["serve", ["serve"], {"serve"}])
def test_tags_are_one_or_several(tf, put, files, bucket, workdir, tags):
    where = put(_below("m/", files))

    _assert_it_works(tf, load_saved_model(f"{bucket}/m", tags=tags, workdir=workdir, **where))


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil"])
def test_archive_with_a_name_that_leads_out_is_refused(tf, put, files, bucket, workdir, name):
    where = put({"m.tar.gz": tar_of(files | {name: b"x"}, "w:gz")})

    with pytest.raises(errors.ArtifactError):
        load_saved_model(f"{bucket}/m.tar.gz", workdir=workdir, **where)

    assert not list(workdir.parent.rglob("evil"))


def test_model_whose_vocabulary_lies_outside_is_refused(tf, put, files, bucket, workdir):
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    proto = SavedModel.FromString(files["saved_model.pb"])
    proto.meta_graphs[0].asset_file_def[0].filename = "../../../../etc/passwd"
    where = put(_below("m/", files | {"saved_model.pb": proto.SerializeToString()}))

    with pytest.raises(errors.ArtifactError, match=r"a member's name is '\.\./"):
        load_saved_model(f"{bucket}/m", workdir=workdir, **where)


def test_model_that_reads_files_is_refused_unless_trusted(tf, put, bucket, workdir, tmp_path):
    model = tf.Module()
    model.read = tf.function(tf.io.read_file, input_signature=[tf.TensorSpec([], tf.string)])
    tf.saved_model.save(model, str(tmp_path / "hostile"))
    root = tmp_path / "hostile"
    where = put({f"m/{path.relative_to(root)}": path.read_bytes() for path in root.rglob("*") if path.is_file()})

    with pytest.raises(errors.UnsafeArtifact, match="network: ReadFile ") as caught:
        load_saved_model(f"{bucket}/m", workdir=workdir, **where)
    assert caught.value.asks_for == ("ReadFile",)

    load_saved_model(f"{bucket}/m", workdir=workdir, trusted_ops=["ReadFile"], **where)


def _has_it_run_at_load(content, op):
    """Move an operation's end to the initializer of a resource, as its maker could."""
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    proto = SavedModel.FromString(content)
    for function in proto.meta_graphs[0].graph_def.library.function:
        if "initializer" in function.signature.name:
            next(node for node in function.node_def if node.op == "Identity").input.append(f"^{op}")
    return proto.SerializeToString()


def test_model_that_writes_files_at_load_writes_none_unless_trusted(tf, put, bucket, workdir, tmp_path):
    class Writer(tf.saved_model.experimental.TrackableResource):
        def _create_resource(self):
            return tf.raw_ops.MutableHashTableV2(key_dtype=tf.string, value_dtype=tf.int64)

        def _initialize(self):
            tf.raw_ops.SaveV2(
                prefix=str(tmp_path / "evil"), tensor_names=["a"], shape_and_slices=[""], tensors=[tf.constant("evil")]
            )

    model = tf.Module()
    model.weights = tf.Variable(2.0)
    model.writer = Writer()
    assert model.writer.resource_handle is not None
    root = tmp_path / "hostile"
    tf.saved_model.save(model, str(root))
    files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    files["saved_model.pb"] = _has_it_run_at_load(files["saved_model.pb"], "SaveV2")
    where = put(_below("m/", files))

    loaded = load_saved_model(f"{bucket}/m", workdir=workdir, **where)

    assert not list(tmp_path.rglob("evil*"))
    tf.saved_model.save(loaded, str(tmp_path / "again"))
    assert float(tf.saved_model.load(str(tmp_path / "again")).weights) == 2
    load_saved_model(f"{bucket}/m", workdir=workdir, trusted_ops=["SaveV2"], **where)
    assert list(tmp_path.rglob("evil*"))


def test_file_that_grew_since_it_was_listed_is_object_changed(tf, put, files, bucket, workdir, s3):
    where = put(_below("m/", files))
    fs = S3FileSystem(**where["storage_options"], skip_instance_cache=True)
    listed = fs.find

    def find(path, **options):
        found = listed(path, **options)
        fs.pipe_file(f"{path}/saved_model.pb", files["saved_model.pb"] + b"more")
        return found

    fs.find = find
    with pytest.raises(errors.ObjectChanged, match=r"m/saved_model\.pb: "):
        load_saved_model(f"{bucket}/m", workdir=workdir, filesystem=fs)


def test_more_than_is_allowed_is_not_fetched(tf, put, files, bucket, workdir):
    where = put(_below("m/", files))

    with pytest.raises(errors.ArtifactError, match="raise max_bytes=10"):
        load_saved_model(f"{bucket}/m", workdir=workdir, max_bytes=10, **where)


# ---------------------------------------------------------------------- Keras


@pytest.mark.parametrize("reader", ["ours", "s3fs"])
def test_keras_model_predicts_as_it_did(put, keras_file, s3, bucket, workdir, reader):
    where = put({"m.keras": keras_file[0]})
    if reader == "s3fs":
        where = {"filesystem": s3fs.S3FileSystem(**s3.storage_options, skip_instance_cache=True)}

    model = load_keras(f"{bucket}/m.keras", workdir=workdir, **where)

    np.testing.assert_array_equal(model(BATCH).numpy(), keras_file[1])


def test_damaged_weights_of_keras_are_an_integrity_error(put, keras_file, bucket, workdir):
    content = bytearray(keras_file[0])
    content[content.index(b"HDF") + 1000] ^= 1
    where = put({"m.keras": bytes(content)})

    with pytest.raises(errors.IntegrityError, match=r"model\.weights\.h5' is damaged"):
        load_keras(f"{bucket}/m.keras", workdir=workdir, **where)


def test_keras_model_with_code_of_its_own_is_refused_unless_safe_mode_is_off(put, bucket, workdir, tmp_path):
    import keras

    keras.Sequential([keras.Input((3,)), keras.layers.Lambda(lambda x: x * 2)]).save(tmp_path / "m.keras")
    where = put({"m.keras": (tmp_path / "m.keras").read_bytes()})

    with pytest.raises(errors.UnsafeArtifact, match=r"code of its own: .*Lambda.*safe_mode=False"):
        load_keras(f"{bucket}/m.keras", workdir=workdir, **where)

    model = load_keras(f"{bucket}/m.keras", workdir=workdir, safe_mode=False, **where)
    np.testing.assert_array_equal(model(BATCH).numpy(), BATCH * 2)


def test_custom_layer_is_an_error_that_names_it_unless_it_is_given(put, bucket, workdir, tmp_path):
    import keras

    class Doubled(keras.layers.Layer):
        def call(self, x):
            return x * 2

    keras.Sequential([keras.Input((3,)), Doubled()]).save(tmp_path / "m.keras")
    where = put({"m.keras": (tmp_path / "m.keras").read_bytes()})

    with pytest.raises(errors.ArtifactError, match="Doubled"):
        load_keras(f"{bucket}/m.keras", workdir=workdir, **where)

    model = load_keras(f"{bucket}/m.keras", workdir=workdir, custom_objects={"Doubled": Doubled}, **where)
    np.testing.assert_array_equal(model(BATCH).numpy(), BATCH * 2)


@pytest.mark.parametrize("damage", ["HDF5", "text", "truncated", "another zip", "no weights", "a bomb"])
def test_what_is_no_keras_model_is_an_error_that_names_it(put, keras_file, bucket, workdir, damage):
    with zipfile.ZipFile(io.BytesIO(keras_file[0])) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    content = {
        "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(100),
        "text": b"hello",
        "truncated": keras_file[0][:-100],
        "another zip": zip_of({"a": b""}),
        "no weights": zip_of({name: members[name] for name in members if not name.endswith("h5")}),
    }.get(damage) or zip_of(members | {"model.weights.h5": bytes(3 << 20)})
    limit = {"a bomb": 10}.get(damage, archive_module.MAX_RATIO)
    where = put({"m.keras": content})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archive_module, "MAX_RATIO", limit)
        with pytest.raises(errors.ArtifactError, match=f"^{bucket}/m.keras: .*{damage if damage == 'a bomb' else ''}"):
            load_keras(f"{bucket}/m.keras", workdir=workdir, **where)


@pytest.mark.parametrize("load", [load_estimator, load_graph, load_keras, load_onnx, load_state_dict, open_artifact])
def test_prefix_is_no_object(tf, load):
    with pytest.raises(errors.InvalidUri, match=r"^s3://bucket/models/: this is a prefix: name one object"):
        load("s3://bucket/models/")


# ---------------------------------------------------------------------- without TensorFlow


def test_without_tensorflow_each_says_what_to_install():
    program = """
import sys
sys.modules["tensorflow"] = sys.modules["keras"] = sys.modules["onnxruntime"] = None
from torch_s3 import artifacts
for load in (artifacts.load_graph, artifacts.load_saved_model, artifacts.load_keras, artifacts.load_onnx):
    try:
        load("s3://bucket/model")
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)

    assert done.stdout.splitlines() == [
        "load_graph needs tensorflow: pip install 'torch-s3[tensorflow]'",
        "load_saved_model needs tensorflow: pip install 'torch-s3[tensorflow]'",
        "load_keras needs keras: pip install 'torch-s3[tensorflow]'",
        "load_onnx needs onnxruntime: pip install 'torch-s3[onnx]'",
    ]


def test_keras_without_tensorflow_says_what_to_install():
    program = """
import sys
sys.modules["tensorflow"] = None
from torch_s3 import artifacts
try:
    artifacts.load_keras("s3://bucket/model.keras")
except ImportError as error:
    print(error)
"""
    environment = os.environ | {"KERAS_BACKEND": "tensorflow"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60, env=environment
    )

    assert done.stdout == "load_keras needs tensorflow: pip install 'torch-s3[tensorflow]'\n"
