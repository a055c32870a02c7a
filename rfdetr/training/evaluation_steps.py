"""Validation, test and prediction steps of the LightningModule."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from rfdetr.config import TrainConfig
from rfdetr.data.batch import NestedTensor
from rfdetr.model.criterion import SetCriterion
from rfdetr.model.network import RFDETRNetwork
from rfdetr.model.postprocess import PostProcess, image_masks
from rfdetr.model.types import HostDetections
from rfdetr.training.callbacks.ema import only_ema
from rfdetr.training.lightning_adapter import attached_trainer

Batch = tuple[NestedTensor, Sequence[dict[str, Any]]]


class EvaluationSteps(pl.LightningModule):
    """The steps without gradients; RFDETRModule provides network, losses and post-processing."""

    model: RFDETRNetwork
    criterion: SetCriterion
    postprocess: PostProcess
    train_config: TrainConfig

    def validation_step(
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Any]:
        """{"results", "targets"} of one batch for COCOEvalCallback; logs val/loss.

        Only the first of several loaders is evaluated.
        """
        with_loss = self.train_config.compute_val_loss and dataloader_idx == 0
        return self._evaluate(batch, "val", with_loss)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """As `validation_step`, under test/."""
        with_loss = self.train_config.compute_test_loss and dataloader_idx == 0
        return self._evaluate(batch, "test", with_loss)

    def predict_step(
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> list[dict[str, Tensor]]:
        """One dictionary per image: scores, labels, boxes (xyxy, original pixels), masks."""
        samples, targets = batch
        found: list[dict[str, Any]] = []
        for result, target in zip(
            self.detect(self.evaluation_forward(self.model, samples), targets), targets, strict=True
        ):
            one: dict[str, Any] = {k: result[k] for k in ("scores", "labels", "boxes")}
            if "mask_logits" in result:
                height, width = target["orig_size"].reshape(2).tolist()
                one["masks"] = image_masks(result, height, width).cpu()
            found.append(one)
        return found

    def _evaluate(self, batch: Batch, stage: str, with_loss: bool) -> dict[str, Any]:
        samples, targets = batch
        trainer = attached_trainer(self)
        ema = only_ema(trainer, self) if trainer is not None and stage == "val" else None
        outputs = self.evaluation_forward(self.model if ema is None else ema, samples)
        if with_loss:
            loss = self._weighted(self.criterion(outputs, targets))
            self.log(
                f"{stage}/loss",
                loss,
                on_epoch=True,
                batch_size=len(targets),
                sync_dist=True,
                add_dataloader_idx=False,
            )
        return {"results": self.detect(outputs, targets), "targets": targets}

    def evaluation_forward(self, network: nn.Module, samples: Any) -> dict[str, Any]:
        """Outputs of `network` (live or EMA) in the precision of evaluation."""
        half = self.train_config.fp16_eval and self.device.type == "cuda"
        context: contextlib.AbstractContextManager[Any] = (
            torch.autocast("cuda", torch.float16) if half else contextlib.nullcontext()
        )
        with torch.no_grad(), context:
            outputs: dict[str, Any] = network(samples)
        return outputs

    def detect(self, outputs: Any, targets: Sequence[dict[str, Any]]) -> list[HostDetections]:
        """Detections in original pixels of the images that `targets` describe, on the CPU.

        Masks stay logits of the network's size on its device: see `PostProcess.on_host`.
        """
        sizes = torch.stack([target["orig_size"].reshape(2) for target in targets])
        return self.postprocess.on_host(outputs, sizes)

    def _weighted(self, terms: dict[str, Tensor]) -> Tensor:
        weights = self.criterion.weight_dict
        return torch.stack([terms[name] * weights[name] for name in terms if name in weights]).sum()
