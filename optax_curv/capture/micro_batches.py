"""The curvature of a batch that comes in parts."""

import jax
import jax.numpy as jnp

from optax_curv.curvature import FactorRows, InputFactor, InputRows, RawSamples
from optax_curv.typing import Number, Tree


def average_curvature(mean: Tree, curvature: Tree, mini_step: Number) -> Tree:
    """Adds a micro-batch to the mean of the curvatures of micro-batches of equal size.

    `optax.MultiSteps` averages gradients, but hands the inner transformation the extra arguments of
    the last micro-batch alone. With this mean as `curvature=` these have the factors of the whole
    batch, each loss being a mean over its own micro-batch.

    Args:
      mean: the mean so far, a tree like `curvature`; its values do not matter in mini-step 0.
      curvature: factors, moments or diagonals of this micro-batch. Of `InputRows` the factors are
        averaged, as `InputFactor`.
      mini_step: how many micro-batches the mean has, `MultiStepsState.mini_step`.

    Returns:
      The mean with this micro-batch in it.

    Raises:
      ValueError: for rows or raw samples, which cannot be averaged.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> params, x, mean = {"w": jnp.ones((3, 1))}, jnp.arange(24.0).reshape(8, 3), None
      >>> loss = lambda params, x: jnp.mean((x @ params["w"]) ** 2)
      >>> take = optax_curv.value_grad_and_curvature(loss)
      >>> for mini_step, micro_batch in enumerate(jnp.split(x, 2)):
      ...     curvature = take(params, micro_batch)[2]
      ...     mean = curvature if mean is None else mean
      ...     mean = optax_curv.average_curvature(mean, curvature, mini_step)
      >>> bool(jnp.allclose(mean["w"].input_factor, x.T @ x / 8))
      True
    """

    def has_rows(x):
        return isinstance(x, FactorRows | RawSamples)

    if any(map(has_rows, jax.tree.leaves(curvature, is_leaf=has_rows))):
        raise ValueError(
            "average_curvature: expected factors, moments or diagonals, got rows of layers, which "
            'cannot be averaged; take statistic="kronecker".'
        )

    def factors(tree):
        is_rows = lambda x: isinstance(x, InputRows)  # noqa: E731

        def of_layer(x):
            return InputFactor(x.input_factor, jnp.ones([], jnp.int32)) if is_rows(x) else x

        return jax.tree.map(of_layer, tree, is_leaf=is_rows)

    def average(old, new):
        if not jnp.issubdtype(new.dtype, jnp.inexact):
            return new
        share = 1 / (step + 1).astype(new.dtype)
        return jnp.where(step == 0, new, old + (new - old) * share)

    step = jnp.asarray(mini_step)
    return jax.tree.map(average, factors(mean), factors(curvature))
