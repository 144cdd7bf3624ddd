"""Trees of parameters, gradients and options: what does not fit is refused by its path."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def path_of(path: Any) -> str:
    """A key path as users read it."""
    return jax.tree_util.keystr(path) or "the root"


def require_params(method: str, params: Any):
    """Refuses missing parameters in Optax's own words."""
    if params is None:
        raise ValueError(
            f"{method}: You are using a transformation that requires the current value of "
            "parameters, but you are not passing `params` when calling `update`."
        )


def require_same_leaves(
    method: str, what: str, tree: Any, reference_name: str, reference: Any, advice: str = ""
):
    """Refuses a tree whose structure or leaf shapes differ from the reference's."""
    got, expected = jax.tree.structure(tree), jax.tree.structure(reference)
    if got != expected:
        names, wanted = (
            {path_of(path) for path, _ in jax.tree.leaves_with_path(x)} for x in (tree, reference)
        )
        missing, more = sorted(wanted - names), sorted(names - wanted)
        # The same paths in other containers, as of a list and a tuple, tell nothing.
        nodes = "" if missing or more else f" ({got=}, {expected=})"
        raise ValueError(
            f"{method}: the tree of {what} differs from that of {reference_name}: it lacks "
            f"{_first(missing)} and has {_first(more)} besides{nodes}{advice}."
        )
    pairs = zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(reference), strict=True)
    for (path, leaf), other in pairs:
        if jnp.shape(leaf) != jnp.shape(other):
            raise ValueError(
                f"{method}: {what} and {reference_name} differ in shape at {path_of(path)}: got "
                f"{jnp.shape(leaf)}, expected {jnp.shape(other)}{advice}."
            )


def _first(names: list[str]) -> str:
    """The first of many names, and how many there are."""
    return f"{names[:4]}{f' and {len(names) - 4} more' * (len(names) > 4)}" if names else "nothing"


def require_parameters(method: str, params: Any, *, complex_leaves: bool = False):
    """Refuses parameters that are no arrays of floating-point numbers, by name and with advice."""
    kind = jnp.inexact if complex_leaves else jnp.floating
    for path, leaf in jax.tree.leaves_with_path(params):
        if getattr(leaf, "dtype", None) is None and not isinstance(leaf, int | float | complex):
            raise ValueError(
                f"{method}: expected a tree of arrays, got {type(leaf).__name__} at "
                f"{path_of(path)}. {advice_on_modules(params)}".rstrip()
            )
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, kind):
            raise ValueError(
                f"{method}: the leaf {path_of(path)} has dtype {dtype}, expected a floating-point "
                f"leaf{' (real or complex)' if complex_leaves else ''}; leave it out with "
                f"optax.masked or optax.partition. {advice_on_modules(params)}".rstrip()
            )


def advice_on_modules(params: Any) -> str:
    """Says what to pass in the place of another library's module; empty for other trees."""
    modules = {
        "equinox": ("Module", "eqx.filter(model, eqx.is_inexact_array) or eqx.partition"),
        "flax.linen": ("Module", 'the parameters, model.init(key, x)["params"]'),
        "flax.nnx": ("Module", "nnx.state(model, nnx.Param), or use nnx.Optimizer"),
    }
    for library, (name, advice) in modules.items():
        module = sys.modules.get(library)
        if module is not None and isinstance(params, getattr(module, name)):
            return f"For this module pass {advice}."
    return ""


def is_function(option: Any) -> bool:
    """Whether an option that may be a tree or a function of the parameters is the latter.

    A tree with leaves is a tree, also where it can be called, as an Equinox module can.
    """
    return callable(option) and jax.tree_util.treedef_is_leaf(jax.tree.structure(option))


def by_prefix(method: str, name: str, option: Any, tree: Any) -> list[Any]:
    """The entries of an option for every leaf of a tree, of which it is a prefix."""
    try:
        return jax.tree.leaves(jax.tree.broadcast(option, tree))
    except ValueError:
        given = [path_of(path) for path, _ in jax.tree.leaves_with_path(option)]
        wanted = [path_of(path) for path, _ in jax.tree.leaves_with_path(tree)]
        missed = [path for path in wanted if not any(path.startswith(p) for p in given)]
        raise ValueError(
            f"{method}: {name} must be a prefix of the parameters' tree; it misses "
            f"{_first(missed)} with entries at {_first(given)}. Give one entry for each leaf, "
            "or one for all leaves below a key."
        ) from None


def decays_of(method: str, mask: Any, tree: Any) -> list[bool]:
    """Which leaves decay, from a mask, a prefix of one, a function that makes one, or None."""
    mask = mask(tree) if is_function(mask) else mask
    entries = by_prefix(method, "weight_decay_mask", True if mask is None else mask, tree)
    for entry in entries:
        is_flag = isinstance(entry, bool) or getattr(entry, "dtype", None) == np.bool_
        if not is_flag or np.shape(entry):
            raise ValueError(
                f"{method}: expected True or False in weight_decay_mask, one for each leaf or for "
                f"all leaves below a key, got {entry!r}."
            )
    return [bool(entry) for entry in entries]


def is_gap(leaf: Any) -> bool:
    """Whether a leaf has been taken out, by None or by `optax.masked`."""
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def wide_dtype(dtype: Any) -> Any:
    """The dtype of arithmetic and moments for numbers of `dtype`: float32 at least."""
    return jnp.promote_types(jnp.float32, dtype)


def widened(tree: Any) -> Any:
    """The leaves of a tree in float32 at least."""
    return jax.tree.map(lambda x: jnp.asarray(x, wide_dtype(jnp.result_type(x))), tree)


def wide_zeros(tree: Any) -> Any:
    """Zeros like the leaves of a tree, in float32 at least."""
    return jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), wide_dtype(jnp.result_type(x))), tree)


def narrowed(tree: Any, like: Any) -> Any:
    """The leaves of a tree in the dtypes of another one's."""
    return jax.tree.map(lambda x, y: jnp.asarray(x, jnp.result_type(y)), tree, like)
