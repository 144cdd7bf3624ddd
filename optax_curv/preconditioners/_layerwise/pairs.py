"""Averaged factors kept together with their inverses, by stack."""

from collections.abc import Mapping
from typing import NamedTuple

import jax

from optax_curv.linalg.factors import Dense, Diagonal, DiagonalPair, Factor, SymmetricPair
from optax_curv.preconditioners._layerwise.blocks import KroneckerInverse
from optax_curv.preconditioners._layerwise.factors import LayerFactors, array_of


class LayerPairs(NamedTuple):
    """The averaged factors of a stack of layers, each with its damped inverse.

    Attributes:
      input_pair: A and (A + d_A I)⁻¹.
      output_pair: G and (G + d_G I)⁻¹.
      count: how many statistics have been averaged, int32 [N].
      held: how many of them were held to the bound, and how many in a row just now, int32 [N, 2].
    """

    input_pair: SymmetricPair | DiagonalPair
    output_pair: SymmetricPair | DiagonalPair
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    held: jax.Array


Kept = LayerPairs | LayerFactors


def _zero_pair(factor: Factor) -> SymmetricPair | DiagonalPair:
    pair = SymmetricPair if isinstance(factor, Dense) else DiagonalPair
    return pair.zeros(factor.stack, factor.size, factor.dtype)


def _of_pair(pair: SymmetricPair | DiagonalPair, array: jax.Array) -> Factor:
    return Dense(array) if isinstance(pair, SymmetricPair) else Diagonal(array)


def zero_pairs(factors: LayerFactors) -> LayerPairs:
    """Pairs of zeros for a stack's zero factors."""
    pairs = _zero_pair(factors.input_factor), _zero_pair(factors.output_factor)
    return LayerPairs(*pairs, factors.count, factors.held)


def factors_of(kept: Mapping[str, Kept]) -> dict[str, LayerFactors]:
    """The averaged factors."""

    def factors(x: Kept) -> LayerFactors:
        if isinstance(x, LayerFactors):
            return x
        a, g = (_of_pair(pair, pair.factor) for pair in (x.input_pair, x.output_pair))
        return LayerFactors(a, g, x.count, x.held)

    return {name: factors(x) for name, x in kept.items()}


def inverses_of(kept: Mapping[str, Kept]) -> dict[str, KroneckerInverse]:
    """The inverses of the damped factors; none where none are kept."""
    return {
        name: KroneckerInverse(
            _of_pair(x.input_pair, x.input_pair.root), _of_pair(x.output_pair, x.output_pair.root)
        )
        for name, x in kept.items()
        if isinstance(x, LayerPairs)
    }


def with_factors(kept: Mapping[str, Kept], factors: Mapping[str, LayerFactors]) -> dict[str, Kept]:
    """Replaces the factors in what is kept."""

    def of_stack(x: Kept, new: LayerFactors) -> Kept:
        if isinstance(x, LayerFactors):
            return new
        a = x.input_pair.replace(factor=array_of(new.input_factor))
        g = x.output_pair.replace(factor=array_of(new.output_factor))
        return LayerPairs(a, g, new.count, new.held)

    return {name: of_stack(x, factors[name]) for name, x in kept.items()}


def with_inverses(
    kept: Mapping[str, Kept], inverses: Mapping[str, KroneckerInverse]
) -> dict[str, Kept]:
    """Replaces the inverses in what is kept."""

    def of_stack(x: Kept, new: KroneckerInverse) -> Kept:
        assert isinstance(x, LayerPairs)
        a = x.input_pair.replace(root=array_of(new.input_inverse))
        g = x.output_pair.replace(root=array_of(new.output_inverse))
        return LayerPairs(a, g, x.count, x.held)

    return {name: of_stack(x, inverses[name]) for name, x in kept.items()}
