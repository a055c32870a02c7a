"""Profiles of images, and the alarms of their comparison: none by chance, one for each shift."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from rfdetr.detector import RFDETR
from rfdetr.errors import ConfigError, InputError
from rfdetr.monitoring.drift import ALARM_THRESHOLDS, compare
from rfdetr.monitoring.drift_plot import draw_drift
from rfdetr.monitoring.drift_report import DriftReport
from rfdetr.monitoring.image_profile import ImageProfile, embedded_images
from rfdetr.monitoring.profiling import profile_images
from tests.datasets import scenes
from tests.unit.detector.small import small

Change = Callable[[Image.Image], Image.Image]


@pytest.fixture(scope="module")
def detector() -> RFDETR:
    import torch

    torch.manual_seed(0)
    return small(num_classes=3)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write(tmp_path_factory.mktemp("reference"), 120, seed=0)


@pytest.fixture(scope="module")
def reference(detector: RFDETR, files: list[Path]) -> ImageProfile:
    return profile_images(detector, files)


def write(
    folder: Path, count: int, *, seed: int, classes: int = 3, change: Change | None = None
) -> list[Path]:
    paths = []
    for number, scene in enumerate(scenes(count, classes, seed=seed)):
        paths.append(folder / f"{number:04d}.png")
        (change or (lambda image: image))(scene.image).save(paths[-1])
    return paths


def synthetic(seed: int, images: int = 200, **shift: Any) -> ImageProfile:
    """A profile as a trained model would give it; every shift is a change of one distribution."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(shift.get("boxes", 3.0), images)
    total = int(counts.sum())
    scores = rng.beta(*shift.get("scores", (6.0, 2.0)), total)
    features = {
        "brightness": rng.normal(shift.get("brightness", 0.5), 0.1, images),
        "contrast": rng.normal(0.2, 0.05, images),
        "sharpness": rng.normal(0.1, 0.02, images),
        "image_size": np.full(images, shift.get("image_size", 9.0)),
        "image_shape": rng.choice([0.0, 0.5], images),
        "best_score": rng.beta(8, 2, images),
        "boxes_per_image": counts,
    }
    return ImageProfile(
        files=tuple(f"{i}.jpg" for i in range(images)),
        features={name: np.asarray(values, np.float32) for name, values in features.items()},
        owner=np.repeat(np.arange(images, dtype=np.int32), counts),
        scores=scores.astype(np.float16),
        sizes=rng.gamma(4, shift.get("size", 0.05), total).astype(np.float16),
        labels=rng.choice(3, total, p=shift.get("classes", (0.5, 0.3, 0.2))).astype(np.int32),
        embeddings=rng.normal(shift.get("mean", 0.0), 1, (len(embedded_images(images)), 32)).astype(
            np.float16
        ),
        held_out=np.ones(images, dtype=bool),
        class_names=("a", "b", "c"),
    )


def test_a_profile_survives_its_file(reference: ImageProfile, tmp_path: Path) -> None:
    reference.save(tmp_path / "profile.npz")
    loaded = ImageProfile.load(tmp_path / "profile.npz")
    for field in dataclasses.fields(ImageProfile):
        one, two = getattr(reference, field.name), getattr(loaded, field.name)
        if isinstance(one, np.ndarray):
            np.testing.assert_array_equal(one, two)
            assert one.dtype == two.dtype
        elif field.name == "features":
            assert one.keys() == two.keys()
            assert all((one[name] == two[name]).all() for name in one)
        else:
            assert one == two
    assert compare(reference, loaded).alarms == []


def test_facts_of_known_images(detector: RFDETR, tmp_path: Path) -> None:
    Image.new("RGB", (128, 32), (255, 255, 255)).save(tmp_path / "white.png")
    Image.new("L", (64, 64), 0).save(tmp_path / "black.png")
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    found = profile_images(
        detector, [tmp_path / f"{name}.png" for name in ("white", "black", "stripes")]
    )
    facts = {name: values.tolist() for name, values in found.features.items()}
    assert facts["brightness"] == pytest.approx([1, 0, 0.5], abs=1e-4)
    assert facts["contrast"] == pytest.approx([0, 0, 0.5], abs=1e-2)
    assert facts["sharpness"] == pytest.approx([0, 0, 2], abs=1e-4)
    assert facts["image_size"] == [6, 6, 6]
    assert facts["image_shape"] == [2, 0, 0]
    assert found.embeddings.shape == (3, 48)


def test_detections_are_those_of_predict(detector: RFDETR, files: list[Path]) -> None:
    """Half of the class prior's score is below the floor, so the head is made bolder first."""
    head = detector.model.model.class_embed.bias
    before = head.detach().clone()
    head.data += 4.0
    try:
        found = profile_images(detector, files[:5], batch_size=2)
        expected = detector.predict([str(file) for file in files[:5]], threshold=0.3)
    finally:
        head.data.copy_(before)
    assert isinstance(expected, list)
    counts = [len(detections) for detections in expected]
    assert found.features["boxes_per_image"].tolist() == counts
    assert sum(counts) > 0
    boxes = expected[0].xyxy / [96, 64, 96, 64]
    sides = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1))
    first = (found.owner == 0) & (found.scores >= 0.3)
    np.testing.assert_allclose(found.sizes[first], sides, rtol=2e-3, atol=1e-3)
    np.testing.assert_array_equal(found.labels[first], expected[0].class_id)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_fresh_images_of_the_same_kind_give_no_alarm(
    detector: RFDETR, reference: ImageProfile, tmp_path: Path, seed: int
) -> None:
    recent = profile_images(detector, write(tmp_path, 40, seed=seed))
    assert compare(reference, recent).alarms == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda image: image.point(lambda level: level * 0.4), {"embedding", "brightness"}),
        (lambda image: image.filter(ImageFilter.GaussianBlur(2)), {"sharpness"}),
        (lambda image: image.resize((384, 256)), {"image_size"}),
        (lambda image: image.resize((64, 96)), {"image_shape"}),
    ],
    ids=["dark", "blurred", "large", "upright"],
)
def test_other_looking_images_alarm(
    detector: RFDETR, reference: ImageProfile, tmp_path: Path, change: Change, expected: set[str]
) -> None:
    recent = profile_images(detector, write(tmp_path, 40, seed=1, change=change))
    assert expected <= set(compare(reference, recent).alarms)


def test_other_objects_on_the_same_background_alarm(
    detector: RFDETR, reference: ImageProfile, tmp_path: Path
) -> None:
    """Yellow and purple shapes, of which the reference has none; the encoder is not trained."""
    scenes_ = [s for s in scenes(150, 5, seed=1) if s.shapes and min(x.label for x in s.shapes) > 2]
    for number, scene in enumerate(scenes_):
        scene.image.save(tmp_path / f"{number}.png")
    recent = profile_images(detector, sorted(tmp_path.iterdir()))
    assert len(recent) >= 20
    assert compare(reference, recent).drifted


@pytest.mark.parametrize(
    ("shift", "expected"),
    [
        ({"boxes": 6.0}, {"boxes_per_image"}),
        ({"scores": (3.0, 5.0)}, {"scores"}),
        ({"size": 0.02}, {"box_size"}),
        ({"classes": (0.1, 0.3, 0.6)}, {"classes"}),
        ({"brightness": 0.2}, {"brightness"}),
        ({"image_size": 11.0}, {"image_size"}),
        ({"mean": 0.7}, {"embedding"}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("images", [60, 500])
def test_every_measure_finds_its_shift_and_no_other_does(
    shift: dict[str, Any], expected: set[str], images: int
) -> None:
    alarms = set(compare(synthetic(0), synthetic(1, images, **shift)).alarms)
    follows = {"boxes_per_image", "box_size"} if "scores" in shift else set()
    assert expected <= alarms <= expected | follows


def test_chance_alone_alarms_in_less_than_one_of_fifty_checks() -> None:
    """Samples of all sizes, also far smaller than the reference."""
    reference = synthetic(0)
    reports = [compare(reference, synthetic(100 + i, (10, 30, 100, 400)[i % 4])) for i in range(50)]
    assert sum(report.drifted for report in reports) <= 1


def test_equal_profiles_give_equal_reports_that_survive_json() -> None:
    reference, recent = synthetic(0), synthetic(1, brightness=0.2)
    report = compare(reference, recent)
    assert compare(reference, recent) == report
    assert DriftReport.model_validate_json(report.model_dump_json()) == report
    assert "**Drift: brightness.**" in report.to_markdown()
    measure = next(m for m in report.measures if m.name == "brightness")
    assert measure.reference == pytest.approx(0.5, abs=0.05)
    assert measure.recent == pytest.approx(0.2, abs=0.05)
    assert {m.name for m in report.measures} == set(ALARM_THRESHOLDS)


def test_thresholds_are_the_users() -> None:
    reference, recent = synthetic(0), synthetic(1, brightness=0.2)
    assert not compare(reference, recent, {"brightness": None}).drifted
    assert not compare(reference, recent, {"brightness": 50.0}).drifted
    with pytest.raises(ConfigError, match=r"brightnes.*known: embedding, brightness"):
        compare(reference, recent, {"brightnes": 1.0})


def test_scores_are_compared_with_images_that_were_not_trained_on() -> None:
    """The first half of the reference was fitted and has far better scores than recent images."""
    fitted, unseen = synthetic(0, 100), synthetic(1, 100, scores=(3.0, 5.0))
    both = dataclasses.replace(
        fitted,
        files=fitted.files + unseen.files,
        features={n: np.concatenate([v, unseen.features[n]]) for n, v in fitted.features.items()},
        owner=np.concatenate([fitted.owner, unseen.owner + 100]),
        embeddings=np.concatenate([fitted.embeddings, unseen.embeddings]),
        held_out=np.repeat([False, True], 100),
        **{
            name: np.concatenate([getattr(fitted, name), getattr(unseen, name)])
            for name in ("scores", "sizes", "labels")
        },
    )
    recent = synthetic(2, 100, scores=(3.0, 5.0))
    assert compare(both, recent).alarms == []
    everything = dataclasses.replace(both, held_out=np.ones(200, dtype=bool))
    assert "scores" in compare(everything, recent).alarms


def test_an_outlier_is_named_first() -> None:
    recent = synthetic(1, 40)
    recent.embeddings[7] += 5
    assert compare(synthetic(0), recent).unusual[0] == "7.jpg"


def test_detections_may_be_missing_on_either_side() -> None:
    some, none = synthetic(0), synthetic(1, boxes=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for pair in ((some, none), (none, some)):
            assert "boxes_per_image" in compare(*pair).alarms
        assert compare(none, synthetic(2, boxes=0.0)).alarms == []


def test_profiles_of_different_models_are_refused() -> None:
    other = dataclasses.replace(synthetic(1), class_names=("a", "b"))
    with pytest.raises(InputError, match="different models"):
        compare(synthetic(0), other)


def test_the_largest_profile_is_small(tmp_path: Path) -> None:
    """512 images with 40 boxes each of the widest encoder, random and so hardly compressible."""
    rng = np.random.default_rng(0)
    profile = dataclasses.replace(
        synthetic(0, 512),
        owner=np.repeat(np.arange(512, dtype=np.int32), 40),
        scores=rng.random(512 * 40).astype(np.float16),
        sizes=rng.random(512 * 40).astype(np.float16),
        labels=rng.integers(0, 90, 512 * 40, dtype=np.int32),
        embeddings=rng.normal(size=(256, 1024)).astype(np.float16),
    )
    profile.save(tmp_path / "profile.npz")
    assert (tmp_path / "profile.npz").stat().st_size < 1_000_000


def test_files_that_are_not_images_are_skipped(
    detector: RFDETR, files: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    found = profile_images(detector, [broken, *files[:3], tmp_path / "missing.png"])
    assert found.files == tuple(file.name for file in files[:3])
    assert found.unreadable == ("broken.jpg", "missing.png")
    with pytest.raises(InputError, match="None of the 1 files"):
        profile_images(detector, [broken])
    with pytest.raises(InputError, match="not an image profile"):
        ImageProfile.load(broken)


def test_a_large_set_is_sampled_evenly(detector: RFDETR, files: list[Path]) -> None:
    found = profile_images(detector, files, limit=5)
    assert found.files == ("0000.png", "0030.png", "0060.png", "0089.png", "0119.png")


def test_the_image_of_a_report(tmp_path: Path) -> None:
    reference, recent = synthetic(0), synthetic(1, boxes=0.0)
    draw_drift(reference, recent, compare(reference, recent), tmp_path / "drift.png")
    with Image.open(tmp_path / "drift.png") as image:
        assert min(image.size) > 300
    assert (tmp_path / "drift.png").stat().st_size < 100_000
