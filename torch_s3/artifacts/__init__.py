"""Models of other makers, from S3 into memory: estimators, pickles, archives, graphs and programs."""

from torch_s3.artifacts.archive import Artifact, open_artifact
from torch_s3.artifacts.estimator import load_estimator, save_estimator
from torch_s3.artifacts.graph import load_graph, run_graph
from torch_s3.artifacts.onnx_session import load_onnx
from torch_s3.artifacts.programs import load_exported, load_torchscript
from torch_s3.artifacts.saved_model import load_keras, load_saved_model
from torch_s3.artifacts.state import load_state_dict

__all__ = [
    "Artifact",
    "load_estimator",
    "load_exported",
    "load_graph",
    "load_keras",
    "load_onnx",
    "load_saved_model",
    "load_state_dict",
    "load_torchscript",
    "open_artifact",
    "run_graph",
    "save_estimator",
]
