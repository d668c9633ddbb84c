"""The modules stand on each other in one direction, and each thing can be read on one page."""

import ast
import subprocess

import pytest
from helpers import ROOT

# From the bottom up: a module imports only from the floors below its own.
FLOORS = (("utils",), ("models", "data"), ("report",), ("engine",),
          ("train_resnet", "finetune_resnet18"))
MODULES = [name for floor in FLOORS for name in floor]
FLOOR_OF = {name: number for number, floor in enumerate(FLOORS) for name in floor}
TOP_LEVEL = {"README.md", "LICENSE", "requirements.txt", "pyproject.toml", ".gitignore",
             ".gitattributes", ".ci", ".github", "results", "slurm", "tests",
             *(f"{name}.py" for name in MODULES)}
each_module = pytest.mark.parametrize("module", MODULES)


def parse(module: str) -> ast.Module:
    return ast.parse((ROOT / f"{module}.py").read_text())


def imported(tree: ast.Module) -> set[str]:
    """Return the names of the modules that are imported anywhere, also within functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


@each_module
def test_a_module_imports_only_from_the_floors_below(module):
    for name in imported(parse(module)) & set(MODULES):
        assert FLOOR_OF[name] < FLOOR_OF[module], f"{module}.py imports {name}.py"


@each_module
def test_no_function_is_longer_than_40_lines_and_no_main_than_45(module):
    for node in ast.walk(parse(module)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= (45 if node.name == "main" else 40), f"{node.name}: {lines} lines"


@each_module
def test_a_module_says_at_its_beginning_what_it_holds(module):
    assert ast.get_docstring(parse(module))


def test_the_top_level_holds_only_the_agreed_files():
    for name in TOP_LEVEL:
        assert (ROOT / name).exists(), name
    # What lies beside them unversioned (data, weights, output) is the user's own.
    assert {path.split("/")[0] for path in git("ls-files")} <= TOP_LEVEL


def test_git_ends_each_line_of_a_shell_script_by_lf_alone():
    """Also on Windows, from where job files are copied to a cluster."""
    scripts = [path for path in git("ls-files") if (ROOT / path).is_file()
               and (path.endswith(".sh") or (ROOT / path).read_bytes().startswith(b"#!/"))]
    assert {".ci/run", "slurm/one_gpu.sbatch", "slurm/train_resnet.pbs"} <= set(scripts)
    assert git("check-attr", "eol", "--", *scripts) == [f"{path}: eol: lf" for path in scripts]


def git(*arguments: str) -> list[str]:
    """Return the lines that git prints; skip the test where there is no checkout."""
    process = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if process.returncode:
        pytest.skip("not a git checkout")
    return process.stdout.splitlines()
