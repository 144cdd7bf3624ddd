"""Parameters of an ordinary differential equation by Levenberg-Marquardt, solved by diffrax.

Rows are taken by reverse mode, with diffrax's default adjoint or `DirectAdjoint`.

python examples/diffrax_fit.py [--tiny]
"""

import sys

import diffrax
import jax
import jax.numpy as jnp
import optax

import optax_curv

TRUTH = {"growth": 1.1, "predation": 0.4, "death": 0.4, "gain": 0.1}


def predator_prey(t, y, p):
    """The equations of Lotka and Volterra."""
    del t
    prey, hunters = y
    met = prey * hunters
    prey, hunters = (
        p["growth"] * prey - p["predation"] * met,
        p["gain"] * met - p["death"] * hunters,
    )
    return jnp.stack([prey, hunters])


def main(tiny):
    """Fits with both adjoints, and prints the relative errors of the parameters."""
    times = jnp.linspace(0.0, 6.0, 10 if tiny else 40)
    starts = jnp.array([[8.0, 4.0], [5.0, 3.0], [10.0, 6.0]])

    def curves(params, starts, adjoint):
        def one(y0):
            term, solver = diffrax.ODETerm(predator_prey), diffrax.Tsit5()
            options = {"saveat": diffrax.SaveAt(ts=times), "adjoint": adjoint, "max_steps": 96}
            options["throw"] = False  # a trial that takes too many steps is refused
            options["stepsize_controller"] = diffrax.PIDController(rtol=1e-4, atol=1e-4)
            return diffrax.diffeqsolve(term, solver, 0.0, 6.0, 0.05, y0, params, **options).ys

        return jax.vmap(one)(starts)

    worst = 0.0
    for adjoint in (diffrax.RecursiveCheckpointAdjoint(), diffrax.DirectAdjoint()):
        data = jax.jit(lambda a=adjoint: curves(TRUTH, starts, a))()

        def residual(params, batch, adjoint=adjoint):
            start, seen = batch
            return curves(params, start, adjoint) - seen

        rows_of = optax_curv.residual_rows(residual)
        tx = optax_curv.levenberg_marquardt()
        params = {name: jnp.asarray(0.8 * value) for name, value in TRUTH.items()}
        state = tx.init(params)

        @jax.jit
        def step(params, state, batch, rows_of=rows_of, tx=tx):
            value, grads, rows = rows_of(params, batch)
            loss = lambda p: jnp.sum(residual(p, batch) ** 2) / (2 * len(starts))  # noqa: E731
            given = {"branches": rows, "value": value, "value_fn": loss}
            updates, state = tx.update(grads, state, params, **given)
            return optax.apply_updates(params, updates), state

        for _ in range(15):
            params, state = step(params, state, (starts, data))
        errors = {name: abs(float(params[name]) / value - 1) for name, value in TRUTH.items()}
        print(type(adjoint).__name__, {name: f"{error:.1e}" for name, error in errors.items()})
        worst = max(worst, *errors.values())
    assert worst < 1e-3


if __name__ == "__main__":
    main("--tiny" in sys.argv)
