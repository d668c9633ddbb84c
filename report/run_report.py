"""Write report.md and curves.png of one run."""

from pathlib import Path

from report.curves import draw_curves
from report.runs import group_runs, read_run, summary_table
from report.write import markdown_table, write_picture, write_text
from utils import UserError, log

RUN_REPORTS = ("report.md", "curves.png")
ENVIRONMENT = ("runtime", "processor", "torch", "torchvision", "numpy", "python", "system",
               "weights_sha256")


def write_run_report(directory: Path, history: list[dict]) -> None:
    """Write report.md and curves.png into a run's directory; raises OSError."""
    try:
        record = read_run(directory, history)
    except UserError as error:
        log.info(f"warning    no report: {error}")
        return
    config, last, network = record.config, history[-1], record.config["network"]
    images = "CIFAR-100" if config["dataset"] == "cifar100" else f"{config['dataset']} images"
    layers = [*network["layers"], ("all", network["name"], network["parameters"])]
    environment = ((name, config[name]) for name in ENVIRONMENT if config.get(name))
    write_text(directory / "report.md", "".join([
        f"# {network['name']} on {images}: {last['test_acc']:.2%} after epoch {last['epoch']:.0f}",
        "\n\n", summary_table([record]),
        write_picture(directory / "curves.png", "## Curves", draw_curves, group_runs([record])),
        "## Network\n\n", markdown_table(("layer", "kind", "parameters"), [
            (*layer, f"{count:,}") for *layer, count in layers]),
        "## Recipe\n\n", markdown_table(("", ""), config["in_words"].items()),
        "## Environment\n\n", markdown_table(("", ""), environment)]))
