"""Second moments of stacks of tensors along each of their axes."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_curv.linalg import kron_matvec
from optax_curv.linalg._checks import widen
from optax_curv.linalg._compiler import FULL, compiled_once, full_matmul
from optax_curv.preconditioners._stacks.blocks import factor_structs
from optax_curv.preconditioners._transformation.leaves import norm_of

SHARED_BEYOND = 10.0  # and below a tenth: sizes of whitened gradients that are no noise


class Axes(NamedTuple):
    """A stack of tensors [N, *shape], seen as something with a factor on every axis.

    Attributes:
      struct: shape and dtype of the stack.
      diagonal: whether each axis of a tensor has a diagonal factor.
      factor_dtype: in which its dense factors are kept.
    """

    struct: jax.ShapeDtypeStruct
    diagonal: tuple[bool, ...]
    factor_dtype: Any

    @property
    def factors(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of the factors, [N, d, d] or the diagonal [N, d]."""
        return factor_structs(self.struct, self.diagonal, self.factor_dtype)


def diagonal_axes(shape: tuple[int, ...], max_dim: Any) -> tuple[bool, ...]:
    """Which axes of a tensor have diagonal factors: those of length 1 or above `max_dim`."""
    return tuple(bool(d == 1 or d > max_dim) for d in shape)


def axes_of(
    structs: Mapping[str, jax.ShapeDtypeStruct | jax.Array], max_dim: Any, factor_dtype: Any
) -> dict[str, Axes]:
    """An axis is dense unless its length is 1 or above `max_dim`.

    Factors are kept in `factor_dtype` for real tensors up to float32, and in the tensors' own
    precision for all others.
    """

    def kept(dtype):
        short = dtype == jnp.float32
        return jnp.dtype(factor_dtype if short else jnp.promote_types(dtype, factor_dtype))

    return {
        name: Axes(
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            diagonal_axes(x.shape[1:], max_dim),
            kept(x.dtype),
        )
        for name, x in structs.items()
    }


def identities(axes: Axes) -> tuple[jax.Array, ...]:
    """A basis to begin with for every axis: identities, or ones where the factor is diagonal."""

    def start(struct, diagonal):
        one = jnp.ones([], struct.dtype)
        eye = one if diagonal else jnp.eye(struct.shape[-1], dtype=struct.dtype)
        return jnp.broadcast_to(eye, struct.shape)

    return tuple(map(start, axes.factors, axes.diagonal))


@compiled_once
def square_norms(x: jax.Array) -> jax.Array:
    """The sum of squares of every tensor of a stack [N, ...], [N]."""
    return jnp.sum(jnp.square(jnp.abs(widen(x))), axis=tuple(range(1, jnp.ndim(x))))


@functools.partial(compiled_once, static_argnums=(1, 2))
def axis_moment(x: jax.Array, axis: int, diagonal: bool) -> jax.Array:
    """The mode moments X₍ᵢ₎X₍ᵢ₎ᴴ of a stack [N, ...], [N, d, d], or their diagonals [N, d]."""
    axes = list(range(x.ndim))
    own = axis + 1
    if diagonal:
        return jnp.sum(jnp.square(jnp.abs(x)), axis=tuple(i for i in axes[1:] if i != own))
    others = [x.ndim if i == own else i for i in axes]
    return jnp.einsum(x, axes, x.conj(), others, [0, own, x.ndim], precision=FULL)


def whitened_moments(
    x: jax.Array, roots: Sequence[jax.Array], diagonal: Sequence[bool]
) -> tuple[jax.Array, ...]:
    """The mean mode moments of x, for each axis multiplied by the roots of all other axes.

    Multiplied by all k roots, x has a root mean square ω near one. Where it is not, for the first
    gradients and those of another size, each of the moments would answer for the whole of it, and
    their product overshoot to the power k; x to the power 1/k of that lets them share it.
    """
    whitened = kron_matvec(roots, x)
    own = tuple(range(1, x.ndim))
    size = max(1, math.prod(x.shape[1:]))
    omega = jnp.expand_dims(jax.vmap(norm_of)(whitened), own) / math.sqrt(size)
    beyond = omega / jnp.clip(omega, 1 / SHARED_BEYOND, SHARED_BEYOND)
    x = x * jnp.where(omega > 0, beyond, 1) ** (1 / len(own) - 1)

    def of_axis(axis):
        others = list(roots)
        others[axis] = jnp.ones(x.shape[:1] + x.shape[axis + 1 : axis + 2], omega.dtype)
        rest = size // x.shape[axis + 1]
        return axis_moment(kron_matvec(others, x), axis, diagonal[axis]) / rest

    return tuple(map(of_axis, range(len(own))))


def apply_roots(roots: Sequence[jax.Array], x: jax.Array) -> jax.Array:
    """⊗R · x for a stack of tensors [N, ...] and Hermitian or diagonal roots, one for every axis.

    For matrices L x Rᵀ = L x conj(R), in which no operand of a batched product is transposed: on
    CPU, JAX 0.10 takes 9.3 ms and not 10 ms for 24 matrices of 256 × 256.
    """
    if x.ndim != 3:
        return kron_matvec(roots, x)
    left, right = roots
    x = full_matmul(left, x) if left.ndim == 3 else left[..., None] * x
    return full_matmul(x, right.conj()) if right.ndim == 3 else x * right[:, None]


def root_or_identity(root: jax.Array, diagonal: bool) -> jax.Array:
    """The root to whiten by, and the identity before there is one."""
    sizes = jnp.sum(jnp.abs(root), axis=tuple(range(1, root.ndim)), keepdims=True)
    eye = jnp.ones([], root.dtype) if diagonal else jnp.eye(root.shape[-1], dtype=root.dtype)
    return jnp.where((sizes > 0) & jnp.isfinite(sizes), root, eye)


def diagonal_power(
    values: jax.Array, exponent: Any, damping: Any, drop_below: Any = None
) -> jax.Array:
    """(v + damping max v)^(-exponent) of non-negative numbers [N, d], zero where all are zero.

    It is zero, too, where v is below the share `drop_below` of the largest one.
    """
    largest = jnp.max(values, axis=-1, keepdims=True)
    damped = values + damping * largest
    root = jnp.where(damped > 0, jnp.where(damped > 0, damped, 1) ** -exponent, 0)
    return root if drop_below is None else jnp.where(values < drop_below * largest, 0, root)


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """`x` with values that `dtype` can hold."""
    limits = jnp.finfo(dtype)
    if x.dtype == dtype:
        return x
    return jax.lax.reduce_precision(x, limits.nexp, limits.nmant)
