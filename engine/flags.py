"""The flags that both scripts share, and how defaults, a model's run and the user's words merge."""

import argparse
import difflib
import math
import os
import re
import shlex
import sys
import time
from argparse import SUPPRESS, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from engine.checkpoint import check_output_dir
from engine.process import command_line
from engine.runtime import PRECISIONS
from report.runs import read_config
from utils import UserError, log


def bounded(kind: type, minimum: float, maximum: float = math.inf) -> Callable[[str], float]:
    """Return an argparse type: a finite `int` or `float` from `minimum` to `maximum`."""

    def convert(text: str) -> float:
        value = kind(text)
        if not minimum <= value <= maximum or value > sys.float_info.max:
            raise argparse.ArgumentTypeError(f"{text} is not between {minimum} and {maximum}")
        return value

    convert.__name__ = "whole number" if kind is int else "number"  # for argparse's message
    return convert


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """100 columns wide; leaves examples as they are."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28, width=100)


class Parser(argparse.ArgumentParser):
    """The shared flags; `docstring` is a title and, below it, examples.

    A script adds its own flags to `recipe_group` or `data_group`. Flags of the recipe, on which
    the numbers depend, take their defaults from the script's RECIPE; see `read`.
    """

    def __init__(self, docstring: str, output_dir: str):
        title, _, examples = docstring.partition("\n\n")
        super().__init__(description=title, epilog=examples, allow_abbrev=False,
                         formatter_class=HelpFormatter)
        self._add_data()
        self._add_recipe()
        self._add_output(output_dir)
        add = self.add_argument_group("machine and job").add_argument
        add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
        add("--compile", action="store_true",
            help="torch.compile: minutes at the start (by estimate), for runs of an hour on CUDA")
        add("--checkpoint-minutes", type=bounded(float, 0), default=10, metavar="M",
            help="save every M minutes within an epoch, beside its end")
        add("--max-minutes", type=bounded(float, 0.001), metavar="M",
            help="save and stop with exit status 75 before M minutes are over (batch jobs)")

    def _add_data(self) -> None:
        self.data_group = self.add_argument_group("data")
        add = self.data_group.add_argument
        add("--data-dir", default=os.environ.get("CIFAR100_DIR", "data"), metavar="PATH",
            help="where CIFAR-100 is or goes, or its archive or HDF5 file; else $CIFAR100_DIR")
        add("--data-url", metavar="URL", help="a mirror of the official archive")
        add("--no-download", action="store_true", help="fail rather than download (offline nodes)")

    def _add_recipe(self) -> None:
        self.recipe_group = self.add_argument_group(
            "recipe", "what the numbers depend on; a resumed run must keep all of it")
        add = self.recipe_group.add_argument
        add("--epochs", type=bounded(int, 1), metavar="N",
            help="passes over the training set; the schedule is stretched to fit")
        add("--batch-size", type=bounded(int, 2), metavar="N", help="images per optimizer step")
        add("--optimizer", choices=("muon", "sgd"),
            help="muon: Muon for the convolutions, SGD for the rest; sgd: SGD for all")
        add("--lr", type=bounded(float, 1e-9), metavar="LR",
            help="peak learning rate; with muon it is that of the convolutions alone")
        add("--weight-decay", type=bounded(float, 0), metavar="WD",
            help="weight decay; in part 1 with muon it is that of the convolutions alone")
        add("--low-res", type=bounded(float, 0, 1), metavar="F",
            help="fraction of the epochs, rounded down, that come first and train on small images, "
                 "which is two to three times as fast on a CPU (progressive resizing)")
        add("--label-smoothing", type=bounded(float, 0, 1), metavar="P",
            help="probability spread over all classes in the training loss (Szegedy et al. 2016)")
        add("--cutmix", type=bounded(float, 0, 1), metavar="P",
            help="probability that a training image gets a box of another image and a share of its "
                 "label (Yun et al. 2019); off in the last 3 of 10 epochs, at most 6")
        add("--trivial-augment", type=bounded(float, 0, 1), metavar="S",
            help="strength of TrivialAugment, one random change of shape or colour for each "
                 "training image (Müller & Hutter 2021); 1 allows about the greatest changes of "
                 "torchvision's TrivialAugmentWide")
        add("--seed", type=bounded(int, 0, 2**63 - 1), default=0, metavar="N",
            help="of initial weights, order, augmentation and dropout")
        add("--max-steps", type=bounded(int, 1), metavar="N",
            help="end after N optimizer steps, and anneal the learning rate over these")
        add("--dataset", choices=("cifar100", "synthetic"), default="cifar100",
            help="synthetic: made-up images of 100 classes, which need no file")
        add("--val-size", type=bounded(int, 0), default=0, metavar="N",
            help="hold out N training images, as many of each class, to choose settings by")
        add("--precision", choices=("auto", *PRECISIONS), default="auto",
            help="auto: bf16 where the chip computes in it, else fp16 on CUDA, else fp32")

    def _add_output(self, output_dir: str) -> None:
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
        output.add_argument("--tensorboard", action="store_true",
            help="write the numbers of metrics.csv into DIR/tensorboard as well (TensorBoard)")
        output.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        """Raise UserError, for one line with hints, instead of printing the usage and exiting."""
        unknown = message.partition("unrecognized arguments:")[2]
        for flag in re.findall(r"(?<!\S)--?[a-zA-Z][\w-]*", unknown):
            for near in difflib.get_close_matches(flag, self._option_string_actions, 1, 0.7):
                message += f"; {flag}: do you mean {near}?"
        raise UserError(f"{message} (--help lists the flags)")

    def read(self, recipe: dict, variant: Callable[[int, str], dict]) -> Namespace:
        """Parse the command line; raises UserError if it does not fit what --output-dir holds.

        A flag that is not given has the value of the run whose model is used, if one is; else that
        of `variant(epochs, optimizer)`; else that of `recipe`; else its own default. The namespace
        also has `recipe` (names), `trained` (the config.json of that run, or {}), `script`,
        `command` and `began` (a time of time.monotonic).
        """
        defaults = self._take_defaults(recipe)
        given = vars(self.parse_args())
        known = Namespace(**defaults | given)
        check_output_dir(known.output_dir, known.resume, known.overwrite,
                         bool(known.eval_only or known.predict))
        script, flags = command_line()
        recipe_names = [action.dest for action in self.recipe_group._group_actions]
        trained = self._read_trained(known, script.stem)
        # This machine may compute in another precision.
        of_model = {name: value for name, value in trained.get("settings", {}).items()
                    if name in recipe_names and name != "precision"}
        of_variant = variant(known.epochs, known.optimizer)
        return Namespace(**defaults | of_variant | of_model | given, recipe=recipe_names,
                         trained=trained, script=script.stem, began=time.monotonic(),
                         command=shlex.join(["python", str(script), *flags]))

    def _take_defaults(self, recipe: dict) -> dict:
        """Return all defaults, show them in the help, and have the parser return what is given."""
        defaults = {}
        for action in self._actions:
            if action.default != SUPPRESS:
                defaults[action.dest] = default = recipe.get(action.dest, action.default)
                if default is not None and default is not False:
                    action.help = f"{action.help or ''} (default: {default})"
                action.default = SUPPRESS
        return defaults

    def _read_trained(self, args: Namespace, script: str) -> dict:
        """Return the config.json of the run whose model is to be used; {} if there is none."""
        if not (args.eval_only or args.predict):
            return {}
        try:
            config = read_config(args.output_dir)
        except UserError as error:
            log.info(f"note       {error}: the recipe's defaults are used")
            return {}
        if config["script"] != script:
            raise UserError(f"{args.output_dir / 'config.json'}: of a run of "
                            f"{config['script']}.py; use that script")
        return config
