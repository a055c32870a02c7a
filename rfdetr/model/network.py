"""The detector network: backbone, query transformer, heads (model specification, sections 2-6)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfdetr.config import ModelConfig
from rfdetr.data.batch import NestedTensor
from rfdetr.errors import ConfigError, InputError
from rfdetr.model.backbone import Backbone, WindowedEncoder
from rfdetr.model.boxes import apply_box_delta
from rfdetr.model.decoder import Transformer, TransformerOutput
from rfdetr.model.segmentation import SegmentationHead, SparseMasks, dense_masks
from rfdetr.model.selection import MLP
from rfdetr.training.allocator import keep_freed_memory

_PRIOR = 0.01  # initial score of every class


class RFDETRNetwork(nn.Module):
    """RF-DETR. Parameter names are those of legacy files, below the encoder those of timm.

    `forward` returns pred_logits (B, Q', K), pred_boxes (B, Q', 4) cxcywh relative to the input,
    pred_masks for segmentation models, and the same for earlier layers (`aux_outputs`) and for
    the selected cells (`enc_outputs`). Q' is num_queries in eval mode and group_detr times that
    in training mode. Masks are dense logits (B, Q, H/4, W/4) in eval mode and a dict of
    spatial_features, query_features and bias in training mode.
    """

    def __init__(self, config: ModelConfig, *, initialise: bool = True) -> None:
        super().__init__()
        width, outputs = config.hidden_dim, config.num_classes + 1
        total = config.num_queries * config.group_detr
        self.config = config
        self.num_queries = config.num_queries
        self.group_detr = config.group_detr
        self.transformer = Transformer(config)
        self.class_embed = nn.Linear(width, outputs)
        self.bbox_embed = MLP(width, width, width, 4)
        self.segmentation_head = SegmentationHead(config) if config.segmentation_head else None
        self.refpoint_embed = nn.Embedding(total, 4)
        self.query_feat = nn.Embedding(total, width)
        self.backbone = nn.ModuleList([Backbone(config)])
        if initialise:
            self._initialise()

    @property
    def encoder(self) -> WindowedEncoder:
        """The image encoder."""
        backbone = self.backbone[0]
        assert isinstance(backbone, Backbone)
        return backbone.encoder

    def forward(self, samples: Tensor | NestedTensor, targets: Any = None) -> dict[str, Any]:
        """Predict for images (B, 3, H, W), normalised; `targets` are accepted and not used.

        Raises InputError when H or W is not a multiple of patch_size * num_windows.
        """
        del targets
        images, mask = (samples, None) if isinstance(samples, Tensor) else samples.decompose()
        if isinstance(samples, NestedTensor) and not samples.padded:
            mask = None
        if mask is not None and mask.shape != (images.shape[0], *images.shape[2:]):
            raise InputError(
                f"The mask {tuple(mask.shape)} does not fit the images {tuple(images.shape)}; "
                "it must be (batch, height, width)."
            )
        levels = self.backbone[0](images)
        masks = None if mask is None else [_resize_mask(mask, level) for level in levels]
        groups = self.group_detr if self.training else 1
        rows = groups * self.num_queries
        learned = (self.refpoint_embed.weight[:rows], self.query_feat.weight[:rows])
        decoded: TransformerOutput = self.transformer(levels, masks, learned, groups)
        size = (int(images.shape[2]), int(images.shape[3]))
        return self._outputs(decoded, self._masks(decoded, levels[0], size))

    def set_drop_path(self, rates: Sequence[float]) -> None:
        """Set the drop path rate of every encoder block; raises ConfigError on a wrong count."""
        self.encoder.set_drop_path(rates)

    def fix_resolution(self, height: int, width: int) -> None:
        """Resample the position table once, for images of this size; for a copy to export."""
        self.encoder.fix_table(height, width)

    @torch.no_grad()
    def resize_head(self, num_outputs: int) -> None:
        """Give every class head `num_outputs` rows: repeated from the start, or cut off.

        Model specification, section 10.
        """
        if num_outputs < 1:
            raise ConfigError(f"A class head needs at least one row; got {num_outputs}.")
        self.class_embed = resize_linear(self.class_embed, num_outputs)
        heads = self.transformer.enc_out_class_embed
        for group, head in enumerate(heads):
            assert isinstance(head, nn.Linear)
            heads[group] = resize_linear(head, num_outputs)

    def _initialise(self) -> None:
        """Initial weights of model specification, section 9."""
        self.transformer.initialise()
        nn.init.constant_(self.class_embed.bias, -math.log((1 - _PRIOR) / _PRIOR))
        last = self.bbox_embed.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        nn.init.zeros_(self.refpoint_embed.weight)
        for group in range(self.group_detr):
            self.transformer.enc_out_class_embed[group] = copy.deepcopy(self.class_embed)
            self.transformer.enc_out_bbox_embed[group] = copy.deepcopy(self.bbox_embed)

    def _masks(
        self, decoded: TransformerOutput, level: Tensor, size: tuple[int, int]
    ) -> list[Tensor | SparseMasks] | None:
        """Masks of every decoder layer, then of the selected cells."""
        if self.segmentation_head is None:
            return None
        layers, encoder = self.segmentation_head(
            level, decoded.hidden, decoded.selection.memory, size
        )
        features: list[SparseMasks] = [*layers, encoder]
        if self.training:
            return list(features)
        return [dense_masks(feature) for feature in features]

    def _outputs(
        self, decoded: TransformerOutput, masks: list[Tensor | SparseMasks] | None
    ) -> dict[str, Any]:
        parts: list[dict[str, Any]] = []
        for state in decoded.hidden:
            boxes = apply_box_delta(self.bbox_embed(state), decoded.reference)
            parts.append({"pred_logits": self.class_embed(state), "pred_boxes": boxes})
        chosen = decoded.selection
        parts.append({"pred_logits": chosen.logits, "pred_boxes": chosen.boxes})
        if masks is not None:
            for part, mask in zip(parts, masks, strict=True):
                part["pred_masks"] = mask
        *layers, encoder = parts
        return {**layers[-1], "aux_outputs": layers[:-1], "enc_outputs": encoder}


def build_network(config: ModelConfig, *, initialise: bool = True) -> RFDETRNetwork:
    """A network with random initial weights; nothing is downloaded.

    `initialise=False` leaves out what only initial values need, for weights that are loaded next.
    A network that will run keeps freed memory in the process (`keep_freed_memory`).
    """
    if initialise:
        keep_freed_memory()
    return RFDETRNetwork(config, initialise=initialise)


def resize_linear(layer: nn.Linear, rows: int) -> nn.Linear:
    """A layer with `rows` outputs whose rows repeat those of `layer` from the start."""
    index = torch.arange(rows, device=layer.weight.device) % layer.out_features
    resized = nn.Linear(layer.in_features, rows, device="meta").to_empty(device=layer.weight.device)
    resized = resized.to(layer.weight.dtype)
    with torch.no_grad():
        resized.weight.copy_(layer.weight[index])
        resized.bias.copy_(layer.bias[index])
    return resized.requires_grad_(layer.weight.requires_grad)


def _resize_mask(mask: Tensor, level: Tensor) -> Tensor:
    """Nearest resampling of a (B, H, W) mask to the size of a level."""
    resized = F.interpolate(mask[:, None].to(torch.float32), level.shape[-2:], mode="nearest")
    return resized[:, 0] > 0.5
