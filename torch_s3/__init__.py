"""Train PyTorch models from S3: datasets that stream from a bucket, checkpoints that stream between S3 and tensors."""

from torch_s3.checkpoint.inspect import CheckpointInfo, TensorInfo, inspect_checkpoint
from torch_s3.checkpoint.load import load_checkpoint
from torch_s3.checkpoint.progress import Loaded
from torch_s3.checkpoint.save import save_checkpoint
from torch_s3.config import S3Config
from torch_s3.data.images import S3ImageDataset
from torch_s3.data.manifest import Manifest
from torch_s3.errors import (
    AccessDenied,
    AlreadyExists,
    CheckpointError,
    CheckpointMismatch,
    CredentialsExpired,
    DeadlineExceeded,
    DecodeError,
    EmptyDataset,
    IntegrityError,
    InvalidUri,
    NoCredentials,
    NotFound,
    ObjectChanged,
    S3Error,
    Throttled,
    TransferFailed,
    UnsafeCheckpoint,
)
from torch_s3.filesystem import S3FileSystem, register

__version__ = "0.1.0"
__all__ = [
    "AccessDenied",
    "AlreadyExists",
    "CheckpointError",
    "CheckpointInfo",
    "CheckpointMismatch",
    "CredentialsExpired",
    "DeadlineExceeded",
    "DecodeError",
    "EmptyDataset",
    "IntegrityError",
    "InvalidUri",
    "Loaded",
    "Manifest",
    "NoCredentials",
    "NotFound",
    "ObjectChanged",
    "S3Config",
    "S3Error",
    "S3FileSystem",
    "S3ImageDataset",
    "TensorInfo",
    "Throttled",
    "TransferFailed",
    "UnsafeCheckpoint",
    "inspect_checkpoint",
    "load_checkpoint",
    "register",
    "save_checkpoint",
]
