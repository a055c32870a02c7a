"""Batches, and the errors for images and targets that cannot be used."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rfdetr.data.batch import NestedTensor, collate, normalise, pad_images
from rfdetr.errors import InputError
from rfdetr.model.criterion import build_criterion
from rfdetr.model.network import RFDETRNetwork
from rfdetr.model.postprocess import PostProcess
from tests.unit.model.small import images, small_config, small_network, targets


@pytest.fixture(scope="module")
def network() -> RFDETRNetwork:
    return small_network().eval()


def test_collate_pads_to_the_block_and_leaves_targets_alone() -> None:
    marks = [{"image_id": 1}, {"image_id": 2}]
    parts = [torch.ones(3, 30, 40), torch.ones(3, 50, 20)]
    batch, kept = collate(list(zip(parts, marks, strict=True)), block_size=32)
    assert batch.tensors.shape == (2, 3, 64, 64)
    assert batch.mask is not None
    assert (~batch.mask).sum(dim=(1, 2)).tolist() == [30 * 40, 50 * 20]
    assert batch.tensors.sum() == 3 * (30 * 40 + 50 * 20)
    assert batch.padded
    assert kept == marks


def test_a_batch_of_equal_images_is_known_to_be_unpadded(network: RFDETRNetwork) -> None:
    batch = pad_images(list(images()), 32)
    assert not batch.padded
    assert not batch.to("cpu").padded
    mask = torch.zeros(len(batch), *batch.tensors.shape[2:], dtype=torch.bool)
    plain, masked = network(images()), network(NestedTensor(batch.tensors, mask))
    for name in ("pred_logits", "pred_boxes"):
        assert torch.allclose(network(batch)[name], plain[name])
        assert torch.allclose(masked[name], plain[name], atol=1e-5)


def test_pixels_of_a_loader_are_network_input_as_they_are(network: RFDETRNetwork) -> None:
    pixels = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    found = network(NestedTensor(pixels, None))["pred_logits"]
    assert torch.equal(found, network(normalise(pixels))["pred_logits"])


def test_the_mask_changes_the_selected_boxes(network: RFDETRNetwork) -> None:
    image = images()
    image[:, :, :, 64:] = 0
    mask = torch.zeros(2, 96, 96, dtype=torch.bool)
    mask[:, :, 64:] = True
    chosen = network(NestedTensor(image, mask))["enc_outputs"]["pred_boxes"]
    assert not torch.allclose(chosen, network(image)["enc_outputs"]["pred_boxes"])


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((1, 3, 90, 96), "multiples of patch_size.*= 32.*96 x 96"),
        ((1, 1, 96, 96), "RGB"),
        ((1, 4, 96, 96), "RGB"),
        ((3, 96, 96), "batch"),
        ((0, 3, 96, 96), "no images"),
        ((1, 3, 0, 96), "multiples"),
    ],
)
def test_images_that_do_not_fit(network: RFDETRNetwork, shape: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        network(torch.zeros(shape))


def test_batches_that_cannot_be_built(network: RFDETRNetwork) -> None:
    with pytest.raises(InputError, match="no images"):
        collate([])
    with pytest.raises(InputError, match=r"image 1: \(1, 8, 8\)"):
        pad_images([torch.zeros(3, 8, 8), torch.zeros(1, 8, 8)])
    with pytest.raises(InputError, match="does not fit the images"):
        network(NestedTensor(images(), torch.zeros(2, 96, 64, dtype=torch.bool)))


def _change(name: str, value: Any) -> list[dict[str, torch.Tensor]]:
    made = targets((2, 1))
    made[0][name] = value
    return made


NAN = float("nan")


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (_change("labels", torch.tensor([0, 6])), "image 0.*target 1: label 6.*0..5.*num_classes"),
        (_change("labels", torch.tensor([-1, 0])), "label -1"),
        (_change("boxes", torch.tensor([[NAN, 0, 1, 1], [0.5, 0.5, 0.1, 0.1]])), "non-finite"),
        (_change("boxes", torch.tensor([[0.5, 0.5, -0.1, 1], [0, 0, 1, 1]])), "negative size"),
        (_change("boxes", torch.zeros(1, 4)), r"boxes \(1, 4\), not \(2, 4\)"),
        (_change("labels", torch.tensor([0.0, 1.0])), "integers of shape"),
        (targets((2,)), "1 targets for a batch of 2"),
        ([{"labels": torch.zeros(0)}, {}], "target 0 lacks boxes; target 1 lacks labels, boxes"),
    ],
)
def test_targets_that_do_not_fit(network: RFDETRNetwork, wrong: Any, text: str) -> None:
    outputs = network(images())
    with pytest.raises(InputError, match=text):
        build_criterion(small_config()).eval()(outputs, wrong)


def test_every_wrong_target_is_named_at_once(network: RFDETRNetwork) -> None:
    wrong = targets((2, 1))
    wrong[0]["labels"][:] = 50
    wrong[1]["boxes"][:] = NAN
    with pytest.raises(InputError) as caught:
        build_criterion(small_config()).eval()(network(images()), wrong)
    assert str(caught.value).count("of the batch") == 3


def test_the_surplus_output_is_a_valid_label(network: RFDETRNetwork) -> None:
    """Files with COCO ids use row 90 of 91; only labels above that are refused."""
    made = _change("labels", torch.tensor([0, 5]))
    losses = build_criterion(small_config()).eval()(network(images()), made)
    assert losses["loss_ce"].isfinite()


def test_missing_masks_are_reported() -> None:
    model = small_network(masks=True).eval()
    with pytest.raises(InputError, match="segmentation model needs masks"):
        build_criterion(model.config).eval()(model(images()), targets())


def test_target_masks_of_different_sizes() -> None:
    model = small_network(masks=True).train()
    made = targets(masks=True)
    made[1]["masks"] = torch.nn.functional.pad(made[1]["masks"], (0, 16))
    losses = build_criterion(model.config).train()(model(images()), made)
    assert all(value.isfinite() for value in losses.values())


def test_more_targets_than_queries() -> None:
    model = small_network(num_queries=2).train()
    losses = build_criterion(model.config).train()(model(images()), targets((5, 1)))
    assert losses["loss_bbox"].isfinite()


def test_non_finite_predictions_are_still_matched() -> None:
    model = small_network().train()
    outputs = model(images())
    outputs["pred_logits"] = outputs["pred_logits"] * NAN
    losses = build_criterion(model.config).train()(outputs, targets())
    assert not losses["loss_ce"].isfinite()
    assert losses["loss_bbox"].isfinite()


def test_postprocess_refuses_sizes_and_masks_that_do_not_fit() -> None:
    model = small_network(masks=True).train()
    outputs = model(images())
    with pytest.raises(InputError, match="target_sizes"):
        PostProcess(5)(outputs, torch.tensor([[10, 10]]))
    with pytest.raises(InputError, match="eval"):
        PostProcess(5)(outputs, torch.tensor([[10, 10], [10, 10]]))


@pytest.mark.parametrize("threshold", [None, 0.0, 0.5])
def test_a_nan_score_is_not_a_detection_and_displaces_none(threshold: float | None) -> None:
    logits = torch.tensor([[[2.0, NAN], [NAN, NAN], [-30.0, 1.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [NAN] * 4, [0.3, 0.3, 0.1, 0.1]]])
    masks = torch.ones(1, 3, 4, 4)
    outputs: Any = {"pred_logits": logits, "pred_boxes": boxes, "pred_masks": masks}
    (found,) = PostProcess(2)(outputs, torch.tensor([[100, 100]]), threshold)
    assert found["labels"].tolist() == [0, 1]
    assert found["scores"].tolist() == torch.tensor([2.0, 1.0]).sigmoid().tolist()
    assert found["boxes"].isfinite().all()
    assert found["masks"].shape == (2, 1, 100, 100)
