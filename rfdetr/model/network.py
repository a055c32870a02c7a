"""The detector network: backbone, query transformer, heads. See docs/model.md."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfdetr.config import ModelConfig
from rfdetr.data.batch import NestedTensor
from rfdetr.errors import ConfigError, InputError
from rfdetr.model.backbone import Backbone, WindowedEncoder
from rfdetr.model.boxes import apply_box_delta
from rfdetr.model.cuda_graphs import CudaGraphs
from rfdetr.model.decoder import Transformer, TransformerOutput
from rfdetr.model.feedforward import MLP
from rfdetr.model.precision import call_with_cast_weights
from rfdetr.model.segmentation import SegmentationHead, dense_masks
from rfdetr.model.types import LayerOutputs, Masks, Outputs, SparseMasks

_PRIOR = 0.01  # initial score of every class (RetinaNet, Lin et al., ICCV 2017)


class RFDETRNetwork(nn.Module):
    """RF-DETR (Robinson et al., 2025). Parameters have the names of published weight files,
    except in the encoder, which has timm's.

    In training mode all `group_detr` groups of `num_queries` queries are predicted and masks stay
    factored; in eval mode only the first group is, with dense masks.
    """

    def __init__(self, config: ModelConfig, *, initialise: bool = True) -> None:
        super().__init__()
        C, K = config.hidden_dim, config.num_classes + 1
        total = config.num_queries * config.group_detr
        self.config = config
        self.graphs = CudaGraphs()
        self.num_queries = config.num_queries
        self.group_detr = config.group_detr
        self.transformer = Transformer(config)
        self.class_embed = nn.Linear(C, K)
        self.bbox_embed = MLP(C, C, C, 4)
        self.segmentation_head = SegmentationHead(config) if config.segmentation_head else None
        self.refpoint_embed = nn.Embedding(total, 4)
        self.query_feat = nn.Embedding(total, C)
        self.backbone = nn.ModuleList([Backbone(config)])
        if initialise:
            self._initialise()

    @property
    def encoder(self) -> WindowedEncoder:
        """The image encoder."""
        backbone = self.backbone[0]
        assert isinstance(backbone, Backbone)
        return backbone.encoder

    def forward(self, samples: Tensor | NestedTensor, targets: object = None) -> Outputs:
        """Predict for normalised images (B, 3, H, W); `targets` is accepted and not used.

        Logits are (B, Q, K), boxes (B, Q, 4) cxcywh as fractions of the padded input, masks have
        H/4 x W/4 pixels. Raises InputError for images or a mask that do not fit.
        """
        del targets
        images, mask = (
            (samples, None) if isinstance(samples, Tensor) else samples.normalised().decompose()
        )
        if isinstance(samples, NestedTensor) and not samples.padded:
            mask = None
        if mask is not None and mask.shape != (images.shape[0], *images.shape[2:]):
            raise InputError(
                f"The mask {tuple(mask.shape)} does not fit the images {tuple(images.shape)}; "
                "it must be (batch, height, width)."
            )
        return self.graphs.run(self, images, mask)

    def compute(self, images: Tensor, mask: Tensor | None) -> Outputs:
        """Outputs for images and a mask that fit, without CUDA graphs."""
        srcs = self.backbone[0](images)  # per level (B, C, h, w)
        masks = None if mask is None else [_resize_mask(mask, src) for src in srcs]
        num_groups = self.group_detr if self.training else 1
        rows = num_groups * self.num_queries
        decoded: TransformerOutput = call_with_cast_weights(
            self.transformer,
            srcs,
            masks,
            self.refpoint_embed.weight[:rows],
            self.query_feat.weight[:rows],
            num_groups,
        )
        image_size = (int(images.shape[2]), int(images.shape[3]))
        return self._outputs(decoded, self._masks(decoded, srcs[0], image_size))

    def set_drop_path(self, rates: Sequence[float]) -> None:
        """Set the drop path rate of every encoder block; raises ConfigError on a wrong count."""
        self.encoder.set_drop_path(rates)

    def fix_resolution(self, height: int, width: int) -> None:
        """Resample the position embeddings once, for images of this size; for an exported copy."""
        self.encoder.fix_resolution(height, width)

    @torch.no_grad()
    def resize_head(self, num_outputs: int) -> None:
        """Give every class head `num_outputs` rows: truncated, or repeated from the start."""
        if num_outputs < 1:
            raise ConfigError(f"A class head needs at least one row; got {num_outputs}.")
        self.class_embed = resize_linear(self.class_embed, num_outputs)
        heads = self.transformer.selection.enc_out_class_embed
        for group, head in enumerate(heads):
            assert isinstance(head, nn.Linear)
            heads[group] = resize_linear(head, num_outputs)

    def _initialise(self) -> None:
        """Initial weights of everything but the backbone. See docs/model.md, "Initialisation"."""
        self.transformer.initialise()
        nn.init.constant_(self.class_embed.bias, -math.log((1 - _PRIOR) / _PRIOR))
        last = self.bbox_embed.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        nn.init.zeros_(self.refpoint_embed.weight)
        selection = self.transformer.selection
        for group in range(self.group_detr):
            selection.enc_out_class_embed[group] = copy.deepcopy(self.class_embed)
            selection.enc_out_bbox_embed[group] = copy.deepcopy(self.bbox_embed)

    def _masks(
        self, decoded: TransformerOutput, src: Tensor, image_size: tuple[int, int]
    ) -> Sequence[Masks] | None:
        """Masks of every decoder layer, then of the selected tokens."""
        if self.segmentation_head is None:
            return None
        masks: list[SparseMasks] = call_with_cast_weights(
            self.segmentation_head,
            src,
            decoded.hidden_states,
            decoded.selection.memory,
            image_size,
        )
        return masks if self.training else [dense_masks(m) for m in masks]

    def _outputs(self, decoded: TransformerOutput, masks: Sequence[Masks] | None) -> Outputs:
        hidden_states = decoded.hidden_states
        if self.training:  # at once; an exported graph needs the last layer's heads only
            logits, boxes = self._heads(torch.stack(hidden_states), decoded.reference_points)
            heads = list(zip(logits, boxes, strict=True))
        else:
            heads = [self._heads(hidden, decoded.reference_points) for hidden in hidden_states]
        layers: list[LayerOutputs] = [
            {"pred_logits": layer_logits, "pred_boxes": layer_boxes}
            for layer_logits, layer_boxes in heads
        ]
        selection = decoded.selection
        layers.append({"pred_logits": selection.logits, "pred_boxes": selection.boxes})
        if masks is not None:
            for layer, mask in zip(layers, masks, strict=True):
                layer["pred_masks"] = mask
        *aux, last, encoder = layers
        return {**last, "aux_outputs": aux, "enc_outputs": encoder}

    def _heads(self, hidden: Tensor, reference_points: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (..., B, Q, K) and boxes (..., B, Q, 4) of hidden states (..., B, Q, C)."""
        logits: Tensor = call_with_cast_weights(self.class_embed, hidden)
        delta: Tensor = call_with_cast_weights(self.bbox_embed, hidden)
        return logits, apply_box_delta(delta, reference_points)


def build_network(config: ModelConfig, *, initialise: bool = True) -> RFDETRNetwork:
    """A network with random initial weights; nothing is downloaded.

    `initialise=False` skips the initial values of the transformer and the heads, for a network
    whose weights are loaded next.
    """
    return RFDETRNetwork(config, initialise=initialise)


def resize_linear(layer: nn.Linear, out_features: int) -> nn.Linear:
    """A layer with `out_features` rows that repeat those of `layer` from the start."""
    device = layer.weight.device
    index = torch.arange(out_features, device=device) % layer.out_features
    resized = nn.Linear(layer.in_features, out_features, device="meta").to_empty(device=device)
    resized = resized.to(layer.weight.dtype)
    with torch.no_grad():
        resized.weight.copy_(layer.weight[index])
        resized.bias.copy_(layer.bias[index])
    return resized.requires_grad_(layer.weight.requires_grad)


def _resize_mask(mask: Tensor, src: Tensor) -> Tensor:
    """Nearest resampling of a padding mask (B, H, W) to the size of a level: (B, h, w)."""
    resized = F.interpolate(mask[:, None].to(torch.float32), src.shape[-2:], mode="nearest")
    return resized[:, 0] > 0.5
