"""Train an image classifier from S3, with its checkpoints in S3; killed half-way, it resumes where it was.

    python examples/train_images.py

starts an S3 server of its own, puts scikit-learn's 1,797 scanned digits there as PNG files, trains on them, is killed
in the middle of an epoch, is started again by the same command, and finishes. This needs torch-s3[demo].

    python examples/train_images.py --data s3://bucket/images --checkpoints s3://bucket/run-1

trains on your own images: train/<class>/… and test/<class>/…, or <class>/… of which every tenth image is for testing.
Credentials are found as everywhere (AWS_ACCESS_KEY_ID, AWS_PROFILE, an instance role …). Stop it whenever you like.
"""

import argparse
import contextlib
import functools
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm

from torch_s3 import S3Error, S3FileSystem, S3ImageDataset, load_checkpoint, save_checkpoint
from torch_s3.testing import serve_s3

GOAL = 0.95  # test accuracy that the digits must reach
say = functools.partial(print, flush=True)  # what is killed flushes nothing


def train(options: argparse.Namespace) -> None:
    """Train to the last epoch, from the newest checkpoint on if there is one."""
    fs = S3FileSystem(endpoint_url=options.endpoint_url)
    checkpoints = options.checkpoints.rstrip("/")
    found = [path for path in fs.find(checkpoints) if path.endswith(".pt")]  # first: a bucket that isn't there stops us
    train_set, test_set = open_datasets(options.data.rstrip("/"), fs, options)
    say(f"{len(train_set):,} images to train on, {len(test_set):,} to test, {len(train_set.classes)} classes")

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = small_cnn(len(train_set.classes)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    history: dict[str, Any] = {"steps": [], "epochs": [], "resumed": []}
    epoch = 0
    if found:
        state = load_checkpoint(found[-1], map_location="cpu", filesystem=fs)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        epoch, history = state["epoch"], state["history"]
        say(f"resuming after epoch {epoch}, step {state['step']:,}, from {fs.unstrip_protocol(found[-1])}")
        if epoch < options.epochs:
            history["resumed"].append(epoch)

    loader = functools.partial(DataLoader, batch_size=options.batch_size, num_workers=options.workers)
    train_loader, test_loader = loader(train_set), loader(test_set)
    for epoch in range(epoch + 1, options.epochs + 1):
        train_set.set_epoch(epoch)  # the order of the images follows from it, also when resumed
        steps = list(train_epoch(model, optimizer, train_loader, device, f"epoch {epoch} of {options.epochs}"))
        history["steps"] += steps
        losses, seconds, waits = zip(*steps, strict=True)
        history["epochs"].append(
            {
                "epoch": epoch,
                "step": len(history["steps"]),
                "loss": sum(losses) / len(losses),
                "accuracy": test_accuracy(model, test_loader, device),
                "rate": len(train_set) / sum(seconds),
                "wait": sum(waits) / sum(seconds),
            }
        )
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "epoch": epoch,
            "step": len(history["steps"]),
            "history": history,
        }
        saved = save_checkpoint(state, f"{checkpoints}/epoch-{epoch:04d}.pt", filesystem=fs)
        accuracy = history["epochs"][-1]["accuracy"]
        say(f"epoch {epoch}: {accuracy:.1%} right; {saved.bytes / 1e6:.1f} MB saved to {saved.uri}")
    print_table(history)
    plot(history, options.plot)


def open_datasets(
    data: str, fs: S3FileSystem, options: argparse.Namespace
) -> tuple[S3ImageDataset, S3ImageDataset]:
    """The images to train on, shuffled anew each epoch, and those to test on."""
    train_images: str | list[str] = f"{data}/train"
    test_images: str | list[str] = f"{data}/test"
    if not fs.exists(f"{data}/train"):
        manifest = S3ImageDataset(data, filesystem=fs).manifest
        uris = [manifest.uri(index) for index in range(len(manifest))]
        train_images, test_images = [uri for index, uri in enumerate(uris) if index % 10], uris[::10]
    make = functools.partial(
        S3ImageDataset,
        transform=v2.Resize((options.size, options.size)),
        batch_size=options.batch_size,
        filesystem=fs,
    )
    train_set, test_set = make(train_images, shuffle=True), make(test_images)
    if unknown := set(test_set.classes) - set(train_set.classes):
        sys.exit(f"{data}: there are images to test of {sorted(unknown)}, but none to train on")
    # A class may have no images to test: number them as in training.
    test_set.target_transform = [train_set.class_to_idx[name] for name in test_set.classes].__getitem__
    return train_set, test_set


def small_cnn(classes: int) -> nn.Module:
    """For images of any size; put your own model here."""

    def block(channels_in: int, channels: int) -> nn.Module:
        convolution = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU())

    return nn.Sequential(
        *(block(3, 32), block(32, 32), nn.MaxPool2d(2), block(32, 64), block(64, 64), nn.MaxPool2d(2), block(64, 128)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, classes)),
    )


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any], device: torch.device, title: str
) -> Iterator[tuple[float, float, float]]:
    """Train on all batches; of each, yield its loss, the seconds it took, and those of them spent waiting for it."""
    model.train()
    waited = 0.0
    with tqdm(desc=title, total=len(loader.dataset), unit="img", leave=False, disable=None) as bar:
        began = ended = time.perf_counter()
        for images, labels in loader:
            got = time.perf_counter()
            loss = nn.functional.cross_entropy(model(as_input(images, device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            value, last, ended = loss.item(), ended, time.perf_counter()
            waited += got - last
            bar.set_postfix_str(f"loss {value:.3f}, {waited / (ended - began):.0%} waiting for data", refresh=False)
            bar.update(len(images))
            yield value, ended - last, got - last


@torch.inference_mode()
def test_accuracy(model: nn.Module, loader: DataLoader[Any], device: torch.device) -> float:
    """The share of the images that the model is right about."""
    model.eval()
    right = total = 0
    for images, labels in tqdm(loader, desc="testing", leave=False, disable=None):
        right += int((model(as_input(images, device)).argmax(1) == labels.to(device)).sum())
        total += len(labels)
    return right / total


def as_input(images: Tensor, device: torch.device) -> Tensor:
    """Images cross from the workers, and to the GPU, as bytes: a quarter of the size."""
    return images.to(device).float().div(127.5).sub(1)


def print_table(history: dict[str, Any]) -> None:
    """One line for each epoch."""
    say("\nepoch    loss   test accuracy   img/s   waiting for data")
    for row in history["epochs"]:
        mark = "   <- resumed from its checkpoint" if row["epoch"] in history["resumed"] else ""
        say(f"{row['epoch']:5}  {row['loss']:6.3f}  {row['accuracy']:14.1%}  {row['rate']:6,.0f}  {row['wait']:17.0%}{mark}")


def plot(history: dict[str, Any], file: str) -> None:
    """Draw loss, test accuracy and data wait over the steps."""


def demo(options: argparse.Namespace) -> int:
    """Train on the digits in an S3 of our own, killed half-way."""
    if options.epochs < 3:
        sys.exit("--epochs: at least 3 are needed to be killed in the middle of one and resume")
    with serve_s3() as s3:
        fs = S3FileSystem(**s3.storage_options)
        bucket = s3.create_bucket("demo")
        say(f"an S3 of our own serves {bucket} at {s3.endpoint_url}; the digits go there")
        fs.pipe(digits(f"{bucket}/digits"))
        checkpoints = f"{bucket}/run-1"
        command = [sys.executable, __file__, "--data", f"{bucket}/digits", "--checkpoints", checkpoints]
        command += ["--endpoint-url", s3.endpoint_url, "--size", "8"]
        command += [f"--epochs={options.epochs}", f"--batch-size={options.batch_size}", f"--workers={options.workers}"]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        credentials = {"AWS_ACCESS_KEY_ID": s3.storage_options["key"], "AWS_SECRET_ACCESS_KEY": s3.storage_options["secret"]}

        say(f"\n$ {' '.join(command)}")
        half = (options.epochs + 1) // 2
        with running(command, kept | credentials) as process:
            times = []
            for epoch in (half - 1, half):
                while not fs.exists(f"{checkpoints}/epoch-{epoch:04d}.pt"):
                    if process.poll() is not None:
                        return process.returncode or 1
                    time.sleep(0.05)
                times.append(time.monotonic())
            time.sleep((times[1] - times[0]) / 2)
        say(f"\nkilled in the middle of epoch {half + 1}, as a pre-empted machine is. Once more:\n\n$ {' '.join(command)}")
        with running(command, kept | credentials) as process:
            if process.wait():
                return process.returncode
        newest = fs.find(checkpoints)[-1]
        accuracy = load_checkpoint(newest, filesystem=fs)["history"]["epochs"][-1]["accuracy"]
    return 0


def digits(prefix: str) -> dict[str, bytes]:
    """scikit-learn's scans of handwritten digits as PNG files in class folders, every fifth of a digit for testing."""
    from PIL import Image
    from sklearn.datasets import load_digits

    files: dict[str, bytes] = {}
    count = [0] * 10
    scans = load_digits()
    for pixels, digit in zip(scans.images, scans.target, strict=True):
        png = io.BytesIO()
        Image.fromarray((pixels * (255 / 16)).round().astype("uint8")).save(png, "png")  # 0 is paper, 16 is ink
        part = "test" if count[digit] % 5 == 4 else "train"
        files[f"{prefix}/{part}/{digit}/{count[digit]:03d}.png"] = png.getvalue()
        count[digit] += 1
    return files


@contextlib.contextmanager
def running(command: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command; at the block's end it and its DataLoader workers are killed, if they haven't ended."""
    process = subprocess.Popen(command, env=env, process_group=0)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="URI", help="images, in class folders")
    parser.add_argument("--checkpoints", metavar="URI", help="where checkpoints go, and are looked for")
    parser.add_argument("--endpoint-url", metavar="URL", help="of an S3 that isn't AWS")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--size", type=int, default=64, help="pixels to scale images to, each way")
    parser.add_argument("--plot", default="train.png", metavar="FILE")
    options = parser.parse_args()
    if (options.data is None) != (options.checkpoints is None):
        parser.error("--data and --checkpoints go together")
    try:
        if options.data is None:
            return demo(options)
        train(options)
    except KeyboardInterrupt:
        say("\nstopped")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
