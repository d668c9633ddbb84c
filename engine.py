"""How both scripts train: the shared flags, the `Run`, the two loops, and a finished model's use.

A `Run` has a `Position`, `Checkpoints`, and a `Clock`, which decides when to save and when to stop.
"""

import argparse
import dataclasses
import difflib
import json
import logging
import math
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from tqdm import tqdm

import data
import models
import report
import utils
from utils import Runtime, UserError, bounded, log

STARTED = time.monotonic()  # seconds; when torch was loaded, the start of --max-minutes
CHECK_EVERY = 25  # steps between looks at the loss on the host; each costs one synchronisation
SAVE_AFTER = 30  # seconds since the last save, from which on an epoch's end saves
TELL_AFTER = 20  # seconds of one epoch's training, after which a log is told the time left
SHORTEST_SAVE = 10  # seconds; a save is assumed to take at least this long
SIZE_POWER = 1.6  # a step's time grows with an image's side to this power; measured: 1.4 to 1.7
# CutMix is off in this fraction of the epochs, at the end, but in no more than so many: of 40
# epochs, 6 did better than 12 (results/README.md). YOLOX, too, stops mixing images before its end
# (Ge et al. 2021, arXiv:2107.08430).
UNMIXED, MOST_UNMIXED = 0.3, 6
WARMUP = 0.2  # of the steps, in which the rate rises, Smith & Topin 2017, arXiv:1708.07120
# What a checkpoint holds of config.json, and of a Run.
ORIGIN = ("script", "settings", "torch", "runtime", "data", "network", "code")
TRAINED = ("model", "optimizer", "scheduler", "scaler")
CHECKPOINTS = ("checkpoint.pt", "checkpoint-previous.pt")
RUN_FILES = ("config.json", "log.txt", "metrics.csv", *CHECKPOINTS, "model.pt")
ELSEWHERE = "choose another output directory"

# Of images (B, 3, H, W), labels (B,) or soft (B, C), and a generator on their device.
Augmentation = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


class Parser(argparse.ArgumentParser):
    """The flags that both scripts share; `docstring` is a title and, below it, examples."""

    def __init__(self, docstring: str, output_dir: str):
        title, _, examples = docstring.partition("\n\n")
        super().__init__(description=title, epilog=examples, allow_abbrev=False,
                         formatter_class=utils.HelpFormatter)
        self.data_group = self.add_argument_group("data")
        add = self.data_group.add_argument
        add("--data-dir", default=os.environ.get("CIFAR100_DIR", "data"), metavar="PATH",
            help="where CIFAR-100 is or goes, or its archive or HDF5 file; else $CIFAR100_DIR")
        add("--data-url", metavar="URL", help="a mirror of the official archive")
        add("--no-download", action="store_true", help="fail rather than download (offline nodes)")
        self.recipe_names: list[str] = []
        self._recipe_group = self.add_argument_group(
            "recipe", "what the numbers depend on; a resumed run must keep all of it")
        output = self.add_argument_group("output")
        output.add_argument("--output-dir", type=Path, default=Path(output_dir), metavar="DIR",
            help="where the files of the run go")
        add = output.add_mutually_exclusive_group().add_argument
        add("--resume", action="store_true",
            help="go on from the checkpoint in --output-dir, if there is one")
        add("--overwrite", action="store_true", help="replace the run that is in --output-dir")
        add = output.add_mutually_exclusive_group().add_argument
        add("--eval-only", action="store_true",
            help="only test the model.pt in --output-dir; write test-report.md and its pictures")
        add("--predict", nargs="+", type=Path, metavar="PICTURE",
            help="only classify pictures, or folders of them, with the model.pt in --output-dir")
        add("--compare", nargs="+", type=Path, metavar="RUN",
            help="only compare these output directories: write comparison.md and comparison.png")
        output.add_argument("--tensorboard", action="store_true",
            help="write the numbers of metrics.csv into DIR/tensorboard as well (TensorBoard)")
        output.add_argument("--debug", action="store_true", help="show the traceback of an error")
        add = self.add_argument_group("machine and job").add_argument
        add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
        add("--compile", action="store_true",
            help="torch.compile: minutes at the start (by estimate), for runs of an hour on CUDA")
        add("--checkpoint-minutes", type=bounded(float, 0), default=10, metavar="M",
            help="save every M minutes within an epoch, beside its end")
        add("--max-minutes", type=bounded(float, 0.001), metavar="M",
            help="save and stop with exit status 75 before M minutes are over (batch jobs)")

    def error(self, message: str) -> NoReturn:
        """Raise UserError, for one line with hints, instead of printing the usage and exiting."""
        unknown = message.partition("unrecognized arguments:")[2]
        for flag in re.findall(r"(?<!\S)--?[a-zA-Z][\w-]*", unknown):
            for near in difflib.get_close_matches(flag, self._option_string_actions, 1, 0.7):
                message += f"; {flag}: do you mean {near}?"
        raise UserError(f"{message} (--help lists the flags)")

    def add_recipe(self, flag: str, **keywords: object) -> None:
        """Add a flag on which the numbers depend; the keywords are those of add_argument."""
        self.recipe_names.append(self._recipe_group.add_argument(flag, **keywords).dest)

    def add_shared_recipe(self, cutmix: str = "", trivial_augment: str = "") -> None:
        """Add the flags of a recipe that mean the same in both scripts.

        The words end the help of a flag whose default is chosen later; without words it is 0.
        """
        add = self.add_recipe
        add("--label-smoothing", type=bounded(float, 0, 1), default=0.1, metavar="P",
            help="probability spread over all classes in the training loss (Szegedy et al. 2016)")
        add("--cutmix", type=bounded(float, 0, 1), default=None if cutmix else 0.0, metavar="P",
            help="probability that a training image gets a box of another image and a share of its "
                 f"label (Yun et al. 2019); off in the last {10 * UNMIXED:g} of 10 epochs, at most "
                 f"{MOST_UNMIXED}{cutmix}")
        add("--trivial-augment", type=bounded(float, 0, 1), metavar="S",
            default=None if trivial_augment else 0.0,
            help="strength of TrivialAugment, one random change of shape or colour for each "
                 "training image (Müller & Hutter 2021); 1 allows about the greatest changes of "
                 f"torchvision's TrivialAugmentWide{trivial_augment}")
        add("--seed", type=bounded(int, 0, 2**63 - 1), default=0, metavar="N",
            help="of initial weights, order, augmentation and dropout")
        add("--max-steps", type=bounded(int, 1), metavar="N",
            help="end after N optimizer steps, and anneal the learning rate over these")
        add("--dataset", choices=("cifar100", "synthetic"), default="cifar100",
            help="synthetic: made-up images of 100 classes, which need no file")
        add("--val-size", type=bounded(int, 0), default=0, metavar="N",
            help="hold out N training images, as many of each class, to choose settings by")
        add("--precision", choices=("auto", *utils.PRECISIONS), default="auto",
            help="auto: bf16 where the chip computes in it, else fp16 on CUDA, else fp32")

    def read(self) -> argparse.Namespace:
        """Parse the command line; raises UserError if it does not fit what --output-dir holds."""
        args = self.parse_args()
        if not args.compare:
            check_output_dir(args)
        # A finished model is used as it was trained, unless the command says otherwise.
        if args.eval_only or args.predict:
            try:
                self._use_recipe_of_model(args)
                args = self.parse_args()
            except UserError as error:
                raise UserError(f"{args.output_dir / 'config.json'}: {error}") from error
        args.recipe = self.recipe_names
        return args

    def _use_recipe_of_model(self, args: argparse.Namespace) -> None:
        """Have the flags of the recipe default to those that trained the model in --output-dir."""
        self.set_defaults(trained={})
        try:
            config = report.read_config(args.output_dir)
        except UserError as error:
            log.info(f"note       {error}: the recipe's defaults are used")
            return
        if config["script"] != Path(sys.argv[0]).stem:
            raise UserError(f"of a run of {config['script']}.py; use that script")
        # This machine may compute in another precision. argparse checks only defaults of type str.
        recipe = {name: str(value) if type(value) in (int, float) else value
                  for name, value in config["settings"].items()
                  if name in self.recipe_names and name != "precision"}
        self.set_defaults(**recipe, trained=config)


def check_output_dir(args: argparse.Namespace) -> None:
    """Raise UserError if what --output-dir holds does not fit the command."""
    path = args.output_dir
    with utils.guard(f"--output-dir {path}: cannot be read", OSError):
        held = [name for name in RUN_FILES if (path / name).exists()]
        if path.exists() and not path.is_dir():
            raise UserError(f"--output-dir {path}: is a file, not a directory")
    if args.eval_only or args.predict:
        if "model.pt" not in held:
            raise UserError(f"{path}: holds no model.pt; a run writes it at its end")
        return
    # A finished run whose checkpoint is gone cannot be resumed, and is not replaced unasked.
    lost = args.resume and "model.pt" in held and not set(CHECKPOINTS) & set(held)
    if held and (lost or not (args.resume or args.overwrite)):
        going_on = "no checkpoint is left to go on from" if lost else "--resume goes on with it"
        raise UserError(f"{path}: already holds a run ({', '.join(held)}); {going_on}, "
                        f"--overwrite replaces it, or {ELSEWHERE}")


@dataclasses.dataclass
class Position:
    """How far a run has come. A checkpoint stores it."""

    epoch: int = 0  # epochs that are finished
    step: int = 0  # optimizer steps done in the current epoch
    seconds: float = 0.0  # spent in the current epoch, evaluation included
    train_seconds: float = 0.0  # of its training part; 0 until that is done
    slow_seconds: float = 0.0  # of each start's first step, which loads libraries and compiles
    slow_steps: int = 0  # how many these were
    history: list[dict] = dataclasses.field(default_factory=list)  # the rows of metrics.csv


class Clock:
    """Decides when a run saves and when it stops, by the time and by signals, for one process."""

    def __init__(self, checkpoint_minutes: float, max_minutes: float | None):
        self.checkpoint_minutes, self.max_minutes = checkpoint_minutes, max_minutes
        self.stop_signal: int | None = None  # the number of the last signal to stop
        self.longest_step, self.longest_save = 0.0, SHORTEST_SAVE  # seconds
        self.progressed = False  # this process has done a step or an evaluation
        self.lap_began = self.saved_at = time.monotonic()

    def catch_signals(self) -> None:
        """Have signals ask the run to stop, rather than end the process."""
        for stop_signal in (signal.SIGINT, *utils.STOP_SIGNALS):
            signal.signal(stop_signal, self._on_signal)

    def _on_signal(self, signum: int, _frame: object) -> None:
        if signum == signal.SIGINT and self.stop_signal == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C ends the process at once
        self.stop_signal = signum

    def lap(self) -> float:
        """Return the seconds since the last call."""
        began, self.lap_began = self.lap_began, time.monotonic()
        return self.lap_began - began

    def out_of_time(self) -> bool:
        """Return whether --max-minutes leaves no time for one more step and a slow save."""
        # One step, or evaluation, is done at each start: a chain of jobs always comes to an end.
        if not self.max_minutes or not self.progressed:
            return False
        left = 60 * self.max_minutes - (time.monotonic() - STARTED)
        return left < self.longest_step + 2 * self.longest_save


class Checkpoints:
    """checkpoint.pt in an output directory, and the checkpoint before it."""

    def __init__(self, directory: Path):
        self.newest, self.previous = (directory / name for name in CHECKPOINTS)

    def save(self, state: dict) -> None:
        """Write a checkpoint; raises OSError if that fails, and leaves the old ones."""
        utils.save_tensors(self.newest, state, self.previous)

    def restore(self, use: Callable[[Path, dict], None]) -> tuple[Path, dict, list[str]] | None:
        """Call `use(path, state)` with the newest whole checkpoint, if there is one.

        Return both, and in words what newer file is damaged. `use` raises DamagedFile for what is
        no checkpoint. Raises UserError if there are files and none is whole.
        """
        damaged = []
        for path in filter(Path.exists, (self.newest, self.previous)):
            try:
                state = utils.load_tensors(path)
                use(path, state)
            except utils.DamagedFile as error:
                damaged.append(str(error))
                continue
            if path == self.previous:
                # Promote it, or the next save would keep the damaged file as the previous one.
                os.replace(path, self.newest)
            return path, state, damaged
        if damaged:
            raise UserError(f"{'; '.join(damaged)}; --overwrite starts again")
        return None


class Run:
    """One training run and its files; `required` is the course's test accuracy, in %."""

    def __init__(self, args: argparse.Namespace, runtime: Runtime, dataset: data.Dataset,
                 required: float, steps_per_epoch: int):
        self.args, self.runtime, self.output_dir = args, runtime, args.output_dir
        self.dataset, self.required, self.steps_per_epoch = dataset, required, steps_per_epoch
        self.total_steps = min(args.epochs * steps_per_epoch, args.max_steps or math.inf)
        self.epochs = math.ceil(self.total_steps / steps_per_epoch)
        self.position = Position()
        self.sums = torch.zeros(3, device=runtime.device)  # of the epoch: loss, correct, images
        self.statistics: list[Tensor] = []  # of batch norm, where each rank has its own
        self.clock = Clock(args.checkpoint_minutes, args.max_minutes)
        self.checkpoints = Checkpoints(args.output_dir)
        self.unsaved = False  # the last save failed
        self.has_told = False  # how much time is left
        self.writer = None  # to TensorBoard's file
        if args.tensorboard:
            with utils.guard("--tensorboard needs pip install 'tensorboard>=2.17.1'", Exception):
                from torch.utils import tensorboard  # noqa: F401

    @property
    def epoch(self) -> int:
        """How many epochs are finished."""
        return self.position.epoch

    @property
    def step(self) -> int:
        """How many steps of the current epoch are done."""
        return self.position.step

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LRScheduler,
              sizes: list[int], augment: Augmentation | None = None) -> None:
        """Begin, or with --resume go on; `sizes` are the sides of each epoch's images in pixels."""
        check_groups(model, optimizer.param_groups)
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.scaler, self.sizes = self.runtime.scaler(), sizes
        self.augmentation = augment
        self.generator = torch.Generator(self.runtime.device) if augment else None
        self.network = model  # what a training step calls
        self.config = describe_run(self)
        if self.runtime.ranks > 1:
            self.statistics = [tensor for tensor in model.buffers() if tensor.is_floating_point()]
            self.network = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        self.clock.catch_signals()
        with utils.guard(f"{self.output_dir}: cannot be written", OSError,
                         f"; {ELSEWHERE}, or make room"):
            state = None if self.runtime.rank else self._open()
        state = self.runtime.broadcast(state)
        if self.runtime.rank and state:
            self._set_state(state)
        if self.runtime.compile:
            log.info("compile    begins with the first step, and again for images of another size")
        self._write_for_tensorboard()
        self.clock.lap()
        self.clock.saved_at = time.monotonic()

    def _open(self) -> dict | None:
        """Take possession of the output directory; return the state to go on from, if any."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.lock = (self.output_dir / ".lock").open("a")  # held until the process ends
        if not utils.try_lock(self.lock):
            raise UserError(f"{self.output_dir}: another process is at work on this run")
        check_output_dir(self.args)  # again, for loading the data took a while
        found = self.checkpoints.restore(self._use_checkpoint) if self.args.resume else None
        if not found:
            for name in (*RUN_FILES, *report.RUN_REPORTS, *report.TEST_REPORTS):
                (self.output_dir / name).unlink(missing_ok=True)
            self._write_config()
        log.addHandler(logging.FileHandler(self.output_dir / "log.txt", errors="replace"))
        report.print_words(self.config["in_words"])
        if found:
            self._tell_of_resumption(*found)
            return found[1]
        if self.args.resume:
            log.info(f"resume     no checkpoint in {self.output_dir}, so the run begins")
        return None

    def _write_config(self) -> None:
        report.write_text(self.output_dir / "config.json", json.dumps(self.config, indent=2) + "\n")

    def _tell_of_resumption(self, path: Path, state: dict, damaged: list[str]) -> None:
        for line in damaged:
            log.info(f"warning    {line}; the checkpoint before it is used")
        last = f" (test acc {self.position.history[-1]['test_acc']:.2%})" if self.epoch else ""
        log.info(f"resume     after {self.epoch} epochs{last} and {self.step} steps ({path})")
        machine = f"{state['runtime']}, torch {state['torch']}"
        if machine != f"{self.runtime}, torch {torch.__version__}":
            log.info(f"note       {path} comes from {machine}: the end will not be the same bits")
        code, before = self.config["code"], state.get("code")
        note = report.code_has_changed(before, code)
        if not note or self.epoch == self.epochs:
            self.config["code"] = before
            return
        log.info(note)
        # From now on the run is of both versions.
        modules = f"{before['modules'] if before else 'unknown'} then {code['modules']}"
        self.config["code"] = {**code, "changed": True, "modules": modules}
        self.config["in_words"]["code"] = f"changed while it was trained: {modules}"
        self._write_config()

    def _use_checkpoint(self, path: Path, state: dict) -> None:
        """Set the state that a checkpoint holds, if it is one of this recipe and these images."""
        try:
            script, before, now = state["script"], state["settings"], self.config["settings"]
            if script != self.config["script"]:
                raise UserError(f"{path}: written by {script}.py; {ELSEWHERE}")
            known = state["position"].keys() == dataclasses.asdict(Position()).keys()
            if not known or not set(self.args.recipe) <= set(before):
                raise UserError(f"{path}: of older code; finish it with that, or {ELSEWHERE}")
            changed = [f"--{name.replace('_', '-')} {now[name]} (was {before[name]})"
                       for name in self.args.recipe if now[name] != before[name]]
            if changed:
                raise UserError(f"{path}: cannot go on with other settings: {', '.join(changed)}; "
                                f"use the old ones, or {ELSEWHERE}")
            if state["data"] != self.config["data"]:
                raise UserError(f"{path}: of a run on other images; --data-dir must hold the same")
            if difference := models.difference(state["model"], self.model):
                raise UserError(f"{path}: of another network: {difference}; "
                                f"{ELSEWHERE}")
            ours, saved = ([len(group["params"]) for group in optimizer["param_groups"]]
                           for optimizer in (self.optimizer.state_dict(), state["optimizer"]))
            if ours != saved:
                raise UserError(f"{path}: of another optimizer, with groups of {saved} weights, "
                                f"not {ours}; {ELSEWHERE}")
            self._set_state(state)
            # Of the run, not of this start, which may leave out --weights.
            self.config["settings"] = before
        except (UserError, OSError, torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:  # what is no checkpoint can raise anything
            if utils.is_out_of_memory(error):
                raise UserError(f"{path}: asks for more memory than there is") from error
            reason = f"not a whole checkpoint of this script ({utils.one_line(error)[:200]})"
            raise utils.DamagedFile(f"{path}: {reason}") from error

    def state_dict(self) -> dict:
        """Return all that a continuation needs: tensors, numbers, strings, lists and dicts."""
        cuda = self.runtime.device.type == "cuda"
        of_rank = {"sums": self.sums.cpu(), "cpu_rng": torch.get_rng_state(),
                   "cuda_rng": torch.cuda.get_rng_state(self.runtime.device) if cuda else None,
                   "statistics": [tensor.cpu() for tensor in self.statistics]}
        origin = {name: self.config[name] for name in ORIGIN}
        trained = {name: getattr(self, name).state_dict() for name in TRAINED}
        return {**origin, "position": dataclasses.asdict(self.position),
                "ranks": self.runtime.gather(of_rank), **trained}

    def _set_state(self, state: dict) -> None:
        for name in TRAINED:
            getattr(self, name).load_state_dict(state[name])
        # A momentum that is not laid out in memory as its weight is would slow every step down.
        for weight, buffers in self.optimizer.state.items():
            for name, buffer in buffers.items():
                if getattr(buffer, "shape", None) == weight.shape:
                    buffers[name] = torch.empty_like(weight).copy_(buffer)
        self.position = Position(**state["position"])
        if len(state["ranks"]) != self.runtime.ranks:
            # With another number of ranks, rank 0 takes the sums of all, so that they count once.
            total = sum(of_rank["sums"] for of_rank in state["ranks"])
            self.sums.copy_(total if self.runtime.rank == 0 else torch.zeros(3))
            torch.manual_seed(self.rank_seed())
            return
        of_rank = state["ranks"][self.runtime.rank]
        self.sums.copy_(of_rank["sums"])
        for tensor, value in zip(self.statistics, of_rank.get("statistics", ()), strict=False):
            tensor.copy_(value)
        torch.set_rng_state(of_rank["cpu_rng"])
        if of_rank["cuda_rng"] is not None and self.runtime.device.type == "cuda":
            torch.cuda.set_rng_state(of_rank["cuda_rng"], self.runtime.device)

    def augment(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return a batch as the user's own augmentation makes it, the same after a resume."""
        if not self.augmentation:
            return images, labels
        step = self.epoch * self.steps_per_epoch + self.step
        # Rank + 1: NumPy ignores a 0 at the end, and (seed, step) is the seed of an epoch's order.
        self.generator.manual_seed(data.epoch_seed(self.args.seed, step, self.runtime.rank + 1))
        return self.augmentation(images, labels, self.generator)

    def rank_seed(self) -> int:
        """Return the seed of torch's global generator for this epoch on this rank."""
        return data.epoch_seed(self.args.seed, self.epoch) + self.runtime.rank

    def watch(self, batches: Iterable, name: str, done: int = 0,
              total: int | None = None) -> Iterator:
        """Yield `batches`, numbers `done` to `total`, by default all, under a progress bar."""
        total = len(batches) if total is None else total
        text = f"epoch {self.epoch + 1} {name}"
        with report.progress(batches, text, self.runtime, done, total) as bar:
            drawn = iter(bar)
            for number in range(done, total):
                # Before the batch is drawn: if it is random, it is the same after a resume.
                self._stop_or_save()
                began = time.monotonic()
                yield next(drawn)
                ended = time.monotonic()
                self.clock.longest_step = max(self.clock.longest_step, ended - began)
                if name == "train":
                    self.clock.progressed = True
                    if number == done:
                        first_ended = ended
                        self.position.slow_seconds += ended - began
                        self.position.slow_steps += 1
                    else:
                        step_seconds = (ended - first_ended) / (number - done)
                        self._tell_time_left(step_seconds, total - number - 1, bar)

    def _tell_time_left(self, step_seconds: float, steps: int, bar: tqdm) -> None:
        """Show the time left at the bar, or log it once, TELL_AFTER seconds into an epoch."""
        is_late = step_seconds * (self.step - self.position.slow_steps) > TELL_AFTER
        if bar.disable and (self.has_told or not is_late):
            return
        # A guess of the evaluation: a forward pass is a third of a step.
        images = sum(len(split.labels) for split in self.dataset.evaluated().values())
        relative = (self.sizes[-1] / self.sizes[self.epoch]) ** SIZE_POWER
        evaluation = step_seconds * self.steps_per_epoch * relative / 3
        evaluation *= images / len(self.dataset.train.labels)
        left = report.duration(step_seconds * steps + evaluation + self._seconds_ahead(
            step_seconds * self.steps_per_epoch, evaluation))
        bar.set_postfix_str(f"{left} left in all", refresh=False)
        if bar.disable:
            self.has_told = True
            log.info(f"time       about {left} left, at {step_seconds:.3g} s a step")

    def _stop_or_save(self) -> None:
        """Stop if a rank has a reason to, or save if it is time to; the ranks agree on that."""
        clock = self.clock
        save_is_due = time.monotonic() - clock.saved_at > 60 * clock.checkpoint_minutes
        mine = torch.tensor([clock.stop_signal or 0, clock.out_of_time(), save_is_due])
        signum, must_stop, must_save = map(int, self.runtime.reduce(mine, "MAX").tolist())
        if signum:
            self._stop(signal.Signals(signum).name)
        elif must_stop:
            self._stop(f"--max-minutes {clock.max_minutes:g}")
        elif must_save:
            self._save_or_warn()

    def _stop(self, reason: str) -> NoReturn:
        where = f"{reason}: stopped in epoch {self.epoch + 1} after {self.step} steps"
        newest, again = self.checkpoints.newest, f"{utils.AGAIN} goes on"
        with utils.guard(f"{where}, but not saved", OSError, f"; make room, and {again} from what "
                         f"{newest} holds, if it is there", utils.FAILED):
            self.save()
        raise UserError(f"{where}, saved in {newest}; {again}", utils.STOPPED)

    def check_gradients(self) -> None:
        """In the first step of each start, name the weights that no gradient reaches."""
        if self.clock.progressed:
            return
        unused = [name for name, parameter in self.model.named_parameters()
                  if parameter.requires_grad and parameter.grad is None]
        if unused and self.runtime.ranks > 1:
            raise UserError(f"no gradient reaches {', '.join(unused)}: the processes of torchrun "
                            "must share all; remove them, or set requires_grad = False")
        if unused:
            log.info(f"note       no gradient reaches {', '.join(unused)} in the first step")

    def check_finite(self) -> None:
        """Raise UserError if a loss of this epoch was NaN or infinite; all ranks must call it."""
        self._require_finite(self.runtime.reduce(self.sums)[0].item())

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            step = self.epoch * self.steps_per_epoch + self.step
            raise UserError(f"the loss was not finite by step {step}; start again with "
                            f"--overwrite and a lower --lr, or --precision fp32",
                            utils.FAILED)

    def end_training(self) -> None:
        """Check the loss, note the time, average the ranks' statistics; all ranks must call it."""
        self.check_finite()
        self.position.seconds += self.clock.lap()
        if not self.position.train_seconds:  # else done before this start
            self.position.train_seconds = self.position.seconds
            for tensor in self.statistics:
                torch.distributed.all_reduce(tensor)
                tensor /= self.runtime.ranks

    def end_epoch(self, results: dict[str, report.Metrics]) -> None:
        """Record the epoch, save, and print its line. `results` are by split, train first."""
        position = self.position
        position.seconds += self.clock.lap()
        self._require_finite(sum(metrics.loss for metrics in results.values()))
        rate, seconds_left = self._pace(results["train"].images)
        position.epoch += 1
        row = {"dataset": self.config["dataset"], "epoch": self.epoch, "epochs": self.epochs,
               "image_size": self.sizes[self.epoch - 1],
               "lr": self.optimizer.param_groups[0]["lr"], **report.metric_columns(results),
               "images_per_second": rate, "seconds": position.seconds, "eta_seconds": seconds_left}
        self.position = Position(self.epoch, history=[*position.history, row])
        self.sums.zero_()
        self.clock.progressed = True
        log.info(report.epoch_line(row))
        is_due = time.monotonic() - self.clock.saved_at > SAVE_AFTER
        if self.epoch == self.epochs or self.runtime.broadcast(is_due):
            self._save_or_warn()
        self._write_for_tensorboard()

    def _write_for_tensorboard(self) -> None:
        """Write the last epoch. A new writer writes all: purge_step hides what older files hold."""
        if not self.args.tensorboard or self.runtime.rank:
            return
        try:
            rows = self.position.history[-1:] if self.writer else self.position.history
            self.writer = self.writer or torch.utils.tensorboard.SummaryWriter(
                self.output_dir / "tensorboard", purge_step=0)
            for row in rows:
                for name in row.keys() - {"dataset", "epoch", "epochs"}:
                    self.writer.add_scalar(name, row[name], row["epoch"])
            self.writer.flush()
        except Exception as error:  # no curve is worth a run
            self.writer = None
            log.info(f"warning    not written for TensorBoard ({error}); training goes on")

    def _pace(self, images: int) -> tuple[float, float]:
        """Return this epoch's training images/s, and the seconds that the epochs to come take."""
        position, rate = self.position, images / self.position.train_seconds
        if position.slow_steps < position.step:
            # Leave the slow steps out.
            rate = (images * (1 - position.slow_steps / position.step)
                    / (position.train_seconds - position.slow_seconds))
        evaluation = position.seconds - position.train_seconds
        return rate, self._seconds_ahead(images / rate, evaluation)

    def _seconds_ahead(self, training: float, evaluation: float) -> float:
        """Return the seconds that all later epochs take, by those of this epoch's two parts."""
        costs = [size**SIZE_POWER for size in self.sizes]
        after = sum(costs[self.epoch + 1 :])
        if self.epoch + 1 < self.epochs:
            # --max-steps may cut the last epoch short.
            after -= costs[-1] * (self.epochs - self.total_steps / self.steps_per_epoch)
        return training * after / costs[self.epoch] + evaluation * (self.epochs - self.epoch - 1)

    def save(self) -> None:
        """Write checkpoint.pt and metrics.csv; raises OSError if there is no new checkpoint."""
        began = time.monotonic()
        self.position.seconds += self.clock.lap()
        self.check_finite()
        state = self.state_dict()
        self.clock.saved_at, self.unsaved = began, True
        if self.runtime.rank == 0:
            self.checkpoints.save(state)
            try:
                report.write_metrics(self.output_dir, self.position.history)
            except OSError as error:
                log.info(f"warning    metrics.csv not written ({error}); the next save tries again")
        self.unsaved = False
        self.clock.saved_at = time.monotonic()
        self.clock.longest_save = max(self.clock.longest_save, self.clock.saved_at - began)

    def _save_or_warn(self) -> None:
        try:
            self.save()
        except OSError as error:
            log.info(f"warning    not saved ({error}); training goes on, the next save tries again")

    def finish(self) -> None:
        """Write model.pt and the report, and print the last lines."""
        with utils.guard(f"{self.output_dir}: not all is written", OSError, "; make room, and "
                         f"{utils.AGAIN} does what is left", utils.FAILED):
            if self.runtime.broadcast(self.unsaved):
                self.save()
            if self.runtime.rank == 0:
                # Write it again: a kill may have come between the checkpoint and metrics.csv.
                report.write_metrics(self.output_dir, self.position.history)
                weights = {name: value.cpu() for name, value in self.model.state_dict().items()}
                utils.save_tensors(self.output_dir / "model.pt", weights)
                report.write_run_report(self.output_dir, self.position.history)
        log.info(f"peak memory {utils.peak_memory(self.runtime.device):.2f} GB")
        log.info(report.files_line(self.output_dir, (*RUN_FILES, *report.RUN_REPORTS)))
        accuracy = self.position.history[-1]["test_acc"]
        verdict = report.verdict(accuracy, self.config["required_accuracy"])
        log.info(f"final test accuracy {accuracy:.2%} ({verdict})")


def describe_run(run: Run) -> dict:
    """Return what config.json says of a run."""
    runtime, dataset, recipe = run.runtime, run.dataset, run.args.recipe
    settings = {name: str(value) if isinstance(value, Path) else value
                for name, value in vars(run.args).items() if name not in ("recipe", "trained")}
    settings["precision"] = runtime.precision
    code, words = report.describe_code(), report.in_words(runtime, dataset, run.model)
    words["code"] = report.name_of_code(code).removeprefix("code ")
    words["recipe"] = ", ".join(
        f"{name.replace('_', ' ')} {settings[name]}" for name in (*recipe, "weights")
        if settings.get(name) is not None and settings[name] is not False)
    return {"script": Path(sys.argv[0]).stem, "dataset": dataset.name,
            "required_accuracy": run.required if dataset.name == "cifar100" else None,
            "runtime": str(runtime), "torch": str(torch.__version__),
            "python": platform.python_version(), "system": platform.platform(),
            "code": code, "data": dataset.checksum, "classes": list(dataset.class_names),
            "network": models.describe(run.model), "recipe": list(recipe), "settings": settings,
            "in_words": words | recipe_in_words(run)}


def recipe_in_words(run: Run) -> dict[str, str]:
    """Return what the flags do not say, by the first word of its line in the log."""
    groups = []
    for group in run.optimizer.param_groups:
        count = sum(parameter.numel() for parameter in group["params"])
        kind, rate = group.get("kind", "SGD"), group.get("max_lr", group["lr"])
        groups.append(f"{kind} of {count:,} weights at rate {rate:g}, decay "
                      f"{group['weight_decay']:g}")
    sizes = []
    for size in dict.fromkeys(run.sizes):
        first, count = run.sizes.index(size) + 1, run.sizes.count(size)
        epochs = f"epochs {first} to {first + count - 1}" if count > 1 else f"epoch {first}"
        sizes.append(f"{size}px in {epochs}")
    changes = ["crop", "flip"]
    if run.args.cutmix:
        mixed = cutmix_by_epoch(run.epochs, run.args.cutmix)
        changes.append(f"CutMix until epoch {len(mixed) - mixed.count(0)}")
    if run.args.trivial_augment:
        changes.append(f"TrivialAugment {run.args.trivial_augment:g}")
    if run.augmentation:
        changes.append(getattr(run.augmentation, "__name__", "AUGMENT"))
    return {"optimizer": "; ".join(groups),
            "steps": f"{run.total_steps:,}, {run.steps_per_epoch:,} an epoch",
            "images": f"{', '.join(sizes)}; random {', '.join(changes)}",
            "output": str(run.output_dir)}


def check_groups(model: nn.Module, groups: list[dict]) -> None:
    """Raise UserError unless every weight that is to be trained is in exactly one group."""
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (count := grouped.count(id(parameter))) != 1:
            raise UserError(f"the network's {name} is in {count} groups of the optimizer, not in "
                            "one: see make_optimizer")


def check_outputs(logits: Tensor, dataset: data.Dataset) -> None:
    """Raise UserError unless there is an output (B, C) for each of the classes."""
    classes = len(dataset.class_names)
    if logits.ndim != 2 or logits.shape[1] != classes:
        raise UserError(f"the network's outputs are {tuple(logits.shape)}, and must be "
                        f"({len(logits)}, {classes}), for there are {classes} classes")


def part_of(epochs: int, fraction: float) -> int:
    """Return how many epochs are a fraction of them, rounded down."""
    return int(fraction * epochs + 1e-9)  # 0.58 x 50 is 28.999... in floating point


def low_resolution_first(epochs: int, fraction: float, low: int, full: int) -> list[int]:
    """Return each epoch's side of the images, in pixels: `low` in the first `fraction` of them."""
    low_epochs = part_of(epochs, fraction)
    return [low] * low_epochs + [full] * (epochs - low_epochs)


def cutmix_by_epoch(epochs: int, probability: float) -> list[float]:
    """Return each epoch's probability of CutMix, which is 0 in the last epochs."""
    unmixed = min(part_of(epochs, UNMIXED), MOST_UNMIXED)
    return [probability] * (epochs - unmixed) + [0.0] * unmixed


def one_cycle(optimizer: torch.optim.Optimizer, total_steps: int) -> OneCycleLR:
    """Return Smith & Topin's schedule: rates rise linearly to each group's `lr`, then fall to 0."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    # One step more keeps the last rate above 0. Below 6 steps OneCycleLR divides by zero.
    return OneCycleLR(optimizer, peaks, max(total_steps, 5) + 1, pct_start=WARMUP,
                      anneal_strategy="linear", cycle_momentum=False)


def train_one_epoch(run: Run, batches: Iterable, label_smoothing: float) -> report.Metrics:
    """Train on what is left of the current epoch; return the means over the whole of it.

    `batches` yield float images (B, 3, H, W), labels and a weight, from step `run.step` on. Labels
    are int64 (B,), or soft, (B, classes), as CutMix or an augmentation makes them; a prediction is
    then right if it is the class of the largest share. The loss is cross entropy with label
    smoothing (Szegedy et al. 2016, arXiv:1512.00567, section 7). Raises UserError if it stops being
    finite, or on a signal to stop.
    """
    run.model.train()
    if run.step == 0:
        torch.manual_seed(run.rank_seed())
    end = min(run.steps_per_epoch, run.total_steps - run.epoch * run.steps_per_epoch)
    for images, labels, weight in run.watch(batches, "train", run.step, end):
        images, labels = run.augment(images, labels)
        with run.runtime.autocast():
            logits = run.network(images).float()  # (B, classes)
        check_outputs(logits, run.dataset)
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        run.optimizer.zero_grad()
        run.scaler.scale(loss * weight).backward()
        run.check_gradients()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.scheduler.step()
        # A rank without a share trains on a filler image of weight 0, which does not count.
        if weight:
            run.sums[0].add_(loss.detach() * len(labels))
            classes = labels if labels.ndim == 1 else labels.argmax(1)
            run.sums[1].add_((logits.argmax(1) == classes).sum())
            run.sums[2].add_(len(labels))
        run.position.step += 1
        if run.step % CHECK_EVERY == 0:
            run.check_finite()
    run.end_training()
    loss_sum, correct, count = run.runtime.reduce(run.sums).tolist()
    return report.Metrics(loss_sum / count, correct / count, math.nan, int(count))


@torch.inference_mode()
def infer(model: nn.Module, batches: Iterable, runtime: Runtime) -> tuple[Tensor, Tensor]:
    """Return all ranks' logits, float32 (N, classes), and labels, int64 (N,), in order, on the CPU.

    `batches` yield float images (B, 3, H, W) and labels (B,). The model runs in evaluation mode.
    """
    model.eval()
    logits, labels = [], []
    for images, targets in batches:
        with runtime.autocast():
            logits.append(model(images).float())
        labels.append(targets)
    lengths = [len(targets) for targets in labels]

    def in_order(values: list[Tensor]) -> Tensor:
        # One transfer for all batches of a rank; then the ranks take their turn, batch by batch.
        of_ranks = runtime.gather((torch.cat(values).cpu(), lengths))
        turns = zip(*(part.split(lengths) for part, lengths in of_ranks), strict=True)
        return torch.cat([batch for turn in turns for batch in turn])

    return in_order(logits), in_order(labels)


def evaluate(model: nn.Module, batches: Iterable, runtime: Runtime) -> report.Metrics:
    """Return cross entropy, top-1 and top-5 accuracy over the batches of all ranks."""
    return report.score(*infer(model, batches, runtime))


def use_model(model: nn.Module, args: argparse.Namespace, runtime: Runtime,
              load_data: Callable[[argparse.Namespace], data.Dataset], stats: data.Stats,
              batch_size: int, size: int) -> None:
    """Classify pictures with a run's model.pt, or report on it with the test set.

    `model` is the network, with any weights; images are `size` x `size` pixels. Raises UserError.
    """
    runtime = runtime._replace(compile=False)  # which takes longer than one pass over the images
    model = runtime.place(model)
    models.load_weights(model, args.output_dir / "model.pt")
    if args.predict:
        images, files = data.pictures(args.predict)
        split = data.Split(images, torch.zeros(len(images), dtype=torch.int64))  # labels not read
    else:
        dataset = load_data(args)
        data.check(dataset)
        report.print_words(report.in_words(runtime, dataset, model))
        split = dataset.test
    batches = data.Batches(split, batch_size, stats, runtime, size)
    logits, _ = infer(model, report.progress(batches, "test", runtime), runtime)
    if runtime.rank:
        return
    note = report.code_has_changed(args.trained.get("code"), report.describe_code())
    if note and args.trained:
        log.info(note)
    if args.predict:
        report.print_predictions(logits, args.trained.get("classes", data.CLASS_NAMES), files)
    else:
        check_outputs(logits, dataset)
        report.write_test_report(logits, dataset, args.output_dir)
