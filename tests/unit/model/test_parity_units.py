"""Single functions, the criterion on given predictions, and postprocessing, by the numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rfdetr.model.backbone import join_windows, resize_pos_embed, split_windows
from rfdetr.model.boxes import cxcywh_to_xyxy, iou_and_giou, xyxy_to_cxcywh
from rfdetr.model.criterion import SetCriterion
from rfdetr.model.decoder import sine_embedding
from rfdetr.model.deformable import sample_levels
from rfdetr.model.matcher import HungarianMatcher
from rfdetr.model.network import resize_linear
from rfdetr.model.postprocess import PostProcess
from rfdetr.model.selection import make_proposals
from tests.unit.model.parity_case import compare, expected, fill, matches

UNITS = expected("units")
CRITERION = expected("criterion")
POST = expected("postprocess")
CASES = sorted({key.split("/")[0] for key in CRITERION})


def unit(name: str) -> Tensor:
    return torch.from_numpy(UNITS[name])


def shapes(name: str) -> list[tuple[int, int]]:
    return [(int(h), int(w)) for h, w in UNITS[name]]


def test_sine_embedding_of_references() -> None:
    out = sine_embedding(unit("reference_embedding/in"), 16)
    assert compare.compare({"out": out}, UNITS, "reference_embedding")


def test_proposals_with_padding_over_two_levels() -> None:
    levels = shapes("proposals/in/shapes")
    flat = unit("proposals/in/mask")
    parts = flat.split([h * w for h, w in levels], dim=1)
    masks = [part.reshape(-1, h, w) for part, (h, w) in zip(parts, levels, strict=True)]
    memory = unit("proposals/in/memory")
    boxes, dropped = make_proposals(levels, masks, memory)
    assert dropped is not None
    kept = memory.masked_fill(dropped[..., None], 0.0)
    assert compare.compare({"out/memory": kept, "out/boxes": boxes}, UNITS, "proposals")


def test_large_grid_drops_its_outer_ring() -> None:
    _, dropped = make_proposals([(60, 3)], None, torch.zeros(1))
    assert dropped is not None
    assert (~dropped == unit("proposals/out/valid_60x3")).all()


@pytest.mark.parametrize("side", [49, 50, 51])
def test_skipping_the_ring_check_changes_nothing(side: int) -> None:
    """Unpadded grids up to 49 cells per side have no token outside the limits, with either path."""
    boxes, dropped = make_proposals([(side, side)], None, torch.zeros(1))
    padding = [torch.zeros(1, side, side, dtype=torch.bool)]
    with_mask, same = make_proposals([(side, side)], padding, torch.zeros(1))
    assert torch.equal(boxes, with_mask)
    assert same is not None
    assert (dropped is None) == (not same.any()) == (side < 50)


def test_deformable_sampling() -> None:
    value = unit("deformable/in/value").permute(0, 3, 1, 2)
    out = sample_levels(
        value,
        shapes("deformable/in/shapes"),
        unit("deformable/in/locations"),
        unit("deformable/in/weights"),
    )
    assert compare.compare({"out": out}, UNITS, "deformable")


def test_position_table_resampling() -> None:
    table = unit("position_table/in")
    found = {
        f"out/{h}x{w}": resize_pos_embed(table, h, w) for h, w in [(7, 4), (5, 5), (3, 8), (5, 4)]
    }
    found["out/checkpoint_7"] = resize_pos_embed(table, 7, 7)
    assert compare.compare(found, UNITS, "position_table", strict=False)
    assert resize_pos_embed(table, 5, 5) is table


def test_window_order_and_its_inverse() -> None:
    grid = torch.stack([torch.arange(24.0), torch.arange(24.0) + 100]).reshape(2, 4, 6, 1)
    windows = split_windows(grid, 2)
    assert np.array_equal(windows[..., 0].numpy(), UNITS["windows/out"][:, 3:])
    assert torch.equal(join_windows(windows, 2, 4, 6), grid)


def test_iou_and_giou() -> None:
    a, b = unit("boxes/in/a"), unit("boxes/in/b")
    iou, giou = iou_and_giou(cxcywh_to_xyxy(a)[:, None], cxcywh_to_xyxy(b)[None])
    distance = (a[:, None] - b[None]).abs().sum(-1)
    found = {"out/iou": iou, "out/giou": giou, "out/l1": distance}
    assert compare.compare(found, UNITS, "boxes")
    assert torch.allclose(xyxy_to_cxcywh(cxcywh_to_xyxy(a)), a, atol=1e-6)


def test_class_head_is_tiled_or_truncated() -> None:
    weight, bias = unit("class_head/in/weight"), unit("class_head/in/bias")
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": bias})
    for rows in (2, 7, 9):
        resized = resize_linear(layer, rows)
        assert torch.equal(resized.weight, unit(f"class_head/out/{rows}/weight"))
        assert torch.equal(resized.bias, unit(f"class_head/out/{rows}/bias"))


def _unpack(packed: np.ndarray, shape: np.ndarray) -> Tensor:
    bits = np.unpackbits(packed, axis=-1)[..., : shape[-1]]
    return torch.from_numpy(bits.reshape(shape).astype(bool))


def _part(case: str, prefix: str, leaves: dict[str, Tensor]) -> dict[str, Any]:
    """Predictions of one layer; every leaf records its gradient under the reference name."""

    def leaf(name: str) -> Tensor:
        value = torch.from_numpy(CRITERION[f"{case}/in/{prefix}{name}"]).requires_grad_()
        leaves[f"grad/{prefix}{name}"] = value
        return value

    part: dict[str, Any] = {"pred_logits": leaf("pred_logits"), "pred_boxes": leaf("pred_boxes")}
    if f"{case}/in/{prefix}pred_masks" in CRITERION:
        part["pred_masks"] = leaf("pred_masks")
    elif f"{case}/in/{prefix}mask_bias" in CRITERION:
        names = ("spatial_features", "query_features", "bias")
        part["pred_masks"] = {name: leaf(f"mask_{name}") for name in names}
    return part


def _targets(case: str) -> list[dict[str, Tensor]]:
    targets = []
    for i in range(2):
        prefix = f"{case}/in/target_{i}/"
        target = {
            "boxes": torch.from_numpy(CRITERION[prefix + "boxes"]),
            "labels": torch.from_numpy(CRITERION[prefix + "labels"]).long(),
        }
        if prefix + "masks" in CRITERION:
            target["masks"] = _unpack(
                CRITERION[prefix + "masks"], CRITERION[prefix + "masks_shape"]
            )
        targets.append(target)
    return targets


@pytest.mark.parametrize("case", CASES)
def test_criterion(case: str) -> None:
    leaves: dict[str, Tensor] = {}
    outputs = _part(case, "", leaves)
    outputs["aux_outputs"] = [_part(case, "aux_0/", leaves)]
    outputs["enc_outputs"] = _part(case, "enc/", leaves)
    weights = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}
    if "pred_masks" in outputs:
        weights |= {"loss_mask_ce": 5.0, "loss_mask_dice": 5.0}
    weights = {n + s: w for s in ("", "_0", "_enc") for n, w in weights.items()}
    groups = int(CRITERION[f"{case}/in/group_detr"])
    criterion = SetCriterion(HungarianMatcher(), weights, group_detr=groups)
    criterion.train(bool(CRITERION[f"{case}/in/training"]))
    targets = _targets(case)
    with fill.fixed_rand():
        losses = criterion(outputs, targets)
        found = matches(criterion.matcher, outputs, targets, groups if criterion.training else 1)
    total = sum(losses[name] * weight for name, weight in weights.items())
    total.backward()
    actual = {
        **found,
        **{f"loss/{name}": value for name, value in losses.items()},
        **{f"weight/{name}": torch.tensor(value) for name, value in weights.items()},
        **{name: leaf.grad for name, leaf in leaves.items()},
        "loss/total": total,
    }
    assert compare.compare(actual, CRITERION, case)
    missing = [
        key
        for key in CRITERION
        if key.startswith(case + "/") and key.removeprefix(case + "/") not in actual
    ]
    assert all("/in/" in key or key.endswith("/num_boxes") for key in missing)


@pytest.mark.parametrize(("name", "select"), [("boxes_20", 20), ("masks_9", 9), ("all_1000", 1000)])
def test_postprocess(name: str, select: int) -> None:
    outputs = {key: torch.from_numpy(POST[f"in/{key}"]) for key in ("pred_logits", "pred_boxes")}
    if name.startswith("masks"):
        outputs["pred_masks"] = torch.from_numpy(POST["in/pred_masks"])
    results = PostProcess(select)(outputs, torch.from_numpy(POST["in/target_sizes"]))
    for i, result in enumerate(results):
        prefix = f"{name}/{i}/"
        for key in ("scores", "labels", "boxes"):
            want = torch.from_numpy(POST[prefix + key])
            assert torch.allclose(result[key].to(want.dtype), want, atol=1e-4), key
        if prefix + "masks" in POST:
            want = _unpack(POST[prefix + "masks"], POST[prefix + "masks_shape"])
            assert result["masks"].shape == want.shape
            assert (result["masks"] != want).float().mean() < 1e-4
