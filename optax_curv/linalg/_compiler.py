"""Hints to XLA, each a function named after what it is for.

Each docstring says what XLA does without the hint, what that cost when it was measured, the release
on which it was seen, and when the hint may go; `tests/linalg/test_compiler.py` has a test for each
that fails as soon as a release of XLA no longer needs it. Times are of two CPU cores. No hint
changes a value.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.typing import ArrayLike

try:
    from jax.experimental.shard_alike import shard_alike as _shard_alike
except ImportError:  # JAX 0.12
    _shard_alike = None

FULL = jax.lax.Precision.HIGHEST
HALVED_FROM = 1024  # smaller products by halves cost more than they save


def compiled_once(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Makes `function` one function of the program, however often it is called with equal shapes.

    Without it JAX traces the operations of every call anew: 300 calls of `slice_of_stack` take 0.13
    s to trace and lower with it and 0.7 s without (JAX 0.10.2). XLA still inlines the calls, so
    that it costs nothing at run time. It may go from a function that is called once a program.

    Args:
      function: a function of arrays.
      **options: those of `jax.jit`, `static_argnames` above all.
    """
    return jax.jit(function, **options)


def per_platform(*arrays: Any, cpu: Callable[..., Any], other: Callable[..., Any]) -> Any:
    """Returns `cpu(*arrays)` where the program runs on a CPU, and `other(*arrays)` elsewhere.

    The choice falls when the program is lowered, so that it is right under
    `jax.default_device(cpu)` on a machine with an accelerator and in `jax.export`, where
    `jax.default_backend()` is not. Both functions are traced, which takes about 0.5 ms a call (JAX
    0.10.2): call it from within `compiled_once` where it is called often.
    """
    return jax.lax.platform_dependent(*arrays, cpu=cpu, default=other)


def _as_it_is(x: Any) -> Any:
    return x


@compiled_once
def materialize(x: Any) -> Any:
    """Makes XLA on CPU store an array, or all arrays of a tree, in their own order before any use.

    XLA on CPU computes anew, in every kernel, what several kernels use, and folds a transposition
    into the matrix product that follows. Its fast product of a batch takes no transposed operand:
    X Xᵀ of transposed [4, 256, 256] takes 2.3 ms folded and 1.7 ms stored; products of two matrices
    gain nothing (JAX 0.10.2). It costs one pass over `x` where that was stored already. Elsewhere
    it does nothing. It may go when the folded product is as fast.
    """
    return per_platform(x, cpu=jax.lax.optimization_barrier, other=_as_it_is)


def slice_of_stack(x: jax.Array, start: int, stack: Sequence[int]) -> jax.Array:
    """Returns entries `start`, `start + 1`, … of `x` [n, ...] as an array [*stack, ...].

    With a constant start XLA on CPU compiles what uses the slice anew for every start: 300 slices
    of [300, 8, 8], each followed by a sine, take 7.6 s to compile as `x[i]` and 0.3 s so, and 2.2
    ms and 1.2 ms to run (JAX 0.10.2). Here the start is a value of the running program: XLA folds
    constants that are scalars, all alike or evenly spaced into what uses them, so the start is the
    first of three numbers that are none of these, behind a barrier. Elsewhere XLA sees a constant
    and makes a plain slice of it. It may go when equal kernels are compiled once.
    """
    places = np.array([start, start + 2, start + 1], np.uint32)
    return _slice_at(x, places, stack=tuple(stack))


@functools.partial(compiled_once, static_argnames="stack")
def _slice_at(x: jax.Array, places: jax.Array, stack: tuple[int, ...]) -> jax.Array:
    places = per_platform(places, cpu=jax.lax.optimization_barrier, other=_as_it_is)
    found = jax.lax.dynamic_slice_in_dim(x, places[0], math.prod(stack))
    return found.reshape(*stack, *x.shape[1:])


@compiled_once
def not_recomputed(flag: jax.Array) -> jax.Array:
    """Returns the bool [] `flag` from behind a conditional, so that XLA on CPU derives it once.

    XLA on CPU fuses a reduction to one number into every kernel that uses it. Where one flag, that
    a hundred [64, 64] gradients are finite, decides over a hundred updates, each of these derives
    the whole flag: a program of 2.4 MB that takes 1.7 s to compile, where with the conditional
    0.4 MB take 0.8 s (JAX 0.10.2). An `optimization_barrier` alone changes nothing. Elsewhere it
    does nothing: a conditional would wait there for the flag to reach the host. It may go when
    reductions are not duplicated.
    """

    def on_cpu(flag):
        zero = jax.lax.optimization_barrier(jnp.zeros([], jnp.int32))
        zero = jnp.where(flag, zero, zero)  # of the flag's type also within a shard_map
        return jax.lax.cond(flag, lambda n: n, lambda n: n + 1, zero) == 0

    return per_platform(flag, cpu=on_cpu, other=_as_it_is)


def apart(function: Callable[..., Any], *arrays: Any) -> Any:
    """Returns `function(*arrays)`, on CPU from a computation of its own, behind a conditional.

    A loop that writes where it has read does so in place only where all that is read of a part is
    read before it is written. XLA on CPU fuses the reading of the part into every kernel that uses
    it, finds no order among these, and copies the whole array twice in every pass: 151 MB for two
    factors of width 3072 (JAX 0.10.2). A conditional takes a part that has been read. Elsewhere it
    does nothing: a conditional would wait there for its flag to reach the host. It may go when
    loops cut out what they use once.
    """

    def on_cpu(*arrays):
        def nothing(*arrays):
            zero = 0 * jnp.ravel(jax.tree.leaves(arrays)[0])[0].real
            shapes = jax.eval_shape(function, *arrays)
            return jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype) + zero.astype(x.dtype), shapes
            )

        always = jax.lax.optimization_barrier(jnp.zeros([], jnp.int32)) == 0
        return jax.lax.cond(always, function, nothing, *arrays)

    return per_platform(*arrays, cpu=on_cpu, other=function)


def is_within_shard_map() -> bool:
    """Whether what is traced now is a part of what one device does within a `jax.shard_map`."""
    return AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types


def equally_varying(tree: Any) -> Any:
    """The arrays of a tree, all varying over the same axes of a `jax.shard_map`.

    Branches and loops want that of what they carry, and constants vary over none. Elsewhere it does
    nothing, and within a `shard_map` nothing is left of it in the program.
    """
    if not is_within_shard_map():
        return tree
    arrays = [x for x in jax.tree.leaves(tree) if _is_number(x)]
    if not arrays:
        return tree
    # A choice between equals varies as all that it depends on; the names of JAX's own casts change
    # with its versions.
    nothing = [jnp.any(jnp.ravel(x)[:0] != 0) for x in arrays]
    any_of_all = functools.reduce(jnp.logical_or, nothing)
    return jax.tree.map(lambda x: jnp.where(any_of_all, x, x) if _is_number(x) else x, tree)


def _is_number(x: Any) -> bool:
    dtype = getattr(x, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, np.generic)


@compiled_once
def full_matmul(a: ArrayLike, b: ArrayLike) -> jax.Array:
    """Multiplies matrices [..., n, k] and [..., k, m] in the full precision of their type.

    Without the hint TPUs multiply float32 in passes of bfloat16 and GPUs in TF32, with 8 and 10
    bits of the 23: too few for products whose inverse or root is taken. On CPU it does nothing.
    """
    return jnp.matmul(a, b, precision=FULL)


def gram(x: jax.Array) -> jax.Array:
    """X Xᴴ of a matrix at full precision, on CPU by halves of its rows where it is large.

    Of the four products of halves one is another's adjoint and is not computed, which XLA on CPU
    does not see by itself: [1500, 3000] in float64 takes 0.46 s so and 0.62 s whole (JAX 0.10.2).
    It may go when a product with one's own adjoint is a symmetric one.
    """
    x = materialize(x)
    if min(x.shape) < HALVED_FROM:
        return whole_gram(x)
    return per_platform(x, cpu=_gram_by_halves, other=whole_gram)


def whole_gram(x: jax.Array) -> jax.Array:
    """X Xᴴ of a matrix at full precision, by one product."""
    return full_matmul(x, x.conj().T)


def _gram_by_halves(x):
    upper, lower = jnp.split(x, [len(x) // 2])
    corner = full_matmul(upper, lower.conj().T)
    return jnp.block([[whole_gram(upper), corner], [corner.conj().T, whole_gram(lower)]])


def sharded_alike(like: jax.Array, x: jax.Array) -> jax.Array:
    """Makes XLA shard x as it shards `like`, of its shape: how is not known while tracing.

    Without it XLA leaves an update where it was made, so that it does not lie where its gradient
    does. It is `jax.experimental.shard_alike` where JAX has that; 0.12 has nothing in its place,
    and there it is the operation of Shardy that this stood for. It may go with a public function.
    """
    if _shard_alike is None:
        return _in_one_group(like, x)
    found: Any = _shard_alike(like, x)
    return found[1]


_groups = itertools.count()


@jax.custom_jvp
def _in_one_group(like: jax.Array, x: jax.Array) -> jax.Array:
    # A value that was constrained keeps that sharding (JAX 0.12.0.1); this is another one.
    return _primitive().bind(like, jax.lax.optimization_barrier(x))


@_in_one_group.defjvp
def _tangent_in_one_group(primals: Any, tangents: Any) -> Any:
    return _in_one_group(*primals), tangents[1]


def _lowered(context: Any, like: Any, x: Any) -> list[Any]:
    from jaxlib.mlir.dialects import sdy

    del context
    group = next(_groups)
    for value in (like, x):
        sdy.sharding_group(value, group)
    return [x]


def _batched(arrays: Any, axes: Any) -> tuple[jax.Array, int]:
    size = next(x.shape[i] for x, i in zip(arrays, axes, strict=True) if i is not None)
    front = (
        jnp.broadcast_to(x, (size, *x.shape)) if i is None else jnp.moveaxis(x, i, 0)
        for x, i in zip(arrays, axes, strict=True)
    )
    return _in_one_group(*front), 0


@functools.cache
def _primitive() -> Any:
    # `jax.extend.core` brings all of Pallas with it, so that only who needs it imports it.
    from jax.extend.core import Primitive
    from jax.interpreters import batching, mlir

    made = Primitive("sharded_alike")
    made.def_abstract_eval(lambda like, x: x)
    made.def_impl(jax.jit(made.bind))
    mlir.register_lowering(made, _lowered)
    batching.primitive_batchers[made] = _batched
    return made
