import os
import re
import subprocess
import sys
from pathlib import Path

from records import put

import torch_s3

EXAMPLE = Path(__file__).parents[2] / "examples" / "read_shards.py"


def run(*arguments):
    path = os.pathsep.join(filter(None, [str(Path(torch_s3.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, EXAMPLE, *arguments], env=os.environ | keys, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def test_example_packs_digits_and_reads_each_once():
    said = run()

    assert re.search(r"1,797 objects are \d+ shards now: s3://demo/tar/shard-\{000000\.\.\d+\}\.tar", said)
    assert "broken off after 320 samples" in said
    assert "resumed with 1 worker(s): each of the 1,797 samples came once" in said
    digits = {int(digit): int(count) for digit, count in re.findall(r"(\d): (\d+)", said.partition("TFRecords:")[2])}
    assert sorted(digits) == list(range(10))
    assert sum(digits.values()) == 1797


def test_example_reads_shards_of_ones_own(s3, fs, folder):
    said = run("--shards", put(fs, folder), "--endpoint-url", s3.endpoint_url, "--workers=1")

    assert "53 samples in 4 shards" in said
