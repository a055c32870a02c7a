"""What the public RF-DETR package offers under these names and this package does not.

`docs/migration.md` lists the names that are accepted.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

KEYPOINTS = "Keypoint models are not offered: train a detection or a segmentation model."
_SPEED = "It changes only the speed there: omit it."
_LOGGER = "Append a Lightning logger to trainer.loggers instead."
_SCHEDULE = (
    "The schedules are 'step' and 'cosine': for another one, override "
    "RFDETRModule.configure_optimizers."
)
_OPTIMIZER = "The optimizer is AdamW: for another one, override RFDETRModule.configure_optimizers."
_BATCH = "With batch_size='auto' an optimizer step has 4 * grad_accum_steps images: set those."
_BEST = "The best epoch is the one with the highest value: set eval_interval to skip epochs."
_KEYPOINT_MODEL = ((), "")  # any value: without use_grouppose_keypoints they have no effect

# arguments of Lightning's Trainer that users look for in TrainConfig
TRAINER_ARGUMENTS = frozenset(
    {
        "accumulate_grad_batches",
        "benchmark",
        "check_val_every_n_epoch",
        "detect_anomaly",
        "deterministic",
        "fast_dev_run",
        "gradient_clip_algorithm",
        "gradient_clip_val",
        "limit_test_batches",
        "limit_train_batches",
        "limit_val_batches",
        "log_every_n_steps",
        "logger",
        "max_epochs",
        "max_steps",
        "max_time",
        "min_epochs",
        "overfit_batches",
        "plugins",
        "precision",
        "profiler",
        "strategy",
        "val_check_interval",
    }
)

Missing = Mapping[str, tuple[tuple[Any, ...], str]]
PLAIN = (bool, int, float, str, list, dict)
# field -> values that ask for nothing (empty: any value), and what to do instead of others
MODEL_FIELDS: Missing = {
    "use_grouppose_keypoints": ((False,), KEYPOINTS),
    "dual_projector": ((False,), KEYPOINTS),
    "keypoint_cross_attn": _KEYPOINT_MODEL,
    "inter_instance_kp_attn": _KEYPOINT_MODEL,
    "grouppose_keypoint_dim_downscale": _KEYPOINT_MODEL,
    "dual_projector_kp_only": _KEYPOINT_MODEL,
    "num_keypoints_per_class": _KEYPOINT_MODEL,
    "num_decoder_registers": ((0,), "Decoder registers are not offered."),
    "postprocess_trace_alpha": _KEYPOINT_MODEL,
    "cuda_graphs": ((False, True), "CUDA graphs are the default: see TrainConfig.accelerate."),
    "model_name": ((), ""),
}
TRAIN_FIELDS: Missing = {
    "amp_dtype": ((None, "auto"), "Pass precision= to build_trainer."),
    "augmentation_backend": (("cpu", "auto"), "Augmentations run in the data loader's processes."),
    "auto_batch_ema_headroom": ((0.7,), _BATCH),
    "auto_batch_max_targets_per_image": ((100,), _BATCH),
    "auto_batch_target_effective": ((16,), _BATCH),
    "clearml": ((False,), f"ClearML is not offered. {_LOGGER}"),
    "compact_train_metrics": ((True,), "Every loss term is logged: omit it."),
    "compute_train_metrics": ((False,), "Validate on a copy of the training split instead."),
    "eval_backend": (("vernier",), "There is one metric engine, equal to pycocotools: omit it."),
    "eval_ema_only": ((False,), "Set eval_base_model=False instead."),
    "eval_masks_head_resolution": ((False,), "Masks are evaluated at the size of the image."),
    "keypoint_findable_loss_coef": ((0,), KEYPOINTS),
    "keypoint_flip_pairs": (([],), KEYPOINTS),
    "keypoint_l1_loss_coef": ((0,), KEYPOINTS),
    "keypoint_nll_loss_coef": ((0,), KEYPOINTS),
    "keypoint_oks_sigmas": ((None,), KEYPOINTS),
    "keypoint_visible_loss_coef": ((0,), KEYPOINTS),
    "lr_scheduler_interval": (("step",), _SCHEDULE),
    "lr_scheduler_monitor": (("val/loss",), _SCHEDULE),
    "notes": ((None,), f"Notes are not stored. {_LOGGER}"),
    "optimizer": (("adamw",), _OPTIMIZER),
    "optimizer_kwargs": (({},), "Set lr, lr_encoder and weight_decay instead."),
    "pack_targets": ((True,), _SPEED),
    "pad_targets_to": ((None,), _SPEED),
    "save_dataset_grids": ((False,), "`python -m rfdetr.checks FOLDER` draws samples instead."),
    "scale_jitter": ((True,), "The random views of training are fixed: omit it."),
    "skip_best_epochs": ((0,), _BEST),
    "smooth_alpha": ((0.0,), _BEST),
}
_OTHER_FORMAT = "It belongs to another format: convert the ONNX file with the tools of that format."
EXPORT_OPTIONS: Missing = {
    "backend": ((None,), _OTHER_FORMAT),
    "backbone_only": ((False,), "The complete network is exported."),
    "calibration_data": ((None,), _OTHER_FORMAT),
    "coreai_precision": ((None,), _OTHER_FORMAT),
    "coreml_precision": ((None,), _OTHER_FORMAT),
    "fp16": ((True,), _OTHER_FORMAT),
    "max_batch_size": ((None,), _OTHER_FORMAT),
    "max_images": ((100,), _OTHER_FORMAT),
    "notes": ((None,), "Notes are not stored."),
    "output_name": ((None,), "The file is called inference_model.onnx: rename it."),
    "openvino_precision": ((None,), _OTHER_FORMAT),
    "patch_size": ((None,), "The patch size is the model's: omit it."),
    "soc": ((None,), _OTHER_FORMAT),
    "quantization": ((None,), "Quantize the ONNX file with onnxruntime.quantization."),
}
_DEVICE = "The network stays where it is: pass device when you build the detector."
PREDICT_OPTIONS: Missing = {"device": ((None,), _DEVICE)}
INFERENCE_OPTIONS: Missing = {
    "device": ((None,), _DEVICE),
    "compile_backend": (("torchscript",), "compile=True records the operators once: omit it."),
    "inplace": ((False,), "The network is kept: call remove_optimized_model() to return to it."),
}
_HOSTED = (
    "Uploads to Roboflow are not offered: upload checkpoint_best_total.pth with its own client."
)
_PLATFORM = "Models of Roboflow's platform are not offered: the largest one here is RFDETRLarge."
_HEAD = "Pass num_classes when you build the detector, or train: the head follows the dataset."
_GPU_BAR = (
    "Set progress_bar='tqdm' or 'rich'; Lightning's DeviceStatsMonitor logs the memory of a GPU."
)
_DATASETS = "Datasets are read by RFDETRDataModule of rfdetr.training."
_WEIGHTS = "Weights are downloaded when a detector is built."
_TYPE = "It is the type of a setting: write the values of the setting as text."
# attributes and names in modules of the public package, and what to do instead
NAMES = {
    "AmpDtype": _TYPE,
    "AugmentationBackend": _TYPE,
    "BaseConfig": "Import ModelConfig or TrainConfig from rfdetr.config.",
    "CocoEvalBackend": _TYPE,
    "DEVICE": "The default device='auto' chooses the device of this machine.",
    "DatasetFile": _TYPE,
    "EncoderName": _TYPE,
    "GPUMemoryRichProgressBar": _GPU_BAR,
    "GPUMemoryTQDMProgressBar": _GPU_BAR,
    "KeypointTrainConfig": KEYPOINTS,
    "ModelContext": "It is the type of RFDETR.model, which RFDETRNano() and other sizes make.",
    "ModelWeights": _WEIGHTS,
    "MultiScale": "Set multi_scale to true or false.",
    "PretrainWeightsCompatibilityWarning": "Such cases are a UserWarning here.",
    "RFDETR2XLarge": _PLATFORM,
    "RFDETRKeypointPreview": KEYPOINTS,
    "RFDETRKeypointPreviewConfig": KEYPOINTS,
    "RFDETRSeg": "Segmentation models have sizes: RFDETRSegNano to RFDETRSeg2XLarge.",
    "RFDETRXLarge": _PLATFORM,
    "SchedulerType": _TYPE,
    "build_dataset": _DATASETS,
    "callbacks": "Pass Lightning callbacks as train(callbacks=[...]).",
    "deploy_to_roboflow": _HOSTED,
    "export_for_roboflow": _HOSTED,
    "get_coco_api_from_dataset": _DATASETS,
    "get_logger": "Use logging.getLogger('rfdetr').",
    "get_model": "The network of a detector is detector.model.model.",
    "maybe_download_pretrain_weights": _WEIGHTS,
    "reinitialize_detection_head": _HEAD,
}
_LAYOUT = "It was internal: see the folders of this package in docs/architecture.md."
# modules of the public package, and what to do instead
MODULES = {
    "rfdetr.assets.model_weights": _WEIGHTS,
    "rfdetr.cli": "Run `python -m rfdetr.training.cli` or `rfdetr-pipeline`.",
    "rfdetr.datasets.aug_configs": "Import the presets from rfdetr.datasets.aug_config.",
    "rfdetr.datasets.coco": _DATASETS,
    "rfdetr.datasets.transforms": "Set aug_config in TrainConfig for other augmentations.",
    "rfdetr.datasets.webdataset": "Datasets in shards are not offered: unpack them to a folder.",
    "rfdetr.datasets.yolo": _DATASETS,
    "rfdetr.deploy": "Call export() of a detector.",
    "rfdetr.engine": "Train with train() of a detector or with rfdetr.training.",
    "rfdetr.evaluation.coco_eval": "Use COCOEvalCallback of rfdetr.training, or evaluate().",
    "rfdetr.evaluation.f1_sweep": "The sweep over thresholds is rfdetr.evaluation.f1.",
    "rfdetr.evaluation.keypoint_oks": KEYPOINTS,
    "rfdetr.export.benchmark": "Benchmarks are not offered: time predict() of a detector.",
    "rfdetr.inference": "Detectors are built by RFDETRNano() and the other sizes.",
    "rfdetr.main": "Train with train() of a detector or with rfdetr.training.",
    "rfdetr.models": "The network is in rfdetr.model; a detector has it as detector.model.model.",
    "rfdetr.platform": _PLATFORM,
    "rfdetr.training.callbacks.drop_schedule": "Import DropPathCallback from rfdetr.training.",
    "rfdetr.training.callbacks.gpu_memory_progress_bar": _GPU_BAR,
    "rfdetr.training.checkpoint": "Import convert_legacy_checkpoint from rfdetr.training.",
    "rfdetr.training.coco_map": _LAYOUT,
    "rfdetr.training.cuda_graph_step": "CUDA graphs are the default: see TrainConfig.accelerate.",
    "rfdetr.training.drop_schedule": "Import DropPathCallback from rfdetr.training.",
    "rfdetr.training.model_ema": "Import RFDETREMACallback from rfdetr.training.",
    "rfdetr.training.param_groups": "Override RFDETRModule.configure_optimizers.",
    "rfdetr.util": "Class names are in rfdetr.assets.coco_classes; the rest was internal.",
    "rfdetr.utilities": "Use torchvision.ops for boxes, logging.getLogger('rfdetr'), and "
    "rfdetr.training.seed_everything; NestedTensor is in rfdetr.data.batch.",
    "rfdetr.visualize": "Training draws its curves into output_dir/plots.",
}


# names that users of other trainers type
SYNONYMS = {
    "data": "dataset_dir",
    "dataset": "dataset_dir",
    "dataset_path": "dataset_dir",
    "image_size": "resolution",
    "img_size": "resolution",
    "imgsz": "resolution",
    "learning_rate": "lr",
    "min_delta": "early_stopping_min_delta",
    "name": "run",
    "patience": "early_stopping_patience",
    "scheduler": "lr_scheduler",
    "weights": "pretrain_weights",
}


def nearest(name: str, known: Iterable[str]) -> str:
    """A question about the known name that is most similar, or nothing."""
    name = SYNONYMS.get(name, name)
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


class AbsentModules:
    """A finder that explains imports of `MODULES`. It is asked after all other finders."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        """Raise ModuleNotFoundError with the advice for a module of the public package."""
        if name in MODULES:
            # without name=: `from rfdetr import utilities` would replace the error by its own
            raise ModuleNotFoundError(f"{name} is not offered. {MODULES[name]}")


def absent(module: str, name: str) -> Exception:
    """The error for a name that `module` does not have."""
    inside = f"{module}.{name}"
    if name in NAMES or inside in MODULES:
        shown, advice = (name, NAMES[name]) if name in NAMES else (inside, MODULES[inside])
        return ImportError(f"{shown} is not offered. {advice}", name=name)
    return AttributeError(f"module {module!r} has no attribute {name!r}")


class HintedAttributes:
    """A class whose missing attributes are explained by `NAMES`."""

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            hint = f" {NAMES[name]}" if name in NAMES else ""
            kind = type(self).__name__
            raise AttributeError(f"{kind!r} object has no attribute {name!r}.{hint}")


def drop_neutral(values: Mapping[str, Any], missing: Missing) -> tuple[dict[str, Any], list[str]]:
    """`values` without entries that ask for nothing, and a sentence for each that asks for more.

    Entries that `missing` does not list are kept.
    """
    kept, refused = {}, []
    for name, value in values.items():
        if name not in missing:
            kept[name] = value
            continue
        neutral, advice = missing[name]
        if neutral and not any(_same(value, one) for one in neutral):
            shown = f"{name}={value!r}" if isinstance(value, PLAIN) else name
            refused.append(f"{shown} is not offered. {advice}".rstrip())
    return kept, refused


def _same(value: Any, neutral: Any) -> bool:
    return value is neutral or (isinstance(value, PLAIN) and bool(value == neutral))
