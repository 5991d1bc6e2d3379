"""Every block of Python in README and docs runs as it stands, in order, in one process for each file."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from torch_s3 import S3FileSystem

ROOT = Path(__file__).parent.parent
FILES = [
    path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if "```python" in path.read_text()
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_code_in_the_docs_runs(path, s3, tmp_path):
    picture = io.BytesIO()
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(picture, "jpeg")
    bucket = s3.create_bucket("my-bucket")
    S3FileSystem(**s3.storage_options).pipe(
        {f"{bucket}/train/{name}/{number}.jpg": picture.getvalue() for name in ("cat", "dog") for number in range(3)}
    )
    script = tmp_path / "blocks.py"
    script.write_text("\n".join(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)))
    env = os.environ | {
        "AWS_ENDPOINT_URL": s3.endpoint_url,
        "AWS_ACCESS_KEY_ID": s3.storage_options["key"],
        "AWS_SECRET_ACCESS_KEY": s3.storage_options["secret"],
        "PYTHONPATH": str(ROOT),
    }

    done = subprocess.run(
        [sys.executable, script], check=False, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100
    )

    assert done.returncode == 0, done.stderr
