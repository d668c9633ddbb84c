"""What makes the training fast: no waiting for the device, nothing that grows, Muon's arithmetic.

No GPU is needed: on torch's meta device, whose tensors have no values, every look at one, such as
.item(), raises. Times are for benchmark.py.
"""

import contextlib
import functools
import gc
import importlib
import sys
import types

import pytest
import torch
from conftest import equal
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import models
import train_resnet
import utils

PARTS = {"train_resnet": (models.ResNet, 20, 32),
         "finetune_resnet18": (lambda: models.resnet18("random"), 112, 224)}


class Transfers(TorchDispatchMode):
    """Counts the operations that take tensors of the host to the device, or back.

    And the tensors made of Python's numbers, which are such transfers on a real device.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        for name in ("tensor", "as_tensor", "from_numpy"):
            monkeypatch.setattr(torch, name, self.counting(getattr(torch, name)))

    def counting(self, function):
        def counted(*args, **kwargs):
            self.count += 1
            return function(*args, **kwargs)

        return counted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [part for part in tree_leaves((args, kwargs, result))
                   if isinstance(part, torch.Tensor) and part.ndim]
        self.count += len({tensor.device for tensor in tensors}) > 1
        return result


def make_run(name, runtime, steps, monkeypatch, tmp_path):
    """Return a run of so many steps of 10 images, and its batches."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])
    script = importlib.import_module(name)
    args = script.parse_args()
    network, low, full = PARTS[name]
    model = network().to(runtime.device)
    optimizer, scheduler = script.make_optimizer(model, args, 2 * steps, runtime)
    images = torch.zeros(10 * steps, 3, 32, 32, dtype=torch.uint8)
    split = data.Split(images, torch.arange(10 * steps) % 100)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler,
             "scaler": runtime.scaler()}
    dataset = types.SimpleNamespace(name="none", checksum=lambda: 0)
    run = utils.Run(args, 0, runtime, dataset, steps, steps, [low, full], parts)
    return run, data.Batches(split, 10, data.CIFAR100_STATS, runtime), low, full


@pytest.mark.parametrize("name", PARTS)
def test_nothing_waits_for_the_gpu_within_an_epoch(name, monkeypatch, tmp_path):
    """Neither a look at a value, nor a transfer from or to the host, in a step or a batch."""
    looks = []  # at the loss: each 25th step, and after the last
    monkeypatch.setattr(utils.Run, "check_finite", lambda run: looks.append(run.step))
    monkeypatch.setattr(utils.Runtime, "reduce", lambda _, values: torch.ones(values.shape))
    monkeypatch.setattr(utils.Runtime, "autocast", lambda _: contextlib.nullcontext())
    counts = []
    for steps in (2, 5):
        with Transfers(monkeypatch) as transfers:
            runtime = utils.Runtime(torch.device("meta"), torch.float32, False, torch.channels_last)
            run, batches, low, full = make_run(name, runtime, steps, monkeypatch, tmp_path)
            monkeypatch.setattr(run, "_stop_or_save", lambda: None)  # reads the host's clock alone
            for size in (low, full):
                run.step = 0
                utils.train_one_epoch(run, batches.shuffled(0, 0, 0, size), 0.1)
            utils.evaluate(run.network, batches.in_order(full), runtime)
        counts.append(transfers.count)
    assert counts[0] == counts[1] > 0
    assert looks == [2, 2, 5, 5]


def test_augmentation_compiles_whole_to_the_same_images(runtime, monkeypatch):
    """Crops, flips, normalisation and size, without a break; this backend needs no compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(
        torch.compile, backend="aot_eager", fullgraph=True))
    split = data.Split(torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8), torch.arange(12))
    eager, compiled = (data.Batches(split, 8, data.CIFAR100_STATS, runtime._replace(compile=how))
                       for how in (False, True))
    for size in (20, 32):
        for one, other in zip(eager.shuffled(0, 0, 0, size), compiled.shuffled(0, 0, 0, size),
                              strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert compiled._augment != compiled._augment_eagerly


@pytest.mark.parametrize("name", PARTS)
def test_no_step_leaves_anything_behind(name, runtime, monkeypatch, tmp_path):
    """As many tensors are alive after five steps as after two, and no step keeps its graph."""
    run, batches, _, _ = make_run(name, runtime, 6, monkeypatch, tmp_path)
    monkeypatch.setattr(utils, "CHECK_EVERY", 100)
    alive = []

    def counted():
        for batch in batches.shuffled(0, 0, 0, 32):
            gc.collect()
            alive.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
            yield batch

    utils.train_one_epoch(run, counted(), 0.1)
    assert len(alive) == 6 and alive[2] == alive[5]
    assert not run.sums.requires_grad


@pytest.mark.parametrize("name", PARTS)
def test_a_step_that_overflows_in_fp16_changes_nothing(name, monkeypatch, tmp_path):
    """The scaler begins with a scale that is too high more often than not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])
    script, runtime = importlib.import_module(name), utils.Runtime(
        torch.device("cuda"), torch.float16, False, torch.channels_last)
    model = PARTS[name][0]()
    optimizer, _ = script.make_optimizer(model, script.parse_args(), 10, runtime)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    scaler.step(optimizer)
    assert equal(before, dict(model.state_dict()))
    assert not any(state.get("momentum_buffer") is not None for state in optimizer.state.values())


@pytest.mark.parametrize("shape", [(2, 32, 288), (3, 64, 32), (1, 32, 27)])
def test_orthogonalized_matrices_have_singular_values_near_1(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    values = torch.linalg.svdvals(train_resnet.orthogonalize(matrices, torch.float32))
    assert values.min() > 0.6 and values.max() < 1.3
    # The singular vectors stay: what comes out is U f(S) V' of what went in.
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    product = left.mT @ train_resnet.orthogonalize(matrices, torch.float32) @ right.mT
    diagonal = torch.diag_embed(torch.diagonal(product, dim1=1, dim2=2))
    torch.testing.assert_close(product, diagonal, atol=1e-4, rtol=0)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch.optim.Muon of torch 2.9")
def test_muon_takes_the_steps_of_torchs_own():
    """Which takes matrices alone, and computes in bf16."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(8, 4, 3, 3)) for _ in range(2)]
    matrices = [torch.nn.Parameter(weight.detach().flatten(1).clone()) for weight in weights]
    starts = [matrix.detach().clone() for matrix in matrices]
    group = {"params": weights, "muon": 0.9, "weight_decay": 0.1}
    ours = train_resnet.Muon([group], 0.05, torch.bfloat16)
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


@pytest.mark.parametrize("capabilities, precision", [
    ({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16),
    ({"avx512_f": True}, torch.float32), ({}, torch.float32),
])
def test_a_cpu_that_computes_in_bf16_does(monkeypatch, capabilities, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert utils.choose_runtime("cpu", "auto", None).dtype == precision
    assert utils.choose_runtime("cpu", "fp32", None).dtype == torch.float32


@pytest.mark.parametrize("name, flags, epochs, low_res", [
    ("train_resnet", [], 1, 0), ("train_resnet", [], 6, 3), ("train_resnet", [], 30, 15),
    ("train_resnet", ["--low-res", "0.58"], 50, 29),
    ("finetune_resnet18", [], 1, 0), ("finetune_resnet18", [], 2, 1),
    ("finetune_resnet18", [], 4, 2),
])
def test_a_run_of_any_length_ends_at_full_size(name, flags, epochs, low_res, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *flags])
    script = importlib.import_module(name)
    _, low, full = PARTS[name]
    expected = [low] * low_res + [full] * (epochs - low_res)
    assert script.image_sizes(script.parse_args(), epochs) == expected


def test_the_eta_knows_small_images_short_epochs_and_evaluations(runtime, monkeypatch, tmp_path):
    """Rates were measured: 32 x 32 takes twice as long as 20 x 20, 224 x 224 three times 112."""
    run, *_ = make_run("train_resnet", runtime, 2, monkeypatch, tmp_path)
    monkeypatch.setattr(utils.Run, "tick", lambda run: None)
    monkeypatch.setattr(utils.Run, "save", lambda run: None)
    dataset = types.SimpleNamespace(name="none", checksum=lambda: 0)
    for (low, full), factor in (((20, 32), 1.96), ((112, 224), 3.2)):
        run = utils.Run(run.args, 0, runtime, dataset, 2, 5, [low, low, full], run.parts)
        run.train_seconds, run.seconds = 50, 80
        run.end_epoch({"train": utils.Metrics(1, 0.5, 0.5, 500)})
        expected = (50 + 30) + (50 * factor / 2 + 30)
        assert run.history[-1]["eta_seconds"] == pytest.approx(expected, rel=0.05)
