"""Every model computes what the reference computes, with weights that follow from the parameters' names."""

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F

from ann import AsymmetricNonLocalBlock
from evaluate import multi_scale_flip, slide_inference, whole_inference
from gcnet import GCBlock, SimplifiedNonLocalBlock
from nonlocal_net import NonLocalBlock
from support.settings import MODELS
from train import segmentation_loss

PUBLISHED = ["gcnet", "nonlocal_net", "ann", "fcn"]
SLOW = pytest.mark.slow
MOST = ["gcnet", "ann", pytest.param("nonlocal_net", marks=SLOW), pytest.param("fcn", marks=SLOW)]
INPUTS = reference.arrays("inputs")


def build(name, depth, align_corners=False):
    model = MODELS[name](19, depth, align_corners)
    model.load_state_dict(reference.weights(name, depth))
    return model.eval()


def close_to_largest(ours, golden, tolerance=1e-4):
    assert ours.shape == golden.shape
    assert np.abs(ours.numpy() - golden).max() <= tolerance * np.abs(golden).max()


@pytest.mark.parametrize("depth", [18, 50, 101])
@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name, depth):
    ours = {key: list(value.shape) for key, value in MODELS[name](19, depth).state_dict().items()}
    assert ours == reference.keys(name, depth)


@pytest.mark.parametrize("name", list(MODELS))
def test_options_reach_what_the_models_share(name):
    model = MODELS[name](3, 18, stem_channels=128, aux_channels=512)
    channels = model.backbone.stem[6].out_channels, model.auxiliary_head.convs[0].conv.out_channels
    assert channels == (128, 512 // 4)  # of R-18's heads
    with pytest.raises(TypeError, match="stem_chanels"):
        MODELS[name](3, 18, stem_chanels=128)


@pytest.mark.parametrize("depth", [18, 50, pytest.param(101, marks=SLOW)])
@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_logits(name, depth):
    model, golden = build(name, depth), reference.arrays(name)
    stages = model.backbone(torch.tensor(INPUTS["x"]))
    if depth == 50:
        for i, stage in enumerate(stages, 1):
            np.testing.assert_allclose([stage.norm(), stage.mean()], golden[f"r50_stage{i}_norm"], rtol=1e-4)
    close_to_largest(model.decode_head(*stages[2:]), golden[f"r{depth}_logits"])
    close_to_largest(model.auxiliary_head(stages[2]), golden[f"r{depth}_aux_logits"])


@pytest.mark.parametrize("name", ["gcnet", "nonlocal_net", "ann", pytest.param("fcn", marks=SLOW)])
def test_training_step(name):
    model, golden = build(name, 50).double().train(), reference.arrays(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout2d | torch.nn.Dropout):
            module.p = 0.0
    images, labels = torch.tensor(INPUTS["x"]).double(), torch.tensor(INPUTS["y"]).long()
    losses = [segmentation_loss(logits, labels) for logits in model(images)]
    losses[1] = 0.4 * losses[1]
    np.testing.assert_allclose([loss.item() for loss in losses], golden["train_loss"], rtol=1e-9)

    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    sum(losses).backward()
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(golden["train_names"])

    def compare(which, norm):
        ours = np.array([norm(parameters[key]).item() for key in golden["train_names"]])
        error = np.abs(ours - golden[which]) / np.maximum(golden[which], 1e-9)
        assert error.max() <= 1e-6, golden["train_names"][error.argmax()]

    compare("train_grad_norm", lambda parameter: parameter.grad.norm())
    optimizer.step()
    compare("train_step_norm", lambda parameter: parameter.detach().norm())
    bn = model.decode_head.bottleneck.bn if name == "ann" else model.decode_head.convs[1].bn
    np.testing.assert_allclose(bn.running_mean, golden["train_bn_mean"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("align", [False, True], ids=["plain", "align_corners"])
@pytest.mark.parametrize("name", MOST)
@torch.no_grad()
def test_whole_and_slide(name, align):
    model, golden = build(name, 50, align), reference.arrays(name)
    images, prefix = torch.tensor(INPUTS["wide"]), "align" if align else "plain"
    whole = whole_inference(model, images)
    slide = slide_inference(model, images, (65, 65), (43, 43))
    for mode, logits in (("whole", whole), ("slide", slide)):
        close_to_largest(logits[:, :, ::4, ::4], golden[f"{prefix}_{mode}"])
        assert (logits.argmax(1).numpy() == golden[f"{prefix}_{mode}_argmax"]).mean() >= 0.998
    rescaled = F.interpolate(slide, (71, 120), mode="bilinear", align_corners=align).argmax(1)
    assert (rescaled.numpy() == golden[f"{prefix}_slide_rescaled_argmax"]).mean() >= 0.998


@pytest.mark.parametrize("name", MOST)
@torch.no_grad()
def test_multi_scale_flip(name):
    model, golden, sizes = build(name, 50), reference.arrays(name), []
    model.backbone.register_forward_pre_hook(lambda _, inputs: sizes.extend(tuple(x.shape[1:]) for x in inputs[0]))
    mean = multi_scale_flip(model, INPUTS["image"], (256, 96))
    assert sorted(sizes) == sorted(tuple(size) for size in golden["msflip_sizes"])
    assert np.abs(mean[None, :, ::5, ::5].numpy() - golden["msflip_prob"]).max() <= 1e-3
    assert (mean.argmax(0).numpy() == golden["msflip_argmax"]).mean() >= 0.998


@pytest.mark.parametrize("mode", ["embedded_gaussian", "gaussian", "dot_product", "concatenation"])
def test_pairwise_functions(mode):
    golden = reference.arrays("pairwise")
    block = NonLocalBlock(16, mode=mode)
    names = {key: list(value.shape) for key, value in block.state_dict().items()}
    assert sorted(names) == golden[f"{mode}_names"].tolist()
    block.load_state_dict({key: torch.tensor(reference.weight(key, shape)) for key, shape in names.items()})
    x = torch.tensor(golden["x"], requires_grad=True)
    z = block.eval()(x)
    close_to_largest(z.detach(), golden[mode], 1e-5)
    if mode != "concatenation":  # of which the reference gives no gradient
        (z**2).sum().backward()
        close_to_largest(x.grad, golden[f"{mode}_grad"], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["embedded_gaussian", "gaussian", "dot_product", "concatenation"])
@torch.no_grad()
def test_pairwise_functions_in_half_precision(mode, dtype):
    """Of 64x64 positions and activations up to 12, where sums of all pairs exceed what float16 holds."""
    torch.manual_seed(0)
    block = NonLocalBlock(64, mode=mode).eval()
    for module in block.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    block.conv_out.bn.weight.fill_(1)
    x = torch.rand(1, 64, 64, 64) * 12
    x = x * 0.1 if "gaussian" in mode else x  # else small differences of large scores decide the softmax
    expected = block(x)
    z = block.to(dtype)(x.to(dtype)).float()
    assert (z - expected).abs().max() <= (0.01 if dtype == torch.float16 else 0.05) * expected.abs().max()


@pytest.mark.parametrize("ratio", [1 / 16, 0, 65])
def test_a_bottleneck_ratio_that_leaves_no_channel_is_refused(ratio):
    with pytest.raises(ValueError, match="is not a whole number from 1 to 64"):
        GCBlock(64, ratio)


def test_simplified_non_local_block_is_its_equation():
    torch.manual_seed(0)
    block, x = SimplifiedNonLocalBlock(8).double(), torch.randn(2, 8, 3, 5).double()
    assert block(x).equal(x)  # starts as the identity
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    w_k, b_k, w_v, b_v = (parameter.detach().squeeze() for parameter in block.parameters())
    for n in range(2):
        positions = x[n].flatten(1).T
        weights = torch.exp(positions @ w_k + b_k)
        context = w_v @ sum(a * x_j for a, x_j in zip(weights / weights.sum(), positions, strict=True)) + b_v
        torch.testing.assert_close(block(x)[n].detach(), x[n] + context[:, None, None])


def test_blocks_start_as_the_identity():
    x = torch.randn(1, 16, 4, 6)
    for block in (GCBlock(16), SimplifiedNonLocalBlock(16), NonLocalBlock(16)):
        assert block.eval()(x).equal(x)
    assert AsymmetricNonLocalBlock(16, 8, 4, shared=False)(x, x[:, :8]).abs().max() == 0


@pytest.mark.parametrize("name", list(MODELS))
@torch.no_grad()
def test_any_size_in_any_memory_format(name):
    """From 1x1 on, the logits have the image's size; channels_last changes nothing; in training there are two."""
    torch.manual_seed(0)
    model = MODELS[name](5, depth=18).eval()
    for parameter in model.parameters():  # so that the blocks, which start as the identity, take part
        torch.nn.init.normal_(parameter, std=0.1) if parameter.dim() < 2 else None
    for size in ((1, 1), (1, 9), (8, 8), (13, 30), (65, 2)):
        images = torch.randn(1, 3, *size)
        logits = model(images)
        assert logits.shape == (1, 5, *size) and logits.isfinite().all()
        last = model.to(memory_format=torch.channels_last)(images)
        torch.testing.assert_close(last, logits, rtol=1e-3, atol=1e-4)
        model.to(memory_format=torch.contiguous_format)
    outputs = model.train()(torch.randn(2, 3, 16, 24))
    assert [tuple(output.shape) for output in outputs] == [(2, 5, 2, 3)] * 2  # which the loss resizes
