"""GCNet's general framework."""

import numpy as np
import pytest
import reference
import torch
from torch import nn

from gcnet import GCBlock, SimplifiedNonLocalBlock

GOLDEN = reference.arrays("context")


def by_name(module, prefix=""):
    """The module with the reference's weights, in eval mode; and its parameters' names."""
    shapes = {key: list(value.shape) for key, value in module.state_dict().items()}
    module.load_state_dict({key: torch.tensor(reference.weight(prefix + key, shapes[key])) for key in shapes})
    return module.eval(), list(shapes)


def randomise(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval().requires_grad_(False)


@pytest.mark.parametrize("fusion", ["add", "mul"])
@pytest.mark.parametrize("pooling", ["att", "avg"])
def test_the_framework_is_the_references(pooling, fusion):
    block, names = by_name(GCBlock(32, 4, pooling, fusion))
    assert names == GOLDEN[f"{pooling}_{fusion}_names"].tolist()
    x = torch.tensor(GOLDEN["x"], requires_grad=True)
    z = block(x)
    (z**2).sum().backward()
    for ours, golden in ((z.detach(), f"{pooling}_{fusion}"), (x.grad, f"{pooling}_{fusion}_grad")):
        np.testing.assert_allclose(ours, GOLDEN[golden], rtol=1e-4, atol=1e-5)


def test_squeeze_excitation_and_snl_are_special_cases():
    torch.manual_seed(0)
    x = torch.randn(2, 16, 3, 5)
    block = randomise(GCBlock(16, 4, "avg", "mul"))
    block.channel_mul_conv[1] = nn.Identity()  # SE has no LayerNorm
    w_1, b_1, w_2, b_2 = (parameter.squeeze() for parameter in block.parameters())
    s = torch.sigmoid(torch.relu(x.mean((2, 3)) @ w_1.T + b_1) @ w_2.T + b_2)
    torch.testing.assert_close(block(x), torch.einsum("nc,nchw->nchw", s, x))

    snl, block = randomise(SimplifiedNonLocalBlock(16)), randomise(GCBlock(16))
    block.conv_mask, block.channel_add_conv = snl.conv_mask, snl.conv_value  # without the bottleneck
    assert block(x).equal(snl(x))


@pytest.mark.parametrize("pooling", ["att", "avg"])
def test_positions_of_a_video_are_all_alike(pooling):
    torch.manual_seed(0)
    block, x = randomise(GCBlock(8, 4, pooling)), torch.randn(2, 8, 4, 3, 5)
    flat = block(x.flatten(2)[..., None]).view_as(x)
    assert (flat - x).abs().min() > 0
    for memory_format in (torch.contiguous_format, torch.channels_last_3d):
        torch.testing.assert_close(block(x.contiguous(memory_format=memory_format)), flat)
