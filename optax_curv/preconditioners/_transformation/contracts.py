"""The contracts of every transformation: numbers, keys, matching trees, and never a poisoned state."""

import inspect
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def value_at(value, count, dtype=jnp.float32) -> jax.Array:
    """A number, array, tracer or schedule at step `count`, in `dtype` (float32 at least)."""
    dtype = jnp.promote_types(jnp.float32, dtype)
    return jnp.asarray(value(count) if callable(value) else value, dtype)


def static(number) -> Any:
    """A default that decides shapes, as a NumPy scalar: `optax.inject_hyperparams` traces every Python number."""
    return np.int32(number) if isinstance(number, int) else np.float32(number)


def require_numbers(method: str, *, above=None, at_least=None, at_most=None, **numbers):
    """Refuses Python numbers outside a range; arrays, tracers and schedules pass unseen."""
    limits = (above, ">", operator.gt), (at_least, ">=", operator.ge), (at_most, "<=", operator.le)
    for name, value in numbers.items():
        for limit, sign, holds in limits if isinstance(value, int | float) else ():
            if limit is not None and not holds(value, limit):
                raise ValueError(f"{method}: expected {name} {sign} {limit}, got {name}={value!r}.")


def handed_on(function, given):
    """`function` of those of the `given` arguments that it takes: a method of its alias's."""
    return function(**{name: given[name] for name in inspect.signature(function).parameters})


def is_python_number(x, value) -> bool:
    """Whether x is this number, known while tracing."""
    return isinstance(x, int | float | np.number) and bool(x == value)


def structural(method: str, name: str, value):
    """A number that decides shapes; a tracer cannot."""
    if isinstance(value, Tracer):
        raise ValueError(
            f"{method}: {name} decides the shapes of the state and must be a Python number, got a traced {value}; "
            f"with optax.inject_hyperparams pass static_args=({name!r},)."
        )
    return value


def require_choice(method: str, name: str, value, choices):
    """Refuses a string that is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"{method}: unknown {name}={value!r}; expected one of {tuple(choices)}.")


def require_params(method: str, params):
    """Refuses missing parameters in Optax's own words."""
    if params is None:
        raise ValueError(
            f"{method}: You are using a transformation that requires the current value of parameters, but you are not "
            "passing `params` when calling `update`."
        )


def require_same_leaves(method: str, what: str, tree, reference_name: str, reference):
    """Refuses a tree whose structure or leaf shapes differ from the reference's."""
    got, expected = jax.tree.structure(tree), jax.tree.structure(reference)
    if got != expected:
        raise ValueError(
            f"{method}: the tree of {what} differs from that of {reference_name}: {got=}, {expected=}."
        )
    for (path, leaf), other in zip(
        jax.tree.leaves_with_path(tree), jax.tree.leaves(reference), strict=True
    ):
        if jnp.shape(leaf) != jnp.shape(other):
            raise ValueError(
                f"{method}: {what} and {reference_name} differ in shape at {jax.tree_util.keystr(path) or 'the root'}: "
                f"got {jnp.shape(leaf)}, expected {jnp.shape(other)}."
            )


def require_float_leaves(method: str, params, *, complex_leaves: bool = False):
    """Refuses integer leaves, and complex ones unless `complex_leaves`, by name."""
    kind = jnp.inexact if complex_leaves else jnp.floating
    for path, leaf in jax.tree.leaves_with_path(params):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, kind):
            raise ValueError(
                f"{method}: the leaf {jax.tree_util.keystr(path) or 'at the root'} has dtype {dtype}, expected a "
                f"floating-point leaf{' (real or complex)' if complex_leaves else ''}; leave it out with optax.masked "
                "or optax.partition."
            )


def tuples_at_leaves(tree, like):
    """A tree that has tuples in the place of the leaves of `like`, out of one that `nnx.Optimizer` has kept.

    In there a tuple has become the mapping of its positions. A tree that does not fit `like` is
    returned as it is, for the caller to refuse.
    """

    def tuples(x):
        return tuple(tuples(x[position]) for position in sorted(x)) if isinstance(x, Mapping) else x

    treedef = jax.tree.structure(like)
    try:
        return treedef.unflatten(map(tuples, treedef.flatten_up_to(tree)))
    except ValueError:
        return tree


def wide_zeros(tree):
    """Zeros like the leaves of a tree, in float32 at least."""
    return jax.tree.map(
        lambda x: jnp.zeros_like(x, jnp.promote_types(jnp.float32, jnp.result_type(x))), tree
    )


def raw_key(key) -> jax.Array:
    """An int, int array, typed or raw PRNG key as raw key data (uint32), which any checkpoint can hold."""
    if not jnp.issubdtype(jnp.result_type(key), jax.dtypes.prng_key):
        if jnp.ndim(key):
            return jnp.array(key, jnp.uint32)
        key = jax.random.key(jnp.asarray(key).astype(jnp.uint32))
    return jax.random.key_data(key)


def is_finite(*trees: Any) -> jax.Array:
    """Whether every inexact entry of the trees is finite: bool []."""
    return _are_finite(
        jnp.sum(0 * x) for x in _inexact_leaves(trees)
    )  # 0 · ∞ is NaN, and a sum is one kernel


def is_squarable(*trees: Any) -> jax.Array:
    """Whether the sum of the squares of every inexact leaf is finite, in float32 at least: bool [].

    No running average of second moments would forget larger numbers.
    """

    def squares(x):
        magnitude = jnp.abs(x).astype(jnp.promote_types(jnp.float32, jnp.finfo(x.dtype).dtype))
        return jnp.sum(jnp.square(magnitude))

    return _are_finite(map(squares, _inexact_leaves(trees)))


def _inexact_leaves(trees):
    return [x for x in jax.tree.leaves(trees) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]


def _are_finite(sums):
    """Whether all are. XLA fuses no dot product into the kernels that ask, but it would repeat `jnp.all`."""
    held = jnp.isfinite(jnp.stack([*sums, jnp.float32(0)])).astype(jnp.float32)
    return jnp.vdot(held, held, precision=jax.lax.Precision.HIGHEST) == held.size


def skip_unless(good, updates, new_state, state):
    """The step where `good`; elsewhere a zero update and the old state, its `total_notfinite` one higher."""
    updates = jax.tree.map(lambda u: jnp.where(good, u, jnp.zeros_like(u)), updates)
    kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), new_state, state)
    return updates, kept._replace(total_notfinite=state.total_notfinite + jnp.where(good, 0, 1))
