"""Write the numbers of metrics.csv for TensorBoard, which is optional."""

from pathlib import Path

from utils import guard, log


class TensorBoard:
    """The files in DIR/tensorboard; raises UserError if the package is missing."""

    def __init__(self, output_dir: Path):
        with guard("--tensorboard needs pip install 'tensorboard>=2.17.1'", Exception):
            from torch.utils.tensorboard import SummaryWriter
        self.open, self.directory, self.writer = SummaryWriter, output_dir / "tensorboard", None

    def write(self, history: list[dict]) -> None:
        """Write the last epoch. A new writer writes all: purge_step hides what older files hold."""
        try:
            rows = history[-1:] if self.writer else history
            self.writer = self.writer or self.open(self.directory, purge_step=0)
            for row in rows:
                for name in row.keys() - {"dataset", "epoch", "epochs"}:
                    self.writer.add_scalar(name, row[name], row["epoch"])
            self.writer.flush()
        except Exception as error:  # no curve is worth a run
            self.writer = None
            log.info(f"warning    not written for TensorBoard ({error}); training goes on")
