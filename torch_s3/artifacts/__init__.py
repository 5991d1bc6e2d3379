"""Models of other makers, from S3 into memory: estimators, pickles, archives."""

from torch_s3.artifacts.archive import Artifact, open_artifact

__all__ = ["Artifact", "open_artifact"]
