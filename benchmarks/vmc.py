"""Wavefunctions: stochastic reconfiguration in NetKet's driver against NetKet's own, and memory.

python -m benchmarks.vmc [--sites 12] [--steps 300] [--save]

Two drivers of one transverse-field Ising chain with a restricted Boltzmann machine start from the
same state; NetKet's is `VMC_SR`, the other `VMC` with `examples/netket_sr.py`'s preconditioner.
They run in turn, a block of steps each. The memory is that of one compiled step with the rows that
are stored, those that are never, and NetKet's on-the-fly driver."""

import argparse
import importlib
import itertools
import pathlib
import time

import jax
import jax.numpy as jnp
import netket as nk
import numpy as np

import optax_curv
from examples.netket_sr import DAMPING, RATE, stochastic_reconfiguration

RESULTS = pathlib.Path(__file__).parent / "results" / "vmc.md"
BLOCK = 20


def drivers(sites):
    hilbert = nk.hilbert.Spin(0.5, sites)
    hamiltonian = nk.operator.Ising(hilbert, nk.graph.Chain(sites), h=1.0)

    def state():
        sampler = nk.sampler.MetropolisLocal(hilbert, n_chains=16)
        model = nk.models.RBM(alpha=1, param_dtype=complex)
        return nk.vqs.MCState(sampler, model, n_samples=1008, seed=0, sampler_seed=1)

    sgd, ours = nk.optimizer.Sgd(RATE), stochastic_reconfiguration(DAMPING)
    made = {
        "NetKet VMC_SR": nk.driver.VMC_SR(
            hamiltonian, sgd, variational_state=state(), diag_shift=DAMPING
        ),
        "optax_curv": nk.driver.VMC(
            hamiltonian, sgd, variational_state=state(), preconditioner=ours
        ),
    }
    return made, nk.exact.lanczos_ed(hamiltonian)[0]


def energies_and_times(sites, steps):
    """{name: (energy, its error, ms a step, of the fastest block)} and the exact energy."""
    made, exact = drivers(sites)
    logs = {name: nk.logging.RuntimeLog() for name in made}
    times = {name: [] for name in made}
    for block in range(steps // BLOCK + 1):
        for name, driver in made.items():
            start = time.process_time()
            driver.run(BLOCK, out=logs[name], show_progress=False)
            if block:  # the first one compiles
                times[name].append(1e3 * (time.process_time() - start) / BLOCK)
    found = {}
    for name, log in logs.items():
        means = np.real(log.data["Energy"]["Mean"])[-50:]
        error = np.std(means) / np.sqrt(len(means))
        found[name] = (means.mean(), error, min(times[name]), np.median(times[name]))
    return found, exact


def memory(samples=512, widths=(128, 256, 128, 1)):
    """MiB of temporaries of one compiled step, by kind of rows, and the MiB of the rows."""

    def log_psi(params, x):
        for w, b in params[:-1]:
            x = jnp.tanh(x @ w + b)
        return (x @ params[-1][0] + params[-1][1])[..., 0]

    def struct(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    pairs = itertools.pairwise(widths)
    params = [(struct(m, n), struct(n)) for m, n in pairs]
    x, energies = struct(samples, widths[0]), struct(samples)
    tx = optax_curv.scale_by_branch_fisher(DAMPING, solver="auto")

    def step(rows_of):
        def run(params, x, energies):
            pull = jax.vjp(lambda p: log_psi(p, x), params)[1]
            grads = pull((energies - jnp.mean(energies)) / samples)[0]
            return tx.update(grads, tx.init(params), params, branches=rows_of(params, x))[0]

        return run

    on_the_fly = importlib.import_module("netket._src.ngd.srt_onthefly").srt_onthefly

    def theirs(params, x, energies):
        solver = nk.optimizer.solver.cholesky
        apply = lambda variables, x: log_psi(variables["params"], x)  # noqa: E731
        options = {"diag_shift": DAMPING, "solver_fn": solver, "mode": "real"}
        return on_the_fly(apply, energies, params, {}, x, **options)

    kinds = {
        "stored": step(optax_curv.jacobian_rows(log_psi)),
        "lazy": step(lambda params, x: optax_curv.lazy_rows(log_psi, params, x)),
        "NetKet on the fly": theirs,
    }
    found = {}
    for name, function in kinds.items():
        try:
            compiled = jax.jit(function).lower(params, x, energies).compile()
            found[name] = compiled.memory_analysis().temp_size_in_bytes / 2**20
        except Exception as error:  # NetKet's function is not public
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
    size = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
    return found, samples * size * 4 / 2**20


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sites", type=int, default=12)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    kinds, rows = memory()
    found, exact = energies_and_times(options.sites, options.steps)
    lines = [
        "# Wavefunctions",
        "",
        f"Ising chain of {options.sites} sites at its critical field, 1008 samples, "
        f"{options.steps} steps; exact energy {exact:.5f}.",
        "",
        "| driver | energy of the last 50 steps | ms a step, least | median |",
        "|---|---|---|---|",
        *(
            f"| {name} | {e:.5f} ± {s:.5f} | {least:.2f} | {middle:.2f} |"
            for name, (e, s, least, middle) in found.items()
        ),
        "",
        f"Memory of one compiled step, float32; the rows are {rows:.0f} MiB.",
        "",
        "| rows | MiB |",
        "|---|---|",
        *(f"| {name} | {size:.0f} |" for name, size in kinds.items()),
    ]
    print("\n".join(lines), flush=True)
    if options.save:
        RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
