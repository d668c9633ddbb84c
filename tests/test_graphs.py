"""Steps by CUDA graphs end with the bits of eager steps, or the log says why there are none.

On the CPU a tape stands in for the graphs (tape.py). `pytest -m cuda` uses real ones.
"""

import importlib
import logging
import random
import sys

import numpy as np
import pytest
import tape
import torch
from helpers import needs_cuda, result
from tiny import SCRIPTS, hurry, noise, signals_kept
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel

import data
import engine.graphs
import engine.optim
import engine.process
import engine.runtime
import models
import utils
from engine.clock import Clock
from engine.run import Run
from engine.runtime import choose_runtime

both = pytest.mark.parametrize("name", SCRIPTS)
SMALL = {"train_resnet": [], "finetune_resnet18": ["--weights", "random", "--image-size", 40]}
ALL = ["--cutmix", 0.5, "--trivial-augment", 0.5]
NO_GRAPHS = "note       no CUDA graphs"


class Network(nn.Module):
    """A small network with batch norm and dropout; `act(self, images)` is a factor."""

    def __init__(self, act=None, momentum: float | None = 0.1):
        super().__init__()
        self.act = act
        self.conv, self.bn = nn.Conv2d(3, 6, 3, 2, bias=False), nn.BatchNorm2d(6, momentum=momentum)
        self.dropout, self.fc = nn.Dropout(0.2), nn.Linear(6, 10)

    def forward(self, images):
        maps = self.dropout(self.bn(self.conv(images)).relu())
        if self.act and self.training:
            maps = maps * self.act(self, images)
        return self.fc(maps.mean((2, 3)))


def cutout(images, labels, generator, side=8):
    """Grey out a square, as the README does."""
    pixels = torch.arange(images.shape[-1], device=images.device)
    centres = torch.rand(2, len(images), 1, generator=generator, device=images.device)
    rows, columns = (pixels - centres * len(pixels)).abs() < side / 2
    return images.masked_fill((rows[:, :, None] & columns[:, None])[:, None], 0), labels


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_cuda])])
def device(request, monkeypatch):
    """A device with graphs: on the CPU by the tape."""
    if request.param == "cpu":
        tape.stand_in(monkeypatch)
    return request.param


@pytest.fixture
def captured(monkeypatch):
    """The graphs that are captured."""
    graphs, capture = [], engine.graphs.capture

    def count(*arguments):
        graphs.append(capture(*arguments))
        return graphs[-1]

    monkeypatch.setattr(engine.graphs, "capture", count)
    return graphs


def train(name, output_dir, *flags, network=Network, augment=None, graphs=True, **own):
    """Run a script in this process on 105 images; return what `helpers.result` does, and the log.

    Batches of 10: ten alike in an epoch, then one of 5. Images are small in the first 2 of 5
    epochs, CutMix is off in the last, so there are three kinds. `own` are functions in place of the
    script's. Without `graphs` no step is captured, but all else is as with them.
    """
    script = importlib.import_module(name)
    flags = [*SMALL[name], "--epochs", 5, "--batch-size", 10, "--low-res", 0.5, "--graphs",
             "--output-dir", output_dir, "--checkpoint-minutes", 0, *flags]
    own = {"make_model": lambda _: network(), "load_data": lambda _: noise(105),
           "make_augment": lambda *_: augment, **own}
    with pytest.MonkeyPatch.context() as patch, signals_kept():
        for function, value in own.items():
            patch.setattr(script, function, value)
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        if not graphs:
            patch.setattr(engine.graphs, "EAGER_STEPS", sys.maxsize)
            patch.setattr(engine.graphs, "PATIENCE", 0)
        hurry(patch)
        engine.process.log_to(logging.FileHandler(output_dir.with_suffix(".log"), "w"))
        utils.log.setLevel(logging.INFO)
        for seed in (random.seed, np.random.seed):
            seed(1)  # of a network that draws on the host
        try:
            script.main()
        except utils.UserError as error:
            return error.status, str(error)
        finally:
            engine.process.AT_END.close()
    return result(output_dir), output_dir.with_suffix(".log").read_text()


@both
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("flags, augment, kinds", [([], None, 2), (ALL, cutout, 3)])
def test_graphs_end_with_the_bits_of_eager_steps(name, device, precision, flags, augment, kinds,
                                                 captured, tmp_path, monkeypatch):
    """With sizes, CutMix, TrivialAugment, dropout, her own augmentation, and odd last batches."""
    monkeypatch.setattr(engine.graphs, "PATIENCE", 6)  # only steps in a row count for it
    flags = ["--device", device, "--precision", precision, "--cutmix", 0, *flags]
    by_graph, log = train(name, tmp_path / "graph", *flags, augment=augment)
    assert len(captured) == kinds and NO_GRAPHS not in log and "by CUDA graphs" in log
    eager, _ = train(name, tmp_path / "eager", *flags, augment=augment, graphs=False)
    assert len(captured) == kinds
    assert by_graph == eager


@pytest.mark.parametrize("owner, forgotten", [
    (engine.optim.Muon, "set_rates"), (Run, "seed_augmentation")])
def test_what_a_graph_takes_from_the_host_counts(owner, forgotten, device, tmp_path, monkeypatch):
    """Else the comparison above could not fail."""
    flags = ["--device", device, *ALL]
    right, _ = train("train_resnet", tmp_path / "right", *flags, augment=cutout)
    calls, function = [], getattr(owner, forgotten)

    def forget(self):
        calls.append(1)
        if len(calls) <= 20:
            function(self)

    monkeypatch.setattr(owner, forgotten, forget)
    wrong, log = train("train_resnet", tmp_path / "wrong", *flags, augment=cutout)
    assert NO_GRAPHS not in log
    assert wrong != right


@both
@pytest.mark.parametrize("before, after", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("stop", [4, 15])
def test_a_run_resumes_to_the_bit_with_graphs_or_without(name, device, before, after, stop,
                                                         tmp_path, monkeypatch):
    """Stopped in the middle of an epoch, after as many looks at the clock."""
    flags, looks, stop_or_save = ["--device", device, *ALL, "--resume"], [], Run.stop_or_save

    def stop_then(run):
        looks.append(1)
        run.clock.stop_signal = 15 if len(looks) == stop else 0
        stop_or_save(run)

    whole, _ = train(name, tmp_path / "whole", *flags, augment=cutout)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "stop_or_save", stop_then)
        status, _ = train(name, tmp_path / "run", *flags, augment=cutout, graphs=before)
    assert status == utils.STOPPED
    resumed, log = train(name, tmp_path / "run", *flags, augment=cutout, graphs=after)
    assert "resume     after" in log and "not be the same bits" not in log
    assert resumed == whole


def test_a_run_without_the_flag_is_continued_with_it_and_told(device, tmp_path, monkeypatch):
    """SGD's step is another one with graphs, so the end has other bits."""
    monkeypatch.setattr(Clock, "catch_signals", lambda clock: setattr(clock, "stop_signal", 15))
    flags = ["--device", device, "--resume"]
    status, _ = train("train_resnet", tmp_path / "run", *flags, "--no-graphs")
    assert status == utils.STOPPED
    monkeypatch.undo()
    if device == "cpu":
        tape.stand_in(monkeypatch)
    _, log = train("train_resnet", tmp_path / "run", *flags)
    assert "the end will not be the same bits" in log and "final test accuracy" in log


def draws_in_python(_, images):
    return 1.0 + random.random()


def draws_in_numpy(_, images):
    return 1.0 + np.random.rand()


def counts(network, images):
    network.passes = getattr(network, "passes", 0) + 1
    return 1 / network.passes


def waits(_, images):
    return 1.0 if images.mean().item() < 9 else 2.0


def step_with(change):
    """Return the script's training step with a change of its loss."""
    def train_step(run, images, labels):
        with run.runtime.autocast():
            logits = run.network(images).float()
        loss = nn.functional.cross_entropy(logits, labels)
        run.backward(loss * change(run))
        run.take_step()
        return loss, logits

    return train_step


def adamw(model, args, runtime):
    return torch.optim.AdamW(model.parameters(), 1e-3)


def with_average(run):
    """Update the average that the run keeps."""
    run.keep["average"].update_parameters(run.model)
    return 1.0


class Shadow(nn.Module):
    """An average of a weight, updated on the device alone."""

    def __init__(self, model):
        super().__init__()
        self.register_buffer("bias", model.fc.bias.detach().clone())


def with_shadow(run):
    run.keep["shadow"].bias.lerp_(run.model.fc.bias.detach(), 0.1)
    return 1 + run.keep["shadow"].bias.mean()


def starting(patch, begin):
    """Have `begin` do something with what a run is given at its start; it may return `keep`."""
    start = Run.start

    def start_with(run, model, optimizer, scheduler, sizes, augment=None):
        return start(run, model, optimizer, scheduler, sizes, augment,
                     begin(model, optimizer, scheduler))

    patch.setattr(Run, "start", start_with)


def lower_rate(run):
    """Set the rate within the step, for this very step."""
    run.optimizer.param_groups[1]["lr"] /= 2
    return 1.0


def decaying(run, images, labels):
    """Decay a weight by the rate of the step, as some optimizers do."""
    logits = run.network(images).float()
    loss = nn.functional.cross_entropy(logits, labels)
    run.backward(loss)
    with torch.no_grad():
        run.model.fc.weight.mul_(1 - 0.1 * run.optimizer.param_groups[1]["lr"])
    run.take_step()
    return loss, logits


def reassigned(run):
    """Put a new tensor in the old one's place, as DINO does with its centre."""
    shadow = run.keep["shadow"]
    shadow.bias = shadow.bias * 0.9 + run.model.fc.bias.detach() * 0.1
    return 1 + shadow.bias.mean()


def accumulating(run, images, labels):
    """Keep the memory of the gradients, which Muon replaces by others."""
    logits = run.network(images).float()
    loss = nn.functional.cross_entropy(logits, labels)
    loss.backward()
    run.take_step()
    run.optimizer.zero_grad(set_to_none=False)
    return loss, logits


class Lookahead(engine.optim.Muon):
    """Count its steps."""

    taken = 0

    def step(self):
        super().step()
        self.taken += 1
        if self.taken % 5 == 0:
            with torch.no_grad():
                self.param_groups[1]["params"][0].mul_(0.9)


def lookahead(model, args, runtime):
    return Lookahead([{"params": [model.conv.weight], "lr": 0.1, "muon": 0.9},
                      {"params": list(model.fc.parameters()), "lr": 0.1, "momentum": 0.9},
                      {"params": list(model.bn.parameters()), "lr": 0.1}], runtime.dtype)


WAITS = "a step waits for the device"
NUMBERS = "a step changes numbers, or draws random ones, on the host"
BITS = "its first steps ended with other bits"
UNLIKE = "in 20 steps no 3 in a row were alike"
# What is in the way: what the log says, what is replaced in the script, and at the run's start.
IN_THE_WAY = {
    "a look at a value": (WAITS, {"network": lambda: Network(waits)}, None),
    "cumulative batch norm": (WAITS, {"network": lambda: Network(momentum=None)}, None),
    "Python's random numbers": (NUMBERS, {"network": lambda: Network(draws_in_python)}, None),
    "NumPy's random numbers": (NUMBERS, {"network": lambda: Network(draws_in_numpy)}, None),
    "a counter": (NUMBERS, {"network": lambda: Network(counts)}, None),
    "a loss by the step": ("a step reads run.step", {
        "train_step": step_with(lambda run: 0.1 if run.step % 5 == 0 else 1.0)}, None),
    "a decay by the rate": (BITS, {"train_step": decaying}, None),
    "a rate by the step itself": (NUMBERS, {"train_step": step_with(lower_rate)}, None),
    "gradients that are kept": (BITS, {"train_step": accumulating}, None),
    "an optimizer that counts": (NUMBERS, {"make_optimizer": lookahead}, None),
    "another optimizer": ("AdamW has its rates on the host", {"make_optimizer": adamw}, None),
    "torch's average of weights": (WAITS, {"train_step": step_with(with_average)},
                                   lambda model, *_: {"average": AveragedModel(model)}),
    "a kept tensor that is replaced": (UNLIKE, {"train_step": step_with(reassigned)},
                                       lambda model, *_: {"shadow": Shadow(model)}),
    "kept numbers": ("schedule in keep is no nn.Module", {},
                     lambda model, optimizer, schedule: {"schedule": schedule}),
}


@both
@pytest.mark.parametrize("case", IN_THE_WAY)
def test_what_a_graph_cannot_repeat_is_eager_and_told_once(name, case, device, tmp_path,
                                                           monkeypatch):
    reason, own, begin = IN_THE_WAY[case]
    if begin:
        starting(monkeypatch, begin)
    flags = ["--device", device]
    with_graphs, log = train(name, tmp_path / "graph", *flags, **own)
    assert log.count(NO_GRAPHS) == 1
    assert f"{NO_GRAPHS} ({reason}): steps take longer\n" in log
    eager, _ = train(name, tmp_path / "eager", *flags, graphs=False, **own)
    assert with_graphs == eager


def test_a_rate_that_a_step_sets_is_that_of_the_step(device, tmp_path):
    """As it is without graphs, where the weights of the group then stay."""
    def none(run):
        run.optimizer.param_groups[1]["lr"] = 0.0
        return 1.0

    networks = []

    def network():
        networks.append(Network())
        return networks[-1]

    torch.manual_seed(0)
    train("train_resnet", tmp_path / "run", "--device", device, network=network,
          train_step=step_with(none))
    torch.manual_seed(0)
    assert torch.equal(networks[0].fc.weight.cpu(), Network().fc.weight)


def test_her_own_batches_are_eager(device, tmp_path, monkeypatch):
    shuffled = data.Batches.shuffled
    monkeypatch.setattr(data.Batches, "shuffled", lambda *arguments: map(
        tuple, shuffled(*arguments)))
    own, log = train("train_resnet", tmp_path / "own", "--device", device)
    assert f"{NO_GRAPHS} (the batches are not those of data.py)" in log
    monkeypatch.undo()
    if device == "cpu":
        tape.stand_in(monkeypatch)
    assert own == train("train_resnet", tmp_path / "ours", "--device", device)[0]


def test_a_schedule_that_changes_the_momentum_is_followed(device, tmp_path, monkeypatch):
    """A graph would keep the momentum of its first step."""
    monkeypatch.setattr(engine.optim, "one_cycle", lambda optimizer, steps: OneCycleLR(
        optimizer, 0.1, steps + 1))
    by_sgd = ["--device", device, "--optimizer", "sgd"]
    with_graphs, log = train("train_resnet", tmp_path / "graph", *by_sgd)
    assert f"{NO_GRAPHS} ({UNLIKE})" in log
    assert with_graphs == train("train_resnet", tmp_path / "eager", *by_sgd, graphs=False)[0]


def test_a_kept_module_is_part_of_the_step(device, captured, tmp_path, monkeypatch):
    """It is compared, and restored between the graph's first step and the eager one."""
    starting(monkeypatch, lambda model, *_: {"shadow": Shadow(model)})
    flags, step = ["--device", device], step_with(with_shadow)
    with_graphs, log = train("train_resnet", tmp_path / "graph", *flags, train_step=step)
    assert NO_GRAPHS not in log and len(captured) == 2
    eager, _ = train("train_resnet", tmp_path / "eager", *flags, train_step=step, graphs=False)
    assert with_graphs == eager
    content = [utils.load_tensors(tmp_path / run / "checkpoint.pt") for run in ("graph", "eager")]
    assert torch.equal(*(each["keep"]["shadow"]["bias"] for each in content))


def freeze(run):
    run.model.conv.weight.requires_grad_(False)


def drop_more(run):
    run.model.dropout.p = 0.5


def decay_more(run):
    run.optimizer.param_groups[0]["weight_decay"] = 0.5


def move(run):
    run.model.bn.running_mean = run.model.bn.running_mean.clone()


def forget_the_momentum(run):
    run.optimizer.state.clear()


def smooth_less(run):
    run.args.label_smoothing = 0.0


def add_a_group(run):
    run.model.scale = nn.Parameter(torch.ones(10, device=run.runtime.device))
    rates = {"lr": 0.05, "initial_lr": 0.002, "max_lr": 0.05, "min_lr": 0.0}  # of OneCycleLR
    run.optimizer.add_param_group({"params": [run.model.scale], **rates})
    run.model.fc.register_forward_hook(lambda module, inputs, output: output * run.model.scale)


@pytest.mark.parametrize("change", [freeze, drop_more, decay_more, move, forget_the_momentum,
                                    smooth_less, add_a_group])
def test_what_changes_between_epochs_is_captured_anew(change, device, captured, tmp_path,
                                                      monkeypatch):
    end_epoch = Run.end_epoch

    def end_and_change(run, results):
        end_epoch(run, results)
        if run.epoch == 3:
            change(run)

    monkeypatch.setattr(Run, "end_epoch", end_and_change)
    flags = ["--device", device, "--cutmix", 0, "--low-res", 0]
    with_graphs, log = train("train_resnet", tmp_path / "graph", *flags)
    assert NO_GRAPHS not in log and len(captured) == 2
    assert with_graphs == train("train_resnet", tmp_path / "eager", *flags, graphs=False)[0]


def test_a_step_may_depend_on_the_epoch(device, captured, tmp_path):
    flags, step = ["--device", device], step_with(lambda run: 1 / (1 + run.epoch))
    with_graphs, log = train("train_resnet", tmp_path / "graph", *flags, train_step=step)
    assert NO_GRAPHS not in log and len(captured) == 5
    eager, _ = train("train_resnet", tmp_path / "eager", *flags, train_step=step, graphs=False)
    assert with_graphs == eager


@pytest.mark.parametrize("attribute, value", [
    ("labels", torch.arange(105) % 7), ("strength", 0.1)])
def test_other_batches_are_captured_anew(attribute, value, device, captured, tmp_path, monkeypatch):
    """Other labels in the fourth epoch, for example, which her network has found."""
    shuffled = data.Batches.shuffled

    def changed(batches, seed, epoch, *arguments):
        if epoch == 3:
            value_there = value.to(device) if torch.is_tensor(value) else value
            setattr(batches, attribute, value_there)
        return shuffled(batches, seed, epoch, *arguments)

    monkeypatch.setattr(data.Batches, "shuffled", changed)
    flags = ["--device", device, "--low-res", 0, "--trivial-augment", 0.5]
    with_graphs, log = train("train_resnet", tmp_path / "graph", *flags)
    assert NO_GRAPHS not in log and len(captured) == 2
    assert with_graphs == train("train_resnet", tmp_path / "eager", *flags, graphs=False)[0]


def test_weights_that_are_trained_later_begin_with_no_momentum(device, tmp_path, monkeypatch):
    """Their group has others with a momentum, and torch's fused step wants it of all or none."""
    end_epoch = Run.end_epoch

    def end_and_thaw(run, results):
        end_epoch(run, results)
        run.model.bn.weight.requires_grad_(True)

    def network():
        model = Network()
        model.bn.weight.requires_grad_(False)
        return model

    def all_weights(model, args, runtime):
        return engine.optim.Muon([{"params": list(model.parameters()), "lr": 0.1, "momentum": 0.9,
                                   "nesterov": True}], runtime.dtype)

    monkeypatch.setattr(Run, "end_epoch", end_and_thaw)
    by_graph, eager, plain = (train(
        "train_resnet", tmp_path / run, "--device", device, *flags, network=network,
        make_optimizer=all_weights, graphs=run == "graph")[0]
        for run, flags in (("graph", []), ("eager", []), ("plain", ["--no-graphs"])))
    assert by_graph == eager
    losses = [[float(row["train_loss"]) for row in rows] for _, rows in (eager, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_capture_that_fails_costs_one_line(device, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: operation failed due to a previous error\nduring capture")

    flags = ["--device", device]
    eager, _ = train("train_resnet", tmp_path / "eager", *flags, graphs=False)
    monkeypatch.setattr(engine.graphs, "capture", fail)
    failed, log = train("train_resnet", tmp_path / "failed", *flags)
    reason = "CUDA error: operation failed due to a previous error during capture"
    assert log.count(NO_GRAPHS) == log.count(f"{NO_GRAPHS} ({reason})") == 1
    assert failed == eager


def test_a_fault_of_the_gpu_ends_the_run(device, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(engine.graphs, "capture", fail)
    with pytest.raises(RuntimeError, match="launch failure"):
        train("train_resnet", tmp_path / "run", "--device", device)


def test_a_graph_of_other_bits_is_not_used(device, tmp_path, monkeypatch):
    """Here its first step also changes a weight's last bit, as another kernel could."""
    flags, capture = ["--device", device], engine.graphs.capture
    eager, _ = train("train_resnet", tmp_path / "eager", *flags, graphs=False)

    class Other:
        def __init__(self, graph):
            self.graph, self.pool = graph, graph.pool

        @torch.no_grad()
        def replay(self):
            self.graph.replay()
            networks[0].fc.bias.mul_(1 + 2**-23)

    networks = []
    starting(monkeypatch, lambda model, *_: networks.append(model))
    monkeypatch.setattr(engine.graphs, "capture", lambda *given: Other(capture(*given)))
    refused, log = train("train_resnet", tmp_path / "other", *flags)
    assert f"{NO_GRAPHS} ({BITS})" in log
    assert refused == eager


def test_checkpoints_hold_rates_as_numbers(device, tmp_path):
    """And nothing of SGD's fused form, so they serve a run without graphs, and a CPU."""
    train("train_resnet", tmp_path / "run", "--device", device)
    content = utils.load_tensors(tmp_path / "run" / "checkpoint.pt")
    for group in content["optimizer"]["param_groups"]:
        assert type(group["lr"]) is float and group["fused"] is None
    assert all(type(rate) is float for rate in content["scheduler"]["_last_lr"])


def test_slow_steps_count_for_no_speed(device, tmp_path, monkeypatch):
    """Those before a graph and its capture, where an epoch begins with them."""
    slow, end_epoch = [], Run.end_epoch

    def note(run, results):
        slow.append(run.clock.slow)
        end_epoch(run, results)

    monkeypatch.setattr(Run, "end_epoch", note)
    train("train_resnet", tmp_path / "run", "--device", device, "--cutmix", 0)
    # The momentum, two eager steps, the capture and a comparison. Later it need not be made.
    assert slow == [5, 1, 4, 1, 1]  # at 20 x 20 pixels, and then at 32 x 32


@pytest.mark.parametrize("ranks, precision, compiled, expected", [
    (1, "bf16", False, True), (1, "fp32", False, True), (1, "fp16", False, False),
    (1, "bf16", True, False), (2, "bf16", False, False)])
def test_graphs_are_for_one_process_of_16_or_32_bits(ranks, precision, compiled, expected,
                                                     monkeypatch, caplog):
    monkeypatch.setattr(engine.runtime, "GRAPHED", ("cpu",))
    monkeypatch.setattr(engine.runtime, "join_ranks", lambda _: (0, ranks))
    caplog.set_level(logging.INFO)
    assert not choose_runtime("cpu", precision, compiled).graphs and not caplog.text
    assert choose_runtime("cpu", precision, compiled, True).graphs == expected
    assert ("no CUDA graphs: they need one process, a GPU" in caplog.text) != expected


def test_a_cpu_has_no_graphs(tmp_path):
    """Not even of today's batch norm: its counters stay on the host."""
    (plain, _), (asked, log) = (train("train_resnet", tmp_path / flag, "--device", "cpu", flag)
                                for flag in ("--no-graphs", "--graphs"))
    assert plain == asked and "by CUDA graphs" not in log


@both
def test_the_rates_lie_on_the_device_only_in_sgds_step(name, parse, monkeypatch):
    """On torch's meta device, where batch norm's counters lie, too."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    script, args = parse(name)
    runtime = engine.runtime.Runtime(torch.device("meta"), torch.float32, graphs=True)
    model = runtime.place(models.ResNet() if name == "train_resnet" else models.resnet18())
    assert all(buffer.device.type == "meta" for buffer in model.buffers())
    optimizer = script.make_optimizer(model, args, runtime)
    optimizer.put_rates_on(runtime.device)
    model(torch.zeros(2, 3, 32, 32, device="meta")).sum().backward()
    with optimizer._rates_on_device():
        for group, rate in zip(optimizer.param_groups, optimizer.rates, strict=True):
            assert group["lr"] is rate and group["fused"]
            for weight in group["params"]:
                sides = [(*pair, side) for *pair, side in zip(
                    weight.stride(), weight.grad.stride(), weight.shape, strict=True) if side > 1]
                assert all(one == other for one, other, _ in sides), "as the fused step wants"
    assert [type(group["lr"]) for group in optimizer.param_groups] == [float] * 3


def test_rates_are_floats_again_after_a_step_that_fails(device):
    weight = nn.Parameter(torch.ones(2, device=device))
    optimizer = engine.optim.Muon([{"params": [weight], "lr": 0.5}], torch.float32)
    optimizer.put_rates_on(device)
    optimizer.set_rates()
    assert optimizer.rates[0].item() == 0.5
    with pytest.raises(ZeroDivisionError), optimizer._rates_on_device():
        raise ZeroDivisionError
    assert optimizer.param_groups[0]["lr"] == 0.5
