"""ONNX models: from S3 into a session of ONNX Runtime, in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import fsspec

from torch_s3 import errors
from torch_s3.artifacts.extras import needed
from torch_s3.artifacts.folder import lies_within
from torch_s3.artifacts.onnx_files import external_files
from torch_s3.artifacts.source import MAX_MESSAGE, read_whole
from torch_s3.wording import brief

_DAMAGED = (
    "InvalidProtobuf",
    "InvalidGraph",
    "InvalidArgument",
    "NoModel",
    "Fail",
    "NotImplemented",
)  # of ONNX Runtime's errors


def load_onnx(
    uri: str | os.PathLike[str],
    *,
    providers: Sequence[Any] | None = None,
    session_options: Any = None,
    storage_options: Mapping[str, Any] | None = None,
    filesystem: fsspec.AbstractFileSystem | None = None,
    **settings: Any,
) -> Any:
    """Load an ONNX model. Nothing touches a disk.

    Tensors that the model keeps in other files (as models above 2 GiB do) are read from beside it.

    Args:
        uri: The ``.onnx`` object, or file of any filesystem.
        providers: ONNX Runtime's execution providers, the preferred first; ``None`` for its own choice.
        session_options: ONNX Runtime's ``SessionOptions``; not changed where nothing is added to it.
        storage_options: For the filesystem that the uri asks for.
        filesystem: Any fsspec filesystem to read from instead.
        **settings: Attributes of ``SessionOptions`` to set, such as ``intra_op_num_threads=1``.

    Returns:
        An ``onnxruntime.InferenceSession``. It keeps the model's bytes, beside what it makes of them.

    Raises:
        ImportError: ONNX Runtime isn't installed.
        TypeError: There is no such setting, or it takes no such value.
        ValueError: There is no such provider.
        NotFound: There is no such object, or a file is missing that it keeps tensors in.
        ArtifactError: It is no model, or damaged, or keeps tensors in files that are not beside it.
    """
    runtime = needed("onnxruntime", extra="onnx", by="load_onnx")
    uri = os.fspath(uri)
    _check_providers(runtime, providers)
    options = _options(runtime, session_options, settings)
    reading: dict[str, Any] = {"storage_options": storage_options, "filesystem": filesystem}
    content = read_whole(uri, max_bytes=MAX_MESSAGE, **reading)
    try:
        elsewhere = sorted(external_files(content))
    except ValueError as error:
        raise errors.ArtifactError(f"not an ONNX model, or damaged ({error})", uri=uri) from None
    if not len(content):
        raise errors.ArtifactError("not an ONNX model: it is empty", uri=uri)
    model = bytes(content)  # the runtime takes nothing else
    del content
    beside = [read_whole(_beside(uri, name), **reading) for name in elsewhere]
    if beside:
        options.add_external_initializers_from_files_in_memory(elsewhere, beside, list(map(len, beside)))
    try:
        return runtime.InferenceSession(model, options, providers=providers)
    except TypeError as error:  # pybind's quote their arguments, of which the model is one
        raise TypeError(f"{uri}: ONNX Runtime {runtime.__version__} refuses an argument ({brief(error)})") from None
    except Exception as error:
        known = type(error).__module__.startswith("onnxruntime.") and type(error).__name__ in _DAMAGED
        if not known and not isinstance(error, UnicodeDecodeError):  # its own words quote what is damaged
            raise
        words = f"not a model that ONNX Runtime {runtime.__version__} can load ({' '.join(str(error).split())[:300]})"
        raise errors.ArtifactError(words, uri=uri) from None


def _check_providers(runtime: Any, providers: Sequence[Any] | None) -> None:
    if isinstance(providers, str):
        raise TypeError(f"providers={providers!r}: a list of names, such as [{providers!r}]")
    known = [*runtime.get_all_providers(), *runtime.get_available_providers()]
    for each in providers or ():
        name = each[0] if isinstance(each, tuple) and each else each
        if name not in known:
            here = ", ".join(runtime.get_available_providers())
            raise ValueError(f"providers=[{name!r:.100}]: ONNX Runtime {runtime.__version__} here has {here}")


def _options(runtime: Any, given: Any, settings: Mapping[str, Any]) -> Any:
    """The session's options.

    Raises:
        TypeError: It takes none such.
    """
    if given is not None and not isinstance(given, runtime.SessionOptions):
        raise TypeError(f"session_options={given!r:.100}: an onnxruntime.SessionOptions; settings go as keywords")
    options = given or runtime.SessionOptions()
    for name, value in settings.items():
        if not hasattr(options, name) or callable(getattr(options, name)):
            raise TypeError(f"load_onnx: onnxruntime.SessionOptions has no {name!r}")
        try:
            setattr(options, name, value)
        except TypeError:  # which says nothing of the name
            kind = type(getattr(options, name)).__name__
            raise TypeError(f"load_onnx: {name}={value!r:.100}: onnxruntime.SessionOptions takes {kind}") from None
    return options


def _beside(uri: str, name: str) -> str:
    """The uri of a file that a model keeps tensors in.

    Raises:
        ArtifactError: It is not beside the model.
    """
    if not lies_within(name):
        message = f"it keeps tensors in {name!r:.200}, which is not beside it: save it with its tensors in one file"
        raise errors.ArtifactError(message, uri=uri)
    return f"{uri.rpartition('/')[0]}/{name}"
