"""ONNX models, in one file or several: into ONNX Runtime without a disk."""

import numpy as np
import onnx
import pytest
import s3fs
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from torch_s3 import S3FileSystem, errors
from torch_s3.artifacts import load_onnx
from torch_s3.artifacts.onnx_files import external_files

KERNEL = np.arange(1200, dtype=np.float32).reshape(3, 400)
BATCH = np.arange(6, dtype=np.float32).reshape(2, 3)
WANTED = BATCH @ KERNEL + 1


def _model(location=None, *, nested=False):
    kernel = numpy_helper.from_array(KERNEL, "kernel")
    bias = numpy_helper.from_array(np.ones(400, np.float32), "bias")
    if location is not None:
        onnx.external_data_helper.set_external_data(kernel, location, offset=0, length=KERNEL.nbytes)
        kernel.ClearField("raw_data")
    nodes = [helper.make_node("MatMul", ["x", "kernel"], ["m"]), helper.make_node("Add", ["m", "bias"], ["y"])]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 400])]
    if nested:  # the kernel is a constant in a branch
        inner = helper.make_node("Constant", [], ["inner"], value=kernel)
        empty = numpy_helper.from_array(np.zeros((3, 400), np.float32))
        branches = [
            helper.make_graph([node], name, [], [helper.make_tensor_value_info("inner", TensorProto.FLOAT, [3, 400])])
            for node, name in [(inner, "then"), (helper.make_node("Constant", [], ["inner"], value=empty), "else")]
        ]
        yes = helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True)))
        choose = helper.make_node("If", ["yes"], ["kernel"], then_branch=branches[0], else_branch=branches[1])
        graph = helper.make_graph([yes, choose, *nodes], "g", inputs, outputs, [bias])
    else:
        graph = helper.make_graph(nodes, "g", inputs, outputs, [kernel, bias])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString()


@pytest.fixture
def put(s3, bucket):
    """Stores files under the bucket, and says what to read them with."""

    def store(**files):
        fs = S3FileSystem(**s3.storage_options)
        fs.pipe({f"{bucket}/m/{name.replace('_', '.')}": content for name, content in files.items()})
        return {"storage_options": s3.storage_options}

    return store


@pytest.mark.parametrize("reader", ["ours", "s3fs"])
def test_model_computes_as_it_did(put, s3, bucket, reader):
    where = put(m_onnx=_model())
    if reader == "s3fs":
        where = {"filesystem": s3fs.S3FileSystem(**s3.storage_options, skip_instance_cache=True)}

    session = load_onnx(f"{bucket}/m/m.onnx", **where)

    np.testing.assert_allclose(session.run(["y"], {"x": BATCH})[0], WANTED)


def test_settings_and_providers_are_the_sessions(put, bucket):
    where = put(m_onnx=_model())

    session = load_onnx(
        f"{bucket}/m/m.onnx", providers=["CPUExecutionProvider"], intra_op_num_threads=1, log_severity_level=3, **where
    )

    assert session.get_providers() == ["CPUExecutionProvider"]
    assert session.get_session_options().intra_op_num_threads == 1


def test_unknown_setting_is_refused_before_anything_is_read():
    with pytest.raises(TypeError, match="SessionOptions has no 'threads'"):
        load_onnx("s3://bucket/none.onnx", threads=1)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"session_options": {"intra_op_num_threads": 1}}, TypeError, r"^session_options=\{.*settings go as keywords$"),
        ({"intra_op_num_threads": "2"}, TypeError, r"intra_op_num_threads='2': .* takes int$"),
        ({"graph_optimization_level": 1}, TypeError, r"graph_optimization_level=1: .* takes GraphOptimizationLevel$"),
        ({"add_provider": 1}, TypeError, "has no 'add_provider'"),
        ({"providers": "CPUExecutionProvider"}, TypeError, r"such as \['CPUExecutionProvider'\]$"),
        ({"providers": ["CPU"]}, ValueError, r"providers=\['CPU'\]: .* has .*CPUExecutionProvider$"),
        ({"providers": [("CPU", {})]}, ValueError, r"providers=\['CPU'\]: "),
    ],
)
def test_wrong_argument_is_named_before_anything_is_read(given, error, words):
    with pytest.raises(error, match=words):
        load_onnx("s3://bucket/none.onnx", **given)


def test_what_onnx_runtime_refuses_does_not_quote_the_model(put, bucket, monkeypatch):
    where = put(m_onnx=_model())

    def session(*arguments, **_):
        raise TypeError(f"incompatible constructor arguments.\nInvoked with: {arguments}")

    monkeypatch.setattr("onnxruntime.InferenceSession", session)
    with pytest.raises(TypeError, match=r"m/m\.onnx: .*incompatible constructor arguments\.\)$"):
        load_onnx(f"{bucket}/m/m.onnx", **where)


@pytest.mark.parametrize("reader", ["ours", "s3fs"])
def test_tensors_in_a_file_beside_the_model_are_read_from_there(put, s3, bucket, reader):
    where = put(m_onnx=_model("m.onnx.data"), m_onnx_data=KERNEL.tobytes())
    if reader == "s3fs":
        where = {"filesystem": s3fs.S3FileSystem(**s3.storage_options, skip_instance_cache=True)}

    session = load_onnx(f"{bucket}/m/m.onnx", **where)

    np.testing.assert_allclose(session.run(["y"], {"x": BATCH})[0], WANTED)


def test_missing_file_of_tensors_is_not_found_and_named(put, bucket):
    where = put(m_onnx=_model("m.onnx.data"))

    with pytest.raises(errors.NotFound, match=f"^{bucket}/m/m.onnx.data: "):
        load_onnx(f"{bucket}/m/m.onnx", **where)


def test_truncated_file_of_tensors_is_an_error(put, bucket):
    where = put(m_onnx=_model("m.onnx.data"), m_onnx_data=KERNEL.tobytes()[:-400])

    with pytest.raises(errors.ArtifactError, match=f"^{bucket}/m/m.onnx: "):
        load_onnx(f"{bucket}/m/m.onnx", **where)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../b", "..\\b"])
def test_tensors_that_are_not_beside_the_model_are_refused(put, bucket, location):
    where = put(m_onnx=_model(location))

    with pytest.raises(errors.ArtifactError, match="not beside it: save it with its tensors in one file"):
        load_onnx(f"{bucket}/m/m.onnx", **where)


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "no graph", "unknown operation"])
def test_what_is_no_model_is_an_error_that_names_it(put, bucket, damage):
    unknown = onnx.ModelProto.FromString(_model())
    unknown.graph.node[0].op_type = "NoSuchOp"
    content = {
        "empty": b"",
        "text": b"hello there",
        "truncated": _model()[:-500],
        "no graph": onnx.ModelProto(ir_version=9).SerializeToString(),
        "unknown operation": unknown.SerializeToString(),
    }[damage]
    where = put(m_onnx=content)

    with pytest.raises(errors.ArtifactError, match=f"^{bucket}/m/m.onnx: not a.* model"):
        load_onnx(f"{bucket}/m/m.onnx", **where)


def test_model_whose_names_are_no_text_is_an_error_that_names_it(put, bucket):
    """ONNX Runtime quotes them in its own error, which then is none of its own."""
    content = _model()
    at = content.index(b"MatMul")
    where = put(m_onnx=content[:at] + b"\xe4" + content[at + 1 :])

    with pytest.raises(errors.ArtifactError, match=rf"^{bucket}/m/m\.onnx: not a"):
        load_onnx(f"{bucket}/m/m.onnx", **where)


def test_model_that_is_not_there_is_not_found(s3, bucket):
    with pytest.raises(errors.NotFound, match=f"^{bucket}/none.onnx: "):
        load_onnx(f"{bucket}/none.onnx", storage_options=s3.storage_options)


# ---------------------------------------------------------------------- where tensors are


@pytest.mark.parametrize("nested", [False, True], ids=["initializer", "constant of a branch"])
def test_files_of_tensors_are_found_wherever_they_are_named(nested):
    assert external_files(memoryview(_model("there", nested=nested))) == {"there"}
    assert external_files(memoryview(_model(nested=nested))) == set()


@given(st.binary(max_size=200))
def test_any_bytes_are_a_model_or_a_value_error(content):
    for start in (b"", b"\x3a"):  # the latter begins a graph
        try:
            found = external_files(memoryview(start + content))
        except ValueError:
            continue
        assert isinstance(found, set)
