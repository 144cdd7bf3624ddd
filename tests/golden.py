"""The originals' own arithmetic: reference arrays, all of them where they lie beside the
repository, else a few."""

import functools
import pathlib

import numpy as np
import pytest

HERE = pathlib.Path(__file__).parent
FULL = HERE.parent.parent / "shared" / "golden"
COPIED = HERE / "data"


@functools.cache
def arrays(file):
    """Every array of one golden file, by name."""
    folder = FULL if (FULL / file).exists() else COPIED
    return dict(np.load(folder / file, allow_pickle=False))


def case(file, name):
    """The arrays of one case, without the case's name in front."""
    found = {k[len(name) + 1 :]: v for k, v in arrays(file).items() if k.startswith(name + "/")}
    assert found, f"{file} has no case {name}"
    return found


def cases(file, names="case_names"):
    """The case names of a file as pytest parameters; one skipped entry tells when only the copied
    few are there."""
    found = [str(name) for name in arrays(file)[names]]
    if not (FULL / file).exists():
        reason = f"the full {file} is not beside this repository; only the copied cases run"
        found.append(pytest.param("the_other_cases", marks=pytest.mark.skip(reason=reason)))
    return found
