"""Trains the demo's starting checkpoint, on the seven digits that are not classes of the demo.

    python -m infra.start_weights weights/start.pth

Takes the model from params.yaml, generates a demo dataset of the digits 2, 3, 5, 6, 7, 8 and 9,
trains, and writes the checkpoint in the legacy format (`model` and an `args` namespace), so that
the convert stage has something to convert. Takes about ten minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from flows.config.params import load_params
from rfdetr.checkpoints.safe_io import load_file, save_file
from rfdetr.config import TrainConfig
from rfdetr.data.demo import build_demo
from rfdetr.training import RFDETRDataModule, RFDETRModule, build_trainer

OTHER_DIGITS = (2, 3, 5, 6, 7, 8, 9)
PUBLISHED = "rf-detr-nano.pth"  # identifies the variant in legacy files


def train_start_weights(target: Path, *, images: int, epochs: int, seed: int) -> float:
    """Train and write `target`; returns the last validation mAP."""
    settings = load_params()
    with tempfile.TemporaryDirectory(prefix="rfdetr-start-") as folder:
        data = build_demo(
            Path(folder) / "data", seed=seed, classes=OTHER_DIGITS, train=images, progress=False
        )
        model_config = settings.model.config(num_classes=len(OTHER_DIGITS))
        fields = {**settings.fit.train_fields(), "epochs": epochs, "seed": seed}
        train_config = TrainConfig(
            dataset_dir=str(data),
            output_dir=str(Path(folder) / "output"),
            batch_size=settings.fit.batch_size,
            grad_accum_steps=1,
            num_workers=settings.runtime.num_workers,
            tensorboard=False,
            progress_bar="tqdm" if sys.stderr.isatty() else None,
            **fields,
        )
        module = RFDETRModule(model_config, train_config)
        datamodule = RFDETRDataModule(model_config, train_config)
        trainer = build_trainer(train_config, model_config)
        trainer.fit(module, datamodule)
        best = load_file(Path(folder) / "output" / "checkpoint_best_total.pth")
    settings_on_file = {**best["model_config"], **best["args"], "pretrain_weights": PUBLISHED}
    settings_on_file |= {"dataset_dir": "data", "output_dir": "output"}  # temporary folders
    legacy = {"model": best["model"], "args": argparse.Namespace(**settings_on_file)}
    save_file(legacy, target)
    return max(
        float(value)
        for key, value in trainer.callback_metrics.items()
        if key in ("val/mAP_50_95", "val/ema_mAP_50_95")
    )


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m infra.start_weights", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("target", type=Path)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=11)
    options = parser.parse_args(arguments)
    best = train_start_weights(
        options.target, images=options.images, epochs=options.epochs, seed=options.seed
    )
    size = options.target.stat().st_size / 1e6
    print(f"{options.target}: {size:.1f} MB, last validation mAP {best:.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
