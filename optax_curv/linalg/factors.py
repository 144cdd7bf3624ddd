"""Kronecker factors as types: dense, diagonal, and a factor packed with its root.

A factor belongs to one axis of a tensor; it stands for a Hermitian positive semi-definite matrix,
one for each entry of a stack. What is dense and what is diagonal is said by the type and never by
the number of axes, as a stack of diagonals [n, n] looks like a matrix. All types are named tuples,
which JAX, Flax's serialization, nnx and Orbax know without being told.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from optax_curv.linalg import _lapack as lapack
from optax_curv.linalg._checks import per_matrix, require_choice
from optax_curv.linalg._compiler import FULL, compiled_once, full_matmul
from optax_curv.linalg.cholesky import damped_inverse
from optax_curv.linalg.roots import relative_power
from optax_curv.typing import Side


class FactorInverse(NamedTuple):
    """The inverse of damped factors, and the damping it took.

    Attributes:
      factor: (F + d I)⁻¹, of the type of F.
      damping: the d that was used, raised where a factorisation failed, real [*stack].
      condition: condition number of F + d I, real [*stack]; of a dense one a lower bound, the
        square of its largest over its smallest pivot.
    """

    factor: Any
    damping: jax.Array
    condition: jax.Array


class Dense(NamedTuple):
    """A full matrix F for one axis of d entries.

    Attributes:
      matrix: [*stack, d, d].
    """

    matrix: jax.Array

    @classmethod
    def zeros(cls, stack: Sequence[int], size: int, dtype: DTypeLike = jnp.float32) -> "Dense":
        """Returns a stack of zero matrices."""
        return cls(jnp.zeros((*stack, size, size), dtype))

    @classmethod
    def identity(cls, stack: Sequence[int], size: int, dtype: DTypeLike = jnp.float32) -> "Dense":
        """Returns a stack of identity matrices."""
        return cls(jnp.broadcast_to(jnp.eye(size, dtype=dtype), (*stack, size, size)))

    @classmethod
    def moment(cls, x: jax.Array, axis: int, stack: int = 0) -> "Dense":
        """Returns the mode moments X₍ᵢ₎X₍ᵢ₎ᴴ of tensors x [*stack, d_1, d_2, …] along axis i.

        Args:
          x: tensors with `stack` leading axes that count them.
          axis: i, from 0, stack axes not counted.
          stack: number of leading axes.
        """
        return cls(_moment(x, axis, stack))

    @property
    def size(self) -> int:
        """The number of entries d of the axis."""
        return self.matrix.shape[-1]

    @property
    def stack(self) -> tuple[int, ...]:
        """The shape of the stack of factors."""
        return self.matrix.shape[:-2]

    @property
    def dtype(self) -> jnp.dtype:
        """The type of the entries."""
        return self.matrix.dtype

    def astype(self, dtype: DTypeLike) -> "Dense":
        """Returns the factor in another type."""
        return Dense(self.matrix.astype(dtype))

    def dense(self) -> jax.Array:
        """Returns the matrix F, [*stack, d, d]."""
        return self.matrix

    def diagonal(self) -> jax.Array:
        """Returns the diagonal of F, [*stack, d]."""
        return jnp.diagonal(self.matrix, axis1=-2, axis2=-1)

    def mean_diagonal(self) -> jax.Array:
        """Returns tr F / d, real [*stack]."""
        return jnp.mean(self.diagonal().real, axis=-1)

    def eigenvalues(self) -> jax.Array:
        """Returns the eigenvalues of F in ascending order, real [*stack, d]."""
        return lapack.eigh(self.matrix)[0]

    def matmul(self, x: jax.Array, side: Side = "left") -> jax.Array:
        """Returns F x for x [*stack, d, k], or x F for x [*stack, k, d] with side "right"."""
        require_choice("Dense.matmul", "side", side, ("left", "right"))
        return full_matmul(self.matrix, x) if side == "left" else full_matmul(x, self.matrix)

    def apply_along(
        self, x: jax.Array, axis: int, *, precision: jax.lax.PrecisionLike = FULL
    ) -> jax.Array:
        """Returns F applied to one axis of tensors x [*stack, d_1, d_2, …].

        Args:
          x: tensors whose leading axes are the stack's.
          axis: which of the axes after the stack's, from 0; negative ones count from the last.
          precision: of the products of a dense factor.
        """
        stack = len(self.stack)
        axes, place = list(range(x.ndim)), _place("Dense.apply_along", x, axis, self)
        out = [*axes[:place], x.ndim, *axes[place + 1 :]]
        operands = self.matrix, [*axes[:stack], x.ndim, place], x, axes, out
        return jnp.einsum(*operands, precision=precision)

    def compose(self, other: "Dense | Diagonal") -> "Dense":
        """Returns the product F H with another factor H of the axis."""
        return Dense(other.matmul(self.matrix, side="right"))

    def adjoint(self) -> "Dense":
        """Returns Fᴴ."""
        return Dense(self.matrix.mT.conj())

    def inverse(self, damping: ArrayLike = 0.0) -> FactorInverse:
        """Returns (F + d I)⁻¹ by a Cholesky factorisation that never fails.

        Args:
          damping: d, a number or real [*stack]; raised where F + d I is not positive definite.
        """
        damping = per_matrix("Dense.inverse", "damping", damping, self.matrix)
        if self.size == 1:
            inverse, used, condition = Diagonal(self.matrix[..., 0]).inverse(damping)
            return FactorInverse(Dense(inverse.vector[..., None]), used, condition)
        inverse, used, condition = damped_inverse(self.matrix, damping)
        return FactorInverse(Dense(inverse), used, condition)

    def power(self, exponent: ArrayLike, damping: ArrayLike = 0.0) -> "Dense":
        """Returns (F + damping λ_max I)^exponent by the eigenvalues of F.

        Negative eigenvalues count as zero, and one that is zero after the damping stays zero.

        Args:
          exponent: a number or real [*stack].
          damping: in units of the largest eigenvalue, a number or real [*stack].
        """
        exponent = per_matrix("Dense.power", "exponent", exponent, self.matrix)
        damping = per_matrix("Dense.power", "damping", damping, self.matrix)
        return Dense(relative_power(self.matrix, exponent, damping)[0])


class Diagonal(NamedTuple):
    """The diagonal of a matrix F for one axis of d entries.

    Attributes:
      vector: real [*stack, d].
    """

    vector: jax.Array

    @classmethod
    def zeros(cls, stack: Sequence[int], size: int, dtype: DTypeLike = jnp.float32) -> "Diagonal":
        """Returns a stack of zero diagonals."""
        return cls(jnp.zeros((*stack, size), dtype))

    @classmethod
    def identity(
        cls, stack: Sequence[int], size: int, dtype: DTypeLike = jnp.float32
    ) -> "Diagonal":
        """Returns a stack of identities."""
        return cls(jnp.ones((*stack, size), dtype))

    @classmethod
    def moment(cls, x: jax.Array, axis: int, stack: int = 0) -> "Diagonal":
        """Returns the diagonals of the mode moments X₍ᵢ₎X₍ᵢ₎ᴴ of tensors x [*stack, d_1, d_2, …].

        Args:
          x: tensors with `stack` leading axes that count them.
          axis: i, from 0, stack axes not counted.
          stack: number of leading axes.
        """
        return cls(_diagonal_moment(x, axis, stack))

    @property
    def size(self) -> int:
        """The number of entries d of the axis."""
        return self.vector.shape[-1]

    @property
    def stack(self) -> tuple[int, ...]:
        """The shape of the stack of factors."""
        return self.vector.shape[:-1]

    @property
    def dtype(self) -> jnp.dtype:
        """The type of the entries."""
        return self.vector.dtype

    def astype(self, dtype: DTypeLike) -> "Diagonal":
        """Returns the factor in another type."""
        return Diagonal(self.vector.astype(dtype))

    def dense(self) -> jax.Array:
        """Returns the matrix F, [*stack, d, d]."""
        return self.vector[..., None] * jnp.eye(self.size, dtype=self.dtype)

    def diagonal(self) -> jax.Array:
        """Returns the diagonal of F, [*stack, d]."""
        return self.vector

    def mean_diagonal(self) -> jax.Array:
        """Returns tr F / d, real [*stack]."""
        return jnp.mean(self.vector, axis=-1)

    def eigenvalues(self) -> jax.Array:
        """Returns the entries of F in ascending order, real [*stack, d]."""
        return jnp.sort(self.vector, axis=-1)

    def matmul(self, x: jax.Array, side: Side = "left") -> jax.Array:
        """Returns F x for x [*stack, d, k], or x F for x [*stack, k, d] with side "right"."""
        require_choice("Diagonal.matmul", "side", side, ("left", "right"))
        return jnp.expand_dims(self.vector, -1 if side == "left" else -2) * x

    def apply_along(
        self, x: jax.Array, axis: int, *, precision: jax.lax.PrecisionLike = FULL
    ) -> jax.Array:
        """Returns F applied to one axis of tensors x [*stack, d_1, d_2, …].

        Args:
          x: tensors whose leading axes are the stack's.
          axis: which of the axes after the stack's, from 0; negative ones count from the last.
          precision: of the products of a dense factor.
        """
        del precision  # nothing is summed
        place, stack = _place("Diagonal.apply_along", x, axis, self), len(self.stack)
        shape = [self.size if i == place else 1 for i in range(stack, x.ndim)]
        return x * self.vector.reshape(*self.stack, *shape)

    def compose(self, other: "Dense | Diagonal") -> "Dense | Diagonal":
        """Returns the product F H with another factor H of the axis."""
        if isinstance(other, Dense):
            return Dense(self.matmul(other.matrix))
        return Diagonal(self.vector * other.vector)

    def adjoint(self) -> "Diagonal":
        """Returns Fᴴ, which is F."""
        return self

    def inverse(self, damping: ArrayLike = 0.0) -> FactorInverse:
        """Returns (F + d I)⁻¹; a coordinate without curvature or damping is left out, with zero.

        Args:
          damping: d, a number or real [*stack].
        """
        damping = _per_diagonal("Diagonal.inverse", "damping", damping, self.vector)
        damped = self.vector + damping[..., None]
        inverse = jnp.where(damped > 0, 1 / jnp.where(damped > 0, damped, 1), 0)
        condition = jnp.max(damped, axis=-1) * jnp.max(inverse, axis=-1)
        return FactorInverse(Diagonal(inverse), damping, condition)

    def power(self, exponent: ArrayLike, damping: ArrayLike = 0.0) -> "Diagonal":
        """Returns (F + damping max F I)^exponent.

        Negative entries count as zero, and one that is zero after the damping stays zero.

        Args:
          exponent: a number or real [*stack].
          damping: in units of the largest entry, a number or real [*stack].
        """
        exponent = _per_diagonal("Diagonal.power", "exponent", exponent, self.vector)
        damping = _per_diagonal("Diagonal.power", "damping", damping, self.vector)
        values = jnp.maximum(self.vector, 0)
        damped = values + damping[..., None] * jnp.max(values, axis=-1, keepdims=True, initial=0)
        raised = jnp.where(damped > 0, damped, 1) ** exponent[..., None]
        return Diagonal(jnp.where(damped > 0, raised, 0))


Factor: TypeAlias = Dense | Diagonal
"""A factor of one axis."""


class SymmetricPair(NamedTuple):
    """A factor and its root or inverse, two Hermitian matrices in little more place than one.

    The factor has the lower triangle with its diagonal, the root what is above it.

    Attributes:
      packed: [*stack, d, d + 1].
    """

    packed: jax.Array

    @classmethod
    def zeros(
        cls, stack: Sequence[int], size: int, dtype: DTypeLike = jnp.float32
    ) -> "SymmetricPair":
        """Returns a stack of pairs of zero matrices."""
        return cls(jnp.zeros((*stack, size, size + 1), dtype))

    @property
    def size(self) -> int:
        """The width d of both matrices."""
        return self.packed.shape[-2]

    @property
    def stack(self) -> tuple[int, ...]:
        """The shape of the stack of pairs."""
        return self.packed.shape[:-2]

    @property
    def dtype(self) -> jnp.dtype:
        """The type of the entries."""
        return self.packed.dtype

    @property
    def factor(self) -> jax.Array:
        """The first matrix, [*stack, d, d]."""
        return _packed_first(self.packed)

    @property
    def root(self) -> jax.Array:
        """The second matrix, [*stack, d, d]: the root or the inverse of the first."""
        return _packed_second(self.packed)

    @property
    def lower(self) -> jax.Array:
        """An array [*stack, d, d] whose lower triangle is the factor's; what is above it is not.

        An average of it with another matrix is enough for `replace(factor=…)`, which reads no more.
        """
        return self.packed[..., :-1]

    def replace(
        self, *, factor: jax.Array | None = None, root: jax.Array | None = None
    ) -> "SymmetricPair":
        """Returns the pair with another factor, another root, or both.

        Args:
          factor: [*stack, d, d], of which the lower triangle is read; None keeps the old one.
          root: [*stack, d, d], of which the upper triangle is read; None keeps the old one.
        """
        packed = self.packed
        firsts = jnp.arange(self.size + 1) <= jnp.arange(self.size)[:, None]
        if factor is not None:
            packed = jnp.where(firsts, _widened(factor.astype(self.dtype), 0), packed)
        if root is not None:
            packed = jnp.where(firsts, packed, _widened(root.astype(self.dtype), 1))
        return SymmetricPair(packed)

    def astype(self, dtype: DTypeLike) -> "SymmetricPair":
        """Returns the pair in another type."""
        return SymmetricPair(self.packed.astype(dtype))


class DiagonalPair(NamedTuple):
    """A diagonal factor and its root or inverse, with the methods of `SymmetricPair`.

    Attributes:
      factor: [*stack, d].
      root: [*stack, d].
    """

    factor: jax.Array
    root: jax.Array

    @classmethod
    def zeros(
        cls, stack: Sequence[int], size: int, dtype: DTypeLike = jnp.float32
    ) -> "DiagonalPair":
        """Returns a stack of pairs of zero diagonals."""
        return cls(jnp.zeros((*stack, size), dtype), jnp.zeros((*stack, size), dtype))

    @property
    def size(self) -> int:
        """The number of entries d of both diagonals."""
        return self.factor.shape[-1]

    @property
    def stack(self) -> tuple[int, ...]:
        """The shape of the stack of pairs."""
        return self.factor.shape[:-1]

    @property
    def dtype(self) -> jnp.dtype:
        """The type of the entries."""
        return self.factor.dtype

    def replace(
        self, *, factor: jax.Array | None = None, root: jax.Array | None = None
    ) -> "DiagonalPair":
        """Returns the pair with another factor, another root, or both.

        Args:
          factor: [*stack, d]; None keeps the old one.
          root: [*stack, d]; None keeps the old one.
        """
        return DiagonalPair(
            self.factor if factor is None else factor.astype(self.dtype),
            self.root if root is None else root.astype(self.dtype),
        )

    def astype(self, dtype: DTypeLike) -> "DiagonalPair":
        """Returns the pair in another type."""
        return DiagonalPair(self.factor.astype(dtype), self.root.astype(dtype))


def _place(method: str, x: jax.Array, axis: int, factor: Factor) -> int:
    """The axis of `x` that `axis` names, whose size and stack must be the factor's."""
    stack, size = factor.stack, factor.size
    place = axis + (len(stack) if axis >= 0 else x.ndim)
    fits = len(stack) <= place < x.ndim and x.shape[place] == size
    if not fits or x.shape[: len(stack)] != stack:
        raise ValueError(
            f"{method}: a factor of {size} entries in a stack {stack} does not fit axis {axis} of "
            f"x of shape {x.shape}; expected [*{stack}, ...] with {size} entries on that axis."
        )
    return place


def _per_diagonal(method: str, name: str, value: ArrayLike, vector: jax.Array) -> jax.Array:
    """A number, or one for each diagonal, as an array of the stack's shape."""
    return per_matrix(method, name, value, vector[..., None])


@compiled_once
def _whole(triangle: jax.Array) -> jax.Array:
    """The Hermitian matrix of a lower triangle."""
    place = jnp.arange(triangle.shape[-1])
    return jnp.where(place <= place[:, None], triangle, triangle.mT.conj())


@compiled_once
def _packed_first(packed: jax.Array) -> jax.Array:
    return _whole(packed[..., :-1])


@compiled_once
def _packed_second(packed: jax.Array) -> jax.Array:
    return _whole(packed[..., 1:].mT.conj())


def _widened(matrix: jax.Array, before: int) -> jax.Array:
    """[*stack, d, d + 1] with a column of zeros before or after the matrix."""
    return jnp.pad(matrix, [*[(0, 0)] * (matrix.ndim - 1), (before, 1 - before)])


@functools.partial(compiled_once, static_argnums=(1, 2))
def _moment(x: jax.Array, axis: int, stack: int) -> jax.Array:
    axes, place = list(range(x.ndim)), axis + stack
    others = [x.ndim if i == place else i for i in axes]
    out = [*axes[:stack], place, x.ndim]
    return jnp.einsum(x, axes, x.conj(), others, out, precision=FULL)


@functools.partial(compiled_once, static_argnums=(1, 2))
def _diagonal_moment(x: jax.Array, axis: int, stack: int) -> jax.Array:
    others = tuple(i for i in range(stack, x.ndim) if i != axis + stack)
    return jnp.sum(jnp.square(jnp.abs(x)), axis=others)
