"""Two gloo processes on the CPU."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.datasets import make_roboflow
from tests.unit.training.helpers import Run, tiny_masks, tiny_model, tiny_run, with_masks
from tests.unit.training.processes import group_is_gone, run, started, wait_for

DDP = {"strategy": "ddp", "devices": 2}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last validation and test images are shared unevenly; every second one has no object."""
    return make_roboflow(
        tmp_path_factory.mktemp("data"),
        splits={"train": 12, "valid": 5, "test": 3},
        background=2,
    )


def read(output: Path, stage: str) -> list[dict[str, float]]:
    return [json.loads((output / f"{stage}_{rank}.json").read_text()) for rank in (0, 1)]


def coco_metrics(metrics: dict[str, float], stage: str) -> dict[str, float]:
    """All metrics but the loss, which is normalised over the boxes of all processes."""
    return {k: v for k, v in metrics.items() if k.startswith(stage) and not k.endswith("loss")}


def check_run(dataset: Path, output: Path, *, masks: bool = False) -> None:
    best = {"pretrain_weights": str(output / "checkpoint_best_total.pth")}
    config = tiny_run(dataset, output / "single")
    if masks:
        single = Run(tiny_masks(**best), with_masks(config))
    else:
        single = Run(tiny_model(**best), config)
    for stage in ("validate", "test"):
        first, second = read(output, stage)
        assert first == second
        getattr(single.trainer, stage)(single.module, single.data)
        prefix = "val/" if stage == "validate" else "test/"
        alone = coco_metrics(single.metrics(), prefix)
        assert alone
        assert {k: v for k, v in coco_metrics(first, prefix).items() if "ema_" not in k} == alone
    assert (output / "last.ckpt").is_file()
    assert math.isfinite(read(output, "fit")[0]["train/loss"])


def job(dataset: Path, output: Path, **fields) -> dict:
    config = {"epochs": 1, "batch_size": 1, "eval_max_dets": 100, "use_ema": False}
    return {
        "dataset": dataset,
        "output": output,
        "trainer": DDP,
        "config": config | fields.pop("config", {}),
        "do": ["fit", "validate", "test"],
        **fields,
    }


def test_torchrun_trains_validates_and_tests_as_one_process(dataset, tmp_path):
    status, output = run(job(dataset, tmp_path, own_order_seed=True), torchrun=2)
    assert status == 0, output
    assert "find_unused_parameters" not in output
    check_run(dataset, tmp_path)
    check_order(tmp_path)


def check_order(output: Path) -> None:
    """Every image once, whatever seeds the ranks had, and different random numbers on each."""
    first, second = read(output, "order")
    assert len(first["seen"]) == len(second["seen"]) == 6
    assert len({*first["seen"], *second["seen"]}) == 12
    assert [first["seed"], second["seed"]] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn", "auto"])
def test_lightning_launches_the_processes_itself(dataset, tmp_path, strategy):
    trainer = {"strategy": strategy, "devices": 2}
    do = ["fit"] if strategy == "ddp_spawn" else ["fit", "validate", "test"]
    config = {"use_ema": True, "multi_scale": True, "grad_accum_steps": 2, "run_test": True}
    status, output = run(job(dataset, tmp_path, trainer=trainer, do=do, config=config))
    assert status == 0, output
    assert (tmp_path / "checkpoint_best_total.pth").is_file()
    if do != ["fit"]:
        first, second = read(tmp_path, "validate")
        assert first == second
        assert "test/mAP_50_95" in read(tmp_path, "fit")[1]


@pytest.mark.slow
def test_a_split_smaller_than_the_number_of_processes(tmp_path):
    """One image for two ranks: one of them has no image to validate or test."""
    dataset = make_roboflow(tmp_path / "data", splits={"train": 1, "valid": 1, "test": 1})
    status, output = run(job(dataset, tmp_path / "out"), torchrun=2)
    assert status == 0, output
    check_run(dataset, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("background", [2, 6])
def test_masks_are_trained_and_scored_as_in_one_process(background, tmp_path):
    """Unequal loaders; with 6, most steps have a rank without labels."""
    splits = {"train": 12, "valid": 5, "test": 3}
    images = {"splits": splits, "background": background, "segmentation": True}
    dataset = make_roboflow(tmp_path / "data", **images)
    if background == 6:
        keep_objects_of_every_sixth_image(dataset / "train")
    status, output = run(job(dataset, tmp_path / "out", masks=True), torchrun=2)
    assert status == 0, output
    assert "val/segm_mAP_50_95" in read(tmp_path / "out", "validate")[1]
    check_run(dataset, tmp_path / "out", masks=True)


def keep_objects_of_every_sixth_image(folder: Path) -> None:
    file = folder / "_annotations.coco.json"
    document = json.loads(file.read_text())
    kept = {image["id"] for image in document["images"][::6]}
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] in kept]
    file.write_text(json.dumps(document))


@pytest.mark.slow
@pytest.mark.parametrize("torchrun", [0, 2])
def test_a_killed_rank_ends_all_processes_within_a_minute(dataset, tmp_path, torchrun):
    with started(job(dataset, tmp_path, kill_step=2), torchrun=torchrun) as process:
        wait_for(process, "step 2 rank")
        assert process.wait(timeout=60) != 0
        assert group_is_gone(process.pid, within=10)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all_ranks_with_the_image(dataset, tmp_path):
    status, output = run(job(dataset, tmp_path, nan_step=1), torchrun=2)
    assert status != 0
    assert "not finite at step 1" in output
    assert "Image ids of the batch" in output
    assert "The loss of another rank is not finite at step 1" in output


@pytest.mark.slow
def test_resume_on_another_number_of_devices(dataset, tmp_path):
    status, output = run(job(dataset, tmp_path, do=["fit"]), torchrun=2)
    assert status == 0, output
    config = tiny_run(dataset, tmp_path, epochs=2, batch_size=1)
    resumed = Run(tiny_model(), config).fit(tmp_path / "last.ckpt")
    assert resumed.trainer.current_epoch == 2
