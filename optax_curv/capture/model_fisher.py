"""The Fisher matrix of the model itself: statistics of cotangents drawn from it, or of a root of its Hessian."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_curv.capture.objective import Objective
from optax_curv.capture.statistics import FactorRows, KroneckerFactors, RawSamples


def model_curvature(
    objective: Objective,
    outputs: jax.Array,
    measure: Callable[[jax.Array], dict[str, Any]],
    *,
    fisher: str,
    batch: int,
    weights=None,
    key=None,
    samples: int = 1,
    keeps_rows: bool = False,
) -> dict[str, Any]:
    """The curvature of every layer from cotangents of the outputs instead of the loss.

    With cotangents c for which Σ_c Jᵀ c (Jᵀ c)ᵀ is the Gauss-Newton matrix, G = Σ_c Σ_r g gᵀ over a layer's rows; what
    does not depend on the cotangent, such as A, enters once. "sampled" takes cotangents at drawn targets. "exact" takes
    every column of the root of every row's Hessian: the columns of one row of each example go through one vectorised
    backward pass, and the rows of an example (positions, time steps) follow one after the other, as they may meet
    inside the network.

    Args:
      objective: the objective.
      outputs: the network's outputs, [*leading, O].
      measure: the curvature from one cotangent of the outputs, on the scale of a batch of `batch` examples.
      fisher: "sampled" or "exact".
      batch: N by which `measure` scales G.
      weights: as in a call of the objective.
      key: PRNG key, for "sampled".
      samples: number of drawn targets, for "sampled".
      keeps_rows: whether `measure` gives `RawSamples` or `FactorRows`, which are joined.

    Returns:
      The curvature.
    """
    if fisher == "sampled":
        columns, positions = objective.sampled_cotangents(key, outputs, samples=samples, weights=weights), 1
    else:
        columns, positions = objective.exact_cotangents(outputs, weights=weights), math.prod(outputs.shape[1:-1])
    columns = columns / jnp.sqrt(jnp.asarray(batch, columns.dtype))

    if len(columns) * positions == 1:
        return measure(columns[0])

    def at(position):
        if positions == 1:
            return jax.vmap(measure)(columns)
        here = (jnp.arange(positions) == position).reshape(1, *outputs.shape[1:-1], 1)
        return jax.vmap(measure)(columns * here)

    if keeps_rows:
        each = jax.lax.map(at, jnp.arange(positions))
        return {name: _joined(x) for name, x in each.items()}
    still = measure(jnp.zeros_like(outputs))

    def add(total, position):
        # Without what is there at no cotangent, so that this enters once.
        moved = jax.tree.map(lambda each, rest: jnp.sum(each - rest, 0, dtype=each.dtype), at(position), still)
        return jax.tree.map(jnp.add, total, moved), None

    return jax.lax.scan(add, still, jnp.arange(positions))[0]


def _joined(statistic):
    """Rows of all cotangents [positions, columns, *stack, R, ·] one after the other, on the scale of a single one."""
    if isinstance(statistic, KroneckerFactors):  # of a scale or shift in "rows", whose A does not depend on cotangents
        return KroneckerFactors(
            statistic.input_factor[0, 0], jnp.sum(statistic.output_factor, (0, 1)), statistic.count[0, 0]
        )
    count = math.prod(statistic.output_grads.shape[:2])
    axis = statistic.output_grads.ndim - 4

    def join(x):
        x = jnp.moveaxis(x.reshape(count, *x.shape[2:]), 0, axis)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    inputs, output_grads = join(statistic.inputs), join(statistic.output_grads)
    if isinstance(statistic, FactorRows):
        return FactorRows(
            inputs, output_grads, statistic.weights[0, 0] / jnp.array([count, 1], statistic.weights.dtype)
        )
    return RawSamples(inputs, output_grads * jnp.sqrt(float(count)))
