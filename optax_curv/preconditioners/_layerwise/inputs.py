"""The input factors of layers alone, averaged and kept together with a root, by stack."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_curv.linalg import _lapack as lapack
from optax_curv.linalg import inverse_root
from optax_curv.linalg.factors import Dense, Diagonal, DiagonalPair, Factor, SymmetricPair
from optax_curv.preconditioners._layerwise.factors import array_of, averaged_sides, joined
from optax_curv.preconditioners._layerwise.statistics import input_factor
from optax_curv.preconditioners._layerwise.view import LayerStacks


class InputPairs(NamedTuple):
    """The averaged input factors of a stack of layers, each with its root.

    Attributes:
      pair: A and (A + ridge · tr(A)/d · I)^(-power), [N, d, d + 1], or both diagonals [N, d].
      count: how many statistics have been averaged, int32 [N].
      held: how many of them were held to the bound, and how many in a row just now, int32 [N, 2].
    """

    pair: SymmetricPair | DiagonalPair
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    held: jax.Array

    @property
    def factor(self) -> Factor:
        """The average A."""
        is_dense = isinstance(self.pair, SymmetricPair)
        return Dense(self.pair.factor) if is_dense else Diagonal(self.pair.factor)

    @property
    def root(self) -> Factor:
        """The root of A as of the last refresh."""
        is_dense = isinstance(self.pair, SymmetricPair)
        return Dense(self.pair.root) if is_dense else Diagonal(self.pair.root)


def zero_inputs(view: LayerStacks, structs: Mapping[str, Any]) -> dict[str, InputPairs]:
    """The factors of stacks [N, rows, out] before any step."""

    def of_stack(name: str, struct: jax.ShapeDtypeStruct) -> InputPairs:
        count, rows, _ = struct.shape
        kind = SymmetricPair if view.kind(name).dense_input else DiagonalPair
        pair = kind.zeros((count,), rows, struct.dtype)
        return InputPairs(pair, jnp.zeros(count, jnp.int32), jnp.zeros((count, 2), jnp.int32))

    return {name: of_stack(name, struct) for name, struct in structs.items()}


def measured_inputs(method: str, view: LayerStacks, curvature: Mapping[str, Any]) -> dict[str, Any]:
    """The input factors of this step's statistics, by stack."""
    found = {}
    for name, layers in view.layers.items():
        parts = [input_factor(method, x, curvature[x.whole.name]) for x in layers]
        array = joined(layers, parts)
        found[name] = Dense(array) if view.kind(name).dense_input else Diagonal(array)
    return found


def averaged_inputs(
    old: Mapping[str, InputPairs],
    new: Mapping[str, Factor],
    decay: jax.Array,
    bound: Any,
    sound: jax.Array,
) -> dict[str, InputPairs]:
    """The factors with new ones averaged in; their roots are still the old ones."""
    found = {}
    for name, x in old.items():
        now = decay.astype(x.pair.dtype)
        (factor,), count, held, _ = averaged_sides(
            [x.factor], [new[name]], x.count, x.held, now, bound, sound
        )
        found[name] = InputPairs(x.pair.replace(factor=array_of(factor)), count, held)
    return found


def with_roots(stacks: Mapping[str, InputPairs], power: Any, ridge: Any) -> dict[str, InputPairs]:
    """The factors with the roots (A + ridge · tr(A)/d · I)^(-power), those of one width at once."""

    def dense_root(a: jax.Array) -> jax.Array:
        mean = jnp.trace(a, axis1=-2, axis2=-1) / a.shape[-1]
        return inverse_root(a, 1 / jnp.asarray(power, a.dtype), damping=ridge * mean)

    def diagonal_root(v: jax.Array) -> jax.Array:
        damped = v + ridge * jnp.mean(v, axis=-1, keepdims=True)
        is_seen = damped > 0
        return jnp.where(is_seen, jnp.where(is_seen, damped, 1) ** -power, 0)

    factors = {name: x.factor for name, x in stacks.items()}
    dense = {name: f.matrix for name, f in factors.items() if isinstance(f, Dense)}
    roots = dict(zip(dense, lapack.joined(dense_root, list(dense.values())), strict=True))
    roots |= {n: diagonal_root(f.vector) for n, f in factors.items() if isinstance(f, Diagonal)}

    def replaced(x: InputPairs, root: jax.Array) -> InputPairs:
        # What LAPACK could not take is left out until the next refresh.
        return x._replace(pair=x.pair.replace(root=jnp.where(jnp.isfinite(root), root, 0)))

    return {name: replaced(x, roots[name]) for name, x in stacks.items()}
