"""Muon alone, beside torch's own, and what each script moves by it."""

import pytest
import torch
from torch import nn

import models
from engine.optim import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(2, 32, 288), (3, 64, 32), (1, 32, 27)])
def test_orthogonalized_matrices_have_singular_values_near_1(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    values = torch.linalg.svdvals(orthogonalize(matrices, torch.float32))
    assert values.min() > 0.6 and values.max() < 1.3
    # The singular vectors stay: what comes out is U f(S) V' of what went in.
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    product = left.mT @ orthogonalize(matrices, torch.float32) @ right.mT
    diagonal = torch.diag_embed(torch.diagonal(product, dim1=1, dim2=2))
    torch.testing.assert_close(product, diagonal, atol=1e-4, rtol=0)


@pytest.mark.parametrize("pad", [False, True])
def test_muon_steps_as_far_in_all_directions_whatever_the_shape(pad):
    # Matrices of more, as many, and fewer rows than columns.
    torch.manual_seed(0)
    shapes = [(64, 8, 1, 1), (32, 32, 1, 1), (8, 64, 1, 1), (64, 3, 3, 3), (8, 8, 3, 3)]
    weights = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = Muon([{"params": weights, "muon": 0.9, "lr": 0.1}], torch.float32, pad)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    for weight in weights:
        lengths = torch.linalg.svdvals(weight.detach().flatten(1)) / 0.1
        assert lengths.min() > 0.5 and lengths.max() < 1.3, weight.shape


def test_muon_takes_the_steps_of_torchs_own():
    """Which takes matrices alone, and computes in bf16."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(8, 4, 3, 3)) for _ in range(2)]
    matrices = [nn.Parameter(weight.detach().flatten(1).clone()) for weight in weights]
    starts = [matrix.detach().clone() for matrix in matrices]
    group = {"params": weights, "muon": 0.9, "lr": 0.05, "weight_decay": 0.1}
    ours = Muon([group], torch.bfloat16)
    theirs = torch.optim.Muon(matrices, 0.05, weight_decay=0.1, momentum=0.9)
    for _ in range(3):
        for weight, matrix in zip(weights, matrices, strict=True):
            weight.grad = torch.randn_like(weight)
            matrix.grad = weight.grad.flatten(1).clone()
        ours.step()
        theirs.step()
    for weight, matrix, start in zip(weights, matrices, starts, strict=True):
        moved, difference = matrix - start, weight.flatten(1) - matrix
        assert difference.norm() < 0.05 * moved.norm()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_padded_matrices_become_as_orthogonal_as_others(dtype, tolerance):
    """In fewer kernels, for GPUs; also of channels-first weights."""
    weights = []
    for pad in (False, True):
        torch.manual_seed(0)
        model = models.ResNet()
        if dtype == torch.float32:
            model.to(memory_format=torch.channels_last)
        convolutions = [p for p in model.parameters() if p.ndim == 4]
        group = {"params": convolutions, "muon": 0.9, "lr": 0.1, "weight_decay": 0.005}
        optimizer = Muon([group], dtype, pad)
        for _ in range(2):
            for weight in convolutions:
                weight.grad = torch.randn_like(weight)
            optimizer.step()
            assert all(p.grad.is_contiguous(memory_format=torch.channels_last)
                       for p in convolutions)
        weights.append(convolutions)
    for one, other in zip(*weights, strict=True):
        assert (one - other).abs().max() < tolerance


def test_muon_pads_to_weights_whose_first_gradient_comes_late():
    for late in (8, 3):
        ends = []
        for pad in (False, True):
            torch.manual_seed(0)
            weights = [nn.Parameter(torch.randn(8, width, 3, 3)) for width in (4, 2, late)]
            optimizer = Muon([{"params": weights, "muon": 0.9, "lr": 0.1}], torch.float32, pad)
            for trained in (weights[:2], weights):
                for weight in trained:
                    weight.grad = torch.randn_like(weight)
                optimizer.step()
            ends.append(weights)
        torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)


def after_three_steps(ours, optimizer, theirs, reference) -> list[tuple[nn.Parameter, ...]]:
    """Have both take three steps with the same random gradients; return the weights in pairs."""
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
    for _ in range(3):
        for one, other in pairs:
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        optimizer.step()
        reference.step()
    return pairs


def test_in_part_1_sgd_takes_the_steps_of_torchs_own(parse, runtime):
    """All weights at one rate, the matrices with decay: those that the head of the script gives."""
    script, args = parse("train_resnet", "--overwrite", "--optimizer", "sgd")
    assert script.SGD.items() <= vars(args).items()
    torch.manual_seed(0)
    ours, theirs = models.ResNet(), models.ResNet()
    theirs.load_state_dict(ours.state_dict())
    optimizer = script.make_optimizer(ours, args, runtime)
    decays = {id(parameter): args.weight_decay * (parameter.ndim > 1)
              for parameter in theirs.parameters()}
    reference = torch.optim.SGD(
        [{"params": [parameter], "weight_decay": decays[id(parameter)]}
         for parameter in theirs.parameters()], args.lr, momentum=0.9, nesterov=True)
    for one, other in after_three_steps(ours, optimizer, theirs, reference):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-6)


def test_in_part_1_muon_moves_the_convolutions_and_sgd_the_rest(parse, runtime):
    """With the rates and decays that the head of the script gives, and each parameter once."""
    script, args = parse("train_resnet")
    model = models.ResNet()
    names = {parameter: name for name, parameter in model.named_parameters()}
    convolutions, head, vectors = script.make_optimizer(model, args, runtime).param_groups
    assert "muon" in convolutions and not {"muon"} & {*head, *vectors}
    assert (convolutions["lr"], convolutions["weight_decay"]) == (args.lr, args.weight_decay)
    assert [names[p] for p in head["params"]] == ["fc.weight"]
    assert all(p.ndim == 1 for p in vectors["params"]) and vectors["weight_decay"] == 0
    groups = convolutions, head, vectors
    assert sorted(names[p] for group in groups for p in group["params"]) == sorted(names.values())


@pytest.mark.parametrize("optimizer, rates", [
    ("sgd", [0.003, 0.003, 0.03]), ("muon", [0.002, 0.003, 0.03])])
def test_in_part_2_the_head_learns_ten_times_faster_and_each_weight_has_one_rate(
        parse, runtime, optimizer, rates):
    script, args = parse("finetune_resnet18", "--optimizer", optimizer)
    model = models.resnet18()
    groups = script.make_optimizer(model, args, runtime).param_groups
    assert [group["lr"] for group in groups] == rates
    assert [("muon" in group) for group in groups] == [rate == 0.002 for rate in rates]
    assert {group["weight_decay"] for group in groups} == {args.weight_decay}
    names = {parameter: name for name, parameter in model.named_parameters()}
    convolutions, norms, head = [[names[p] for p in group["params"]] for group in groups]
    assert head == ["fc.weight", "fc.bias"]
    assert all("conv" in name or "downsample.0" in name for name in convolutions)
    assert all("bn" in name or "downsample.1" in name for name in norms)
    assert sorted([*convolutions, *norms, *head]) == sorted(names.values())


def test_fewer_iterations_leave_small_singular_values_smaller():
    matrix = torch.diag(torch.tensor([1.0, 0.5, 0.01]))[None]
    three, five = (orthogonalize(matrix, torch.float32, n)[0].diagonal() for n in (3, 5))
    assert 0.2 < three[2] < 0.5 < 0.6 < five.min() and five.max() < 1.3


def test_in_part_2_sgd_takes_the_steps_of_torchs_own(parse, runtime):
    """To the bit."""
    script, args = parse("finetune_resnet18", "--optimizer", "sgd")
    ours, theirs = models.resnet18(), models.resnet18()
    theirs.load_state_dict(ours.state_dict())
    optimizer = script.make_optimizer(ours, args, runtime)
    backbone = [weight for name, weight in theirs.named_parameters() if "fc." not in name]
    reference = torch.optim.SGD(
        [{"params": backbone, "lr": 0.003}, {"params": theirs.fc.parameters(), "lr": 0.03}],
        momentum=0.9, weight_decay=5e-4, nesterov=True)
    for one, other in after_three_steps(ours, optimizer, theirs, reference):
        assert torch.equal(one, other)


def test_part_2_takes_steps_by_muon_in_three_iterations_padded_or_not(parse, runtime):
    script, args = parse("finetune_resnet18")
    assert args.optimizer == "muon"
    ends = {}
    for iterations, pad in ((3, False), (3, True), (5, False)):
        torch.manual_seed(0)
        model = models.resnet18()
        optimizer = script.make_optimizer(model, args, runtime._replace(dtype=torch.float32))
        assert optimizer.iterations == 3
        optimizer.iterations, optimizer.pad = iterations, pad
        before = [weight.clone() for weight in model.parameters()]
        for weight in model.parameters():
            weight.grad = torch.randn_like(weight)
        optimizer.step()
        for weight, was in zip(model.parameters(), before, strict=True):
            assert not torch.equal(weight, was)
        ends[iterations, pad] = nn.utils.parameters_to_vector(model.parameters())
    torch.testing.assert_close(ends[3, True], ends[3, False], atol=1e-5, rtol=0)
    assert not torch.allclose(ends[3, False], ends[5, False], atol=1e-5, rtol=0)
