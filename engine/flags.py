"""The shared flags, and how defaults, a trained run's settings and given flags merge."""

import argparse
import difflib
import functools
import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable
from os.path import expanduser
from pathlib import Path
from typing import Any, NoReturn

from engine import checkpoint
from engine.process import command_line
from engine.runtime import PRECISIONS
from report.runs import read_config
from utils import UserError, guard, log, user_path


def bounded(kind: type, minimum: float, maximum: float = math.inf) -> Callable[[str], float]:
    """Return an argparse type: a finite `int` or `float` from `minimum` to `maximum`."""
    def convert(text: str) -> float:
        value = kind(text)
        if not minimum <= value <= maximum or value > sys.float_info.max:
            raise argparse.ArgumentTypeError(f"{text} is not between {minimum} and {maximum}")
        return value

    convert.__name__ = "whole number" if kind is int else "number"  # for argparse's message
    return convert


class Parser(argparse.ArgumentParser):
    """The shared flags, in groups; a script adds its own.

    Every flag belongs to the recipe, except those of `data_group`, `output_group` and
    `machine_group`. A resumed run must keep the recipe, and runs are told apart by it.
    """

    def __init__(self, docstring: str, output_dir: str):
        title, _, examples = docstring.partition("\n\n")
        super().__init__(description=title, epilog=examples, allow_abbrev=False)
        self.formatter_class = functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=28, width=100)
        self.data_group = self.add_argument_group("data")
        add = self.data_group.add_argument
        named = os.environ.get("CIFAR100_DIR", "").strip()
        add("--data-dir", type=expanduser, default=expanduser(named or "data"), metavar="PATH",
            help="where CIFAR-100 is or goes, or its archive or HDF5 file; else $CIFAR100_DIR")
        add("--data-url", metavar="URL", help="a mirror of the official archive")
        add("--no-download", action="store_true", help="fail rather than download (offline nodes)")
        add("--weights", type=expanduser, metavar="PATH",
            help="a file of first weights, such as another run's model.pt; or 'random'")
        self.recipe_group = self.add_argument_group("recipe", "a resumed run must keep all of it")
        _add_recipe(self.recipe_group.add_argument)
        self.output_group = output = self.add_argument_group("output")
        output.add_argument("--output-dir", type=user_path, default=user_path(output_dir),
                            metavar="DIR")
        add = output.add_mutually_exclusive_group().add_argument
        add("--resume", action="store_true", help="go on from the checkpoint, if there is one")
        add("--overwrite", action="store_true", help="replace the run that is in --output-dir")
        add = output.add_mutually_exclusive_group().add_argument
        add("--eval-only", action="store_true",
            help="only test the model in --output-dir; write test-report.md and its pictures")
        add("--predict", nargs="+", type=user_path, metavar="PICTURE",
            help="only classify pictures, or folders of them, with that model")
        add = output.add_argument
        add("--tensorboard", action="store_true", help="write DIR/tensorboard, too")
        add("--debug", action="store_true", help="show the traceback of an error")
        self.machine_group = self.add_argument_group("machine and job")
        add = self.machine_group.add_argument
        add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
        add("--compile", action="store_true", help="torch.compile, for runs of an hour on CUDA")
        add("--graphs", action=argparse.BooleanOptionalAction, default=False,
            help="on a GPU, repeat whole training steps as CUDA graphs (not tried on a GPU yet)")
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

    def _take_defaults(self, recipe: dict) -> dict[str, Any]:
        """Return the flags' defaults, show them in --help, and have parse_args leave them out."""
        defaults = {}
        for action in self._actions[1:]:  # the first one is --help
            default = recipe.get(action.dest, action.default)
            if isinstance(default, str):
                default = self._get_value(action, default)  # as argparse itself converts it
            default = defaults.setdefault(action.dest, default)  # of two, the first
            # Some actions name their default themselves, which is taken from them below.
            action.help = (action.help or "").replace(" (default: %(default)s)", "")
            if default is not None and default is not False:
                shown = str(default).replace("%", "%%")  # argparse formats the help
                action.help += f" (default: {shown})"
            action.default = argparse.SUPPRESS
        return defaults

    def read(self, recipe: dict, variant: Callable[[int, str], dict]) -> argparse.Namespace:
        """Parse the command line; raises UserError if it does not fit what --output-dir holds.

        A flag that is not given has the value of the run whose model is used, else of
        `variant(epochs, optimizer)`, else of `recipe`, else its default. The namespace also has
        `recipe` (names), `trained` (that run's config.json or {}), `is_new` (the run begins),
        `script`, `command` and `began`.
        """
        defaults = self._take_defaults(recipe)
        script, flags = command_line()
        given = vars(self.parse_args(flags))
        known = argparse.Namespace(**defaults | given)
        use_model = bool(known.eval_only or known.predict)
        checkpoint.check_output_dir(known.output_dir, known.resume, known.overwrite, use_model)
        trained = _read_trained(known.output_dir, script.stem) if use_model else {}
        others = [action for group in (self.data_group, self.output_group, self.machine_group)
                  for action in group._group_actions]
        recipe_flags = {action.dest: action for action in self._actions[1:] if action not in others}
        of_model = {}
        for name, value in trained.get("settings", {}).items():
            # This machine may compute in another precision.
            if name not in recipe_flags or name == "precision":
                continue
            if name not in given:
                with guard(f"{known.output_dir / 'config.json'}: --{name}", Exception,
                           "; give it again"):
                    of_model[name] = _as_in_training(recipe_flags[name], value, defaults[name])
            elif as_json(given[name]) != value:
                log.info(f"note       --{name} {given[name]}, not {value} as in training")
        # Only a new run reads first weights; model.pt and checkpoints hold all.
        is_new = not (use_model or (known.resume and checkpoint.exists(known.output_dir)))
        settings = defaults | variant(known.epochs, known.optimizer) | of_model | given
        return argparse.Namespace(
            **settings, recipe=list(recipe_flags), trained=trained, is_new=is_new,
            script=script.stem, command=shlex.join(["python", str(script), *flags]),
            began=time.monotonic())


def _add_recipe(add: Callable) -> None:
    share = bounded(float, 0, 1)
    add("--epochs", type=bounded(int, 1), metavar="N", help="passes over the training set")
    add("--batch-size", type=bounded(int, 2), metavar="N", help="images per optimizer step")
    add("--optimizer", choices=("muon", "sgd"), help="of the convolutions; SGD trains the rest")
    add("--lr", type=bounded(float, 1e-9), help="peak rate; with Muon, that of the convolutions")
    add("--weight-decay", type=bounded(float, 0), help="in part 1 with Muon, of the convolutions")
    add("--low-res", type=share, metavar="F",
        help="the first epochs train on small images: this fraction, rounded down")
    add("--label-smoothing", type=share, metavar="P", help="probability spread over all classes")
    add("--cutmix", type=share, metavar="P",
        help="probability that an image gets a box of another one; off in the last epochs")
    add("--trivial-augment", type=share, metavar="S",
        help="strength of one random change of shape or colour for each image; 0 is off")
    add("--seed", type=bounded(int, 0, 2**63 - 1), default=0, help="of all random numbers")
    add("--max-steps", type=bounded(int, 1), metavar="N", help="end, fully annealed, after N steps")
    add("--dataset", choices=("cifar100", "synthetic"), default="cifar100",
        help="synthetic: made-up images of 100 classes, which need no file")
    add("--val-size", type=bounded(int, 0), default=0, metavar="N",
        help="hold out N training images, as many of each class, to choose settings by")
    add("--precision", choices=("auto", *PRECISIONS), default="auto",
        help="auto: bf16 where the chip computes in it, else fp16 on CUDA, else fp32")


def as_json(value: Any) -> Any:  # noqa: ANN401
    """Return a flag's value as config.json holds it; what JSON does not know becomes a text."""
    return json.loads(json.dumps(value, default=str))


def _as_in_training(action: argparse.Action, value: Any, default: Any) -> Any:  # noqa: ANN401
    """Return the value that a flag had in training, from config.json; raises anything."""
    if value == as_json(default):
        return default
    if not action.type or not isinstance(value, (int, float, str, list)):
        return value
    if isinstance(value, list) and action.nargs is None:  # the flag's type reads a whole list
        return value
    convert = [action.type(str(part)) for part in (value if isinstance(value, list) else [value])]
    return convert if isinstance(value, list) else convert[0]


def _read_trained(directory: Path, script: str) -> dict:
    try:
        config = read_config(directory)
    except UserError as error:
        log.info(f"note       {error}: the recipe's defaults are used")
        return {}
    if config["script"] != script:
        raise UserError(f"{directory / 'config.json'}: of a run of {config['script']}.py; use that "
                        "script")
    return config
