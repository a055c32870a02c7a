"""The detector as one object: train, predict, export. One class per size."""

from __future__ import annotations

import copy
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from rfdetr import config as configs
from rfdetr.checkpoints.download import resolve_weights
from rfdetr.checkpoints.pretrained import LoadReport, initialise_weights, load_record
from rfdetr.checkpoints.record import CheckpointRecord, read_checkpoint
from rfdetr.checkpoints.safe_io import StrPath
from rfdetr.checkpoints.structure import infer_config, infer_config_class
from rfdetr.compat import EXPORT_OPTIONS, PREDICT_OPTIONS
from rfdetr.config import MODEL_CONFIGS, ModelConfig, device_text
from rfdetr.data.upload import read_batches
from rfdetr.errors import CheckpointError, ConfigError, InputError
from rfdetr.export.frozen import FrozenNetwork, checked_shape, number_format
from rfdetr.model.network import RFDETRNetwork, build_network
from rfdetr.prediction import DetectorState, Origin, eval_mode
from rfdetr.public_names import PublicNames, refuse

if TYPE_CHECKING:
    import pytorch_lightning as pl
    import supervision

    from rfdetr.export.onnx import OnnxExport
    from rfdetr.training.datamodule import RFDETRDataModule

logger = logging.getLogger(__name__)

IMAGES_AT_ONCE = 8
SHOWN_NAMES = 5
EXPORT_SETTINGS = ("shape", "batch_size", "dynamic_batch", "opset", "check")
ANY_NUMBER = 1_000_000  # of classes, until the dataset has been read


class RFDETR(PublicNames):
    """A detector of one size. Keywords are the fields of its configuration class.

    Raises ValueError for an unknown keyword, CheckpointError or DownloadError for weights that
    cannot be used. Use a sized class (`RFDETRNano`, ...) or `RFDETR.from_checkpoint`.
    """

    config_class: ClassVar[type[ModelConfig]] = ModelConfig

    def __init__(self, **settings: Any) -> None:
        if self.config_class is ModelConfig:
            raise ConfigError(
                "RFDETR has no size: use RFDETRNano or another size, or RFDETR.from_checkpoint."
            )
        _ignore_trust(settings)
        config = self.config_class(**settings)
        network = build_network(config)
        self._begin(network, config, initialise_weights(network, config))

    def _begin(
        self, network: RFDETRNetwork, config: ModelConfig, report: LoadReport | None
    ) -> None:
        self.model_config = config
        self.model = DetectorState(network.to(_device(config.device)).eval(), config)
        if report is not None and report.class_names:
            self.model.class_names = list(report.class_names)
            self.model.label_offset = report.label_offset
        if report is not None:
            self.model.square = report.square
            in_file = max(1, report.num_classes or 0)
            resized = report.num_classes is not None and in_file != config.num_classes
            encoder_only = "" if report.num_classes is not None else " (encoder only)"
            self.model.origin = Origin(
                f"{report.path}{encoder_only}",
                report.averaged,
                report.weights_epoch,
                file_classes=in_file if resized else None,
            )

    @classmethod
    def from_checkpoint(cls, path: StrPath, **overrides: Any) -> RFDETR:
        """The detector in a checkpoint of any generation, with its classes.

        On `RFDETR` the size follows the file; on a sized class the file must match it. `overrides`
        are configuration fields, for example device or num_classes. Raises CheckpointError,
        FileNotFoundError or ValueError.
        """
        _ignore_trust(overrides)
        file = resolve_weights(path)
        record = read_checkpoint(file, mmap=True)
        sized = cls if cls is not RFDETR else DETECTOR_CLASSES[infer_config_class(record)]
        _check_size(record, sized)
        settings = {"pretrain_weights": os.fspath(file), **overrides}
        config = infer_config(record, sized.config_class, **settings)
        if "num_classes" not in overrides:
            config.infer_num_classes(config.num_classes)
        detector = sized.__new__(sized)
        network = build_network(config)
        detector._begin(network, config, load_record(network, config, record))
        detector.model.weights = Path(file)
        return detector

    @property
    def class_names(self) -> list[str]:
        """Names of the classes: of the data or the weights, else COCO's 80, else numbers."""
        return self.model.names()

    def __repr__(self) -> str:
        names = self.class_names
        shown = ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")
        optimized = "" if self.model.optimized is None else ", optimized copy"
        return (
            f"{type(self).__name__}({self.model_config.num_classes} classes: {shown}; "
            f"{self.model.origin}; {self.model.resolution} pixels, {self.model.device}{optimized})"
        )

    def train(self, **settings: Any) -> None:
        """Train on a dataset; keywords are the fields of TrainConfig.

        Also takes `device` ("cpu", "cuda:1", ...) and `callbacks` (a list, added to the default
        ones). Afterwards this object predicts and exports with the trained (EMA) weights. If
        training is interrupted after its first step, it has the live weights of that moment and
        the classes of the dataset; if it fails earlier, it stays as it was. Without a progress bar,
        and outside a terminal, prints how long it will take and a line per epoch. Raises ValueError
        for an unknown keyword, and the errors of dataset and training.
        """
        from rfdetr.training import RFDETRDataModule, RFDETRModule, build_trainer
        from rfdetr.training.callbacks.progress_lines import ProgressLines

        callbacks = _take_retired(settings)
        train_config = self.get_train_config(**settings)
        datamodule = RFDETRDataModule(self._any_classes(), train_config)
        datamodule.setup("fit")
        network = copy.deepcopy(self.model.model)
        _take_classes(network, datamodule.num_classes)
        network.config.grey_levels = datamodule.model_config.grey_levels
        datamodule.model_config = network.config
        module = RFDETRModule(network.config, train_config, network=network)
        trainer = build_trainer(train_config, network.config)
        if train_config.progress_bar is None or not sys.stdout.isatty():
            kind = "segm_mAP_50_95" if network.config.segmentation_head else "mAP_50_95"
            callbacks = [ProgressLines(kind), *callbacks]
        trainer.callbacks.extend(callbacks)  # type: ignore[attr-defined]
        complete = False
        try:
            trainer.fit(module, datamodule, ckpt_path=train_config.resume or None)
            complete = True
        finally:
            if complete or trainer.global_step:
                self._take_trained(trainer, datamodule, complete)

    def _take_trained(
        self, trainer: pl.Trainer, datamodule: RFDETRDataModule, complete: bool
    ) -> None:
        """Predict with the network of a training, with the classes of its data."""
        from rfdetr.training.callbacks.ema import ema_network

        module: Any = trainer.lightning_module
        state, train_config = self.model, module.train_config
        state.model = module.model.to(state.device).eval()
        self.model_config = state.config = module.model_config
        state.class_names = train_config.class_names or datamodule.class_names
        state.label_offset = 0
        state.square = train_config.square_resize_div_64
        state.optimized = None
        state.dataset_dir = train_config.dataset_dir
        state.weights = None
        state.origin = Origin(
            f"the {'' if complete else 'interrupted '}training in {train_config.output_dir}",
            averaged=complete and ema_network(trainer) is not None,
            epoch=max(0, trainer.current_epoch - complete),
        )

    def _any_classes(self) -> ModelConfig:
        return self.model_config.model_copy(update={"num_classes": ANY_NUMBER})

    def _warn_of_resized_head(self) -> None:
        found = self.model.origin.file_classes
        if found is not None:
            warnings.warn(
                f"{self.model.origin.source} has {found} classes, num_classes is "
                f"{self.model_config.num_classes}, and the resized class head has not been "
                "trained: objects appear under several classes or under none. Omit num_classes "
                "to predict with the file's classes, or train first.",
                UserWarning,
                stacklevel=3,
            )

    def evaluate(self, split: str = "test", **settings: Any) -> dict[str, float]:
        """COCO metrics on a split of a dataset: "val/mAP_50_95" or "test/mAP_50_95", ...

        `split` is "test" or "val"; `settings` are fields of TrainConfig, `device`, and `callbacks`
        (a list). `dataset_dir` defaults to that of the last training. Classes are matched by name,
        or by label if the detector has no names. Raises ConfigError for a class that the detector
        does not have, and the errors of the dataset.
        """
        from rfdetr.training.standalone import evaluate_network

        settings.setdefault("device", str(self.model.device))
        settings.setdefault("square_resize_div_64", self.model.square)
        callbacks = _take_retired(settings)
        if settings.setdefault("dataset_dir", self.model.dataset_dir) is None:
            raise ConfigError("This detector was not trained here: pass dataset_dir to evaluate().")
        train_config = self.get_train_config(**settings)
        self._warn_of_resized_head()
        names = self.model.label_names() if self.model.has_names else None
        return evaluate_network(self.model.model, names, train_config, split, callbacks)

    def predict(
        self,
        images: Any,
        threshold: float | Literal["operating_point"] = 0.5,
        shape: tuple[int, int] | None = None,
        *,
        include_source_image: bool | None = None,
        batch_size: int = IMAGES_AT_ONCE,
        dtype: torch.dtype | str = torch.float32,
        **others: Any,
    ) -> supervision.Detections | list[supervision.Detections]:
        """Detections with a score above `threshold`, boxes xyxy in pixels of the image.

        `images` is a path, an http(s) URL, a PIL image, a uint8 RGB array (H, W, 3), a tensor
        (3, H, W) in 0..1, or a list of these; a list gives a list. `class_id` are the labels of
        the network, `data["class_name"]` their names, `mask` (N, H, W) for segmentation, and
        `data["source_shape"]` (N, 2) the height and width of the image. `metadata["source_image"]`
        is the image as a uint8 RGB array (H, W, 3): for a single image, or for every image of a
        list with `include_source_image=True`, which keeps all of them in memory. `shape` (height,
        width) replaces the resolution of the network. Weights trained with
        square_resize_div_64=False see images as in validation: at their own aspect ratio, padded
        to the largest of the batch. A list is processed in batches of `batch_size`; at most two
        are in memory. `dtype` float16 or bfloat16 runs the network in mixed precision. The
        threshold "operating_point" is the threshold per class in the model.json beside the weights,
        as registered models have it. Raises InputError or FileNotFoundError for anything that is
        not an image.
        """
        least = self.model.threshold(threshold)
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size must be an integer of at least 1; got {batch_size}.")
        refuse(others, PREDICT_OPTIONS, "predict()")
        if shape is not None:
            shape = checked_shape(shape, self.model_config)
        self._warn_of_resized_head()
        single = not isinstance(images, list | tuple)
        sources: Sequence[Any] = [images] if single else images
        dtype = number_format(dtype)
        if dtype == torch.float64:
            raise InputError("predict computes in float32, float16 or bfloat16.")
        optimized = self.model.optimized
        if optimized is not None:
            if dtype != torch.float32:
                raise InputError(
                    "The optimized model has a number format of its own: pass dtype to "
                    "optimize_for_inference, or call remove_optimized_model()."
                )
            optimized.check(len(sources), shape or self.model.resolution)
            batch_size = optimized.batch_size
        found: list[supervision.Detections] = []
        with torch.inference_mode(), eval_mode(self.model.model):
            for batch in read_batches(sources, batch_size, self.model.config.grey_levels):
                part = self.model.detect(batch, least, dtype, shape)
                if include_source_image or (include_source_image is None and single):
                    for detections, image in zip(part, batch, strict=True):
                        detections.metadata["source_image"] = image.copy()
                found += part
        return found[0] if single else found

    def optimize_for_inference(
        self, compile: bool = True, batch_size: int = 1, dtype: torch.dtype | str = torch.float32
    ) -> None:
        """Predict with a fixed copy in `dtype`, for `batch_size` images at a time.

        If `compile`, its operators are recorded once and replayed: as a CUDA graph on a GPU.
        `dtype` is float32, float16, bfloat16 or float64, also as a name. Until
        `remove_optimized_model`, another number of images or another resolution raises ValueError.
        Images are resized to squares, with a warning if the weights were trained with
        square_resize_div_64=False.
        """
        if not self.model.square:
            warnings.warn(
                "The optimized model resizes images to squares, but the weights were trained with "
                "square_resize_div_64=False. Predict without it to keep the aspect ratio.",
                UserWarning,
                stacklevel=2,
            )
        self.model.optimized = FrozenNetwork(
            self.model.model, self.model.resolution, batch_size, dtype, capture=compile
        )

    def remove_optimized_model(self) -> None:
        """Predict with the network itself again."""
        self.model.optimized = None

    def export(
        self,
        output_dir: StrPath = "output",
        *,
        format: str = "onnx",
        verbose: bool = False,
        simplify: bool = False,
        infer_dir: StrPath | None = None,
        **options: Any,
    ) -> OnnxExport:
        """Write an ONNX file and check it against the network; see `rfdetr.export.onnx`.

        The result is path-like; `verbose` prints what it is. `opset_version` is another name of
        `opset`. `simplify` and `infer_dir` are ignored with a warning. Raises InputError for a
        `format` other than onnx and for options that are not offered.
        """
        from rfdetr.export.onnx import export_onnx

        if format.lower() != "onnx":
            raise InputError(
                f"format {format!r} is not offered: export writes ONNX files. Convert the file "
                "with the tools of the other format."
            )
        if "opset_version" in options:
            options["opset"] = options.pop("opset_version")
        known = {name: options.pop(name) for name in EXPORT_SETTINGS if name in options}
        refuse(options, EXPORT_OPTIONS, "export()")
        ignored = [
            "simplify is ignored: constants are folded already. Run onnxsim on the file for more."
        ] * bool(simplify)
        if infer_dir is not None:
            ignored.append("infer_dir is ignored: random images compare the file with the network.")
        if ignored:
            warnings.warn(" ".join(ignored), UserWarning, stacklevel=2)
        self._warn_of_resized_head()
        known = {"class_names": self.model.label_names()} | known
        result = export_onnx(self.model.model, output_dir, **known)
        if verbose:
            print(result.describe())  # noqa: T201
        return result


def _take_classes(network: RFDETRNetwork, found: int | None) -> None:
    """Give the network the dataset's class count, unless the user chose a sufficient one."""
    config = network.config
    if found is None or found == config.num_classes:
        return
    if config.num_classes_is_explicit:
        if found > config.num_classes:
            raise ConfigError(
                f"The dataset has {found} classes, num_classes is {config.num_classes}: omit "
                f"num_classes or set it to {found}."
            )
        warnings.warn(
            f"num_classes is {config.num_classes}, the dataset has {found}: the extra outputs "
            "stay unused.",
            UserWarning,
            stacklevel=3,
        )
        return
    logger.info("Class count %d taken from the dataset.", found)
    network.resize_head(found + 1)
    config.infer_num_classes(found)


def _check_size(record: CheckpointRecord, sized: type[RFDETR]) -> None:
    """CheckpointError for a file that records another size."""
    own = f"{record.model_name}".removesuffix("Config")
    known = {cls.__name__.removesuffix("Config") for cls in MODEL_CONFIGS.values()}
    expected = sized.config_class.__name__.removesuffix("Config")
    if own in known and own != expected:
        raise CheckpointError(
            f"{record.path} is a checkpoint of {own}, not of {expected}. Load it with "
            f"{own}.from_checkpoint, or with RFDETR.from_checkpoint for any size."
        )


def _device(name: str) -> torch.device:
    if name != "auto":
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise ConfigError(
                f"device {name!r} is unknown: use auto, cpu, cuda, cuda:1 (the second GPU) or mps."
            ) from error
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            cause = str(error).partition("\n")[0].rstrip(".")
            raise ConfigError(
                f"device {name!r} cannot be used here: {cause}. Use cpu, or auto for the device "
                "that this machine has."
            ) from error
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _ignore_trust(settings: dict[str, Any]) -> None:
    if settings.pop("trust_checkpoint", None) is not None:
        warnings.warn(
            "trust_checkpoint is ignored: checkpoints are data here, and loading one never runs "
            "code from it.",
            UserWarning,
            stacklevel=3,
        )


def _take_retired(settings: dict[str, Any]) -> list[Any]:
    """Translate `device`, drop arguments without an effect with a warning, return callbacks."""
    device = device_text(settings.pop("device", None))
    if device is not None:
        kind, _, index = str(device).partition(":")
        settings.setdefault("accelerator", {"cuda": "gpu"}.get(kind, kind))
        if index:
            settings.setdefault("devices", f"{index},")
    retired = [name for name in ("start_epoch", "do_benchmark") if settings.pop(name, None)]
    callbacks = settings.pop("callbacks", None) or []
    if _is_callback(callbacks):
        callbacks = [callbacks]
    if isinstance(callbacks, dict):
        retired.append("callbacks as a dictionary (give a list of Lightning callbacks)")
        callbacks = []
    if retired:
        warnings.warn(
            f"Ignored in train(): {', '.join(retired)}. Use resume= to continue from a checkpoint.",
            UserWarning,
            stacklevel=3,
        )
    if not isinstance(callbacks, list | tuple) or not all(map(_is_callback, callbacks)):
        raise ConfigError(f"callbacks must be a list of Lightning callbacks; got {callbacks!r}.")
    return list(callbacks)


def _is_callback(value: Any) -> bool:
    from pytorch_lightning.callbacks import Callback

    return isinstance(value, Callback)


class RFDETRNano(RFDETR):
    """Detection, 384 pixels."""

    config_class = configs.RFDETRNanoConfig


class RFDETRSmall(RFDETR):
    """Detection, 512 pixels."""

    config_class = configs.RFDETRSmallConfig


class RFDETRMedium(RFDETR):
    """Detection, 576 pixels."""

    config_class = configs.RFDETRMediumConfig


class RFDETRBase(RFDETR):
    """Detection, 560 pixels, patch 14."""

    config_class = configs.RFDETRBaseConfig


class RFDETRLarge(RFDETR):
    """Detection, 704 pixels."""

    config_class = configs.RFDETRLargeConfig


class RFDETRLargeDeprecated(RFDETR):
    """Detection, 560 pixels, the first large model."""

    config_class = configs.RFDETRLargeDeprecatedConfig


class RFDETRSegPreview(RFDETR):
    """Segmentation, 432 pixels, the preview."""

    config_class = configs.RFDETRSegPreviewConfig


class RFDETRSegNano(RFDETR):
    """Segmentation, 312 pixels."""

    config_class = configs.RFDETRSegNanoConfig


class RFDETRSegSmall(RFDETR):
    """Segmentation, 384 pixels."""

    config_class = configs.RFDETRSegSmallConfig


class RFDETRSegMedium(RFDETR):
    """Segmentation, 432 pixels."""

    config_class = configs.RFDETRSegMediumConfig


class RFDETRSegLarge(RFDETR):
    """Segmentation, 504 pixels."""

    config_class = configs.RFDETRSegLargeConfig


class RFDETRSegXLarge(RFDETR):
    """Segmentation, 624 pixels."""

    config_class = configs.RFDETRSegXLargeConfig


class RFDETRSeg2XLarge(RFDETR):
    """Segmentation, 768 pixels."""

    config_class = configs.RFDETRSeg2XLargeConfig


from_checkpoint = RFDETR.from_checkpoint

DETECTOR_CLASSES: dict[type[ModelConfig], type[RFDETR]] = {
    cls.config_class: cls for cls in RFDETR.__subclasses__()
}
