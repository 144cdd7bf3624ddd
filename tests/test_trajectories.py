"""Every method and alias takes the steps that it took before the refactoring, to rounding.

One run of each method and alias, in float64, by default; TRAJECTORIES=all in the environment runs
every option in float32, too. What is recorded, and how, stands in `trajectories`.
"""

import os
import pathlib

import numpy as np
import pytest
import trajectories

RECORDED = trajectories.read(pathlib.Path(__file__).parent / "data" / "trajectories.npz")
# Runs that behave differently on purpose, each with the reason; they need only stay finite.
CHANGED: dict[str, str] = {
    **dict.fromkeys(
        (
            *("ekfac", "ekfac_seldom", "ekfac_zoo", "ekfac_bfloat16_leaves"),
            *("adam_in_basis", "adam_in_basis_zoo"),
        ),
        "factors and moments are averaged as K-FAC's, without the weight of the first batch",
    ),
    **dict.fromkeys(("ekfac_alias", "ekfac_alias_decays"), "averages and the clip, as above"),
    "branch_fisher_rows_complement": "in parameter space complement=True no longer multiplies by λ",
    **dict.fromkeys(
        ("branch_fisher_alias_decays", "branch_kfac_alias_decays"),
        "a step that is not finite no longer moves the parameters by the decay",
    ),
    "shampoo_alias": "a tensor is folded to a matrix and no longer Adam's",
    "shampoo_alias_decays": "gradients are held to a multiple of their running norm",
    **dict.fromkeys(
        (name for name in trajectories.RUNS if name.startswith("soap")),
        "the first gradient only sets the bases",
    ),
    "shampoo_alias_stacked": "a stacked leaf's size is that of each of its matrices",
    "shampoo_alias_bfloat16_leaves": "Adam's moments are float32",
    "kfac_alias": "a step that is not finite no longer moves the parameters by the momentum",
    "kfac_alias_decays": "kl_clip knows the learning rate",
    **dict.fromkeys(
        (
            name
            for name in trajectories.RUNS
            if name.startswith(("kron", "dense")) and "right_triangular" not in name
        ),
        "no noise is drawn, and P moves where there is a gradient, at once where it has grown",
    ),
}

# Of the largest entry of a leaf; more only where the measured sensitivity to rounding asks for it.
ROUNDING = {"float32": 1e-5, "float64": 1e-11}
ROUNDING_OF_BFLOAT16 = 1e-2
MARGIN = 10  # times the measured sensitivity
CHAOS = 0.3  # beyond it rounding decides, and nothing is left to compare

ALL = [(name, dtype) for name in trajectories.RUNS for dtype in trajectories.dtypes(name)]
FEW = [(name, "float64") for name in trajectories.FEW]


def tolerances(name, dtype):
    """Of each kept step and leaf."""
    is_short = trajectories.RUNS[name].leaves == "bfloat16"
    base = ROUNDING_OF_BFLOAT16 if is_short else ROUNDING[dtype]
    return np.maximum(base, MARGIN * RECORDED[name, dtype][1])


@pytest.mark.parametrize(("name", "dtype"), ALL if os.environ.get("TRAJECTORIES") == "all" else FEW)
def test_run_takes_the_recorded_steps(name, dtype):
    found = trajectories.run(name, dtype)
    assert np.isfinite(found).all()
    if name in CHANGED:
        return
    expected, _ = RECORDED[name, dtype]
    assert found.dtype == expected.dtype
    deviation, allowed = trajectories.deviation(name, found, expected), tolerances(name, dtype)
    wrong = [
        f"{leaf} at step {step}: {deviation[i, j]:.1e} of its largest, not {allowed[i, j]:.1e}"
        for i, step in enumerate(trajectories.STEPS)
        for j, leaf in enumerate(trajectories.leaf_slices(name))
        if allowed[i, j] < CHAOS and not deviation[i, j] <= allowed[i, j]
    ]
    assert not wrong, "\n".join([name, *wrong])


def test_what_is_recorded_is_what_runs():
    assert set(RECORDED) == set(ALL)
    assert set(CHANGED) <= set(trajectories.RUNS)
