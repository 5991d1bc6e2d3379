"""Train PyTorch models from S3: datasets that stream from a bucket, checkpoints that stream between S3 and tensors."""

from torch_s3 import artifacts
from torch_s3.checkpoint.inspect import CheckpointInfo, TensorInfo, inspect_checkpoint
from torch_s3.checkpoint.load import load_checkpoint
from torch_s3.checkpoint.manager import CheckpointManager
from torch_s3.checkpoint.progress import Loaded
from torch_s3.checkpoint.save import save_checkpoint
from torch_s3.checkpoint.steps import KeepBest
from torch_s3.config import S3Config
from torch_s3.data.example import Features, FixedFeature, SequenceFeature, VarFeature
from torch_s3.data.folder import S3ImageFolder
from torch_s3.data.images import S3ImageDataset
from torch_s3.data.iterable import S3IterableDataset
from torch_s3.data.manifest import Manifest
from torch_s3.data.objects import S3MapDataset, S3Object
from torch_s3.data.pack import Packed, pack
from torch_s3.data.tars import S3TarDataset
from torch_s3.data.tfrecords import S3TFRecordDataset
from torch_s3.errors import (
    AccessDenied,
    AlreadyExists,
    ArtifactError,
    ArtifactMismatch,
    CacheError,
    CheckpointError,
    CheckpointMismatch,
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
    UnsafeArtifact,
    UnsafeCheckpoint,
)
from torch_s3.filesystem import S3FileSystem, register

__version__ = "0.1.0"
__all__ = [
    "AccessDenied",
    "AlreadyExists",
    "ArtifactError",
    "ArtifactMismatch",
    "CacheError",
    "CheckpointError",
    "CheckpointInfo",
    "CheckpointManager",
    "CheckpointMismatch",
    "CredentialsExpired",
    "DeadlineExceeded",
    "DecodeError",
    "EmptyDataset",
    "Features",
    "FixedFeature",
    "IntegrityError",
    "InvalidManifest",
    "InvalidUri",
    "KeepBest",
    "Loaded",
    "Manifest",
    "NoCredentials",
    "NotFound",
    "ObjectChanged",
    "Packed",
    "S3Config",
    "S3Error",
    "S3FileSystem",
    "S3ImageDataset",
    "S3ImageFolder",
    "S3IterableDataset",
    "S3MapDataset",
    "S3Object",
    "S3TFRecordDataset",
    "S3TarDataset",
    "SequenceFeature",
    "StateMismatch",
    "TensorInfo",
    "Throttled",
    "TooManyErrors",
    "TransferFailed",
    "UnsafeArtifact",
    "UnsafeCheckpoint",
    "VarFeature",
    "artifacts",
    "inspect_checkpoint",
    "load_checkpoint",
    "pack",
    "register",
    "save_checkpoint",
]
