"""A run over two processes survives the loss of one of them."""

import importlib.util
import pathlib

import pytest

PATH = pathlib.Path(__file__).parents[2] / "benchmarks" / "two_processes.py"


@pytest.fixture(scope="module")
def two_processes():
    spec = importlib.util.spec_from_file_location("two_processes", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("method", ["kfac", "kfac_divided", "shampoo"])
def test_a_killed_process_and_a_restart_leave_no_trace(two_processes, method):
    """With a state that both processes hold, and with one of which each holds a half."""
    undisturbed, interrupted, equal, share = two_processes.compare(method, steps=6, killed_at=5)
    assert equal and undisturbed == interrupted
    assert share == 1 if method == "kfac" else share < 0.6
