"""Train an image classifier from S3, with its checkpoints in S3; killed on the way, it resumes where it was.

    python examples/train_images.py

starts an S3 server of its own, puts scikit-learn's 1,797 scanned digits there as PNG files, trains on them, is killed
in the middle of an epoch, is started again by the same command, and finishes. It needs torch-s3[demo].

    python examples/train_images.py --data s3://bucket/images --checkpoints s3://bucket/run-1

trains on your images: train/<class>/… and test/<class>/…, or <class>/… alone, with every tenth image for testing.
Credentials are found where boto3 finds them (AWS_ACCESS_KEY_ID, AWS_PROFILE, an instance role …). Stop it at any time:
the same command goes on from the newest checkpoint, in the middle of an epoch too: with the images that were not seen
yet, whatever --workers and --batch-size are now.
"""

import argparse
import contextlib
import functools
import io
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm

from torch_s3 import S3Error, S3FileSystem, S3ImageDataset, load_checkpoint, save_checkpoint
from torch_s3.checkpoint.save import Saved
from torch_s3.testing import serve_s3

GOAL = 0.95  # the test accuracy that the digits must reach
EVERY = 20  # batches between checkpoints within an epoch
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
History = dict[str, list[Any]]  # steps: (images, loss, seconds, seconds waiting for data); epochs: (steps, accuracy)
say = functools.partial(print, flush=True)  # a process that is killed flushes nothing


def train(options: argparse.Namespace) -> None:
    """Train to the last epoch, from the newest checkpoint on if there is one, and report."""
    fs = S3FileSystem(endpoint_url=options.endpoint_url)
    folder = options.checkpoints.rstrip("/")
    checkpoints = [fs.unstrip_protocol(path) for path in fs.find(folder) if path.endswith(".pt")]
    train_set, test_set = open_datasets(options.data.rstrip("/"), options, fs)
    say(f"{len(train_set):,} images to train on, {len(test_set):,} to test, {len(train_set.classes)} classes")

    torch.manual_seed(0)
    # Leave cores to the workers: where OpenMP's threads wait for a core, small steps take a hundred times as long.
    torch.set_num_threads(max(1, torch.get_num_threads() - options.workers))
    model = small_cnn(len(train_set.classes)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters())
    history: History = {"steps": [], "epochs": [], "resumed": []}
    if checkpoints:
        state = load_checkpoint(checkpoints[-1], map_location="cpu", filesystem=fs)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        torch.cuda.set_rng_state_all(state["cuda_rng"][: torch.cuda.device_count()])
        history = state["history"]
        history["resumed"].append(state["epoch"])
        if state["data"] is not None:
            train_set.load_state_dict(state["data"])  # this epoch goes on with what is left of it
        say(f"found {checkpoints[-1]}: resuming after epoch {state['epoch']}, step {state['step']:,}")

    loader = functools.partial(
        DataLoader,
        batch_size=options.batch_size,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
        pin_memory=DEVICE.type == "cuda",
        worker_init_fn=leave_ctrl_c_alone,
        generator=torch.Generator(),  # so that starting workers draws nothing from the RNG that is saved
    )
    train_loader, test_loader = loader(train_set), loader(test_set)

    def save(name: str, data: dict[str, Any] | None) -> Saved:
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(),
            "epoch": len(history["epochs"]),
            "step": len(history["steps"]),
            "data": data,  # of an epoch under way
            "history": history,
        }
        return save_checkpoint(state, f"{folder}/{name}.pt", filesystem=fs)

    for epoch in range(len(history["epochs"]) + 1, options.epochs + 1):
        train_set.set_epoch(epoch)  # gives the order of the images, whether resumed or not
        title = f"epoch {epoch} of {options.epochs}"
        first = history["epochs"][-1][0] if history["epochs"] else 0
        seen = sum(images for images, *_ in history["steps"][first:])  # more than 0 where an epoch is resumed
        with tqdm(desc=title, initial=seen, total=len(train_set), unit="img", leave=False, disable=None) as bar:
            for batches, step in enumerate(train_epoch(model, optimizer, train_loader, bar), 1):
                history["steps"].append(step)
                if batches % EVERY == 0:
                    save(f"epoch-{epoch:04d}-step-{len(history['steps']):07d}", train_set.state_dict(batches=batches))
        accuracy = test_accuracy(model, test_loader)
        history["epochs"].append((len(history["steps"]), accuracy))
        saved = save(f"epoch-{epoch:04d}", None)
        say(f"{title}: test accuracy {accuracy:.1%}; {saved.bytes / 1e6:.1f} MB saved to {saved.uri}")
    print_table(history)
    say(f"\nloading: {train_set.stats()}")
    plot(history, options.data)


def open_datasets(data: str, options: argparse.Namespace, fs: S3FileSystem) -> tuple[S3ImageDataset, S3ImageDataset]:
    """The images to train on, in a new order each epoch, and those to test on."""
    train_images: str | list[str] = f"{data}/train"
    test_images: str | list[str] = f"{data}/test"
    if not fs.exists(f"{data}/train"):
        manifest = S3ImageDataset(data, filesystem=fs).manifest
        uris = [manifest.uri(index) for index in range(len(manifest))]
        train_images, test_images = [uri for index, uri in enumerate(uris) if index % 10], uris[::10]
    resize = v2.Resize((options.size, options.size))
    dataset = functools.partial(S3ImageDataset, transform=resize, batch_size=options.batch_size, filesystem=fs)
    train_set, test_set = dataset(train_images, shuffle=True), dataset(test_images)
    if unknown := set(test_set.classes) - set(train_set.classes):
        sys.exit(f"{data}: there are images to test of {sorted(unknown)}, but none to train on")
    # A class without images to test shifts the numbers of those after it: use training's.
    test_set.target_transform = [train_set.class_to_idx[name] for name in test_set.classes].__getitem__
    return train_set, test_set


def leave_ctrl_c_alone(_worker: int) -> None:
    """Ctrl-C is for the main process, which then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = lambda *_: None  # it may stop while a batch is handed over; the dataset's errors go another way


def small_cnn(classes: int) -> nn.Module:
    """For images of any size. Your own model goes here."""

    def block(channels_in: int, channels: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels_in, channels, 3, padding=1), nn.GroupNorm(8, channels), nn.ReLU())

    return nn.Sequential(
        *(block(3, 32), block(32, 32), nn.MaxPool2d(2), block(32, 64), block(64, 64), nn.MaxPool2d(2), block(64, 128)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, classes)),
    )


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any], bar: "tqdm[Any]"
) -> Iterator[tuple[int, float, float, float]]:
    """Train on each batch once. Of each: images, loss, seconds, and those of the seconds spent waiting for it."""
    model.train()
    waited, began = 0.0, time.perf_counter()
    ended = began
    for images, labels in loader:
        wait = time.perf_counter() - ended
        loss = nn.functional.cross_entropy(model(as_input(images)), labels.to(DEVICE))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        value, last, ended = loss.item(), ended, time.perf_counter()  # item() waits for the GPU
        waited += wait
        bar.set_postfix_str(f"loss {value:.3f}, {waited / (ended - began):.0%} waiting for data", refresh=False)
        bar.update(len(images))
        yield len(images), value, ended - last, wait


@torch.inference_mode()
def test_accuracy(model: nn.Module, loader: DataLoader[Any]) -> float:
    """The share of the images that the model gets right."""
    model.eval()
    right = total = 0
    for images, labels in tqdm(loader, desc="testing", leave=False, disable=None):
        right += int((model(as_input(images)).argmax(1) == labels.to(DEVICE)).sum())
        total += len(labels)
    return right / total


def as_input(images: Tensor) -> Tensor:
    """Floats from -1 to 1. From the workers and to the GPU the images go as bytes, a quarter of that."""
    return images.to(DEVICE, non_blocking=True).float().div(127.5).sub(1)


def print_table(history: History) -> None:
    say("\nepoch    loss   test accuracy    img/s   waiting for data")
    first = 0
    for epoch, (last, accuracy) in enumerate(history["epochs"], 1):
        images, losses, seconds, waits = np.array(history["steps"][first:last]).T
        loss, rate, wait = losses @ images / images.sum(), images.sum() / seconds.sum(), waits.sum() / seconds.sum()
        resumed = "   <- resumed here" if epoch - 1 in history["resumed"] else ""
        say(f"{epoch:5}  {loss:6.3f}  {accuracy:14.1%}  {rate:7,.0f}  {wait:17.0%}{resumed}")
        first = last


def plot(history: History, data: str) -> None:
    """Draw loss, test accuracy and data wait over the steps into train.png."""
    _, losses, seconds, waits = np.array(history["steps"]).T
    epoch_ends, accuracies = np.array(history["epochs"]).T
    steps = np.arange(1, len(losses) + 1)
    window = np.ones(min(10, len(steps)))
    centers = np.convolve(steps, window, "valid") / len(window)

    figure = Figure(figsize=(8, 8), dpi=150, layout="constrained")
    figure.suptitle(f"Training on {data}")
    panels = loss, accuracy, wait = figure.subplots(3, sharex=True)
    loss.semilogy(steps, losses, color="C0", alpha=0.3, linewidth=0.8)
    loss.semilogy(centers, np.convolve(losses, window, "valid") / len(window), color="C0")
    loss.set_ylabel("training loss")
    accuracy.plot(epoch_ends, 100 * accuracies, "o-", color="C0")
    accuracy.set(ylabel="test accuracy (%)", ylim=(min(90, 95 * accuracies.min()), 101))
    wait.plot(steps, 100 * waits / seconds, color="C0", alpha=0.3, linewidth=0.8, label="each batch")
    share = np.convolve(waits, window, "valid") / np.convolve(seconds, window, "valid")
    wait.plot(centers, 100 * share, color="C0", label=f"mean of {len(window)} batches")
    wait.set(ylabel="time waiting for data (%)", ylim=(0, 100), xlabel="step")
    for panel in panels:
        panel.grid(alpha=0.3)
        for epoch in history["resumed"]:
            if epoch < len(epoch_ends):
                panel.axvline(epoch_ends[epoch - 1], color="C3", linestyle="--", label="resumed from a checkpoint")
    handles, labels = wait.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))  # each once, however often it was resumed
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3)
    figure.align_ylabels()
    figure.savefig("train.png")
    say("loss, accuracy and data wait are drawn in train.png")


def demo(options: argparse.Namespace) -> None:
    """Train on the digits in an S3 of our own, killed on the way."""
    with serve_s3() as s3:
        bucket, fs = s3.create_bucket("demo"), S3FileSystem(**s3.storage_options)
        fs.pipe(digits(f"{bucket}/digits"))
        say(f"an S3 of our own, {s3.endpoint_url}, serves the digits as {bucket}/digits/{{train,test}}/<digit>/*.png")
        where = [f"--data={bucket}/digits", f"--checkpoints={bucket}/run-1", f"--endpoint-url={s3.endpoint_url}"]
        command = [sys.executable, __file__, *where, "--size=8", *sys.argv[1:]]
        key, secret = s3.storage_options["key"], s3.storage_options["secret"]
        env = os.environ | {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}

        half = options.epochs // 2
        say(f"\n$ {shlex.join(command)}")
        with running(command, env) as process:
            whole = f"demo/run-1/epoch-{half:04d}.pt"
            while process.poll() is None and not any(path > whole for path in fs.find(f"{bucket}/run-1", refresh=True)):
                time.sleep(0.05)
        if process.returncode != -signal.SIGKILL:
            sys.exit(process.returncode or "the training ended before it was killed")
        say("\nkilled in the middle of an epoch, as if the machine was taken away; the same command again:")
        with running(command, env) as process:
            if process.wait():
                sys.exit(process.returncode)
        newest = load_checkpoint(f"{bucket}/run-1/epoch-{options.epochs:04d}.pt", filesystem=fs)
    _, accuracy = newest["history"]["epochs"][-1]
    if accuracy < GOAL:
        sys.exit(f"a test accuracy of {accuracy:.1%} misses the goal of {GOAL:.0%}")
    say(f"a test accuracy of {accuracy:.1%} meets the goal of {GOAL:.0%}")


@contextlib.contextmanager
def running(command: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command. If it still runs at the block's end, it is killed at once with its DataLoader workers."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C waits until there is something to kill
    process = subprocess.Popen(command, env=env, process_group=0)  # noqa: S603 this file
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def digits(prefix: str) -> dict[str, bytes]:
    """scikit-learn's scans of handwritten digits as PNG files in class folders, every fifth of a digit for testing."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    files: dict[str, bytes] = {}
    count = [0] * 10
    for pixels, digit in zip(scans.images, scans.target, strict=True):
        png = io.BytesIO()
        Image.fromarray((pixels * (255 / 16)).astype(np.uint8)).save(png, "png")  # 8 x 8, from 0 (paper) to 16 (ink)
        part = "test" if count[digit] % 5 == 4 else "train"
        files[f"{prefix}/{part}/{digit}/{count[digit]:03d}.png"] = png.getvalue()
        count[digit] += 1
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="URI", help="images in class folders")
    parser.add_argument("--checkpoints", metavar="URI", help="where the checkpoints are, and go")
    parser.add_argument("--endpoint-url", metavar="URL", help="of an S3 that isn't AWS")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--size", type=int, default=64, help="pixels of a side that your images are scaled to")
    options = parser.parse_args()
    if (options.data is None) != (options.checkpoints is None):
        parser.error("--data and --checkpoints go together")
    if options.endpoint_url and not options.data:
        parser.error("--endpoint-url goes with --data and --checkpoints")
    if options.epochs < (least := 1 if options.data else 2):
        parser.error(f"--epochs: at least {least}")
    try:
        train(options) if options.data else demo(options)
    except S3Error as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        say("\nstopped")
        sys.exit(130)


if __name__ == "__main__":
    main()
