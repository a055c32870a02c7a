"""Structure, initial weights, and the options of the network."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from rfdetr.checkpoints.legacy_names import to_legacy
from rfdetr.config import MODEL_CONFIGS
from rfdetr.errors import ConfigError
from rfdetr.model.backbone import resize_pos_embed
from rfdetr.model.criterion import _sum_background_loss, build_criterion
from rfdetr.model.encoder_block import draw_kept
from rfdetr.model.lora import DoRALinear, merge_adapters
from rfdetr.model.network import RFDETRNetwork
from tests.unit.model.parity_case import config, manifest
from tests.unit.model.small import images, small_config, small_network, targets, weighted

# parameters of the network and of its encoder, mask token included; entries of a legacy file
COUNTS = {
    "nano": (30_467_298, 21_821_184, 465),
    "small": (32_111_170, 21_993_216, 487),
    "medium": (33_687_458, 22_097_664, 509),
    "base": (32_174_530, 22_056_576, 487),
    "large": (33_933_218, 22_343_424, 509),
    "large-deprecated": (135_637_474, 86_580_480, 533),
    "seg-preview": (34_153_555, 21_968_640, 544),
    "seg-nano": (33_577_475, 21_730_560, 544),
    "seg-small": (33_711_107, 21_864_192, 544),
    "seg-medium": (35_694_259, 21_968_640, 572),
    "seg-large": (35_873_971, 22_148_352, 572),
    "seg-xlarge": (38_113_635, 22_509_312, 600),
    "seg-2xlarge": (38_648_163, 23_043_840, 600),
}


@pytest.mark.parametrize("variant", MODEL_CONFIGS)
def test_parameter_counts(variant: str) -> None:
    with torch.device("meta"):
        model = RFDETRNetwork(MODEL_CONFIGS[variant](pretrain_weights=None))
    token = model.encoder.mask_token.numel()
    total = sum(p.numel() for p in model.parameters()) + token
    encoder = sum(p.numel() for p in model.encoder.parameters()) + token
    assert (total, encoder, len(to_legacy(model.state_dict()))) == COUNTS[variant]


@pytest.mark.parametrize("variant", ["tiny", "tiny-reg", "tiny-ms", "tiny-seg", "nano", "base"])
def test_state_dict_has_the_order_and_shapes_of_legacy_files(variant: str) -> None:
    with torch.device("meta"):
        model = RFDETRNetwork(config(variant))
    found = [(name, list(t.shape)) for name, t in to_legacy(model.state_dict()).items()]
    assert found == [(p["name"], p["shape"]) for p in manifest(variant)["params"]]


def _like_uniform(weight: torch.Tensor, bound: float) -> bool:
    return bool(weight.abs().max() <= bound and weight.std() > 0.9 * bound / math.sqrt(3))


def test_initial_weights_of_the_encoder() -> None:
    encoder = small_network(encoder="dinov2_registers_windowed_small").encoder
    weights = [m.weight for m in encoder.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for weight in [*weights, encoder.pos_embed, encoder.cls_token]:
        assert weight.std().item() == pytest.approx(0.02, rel=0.4)
    biases = [m.bias for m in encoder.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert not any(bias.any() for bias in biases)
    assert not encoder.reg_token.any()
    assert not encoder.mask_token.any()
    for block in encoder.blocks:
        assert (block.ls1.gamma == 1).all()
        assert block.norm1.eps == 1e-6


def test_initial_weights_of_transformer_and_heads() -> None:
    model = small_network()
    width, heads = 32, 8
    layer = model.transformer.decoder.layers[0]
    assert _like_uniform(layer.self_attn.in_proj_weight, math.sqrt(6 / (4 * width)))
    assert _like_uniform(layer.linear1.weight, math.sqrt(6 / (width + 64)))
    assert _like_uniform(model.transformer.enc_output[2].weight, math.sqrt(6 / (2 * width)))
    assert not layer.self_attn.in_proj_bias.any()
    assert layer.linear1.bias.any()
    attention = layer.cross_attn
    assert not attention.sampling_offsets.weight.any()
    assert not attention.attention_weights.weight.any()
    star = attention.sampling_offsets.bias.reshape(heads, 1, 2, 2)
    angle = 2 * math.pi * np.arange(heads) / heads
    ray = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    ray /= np.abs(ray).max(axis=-1, keepdims=True)
    assert np.allclose(star[:, 0, 0].detach().numpy(), ray, atol=1e-6)
    assert np.allclose(star[:, 0, 1].detach().numpy(), 2 * ray, atol=1e-6)
    assert torch.allclose(model.class_embed.bias, torch.tensor(-4.59512), atol=1e-5)
    assert not model.bbox_embed.layers[2].weight.any()
    assert not model.refpoint_embed.weight.any()
    assert model.query_feat.weight.std().item() == pytest.approx(1, rel=0.1)
    for group in range(3):
        copied = model.transformer.enc_out_class_embed[group].weight
        assert torch.equal(copied, model.class_embed.weight)
    outputs = model.transformer.enc_output
    assert not torch.equal(outputs[0].weight, outputs[1].weight)


def test_resize_head_changes_every_head() -> None:
    model = small_network()
    before = model.class_embed.weight.clone()
    model.resize_head(9)
    assert torch.equal(model.class_embed.weight, before[torch.arange(9) % 6])
    assert model(images())["pred_logits"].shape[-1] == 9
    model.resize_head(2)
    assert model(images())["enc_outputs"]["pred_logits"].shape[-1] == 2
    with pytest.raises(ConfigError):
        model.resize_head(0)


def test_drop_path_acts_in_training_only_and_can_be_set_later() -> None:
    model = small_network()
    model.train()
    still = model.encoder(images())[-1]
    model.set_drop_path([0.0, 0.5, 0.9, 0.9])
    assert not torch.allclose(model.encoder(images())[-1], still)
    assert torch.equal(model.eval().encoder(images())[-1], still)
    model.train().set_drop_path([0.0] * 4)
    assert torch.equal(model.encoder(images())[-1], still)
    with pytest.raises(ConfigError, match="4 blocks"):
        model.set_drop_path([0.1])
    built = small_network(drop_path=0.3).encoder
    assert built.drop_path_rates.tolist() == pytest.approx([0.3] * 4)
    assert "drop_path_rates" not in built.state_dict()


def test_drop_path_zeroes_branches_and_keeps_their_mean() -> None:
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3)
    kept = draw_kept(x, torch.tensor(0.25))
    assert kept is not None
    assert kept.shape == (4000, 1, 1)  # complete windows
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert kept.mean().item() == pytest.approx(1, abs=0.05)
    kept = draw_kept(x, torch.tensor(0.0))
    assert kept is not None
    assert (kept == 1).all()
    kept = draw_kept(x, torch.tensor(1.0))
    assert kept is not None
    assert not kept.any()
    assert draw_kept(x, None) is None


def test_an_annealed_drop_path_does_not_recompile() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    model = small_network().train()
    model.set_drop_path([0.0, 0.2, 0.3, 0.4])
    compiled = torch.compile(model.encoder, backend=count, fullgraph=True)
    for rate in (0.4, 0.3, 0.2, 0.1, 0.05, 0.01, 0.001):
        model.set_drop_path([0.0, *[rate] * 3])
        torch.manual_seed(1)
        found = compiled(images())[-1]
        torch.manual_seed(1)
        assert torch.allclose(found, model.encoder(images())[-1], atol=1e-5)
    assert len(graphs) == 1


@pytest.mark.parametrize("size", [(8, 8), (12, 5), (6, 9), (3, 3)])
def test_position_embeddings_equal_those_of_interpolate(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    table = torch.randn(1, 1 + 36, 7, requires_grad=True)
    grid = table[:, 1:].reshape(1, 6, 6, 7).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(grid, size, mode="bicubic", antialias=True)
    expected = expected.flatten(2).transpose(1, 2)
    weight = torch.randn_like(expected)
    with torch.inference_mode():
        resize_pos_embed(table, *size)  # what it caches must be usable in training
    with torch.autocast("cpu", torch.bfloat16):
        found = resize_pos_embed(table, *size)
    assert torch.equal(found[:, :1], table[:, :1])
    assert torch.allclose(found[:, 1:], expected, atol=1e-5)
    (want,) = torch.autograd.grad((expected * weight).sum(), table)
    (got,) = torch.autograd.grad((found[:, 1:] * weight).sum(), table)
    assert torch.allclose(got, want, atol=1e-5)


def test_compiled_training_survives_every_size_with_one_recompile() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    model = small_network().train()
    compiled = torch.compile(model.encoder, backend=count, fullgraph=True)
    for side in (64, 128, 160, 192, 224):
        image = images(side=side)
        assert torch.allclose(compiled(image)[-1], model.encoder(image)[-1], atol=1e-5)
    assert len(graphs) <= 2


def _gradients(model: RFDETRNetwork, counts: tuple[int, ...] = (2, 1)) -> dict[str, torch.Tensor]:
    masks = model.segmentation_head is not None
    criterion = build_criterion(model.config).train()
    model.train().zero_grad()
    torch.manual_seed(3)
    losses = criterion(model(images(len(counts))), targets(counts, masks=masks))
    weighted(losses, criterion.weight_dict).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_gradient_checkpointing_changes_no_gradient() -> None:
    plain, checkpointed = (
        _gradients(small_network()),
        _gradients(small_network(gradient_checkpointing=True)),
    )
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-5) for name in plain)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("counts", [(2, 1), (0, 3), (0, 0)])
def test_every_trainable_parameter_gets_a_gradient(masks: bool, counts: tuple[int, ...]) -> None:
    """DDP without find_unused_parameters hangs on a parameter without one."""
    model = small_network(masks=masks)
    grads = _gradients(model, counts)
    assert [name for name, grad in grads.items() if grad is None] == []
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n in model.state_dict() if ".blocks.3." in n}


def test_freeze_encoder_leaves_the_projector_trainable() -> None:
    model = small_network(freeze_encoder=True)
    assert not any(p.requires_grad for p in model.encoder.parameters())
    assert all(p.requires_grad for p in model.backbone[0].projector.parameters())


def test_adapters_start_as_identity_and_train_alone_in_the_encoder() -> None:
    plain, adapted = small_network().eval(), small_network(backbone_lora=True).eval()
    report = adapted.load_state_dict(plain.state_dict(), strict=False)
    assert not report.unexpected_keys
    assert all("lora_" in key or "magnitude" in key for key in report.missing_keys)
    image = images()
    assert torch.allclose(plain.encoder(image)[-1], adapted.encoder(image)[-1], atol=1e-5)
    trained = {
        n.rsplit(".", 1)[1] for n, p in adapted.encoder.named_parameters() if p.requires_grad
    }
    assert trained == {"lora_a", "lora_b", "magnitude"}
    grads = _gradients(adapted)
    assert grads["backbone.0.encoder.blocks.0.attn.qkv.lora_b"].abs().sum() > 0


def test_weights_without_adapters_reset_the_adapters_of_a_copy() -> None:
    plain = small_network().eval()
    adapted = copy.deepcopy(small_network(backbone_lora=True)).eval()
    for block in adapted.encoder.blocks:
        nn.init.normal_(block.attn.qkv.lora_b, std=0.1)
    adapted.load_state_dict(plain.state_dict(), strict=False)
    image = images()
    assert torch.allclose(plain.encoder(image)[-1], adapted.encoder(image)[-1], atol=1e-5)
    for block in adapted.encoder.blocks:
        nn.init.normal_(block.attn.qkv.lora_b, std=0.1)
    copied = copy.deepcopy(adapted)
    copied.load_state_dict(adapted.state_dict(), strict=True)
    assert torch.equal(copied.encoder(image)[-1], adapted.encoder(image)[-1])


def test_selection_heads_are_registered_under_their_legacy_names_only() -> None:
    """The selection module is not in the registry: its heads must stay those of the transformer."""
    model = copy.deepcopy(small_network())
    model.resize_head(9)
    model.to(torch.float64)
    transformer, selection = model.transformer, model.transformer.selection
    assert not any("selection" in name for name, _ in model.named_modules())
    for name, heads in selection.named_children():
        assert getattr(transformer, name) is heads
    assert {p.dtype for p in selection.parameters()} == {torch.float64}
    assert selection.enc_out_class_embed[2].out_features == 9


def test_merged_adapter_equals_the_adapted_layer() -> None:
    layer = DoRALinear.from_linear(nn.Linear(8, 12), parts=3)
    nn.init.normal_(layer.lora_b)
    merged = nn.functional.linear(torch.eye(8), layer.merged_weight(), layer.bias)
    assert torch.allclose(layer(torch.eye(8)), merged)
    assert torch.allclose(layer.merged_weight().norm(dim=1), layer.magnitude)


def test_merged_adapters_leave_a_plain_network() -> None:
    adapted = small_network(backbone_lora=True).eval()
    for block in adapted.encoder.blocks:
        nn.init.normal_(block.attn.qkv.lora_b, std=0.1)
    plain = small_network().eval()
    image = images()
    assert not torch.allclose(plain.encoder(image)[-1], adapted.encoder(image)[-1], atol=1e-3)
    merged = merge_adapters(adapted.state_dict())
    plain.load_state_dict(merged, strict=True)
    assert list(merged) == list(plain.state_dict())
    assert torch.allclose(plain.encoder(image)[-1], adapted.encoder(image)[-1], atol=1e-5)


def test_fewer_tokens_than_queries() -> None:
    model = small_network(num_queries=50).eval()
    outputs = model(images())
    assert outputs["pred_logits"].shape == (2, 50, 6)
    assert outputs["enc_outputs"]["pred_logits"].shape == (2, 36, 6)


@pytest.mark.parametrize("masks", [False, True])
def test_training_with_fewer_tokens_than_queries(masks: bool) -> None:
    """With fewer proposals than queries, both have losses and gradients."""
    model = small_network(masks=masks, num_queries=60, num_select=60).train()
    criterion = build_criterion(model.config).train()
    losses = criterion(model(images()), targets(masks=masks))
    assert set(criterion.weight_dict) < set(losses)
    total = weighted(losses, criterion.weight_dict)
    total.backward()
    assert total.isfinite()
    assert model.transformer.enc_out_class_embed[2].weight.grad.abs().max() > 0


def test_config_decides_the_loss_weights() -> None:
    weights = build_criterion(small_config(masks=True)).weight_dict
    assert len(weights) == 5 * 3
    assert weights["loss_mask_ce_enc"] == 5.0


def test_background_loss_has_the_gradient_of_its_formula() -> None:
    z = torch.linspace(-30, 15, 24, dtype=torch.float64).reshape(2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(_sum_background_loss, z)
    score = z.sigmoid()
    formula = (-(score**2) * torch.log1p(-score)).sum(dim=(1, 2))
    assert torch.allclose(_sum_background_loss(z), formula, rtol=1e-6)
