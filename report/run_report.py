"""Write report.md and curves.png of one run."""

from pathlib import Path

from report.curves import draw_curves
from report.runs import NUMBERS_NOTE, SUMMARY, RunRecord, group_runs, read_config, summary
from report.write import markdown_table, write_picture, write_text
from utils import UserError, log

RUN_REPORTS = ("report.md", "curves.png")


def write_run_report(directory: Path, history: list[dict]) -> None:
    """Write report.md and curves.png into a run's directory; raises OSError."""
    try:
        record = RunRecord(directory, read_config(directory), history)
        config, groups = record.config, group_runs([record])
        descriptions = config["in_words"]
    except UserError as error:
        log.info(f"warning    no report: {error}")
        return
    except KeyError as error:
        path = directory / "config.json"
        log.info(f"warning    no report: {path} is of older code, and lacks {error}")
        return
    last, network = history[-1], config["network"]
    images = "CIFAR-100" if config["dataset"] == "cifar100" else f"{config['dataset']} images"
    layers = [*network["layers"], ("all", network["name"], network["parameters"])]
    text, picture = (directory / name for name in RUN_REPORTS)
    write_text(text, "".join([
        f"# {network['name']} on {images}: {last['test_acc']:.2%} after epoch {last['epoch']:.0f}",
        f"\n\n{NUMBERS_NOTE}", markdown_table(SUMMARY, [summary(record)]),
        write_picture(picture, "## Curves", draw_curves, groups),
        "## Network\n\n", markdown_table(("layer", "kind", "parameters"), [
            (*layer, f"{count:,}") for *layer, count in layers]),
        "## Recipe\n\n", markdown_table(("", ""), descriptions.items()),
        "## Environment\n\n", markdown_table(("", ""), [
            (name, config[name]) for name in ("runtime", "torch", "python", "system")])]))
