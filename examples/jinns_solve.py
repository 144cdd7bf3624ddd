"""jinns' `solve` with this package's methods: u' = -2 u, u(0) = 1, by a network.

`solve` hands the optimizer gradients and parameters. Levenberg-Marquardt makes its own rows of the
equation, by the adapter of `optimistix_minimise.py`.

python examples/jinns_solve.py [--tiny]
"""

import sys
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jinns
import optax
from optimistix_minimise import with_rows

import optax_curv


class Decay(jinns.loss.ODE):
    """The equation."""

    def equation(self, t, u, params):
        """The residual at one time."""
        slope = jax.grad(lambda t: u(t, params)[0], 0)(t)
        return slope + 2 * u(t, params)


def main(tiny):
    """Solves by both, and returns their largest errors."""
    warnings.simplefilter("ignore")
    layers = ((eqx.nn.Linear, 1, 16), (jnp.tanh,), (eqx.nn.Linear, 16, 1))
    u, weights = jinns.nn.PINN_MLP.create(key=jax.random.key(0), eqx_list=layers, eq_type="ODE")
    params = jinns.parameters.Params(nn_params=weights, eq_params={})
    times = jax.random.split(jax.random.key(1))[0]
    data = jinns.data.DataGeneratorODE(key=times, nt=64, tmin=0.0, tmax=1.0)
    initial = (jnp.array(0.0), jnp.array([1.0]))
    loss = jinns.loss.LossODE(
        u=u,
        dynamic_loss=Decay(Tmax=1.0),
        initial_condition=initial,
        loss_weights=jinns.loss.LossWeightsODE(dyn_loss=1.0, initial_condition=1.0),
        params=params,
    )
    points = jnp.linspace(0.0, 1.0, 64)[:, None]

    def equation(p, t):
        return jax.vmap(lambda t: Decay(Tmax=1.0).equation(t, u, p))(t)

    def start(p, t):
        return jax.vmap(lambda t: u(t, p) - 1.0)(t)

    rows_of = optax_curv.residual_rows(equation, start)
    errors = {}
    for name, steps, tx in (
        ("soap", 300 if tiny else 3000, optax_curv.soap(optax.cosine_decay_schedule(1e-2, 3000))),
        (
            "levenberg_marquardt",
            30,
            with_rows(optax_curv.levenberg_marquardt(), rows_of, points, jnp.zeros((1, 1))),
        ),
    ):
        found = jinns.solve(
            n_iter=steps, init_params=params, data=data, loss=loss, optimizer=tx, verbose=False
        )[0]
        values = jax.vmap(lambda t, p=found: u(t, p)[0])(points)
        errors[name] = float(jnp.max(jnp.abs(values - jnp.exp(-2 * points[:, 0]))))
        print(f"{name}: error {errors[name]:.1e} after {steps} steps")
    assert max(errors.values()) < 3e-2
    return errors


if __name__ == "__main__":
    main("--tiny" in sys.argv)
