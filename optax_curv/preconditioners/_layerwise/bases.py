"""Eigenbases of the factors of layers, by stack, and matrices and moments seen in them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_curv.linalg import _lapack as lapack
from optax_curv.linalg.factors import Dense, Diagonal, Factor
from optax_curv.preconditioners._layerwise.factors import LayerFactors, by_layer
from optax_curv.preconditioners._layerwise.view import LayerStacks


class Axes(NamedTuple):
    """The eigenbasis of a diagonal factor, which is that of the axes themselves."""

    def matmul(self, x: jax.Array, side: str = "left") -> jax.Array:
        """Returns `x`."""
        del side
        return x

    def adjoint(self) -> "Axes":
        """Returns itself."""
        return self


Side = Dense | Axes


class Bases(NamedTuple):
    """The eigenvectors of both factors of a stack in their columns.

    Attributes:
      input_basis: U_A, [N, rows, rows], or `Axes` where A is diagonal.
      output_basis: U_G, [N, out, out], or `Axes` where G is diagonal.
    """

    input_basis: Side
    output_basis: Side


class Eigenbasis(NamedTuple):
    """Eigenvectors of a layer's factors in their columns; None where the factor is diagonal.

    Attributes:
      input_basis: U_A, float [*stack, rows, rows].
      output_basis: U_G, float [*stack, out, out].
    """

    input_basis: jax.Array | None
    output_basis: jax.Array | None


def identity_bases(
    method: str, view: LayerStacks, structs: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Bases]:
    """The bases of stacks before any step; refuses a layer of which a leaf is masked."""
    for layers in view.layers.values():
        for x in layers:
            if not x.is_whole:
                raise ValueError(
                    f"{method}: layer {x.layer.name!r} is masked in part; mask all of "
                    f"{x.whole.paths} or none."
                )

    def side(dense: bool, stack: jax.ShapeDtypeStruct, size: int) -> Side:
        return Dense.identity((stack.shape[0],), size, stack.dtype) if dense else Axes()

    found = {}
    for name, struct in structs.items():
        kind = view.kind(name)
        _, rows, out = struct.shape
        found[name] = Bases(
            side(kind.dense_input, struct, rows), side(kind.dense_output, struct, out)
        )
    return found


def bases_of(
    factors: Mapping[str, LayerFactors],
) -> tuple[dict[str, tuple[jax.Array, jax.Array]], dict[str, Bases]]:
    """(the eigenvalues of both factors, their bases) of every stack."""
    sides: dict[tuple[str, int], Factor] = {}
    for name, x in factors.items():
        sides |= {(name, 0): x.input_factor, (name, 1): x.output_factor}
    dense = {key: x.matrix for key, x in sides.items() if isinstance(x, Dense)}
    found = dict(zip(dense, lapack.joined(lapack.eigh, list(dense.values())), strict=True))

    def of_side(key: tuple[str, int], x: Factor) -> tuple[jax.Array, Side]:
        if isinstance(x, Diagonal):
            return x.vector, Axes()
        values, vectors = found[key]
        return values, Dense(vectors)

    pairs = {key: of_side(key, x) for key, x in sides.items()}
    values = {n: (pairs[n, 0][0], pairs[n, 1][0]) for n in factors}
    return values, {n: Bases(pairs[n, 0][1], pairs[n, 1][1]) for n in factors}


def into_bases(bases: Bases, x: jax.Array) -> jax.Array:
    """U_Aᵀ X U_G of a stack."""
    return bases[1].matmul(bases[0].adjoint().matmul(x), "right")


def out_of_bases(bases: Bases, x: jax.Array) -> jax.Array:
    """U_A X U_Gᵀ of a stack."""
    return bases[1].adjoint().matmul(bases[0].matmul(x), "right")


def divided_in_bases(bases: Bases, divisor: jax.Array, x: jax.Array) -> jax.Array:
    """U_A [(U_Aᵀ X U_G) / divisor] U_Gᵀ, without the coordinates whose divisor is zero."""
    inside = into_bases(bases, x)
    inside = jnp.where(divisor > 0, inside / jnp.where(divisor > 0, divisor, 1), 0)
    return out_of_bases(bases, inside)


def carried(new: Bases, old: Bases, moments: jax.Array) -> jax.Array:
    """Moments M in new bases, as far as a diagonal says: (R_A ∘ R_A) M (R_G ∘ R_G)ᵀ, R = U'ᵀ U."""
    squares = []
    for to, base in zip(new, old, strict=True):
        if isinstance(to, Dense) and isinstance(base, Dense):
            squares.append(Dense(jnp.square(to.adjoint().compose(base).dense())))
        else:
            squares.append(Axes())
    return squares[1].adjoint().matmul(squares[0].matmul(moments), "right")


def each(function: Any, *columns: Mapping[str, Any]) -> dict[str, Any]:
    """`function` of the columns' entries of every stack."""
    return {name: function(*(column[name] for column in columns)) for name in columns[0]}


def eigenbasis_by_layer(bases: Mapping[str, Bases]) -> dict[str, Eigenbasis]:
    """The bases by layer, as the capture takes them."""

    def array(side: Side) -> jax.Array | None:
        return side.matrix if isinstance(side, Dense) else None

    return by_layer({name: Eigenbasis(*map(array, x)) for name, x in bases.items()})
