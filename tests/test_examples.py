import contextlib
import io
import os
import re
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import torch_s3
from torch_s3 import S3FileSystem, load_checkpoint

_PACKAGE = Path(torch_s3.__file__).parent.parent  # installed or not
_EXAMPLES = Path(__file__).parent.parent / "examples"
_ROW = re.compile(r" *(\d+) +\d+\.\d+ +(\d+\.\d)% +[\d,]+ +\d+%( +<- resumed here)?")


def _run(example, *arguments, cwd, **environment):
    path = os.pathsep.join(filter(None, [str(_PACKAGE), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, _EXAMPLES / example, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def _commands_with(variable):
    """Command lines of the processes that have inherited ``NAME=value``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone, or somebody else's
            if variable.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes())
    return found


def _rows(output):
    """Of the table: ``(epoch, test accuracy in %, whether it was resumed there)``."""
    matches = filter(None, map(_ROW.fullmatch, output.splitlines()))
    return [(int(match[1]), float(match[2]), bool(match[3])) for match in matches]


def _assert_a_picture(file):
    with Image.open(file) as image:
        assert image.format == "PNG"
        assert min(image.size) >= 800
        assert len(image.convert("RGB").getcolors(2**24)) > 100  # something is drawn


@pytest.mark.timeout(300)
def test_train_images_is_killed_resumes_and_reaches_its_goal(tmp_path):
    mark = str(uuid.uuid4())

    run = _run("train_images.py", "--epochs=3", cwd=tmp_path, TORCH_S3_TEST=mark)

    assert run.returncode == 0, run.stdout + run.stderr
    assert not re.search("warning|traceback", run.stderr, re.IGNORECASE), run.stderr
    first, resumed, second = run.stdout.partition("killed in the middle of an epoch")
    assert resumed
    assert "resuming" not in first
    assert "resuming after epoch" in second
    assert re.search(r"loading: [\d,]+ samples, .* waiting for reads", second)
    rows = _rows(second)
    assert [epoch for epoch, _, _ in rows] == [1, 2, 3]
    assert rows[-1][1] >= 95
    assert [epoch for epoch, _, resumed in rows if resumed] in ([2], [3])  # 3 where the machine stalls
    _assert_a_picture(tmp_path / "train.png")
    assert _commands_with(f"TORCH_S3_TEST={mark}") == []


@pytest.mark.timeout(300)
def test_train_images_resumes_on_a_bucket_of_ones_own(s3, bucket, tmp_path):
    fs = S3FileSystem(**s3.storage_options)
    rng = np.random.default_rng(0)
    for number in range(40):
        file = io.BytesIO()
        dark_or_bright = rng.integers(0, 100, (*rng.integers(20, 90, 2), 3), dtype=np.uint8) + 155 * (number % 2)
        Image.fromarray(dark_or_bright.astype(np.uint8)).save(file, "jpeg")
        fs.pipe_file(f"{bucket}/photos/{('night', 'day')[number % 2]}/{number}.jpg", file.getvalue())
    options = [f"--data={bucket}/photos/", f"--checkpoints={bucket}/run/", f"--endpoint-url={s3.endpoint_url}"]
    options += ["--size=16", "--batch-size=8"]
    credentials = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}

    first = _run("train_images.py", *options, "--epochs=1", cwd=tmp_path, **credentials)
    second = _run("train_images.py", *options, "--epochs=2", cwd=tmp_path, **credentials)

    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "36 images to train on, 4 to test, 2 classes" in first.stdout
    assert [(epoch, resumed) for epoch, _, resumed in _rows(second.stdout)] == [(1, False), (2, True)]
    _assert_a_picture(tmp_path / "train.png")
    assert fs.ls(f"{bucket}/run", detail=False) == [
        f"{bucket}/run/epoch-000{epoch}.pt".removeprefix("s3://") for epoch in (1, 2)
    ]
    state = load_checkpoint(f"{bucket}/run/epoch-0002.pt", filesystem=fs)
    assert (state["epoch"], state["step"], len(state["history"]["steps"])) == (2, 10, 10)
