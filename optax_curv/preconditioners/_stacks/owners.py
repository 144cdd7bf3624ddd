"""Work divided over the devices of a mesh by `factor_sharding`, and leaves with sharding types."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def require_sharding(method: str, sharding):
    """Refuses what does not name the mesh axes over which factors are divided."""
    if sharding is None:
        return
    if not isinstance(sharding, NamedSharding) or not len(sharding.spec) or not sharding.spec[0]:
        raise ValueError(
            f"{method}: expected factor_sharding to be None or a jax.sharding.NamedSharding whose "
            "first entry names mesh axes, such as NamedSharding(mesh, PartitionSpec(('data', "
            f"'model'))), got {sharding!r}."
        )


def _parts(sharding: NamedSharding) -> int:
    axes = sharding.spec[0]
    return math.prod(
        sharding.mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes)
    )


def divided(function: Callable, sharding: NamedSharding | None) -> Callable:
    """Divides a function of arrays with a common leading axis: each device computes its own part.

    XLA divides neither factorisations nor loops over a batch by itself. A batch that the devices do
    not divide evenly is filled up with copies of its last entry.
    """
    if sharding is None:
        return function
    spec, parts = PartitionSpec(sharding.spec[0]), _parts(sharding)
    of_part = jax.shard_map(
        function, mesh=sharding.mesh, in_specs=spec, out_specs=spec, check_vma=False
    )

    def of_all(*arrays):
        count = len(jax.tree.leaves(arrays)[0])
        if count == 1:
            return function(*arrays)

        def filled(x):
            return jnp.concatenate([x, jnp.repeat(x[-1:], -count % parts, axis=0)])

        return jax.tree.map(lambda x: x[:count], of_part(*jax.tree.map(filled, arrays)))

    return of_all


def as_kept(tree, sharding: NamedSharding | None):
    """The arrays as a state keeps them: divided along the first axis that divides, or whole."""
    if sharding is None:
        return tree
    parts = _parts(sharding)

    def constrained(x):
        axis = next(
            (axis for axis, length in enumerate(x.shape) if length and length % parts == 0), None
        )
        spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, sharding.spec[0])
        return jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, spec))

    return jax.tree.map(constrained, tree)


def with_sharding_types(update: Callable) -> Callable:
    """`update` that also takes leaves whose shardings are part of their types.

    On meshes of `AxisType.Explicit` such types would have to be given at every reshape and product.
    Here the compiler chooses them within the update; what comes out has the types of the gradients
    and of the old state.
    """

    @functools.wraps(update)
    def typed(updates, state, params=None, **extra_args):
        if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
            return update(updates, state, params, **extra_args)
        leaves, treedef = jax.tree.flatten((updates, state, params, extra_args))
        arrays = {i: jnp.asarray(x) for i, x in enumerate(leaves) if hasattr(x, "dtype")}

        def of_arrays(arrays):
            given = [arrays.get(i, x) for i, x in enumerate(leaves)]
            updates, state, params, extra_args = jax.tree.unflatten(treedef, given)
            return update(updates, state, params, **extra_args)

        shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, (updates, state))
        return jax.sharding.auto_axes(of_arrays, out_sharding=shardings)(arrays)

    return typed
