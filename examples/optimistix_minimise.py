"""optimistix: gradient methods through `OptaxMinimiser`, and Levenberg-Marquardt by an adapter.

`OptaxMinimiser` hands a transformation the value, the gradient and `value_fn`, but no rows. The
adapter makes them of the parameters.

python examples/optimistix_minimise.py [--tiny]
"""

import sys

import jax
import jax.numpy as jnp
import optax
import optimistix

import optax_curv


def with_rows(tx, rows_of, *batches):
    """A transformation that makes its own rows, for programs that hand on no extra arguments."""

    def update(grads, state, params=None, **extra_args):
        del grads, extra_args
        value, grads, rows = rows_of(params, *batches)
        given = {"branches": rows, "value": value, "value_fn": lambda p: rows_of(p, *batches)[0]}
        return tx.update(grads, state, params, **given)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def main(tiny):
    """Fits a decay, and returns the errors of both."""
    times = jnp.linspace(0.0, 3.0, 20 if tiny else 200)
    truth = {"height": jnp.array(2.0), "rate": jnp.array(0.7)}

    def residual(params, t):
        model = lambda p: p["height"] * jnp.exp(-p["rate"] * t)  # noqa: E731
        return model(params) - model(truth)

    def loss(params, args):
        del args
        return 0.5 * jnp.mean(residual(params, times) ** 2)

    errors = {}
    rows_of = optax_curv.residual_rows(residual)
    for name, tx in (
        ("kron_psgd", optax_curv.kron_psgd(optax.cosine_decay_schedule(0.1, 1000))),
        ("levenberg_marquardt", with_rows(optax_curv.levenberg_marquardt(), rows_of, times)),
    ):
        solver = optimistix.OptaxMinimiser(tx, rtol=1e-7, atol=1e-7)
        start = {"height": jnp.array(1.0), "rate": jnp.array(0.1)}
        found = optimistix.minimise(loss, solver, start, max_steps=1000, throw=False)
        distance = jax.tree.map(lambda a, b: abs(float(a - b)), found.value, truth)
        errors[name] = max(distance.values())
        print(f"{name}: error {errors[name]:.1e} after {int(found.stats['num_steps'])} steps")
    assert max(errors.values()) < 1e-2
    return errors


if __name__ == "__main__":
    main("--tiny" in sys.argv)
