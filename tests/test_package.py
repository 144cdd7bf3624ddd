import ast
import importlib.metadata
import inspect
import os
import pathlib
import resource
import subprocess
import sys

import pytest

import optax_curv
from optax_curv import linalg

PACKAGE = pathlib.Path(optax_curv.__file__).parent
IMPORT_TIME_LIMIT = 1.3
ROUNDS = 5
PUBLIC = {
    f"{module.__name__}.{name}": value
    for module in (optax_curv, linalg)
    for name, value in vars(module).items()
    if not name.startswith("_") and not inspect.ismodule(value)
}


def run(program, **environment):
    environment = os.environ | environment
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout


def seconds_to_import(module, bytecode):
    """CPU time of the user, which other processes disturb least."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    run(f"import {module}", PYTHONPYCACHEPREFIX=str(bytecode), PYTHONDONTWRITEBYTECODE="")
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def test_import_needs_none_of_the_extras():
    loaded = run("import sys, optax_curv; print(*sys.modules)").split()
    assert not {"flax", "sklearn", "matplotlib", "tqdm", "scipy.optimize", "pytest"} & set(loaded)


def test_import_takes_little_longer_than_that_of_optax(tmp_path):
    """Both from bytecode, which installing a wheel makes and an editable installation may never
    make."""
    seconds_to_import("optax_curv", tmp_path)
    rounds = [
        (seconds_to_import("optax", tmp_path), seconds_to_import("optax_curv", tmp_path))
        for _ in range(ROUNDS)
    ]
    ours, optax = min(ours for _, ours in rounds), min(optax for optax, _ in rounds)
    assert ours <= IMPORT_TIME_LIMIT * optax


def test_version_is_that_of_the_installed_distribution():
    assert importlib.metadata.version("optax-curv") == optax_curv.__version__


def test_type_information_is_packaged():
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.parametrize("module", [optax_curv, linalg], ids=lambda module: module.__name__)
def test_every_public_name_is_re_exported_by_name(module):
    """`A as A`, which type checkers take for an export, one name a line, each module once."""
    source = inspect.getsource(module)
    imports = [node for node in ast.parse(source).body if isinstance(node, ast.ImportFrom)]
    names = [name for node in imports for name in node.names]
    assert all(name.asname == name.name for name in names)
    lines = [name.lineno for name in names]
    assert len(lines) == len(set(lines))
    assert len(imports) == len({node.module for node in imports})
    exported = {f"{module.__name__}.{name.name}" for name in names}
    assert {name for name in PUBLIC if name.rpartition(".")[0] == module.__name__} <= exported


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_says_what_it_is_and_functions_show_it(name):
    documentation = inspect.getdoc(PUBLIC[name]) or ""
    assert len(documentation) > 30 and "TODO" not in documentation
    if not inspect.isclass(PUBLIC[name]):
        assert "Examples:" in documentation and ">>>" in documentation
