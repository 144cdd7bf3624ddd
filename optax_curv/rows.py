"""`LazyRows`: the Jacobian of a function, of which only products are ever computed."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_curv.linalg._compiler import full_matmul
from optax_curv.typing import Tree

# Numbers in the rows of one chunk, 64 MiB of float32, of which the kernel needs two at a time. Each
# row is made anew for every chunk that it meets, at the price of three passes of the function: with
# 16 rows a chunk a tenth of the product itself.
CHUNK = 2**24


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "batch"),
    meta_fields=("fn", "chunk_size"),
)
@dataclasses.dataclass(frozen=True)
class LazyRows:
    """Rows of a function's Jacobian that are never stored, made by `lazy_rows`.

    A pytree of the parameters and the batch. With N examples of O outputs there are K = N O rows.
    They are taken over *real coordinates*: of a complex leaf its real and its imaginary part, so
    that nothing need be holomorphic, and of complex outputs the derivatives of both parts.

    Attributes:
      fn: the function, `fn(params, *batch)` -> [N, ...].
      params: the parameters.
      batch: the arrays of the examples, with one leading axis N.
      chunk_size: examples differentiated at once; None: as many as make some 2²⁴ numbers.
    """

    fn: Callable[..., Any]
    params: Tree
    batch: tuple[Any, ...]
    chunk_size: int | None

    @property
    def outputs(self) -> jax.ShapeDtypeStruct:
        """The outputs of one example, [O]."""
        one = jax.eval_shape(lambda: jnp.ravel(self.fn(self.params, *self._example(0))))
        return jax.ShapeDtypeStruct(one.shape, one.dtype)

    @property
    def is_complex(self) -> bool:
        """Whether the rows are complex."""
        return jnp.issubdtype(self.outputs.dtype, jnp.complexfloating)

    @property
    def count(self) -> int:
        """K, the number of rows."""
        return self._examples * math.prod(self.outputs.shape)

    def apply(self, x: Tree) -> jax.Array:
        """J x, [K], for x like the parameters: the derivative of all outputs along x."""
        primals, tangents = real_parts(self.params), real_parts(x)
        tangents = jax.tree.map(lambda t, p: t.astype(p.dtype), tangents, primals)

        def of_chunk(chunk):
            outputs = functools.partial(self._of_chunk, chunk=chunk)
            return jax.jvp(outputs, (primals,), (tangents,))[1]

        parts = self._joined(jax.lax.map(of_chunk, self._chunks(self.batch)))
        return parts[0] + 1j * parts[1] if len(parts) == 2 else parts[0]

    def combine(self, y: jax.Array) -> Tree:
        """Re(Jᴴ y), like the parameters, for y [K]: one pull-back."""
        return complex_again(self._pulled(y), self.params)

    def gram(self, mean: Any = None) -> jax.Array:
        """J Jᵀ of the rows less their `mean`, [K, K]; of real and imaginary ones, [2K, 2K]."""
        chunks, parts, outputs = self._chunks(self.batch), self._parts, self._width
        count, size = _leading(chunks)
        side = size * parts * outputs

        def rows(i):
            found = self._rows(jax.tree.map(lambda x: x[i], chunks), mean)
            return [jnp.reshape(x, (side, -1)) for x in jax.tree.leaves(found)]

        def block(ours, others):
            products = [full_matmul(a, b.T) for a, b in zip(ours, others, strict=True)]
            return functools.reduce(jnp.add, products)

        def of_row(i):
            ours = rows(i)

            def fill(j, found):
                return found.at[j].set(block(ours, rows(j)))

            dtype = jnp.result_type(*ours)
            found = jax.lax.fori_loop(0, i, fill, jnp.zeros((count, side, side), dtype))
            return found.at[i].set(0.5 * block(ours, ours))

        if count == 1:
            ours = rows(0)
            kernel = block(ours, ours)[None, None]
        else:
            kernel = jax.lax.map(of_row, jnp.arange(count))
        kernel = kernel.reshape(count, count, size, parts, outputs, size, parts, outputs)
        kernel = kernel.transpose(3, 2, 0, 4, 6, 5, 1, 7)  # part, example of a chunk, chunk, output
        kernel = kernel.reshape(parts, size * count * outputs, parts, size * count * outputs)
        kept = self._examples * outputs
        kernel = kernel[:, :kept, :, :kept].reshape(parts * kept, parts * kept)
        return kernel if count == 1 else kernel + kernel.T

    def matrix(self, shares: jax.Array | None = None, mean: Any = None) -> jax.Array:
        """Σ_k s_k J_k J_kᵀ of the rows less their `mean` over real coordinates, [n, n]."""

        def add(total, given):
            chunk, share = given
            rows = jax.tree.leaves(self._rows(chunk, mean))
            joined = jnp.concatenate([x.reshape(*x.shape[:3], -1) for x in rows], -1)
            joined = joined * jnp.sqrt(share)[:, None, :, None]
            joined = joined.reshape(-1, joined.shape[-1])
            return total + full_matmul(joined.T, joined), None

        size = sum(x.size for x in jax.tree.leaves(real_parts(self.params)))
        dtype = jnp.result_type(*jax.tree.leaves(real_parts(self.params)))
        shares = jnp.ones(self.count, dtype) if shares is None else shares
        given = self._chunks(self.batch), self._chunks(shares.reshape(-1, self._width), zero=True)
        return jax.lax.scan(add, jnp.zeros((size, size), dtype), given)[0]

    def mean(self, weights: jax.Array) -> Any:
        """Σ_k w_k J_k of the real rows, and of the imaginary ones: what `gram` takes."""
        weights = weights.astype(self.outputs.dtype)
        found = [self._pulled(factor * weights) for factor in (1, 1j)[: self._parts]]
        return jax.tree.map(lambda *x: jnp.stack(x), *found)

    @property
    def _examples(self) -> int:
        return _leading(self.batch)[0]

    @property
    def _width(self) -> int:
        return math.prod(self.outputs.shape)

    @property
    def _parts(self) -> int:
        return 2 if self.is_complex else 1

    def _example(self, i: int) -> Any:
        return jax.tree.map(lambda x: x[i][None], self.batch)

    def _of_chunk(self, coordinates, chunk):
        """The real and imaginary parts of the outputs, [c, parts, O]."""
        params = complex_again(coordinates, self.params)

        def of_one(example):
            out = jnp.ravel(self.fn(params, *jax.tree.map(lambda x: x[None], example)))
            return jnp.stack([out.real, out.imag]) if jnp.iscomplexobj(out) else out[None]

        return jax.vmap(of_one)(chunk)

    def _rows(self, chunk, mean):
        """The rows of a chunk over real coordinates, a tree of [c, parts, O, *shape]."""
        coordinates = real_parts(self.params)

        def of_one(example):
            one = jax.tree.map(lambda x: x[None], example)
            out, pullback = jax.vjp(lambda p: self._of_chunk(p, one)[0], coordinates)
            basis = jnp.eye(out.size, dtype=out.dtype).reshape(-1, *out.shape)
            rows = jax.vmap(pullback)(basis)[0]
            return jax.tree.map(lambda x: x.reshape(*out.shape, *x.shape[1:]), rows)

        rows = jax.vmap(of_one)(chunk)
        return rows if mean is None else jax.tree.map(lambda x, m: x - m[:, None], rows, mean)

    def _pulled(self, y):
        """Re(Jᴴ y) over real coordinates."""
        coordinates = real_parts(self.params)
        y = jnp.stack([y.real, y.imag]) if self.is_complex else y[None]
        y = jnp.moveaxis(y.reshape(self._parts, self._examples, -1), 0, 1)

        def add(total, given):
            chunk, cotangent = given
            out, pullback = jax.vjp(functools.partial(self._of_chunk, chunk=chunk), coordinates)
            found = pullback(cotangent.astype(out.dtype))[0]
            return jax.tree.map(jnp.add, total, found), None

        given = self._chunks(self.batch), self._chunks(y, zero=True)
        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, coordinates), given)[0]

    def _chunks(self, tree, zero=False):
        # [N, ...] -> [chunks, c, ...]: every chunk has examples of all devices that share them. The
        # last example, or zero, fills what N lacks.
        examples, size = self._examples, self._size
        count = -(-examples // size)
        lacking = count * size - examples

        def split(x):
            if lacking:
                last = jnp.zeros_like(x[-1:]) if zero else x[-1:]
                x = jnp.concatenate([x, jnp.repeat(last, lacking, axis=0)])
            return jnp.swapaxes(x.reshape(size, count, *x.shape[1:]), 0, 1)

        return jax.tree.map(split, tree)

    def _joined(self, parts):
        """[chunks, c, parts, O] -> [parts, K]."""
        parts = parts.transpose(2, 1, 0, 3)
        return parts.reshape(len(parts), -1, self._width)[:, : self._examples].reshape(
            len(parts), -1
        )

    @property
    def _size(self) -> int:
        """Examples in a chunk."""
        if self.chunk_size is not None:
            return min(self.chunk_size, self._examples)
        numbers = sum(x.size for x in jax.tree.leaves(real_parts(self.params)))
        most = max(1, CHUNK // max(1, numbers * self._width * self._parts))
        return self._examples if self._examples <= most else 2 ** (most.bit_length() - 1)


def _leading(tree: Any) -> tuple[int, ...]:
    return jax.tree.leaves(tree)[0].shape[:2]


def real_parts(tree: Any) -> list[Any]:
    """The leaves of a tree; a complex one becomes the pair of its real and imaginary part."""
    return [(x.real, x.imag) if jnp.iscomplexobj(x) else x for x in jax.tree.leaves(tree)]


def complex_again(parts: list[Any], like: Any) -> Any:
    """The tree like `like` whose complex leaves are given by pairs of real and imaginary parts."""
    leaves = [x[0] + 1j * x[1] if isinstance(x, tuple) else x for x in parts]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
