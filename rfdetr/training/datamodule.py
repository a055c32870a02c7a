"""The datasets and loaders of a run."""

from __future__ import annotations

import functools
import logging
import os
import random
import secrets
import warnings
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data.distributed import DistributedSampler

from rfdetr.config import ModelConfig, TrainConfig
from rfdetr.data.augment import Augmentation
from rfdetr.data.batch import collate
from rfdetr.data.coco import CocoSplits
from rfdetr.data.dataset import DetectionDataset
from rfdetr.data.layouts import detect_layout
from rfdetr.data.ledger import SplitLedger
from rfdetr.data.levels import dataset_levels
from rfdetr.data.sampler import EpochSampler, ResumableLoader
from rfdetr.data.spawn import safe_workers, workers_of_share
from rfdetr.data.transforms import EvalTransform, TrainTransform
from rfdetr.data.yolo import YoloSplits
from rfdetr.errors import ConfigError, DatasetError
from rfdetr.training.multi_scale import multi_scale_sizes
from rfdetr.training.split_checks import check_classes, check_names, check_objects

log = logging.getLogger(__name__)

STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
NAMED_FIRST = ("train", "val", "test")


class RFDETRDataModule(pl.LightningDataModule):
    """Datasets and loaders for a model and a training configuration.

    A split is read when it is first needed and then kept; this neither uses nor changes global
    random state and writes nothing. Reading the training split sets `grey_levels` of the model
    configuration if it is None and there are 16-bit or float images. `ledgers` says for each split
    what became of every file and annotation; it is logged when the split is read. There is no
    predict loader: pass one to `trainer.predict`. Raises DatasetError that lists what is wrong with
    a split, and ConfigError if the data has another number of classes than `class_names`.
    """

    def __init__(self, model_config: ModelConfig, train_config: TrainConfig) -> None:
        super().__init__()
        self.model_config = model_config
        self.train_config = train_config
        self.order_seed = train_config.seed if train_config.seed is not None else _free_seed()
        self._datasets: dict[str, DetectionDataset] = {}
        self.ledgers: dict[str, SplitLedger] = {}
        self._splits: CocoSplits | YoloSplits | None = None

    def setup(self, stage: str | None = None) -> None:
        """Build the missing splits of "fit", "validate" or "test"."""
        for name in STAGES.get(stage or "", ()):
            self._dataset(name)

    @property
    def class_names(self) -> list[str] | None:
        """Names in label order, from the first available split; None before `setup`."""
        first = next((self._datasets[n] for n in NAMED_FIRST if n in self._datasets), None)
        return None if first is None else first.class_names

    @property
    def num_classes(self) -> int | None:
        """The minimum of `ModelConfig.num_classes` for this data; None before `setup`."""
        first = next((self._datasets[n] for n in NAMED_FIRST if n in self._datasets), None)
        return None if first is None else first.num_classes

    @property
    def batch_size(self) -> int:
        """`TrainConfig.batch_size`, which Lightning's tuner may change."""
        return self.train_config.batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        self.train_config.batch_size = value

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled, with random views; an epoch has at least five accumulation windows."""
        if self.train_config.auto_batch_size:
            raise ConfigError(
                "batch_size='auto' is settled by build_trainer: give it the TrainConfig of this "
                "data module before training."
            )
        dataset = self._dataset("train")
        replicas, rank = self._processes()
        sampler = EpochSampler(
            dataset,
            batch_size=self.train_config.batch_size,
            window=self._window(),
            seed=self._common_seed(),
            replicas=replicas,
            rank=rank,
        )
        if sampler.repeated:
            log.info(
                "The training split has %d images; an epoch repeats them to %d, which is five "
                "windows of batch_size x grad_accum_steps%s.",
                len(dataset),
                sampler.total_size,
                " x processes" if replicas > 1 else "",
            )
        return ResumableLoader(dataset, sampler=sampler, drop_last=True, **self._loading(dataset))

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation split in order."""
        return self._in_order(self._dataset("val"))

    def test_dataloader(self) -> DataLoader[Any]:
        """The test split in order, or the validation split if there is no test split."""
        return self._in_order(self._dataset("test"))

    def train_dataloader_in_order(self) -> DataLoader[Any]:
        """The training split in order, with images as in evaluation: to score its labels."""
        index, masks = self._dataset("train").index, self.model_config.segmentation_head
        return self._in_order(DetectionDataset(index, self._eval_transform(), masks=masks))

    def state_dict(self) -> dict[str, Any]:
        """The seed of order and augmentation, which a resumed run keeps."""
        return {"order_seed": self.order_seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Use the seed of the resumed run, unless the configuration sets one."""
        if self.train_config.seed is None:
            self._use_seed(int(state_dict["order_seed"]))

    def _use_seed(self, seed: int) -> None:
        self.order_seed = seed
        for dataset in self._datasets.values():
            dataset.seed = seed

    def _common_seed(self) -> int:
        """The seed of rank 0, in every process: all ranks shuffle alike."""
        if self.trainer is not None:
            self._use_seed(int(self.trainer.strategy.broadcast(self.order_seed)))
        return self.order_seed

    def _window(self) -> int:
        """Micro-batches per optimizer step."""
        if self.trainer is not None:
            return self.trainer.accumulate_grad_batches
        return self.train_config.grad_accum_steps

    def _processes(self) -> tuple[int, int]:
        """(number of processes, own rank)."""
        if self.trainer is not None:
            return self.trainer.world_size, self.trainer.global_rank
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_world_size(), distributed.get_rank()
        return 1, 0

    def _dataset(self, name: str) -> DetectionDataset:
        if name not in self._datasets:
            self._datasets[name] = self._build(name)
        return self._datasets[name]

    def _build(self, name: str) -> DetectionDataset:
        splits = self._source()
        if name == "test" and "test" not in splits.layout.splits:
            silent = splits.layout.kind == "coco"  # its test split has no annotations by design
            return self._val_as_test("" if silent else "no test split")
        index = splits.index(name)
        if name == "test" and not len(index):
            return self._val_as_test("a test split without images")
        if len(index) == 0:
            raise DatasetError(f"{splits.layout.root}: the {name!r} split has no images.")
        self.ledgers[name] = index.ledger
        log.info("%s, %s: %s.", splits.layout.root, name, index.ledger)
        check_objects(splits.layout.root, name, index, self.model_config)
        if name == "train" and self.model_config.grey_levels is None:
            self.model_config.grey_levels = dataset_levels(index.paths())
        augment = self.train_config.aug_config if name == "train" else None
        augmentation = Augmentation(augment) if augment else None
        dataset = DetectionDataset(
            index,
            self._train_transform() if name == "train" else self._eval_transform(),
            masks=self.model_config.segmentation_head,
            augmentation=augmentation,
            seed=self.order_seed,
            levels=self.model_config.grey_levels,
        )
        check_names(dataset, self.train_config)
        return dataset

    def _val_as_test(self, cause: str) -> DetectionDataset:
        if cause:
            warnings.warn(
                f"{self._source().layout.root} has {cause}; testing uses the validation split.",
                stacklevel=4,
            )
        return self._dataset("val")

    def _source(self) -> CocoSplits | YoloSplits:
        if self._splits is None:
            config, masks = self.train_config, self.model_config.segmentation_head
            layout = detect_layout(config.dataset_dir, config.dataset_file)
            kind = YoloSplits if layout.kind == "yolo" else CocoSplits
            self._splits = kind(layout, masks=masks)
        return self._splits

    def _train_transform(self) -> TrainTransform:
        config, model = self.train_config, self.model_config
        sizes = [model.resolution]
        if config.multi_scale:
            sizes = multi_scale_sizes(model.resolution, model.block_size, config.expanded_scales)
            if not config.do_random_resize_via_padding:
                sizes = sizes[-1:]
        mirror = config.aug_config is None
        return TrainTransform(sizes, square=config.square_resize_div_64, mirror=mirror)

    def _eval_transform(self) -> EvalTransform:
        square = self.train_config.square_resize_div_64
        return EvalTransform(self.model_config.resolution, square=square)

    def _in_order(self, dataset: DetectionDataset) -> DataLoader[Any]:
        replicas, rank = self._processes()
        sampler: DistributedSampler[Any] | None = None
        if replicas > 1:  # pads with repeats, which evaluation removes by image id
            sampler = DistributedSampler(dataset, replicas, rank, shuffle=False)
        loading = self._loading(dataset)
        loading["batch_size"] = self.train_config.eval_batch_size or loading["batch_size"]
        return DataLoader(dataset, sampler=sampler, **loading)

    def _loading(self, dataset: DetectionDataset) -> dict[str, Any]:
        """Arguments that all loaders share; None in the configuration means automatic."""
        check_classes(dataset, self.model_config)
        config = self.train_config
        workers = safe_workers(self._workers(len(dataset)))
        pin, persistent = config.pin_memory, config.persistent_workers
        return {
            "batch_size": config.batch_size,
            "num_workers": workers,
            "collate_fn": functools.partial(collate, block_size=self.model_config.block_size),
            "pin_memory": self._on_cuda() if pin is None else pin,
            "persistent_workers": workers > 0 if persistent is None else persistent and workers > 0,
            "prefetch_factor": (config.prefetch_factor or 2) if workers else None,
            "worker_init_fn": _seed_worker,
            "generator": torch.Generator().manual_seed(self.order_seed),
        }

    def _workers(self, images: int) -> int:
        """Loader processes; "auto" shares the cores among the trainings on this machine."""
        config = self.train_config
        if config.num_workers != "auto":
            return config.num_workers
        trainings = 1 if self.trainer is None else self.trainer.num_devices
        return workers_of_share(trainings, -(-images // config.batch_size))

    def _on_cuda(self) -> bool:
        if self.trainer is not None:
            return self.trainer.strategy.root_device.type == "cuda"
        return self.train_config.accelerator in ("auto", "gpu", "cuda") and (
            torch.cuda.is_available()
        )


def _free_seed() -> int:
    """Lightning's seed if one was set, else a random one; global generators stay untouched."""
    given = os.environ.get("PL_GLOBAL_SEED", "")
    return int(given) if given.isdigit() else secrets.randbits(31)


def _seed_worker(_worker: int) -> None:
    """Seed the global generators of Python and NumPy, differently in every worker."""
    info = get_worker_info()
    assert info is not None
    random.seed(info.seed)
    np.random.seed(info.seed % 2**32)  # noqa: NPY002 - user transforms may use it
