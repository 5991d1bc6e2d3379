"""Training runs that are killed, and go on from their checkpoints as if they had not been."""

import copy
import logging
import os
import signal
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch
from processes import in_new_process
from torch import nn

from torch_s3 import CheckpointManager, S3FileSystem, register

STEPS, KILLED_AT = 8, 5


@pytest.fixture
def environment(s3, monkeypatch):
    """What finds `s3` without options."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint_url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.storage_options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.storage_options["secret"])
    monkeypatch.setenv("AWS_REGION", "us-east-1")


def _batch(step):
    return torch.rand(4, 3, generator=torch.Generator().manual_seed(step))


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _assert_equal(one, other):
    assert all(map(torch.equal, one.values(), other.values()))


# ---------------------------------------------------------------------- plain loops, Accelerate


def _train_plain(root, killed_at=None):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    with CheckpointManager(root, keep_last=2) as run:
        start = 0
        if run.latest() is not None:
            start, state, _, _ = run.load(map_location="cpu")
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        for step in range(start + 1, STEPS + 1):
            optimizer.zero_grad()
            model(_batch(step)).square().mean().backward()
            optimizer.step()
            if step == killed_at:
                _die()
            run.save_async(step, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    return model.state_dict(), start


def test_plain_loop_goes_on_after_a_kill(bucket, environment):
    with pytest.raises(BrokenProcessPool):
        in_new_process(_train_plain, f"{bucket}/run", KILLED_AT)
    resumed, start = _train_plain(f"{bucket}/run")
    wanted, _ = _train_plain(f"{bucket}/other")

    assert KILLED_AT - 2 <= start < KILLED_AT
    _assert_equal(resumed, wanted)


def _train_with_accelerate(root, killed_at=None):
    from accelerate import Accelerator

    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model, optimizer = nn.Linear(3, 1), None
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    run = CheckpointManager(root)
    start = 0
    if run.latest() is not None:
        start, state, _, _ = run.load(map_location="cpu")
        accelerator.unwrap_model(model).load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for step in range(start + 1, STEPS + 1):
        optimizer.zero_grad()
        accelerator.backward(model(_batch(step)).square().mean())
        optimizer.step()
        if step == killed_at:
            _die()
        if accelerator.is_main_process:
            state = {"model": accelerator.get_state_dict(model), "optimizer": optimizer.state_dict()}
            run.save(step, state)
    return copy.deepcopy(accelerator.get_state_dict(model)), start


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_accelerate_goes_on_after_a_kill(bucket, environment):
    pytest.importorskip("accelerate")
    with pytest.raises(BrokenProcessPool):
        in_new_process(_train_with_accelerate, f"{bucket}/run", KILLED_AT)
    resumed, start = _train_with_accelerate(f"{bucket}/run")
    wanted, _ = _train_with_accelerate(f"{bucket}/other")

    assert start == KILLED_AT - 1
    _assert_equal(resumed, wanted)


# ---------------------------------------------------------------------- Lightning


def _train_with_lightning(root, killed_at=None):
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint

    from torch_s3.checkpoint.lightning import S3CheckpointIO

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def training_step(self, batch, number):
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    class Killed(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == killed_at:
                _die()

    register()
    torch.manual_seed(0)
    keep = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_last=True, save_top_k=1)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=root, plugins=[S3CheckpointIO()], callbacks=[Killed(), keep],
    )  # fmt: skip
    module = Module()
    first = []
    module.on_train_batch_start = lambda batch, number: first.append(trainer.global_step)
    # Lightning begins the loader anew within an epoch, so all batches are alike here.
    batches = torch.utils.data.DataLoader([_batch(0)[0]] * STEPS, batch_size=1)
    last = f"{root}/last.ckpt"  # ckpt_path="last" looks on the local disk alone
    trainer.fit(module, batches, ckpt_path=last if S3FileSystem().exists(last) else None)
    return module.state_dict(), first[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore:.*:lightning.pytorch.utilities.warnings.PossibleUserWarning")
def test_lightning_goes_on_after_a_kill(bucket, environment, registered):
    pytest.importorskip("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with pytest.raises(BrokenProcessPool):
        in_new_process(_train_with_lightning, f"{bucket}/run", KILLED_AT)
    assert any(name.endswith("last.ckpt") for name in S3FileSystem().find(f"{bucket}/run"))
    resumed, start = _train_with_lightning(f"{bucket}/run")
    wanted, _ = _train_with_lightning(f"{bucket}/other")

    assert KILLED_AT - 1 <= start <= KILLED_AT
    _assert_equal(resumed, wanted)
    assert len(S3FileSystem().find(f"{bucket}/run")) == 2  # the last, and the best
