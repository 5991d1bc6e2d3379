"""Run a frozen TensorFlow graph that lies in S3, from memory.

    python run_graph.py                                           # makes one, in an S3 of its own, and runs it
    python run_graph.py s3://bucket/model.pb --input input_1:0 --output dense_1/BiasAdd:0 --rows '[[1, 2, 3]]'

Needs torch-s3[tensorflow], and torch-s3[demo] for the S3 of its own.
"""

import argparse
import json
import os
import sys
from contextlib import ExitStack
from typing import Any

import numpy as np

import torch_s3  # before TensorFlow: the other way round, TensorFlow 2.21 and PyTorch's Triton crash the process
from torch_s3.artifacts import load_graph, run_graph
from torch_s3.testing import serve_s3


def freeze() -> bytes:
    """A small network of two layers, its weights made constants, as ``model.pb`` would hold it."""
    import tensorflow as tf

    random = np.random.default_rng(0)
    with tf.Graph().as_default() as graph:
        x = tf.compat.v1.placeholder(tf.float32, [None, 3], name="input_1")
        for name, (rows, columns) in {"dense": (3, 8), "dense_1": (8, 2)}.items():
            kernel = tf.constant(random.normal(size=(rows, columns)).astype(np.float32), name=f"{name}/kernel")
            x = tf.nn.bias_add(tf.matmul(x, kernel, name=f"{name}/MatMul"), tf.zeros(columns), name=f"{name}/BiasAdd")
            x = tf.nn.relu(x, name=f"{name}/Relu")
    content: bytes = graph.as_graph_def().SerializeToString()
    return content


def main(arguments: list[str]) -> None:
    """Load, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("uri", nargs="?", help="the model; without it, one is made")
    parser.add_argument("--input", default="input_1:0")
    parser.add_argument("--output", default="dense_1/BiasAdd:0")
    parser.add_argument("--rows", type=json.loads, default=[[1, 2, 3], [4, 5, 6]])
    given = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    uri: str | None = given.uri
    where: dict[str, Any] = {}
    with ExitStack() as stack:
        if uri is None:
            s3 = stack.enter_context(serve_s3())
            where = {"storage_options": s3.storage_options}
            uri = f"{s3.create_bucket('models')}/model.pb"
            torch_s3.S3FileSystem(**s3.storage_options).pipe_file(uri, freeze())
        graph = load_graph(uri, **where)
        (found,) = run_graph(graph, inputs={given.input: np.float32(given.rows)}, outputs=[given.output])
    print(f"{uri} {given.output} {found.shape}")
    print(found)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except torch_s3.S3Error as error:
        sys.exit(str(error))
