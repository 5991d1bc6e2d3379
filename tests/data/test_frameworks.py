"""Loops that others write: Lightning's Trainer, and Accelerate."""

import itertools
import json
from collections import Counter

import pytest
import torch
import torch.multiprocessing
from pictures import BATCH, COUNT, EACH_ONCE, at_least_once, number_of
from torch.utils.data import DataLoader

from torch_s3 import S3ImageDataset

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


def test_lightning_trains_an_epoch(dataset):
    import lightning

    seen = []

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def on_train_epoch_start(self):
            train.set_epoch(self.current_epoch)

        def training_step(self, batch, _):
            seen.extend(batch.tolist())
            return self.layer(batch[:, None].float()).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters())

    train = dataset(labels=None, transform=number_of, shuffle=True, batch_size=BATCH)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", devices=1, **quiet)
    trainer.fit(Model(), DataLoader(train, batch_size=BATCH, num_workers=2))

    assert trainer.global_step == 12
    assert Counter(seen[:COUNT]) == Counter(seen[COUNT:]) == EACH_ONCE
    assert seen[:COUNT] != seen[COUNT:]


def accelerated(rank, port, images, options, results):
    import os

    from accelerate import Accelerator

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    accelerator = Accelerator(cpu=True)

    def loader(**ranks):
        train = S3ImageDataset(
            images, labels=None, transform=number_of, shuffle=True, batch_size=BATCH, storage_options=options, **ranks
        )
        return DataLoader(train, batch_size=BATCH)

    own = [batch.tolist() for batch in loader()]
    model = accelerator.prepare(torch.nn.Linear(1, 1))
    for batch in loader():
        accelerator.backward(model(batch[:, None].float()).mean())
    prepared = [batch.tolist() for batch in accelerator.prepare(loader(rank=0, world_size=1))]
    (results / str(rank)).write_text(json.dumps([own, prepared]))
    torch.distributed.destroy_process_group()


def test_accelerate_on_two_ranks(images, s3, tmp_path):
    """Its loader is left as it is, or is told that there is one rank, for Accelerate to deal the batches."""
    from torch.distributed.elastic.utils.distributed import get_free_port

    arguments = (get_free_port(), images, s3.storage_options, tmp_path)
    torch.multiprocessing.spawn(accelerated, args=arguments, nprocs=2)
    own, prepared = zip(*[json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)], strict=True)

    assert [len(batches) for batches in own] == [3, 3]
    assert at_least_once(Counter(itertools.chain(*own[0], *own[1])), 2)
    seen = Counter(itertools.chain(*prepared[0], *prepared[1]))
    assert set(seen) == set(EACH_ONCE)
    assert len(prepared[0]) == len(prepared[1]) == 3
