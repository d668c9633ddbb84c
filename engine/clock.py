"""Decide by the time and by signals when to save and when to stop; estimate the time left."""

import signal
import statistics
import time
from collections.abc import Sequence

from utils import STOP_SIGNALS

SHORTEST_SAVE = 10  # seconds; a save is assumed to take at least this long
SIZE_POWER = 1.6  # a step's time grows with an image's side to this power; measured: 1.4 to 1.7


class Clock:
    """The times of one process; `began` is the monotonic time at which --max-minutes begins."""

    def __init__(self, began: float, checkpoint_minutes: float, max_minutes: float | None):
        self.began, self.max_minutes = began, max_minutes
        self.checkpoint_minutes = checkpoint_minutes
        self.stop_signal: int | None = None  # the number of the last signal to stop
        self.longest_step, self.longest_save = 0.0, SHORTEST_SAVE  # seconds
        self.progressed = False  # this process has done a step or an evaluation
        self.steps: list[float] = []  # seconds of each step of this epoch since the start
        self.is_first_epoch = True  # of this process
        self.lap_began = self.step_began = self.saved_at = time.monotonic()

    def catch_signals(self) -> None:
        """Have signals ask the run to stop, rather than end the process."""
        for stop_signal in (signal.SIGINT, *STOP_SIGNALS):
            signal.signal(stop_signal, self._on_signal)

    def _on_signal(self, signum: int, _frame: object) -> None:
        if signum == signal.SIGINT and self.stop_signal == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C ends the process at once
        self.stop_signal = signum

    def lap(self) -> float:
        """Return the seconds since the last call."""
        began, self.lap_began = self.lap_began, time.monotonic()
        return self.lap_began - began

    def begin_step(self) -> None:
        """Begin to time a step of training, or a batch of an evaluation."""
        self.step_began = time.monotonic()

    def end_batch(self) -> float:
        """End what `begin_step` began; return its seconds."""
        seconds = time.monotonic() - self.step_began
        self.longest_step = max(self.longest_step, seconds)
        return seconds

    def end_step(self) -> None:
        """End a step of training."""
        self.steps.append(self.end_batch())
        self.progressed = True

    def end_epoch(self) -> None:
        """Forget the steps of the epoch that ends."""
        self.steps, self.is_first_epoch, self.progressed = [], False, True

    def step_seconds(self) -> float | None:
        """Return the mean seconds of this epoch's steps, or None before the first one.

        The first step of a start loads libraries and compiles, so it counts only if it is alone.
        """
        steps = self.steps[self.is_first_epoch :] or self.steps
        return statistics.fmean(steps) if steps else None

    def save_is_due(self) -> bool:
        """Return whether --checkpoint-minutes have passed since the last save."""
        return time.monotonic() - self.saved_at > 60 * self.checkpoint_minutes

    def out_of_time(self) -> bool:
        """Return whether --max-minutes leaves no time for one more step and a slow save."""
        # Each start does one step or evaluation, so that a chain of jobs always comes to an end.
        if not self.max_minutes or not self.progressed:
            return False
        left = 60 * self.max_minutes - (time.monotonic() - self.began)
        return left < self.longest_step + 2 * self.longest_save


def weigh(steps: Sequence[int], sizes: Sequence[int]) -> float:
    """Return the time of all these steps, in steps of the first size.

    `steps` are numbers of steps by epoch, and `sizes` are the sides of the epochs' images.
    """
    return sum(count * (size / sizes[0]) ** SIZE_POWER
               for count, size in zip(steps, sizes, strict=True))
