"""Eight devices do what one does, and divide the work where they are told to."""

import os
import pathlib
import subprocess
import sys

import eight_devices
import jax
import pytest
from conformance import cases

SAME = 1e-6  # relative to the largest entry of a leaf, in float32
EXACT = 1e-12  # in float64
DIVIDED = 1 / 4  # of one device's FLOPs, at eight devices
OWNED = cases.OWNED
COMPARED = [x for x, case in cases.CASES.items() if not isinstance(case.devices, str)]
DIVIDING = [x for x, case in cases.CASES.items() if case.divides]
TESTS = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def figures():
    """{(check, method): figure} from one process with eight devices."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    environment = eight_devices.ENVIRONMENT | {"PYTHONPATH": path}
    command = [sys.executable, "-W", "error", "-m", "conformance.many_devices"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=1200, check=False
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
def test_sharding_divides_the_work(figures, name):
    assert figures["flops", name] <= DIVIDED


@pytest.mark.parametrize("name", DIVIDING)
def test_sharding_changes_nothing_but_where_the_work_is_done(figures, name):
    assert figures["divided", name] < EXACT
    assert figures["sharding", name] == 0


@pytest.mark.parametrize("name", OWNED)
def test_owners_compute_what_one_device_does(figures, name):
    """With leaves sharded in three ways, blocks, and numbers that eight does not divide."""
    assert figures["owned", name] < EXACT


@pytest.mark.parametrize("name", OWNED)
def test_updates_come_back_to_where_their_gradients_are(figures, name):
    assert figures["kept", name] == 1


@pytest.mark.parametrize("name", ["shampoo", "soap"])
def test_rows_travel_and_are_never_gathered(figures, name):
    """Blocks are cut out of leaves, and a vector of all is put together, as XLA does it."""
    assert figures["gathers", name] == 0


@pytest.mark.parametrize("name", OWNED)
def test_a_state_lies_with_its_owners_from_the_start(figures, name):
    assert figures["share", name] < 1 / 8 + 0.01
    assert figures["known", name] == 1


ROWS = ("woodbury", "auto", "cholesky", "cg", "levenberg", "gauss_newton", "branch_kfac")
LARGEST_LEAF = 16 * 24  # of `compare_rows`, where there are 64 rows of it
# K-FAC of branches decomposes whole columns of the 64 samples of a state of 8: up to JAX 0.11 they
# come together one after the other, from 0.12 on all at once.
AT_ONCE = {"branch_kfac": 64 * 8} if jax.__version_info__ >= (0, 12) else {}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_examples_on_all_devices_are_never_gathered(figures, name):
    assert figures["rows", name] < EXACT
    assert figures["row_gathers", name] <= AT_ONCE.get(name, LARGEST_LEAF)


def test_lazy_rows_of_examples_on_all_devices_are_those_of_one_and_share_the_work(figures):
    assert figures["lazy", "difference"] < EXACT
    assert figures["lazy", "flops"] <= DIVIDED


@pytest.mark.parametrize("devices", [4, 1])
def test_micro_batches_of_eight_devices_are_resumed_on_fewer(figures, devices):
    assert figures["resumed", str(devices)] < EXACT


def test_what_cannot_be_divided_is_refused_by_name(figures):
    said = {name: figure for (check, name), figure in figures.items() if check == "refused"}
    assert said and all(said.values()), said


def test_states_with_sharding_types_can_be_read(figures):
    assert figures["read", "explicit"] == 1


def test_a_step_on_explicit_axes_is_compiled_once(figures):
    """After an eager `init`, with `sharding=` and without; equal leaves are sharded in two ways."""
    counts = {name: figure for (check, name), figure in figures.items() if check == "compiled"}
    assert len(counts) == 8 and set(counts.values()) == {1}, counts
    errors = {name: figure for (check, name), figure in figures.items() if check == "typed"}
    assert all(error < SAME for error in errors.values()), errors
