"""Frozen TensorFlow graphs: loaded as they are, run by name, and refused where they do more than compute."""

import gc
import threading
import weakref

import numpy as np
import pytest
import s3fs

from torch_s3 import errors
from torch_s3.artifacts import load_graph, run_graph
from torch_s3.artifacts.extras import needed
from torch_s3.artifacts.tf_ops import check_ops

BATCH = np.arange(12, dtype=np.float32).reshape(4, 3)
KERNEL = np.arange(6, dtype=np.float32).reshape(3, 2)
WANTED = BATCH @ KERNEL + 1


def _graph(tf):
    with tf.Graph().as_default() as graph:
        x = tf.compat.v1.placeholder(tf.float32, [None, 3], name="input_1")
        scale = tf.compat.v1.placeholder_with_default(1.0, [], name="scale")
        product = tf.matmul(x * scale, tf.constant(KERNEL, name="dense_1/kernel"), name="dense_1/MatMul")
        tf.nn.bias_add(product, tf.constant(np.ones(2, np.float32), name="dense_1/bias"), name="dense_1/BiasAdd")
        other = tf.compat.v1.placeholder(tf.float32, [], name="unused/input")
        tf.identity(other, name="unused/output")
    return graph


@pytest.fixture
def graph(tf, put):
    uri, where = put(_graph(tf).as_graph_def().SerializeToString(), "model.pb")
    return load_graph(uri, **where)


# ---------------------------------------------------------------------- as it was saved


def test_graph_computes_as_it_did(tf, graph):
    assert isinstance(graph, tf.Graph)

    found = run_graph(graph, inputs={"input_1:0": BATCH}, outputs=["dense_1/BiasAdd:0", "dense_1/MatMul:0"])

    np.testing.assert_array_equal(found[0], WANTED)
    np.testing.assert_array_equal(found[1], WANTED - 1)


def test_graph_is_read_by_s3fs_too(tf, put, s3):
    uri, _ = put(_graph(tf).as_graph_def().SerializeToString())
    fs = s3fs.S3FileSystem(**s3.storage_options, skip_instance_cache=True)

    found = run_graph(load_graph(uri, filesystem=fs), inputs={"input_1": BATCH}, outputs=["dense_1/BiasAdd"])

    np.testing.assert_array_equal(found[0], WANTED)


def test_graph_frozen_from_a_function_with_variables_computes_as_it_did(tf, put):
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    weights = tf.Variable(KERNEL)
    model = tf.function(lambda x: tf.nn.relu(x @ weights - 9), input_signature=[tf.TensorSpec([None, 3])])
    frozen = convert_variables_to_constants_v2(model.get_concrete_function())
    uri, where = put(frozen.graph.as_graph_def().SerializeToString())

    found = run_graph(load_graph(uri, **where), inputs={frozen.inputs[0].name: BATCH}, outputs=[frozen.outputs[0].name])

    np.testing.assert_array_equal(found[0], np.maximum(BATCH @ KERNEL - 9, 0))


def test_graph_made_for_a_gpu_runs_without(tf, put):
    with tf.Graph().as_default() as made, tf.device("/gpu:0"):
        tf.identity(tf.compat.v1.placeholder(tf.float32, [None], name="x"), name="y")
    uri, where = put(made.as_graph_def().SerializeToString())

    assert run_graph(load_graph(uri, **where), inputs={"x": [1.0]}, outputs=["y"])[0] == [1]


# ---------------------------------------------------------------------- sessions


def test_session_is_kept_for_the_next_run_and_goes_with_the_graph(tf, graph, monkeypatch):
    made = []
    session = tf.compat.v1.Session
    monkeypatch.setattr(tf.compat.v1, "Session", lambda **options: made.append(1) or session(**options))
    for _ in range(3):
        run_graph(graph, inputs={"input_1:0": BATCH}, outputs=["dense_1/BiasAdd:0"])
    copy = tf.Graph()
    with copy.as_default():
        tf.import_graph_def(graph.as_graph_def(), name="")
    run_graph(copy, inputs={"input_1:0": BATCH}, outputs=["dense_1/BiasAdd:0"])
    alive = weakref.ref(copy)
    del copy
    gc.collect()

    assert len(made) == 2
    assert alive() is None


def test_graph_runs_in_many_threads(graph):
    found = [None] * 8

    def run(number):
        found[number] = run_graph(graph, inputs={"input_1:0": BATCH + number}, outputs=["dense_1/BiasAdd:0"])[0]

    threads = [threading.Thread(target=run, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for number in range(8):
        np.testing.assert_array_equal(found[number], (BATCH + number) @ KERNEL + 1)


# ---------------------------------------------------------------------- names


def test_wrong_output_is_an_error_with_the_graphs_own_names_closest_first(graph):
    with pytest.raises(errors.ArtifactMismatch) as caught:
        run_graph(graph, inputs={"input_1:0": BATCH}, outputs=["dense/BiasAdd:0"])

    assert "no tensor 'dense/BiasAdd:0' for an output; it has dense_1/BiasAdd:0, " in str(caught.value)
    assert caught.value.uri.endswith("/model.pb")


def test_wrong_input_is_an_error_that_names_the_placeholders_first(graph):
    with pytest.raises(errors.ArtifactMismatch, match="for an input; it has input_1:0, unused/input:0, "):
        run_graph(graph, inputs={"input_2:0": BATCH}, outputs=["dense_1/BiasAdd:0"])


def test_error_lists_just_some_of_very_many_names(tf):
    with tf.Graph().as_default() as graph:
        for number in range(300):
            tf.constant(0, name=f"constant_{number}")

    with pytest.raises(errors.ArtifactMismatch, match="and 290 more") as caught:
        run_graph(graph, inputs={}, outputs=["constant:0"])

    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["no such name", "dense_1/BiasAdd:7", "dense_1/BiasAdd:x", "", ":", "^input_1"])
def test_name_of_any_kind_is_the_same_error(graph, name):
    with pytest.raises(errors.ArtifactMismatch, match="the graph has no tensor"):
        run_graph(graph, inputs={"input_1:0": BATCH}, outputs=[name])


def test_placeholder_that_was_not_fed_is_named(graph):
    with pytest.raises(errors.ArtifactMismatch, match=r"BiasAdd:0 cannot be computed without an input for input_1:0$"):
        run_graph(graph, inputs={"scale:0": 2.0}, outputs=["dense_1/BiasAdd:0"])


def test_input_within_the_graph_replaces_what_is_above_it(graph):
    found = run_graph(graph, inputs={"dense_1/MatMul:0": np.zeros((1, 2))}, outputs=["dense_1/BiasAdd:0"])

    np.testing.assert_array_equal(found[0], [[1, 1]])


def test_input_of_another_shape_is_an_error_that_says_both(graph):
    with pytest.raises(errors.ArtifactMismatch, match=r"input_1:0 has shape \(None, 3\), its input \(4, 2\)"):
        run_graph(graph, inputs={"input_1:0": BATCH[:, :2]}, outputs=["dense_1/BiasAdd:0"])


def test_one_name_as_outputs_is_refused(graph):
    with pytest.raises(TypeError, match=r"such as \['dense_1/BiasAdd:0'\]"):
        run_graph(graph, inputs={"input_1:0": BATCH}, outputs="dense_1/BiasAdd:0")


def test_outputs_may_be_tensors(graph):
    tensor = graph.get_tensor_by_name("dense_1/BiasAdd:0")

    np.testing.assert_array_equal(run_graph(graph, inputs={"input_1": BATCH}, outputs=[tensor])[0], WANTED)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"graph": "s3://b/model.pb"}, "^graph='s3://b/model.pb': a tf.Graph"),
        ({"inputs": [BATCH]}, "^inputs: a dict of arrays by .*, not a list$"),
        ({"inputs": {1: BATCH}}, "^inputs: 1 is no tensor's name"),
        ({"inputs": {"input_1": [[1.0], [1.0, 2.0]]}}, "^inputs: input_1:0 takes an array, not "),
        ({"outputs": None}, "^outputs=None: a list of names"),
        ({"outputs": [1]}, "^outputs: 1 is no tensor's name"),
    ],
)
def test_argument_of_another_kind_is_named(graph, wrong, words):
    given = {"graph": graph, "inputs": {"input_1": BATCH}, "outputs": ["dense_1/BiasAdd"], **wrong}

    with pytest.raises(TypeError, match=words):
        run_graph(given.pop("graph"), **given)


# ---------------------------------------------------------------------- values


def _fed(tf, dtype, value):
    with tf.Graph().as_default() as graph:
        tf.identity(tf.compat.v1.placeholder(dtype, None, name="x"), name="y")
    return run_graph(graph, inputs={"x": value}, outputs=["y"])[0]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("int64", [1.5, 2.0]),
        ("int64", np.nan),
        ("int64", np.array([2**63], np.uint64)),
        ("int64", [2**64]),
        ("int32", 2**31),
        ("uint8", [-1]),
        ("bool", 2),
        ("float32", 1e300),
        ("float16", np.float32(1e5)),
        ("float32", 1 + 2j),
        ("float32", "1"),
        ("float32", None),
        ("string", [b"a", 1.0]),
    ],
)
def test_input_that_its_type_cannot_hold_is_named(tf, dtype, value):
    with pytest.raises(errors.ArtifactMismatch, match=rf"x:0 is of {dtype}, which its input .* doesn't fit"):
        _fed(tf, dtype, value)


@pytest.mark.parametrize(
    ("dtype", "value", "wanted"),
    [
        ("int64", [1.0, 2.0], [1, 2]),
        ("int32", np.int64([7]), [7]),
        ("int64", np.uint64(2**63 - 1), 2**63 - 1),
        ("float32", np.array([0.1, np.inf]), np.float32([0.1, np.inf])),
        ("float32", np.array([1, 0.5], object), [1, 0.5]),
        ("float32", 2 + 0j, 2),
        ("bfloat16", [0.5, 3], [0.5, 3]),
        ("float32", np.array([1], ">f8"), [1]),
        ("bool", [0, 1], [False, True]),
        ("float32", True, 1),
        ("string", ["a", b"b"], [b"a", b"b"]),
        ("float32", np.empty((0, 2)), np.empty((0, 2))),
    ],
)
def test_input_that_loses_nothing_is_converted(tf, dtype, value, wanted):
    np.testing.assert_array_equal(_fed(tf, dtype, value), wanted)


# ---------------------------------------------------------------------- what is no graph


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (b"\x08\x01\x12\x02", "model.pb", "it is of a SavedModel, whose folder load_saved_model loads"),
        (b"damaged", "saved_model.pb", "load_saved_model"),
        (b"node { name: 'x' }", "model.pbtxt", r"it is text, as \.pbtxt files are"),
    ],
)
def test_other_form_of_a_graph_is_named(tf, put, content, name, words):
    uri, where = put(content, name)

    with pytest.raises(errors.ArtifactError, match=f"not a frozen graph: .*{words}"):
        load_graph(uri, **where)


@pytest.mark.parametrize("trusted", [True, [1], 3])
def test_trusted_operations_are_names(tf, trusted):
    with pytest.raises(TypeError, match=r"trusted_ops=.*: a list of operations' names"):
        load_graph("s3://bucket/none.pb", trusted_ops=trusted)


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "unknown operation", "missing node", "a checkpoint"])
def test_what_is_no_graph_is_an_error_that_names_it(tf, put, damage):
    proto = _graph(tf).as_graph_def()
    content = proto.SerializeToString()
    if damage == "unknown operation":
        proto.node[3].op = "NoSuchOp"
    if damage == "missing node":
        del proto.node[0]
    content = {
        "empty": b"",
        "text": b"node { name: 'x' }",
        "truncated": content[:-3],
        "a checkpoint": b"PK\3\4" + bytes(100),
    }.get(damage, proto.SerializeToString())
    uri, where = put(content)

    with pytest.raises(errors.ArtifactError, match=r"not a (frozen )?graph") as caught:
        load_graph(uri, **where)

    assert caught.value.uri == uri
    assert type(caught.value) is errors.ArtifactError


def test_graph_that_is_not_there_is_not_found(tf, s3, bucket):
    with pytest.raises(errors.NotFound, match=f"^{bucket}/none.pb: "):
        load_graph(f"{bucket}/none.pb", storage_options=s3.storage_options)


# ---------------------------------------------------------------------- graphs that do more than compute


def _reads_a_file(tf):
    tf.io.read_file(tf.constant("/etc/passwd"), name="y")


def _writes_a_file(tf):
    tf.io.write_file(tf.constant("/tmp/written-by-a-graph"), tf.constant("x"))


def _prints_to_a_file(tf):
    tf.print("x", output_stream="file:///tmp/written-by-a-graph")


def _runs_python(tf):
    tf.compat.v1.py_func(lambda: np.float32(1), [], tf.float32, name="y")


def _hides_it_in_a_function(tf):
    tf.function(lambda: tf.io.read_file("/etc/passwd"))()


def _reads_records(tf):
    tf.raw_ops.TFRecordDataset(filenames="/etc/passwd", compression_type="", buffer_size=0)


@pytest.mark.parametrize(
    ("hostile", "op"),
    [
        (_reads_a_file, "ReadFile"),
        (_writes_a_file, "WriteFile"),
        (_prints_to_a_file, "PrintV2"),
        (_runs_python, "PyFunc"),
        (_hides_it_in_a_function, "ReadFile"),
        (_reads_records, "TFRecordDataset"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_graph_that_reaches_out_is_refused_unless_trusted(tf, put, hostile, op):
    with tf.Graph().as_default() as made:
        hostile(tf)
    uri, where = put(made.as_graph_def().SerializeToString())

    with pytest.raises(errors.UnsafeArtifact, match=f"files, Python or the network: {op} .*trusted_ops=") as caught:
        load_graph(uri, **where)

    assert caught.value.asks_for == (op,)
    assert isinstance(load_graph(uri, trusted_ops=[op], **where), tf.Graph)
    assert isinstance(load_graph(uri, trusted_ops=op, **where), tf.Graph)


def test_operations_that_compute_are_let_through():
    ops = ["MatMul", "BiasAdd", "Placeholder", "ReadVariableOp", "HashTableV2", "LookupTableFindV2", "MapDataset"]
    ops += ["StatefulPartitionedCall", "TensorArrayReadV3", "ParseExampleDatasetV2", "DecodeJpeg", "Print"]

    check_ops(ops, trusted=(), uri="s3://b/k")


def test_operations_that_read_files_named_in_attributes_or_run_programs_are_refused():
    ops = (
        "DecodeProtoV2",
        "EncodeProto",
        "FixedUnigramCandidateSampler",
        "GenerateVocabRemapping",
        "MlirPassthroughOp",
    )
    ops += ("Skipgram", "XlaCallModule")
    with pytest.raises(errors.UnsafeArtifact) as caught:
        check_ops(ops, trusted=(), uri="s3://b/k")

    assert caught.value.asks_for == ops


# ---------------------------------------------------------------------- without TensorFlow


def test_missing_package_is_an_error_that_says_which_extra():
    with pytest.raises(ImportError, match=r"load_graph needs no_such_package: pip install 'torch-s3\[tensorflow\]'"):
        needed("no_such_package", extra="tensorflow", by="load_graph")
