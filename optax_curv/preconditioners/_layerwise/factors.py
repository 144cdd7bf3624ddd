"""The running averages of Kronecker factors, by stack: the only ones of all layer-wise methods."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_curv.curvature import KroneckerFactors
from optax_curv.linalg._compiler import materialize, slice_of_stack
from optax_curv.linalg.factors import Dense, Diagonal, Factor
from optax_curv.preconditioners._layerwise.members import LayerKind, PresentLayer
from optax_curv.preconditioners._stacks.names import layers_of
from optax_curv.preconditioners._stacks.owners import without_types
from optax_curv.preconditioners._transformation import averages

FREE = 10  # statistics of a slice that are averaged before its averages bound the next ones


class LayerFactors(NamedTuple):
    """The averaged factors of a stack of layers [N, rows, out].

    Attributes:
      input_factor: A, full [N, rows, rows] or diagonal [N, rows].
      output_factor: G, full [N, out, out] or diagonal [N, out].
      count: how many statistics have been averaged, int32 [N].
      held: how many of them were held to the bound, and how many in a row just now, int32 [N, 2].
    """

    input_factor: Factor
    output_factor: Factor
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    held: jax.Array


class Averaging(NamedTuple):
    """How statistics of a stack were averaged in.

    Attributes:
      weights: of the new ones, [N]; 0 where nothing was averaged in.
      scales: how much was taken of what is quadratic in inputs and in output gradients, [N].
    """

    weights: jax.Array
    scales: jax.Array


def array_of(factor: Factor) -> jax.Array:
    """The array of a factor, [N, d, d] or [N, d]."""
    return factor.matrix if isinstance(factor, Dense) else factor.vector


def factor_like(kind: LayerKind, arrays: tuple[jax.Array, jax.Array]) -> tuple[Factor, Factor]:
    """The arrays of both sides of a stack as factors of its kind."""
    a, g = arrays
    return (
        Dense(a) if kind.dense_input else Diagonal(a),
        Dense(g) if kind.dense_output else Diagonal(g),
    )


def zero_factors(kind: LayerKind, struct: jax.ShapeDtypeStruct) -> LayerFactors:
    """The factors of a stack [N, rows, out] before any step."""
    count, rows, out = struct.shape
    a = (Dense if kind.dense_input else Diagonal).zeros((count,), rows, struct.dtype)
    g = (Dense if kind.dense_output else Diagonal).zeros((count,), out, struct.dtype)
    return LayerFactors(a, g, jnp.zeros(count, jnp.int32), jnp.zeros((count, 2), jnp.int32))


def is_silent(array: jax.Array) -> jax.Array:
    """Says of which rows an array [N, ...] is zero, or too small for arithmetic: bool [N]."""
    return _is_too_small(peaks(array))


def peaks(array: jax.Array) -> jax.Array:
    """The largest magnitude in every row of an array [N, ...], [N]."""
    return jnp.max(jnp.abs(array), axis=tuple(range(1, array.ndim)), initial=0)


def _is_too_small(peaks: jax.Array) -> jax.Array:
    return peaks < jnp.finfo(peaks.dtype).tiny


def averaged(
    old: LayerFactors,
    new: tuple[Factor, Factor],
    decay: jax.Array,
    bound: Any,
    sound: jax.Array,
) -> tuple[LayerFactors, Averaging]:
    """The factors of a stack with new ones averaged in, and how; see `averaged_sides`."""
    sides = old.input_factor, old.output_factor
    (a, g), count, held, how = averaged_sides(sides, new, old.count, old.held, decay, bound, sound)
    return LayerFactors(a, g, count, held), how


def averaged_sides(
    old: Sequence[Factor],
    new: Sequence[Factor],
    count: jax.Array,
    held: jax.Array,
    decay: jax.Array,
    bound: Any,
    sound: jax.Array,
) -> tuple[list[Any], jax.Array, jax.Array, Averaging]:
    """(factors of each side with new ones averaged in, count, held, how that was done).

    Each slice has a count of its own: factors that are still zero start with what comes, and a
    statistic that is zero, as that of an expert without tokens, leaves them as they are.

    Args:
      old: the averages of each side of a stack before the step.
      new: the factors of this step's statistics.
      count: how many statistics have been averaged, int32 [N].
      held: how many of them were held, and how many in a row just now, int32 [N, 2].
      decay: of the averages, [].
      bound: how many times an average's largest entry that of a new factor may be; a larger one
        is scaled down to it. A k-th one in a row may be bound^k times as large, so that an outlier
        changes little, and what has grown for good is followed. The first `FREE` statistics of a
        slice are taken as they come. None: all are.
      sound: whether the step is; without that nothing is averaged in.
    """
    sides = list(zip(old, new, strict=True))
    sizes = [(peaks(array_of(x)), peaks(array_of(y))) for x, y in sides]
    silent, unseen = (
        functools.reduce(jnp.logical_or, [_is_too_small(size[which]) for size in sizes])
        for which in (0, 1)
    )
    seen = jnp.where(silent, 0, count)
    taken = sound & ~unseen
    weight = jnp.where(taken, averages.running_weight(decay, seen), 0)
    scales = [jnp.ones_like(weight)] * len(sides)
    if bound is not None:
        limits = jnp.power(jnp.asarray(bound, weight.dtype), jnp.minimum(held[:, 1], 8) + 1)
        limits = jnp.where(seen < FREE, jnp.inf, limits)
        scales = [_scale(*size, limits) for size in sizes]
        is_held = taken & functools.reduce(jnp.logical_or, [scale < 1 for scale in scales])
        total = jnp.where(is_held, optax.safe_increment(held[:, 0]), held[:, 0])
        row = jnp.where(is_held, optax.safe_increment(held[:, 1]), 0)
        held = jnp.stack([total, jnp.where(taken, row, held[:, 1])], axis=1)

    # Else XLA on CPU would fuse them into the loops over the factors, once a factor.
    weight, scales = materialize(weight), [materialize(scale) for scale in scales]

    def moved(old: Factor, new: Factor, scale: jax.Array) -> Any:
        def of_array(x: jax.Array, y: jax.Array) -> jax.Array:
            return averages.averaged(x, by_slice(weight, x), by_slice(scale, y) * y)

        return jax.tree.map(of_array, old, new)

    count = jnp.where(taken, jnp.asarray(optax.safe_increment(seen)), count)
    factors = [moved(*side, scale) for side, scale in zip(sides, scales, strict=True)]
    return factors, count, held, Averaging(weight, functools.reduce(jnp.multiply, scales))


def _scale(old: jax.Array, new: jax.Array, limits: jax.Array) -> jax.Array:
    """How much of factors of these sizes is taken, at most 1, [N]."""
    largest = limits * old
    return jnp.where(new > largest, largest / jnp.where(new > largest, new, 1), 1)


def by_slice(numbers: jax.Array, like: jax.Array) -> jax.Array:
    """Numbers [N] as an array that broadcasts with [N, ...]."""
    return numbers.reshape(-1, *(1,) * (like.ndim - 1))


def mean_eigenvalue(factors: Mapping[str, LayerFactors]) -> jax.Array:
    """tr(F) / dim over the Kronecker blocks A ⊗ G of all layers: []."""
    total, size = jnp.zeros([], jnp.float32), 0
    for x in factors.values():
        means = x.input_factor.mean_diagonal() * x.output_factor.mean_diagonal()
        block = x.input_factor.size * x.output_factor.size
        total, size = total + block * jnp.sum(means), size + block * means.size
    return total / max(size, 1)


def layer_slices(name: str, tree: Any) -> dict[str, Any]:
    """The arrays [N, ...] of a stack cut into those of its layers, [*stack, ...], by name."""
    found, start, tree = {}, 0, without_types(tree)
    for layer, stack in layers_of(name):
        found[layer] = jax.tree.map(lambda x, i=start, s=stack: slice_of_stack(x, i, s), tree)
        start += math.prod(stack)
    return found


def by_layer(trees: Mapping[str, Any]) -> dict[str, Any]:
    """Trees of arrays by stack as trees by layer."""
    found = {}
    for name, tree in trees.items():
        found |= layer_slices(name, tree)
    return found


def kronecker_factors(factors: Mapping[str, LayerFactors]) -> dict[str, KroneckerFactors]:
    """The factors by layer, as the public functions show them."""
    arrays = {
        name: KroneckerFactors(array_of(x.input_factor), array_of(x.output_factor), x.count)
        for name, x in factors.items()
    }
    return by_layer(arrays)


def spectra_of(factors: Mapping[str, LayerFactors]) -> dict[str, dict[str, Factor]]:
    """The factors that diagnostics read, by stack and side."""
    sides = "input_factor", "output_factor"
    return {name: {side: getattr(x, side) for side in sides} for name, x in factors.items()}


def joined(layers: Sequence[PresentLayer], parts: Sequence[Any]) -> Any:
    """The trees of arrays [*stack, ...] of a stack's layers, as one tree of arrays [N, ...]."""

    def flat(x: PresentLayer, array: jax.Array) -> jax.Array:
        stack = x.layer.stack
        return array.reshape(math.prod(stack), *array.shape[len(stack) :])

    def concatenated(*arrays: jax.Array) -> jax.Array:
        rows = [flat(x, array) for x, array in zip(layers, arrays, strict=True)]
        return rows[0] if len(rows) == 1 else jnp.concatenate(rows)

    return jax.tree.map(concatenated, *parts)


def names_in_order(places: Mapping[str, jax.Array]) -> list[str]:
    """The names of all layers in the order of `Layers`, from the places that a state keeps."""
    found = {}
    for name, of_rows in places.items():
        for layer, of_layer in layer_slices(name, of_rows).items():
            found[int(jnp.max(of_layer))] = layer
    return [found[place] for place in sorted(found)]
