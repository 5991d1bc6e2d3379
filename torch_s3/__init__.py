"""Train PyTorch models from S3: datasets that stream from a bucket, checkpoints that stream between S3 and tensors."""

from torch_s3.checkpoint.load import load_checkpoint
from torch_s3.checkpoint.manager import CheckpointManager
from torch_s3.checkpoint.save import save_checkpoint
from torch_s3.checkpoint.steps import KeepBest
from torch_s3.config import S3Config
from torch_s3.data.folder import S3ImageFolder
from torch_s3.data.images import S3ImageDataset
from torch_s3.data.iterable import S3IterableDataset
from torch_s3.data.manifest import Manifest
from torch_s3.data.objects import S3MapDataset, S3Object
from torch_s3.errors import (
    AccessDenied,
    AlreadyExists,
    CacheError,
    CheckpointError,
    CredentialsExpired,
    DeadlineExceeded,
    DecodeError,
    EmptyDataset,
    IntegrityError,
    InvalidManifest,
    InvalidUri,
    NoCredentials,
    NotFound,
    ObjectChanged,
    S3Error,
    StateMismatch,
    Throttled,
    TooManyErrors,
    TransferFailed,
    UnsafeCheckpoint,
)
from torch_s3.filesystem import S3FileSystem, register

__version__ = "0.1.0"
__all__ = [
    "AccessDenied",
    "AlreadyExists",
    "CacheError",
    "CheckpointError",
    "CheckpointManager",
    "CredentialsExpired",
    "DeadlineExceeded",
    "DecodeError",
    "EmptyDataset",
    "IntegrityError",
    "InvalidManifest",
    "InvalidUri",
    "KeepBest",
    "Manifest",
    "NoCredentials",
    "NotFound",
    "ObjectChanged",
    "S3Config",
    "S3Error",
    "S3FileSystem",
    "S3ImageDataset",
    "S3ImageFolder",
    "S3IterableDataset",
    "S3MapDataset",
    "S3Object",
    "StateMismatch",
    "Throttled",
    "TooManyErrors",
    "TransferFailed",
    "UnsafeCheckpoint",
    "load_checkpoint",
    "register",
    "save_checkpoint",
]
