"""The statistics of a layer's curvature, and Kronecker factors made of a layer's rows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_curv.linalg._checks import widen


class KroneckerFactors(NamedTuple):
    """The factors of a layer's Fisher block, F ≈ A ⊗ G.

    Attributes:
      input_factor: A = E[a aᵀ], float [*stack, in, in], or its diagonal [*stack, in] (embeddings).
      output_factor: G = E[g gᵀ], float [*stack, out, out], or its diagonal [*stack, out].
      count: number of batches averaged so far, int32 [].
    """

    input_factor: jax.Array
    output_factor: jax.Array
    count: jax.Array  # type: ignore[override]


class EigenbasisMoments(NamedTuple):
    """Kronecker factors, and second moments of the gradient in a given eigenbasis (EKFAC).

    Attributes:
      input_factor, output_factor, count: as in `KroneckerFactors`.
      moments: E[(U_Aᵀ a gᵀ U_G)²], float [*stack, rows, out].
    """

    input_factor: jax.Array
    output_factor: jax.Array
    count: jax.Array  # type: ignore[override]
    moments: jax.Array


class RawSamples(NamedTuple):
    """The rows of a layer themselves, all uses one after the other.

    Attributes:
      inputs: a, [*stack, R, in] with the bias's coordinate; integer [*stack, R] for an embedding.
      output_grads: g, gradients of one example's own loss, [*stack, R, out].
    """

    inputs: jax.Array
    output_grads: jax.Array


class FactorRows(NamedTuple):
    """Rows of a layer of which its Kronecker factors can be made later, A = w_A Σ a aᵀ and G = w_G Σ g gᵀ.

    Attributes:
      inputs: as in `RawSamples`.
      output_grads: g, gradients of the loss of the batch, [*stack, R, out].
      weights: (w_A, w_G), float [2].
    """

    inputs: jax.Array
    output_grads: jax.Array
    weights: jax.Array


def second_moment(rows, full: bool):
    """Σ x xᵀ over the rows [*stack, R, d], or its diagonal."""
    if not full:
        return jnp.sum(jnp.square(widen(rows)), axis=-2)
    wide = jnp.promote_types(
        rows.dtype, jnp.float32
    )  # where products of half-precision numbers are exact
    return jnp.einsum(
        "...ri,...rj->...ij",
        rows,
        rows,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=wide,
    )


def counts_of_ids(ids, width: int, weights):
    """Σ of products of one-hot rows with weights, [*stack, R] and [*stack, R, ·] to [*stack, width, ·]."""
    if ids.ndim > 1:
        return jax.vmap(lambda i, w: counts_of_ids(i, width, w))(ids, weights)
    return jnp.zeros((width, *weights.shape[1:]), weights.dtype).at[ids].add(weights, mode="drop")


def quadratic_sums(statistic: str, layer, inputs, grads, basis) -> dict[str, jax.Array]:
    """Σ a aᵀ, Σ g gᵀ and Σ (U_Aᵀ a)² (U_Gᵀ g)² over rows [*stack, R, ·], as far as the statistic has them."""
    sums, one_hot = {}, layer.kind == "embedding" and inputs.ndim == grads.ndim - 1
    if statistic != "diagonal":
        full_input, full_output = (
            len(shape) == len(layer.stack) + 2 for shape in layer.factor_shapes
        )
        sums["output"] = second_moment(grads, full_output)
        if one_hot:
            sums["input"] = counts_of_ids(inputs, layer.in_dim, jnp.ones(inputs.shape, jnp.float32))
        else:
            sums["input"] = second_moment(inputs, full_input)
    if statistic not in ("kronecker", "rows"):
        left, right = basis
        squares = squares_in_basis(grads, right)
        if one_hot:
            sums["moments"] = counts_of_ids(inputs, layer.in_dim, squares)
        else:
            a = squares_in_basis(inputs, left)
            sums["moments"] = jnp.einsum(
                "...ri,...rj->...ij", a, squares, precision=lax.Precision.HIGHEST
            )
    return sums


def squares_in_basis(rows, basis):
    """Of the rows in a basis whose vectors are the columns of `basis`; None: the identity."""
    rows = widen(rows)
    if basis is not None:
        rows = jnp.einsum("...ri,...ij->...rj", rows, basis, precision=lax.Precision.HIGHEST)
    return jnp.square(rows)


def factors_of_rows(rows: FactorRows, layer) -> tuple[jax.Array, jax.Array]:
    """A and G in the shapes of `layer.factor_shapes`."""
    sums = quadratic_sums("kronecker", layer, rows.inputs, rows.output_grads, None)
    return rows.weights[0] * sums["input"], rows.weights[1] * sums["output"]
