"""Files of other makers, in memory."""

import io
import tarfile
import zipfile

import torch


def tar_of(members, mode="w", format=tarfile.PAX_FORMAT):
    """Of ``{name or TarInfo: bytes}``, or of such pairs."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, format=format) as archive:
        for name, content in members.items() if isinstance(members, dict) else members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def zip_of(members, method=zipfile.ZIP_DEFLATED):
    """Of ``{name or ZipInfo: bytes}``, or of such pairs."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items() if isinstance(members, dict) else members:
            archive.writestr(name, content)
    return file.getvalue()


def torch_saved(obj, **settings):
    """By ``torch.save``."""
    file = io.BytesIO()
    torch.save(obj, file, **settings)
    return file.getvalue()
