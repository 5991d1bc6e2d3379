"""An AWS Lambda function that answers from a model in S3: an ONNX model, a frozen TensorFlow graph, or an estimator.

The model is loaded once, when Lambda starts the function's process, from S3 into memory: /tmp is not used, however
large the model is. Credentials are those of the function's role, which needs s3:GetObject for the model, and no more.

Settings (environment):
    MODEL_URI      s3://bucket/model.onnx, .pb, .skops or .joblib
    MODEL_INPUT    of a graph, the tensor to feed, such as input_1:0
    MODEL_OUTPUT   of a graph, the tensor to answer with, such as dense_1/BiasAdd:0
    MODEL_TRUSTED  of a .skops or .joblib, the types that it may hold beyond the usual ones, separated by commas

The handler's name is lambda_handler.handler; an event's body is {"rows": [[5.1, 3.5, 1.4, 0.2], ...]}. To try it:
    MODEL_URI=s3://bucket/model.onnx python lambda_handler.py '{"rows": [[5.1, 3.5, 1.4, 0.2]]}'
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from torch_s3 import artifacts

Predict = Callable[[np.ndarray], Any]


def load(uri: str) -> Predict:
    """A function from rows to predictions."""
    if uri.endswith(".onnx"):
        session = artifacts.load_onnx(uri)
        name = session.get_inputs()[0].name
        return lambda rows: session.run(None, {name: rows})[0]
    if uri.endswith(".pb"):
        graph = artifacts.load_graph(uri)
        feed, fetch = os.environ["MODEL_INPUT"], os.environ["MODEL_OUTPUT"]
        return lambda rows: artifacts.run_graph(graph, inputs={feed: rows}, outputs=[fetch])[0]
    trusted = [name for name in os.environ.get("MODEL_TRUSTED", "").split(",") if name]
    predict: Predict = artifacts.load_estimator(uri, trusted=trusted).predict
    return predict


predict = load(os.environ["MODEL_URI"])  # here, and not in the handler: once, while Lambda starts the process


def handler(event: dict[str, Any], _context: object) -> dict[str, Any]:
    """Answer one request."""
    try:
        rows = np.asarray(json.loads(event["body"])["rows"], np.float32)
    except (KeyError, TypeError, ValueError) as error:
        return _answer(400, {"error": f'the body has to be {{"rows": [[number, ...], ...]}}: {error}'})
    return _answer(200, {"predictions": np.asarray(predict(rows)).tolist()})


def _answer(status: int, said: dict[str, Any]) -> dict[str, Any]:
    return {"statusCode": status, "headers": {"content-type": "application/json"}, "body": json.dumps(said)}


if __name__ == "__main__":
    print(handler({"body": sys.argv[1]}, None)["body"])
