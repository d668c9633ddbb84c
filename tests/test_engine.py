"""The training loop, the evaluation and a run's clock: exact, fast, and nothing left behind.

No GPU is needed: on torch's meta device, whose tensors have no values, every look at one, such as
.item(), raises. Times are for results/benchmark.py.
"""

import contextlib
import copy
import ctypes
import functools
import gc
import io
import platform
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import IS_TORCH_2_10, ROOT, equal, needs_cuda
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import engine.loop
import engine.optim
import engine.runtime
import models
from cifar100.classes import CLASS_NAMES
from engine.checkpoint import Position
from engine.clock import Clock
from engine.loop import train_one_epoch
from engine.run import Run
from engine.runtime import Runtime, choose_runtime
from report.log import Metrics
from train_resnet import train_step

# The network, and the low and the full side of its training images, in pixels.
PARTS = {"train_resnet": (models.ResNet, 20, 32),
         "finetune_resnet18": (lambda: models.resnet18(), 112, 224)}
both = pytest.mark.parametrize("name", PARTS)


def begin(args, runtime, steps, model, optimizer, sizes) -> tuple[Run, data.Batches]:
    """Start a run of epochs of so many steps of 10 images; return it and its batches."""
    images = torch.zeros(10 * steps, 3, 32, 32, dtype=torch.uint8)
    split = data.Split(images, torch.arange(10 * steps) % 100)
    dataset = data.Dataset("none", split, split, CLASS_NAMES, "")
    run = Run(args, runtime, dataset, 60, steps)
    if isinstance(sizes, int):
        sizes = engine.optim.Sizes(args.epochs, 0, sizes, sizes)
    run.start(model, optimizer, engine.optim.one_cycle(optimizer, run.total_steps), sizes)
    return run, data.Batches(split, 10, data.CIFAR100_STATS, runtime)


@pytest.fixture
def make_run(parse, monkeypatch):
    """Return a function that starts such a run of a script, with the script's own optimizer."""
    # The signals stay those of the tests.
    monkeypatch.setattr(Clock, "catch_signals", lambda clock: None)

    def make(name, runtime, steps, *flags):
        script, args = parse(name, "--overwrite", *flags)
        network, low, full = PARTS[name]
        model = runtime.place(network())
        sizes = engine.optim.Sizes(args.epochs, args.low_res, low, full)
        optimizer = script.make_optimizer(model, args, runtime)
        return begin(args, runtime, steps, model, optimizer, sizes)

    return make


class Transfers(TorchDispatchMode):
    """Counts the operations that take tensors of the host to the device, or back.

    And the tensors made of Python's numbers, which are such transfers on a real device. A tensor
    without values that is brought to the host becomes one of zeros.
    """

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        for name in ("tensor", "as_tensor", "from_numpy"):
            monkeypatch.setattr(torch, name, self.counting(getattr(torch, name)))
        monkeypatch.setattr(torch.Tensor, "cpu", self.counting(
            lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype)))

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


@both
def test_nothing_waits_for_the_gpu_within_an_epoch(name, make_run, monkeypatch):
    """Neither a look at a value, nor a transfer from or to the host, in a step or a batch."""
    # After which steps the loss is looked at.
    looks = []
    monkeypatch.setattr(engine.loop, "CHECK_EVERY", 2)
    monkeypatch.setattr(Run, "check_finite", lambda run, *_: looks.append(run.step))
    # It reads the host's clock alone.
    monkeypatch.setattr(Run, "stop_or_save", lambda run: None)
    monkeypatch.setattr(Runtime, "reduce", lambda _, values: torch.ones(values.shape))
    monkeypatch.setattr(Runtime, "autocast", lambda _: contextlib.nullcontext())
    counts, (_, low, full) = [], PARTS[name]
    for steps in (1, 3):
        with monkeypatch.context() as patches, Transfers(patches) as transfers:
            runtime = Runtime(torch.device("meta"), torch.float32)
            run, batches = make_run(name, runtime, steps, "--output-dir", steps)
            for size, cutmix in ((low, 0), (full, 0), (full, 0.5)):
                run.state.position.step, batches.strength = 0, cutmix
                drawn = batches.shuffled(0, 0, 0, size, cutmix)
                train_one_epoch(run, drawn, train_step)
            batches.size = full
            engine.loop.evaluate(run.network, batches, runtime)
        counts.append(transfers.count)
    assert counts[0] == counts[1] > 0
    # Every so many steps, 25 in truth, and after the last.
    assert looks == [1, 1, 1, 2, 3, 2, 3, 2, 3]


VIEWS = {"alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand",
         "new_empty", "new_empty_strided", "permute", "select", "slice", "split",
         "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view",
         "_record_function_enter_new", "_record_function_exit", "_reshape_alias", "_unsafe_view"}


class Launches(TorchDispatchMode):
    """Counts the operations on a device that are no views, or the ones of a name.

    Each is at least a kernel. An operation on a list of tensors, `_foreach_...`, counts as one; on
    CUDA it is a few.
    """

    def __init__(self, device="meta", only=""):
        super().__init__()
        self.device, self.only, self.count = device, only, 0

    def counting(self, function):
        """Return the function, whose operations are counted here, and in an outer counter, too."""
        @functools.wraps(function)
        def counted(*args, **kwargs):
            with self:
                return function(*args, **kwargs)

        return counted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        on_device = [part for part in tree_leaves((args, kwargs, result))
                     if isinstance(part, torch.Tensor) and part.device.type == self.device]
        name = function.overloadpacket.__name__
        if on_device and (name == self.only if self.only else name not in VIEWS):
            self.count += 1
        return result


def count_casts() -> int:
    """Return how many tensors a step of part 1 casts to or from bf16, counted on the CPU."""
    runtime, model = Runtime(torch.device("cpu"), torch.bfloat16), models.ResNet()
    with Launches("cpu", only="_to_copy") as casts:
        with runtime.autocast():
            logits = model(torch.ones(2, 3, 20, 20)).float()
        F.cross_entropy(logits, torch.arange(2)).backward()
    return casts.count


@pytest.mark.skipif(IS_TORCH_2_10, reason="torch 2.10 has other operations on the meta device")
def test_a_step_of_part_1_launches_few_kernels(make_run, monkeypatch):
    """Less than half of the 766 of before in all, Muon at most 100."""
    casts = count_casts()
    assert casts > 0
    monkeypatch.setattr(Run, "stop_or_save", lambda run: None)
    monkeypatch.setattr(Run, "check_finite", lambda run: None)
    monkeypatch.setattr(Runtime, "reduce", lambda _, values: torch.ones(values.shape))
    monkeypatch.setattr(Runtime, "autocast", lambda _: contextlib.nullcontext())
    runtime = Runtime(torch.device("meta"), torch.bfloat16)
    run, batches = make_run("train_resnet", runtime, 9)
    for group in run.optimizer.param_groups:
        group["foreach"] = True  # as torch does by itself on CUDA
    phases = {name: Launches() for name in ("batch", "forward", "backward", "Muon")}
    monkeypatch.setattr(batches, "_augment", phases["batch"].counting(batches._augment))
    monkeypatch.setattr(run, "network", phases["forward"].counting(run.model))
    monkeypatch.setattr(torch.Tensor, "backward", phases["backward"].counting(
        torch.Tensor.backward))
    monkeypatch.setattr(run.optimizer, "step", phases["Muon"].counting(run.optimizer.step))
    train_one_epoch(run, batches.shuffled(0, 0, 0, 20), train_step)  # also makes the momentum
    before = {name: phase.count for name, phase in phases.items()}
    run.state.position.step = 0
    with Launches() as whole:
        train_one_epoch(run, batches.shuffled(0, 0, 0, 20), train_step)
    counts = {name: (phase.count - before[name]) // 9 for name, phase in phases.items()}
    # Loss and sums. The few operations of an epoch are less than one a step.
    counts["rest"] = whole.count // 9 - sum(counts.values())
    counts["casts"] = casts
    print(counts)
    most = {"batch": 7, "forward": 83, "backward": 97, "Muon": 100, "rest": 21, "casts": 64}
    assert all(counts[name] <= most[name] for name in most), counts
    assert sum(counts.values()) < 766 / 2


def test_the_momentum_lies_in_memory_as_its_weight_does(runtime, make_run):
    """Also of a checkpoint whose weights lay in another way: else each step takes a slow path."""
    run, batches = make_run("train_resnet", runtime, 1)
    train_one_epoch(run, batches.shuffled(0, 0, 0, 8), train_step)
    state = copy.deepcopy(run.state.capture(run.config, runtime))
    momenta = [buffers["momentum_buffer"].clone() for buffers in run.optimizer.state.values()]
    run.model.to(memory_format=torch.channels_last)
    run.state.restore(state, runtime)
    for (weight, buffers), expected in zip(run.optimizer.state.items(), momenta, strict=True):
        assert buffers["momentum_buffer"].stride() == weight.stride()
        assert torch.equal(buffers["momentum_buffer"], expected)


@pytest.mark.cuda
@needs_cuda
@both
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_step_waits_for_the_gpu(name, precision, make_run, monkeypatch):
    """In fp16 the gradient scaler waits once a step."""
    monkeypatch.setattr(engine.loop, "CHECK_EVERY", 1000)
    monkeypatch.setattr(Run, "stop_or_save", lambda run: None)
    runtime = choose_runtime("cuda", precision, False)
    run, batches = make_run(name, runtime, 6)

    def in_debug_mode():
        for step, batch in enumerate(batches.shuffled(0, 0, 0, 32)):
            # The first steps start libraries; after the last one the sums are read.
            torch.cuda.set_sync_debug_mode("error" if 2 <= step < 5 else "default")
            yield batch

    train_one_epoch(run, in_debug_mode(), train_step)
    assert run.step == 6


@both
def test_no_step_leaves_anything_behind(name, runtime, make_run):
    """As many tensors are alive after three steps as after one, and no step keeps its graph."""
    run, batches = make_run(name, runtime, 4)
    alive = []

    def counted():
        for step, batch in enumerate(batches.shuffled(0, 0, 0, 32)):
            if step in (1, 3):
                gc.collect()
                alive.append(sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects()))
            yield batch

    train_one_epoch(run, counted(), train_step)
    assert run.step == 4 and alive[0] == alive[1]
    assert not run.state.sums.requires_grad


def test_an_epoch_is_the_loop_that_people_write(runtime, parse, monkeypatch):
    """The same weights, and the means over all images of what was predicted on the way.

    The last batch is smaller than the others.
    """
    monkeypatch.setattr(Clock, "catch_signals", lambda clock: None)
    torch.manual_seed(0)
    batches = [(torch.randn(count, 3, 8, 8), torch.arange(count)) for count in (10, 10, 4)]
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 100))
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    schedule, losses, correct = engine.optim.one_cycle(optimizer, 3), [], 0
    for images, labels in batches:
        logits = plain(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses += [loss.item()] * len(labels)
        correct += int((logits.argmax(1) == labels).sum())

    _, args = parse("train_resnet", "--epochs", 1)
    run, _ = begin(args, runtime, 3, model, torch.optim.SGD(model.parameters(), 0.1, 0.9), 8)
    metrics = train_one_epoch(run, ((*batch, 1.0) for batch in batches), train_step)
    assert equal(dict(model.state_dict()), dict(plain.state_dict()))
    assert metrics.loss == pytest.approx(sum(losses) / 24, rel=1e-5)
    assert (metrics.accuracy, metrics.images) == (pytest.approx(correct / 24), 24)


@pytest.mark.parametrize("steps", [1, 3, 4, 10])
def test_the_rate_rises_then_falls_to_nothing_in_a_run_of_any_length(steps):
    """Also of fewer than the five steps that torch's schedule can do."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.5)
    schedule, rates = engine.optim.one_cycle(optimizer, steps), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.02) and max(rates) <= 0.5
    if steps == 10:
        peak = rates.index(max(rates))
        assert (peak, rates[2]) == (2, pytest.approx(0.45, rel=0.1))
        assert rates == [*sorted(rates[: peak + 1]), *sorted(rates[peak + 1 :], reverse=True)]
        assert optimizer.param_groups[0]["lr"] < 1e-4


@both
def test_a_step_that_overflows_in_fp16_changes_nothing(name, parse):
    """The scaler begins with a scale that is too high more often than not."""
    script, args = parse(name)
    model = PARTS[name][0]()
    runtime = Runtime(torch.device("cuda"), torch.float16)
    optimizer = script.make_optimizer(model, args, runtime)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    scaler.step(optimizer)
    assert equal(before, dict(model.state_dict()))
    assert not any(state.get("momentum_buffer") is not None for state in optimizer.state.values())


@pytest.mark.parametrize("precision", engine.runtime.PRECISIONS)
def test_an_evaluation_gives_logits_in_float32_and_keeps_no_graph(runtime, precision):
    model, dtypes = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 100)), set()
    model.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    batches = data.Batches(data.synthetic(1, 1).test, 40, data.CIFAR100_STATS, runtime)
    logits, labels = engine.loop.infer(model, batches, runtime._replace(
        dtype=engine.runtime.PRECISIONS[precision]))
    assert (logits.dtype, logits.shape) == (torch.float32, (100, 100))
    assert not logits.requires_grad and torch.equal(labels, torch.arange(100))
    assert dtypes == {engine.runtime.PRECISIONS[precision]}


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_evaluation_counts_every_image_once(runtime, batch_size):
    torch.manual_seed(0)
    split = data.synthetic(1, 1).test
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 100), torch.nn.Dropout())
    batches = data.Batches(split, batch_size, data.CIFAR100_STATS, runtime)
    result = engine.loop.evaluate(model, batches, runtime)
    images, labels = next(iter(data.Batches(split, 100, data.CIFAR100_STATS, runtime)))
    with torch.no_grad():
        logits = model.eval()(images)
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    counts = result.accuracy * 100, result.top5 * 100, result.images
    assert counts == pytest.approx((int((ranks < 1).sum()), int((ranks < 5).sum()), 100))


@both
def test_the_benchmark_trains_and_evaluates_by_todays_code(name):
    from results.benchmark import modules_of, our_tasks
    pixels = torch.zeros(20, 3, 32, 32, dtype=torch.uint8)
    flags = ["--device", "cpu", "--precision", "fp32", "--batch-size", "10"]
    tasks = our_tasks(modules_of(ROOT), name, flags, data.Split(pixels, torch.arange(20)))
    for task in tasks[:1] if name == "finetune_resnet18" else tasks:
        task.run(1)


def test_the_eta_knows_small_images_short_epochs_and_evaluations(runtime, make_run, monkeypatch):
    """Rates were measured: 32 x 32 takes twice as long as 20 x 20, 224 x 224 three times 112."""
    monkeypatch.setattr(Run, "save", lambda run: None)
    monkeypatch.setattr(Clock, "lap", lambda clock: 0)
    run, _ = make_run("train_resnet", runtime, 2, "--epochs", 3, "--max-steps", 5)
    for (low, full), factor in (((20, 32), 1.96), ((112, 224), 3.2)):
        run.sizes = engine.optim.Sizes(3, 0.7, low, full)
        run.state.position = Position(step=2, seconds=80, train_seconds=50)
        run.clock.steps = [70.0, 25.0]
        run.end_epoch({"train": Metrics(1, 0.5, 0.5, 500)})
        expected = (50 + 30) + (50 * factor / 2 + 30 * factor)
        (row,) = run.state.position.history
        assert row["eta_seconds"] == pytest.approx(expected, rel=0.05)
        assert (row["images_per_second"], row["seconds"], row["image_size"]) == (10, 80, low)


def test_the_rate_leaves_out_the_first_step_of_each_epoch(runtime, make_run, monkeypatch):
    """In which libraries start and the network is compiled; an epoch of one step has only that."""
    monkeypatch.setattr(Run, "save", lambda run: None)
    monkeypatch.setattr(Clock, "lap", lambda clock: 0)
    run, _ = make_run("train_resnet", runtime, 4, "--epochs", 2, "--low-res", 0.5)
    # The last of these was resumed after its training.
    for steps, seconds in (([60, 1, 3], 2), ([60], 60), ([], 70 / 4)):
        run.state.position = Position(step=4, seconds=90, train_seconds=70)
        run.clock.steps = steps
        run.end_epoch({"train": Metrics(1, 0.5, 0.5, 100)})
        (row,) = run.state.position.history
        assert row["images_per_second"] == pytest.approx(100 / (4 * seconds))
        # Evaluation takes 20 of the 90 seconds.
        assert row["eta_seconds"] == pytest.approx((4 * seconds + 20) * (32 / 20) ** 1.6)


def test_a_step_is_timed_from_its_batch_on(runtime, make_run):
    run, batches = make_run("train_resnet", runtime, 3)
    train_one_epoch(run, batches.shuffled(0, 0, 0, 8), train_step)
    assert len(run.clock.steps) == 3 and min(run.clock.steps) > 0
    assert sum(run.clock.steps) < run.state.position.train_seconds


@pytest.mark.parametrize("terminal", [True, False])
def test_only_a_terminal_gets_a_progress_bar(runtime, make_run, monkeypatch, terminal):
    """It begins where the epoch does, after a resumption too, and ends at its last batch."""
    stderr = io.StringIO()
    stderr.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stderr)
    run, batches = make_run("train_resnet", runtime, 5)
    run.state.position.step = 2
    train_one_epoch(run, batches.shuffled(0, 0, 2, 8), train_step)
    assert ("epoch 1 train:  40%" in stderr.getvalue()) is terminal
    assert len(list(run.watch(batches, "test"))) == 5
    assert ("epoch 1 test:   0%" in stderr.getvalue()) is terminal
    assert ("| 0/5 [" in stderr.getvalue()) is terminal


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, to fill memory")
@pytest.mark.parametrize("name, size", [
    ("train_resnet", 20), ("train_resnet", 32),
    ("finetune_resnet18", 32), ("finetune_resnet18", 112),
    pytest.param("finetune_resnet18", 64, marks=pytest.mark.slow),
])
def test_the_gradient_is_the_same_whatever_memory_held(name, size):
    """Or no run would resume to the bit: bf16 convolutions from one pixel with stride 2 fail here.

    (oneDNN in torch 2.14, on CPUs with AVX512-BF16: hence no images below 32 x 32 in part 2.)
    """
    runtime, mallopt = choose_runtime("cpu", "auto", False), ctypes.CDLL(None).mallopt
    torch.manual_seed(0)
    model = runtime.place(PARTS[name][0]()).train()
    images = torch.randn(8, 3, size, size).contiguous(memory_format=torch.channels_last)
    gradients = []
    for byte in (0, 85, 255):
        # M_PERTURB: allocated and freed memory is filled with it.
        mallopt(-6, byte)
        torch.manual_seed(0)
        model.zero_grad()
        with runtime.autocast():
            loss = F.cross_entropy(model(images), torch.arange(8))
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    mallopt(-6, 0)
    for other in gradients[1:]:
        assert all(map(torch.equal, gradients[0], other))


def training_bytes(model: torch.nn.Module, batch_size: int, size: int) -> int:
    """Return the bytes of float32 training: data set, weights, gradients, momentum, activations.

    Activations are the storages that autograd saves in a forward pass on the meta device.
    """
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    model.to("meta").train()
    images = torch.empty(batch_size, 3, size, size, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        F.cross_entropy(model(images), torch.empty(batch_size, dtype=torch.long, device="meta"))
    weights = {p.untyped_storage()._cdata: p.untyped_storage() for p in model.parameters()}
    saved = sum(s.nbytes() for key, s in storages.items() if key not in weights)
    return 60_000 * 3072 + 3 * sum(s.nbytes() for s in weights.values()) + saved


@both
def test_the_default_batch_fits_a_gpu_of_5700_mib(name, parse):
    _, args = parse(name)
    size = getattr(args, "image_size", 32)
    needed = training_bytes(PARTS[name][0](), args.batch_size, size)
    print(f"{name}: {needed / 1e9:.2f} GB at batch size {args.batch_size} and {size} x {size}")
    # The rest is for cuDNN's workspace and the context.
    assert 0.3e9 < needed < 0.8 * 5700 * 2**20
