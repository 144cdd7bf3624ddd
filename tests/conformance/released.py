"""What states a release has saved, and how they went on: ``python -m conformance.released RECORD``.

RECORD is written anew, from the folder `tests`: when a release is made, under its own name, and
before the first one whenever the state of an alias changes on purpose. Each alias takes three steps
of the registry's gradients; its state and the next update are kept by the paths of their leaves.
"""

import sys

import jax
import numpy as np


def by_path(tree):
    """A tree's arrays by the paths of its leaves."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def recorded(arrays, name, kind):
    """The arrays of an alias, of the kind "state" or "update", by the paths of the leaves."""
    start = f"{name}/{kind}/"
    return {key.removeprefix(start): x for key, x in arrays.items() if key.startswith(start)}


def record(path):
    """Runs every alias and writes its states and updates."""
    from conformance import cases, test_contracts

    arrays = {}
    for name in cases.ALIASES:
        _, update = test_contracts.compiled(name)
        state = test_contracts.jitted_walk(name)[1][-1]
        kept = {"state": jax.tree.map(np.array, state)}
        kept["update"], _ = update(cases.tree(1), state, cases.tree(0), test_contracts.extras(name))
        for kind, tree in kept.items():
            arrays |= {f"{name}/{kind}/{key}": np.asarray(x) for key, x in by_path(tree).items()}
    np.savez_compressed(path, **arrays)


if __name__ == "__main__":
    record(sys.argv[1])
