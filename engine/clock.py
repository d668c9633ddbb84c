"""The times of a run, and the signals that ask it to stop."""

import signal
import time

from engine.process import on_signal
from utils import STOP_SIGNALS


class Clock:
    """The times of one process, and the last signal to it."""

    def __init__(self) -> None:
        self.stop_signal = 0  # its number; 0 is none
        self.longest_step = 0.0  # seconds, as all times here
        self.longest_save = 10.0  # a save is assumed to take at least this long
        self.progressed = False  # this process has done a step or an evaluation
        self.steps: list[float] = []  # seconds of each step of this epoch since the start
        self.slow = 1  # how many of them, from the first on, were slower than usual
        self.lap_began = self.saved_at = time.monotonic()

    def catch_signals(self) -> None:
        """Have signals ask the run to stop, rather than end the process."""
        for stop_signal in (signal.SIGINT, *STOP_SIGNALS):
            on_signal(stop_signal, self._on_signal)

    def _on_signal(self, signum: int, _frame: object) -> None:
        if signum == signal.SIGINT and self.stop_signal == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C ends the process at once
        self.stop_signal = signum

    def lap(self) -> float:
        """Return the seconds since the last call."""
        began, self.lap_began = self.lap_began, time.monotonic()
        return self.lap_began - began

    def end_step(self, began: float) -> None:
        """End a step of training that began at this monotonic time."""
        self.steps.append(time.monotonic() - began)
        self.longest_step = max(self.longest_step, self.steps[-1])
        self.progressed = True
