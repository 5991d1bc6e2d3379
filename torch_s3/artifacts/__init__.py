"""Models of other makers, from S3 into memory: estimators, pickles, archives."""

from torch_s3.artifacts.archive import Artifact, open_artifact
from torch_s3.artifacts.estimator import load_estimator, save_estimator
from torch_s3.artifacts.state import load_state_dict

__all__ = ["Artifact", "load_estimator", "load_state_dict", "open_artifact", "save_estimator"]
