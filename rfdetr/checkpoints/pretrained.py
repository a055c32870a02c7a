"""Fills a network with pretrained weights and reports every tensor that was not used or missing."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rfdetr.checkpoints import dinov2
from rfdetr.checkpoints.adapt import AdaptedWeights, adapt_weights
from rfdetr.checkpoints.download import resolve_weights
from rfdetr.checkpoints.legacy_names import ENCODER_PREFIX
from rfdetr.checkpoints.record import CheckpointRecord, Weights, read_checkpoint
from rfdetr.checkpoints.safe_io import StrPath
from rfdetr.checkpoints.structure import structure_mismatch, warn_differing_settings
from rfdetr.config import ModelConfig
from rfdetr.errors import CheckpointError, DownloadError

if TYPE_CHECKING:
    from rfdetr.model.network import RFDETRNetwork

logger = logging.getLogger(__name__)

# Not trained, or derived from another tensor: a file without them is complete.
OPTIONAL_SUFFIXES = (".mask_token", ".lora_a", ".lora_b", ".magnitude")


@dataclass(frozen=True)
class LoadReport:
    """What happened to the tensors of one file.

    `missing`: our names without a value in the file (they keep their initial values);
    `unexpected`: names in the file that the network does not have; `adapted`: one sentence per
    resized tensor. The last six fields are those of `CheckpointRecord`.
    """

    path: str
    loaded: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    label_offset: int = 0
    square: bool = True
    averaged: bool | None = None
    weights_epoch: int | None = None


def initialise_weights(network: RFDETRNetwork, model_config: ModelConfig) -> LoadReport | None:
    """Load `model_config.pretrain_weights`, or the DINOv2 encoder where it fits, or nothing.

    If the default weights of a size cannot be downloaded, a UserWarning is given and the network
    keeps its random weights; weights that were set explicitly raise DownloadError. Takes the
    file's class count into `model_config` when the user did not set one.
    """
    name = model_config.pretrain_weights
    if name is not None:
        try:
            return load_pretrained(network, model_config, name)
        except DownloadError as error:
            if "pretrain_weights" in model_config.model_fields_set:
                raise
            warnings.warn(
                f"The published weights {name} are not available: {error} Training starts without "
                "them; pass pretrain_weights=None to silence this warning.",
                UserWarning,
                stacklevel=2,
            )
    if dinov2.fits(model_config):
        return _load_encoder(network, model_config)
    if name is None:
        logger.warning("The network starts from random weights (pretrain_weights is None).")
    return None


def load_pretrained(
    network: RFDETRNetwork, model_config: ModelConfig, path_or_name: StrPath
) -> LoadReport:
    """Load a checkpoint of any generation, or published weights by name, into `network`.

    Class head, query groups and position table are adapted. Raises CheckpointError for a damaged
    or refused file and for a structure that does not fit, FileNotFoundError for a missing file,
    DownloadError for a name that cannot be downloaded.
    """
    record = read_checkpoint(resolve_weights(path_or_name), mmap=True)
    return load_record(network, model_config, record)


def load_record(
    network: RFDETRNetwork, model_config: ModelConfig, record: CheckpointRecord
) -> LoadReport:
    """Like `load_pretrained`, from a checkpoint that is already read."""
    problem = structure_mismatch(record, model_config)
    if problem:
        raise CheckpointError(problem)
    warn_differing_settings(record, model_config)
    _adopt_class_count(network, model_config, record)
    report = _load(network, adapt_weights(record, model_config), record)
    _announce(report)
    return report


def _load_encoder(network: RFDETRNetwork, config: ModelConfig) -> LoadReport | None:
    weights = dinov2.fetch(config)
    if weights is None:
        return None
    expected = [name for name in network.state_dict() if name.startswith(ENCODER_PREFIX)]
    missing = [n for n in expected if n not in weights and not n.endswith(OPTIONAL_SUFFIXES)]
    result = network.load_state_dict(weights, strict=False)
    name = dinov2.TIMM_NAMES[config.encoder]
    logger.info("The encoder starts from DINOv2 (%s).", name)
    return LoadReport(name, len(weights), tuple(missing), tuple(result.unexpected_keys))


def _adopt_class_count(
    network: RFDETRNetwork, model_config: ModelConfig, record: CheckpointRecord
) -> None:
    """Resize the class head to the file's class count, unless the user set another."""
    if record.num_classes is None or model_config.num_classes_is_explicit:
        return
    found = max(1, record.num_classes)
    if found == model_config.num_classes:
        return
    logger.info("Class count %d taken from %s.", found, record.path)
    network.resize_head(found + 1)
    model_config.infer_num_classes(found)


def _load(network: RFDETRNetwork, adapted: AdaptedWeights, record: CheckpointRecord) -> LoadReport:
    expected, given = network.state_dict(), adapted.weights
    _check_shapes(expected, given, record.path)
    missing = [n for n in expected if n not in given and not n.endswith(OPTIONAL_SUFFIXES)]
    unexpected = [n for n in given if n not in expected]
    if len(unexpected) == len(given):
        raise CheckpointError(
            f"None of the {len(given)} tensors of {record.path} belongs to this network; "
            f"first names: {', '.join(unexpected[:3])}."
        )
    network.load_state_dict(given, strict=False)
    return LoadReport(
        path=record.path,
        loaded=len(given) - len(unexpected),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        adapted=tuple(adapted.changes),
        num_classes=record.num_classes,
        class_names=tuple(record.class_names) if record.class_names else None,
        label_offset=record.label_offset,
        square=record.square,
        averaged=record.averaged,
        weights_epoch=record.weights_epoch,
    )


def _check_shapes(expected: Weights, given: Weights, path: str) -> None:
    wrong = [
        f"{name} is {tuple(value.shape)} in the file, {tuple(expected[name].shape)} in the network"
        for name, value in given.items()
        if name in expected and value.shape != expected[name].shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise CheckpointError(
            f"{path} does not fit the network: {'; '.join(wrong[:5])}{more}. Compare "
            "out_feature_indexes, encoder and projector settings with the file's."
        )


def _announce(report: LoadReport) -> None:
    for change in report.adapted:
        logger.info("%s: %s.", report.path, change)
    if report.missing or report.unexpected:
        warnings.warn(
            f"{report.path}: {report.loaded} tensors loaded; missing (keep their initial values): "
            f"{', '.join(report.missing) or 'none'}; unexpected (not used): "
            f"{', '.join(report.unexpected) or 'none'}.",
            UserWarning,
            stacklevel=4,
        )
