"""The torch-s3 command, as users run it."""

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from archives import torch_saved
from servers import running
from typer.testing import CliRunner

import torch_s3
from torch_s3 import Manifest, S3FileSystem, save_checkpoint
from torch_s3.cli import app as cli
from torch_s3.data.tar import TarScan

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def fs(s3):
    return S3FileSystem(**s3.storage_options)


@pytest.fixture
def photos(fs, bucket):
    fs.pipe({f"{bucket}/photos/{name}/{n}.jpg": b"x" * 1000 for name in ("cat", "dog") for n in range(5)})
    fs.pipe_file(f"{bucket}/photos/cat/notes.txt", b"notes")
    return f"{bucket}/photos/"


@pytest.fixture
def run(s3, monkeypatch):
    """Runs a command in this process."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")

    def invoke(*arguments, endpoint=True):
        at = [f"--endpoint-url={s3.endpoint_url}"] if endpoint else []
        return CliRunner().invoke(cli.app, [*map(str, arguments), *at])

    return invoke


def test_packs_a_prefix(run, fs, bucket, photos):
    options = ["--suffix=.jpg", "--labels=folder", "--shard-size=8KB", "--quiet"]

    done = run("pack", photos, f"{bucket}/shards/", *options)
    again = run("pack", photos, f"{bucket}/shards/", *options)

    assert (done.exit_code, done.stderr) == (0, "")
    uris = f"{bucket}/shards/shard-{{000000..000004}}.tar"
    assert done.stdout == f"10 samples, 30,720 bytes in 5 shards: {uris}\n"
    assert again.stdout == f"10 samples, 30,720 bytes in 5 shards, 5 of them there already: {uris}\n"
    assert json.loads(fs.cat_file(f"{bucket}/shards/manifest.json"))["classes"] == ["cat", "dog"]


def test_packs_what_a_manifest_lists_as_tfrecords(run, bucket, photos):
    made = run("manifest", photos, f"{bucket}/list", "--suffix=.jpg", "--pattern=dog/*")
    done = run("pack", f"{bucket}/list", f"{bucket}/shards", "--from-manifest", "--format=tfrecord", "--quiet")

    assert made.stdout == f"5 objects, 5,000 bytes: {bucket}/list\n"
    assert done.stdout.startswith("5 samples, ")
    assert done.stdout.endswith(f" in 1 shard: {bucket}/shards/shard-000000.tfrecord\n")


def test_without_ray_nothing_is_begun(run, fs, bucket, photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)

    done = run("pack", photos, f"{bucket}/shards", "--ray")

    assert (done.exit_code, done.stderr) == (
        1,
        "torch-s3: packing with Ray needs it installed: pip install 'torch-s3[ray]'\n",
    )
    assert not fs.exists(f"{bucket}/shards")


def test_packs_a_folder_on_disk_into_the_bucket(run, fs, bucket, tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("text")

    done = run("pack", f"file://{tmp_path}/", f"{bucket}/shards", "--quiet")

    assert done.stdout == f"3 samples, 4,096 bytes in 1 shard: {bucket}/shards/shard-000000.tar\n", done.output
    assert fs.info(f"{bucket}/shards/shard-000000.tar")["size"] == 4096


def test_a_manifest_goes_to_a_file_on_disk(run, photos, tmp_path):
    done = run("manifest", photos, tmp_path / "list")

    assert done.exit_code == 0, done.output
    assert len(Manifest.load(tmp_path / "list")) == 11


def test_only_what_is_public_is_read_without_credentials(run, fs, bucket, photos, monkeypatch, tmp_path):
    public = {"Body": torch_saved({"weight": torch.zeros(3)}), "ACL": "public-read"}
    fs.client.call("put_object", bucket, Bucket=bucket.removeprefix("s3://"), Key="model.pt", **public)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")

    listed = run("manifest", photos, tmp_path / "list", "--anon")
    inspected = run("inspect", f"{bucket}/model.pt", "--anon")
    refused = [run("pack", photos, f"{bucket}/out", "--anon"), run("manifest", photos, f"{bucket}/list", "--anon")]

    assert (listed.exit_code, inspected.exit_code) == (0, 0), listed.output + inspected.output
    assert [done.exit_code for done in refused] == [1, 1]
    assert all("no credentials" in done.stderr.lower() for done in refused), [done.stderr for done in refused]


def test_names_what_was_left_out(run, fs, bucket, photos, s3):
    Manifest.from_prefix(photos, filesystem=fs, suffixes=[".jpg"]).save(f"{bucket}/list", filesystem=fs)
    fs.rm(f"{photos}dog/3.jpg")

    done = run("pack", f"{bucket}/list", f"{bucket}/shards", "--from-manifest", "--on-error=skip", "--quiet")

    assert done.exit_code == 0
    assert done.stderr.startswith(f"left out: {photos}dog/3.jpg: ")
    assert done.stdout.startswith("9 samples, ")


def test_shows_what_is_in_a_checkpoint(run, fs, bucket):
    save_checkpoint({"layer.weight": torch.zeros(3, 4), "step": 5}, f"{bucket}/model.pt", filesystem=fs)

    done = run("inspect", f"{bucket}/model.pt")

    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[1].split() == ["layer.weight", "float32", "3", "x", "4", "48"]
    assert "1 tensors, " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "{bucket}/none/", "{bucket}/out"], "{bucket}/none/: nothing is stored here: check the prefix"),
        (["pack", "folder", "{bucket}/out"], "folder: no scheme: write s3://bucket/key"),
        (["pack", "{bucket}/none/", "{bucket}/out", "--shard-size=lots"], "'lots' is no number of bytes"),
        (["pack", "{photos}", "{photos}out"], "{photos}out: the shards would lie among what is packed"),
        (["manifest", "s3://no-such-bucket-here/", "{bucket}/list"], "s3://no-such-bucket-here"),
        (["inspect", "{photos}cat/notes.txt"], "{photos}cat/notes.txt: "),
        (["inspect", "{bucket}/none.pt"], "{bucket}/none.pt: "),
        (["pack", "{bucket}/list", "{bucket}/out", "--from-manifest", "--suffix=.jpg"], "suffixes are for a prefix"),
    ],
)
def test_an_error_is_one_line(run, fs, bucket, photos, arguments, message):
    Manifest.from_uris([f"{photos}cat/0.jpg"]).save(f"{bucket}/list", filesystem=fs)

    done = run(*(each.format(bucket=bucket, photos=photos) for each in arguments))

    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"torch-s3: {message.format(bucket=bucket, photos=photos)}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "count"),
    [("7", 7), ("500MB", 500_000_000), ("256MiB", 256 << 20), ("1.5 gib", 3 << 29), ("2k", 2000), ("3gb", 3 * 10**9)],
)
def test_sizes_are_read_as_people_write_them(text, count):
    assert cli._bytes(text) == count


def test_a_cluster_that_is_not_there_is_one_line(run, bucket, photos, monkeypatch):
    def pack(*_, **__):
        raise ConnectionError("Could not connect to Ray\nat 127.0.0.1:1")  # after minutes, by ray.init

    monkeypatch.setattr(cli, "pack_objects", pack)

    done = run("pack", photos, f"{bucket}/out", "--ray")

    assert (done.exit_code, done.stderr) == (1, "torch-s3: Could not connect to Ray at 127.0.0.1:1\n")


@pytest.mark.parametrize("text", ["", "MB", "-1", "1TB", "1 i", "1e9", "9" * 400])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is no number of bytes"):
        cli._bytes(text)


def _start(*arguments, **environment):
    env = os.environ | {"PYTHONPATH": str(ROOT), "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=env | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_runs_as_a_module():
    with _start("-m", "torch_s3.cli", "--version") as process:
        assert process.communicate(timeout=60) == (f"{torch_s3.__version__}\n", "")
    assert process.returncode == 0


def test_says_which_extra_is_missing():
    code = "import sys; sys.modules['typer'] = None; from torch_s3.cli import main; main()"
    with _start("-c", code) as process:
        out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert error == "torch-s3: typer is not installed: pip install 'torch-s3[cli]'\n"


@pytest.fixture
def stalling(s3, bucket):
    """An endpoint that passes requests on, but never answers those for `4.jpg`."""
    asked, end = threading.Event(), threading.Event()

    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self):
            if self.command == "GET" and self.path.endswith("4.jpg"):
                asked.set()
                end.wait(60)
                self.close_connection = True
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            headers.setdefault("Content-Type", "application/octet-stream")  # urllib's own would be a form's
            request = urllib.request.Request(
                s3.endpoint_url + self.path, data=body or None, headers=headers, method=self.command
            )
            try:
                answer = urllib.request.urlopen(request, timeout=30)
            except urllib.error.HTTPError as error:
                answer = error
            with answer:
                content = answer.read()
                self.send_response_only(answer.status)
                for name, value in answer.headers.items():
                    if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                        self.send_header(name, value)
                length = answer.headers["Content-Length"] if self.command == "HEAD" else len(content)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(content)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on  # noqa: N815

        def log_message(self, *_):
            pass

    with running(ThreadingHTTPServer(("127.0.0.1", 0), Answer)) as server:
        yield f"http://127.0.0.1:{server.server_port}", asked
        end.set()


def test_ctrl_c_ends_it_and_leaves_whole_shards_only(fs, bucket, photos, stalling):
    endpoint, asked = stalling
    arguments = ["pack", photos, f"{bucket}/shards", "--suffix=.jpg", "--shard-size=8KB", "--quiet", "--workers=1"]
    with _start("-m", "torch_s3.cli", *arguments, f"--endpoint-url={endpoint}") as process:
        assert asked.wait(30), process.kill() or process.communicate()
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=30)  # less than a read's timeouts

    assert (process.returncode, out) == (130, "")
    assert error == "torch-s3: stopped; nothing is half-written\n"
    names = [name.rpartition("/")[2] for name in fs.ls(f"{bucket}/shards", detail=False, refresh=True)]
    assert names == ["manifest.json", "shard-000000.idx", "shard-000000.tar"]
    scan = TarScan(names[-1])
    scan.feed(memoryview(fs.cat_file(f"{bucket}/shards/shard-000000.tar")))
    assert len(scan.finish()) == 5
    assert not json.loads(fs.cat_file(f"{bucket}/shards/manifest.json"))["complete"]
