"""The configuration of a network."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from rfdetr import compat
from rfdetr.config.strict import PathText, Positive, Probability, StrictConfig, device_text

Encoder = Literal[
    "dinov2_windowed_small", "dinov2_windowed_base", "dinov2_registers_windowed_small"
]
Level = Literal["P3", "P4", "P5"]

# name -> (width, blocks, heads, register tokens)
ENCODER_SIZES: dict[str, tuple[int, int, int, int]] = {
    "dinov2_windowed_small": (384, 12, 6, 0),
    "dinov2_windowed_base": (768, 12, 12, 0),
    "dinov2_registers_windowed_small": (384, 12, 6, 4),
}

# A model that differs in one of these cannot load the published weights of its variant.
STRUCTURE_FIELDS = (
    "encoder",
    "encoder_dim",
    "encoder_depth",
    "encoder_heads",
    "out_feature_indexes",
    "patch_size",
    "projector_scale",
    "hidden_dim",
    "dec_layers",
    "sa_nheads",
    "ca_nheads",
    "dec_n_points",
    "dim_feedforward",
    "segmentation_head",
)

EncoderWidth = Annotated[int, Field(ge=8)]
DecoderWidth = Annotated[int, Field(ge=4)]
BlockIndexes = Annotated[list[int], Field(min_length=1)]
Levels = Annotated[list[Level], Field(min_length=1)]

DeviceText = Annotated[str, BeforeValidator(device_text)]


def _grid_side(values: dict[str, Any]) -> int:
    """Side of a position table with one entry per patch."""
    return int(values["resolution"] // values["patch_size"])


class ModelConfig(StrictConfig):
    """The network of one detector. Use a sized subclass, for example `RFDETRNanoConfig`.

    `num_classes` counts the classes without the extra output: heads have `num_classes + 1` rows.
    `encoder_dim`, `encoder_depth` and `encoder_heads` override the size of the named encoder.
    `positional_encoding_size` follows the resolution unless it is given; base models keep the
    37 x 37 table of DINOv2. `pretrain_weights` is a file, a published name, or None. If the
    download of a variant's default weights fails, training continues with random weights and warns.
    """

    variant: ClassVar[str] = ""
    not_offered: ClassVar[compat.Missing] = compat.MODEL_FIELDS

    encoder: Encoder = Field(description="Backbone")
    encoder_dim: EncoderWidth | None = Field(
        None, description="Backbone width, if not the encoder's"
    )
    encoder_depth: Positive | None = Field(
        None, description="Backbone blocks, if not the encoder's"
    )
    encoder_heads: Positive | None = Field(None, description="Backbone heads, if not the encoder's")
    out_feature_indexes: BlockIndexes = Field(description="Backbone blocks used, from 1")
    patch_size: Positive = Field(description="Patch side in pixels")
    num_windows: Positive = Field(description="Attention windows per image side")
    resolution: Positive = Field(description="Input side in pixels")
    positional_encoding_size: Positive = Field(
        default_factory=_grid_side, description="Side of the position table in patches"
    )
    projector_scale: Levels = Field(description="Feature levels of the projector")
    hidden_dim: DecoderWidth = Field(description="Width of the decoder")
    dec_layers: Positive = Field(description="Number of decoder layers")
    sa_nheads: Positive = Field(description="Heads of the decoder's self-attention")
    ca_nheads: Positive = Field(description="Heads of the decoder's cross-attention")
    dec_n_points: Positive = Field(description="Sampling points per head and level")
    num_queries: Positive = Field(300, description="Object queries")
    num_select: Positive = Field(300, description="Detections returned per image")
    group_detr: Positive = Field(13, description="Query groups in training (Group DETR)")
    num_classes: Positive = Field(90, description="Number of classes")
    num_channels: Literal[3] = Field(3, description="Colour channels of the input")
    dim_feedforward: Positive = Field(2048, description="Width of the decoder's MLP")
    two_stage: Literal[True] = Field(True, description="Queries from encoder proposals")
    bbox_reparam: Literal[True] = Field(True, description="Boxes relative to references")
    lite_refpoint_refine: Literal[True] = Field(True, description="Fixed reference boxes")
    layer_norm: Literal[True] = Field(True, description="Layer norm in the projector")
    ia_bce_loss: Literal[True] = Field(True, description="IoU-aware classification loss")
    segmentation_head: bool = Field(False, description="Predict instance masks")
    mask_downsample_ratio: Positive = Field(4, description="Input pixels per mask pixel")
    drop_path: Probability = Field(0.0, description="Stochastic depth rate of the backbone")
    pretrain_weights: PathText | None = Field(None, description="File, published name or null")
    device: DeviceText = Field("auto", description="Device of the detector")
    amp: bool = Field(True, description="Mixed precision in training")
    compile: bool = Field(False, description="Use torch.compile in training, layer by layer")
    fused_optimizer: bool = Field(True, description="Fused AdamW where available")
    freeze_encoder: bool = Field(False, description="Do not train the backbone")
    backbone_lora: bool = Field(False, description="Train DoRA adapters only")
    gradient_checkpointing: bool = Field(False, description="Recompute activations")
    grey_levels: tuple[float, float] | None = Field(
        None, description="Levels of 16-bit and float images that become 0 and 255"
    )
    license: str = Field("Apache-2.0", description="Licence of the weights")

    @model_validator(mode="before")
    @classmethod
    def _published_weights_need_their_structure(cls, data: Any) -> Any:
        """A changed structure starts without pretrained weights unless a file is named."""
        if not isinstance(data, dict) or "pretrain_weights" in data:
            return data
        default = {name: field.default for name, field in cls.model_fields.items()}
        changed = any(n in data and data[n] != default[n] for n in STRUCTURE_FIELDS)
        counts = ((data.get(n), default[n]) for n in ("num_queries", "group_detr"))
        larger = any(isinstance(given, int) and given > own for given, own in counts)
        return {**data, "pretrain_weights": None} if changed or larger else data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = [*self._size_problems(), *self._encoder_problems()]
        if problems:
            raise ValueError(f"{type(self).__name__}: " + " ".join(problems))
        return self

    def _size_problems(self) -> list[str]:
        problems = []
        block = self.block_size
        if self.resolution % block:
            low = max(block, self.resolution // block * block)
            problems.append(
                f"resolution {self.resolution} is not a multiple of patch_size * num_windows = "
                f"{block}; use {low} or {self.resolution // block * block + block}."
            )
        for name in ("sa_nheads", "ca_nheads"):
            if self.hidden_dim % getattr(self, name):
                problems.append(
                    f"hidden_dim {self.hidden_dim} is not a multiple of {name} "
                    f"{getattr(self, name)}."
                )
        if self.hidden_dim % 4:
            problems.append(f"hidden_dim {self.hidden_dim} is not a multiple of 4.")
        if sorted(set(self.projector_scale)) != self.projector_scale:
            problems.append(
                f"projector_scale {self.projector_scale} must be ascending without repeats."
            )
        return problems

    def _encoder_problems(self) -> list[str]:
        problems = []
        width, depth, heads, _ = self.encoder_size
        if width % heads:
            problems.append(f"encoder width {width} is not a multiple of its {heads} heads.")
        indexes = self.out_feature_indexes
        if sorted(set(indexes)) != indexes or indexes[0] < 1 or indexes[-1] > depth:
            problems.append(
                f"out_feature_indexes {indexes} must ascend within 1..{depth} "
                "(they count encoder blocks)."
            )
        return problems

    @property
    def block_size(self) -> int:
        """Image sides must be multiples of this number of pixels: patch size times windows."""
        return self.patch_size * self.num_windows

    @property
    def encoder_size(self) -> tuple[int, int, int, int]:
        """(width, blocks, heads, register tokens) of the encoder."""
        width, depth, heads, registers = ENCODER_SIZES[self.encoder]
        return (
            self.encoder_dim or width,
            self.encoder_depth or depth,
            self.encoder_heads or heads,
            registers,
        )

    @property
    def num_classes_is_explicit(self) -> bool:
        """Whether the user chose `num_classes`; otherwise weights and datasets may change it."""
        return "num_classes" in self.model_fields_set

    def infer_num_classes(self, number: int) -> None:
        """Set the class count found in weights or a dataset; it does not count as chosen."""
        self.num_classes = number
        self.model_fields_set.discard("num_classes")
