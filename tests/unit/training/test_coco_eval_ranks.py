"""COCOEvalCallback on two processes gives the numbers of one."""

from __future__ import annotations

import os
import socket
import warnings

import torch

from rfdetr.evaluation.evaluator import CocoEvaluator
from rfdetr.training.callbacks.coco_eval import COCOEvalCallback
from rfdetr.training.callbacks.ema import RFDETREMACallback
from tests.unit.training.replay import ReplayModule, make_job, make_loader, make_trainer, numbers


def test_ranks_agree_with_one_process(tmp_path):
    """Seven images over two processes: the sampler repeats one, which must count once."""
    _, _, pairs = make_job(4, images=7)
    single = make_trainer(RFDETREMACallback(tau=0), COCOEvalCallback(plots=False), max_epochs=1)
    loader = make_loader(pairs, batch_size=2)
    module = ReplayModule(pairs, speed=0.0)
    single.fit(module, loader, loader)
    single.test(module, loader, verbose=False)
    expected = numbers(single)
    worker = RanksWorker(tmp_path, pairs)
    torch.multiprocessing.spawn(worker, args=(2, free_port()), nprocs=2)
    for rank in range(2):
        found, texts, computed = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert {k: v for k, v in found.items() if "/" in k} == expected
        assert computed == (4 if rank == 0 else 0)  # live and EMA, validation and test
        assert not [text for text in texts if "sync_dist" in text]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class RanksWorker:
    def __init__(self, folder, pairs):
        self.folder, self.pairs = folder, pairs

    def __call__(self, rank, world, port):
        torch.set_num_threads(1)
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "TORCHELASTIC_RUN_ID": "test",
        }
        computed = []
        compute = CocoEvaluator.compute

        def counted(self, *args):
            computed.append(self)
            return compute(self, *args)

        CocoEvaluator.compute = counted
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = make_trainer(
                RFDETREMACallback(tau=0),
                COCOEvalCallback(plots=False),
                max_epochs=1,
                strategy="ddp",
                devices=world,
            )
            loader = make_loader(self.pairs, batch_size=2)
            module = ReplayModule(self.pairs, speed=0.0)
            trainer.fit(module, loader, loader)
            trainer.test(module, loader, verbose=False)
        texts = [str(warning.message) for warning in caught]
        torch.save((numbers(trainer), texts, len(computed)), self.folder / f"{rank}.pt")
