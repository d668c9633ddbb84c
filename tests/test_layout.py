"""The modules stand on each other in one direction, and each thing can be read on one page."""

import ast
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT

# From the bottom up: a module imports only from the modules before it.
ORDER = (
    "utils", "models",
    "cifar100.classes", "cifar100.unpickle", "cifar100.files", "cifar100.parquet",
    "cifar100.formats", "cifar100.download", "cifar100.synthetic",
    "data",
    "report.log", "report.write", "report.runs", "report.curves",
    "report.compare", "report.evaluation", "report.tensorboard",
    "engine.runtime", "engine.process", "engine.optim", "engine.clock", "engine.checks",
    "engine.weight_files", "engine.weights", "engine.checkpoint", "engine.flags",
    "engine.describe", "engine.run", "engine.graphs", "engine.loop", "engine.pictures",
    "engine.inference", "train_resnet", "finetune_resnet18")
FOLDERS = ("cifar100", "engine", "report")
SCRIPTS = ("train_resnet", "finetune_resnet18")
MOST_LINES, ALL_LINES, SCRIPT_LINES = 300, 4490, 135
TOP_LEVEL = {"README.md", "LICENSE", "requirements.txt", "pyproject.toml", ".gitignore",
             ".gitattributes", ".ci", ".github", "results", "slurm", "tests", *FOLDERS,
             *(f"{name}.py" for name in ORDER if "." not in name)}
each_module = pytest.mark.parametrize("module", ORDER)


def path_of(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


def imported(tree: ast.Module) -> set[str]:
    """Return the modules that are imported anywhere, also within functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # What is imported may be a module itself.
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def listed(*arguments: str) -> list[str]:
    """Return what git lists."""
    git = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if git.returncode:
        pytest.skip("not a git checkout")
    return git.stdout.splitlines()


def test_every_module_has_its_place():
    files = [path.relative_to(ROOT) for folder in (".", *FOLDERS)
             for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py"]
    assert {".".join(file.with_suffix("").parts) for file in files} == set(ORDER)
    for folder in FOLDERS:
        assert (ROOT / folder / "__init__.py").read_text() == ""


@each_module
def test_a_module_imports_only_from_those_before_it(module):
    ours = imported(ast.parse(path_of(module).read_text())) & set(ORDER)
    assert ours <= set(ORDER[: ORDER.index(module)])


@each_module
def test_a_module_and_its_functions_can_be_read_on_a_page(module):
    text = path_of(module).read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    assert text.count("\n") <= (SCRIPT_LINES if module in SCRIPTS else MOST_LINES)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= (45 if node.name == "main" else 40), f"{node.name}: {lines} lines"


def test_the_whole_program_has_at_most_so_many_lines():
    paths = [Path(name) for name in listed("ls-files", "*.py")]
    assert sum((ROOT / path).read_text().count("\n") for path in paths
               if path.parts[0] not in ("tests", "results")) <= ALL_LINES


def test_one_place_reads_the_command_line():
    assert [module for module in ORDER if "sys.argv" in path_of(module).read_text()] == [
        "engine.process"]


def test_the_top_level_holds_only_the_agreed_files():
    for name in TOP_LEVEL:
        assert (ROOT / name).exists(), name
    # What lies beside them unversioned (data, weights, output) is the user's own.
    assert {path.split("/")[0] for path in listed("ls-files")} <= TOP_LEVEL


def test_git_ends_each_line_of_a_shell_script_by_lf_alone():
    """Also on Windows, from where job files are copied to a cluster."""
    scripts = [path for path in listed("ls-files") if (ROOT / path).is_file()
               and (path.endswith(".sh") or (ROOT / path).read_bytes().startswith(b"#!/"))]
    assert {".ci/run", "slurm/one_gpu.sbatch", "slurm/train_resnet.pbs"} <= set(scripts)
    assert listed("check-attr", "eol", "--", *scripts) == [f"{path}: eol: lf" for path in scripts]
