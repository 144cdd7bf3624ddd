"""A program that runs every method under `jax.vmap` of 64 problems, in eight threads on two cores.

Run by `test_no_deadlock.py`: it prints a line for each method that has ended. Matrices are wide
enough for jaxlib 0.10 to share their batches out over the threads that wait for them.
"""

import os
import sys
import threading

if __name__ == "__main__" and hasattr(
    os, "sched_setaffinity"
):  # the fewer threads, the sooner all of them wait
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])

import jax
import jax.numpy as jnp
import numpy as np
import optax
from conformance import cases, problems
from conformance.problems import array

import optax_curv

PROBLEMS, THREADS = 64, 8
ROWS, COLUMNS, EXAMPLES, STATE = 23, 20, 24, 20
SHAPES = {"w": (ROWS, COLUMNS), "b": (COLUMNS,)}

LAYER = optax_curv.Layer("dense", "dense", "['w']", "['b']", in_dim=ROWS, out_dim=COLUMNS)
WIDE = problems.Problem(
    lambda seed: problems.tree(seed, shapes=SHAPES),
    optax_curv.Layers([LAYER]),
    optax_curv.Objective(lambda params, inputs: inputs @ params["w"] + params["b"], "normal"),
)


def factors(rng):
    inputs, grads = array(rng, EXAMPLES, ROWS + 1), array(rng, EXAMPLES, COLUMNS)
    return inputs.T @ inputs / EXAMPLES, grads.T @ grads / EXAMPLES, jnp.int32(1)


def moments(rng):
    squares = jnp.square(array(rng, ROWS + 1, COLUMNS))
    return optax_curv.EigenbasisMoments(*factors(rng), squares)


def batch(rng):
    examples = array(rng, EXAMPLES, ROWS), array(rng, EXAMPLES, COLUMNS)
    return {"batch": examples, "value": jnp.float32(1.0)}


def parameter_rows(rng):
    rows = {name: array(rng, EXAMPLES, *shape) for name, shape in SHAPES.items()}
    return {"branches": rows | {"none": None}}


# One factor for all parameters: products alone, which need not be wide.
NARROW = WIDE._replace(tree=lambda seed: problems.tree(seed, shapes={"w": (6, 5)}))

# The extra arguments of the registry, for wider matrices.
EXTRAS = {
    problems.nothing: lambda rng: {},
    problems.samples: lambda rng: {"branches": array(rng, EXAMPLES, STATE)},
    problems.parameter_rows: parameter_rows,
    problems.factors: lambda rng: {
        "curvature": {"dense": optax_curv.KroneckerFactors(*factors(rng))}
    },
    problems.inputs: lambda rng: {
        "curvature": {"dense": optax_curv.InputFactor(factors(rng)[0], jnp.int32(1))}
    },
    problems.moments: lambda rng: {"curvature": {"dense": moments(rng)}},
    problems.batch: batch,
}
# Other choices of a rule that call other factorisations.
CHOICES = [
    *("kron_psgd_eq", "shampoo_qr", "soap_eigh", "kfac_eigh", "branch_kfac_complement"),
    *("branch_fisher_cholesky", "branch_fisher_rows_woodbury", "branch_fisher_rows_cholesky"),
]
RANK = 20
LRA = cases.METHODS["scale_by_lra_psgd"]._replace(
    of=lambda problem, **numbers: optax_curv.scale_by_lra_psgd(rank=RANK, **numbers)
)
TRIED = cases.METHODS | {name: cases.VARIANTS[name] for name in CHOICES} | {"lra_psgd_wide": LRA}


def program(case, problem):
    """The compiled first update of many problems that differ in their gradients and one number."""
    params = problem.tree(0)
    extras = EXTRAS[case.extras](np.random.default_rng(0))

    def one(share):
        numbers = {case.number: share * case.value} if case.number else {}
        tx = case.make(problem, **numbers)
        grads = optax.tree.scale(share, problem.tree(1))
        given = extras | case.static(problem)
        return tx.update(grads, tx.init(params), params, **given)[0]

    shares = jnp.linspace(0.5, 1.0, PROBLEMS)
    compiled = jax.jit(jax.vmap(one)).lower(shares).compile()
    return lambda: jax.block_until_ready(compiled(shares))


def main():
    """Runs every program alone, and then all of them in every thread, each in another order."""
    programs, alone, wrong = {}, {}, []
    for name, case in TRIED.items():
        programs[name] = program(case, NARROW if "dense" in name else WIDE)
        alone[name] = programs[name]()
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(alone[name])), name
        print("alone", name, flush=True)
    names = list(programs)

    def work(first):
        for name in names[first:] + names[:first]:
            found = programs[name]()
            if not all(map(np.array_equal, *map(jax.tree.leaves, (found, alone[name])))):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(2 * i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong
    print("threads", "ended", flush=True)


if __name__ == "__main__":
    sys.exit(main())
