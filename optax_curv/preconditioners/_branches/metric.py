"""The metric AᴴA of rows A, whose centred and scaled form is never stored."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from optax_curv.curvature import SplitRows
from optax_curv.linalg._compiler import FULL, full_matmul, gram, whole_gram
from optax_curv.preconditioners._stacks.owners import Owners
from optax_curv.rows import LazyRows, complex_again, real_parts

# Numbers in a chunk of rows that is centred and copied for a product, 4 MiB of float32.
CHUNK = 2**20


def is_split(x: Any) -> bool:
    """Whether rows of a complex leaf are kept by its real and imaginary parts."""
    return isinstance(x, SplitRows)


def has_split(rows: Any) -> bool:
    """Whether any rows of the tree are kept by real and imaginary parts."""
    return any(map(is_split, jax.tree.leaves(rows, is_leaf=is_split)))


@dataclasses.dataclass(frozen=True)
class StoredRows:
    """Rows that are stored as they were given, with the products that a metric needs of them.

    A complex row counts as the two real ones of its real and its imaginary part. Only where all
    leaves are complex and all rows those of a holomorphic function (`hermitian`) do they stay what
    they are: the metric over real coordinates is then AᴴA itself.

    Attributes:
      entries: by leaf the rows [K, *shape], or `SplitRows` of a complex leaf.
      like: the leaves of the gradient.
      treedef: their structure.
      owners: the devices over which the rows are divided, if they are.
    """

    entries: list[Any]
    like: list[jax.Array]
    treedef: Any
    owners: Owners | None = None

    @property
    def hermitian(self) -> bool:
        """Whether the metric is complex."""
        return all(map(jnp.iscomplexobj, self.like)) and not any(map(is_split, self.entries))

    @property
    def is_complex(self) -> bool:
        """Whether rows are complex, as those of a holomorphic function always are."""
        return any(holomorphic or jnp.iscomplexobj(a) for a, holomorphic in self._arrays)

    @property
    def count(self) -> int:
        """K, the number of rows."""
        return len(self._arrays[0][0])

    def apply(self, x: Any) -> jax.Array:
        """A x, [K], for a tree x of [*shape]."""

        def product(entry, v):
            if is_split(entry):
                return _times(entry.real, v.real) + _times(entry.imag, v.imag)
            return _times(entry, v)

        products = map(product, self.entries, self.treedef.flatten_up_to(x))
        return functools.reduce(jnp.add, products)

    def combine(self, y: jax.Array) -> Any:
        """Aᴴ y, a tree of [*shape], for y [K]; of real coordinates its real part."""

        def product(entry, leaf):
            if is_split(entry):
                return _adjoint(entry.real, y).real + 1j * _adjoint(entry.imag, y).real
            found = _adjoint(entry, y)
            return found if jnp.iscomplexobj(leaf) else found.real

        return self.treedef.unflatten(list(map(product, self.entries, self.like)))

    def mean(self, weights: jax.Array) -> list[jax.Array]:
        """Σ_k w_k A_k, one [1, size] for each array of the rows."""
        return [full_matmul(weights[None].astype(a.dtype), a) for a, _ in self._matrices]

    def gram(self, mean: list[jax.Array] | None = None) -> jax.Array:
        """AAᴴ of the rows less their mean, [K, K]; of real and imaginary ones, [2K, 2K]."""
        count, kernels = self.count, []
        for i, (a, holomorphic) in enumerate(self._matrices):
            if self.owners is not None:
                # Each device has some columns of all rows, and what it sums over these is K × K.
                columns = self.owners.turned(a if mean is None else a - mean[i])
                kernels.append(whole_gram(self._expanded(columns, holomorphic)))
                continue
            if mean is None and (not self.is_complex or self.hermitian):
                kernels.append(gram(a))
                continue
            center = jnp.zeros((1, a.shape[1]), a.dtype) if mean is None else mean[i]

            def of_columns(start, width, a=a, center=center, holomorphic=holomorphic):
                columns = jax.lax.dynamic_slice_in_dim(a, start, width, 1)
                columns -= jax.lax.dynamic_slice_in_dim(center, start, width, 1)
                return gram(self._expanded(columns, holomorphic))

            kernels.append(_summed(of_columns, a.shape[1], max(1, CHUNK // count)))
        return functools.reduce(jnp.add, kernels)

    def matrix(
        self, shares: jax.Array | None = None, mean: list[jax.Array] | None = None
    ) -> jax.Array:
        """Σ_k s_k A_kᴴ A_k of the rows less their mean, [n, n], for shares s [K]."""
        size = sum(a.shape[1] for a, _ in self._matrices)
        width = max(1, CHUNK // size) if self.owners is None else self.count

        def of_rows(start, length):
            joined = []
            for i, (a, holomorphic) in enumerate(self._matrices):
                rows = jax.lax.dynamic_slice_in_dim(a, start, length)
                rows = rows if mean is None else rows - mean[i]
                if shares is not None:
                    share = jax.lax.dynamic_slice_in_dim(shares, start, length)
                    rows *= jnp.sqrt(share)[:, None]
                joined.append(self._expanded(rows, holomorphic))
            return gram(jnp.concatenate(joined, 1).conj().T)

        return _summed(of_rows, self.count, width)

    @property
    def _arrays(self) -> list[tuple[jax.Array, bool]]:
        """The arrays of the rows, and whether each stands for both parts of a complex leaf."""
        found = []
        for entry, leaf in zip(self.entries, self.like, strict=True):
            both = jnp.iscomplexobj(leaf) and not self.hermitian
            found += (
                [(entry.real, False), (entry.imag, False)] if is_split(entry) else [(entry, both)]
            )
        return found

    @property
    def _matrices(self) -> list[tuple[jax.Array, bool]]:
        return [(a.reshape(len(a), -1), both) for a, both in self._arrays]

    def _expanded(self, a: jax.Array, holomorphic: bool) -> jax.Array:
        """Rows [k, ·] as they count: real and imaginary ones, over real coordinates."""
        if self.hermitian or not self.is_complex:
            return a
        if not holomorphic:
            return jnp.concatenate([a.real, a.imag])
        return jnp.block([[a.real, -a.imag], [a.imag, a.real]])


@dataclasses.dataclass(frozen=True)
class Metric:
    """The metric AᴴA of rows A = s √D (I - 1 wᵀ) O, with O the rows as they are stored or made.

    Attributes:
      rows: O.
      centered: whether the mean is removed.
      shares: w [K], which sum to one, also the diagonal of D; None: all alike, and D is I.
      scale: s.
    """

    rows: StoredRows | LazyRows
    centered: bool = False
    shares: jax.Array | None = None
    scale: Any = 1.0

    def apply(self, x: Any) -> jax.Array:
        """A x, [K], for a tree x of [*shape]."""
        y = self.rows.apply(x)
        if self.centered:
            y = y - jnp.sum(self._weights.astype(y.dtype) * y)
        return self._scaled(y)

    def combine(self, y: jax.Array) -> Any:
        """Aᴴ y, a tree of [*shape], for y [K]."""
        y = self._scaled(y)
        if self.centered:
            y = y - self._weights.astype(y.dtype) * jnp.sum(y)
        return self.rows.combine(y)

    def product(self, x: Any) -> Any:
        """AᴴA x."""
        return self.combine(self.apply(x))

    def kernel(self) -> jax.Array:
        """AAᴴ, [K, K], or over real and imaginary rows [2K, 2K]."""
        found = self.rows.gram(self._mean())
        if self.shares is None:
            return self.scale**2 * found
        root = self.scale * jnp.sqrt(self.shares)
        root = jnp.tile(root, len(found) // len(root))
        return root[:, None] * found * root

    def matrix(self) -> jax.Array:
        """AᴴA, [n, n] over the coordinates of `flat`."""
        return self.scale**2 * self.rows.matrix(self.shares, self._mean())

    def flat(self, x: Any) -> tuple[jax.Array, Callable[[jax.Array], Any]]:
        """The coordinates [n] of a tree, real ones unless the metric is complex; and back."""
        if isinstance(self.rows, StoredRows) and self.rows.hermitian:
            return ravel_pytree(x)
        vector, unravel = ravel_pytree(real_parts(x))
        return vector, lambda v: complex_again(unravel(v), x)

    def in_kernel(self, solve: Callable[[jax.Array], jax.Array], y: jax.Array) -> jax.Array:
        """Applies a map of vectors that the kernel acts on to y [K]."""
        if not self.rows.is_complex or (isinstance(self.rows, StoredRows) and self.rows.hermitian):
            return solve(y)
        real, imag = jnp.split(solve(jnp.concatenate([y.real, y.imag])), 2)
        return real + 1j * imag

    def _scaled(self, y: jax.Array) -> jax.Array:
        return self.scale * (y if self.shares is None else jnp.sqrt(self.shares) * y)

    def _mean(self) -> Any:
        return self.rows.mean(self._weights) if self.centered else None

    @property
    def _weights(self) -> jax.Array:
        """The shares w [K], also where all are alike."""
        # A mean that is a sum over K would be divided, and so rounded, anew wherever XLA uses it:
        # what is centred twice would have a mean as large as the rounding of the first one.
        if self.shares is not None:
            return self.shares
        count = self.rows.count
        return jnp.full([count], 1 / count, jnp.result_type(self.scale))


def metric_of(
    rows: StoredRows | LazyRows, centered: bool, ddof: int, weights: Any, dtype: Any
) -> Metric:
    """The covariance of rows: centred, divided by max(1, K - ddof), otherwise by K.

    With weights v the rows have the shares w = v / Σv, and what takes the place of K / (K - ddof)
    is 1 / (1 - ddof Σ w²): a row of weight zero is as if it were not there, and equal weights are
    as none.
    """
    if weights is None:
        divisor = max(1, rows.count - ddof) if centered else rows.count
        return Metric(rows, centered, None, 1 / jnp.sqrt(jnp.asarray(divisor, dtype)))
    shares = jnp.asarray(weights, dtype)
    shares /= jnp.sum(shares)
    rest = 1 - (ddof if centered else 0) * jnp.sum(jnp.square(shares))
    # One row is its own mean: nothing is left to be divided.
    rest = jnp.where(rest > 100 * jnp.finfo(dtype).eps, rest, 1)
    return Metric(rows, centered, shares, 1 / jnp.sqrt(rest))


def _summed(function: Callable[[Any, int], jax.Array], size: int, width: int) -> jax.Array:
    """Σ function(start, length) over pieces of a range, of which only the last may be shorter."""
    width = min(width, size)
    count, rest = divmod(size, width)
    total = function(0, width)
    if count > 1:
        total = jax.lax.fori_loop(
            1, count, lambda i, found: found + function(i * width, width), total
        )
    return total if not rest else total + function(size - rest, rest)


def _times(a: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tensordot(a, x, x.ndim, precision=FULL)


def _adjoint(a: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.tensordot(y, a.conj(), 1, precision=FULL)
