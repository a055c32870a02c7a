"""Every variant against the reference numbers: inner values, outputs, losses, gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rfdetr.model.criterion import build_criterion
from rfdetr.model.network import RFDETRNetwork
from rfdetr.model.postprocess import PostProcess
from tests.unit.model.parity_case import (
    compare,
    config,
    expected,
    fill,
    flat_outputs,
    gradients,
    manifest,
    matches,
    network,
    run,
)

SMALL = ["tiny", "tiny-c3", "tiny-ms", "tiny-reg", "tiny-seg", "tiny-eps"]
LARGE = ["nano", "base", "seg-nano", "large-deprecated"]
VARIANTS = [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)]
INFORMATIVE = "position_"  # the sine map of the backbone, which no layer reads


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_equals_the_reference(variant: str) -> None:
    model, numbers = network(variant), expected(variant)
    for name, case in manifest(variant)["cases"].items():
        check = _check_training if case["mode"] == "train" else _check_eval
        actual = check(model, variant, name, case)
        assert compare.compare(actual, numbers, name), f"{variant}/{name}"
        missing = [
            key
            for key in numbers
            if key.startswith(name + "/") and compare.derive(actual, key[len(name) + 1 :]) is None
        ]
        informative = (f"{name}/{INFORMATIVE}", f"{name}/post/")
        assert not [key for key in missing if not key.startswith(informative)]


def _check_eval(model: RFDETRNetwork, variant: str, name: str, case: Any) -> dict[str, Any]:
    model.eval()
    with torch.no_grad():
        outputs, inner = run(model, case)
    _check_detections(variant, name, case, outputs)
    return {**inner, **flat_outputs(outputs)}


def _check_detections(variant: str, name: str, case: Any, outputs: dict[str, Any]) -> None:
    postprocess = PostProcess(config(variant).num_select)
    results = postprocess(outputs, torch.tensor(case["target_sizes"]))
    numbers = expected(variant)
    for i, result in enumerate(results):
        prefix = f"{name}/post/{i}/"
        wanted = {key: numbers[prefix + key] for key in ("scores", "labels", "boxes")}
        assert compare.compare_detections(result, wanted) == []
        if prefix + "mask_area" in numbers:
            areas = result["masks"].sum(dim=(1, 2, 3)).numpy()
            same = result["labels"].numpy() == wanted["labels"]  # near ties may swap rows
            assert same.mean() > 0.8
            off = np.abs(areas - numbers[prefix + "mask_area"])[same]
            assert (off <= 60 + 5e-3 * areas[same]).all()


def _check_training(model: RFDETRNetwork, variant: str, name: str, case: Any) -> dict[str, Any]:
    model.train()
    model.zero_grad(set_to_none=True)
    criterion = build_criterion(config(variant)).train()
    targets = fill.targets_of(case)
    outputs, inner = run(model, case)
    with fill.fixed_rand():
        losses = criterion(outputs, targets)
        found = matches(criterion.matcher, outputs, targets, config(variant).group_detr)
    total = sum(losses[key] * weight for key, weight in criterion.weight_dict.items())
    total.backward()
    grads = gradients(model)
    untrained = set(manifest(variant).get("no_gradient", []))
    names = {p["name"] for p in manifest(variant)["params"]}
    assert {key.removeprefix("grad/") for key in grads} == names - untrained
    norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in grads.values()]))
    return {
        **inner,
        **flat_outputs(outputs),
        **{f"loss/{key}": value for key, value in losses.items()},
        **{f"weight/{key}": torch.tensor(v) for key, v in criterion.weight_dict.items()},
        **found,
        **grads,
        "loss/total": total,
        "grad_total": norm,
        "num_queries": torch.tensor(outputs["pred_logits"].shape[1]),
    }
