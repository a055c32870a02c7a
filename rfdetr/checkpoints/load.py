"""Loading weights into a network, with a report that names every tensor that did not travel."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rfdetr.checkpoints.adapt import Fitted, fit, structure_problems, warn_other_settings
from rfdetr.checkpoints.dinov2 import load_dinov2, wants_dinov2
from rfdetr.checkpoints.hub import resolve_weights
from rfdetr.checkpoints.record import Container, Weights, read_container
from rfdetr.checkpoints.safe_io import StrPath
from rfdetr.config import ModelConfig
from rfdetr.errors import CheckpointError, DownloadError

if TYPE_CHECKING:
    from rfdetr.model.network import RFDETRNetwork

logger = logging.getLogger(__name__)

# Never trained or derived from another tensor: a file without them is complete.
OPTIONAL = (".mask_token", ".lora_a", ".lora_b", ".magnitude")


@dataclass(frozen=True)
class LoadReport:
    """What happened to the tensors of one file.

    `missing`: our names without a value in the file (they keep their initial values);
    `unexpected`: names of the file without a place here; `adapted`: one sentence per changed size.
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


def initialise_weights(network: RFDETRNetwork, model_config: ModelConfig) -> LoadReport | None:
    """Load `model_config.pretrain_weights`, or the DINOv2 encoder where it fits, or nothing.

    A published name that nobody asked for and that cannot be downloaded is a UserWarning and the
    network keeps its random weights; one that was set explicitly raises DownloadError. Adopts the
    file's class count in `model_config` when the user did not set one.
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
                "them; pass pretrain_weights=None to say that this is meant.",
                UserWarning,
                stacklevel=2,
            )
    if wants_dinov2(model_config):
        return load_dinov2(network, model_config)
    if name is None:
        logger.warning("The network starts from random weights (pretrain_weights is None).")
    return None


def load_pretrained(
    network: RFDETRNetwork, model_config: ModelConfig, path_or_name: StrPath
) -> LoadReport:
    """Load a checkpoint of any generation, or published weights by name, into `network`.

    Class head, query groups and position table are fitted (model specification, section 10).
    Raises CheckpointError for a damaged or refused file and for a structure that does not fit,
    FileNotFoundError for a missing file, DownloadError for a name that cannot be fetched.
    """
    container = read_container(resolve_weights(path_or_name), mmap=True)
    return load_container(network, model_config, container)


def load_container(
    network: RFDETRNetwork, model_config: ModelConfig, container: Container
) -> LoadReport:
    """As `load_pretrained`, from a checkpoint that was read already."""
    problem = structure_problems(container, model_config)
    if problem:
        raise CheckpointError(problem)
    warn_other_settings(container, model_config)
    _adopt_classes(network, model_config, container)
    fitted = fit(container, model_config)
    report = _load(network, fitted, container)
    _announce(report)
    return report


def _adopt_classes(network: RFDETRNetwork, model_config: ModelConfig, container: Container) -> None:
    if container.num_classes is None or model_config.num_classes_is_explicit:
        return
    found = max(1, container.num_classes)
    if found == model_config.num_classes:
        return
    logger.info("Class count %d taken from %s.", found, container.path)
    network.resize_head(found + 1)
    model_config.infer_num_classes(found)


def _load(network: RFDETRNetwork, fitted: Fitted, container: Container) -> LoadReport:
    expected = network.state_dict()
    given = fitted.weights
    _check_shapes(expected, given, container.path)
    missing = [n for n in expected if n not in given and not n.endswith(OPTIONAL)]
    unexpected = [n for n in given if n not in expected]
    if len(unexpected) == len(given):
        raise CheckpointError(
            f"None of the {len(given)} tensors of {container.path} belongs to this network; "
            f"first names: {', '.join(unexpected[:3])}."
        )
    network.load_state_dict(given, strict=False)
    return LoadReport(
        path=container.path,
        loaded=len(given) - len(unexpected),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        adapted=tuple(fitted.changes),
        num_classes=container.num_classes,
        class_names=tuple(container.class_names) if container.class_names else None,
        label_offset=container.label_offset,
        square=container.square,
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
            f"{path} does not fit the network: {'; '.join(wrong[:5])}{more}. Check "
            "out_feature_indexes, encoder and projector settings against the file's."
        )


def _announce(report: LoadReport) -> None:
    for change in report.adapted:
        logger.info("%s: %s.", report.path, change)
    if report.missing or report.unexpected:
        warnings.warn(
            f"{report.path}: {report.loaded} tensors loaded; missing (initial values stay): "
            f"{', '.join(report.missing) or 'none'}; unexpected (not used): "
            f"{', '.join(report.unexpected) or 'none'}.",
            UserWarning,
            stacklevel=4,
        )
