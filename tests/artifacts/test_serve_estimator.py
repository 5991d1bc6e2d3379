import os
import subprocess
import sys
from pathlib import Path

import torch_s3

_PACKAGE = Path(torch_s3.__file__).parent.parent  # installed or not
_EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "serve_estimator.py"


def _run(*arguments, cwd, **environment):
    path = os.pathsep.join(filter(None, [str(_PACKAGE), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, _EXAMPLE, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )


def test_serve_estimator_answers_from_both_formats(tmp_path):
    done = _run(cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert "s3://models/digits.skops: 9" in done.stdout
    assert "refused. It asks for:\n  sklearn.svm._classes.SVC\n" in done.stdout
    assert "trusted=['sklearn']: the first are [0, 1, 2" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_serve_estimator_uses_a_bucket_of_ones_own(s3, bucket, tmp_path):
    credentials = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    done = _run(f"--model={bucket}/m.skops", cwd=tmp_path, AWS_ENDPOINT_URL=s3.endpoint_url, **credentials)

    assert done.returncode == 0, done.stderr
    assert f"{bucket}/m.skops: 9" in done.stdout
