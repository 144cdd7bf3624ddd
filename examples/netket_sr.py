"""NetKet's VMC with this package's stochastic reconfiguration in the place of its own.

`VMC(preconditioner=)` takes a function of the variational state and the gradient: the rows of log ψ
at its samples are branches. Both drivers start from the same state, and their energies are compared
with the exact one.

python examples/netket_sr.py [--tiny]
"""

import functools
import sys

import jax
import netket as nk
import numpy as np

import optax_curv

DAMPING, RATE = 1e-3, 0.02


def stochastic_reconfiguration(damping, momentum=None):
    """A preconditioner for `netket.driver.VMC`; with `momentum` it is SPRING's."""
    tx = optax_curv.scale_by_branch_fisher(damping, solver="auto", momentum=momentum)

    @functools.partial(jax.jit, static_argnums=4)
    def direction(grads, opt_state, variables, samples, apply):
        params = variables["params"]
        model_state = {k: v for k, v in variables.items() if k != "params"}
        log_psi = lambda p, x: apply({"params": p, **model_state}, x)  # noqa: E731
        rows = optax_curv.jacobian_rows(log_psi)(params, samples)
        return tx.update(grads, opt_state, params, branches=rows)

    state = {}

    def preconditioner(vstate, grads, step=None):
        del step
        opt_state = state.setdefault("state", tx.init(vstate.parameters))
        samples = vstate.samples.reshape(-1, vstate.samples.shape[-1])
        found, state["state"] = direction(
            grads, opt_state, dict(vstate.variables), samples, vstate._apply_fun
        )
        return found

    return preconditioner


def main(tiny):
    """Runs both drivers, and returns their relative errors."""
    sites, samples, steps = (6, 256, 40) if tiny else (12, 1008, 300)
    hilbert = nk.hilbert.Spin(0.5, sites)
    hamiltonian = nk.operator.Ising(hilbert, nk.graph.Chain(sites), h=1.0)
    exact = nk.exact.lanczos_ed(hamiltonian)[0]

    def state():
        sampler = nk.sampler.MetropolisLocal(hilbert, n_chains=16)
        model = nk.models.RBM(alpha=1, param_dtype=complex)
        return nk.vqs.MCState(sampler, model, n_samples=samples, seed=0, sampler_seed=1)

    sgd = nk.optimizer.Sgd(RATE)
    theirs = nk.driver.VMC_SR(hamiltonian, sgd, variational_state=state(), diag_shift=DAMPING)
    ours = nk.driver.VMC(
        hamiltonian,
        sgd,
        variational_state=state(),
        preconditioner=stochastic_reconfiguration(DAMPING),
    )
    errors = {}
    for name, driver in (("netket", theirs), ("optax_curv", ours)):
        log = nk.logging.RuntimeLog()
        driver.run(steps, out=log, show_progress=False)
        energies = np.real(log.data["Energy"]["Mean"])[-10:]
        errors[name] = abs(energies.mean() / exact - 1)
        print(f"{name}: energy {energies.mean():.5f}, exact {exact:.5f}, error {errors[name]:.1e}")
    assert errors["optax_curv"] < max(2 * errors["netket"], 5e-3)
    return errors


if __name__ == "__main__":
    main("--tiny" in sys.argv)
