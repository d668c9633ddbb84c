"""The two networks are those of the assignment."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models import BasicBlock, ResNet

# Figure 1 by hand: weights of the stage's convolutions, output pixels, batch norm channels, output.
# A convolution does as many multiply-adds per output pixel as it has weights.
CONVOLUTIONS = {
    "conv1": (9 * 3 * 32, 32 * 32, 0, (32, 32, 32)),
    "conv2_x": (4 * 9 * 32 * 32, 32 * 32, 4 * 32, (32, 32, 32)),
    "conv3_x": (9 * 32 * 64 + 32 * 64 + 7 * 9 * 64 * 64, 16 * 16, 9 * 64, (64, 16, 16)),
    "conv4_x": (9 * 64 * 128 + 64 * 128 + 7 * 9 * 128 * 128, 8 * 8, 9 * 128, (128, 8, 8)),
    "conv5_x": (9 * 128 * 256 + 128 * 256 + 3 * 9 * 256 * 256, 4 * 4, 5 * 256, (256, 4, 4)),
}


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("stage", CONVOLUTIONS)
def test_each_stage_has_the_size_of_figure_1(stage):
    model, shapes = ResNet().eval(), {}
    for name, module in model.named_children():
        module.register_forward_hook(
            lambda module, inputs, output, name=name: shapes.update({name: tuple(output.shape[1:])})
        )
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 32, 32))
    multiply_adds = sum(counter.get_flop_counts()[f"ResNet.{stage}"].values()) // 2
    weights, pixels, channels, shape = CONVOLUTIONS[stage]
    assert parameters(getattr(model, stage)) == weights + 2 * channels
    assert (multiply_adds, shapes[stage]) == (weights * pixels, shape)


def test_the_whole_network_has_the_assignments_parameters_and_multiply_adds():
    model = ResNet().eval()
    with FlopCounterMode(display=False) as counter:
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 100)
    assert parameters(model) == 3_559_556
    assert round(counter.get_total_flops() / 2e6, 1) == 214.8
    children = [name for name, _ in model.named_children() if name != "dropout"]
    assert children == ["conv1", "bn1", "conv2_x", "conv3_x", "conv4_x", "conv5_x", "fc"]


def test_a_block_has_no_relu_after_the_addition():
    block = BasicBlock(4, 4).eval()
    assert block(torch.randn(2, 4, 8, 8)).min() < 0
    nn.init.zeros_(block.conv2.weight)  # then the block is its short cut
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(block(x), x)


def network_of_figure_1(state: dict, x: torch.Tensor, is_training: bool) -> torch.Tensor:
    """Compute the logits step by step; batch norm in training uses the batch's own statistics."""
    def convolve(x, name, stride=1):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def normalise(x, name):
        mean, variance, weight, bias = (state[f"{name}.{part}"].clone() for part in (
            "running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, variance, weight, bias, is_training)

    x = normalise(convolve(x, "conv1"), "bn1").relu()
    for stage, blocks, first_stride in (("conv2_x", 2, 1), ("conv3_x", 4, 2), ("conv4_x", 4, 2),
                                        ("conv5_x", 2, 2)):
        for number in range(blocks):
            block, stride = f"{stage}.{number}", 1 if number else first_stride
            short_cut = x
            if stride == 2:
                short_cut = normalise(convolve(x, f"{block}.shortcut.0", 2), f"{block}.shortcut.1")
            x = normalise(convolve(x, f"{block}.conv1", stride), f"{block}.bn1").relu()
            x = normalise(convolve(x, f"{block}.conv2"), f"{block}.bn2") + short_cut
    return x.flatten(2).max(2).values @ state["fc.weight"].T + state["fc.bias"]


@pytest.mark.parametrize("is_training", [False, True])
def test_the_network_computes_what_the_figures_show(is_training):
    torch.manual_seed(0)
    model, images = ResNet().train(is_training), torch.randn(4, 3, 32, 32)
    for name, value in model.state_dict().items():
        if "bn" in name or "shortcut.1" in name:
            value.copy_(torch.rand(value.shape) + 0.5)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    pooled = {}
    model.conv5_x.register_forward_hook(lambda module, inputs, output: pooled.update(maps=output))
    model.fc.register_forward_hook(
        lambda module, inputs, output: pooled.update(features=inputs[0]))
    with torch.no_grad():
        logits = model(images)
    expected = network_of_figure_1(state, images, is_training)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3 * expected.std().item())
    torch.testing.assert_close(pooled["features"], pooled["maps"].amax((2, 3)))


def test_the_stride_sits_in_the_first_convolution_of_the_first_block():
    for name, stride in (("conv2_x", 1), ("conv3_x", 2), ("conv4_x", 2), ("conv5_x", 2)):
        first, *others = getattr(ResNet(), name)
        assert (first.conv1.stride, first.conv2.stride) == ((stride, stride), (1, 1))
        assert all(c.stride == (1, 1) for block in others for c in (block.conv1, block.conv2))


def test_the_short_cut_is_a_projection_only_where_the_shape_changes():
    blocks = [module for module in ResNet().modules() if isinstance(module, BasicBlock)]
    projected = [block for block in blocks if not isinstance(block.shortcut, nn.Identity)]
    assert (len(blocks), len(projected)) == (12, 3)
    for block in projected:
        convolution, norm = block.shortcut
        assert (convolution.kernel_size, convolution.stride) == ((1, 1), (2, 2))
        assert isinstance(norm, nn.BatchNorm2d)


def test_convolutions_start_as_he_et_al_say():
    """Normal, mean 0, variance 2 / (k^2 * out_channels): arXiv:1502.01852, equation 14."""
    torch.manual_seed(0)
    for module in ResNet().modules():
        if isinstance(module, nn.Conv2d):
            weights = module.weight
            expected = (2 / (module.kernel_size[0] ** 2 * module.out_channels)) ** 0.5
            assert module.bias is None
            assert weights.std().item() == pytest.approx(expected, rel=4 / weights.numel() ** 0.5)
            assert abs(weights.mean().item()) < 5 * expected / weights.numel() ** 0.5


def test_every_parameter_gets_a_gradient():
    model = ResNet()
    model(torch.randn(4, 3, 32, 32)).logsumexp(1).sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_dropout_acts_in_training_only():
    model, image = ResNet(dropout=0.5), torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(image), model(image))
    model.eval()
    assert torch.equal(model(image), model(image))


def test_dropout_zeroes_single_outputs_of_conv1_with_its_probability():
    model, seen = ResNet(dropout=0.25), []
    model.bn1.register_forward_hook(lambda module, inputs, output: torch.ones_like(output))
    model.conv2_x.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model(torch.randn(2, 3, 32, 32))
    (x,) = seen
    assert (x == 0).float().mean((2, 3)).sub(0.25).abs().max() < 0.1, "in each map alike"
    assert x.unique().tolist() == pytest.approx([0, 4 / 3])


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (20, 20), (33, 47)])
def test_any_image_that_leaves_one_pixel_will_do(size):
    assert ResNet().eval()(torch.zeros(2, 3, *size)).shape == (2, 100)
