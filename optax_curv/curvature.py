"""The statistics of a layer's curvature, and Kronecker factors made of a layer's rows."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_curv.layers import Layer
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
    """Rows of a layer that make its factors later, A = w_A Σ a aᵀ and G = w_G Σ g gᵀ.

    Attributes:
      inputs: as in `RawSamples`.
      output_grads: g, gradients of the loss of the batch, [*stack, R, out].
      weights: (w_A, w_G), float [2].
    """

    inputs: jax.Array
    output_grads: jax.Array
    weights: jax.Array


class InputFactor(NamedTuple):
    """The input side alone of a layer's Fisher block.

    Attributes:
      input_factor: A = E[a aᵀ], float [*stack, in, in], or its diagonal [*stack, in].
      count: number of batches averaged so far, int32 [].
    """

    input_factor: jax.Array
    count: jax.Array  # type: ignore[override]


class InputRows(NamedTuple):
    """A layer's inputs, of which A = w Σ a aᵀ is made where it is asked for.

    Attributes:
      inputs: a, [*stack, R, in].
      weight: w = 1 / R, float [].
      last: the bias's coordinate of every row, [*stack, R], which is not copied to the inputs; None
        where they have it already, or there is none.
    """

    inputs: jax.Array
    weight: jax.Array
    last: jax.Array | None = None

    @property
    def width(self) -> int:
        """The width of A."""
        return self.inputs.shape[-1] + (self.last is not None)

    @property
    def input_factor(self) -> jax.Array:
        """A, float [*stack, width, width]."""
        rows = self.inputs
        if self.last is not None:
            rows = jnp.concatenate([rows, self.last[..., None].astype(rows.dtype)], axis=-1)
        return self.weight * second_moment(rows, full=True)


class MadeKernelStatistic(NamedTuple):
    """The statistic of a layer whose kernel is made of a leaf entry by entry (`Layer.made`).

    What the statistic has can be read here, too: `input_factor`, `inputs` and so on.

    Attributes:
      statistic: of the made kernel f(w), one of the types that layers have. Its rows sum to the
        gradient of f(w), which times the slope is the leaf's.
      slope: ∂f(w) / ∂w entry by entry, in the shape of the leaf w.
    """

    statistic: Any
    slope: jax.Array

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.statistic, name)


class SplitRows(NamedTuple):
    """Derivatives along the real and along the imaginary part of a complex leaf.

    They stand in the place of the leaf in rows of a function that is not holomorphic, whose
    derivatives are two independent arrays (`jacobian_rows`).

    Attributes:
      real: ∂ψ / ∂Re z, [K, *leaf.shape], real or complex as ψ is.
      imag: ∂ψ / ∂Im z, [K, *leaf.shape].
    """

    real: jax.Array
    imag: jax.Array


def second_moment(rows: jax.Array, full: bool) -> jax.Array:
    """Computes Σ x xᵀ over rows x of [*stack, R, d], or only its diagonal."""
    if not full:
        return jnp.sum(jnp.square(widen(rows)), axis=-2)
    # Products of two half-precision numbers are exact in float32.
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    return jnp.einsum(
        "...ri,...rj->...ij",
        rows,
        rows,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=wide,
    )


def counts_of_ids(ids: jax.Array, width: int, weights: jax.Array) -> jax.Array:
    """Sums weights by row number: Σ one_hot(id) ⊗ weight, [*stack, width, …].

    Args:
      ids: row numbers, [*stack, R].
      width: how many rows there are.
      weights: numbers or vectors, [*stack, R, …].
    """
    if ids.ndim > 1:
        return jax.vmap(lambda i, w: counts_of_ids(i, width, w))(ids, weights)
    return jnp.zeros((width, *weights.shape[1:]), weights.dtype).at[ids].add(weights, mode="drop")


def factor_sums(layer: Layer, inputs: jax.Array, grads: jax.Array) -> dict[str, jax.Array]:
    """Computes Σ a aᵀ and Σ g gᵀ over rows [*stack, R, ·], in the shapes of the layer's factors.

    The inputs of an embedding may be row numbers [*stack, R].
    """
    if inputs.ndim == grads.ndim - 1:
        ones = jnp.ones(inputs.shape, jnp.float32)
        first = counts_of_ids(inputs, layer.in_dim, ones)
    else:
        first = second_moment(inputs, layer.input_factor != "diagonal")
    return {"input": first, "output": second_moment(grads, layer.output_factor == "full")}


def moment_sums(
    layer: Layer,
    inputs: jax.Array,
    grads: jax.Array,
    basis: tuple[jax.Array | None, jax.Array | None],
) -> dict[str, jax.Array]:
    """Computes Σ (U_Aᵀ a)² (U_Gᵀ g)² over rows, [*stack, rows, out]; None is the identity."""
    left, right = basis
    squares = squares_in_basis(grads, right)
    if inputs.ndim == grads.ndim - 1:
        return {"moments": counts_of_ids(inputs, layer.in_dim, squares)}
    a = squares_in_basis(inputs, left)
    precision = lax.Precision.HIGHEST
    return {"moments": jnp.einsum("...ri,...rj->...ij", a, squares, precision=precision)}


def squares_in_basis(rows: jax.Array, basis: jax.Array | None) -> jax.Array:
    """Squares the coordinates of rows in a basis, whose vectors are columns; None: the identity."""
    rows = widen(rows)
    if basis is not None:
        rows = jnp.einsum("...ri,...ij->...rj", rows, basis, precision=lax.Precision.HIGHEST)
    return jnp.square(rows)


def factors_of_rows(rows: FactorRows, layer: Layer) -> tuple[jax.Array, jax.Array]:
    """Makes A and G of a layer's rows, in the shapes of `layer.factor_shapes`."""
    sums = factor_sums(layer, rows.inputs, rows.output_grads)
    return rows.weights[0] * sums["input"], rows.weights[1] * sums["output"]
