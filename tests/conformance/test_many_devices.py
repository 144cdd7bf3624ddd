"""Eight devices do what one does, and divide the work where they are told to."""

import os
import pathlib
import subprocess
import sys

import pytest
from conformance import cases

SAME = 1e-6  # relative to the largest entry of a leaf, in float32
DIVIDED = 1 / 4  # of one device's FLOPs, at eight devices
COMPARED = [x for x, case in cases.CASES.items() if not isinstance(case.devices, str)]
DIVIDING = [x for x, case in cases.CASES.items() if case.divides]
TESTS = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def figures():
    """{(check, method): figure} from one process with eight devices."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
    }
    command = [sys.executable, "-W", "error", "-m", "conformance.many_devices"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    return {(check, name): float(figure) for check, name, figure in lines}


@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize("way", ["auto", "shard_map"])
def test_eight_devices_compute_what_one_does(figures, way, name):
    assert figures[way, name] < SAME


@pytest.mark.parametrize("way", ["auto", "explicit", "shard_map"])
def test_a_batch_on_eight_devices_is_captured_as_on_one(figures, way):
    assert figures[way, "capture"] < SAME


@pytest.mark.parametrize("name", DIVIDING)
def test_factor_sharding_divides_the_work(figures, name):
    assert figures["flops", name] <= DIVIDED


@pytest.mark.parametrize("name", DIVIDING)
def test_factor_sharding_changes_nothing_but_where_the_work_is_done(figures, name):
    assert figures["divided", name] < SAME
    assert figures["sharding", name] == 0
