"""No method waits for ever, neither under `jax.vmap` nor in threads; kernels: `test_lapack.py`."""

import os
import pathlib
import subprocess
import sys

import pytest
from conformance import cases, threads

TESTS = pathlib.Path(__file__).parent.parent
LIMIT = 400  # seconds; on two cores it takes 35 of the processor, and a deadlock takes none


@pytest.fixture(scope="module")
def ended():
    """What has ended within the limit, as (where, method)."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
    }
    command = [sys.executable, "-W", "error", "-m", "conformance.threads"]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode()
    else:
        assert done.returncode == 0, done.stderr[-3000:]
        output = done.stdout
    return {tuple(line.split()) for line in output.splitlines()}


@pytest.mark.parametrize("name", threads.TRIED)
def test_many_problems_of_every_method_end(ended, name):
    assert ("alone", name) in ended


def test_all_methods_end_in_eight_threads_at_a_time(ended):
    assert ("threads", "ended") in ended


def test_every_method_of_the_registry_is_tried():
    assert set(cases.METHODS) <= set(threads.TRIED)
