"""What touches no disk goes on where there is none, and in little memory; examples that show it."""

import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import skops.io
import torch
from archives import tar_of
from faults import Faults
from onnx import TensorProto, helper, numpy_helper
from sklearn.linear_model import LinearRegression

from torch_s3.artifacts import load_estimator, load_onnx

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
KERNEL = np.arange(6, dtype=np.float32).reshape(3, 2)
ROWS = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
WANTED = (np.float32(ROWS) @ KERNEL).tolist()

# A file that grows is an error in any library, and one that is opened for writing in Python.
NO_DISK = """
import os, resource, signal, sys
def no_writes(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        if arguments[0] != "/dev/null":
            raise OSError(f"{arguments[0]} was opened for writing")
def forbid_writes(memory=None):
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if memory:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    sys.addaudithook(no_writes)
    try:
        open("/tmp/torch-s3-test-of-writes", "wb")
    except OSError:
        return
    sys.exit("writes don't fail")
"""


def _onnx():
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "kernel"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 2])],
        [numpy_helper.from_array(KERNEL, "kernel")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _graph(tf):
    with tf.Graph().as_default() as graph:
        x = tf.compat.v1.placeholder(tf.float32, [None, 3], name="input_1")
        tf.matmul(x, tf.constant(KERNEL), name="dense_1/MatMul")
    return graph.as_graph_def().SerializeToString()


class Times(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = torch.nn.Parameter(torch.from_numpy(KERNEL))

    def forward(self, x):
        return x @ self.kernel


def _exported():
    file = io.BytesIO()
    torch.export.save(torch.export.export(Times(), (torch.tensor(ROWS),)), file)
    return file.getvalue()


def _script():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(Times()).save_to_buffer()


def _estimator():
    rows = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    return skops.io.dumps(LinearRegression().fit(rows, rows @ KERNEL))


def _requests(server, name):
    """What it takes to load a model."""
    load = load_onnx if name.endswith("onnx") else load_estimator
    load(f"s3://bucket/{name}", storage_options=server.storage_options)
    return server.requests[:]


def _run(program, server, *arguments, **settings):
    """What a program prints, whose AWS settings are in its environment alone."""
    options = server.storage_options
    env = os.environ | {
        "AWS_ENDPOINT_URL": server.endpoint_url,
        "AWS_ACCESS_KEY_ID": options["key"],
        "AWS_SECRET_ACCESS_KEY": options["secret"],
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), str(EXAMPLES)]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    done = subprocess.run(
        [sys.executable, *program, *arguments],
        env=env | settings,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_models_and_archives_are_read_where_every_write_fails(tf):
    objects = {
        "/bucket/model.onnx": _onnx(),
        "/bucket/model.pb": _graph(tf),
        "/bucket/model.pt2": _exported(),
        "/bucket/model.pt": _script(),
        "/bucket/model.tar.gz": tar_of({"rows.json": json.dumps(WANTED).encode()}, "w:gz"),
    }
    program = f"""{NO_DISK}
import json
import numpy as np, torch
from torch_s3 import artifacts
import tensorflow, onnxruntime, torch.export.pt2_archive._package
forbid_writes()
rows = np.float32({ROWS})
print(json.dumps([
    artifacts.load_onnx("s3://bucket/model.onnx").run(None, {{"x": rows}})[0].tolist(),
    artifacts.run_graph(
        artifacts.load_graph("s3://bucket/model.pb"), inputs={{"input_1": rows}}, outputs=["dense_1/MatMul"]
    )[0].tolist(),
    artifacts.load_exported("s3://bucket/model.pt2").module()(torch.from_numpy(rows)).tolist(),
    artifacts.load_torchscript("s3://bucket/model.pt")(torch.from_numpy(rows)).tolist(),
    json.loads(artifacts.open_artifact("s3://bucket/model.tar.gz")["rows.json"]),
]))
"""
    with Faults(objects=objects) as server:
        found = json.loads(_run(["-c", program], server))

    assert found == [WANTED] * 5


@pytest.mark.parametrize("name", ["model.onnx", "model.skops"])
def test_lambda_loads_its_model_once_and_answers_without_disk_in_little_memory(name):
    model = {"model.onnx": _onnx, "model.skops": _estimator}[name]()
    program = f"""{NO_DISK}
forbid_writes(memory=2 << 30)
import json
import lambda_handler
good = {{"body": json.dumps({{"rows": {ROWS}}})}}
print(json.dumps([lambda_handler.handler(event, None) for event in (good, {{"body": "?"}}, {{}}, good)]))
"""
    with Faults(objects={f"/bucket/{name}": model}) as server:
        once = len(_requests(server, name))
        answers = json.loads(_run(["-c", program], server, MODEL_URI=f"s3://bucket/{name}"))

        assert len(server.requests) == 2 * once

    assert [answer["statusCode"] for answer in answers] == [200, 400, 400, 200]
    for answer in answers[::3]:
        np.testing.assert_allclose(json.loads(answer["body"])["predictions"], WANTED, atol=1e-4)
    assert "the body has to be" in json.loads(answers[1]["body"])["error"]


def test_run_graph_example_makes_a_graph_and_runs_it(s3):
    said = _run([EXAMPLES / "run_graph.py"], s3)

    assert said.startswith("s3://models/model.pb dense_1/BiasAdd:0 (2, 2)\n")
