"""Owners: the devices of a mesh that keep the rows of stacks and run a method on them.

The rows of a stack [N, *shape], filled up with zeros to a multiple of the number of devices, are
divided over all axes of a mesh. Gradients go to the owners of their rows and directions come back
one mesh axis at a time, each by an all-to-all. How the leaves themselves are sharded is not known
while tracing: dimensions whose sharding a step leaves open keep what they have, and XLA is told to
give directions the sharding of their gradients.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from optax_curv.linalg._compiler import compiled_once, sharded_alike

OPEN = PartitionSpec.UNCONSTRAINED
FEW = 8  # devices for each of a few tensors
LONG = 16  # entries of an axis for each device, from which on a few tensors are split along it
EXPLICIT = AxisType.Explicit


class Owners(NamedTuple):
    """Who owns the rows of stacks.

    Attributes:
      method: the name in messages.
      mesh: of the devices.
      axes: of the mesh, in the order in which rows are divided over them. It begins with the
        mesh's last one: of a leaf's dimension that is sharded over two axes, a step can move the
        minor one alone.
      transport_dtype: in which gradients and directions travel; None: their own.
    """

    method: str
    mesh: Mesh | AbstractMesh
    axes: tuple[str, ...]
    transport_dtype: Any = None

    @property
    def size(self) -> int:
        """How many devices share the rows."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    def anywhere(self, flag: jax.Array) -> jax.Array:
        """Whether a bool [] is true on any of the devices; within `divided`."""
        return jax.lax.pmax(flag.astype(jnp.int32), self.axes) > 0

    def filled_struct(self, struct: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """The shape of a stack with equally many rows for every device."""
        rows = struct.shape[0] + -struct.shape[0] % self.size
        return jax.ShapeDtypeStruct((rows, *struct.shape[1:]), struct.dtype)

    def splits(self, shape: tuple[int, ...], diagonal: tuple[bool, ...]) -> int | None:
        """The axis of a stack [N, *shape] along which it is divided in the place of its rows.

        It is the longest one where its factor is a diagonal and it is long, of so few tensors that
        most devices would own none: an embedding, or an output layer.
        """
        axis = max(range(1, len(shape)), key=shape.__getitem__, default=0)
        few = len(shape) > 2 and FEW * shape[0] <= self.size
        long = few and diagonal[axis - 1] and shape[axis] >= LONG * self.size
        return axis if long else None

    def sent(self, stacks: Any, axis: int = 0) -> Any:
        """The rows of stacks [N, …] with their owners, and rows of zeros so that all have some.

        Along another axis than that of the rows they are divided as they are.
        """

        def of_array(x: jax.Array) -> jax.Array:
            # Left to XLA, the gradients themselves would be put together at their owners.
            travels = self._divided_over(self._as_it_travels(x), (), OPEN, axis)
            travels = travels if axis else self._filled(travels)
            for count in range(1, len(self.axes)):
                travels = self._divided_over(travels, self.axes[:count], OPEN, axis)
            return self._divided_over(travels, self.axes, None, axis).astype(x.dtype)

        return jax.tree.map(of_array, stacks)

    def handed(self, stacks: Any) -> Any:
        """Rows of stacks [N, …] that every device has, and zeros, each with its owner alone."""

        def of_array(x: jax.Array) -> jax.Array:
            return self._divided_over(
                self._filled(self._divided_over(x, (), None)), self.axes, None
            )

        return jax.tree.map(of_array, stacks)

    def returned(self, stacks: Any, like: Any, axis: int = 0) -> Any:
        """The stacks as `like`, [N, …], is sharded."""

        def of_array(x: jax.Array, like: jax.Array) -> jax.Array:
            travels = self._back(self._as_it_travels(x), axis)
            return sharded_alike(like, travels[: len(like)].astype(like.dtype))

        return jax.tree.map(of_array, stacks, like)

    def divided(self, function: Callable, trees: tuple, results: Any) -> Any:
        """The function of trees, each device computing its own rows of what is in dicts by stack.

        All other arrays are the same on every device, of the trees and of the results, of which
        `results` is a prefix, a dict standing for any dict.
        """
        specs = {"in_specs": self._specs(trees), "out_specs": self._specs(results)}
        return jax.shard_map(function, mesh=self.here(), check_vma=False, **specs)(*trees)

    def placed(self, state: Any) -> Any:
        """A state with its dicts by stack divided, and all else whole on every device."""

        def of_part(spec: PartitionSpec, part: Any) -> Any:
            sharding = NamedSharding(self.here(), spec)
            return jax.tree.map(lambda x: _constrained(x, sharding), part)

        return jax.tree.map(of_part, self._specs(state), state, is_leaf=_is_spec)

    def placed_along(self, state: Any, axes: Mapping[str, int], within: bool = False) -> Any:
        """A state of stacks that are split along axes, see `splits`.

        Its dicts keep what has such an axis beside others, as moments have, divided: `within` a
        step along that axis, else along the first one that the devices divide. All else is whole.
        """

        def of_array(x: jax.Array, axis: int) -> jax.Array:
            is_factor = x.ndim < 3 or x.shape[-1] in (x.shape[-2], x.shape[-2] + 1)
            if is_factor:
                return self.whole(x)
            return self.sent(x, axis) if within else self.kept(self._back(x, axis))

        def of_field(field: Any) -> Any:
            if not _is_by_stack(field):
                return field
            return {
                n: jax.tree.map(lambda x, a=axes[n]: of_array(x, a), y) for n, y in field.items()
            }

        return state._replace(**{n: of_field(x) for n, x in state._asdict().items()})

    def placed_like(self, state: Any, *trees: Any) -> Any:
        """A state of Optax's, whose leaves are sharded as the leaves of trees that they belong to.

        They belong to a leaf of their shape whose path ends theirs. All others are whole.
        """
        leaves = [pair for tree in trees for pair in jax.tree.leaves_with_path(tree)]

        def of_leaf(path: Any, x: jax.Array) -> jax.Array:
            for own, leaf in leaves:
                if path[len(path) - len(own) :] == own and leaf.shape == x.shape:
                    if EXPLICIT in jax.typeof(leaf).sharding.mesh.axis_types:
                        return jax.sharding.reshard(x, jax.typeof(leaf).sharding)
                    return sharded_alike(leaf, x)
            return self.whole(x)

        return jax.tree.map_with_path(of_leaf, state)

    def like(self, leaf: Any, x: jax.Array) -> jax.Array:
        """The array x sharded as a leaf is; as it is where there is no leaf."""
        return sharded_alike(leaf, x.astype(leaf.dtype)) if isinstance(leaf, jax.Array) else x

    def whole(self, x: jax.Array) -> jax.Array:
        """The array on every device."""
        return _constrained(x, NamedSharding(self.here(), PartitionSpec()))

    def turned(self, rows: jax.Array) -> jax.Array:
        """Rows [K, n] that were divided over K, divided over n: one mesh axis after the other."""
        axes = self.axes[::-1]
        for count in reversed(range(len(axes) + 1)):
            spec = PartitionSpec(axes[:count] or None, axes[count:][::-1] or None)
            rows = _constrained(rows, NamedSharding(self.here(), spec))
        return rows

    def kept(self, x: jax.Array) -> jax.Array:
        """The array divided along the first axis that the devices divide, or whole."""
        return _constrained(
            x, NamedSharding(self.here(), divided_spec(x.shape, self.mesh, self.axes))
        )

    def _specs(self, tree: Any) -> Any:
        def of_part(x: Any) -> PartitionSpec:
            return PartitionSpec(self.axes) if _is_by_stack(x) else PartitionSpec()

        return jax.tree.map(of_part, tree, is_leaf=_is_by_stack)

    def here(self) -> Any:
        """The mesh as it is seen where this is called; refuses another one, and manual axes."""
        context = jax.sharding.get_abstract_mesh()
        if context.empty:
            return self.mesh
        given, found = dict(self.mesh.shape), dict(context.shape)
        if any(found.get(axis) != given[axis] for axis in self.axes):
            raise ValueError(
                f"{self.method}: sharding= names the mesh {given}, and the mesh here is {found}; "
                "expected the same axes. Make the transformation with the mesh of the program."
            )
        kinds = dict(zip(context.axis_names, context.axis_types, strict=True))
        manual = [axis for axis in self.axes if kinds[axis] == AxisType.Manual]
        if manual:
            raise ValueError(
                f"{self.method}: sharding= divides the work over the mesh axes {self.axes}, of "
                f"which {manual} are manual here, inside a jax.shard_map over them. There each "
                "device has data of its own: leave sharding= out, or call update outside."
            )
        return context

    def _back(self, x: jax.Array, axis: int) -> jax.Array:
        """The array divided along an axis, one mesh axis after the other taken off it."""
        x = self._divided_over(x, self.axes, None, axis)
        for count in reversed(range(len(self.axes))):
            x = self._divided_over(x, self.axes[:count], OPEN, axis)
        return x

    def _filled(self, x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, -len(x) % self.size)] + [(0, 0)] * (x.ndim - 1))

    def _as_it_travels(self, x: jax.Array) -> jax.Array:
        real = jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(self.transport_dtype) if real and self.transport_dtype else x

    def _divided_over(
        self, x: jax.Array, axes: tuple[str, ...], others: Any, axis: int = 0
    ) -> jax.Array:
        spec = PartitionSpec(*(axes or None if i == axis else others for i in range(x.ndim)))
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.here(), spec))


def _is_by_stack(x: Any) -> bool:
    return isinstance(x, dict)


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def divided_spec(shape: tuple[int, ...], mesh: Any, axes: tuple[str, ...]) -> PartitionSpec:
    """How an array is divided along the first axis that the devices divide, or that it is whole."""
    size = math.prod(mesh.shape[axis] for axis in axes)
    even = [i for i, length in enumerate(shape) if length and length % size == 0]
    return PartitionSpec(*[None] * even[0], axes) if even else PartitionSpec()


def _constrained(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """The array with this sharding, whether the mesh's axes are automatic or explicit."""
    explicit = EXPLICIT in sharding.mesh.axis_types
    place = jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint
    return place(x, sharding)


def compiled(function: Callable, owners: Owners | None) -> Callable:
    """A function of a tree that makes its arrays where they are to lie, also when called eagerly.

    Leaves that are no arrays, such as a `jax.ShapeDtypeStruct`, are handed on as they are.
    """
    if owners is None:
        return function

    def of_tree(tree: Any) -> Any:
        leaves, treedef = jax.tree.flatten(tree)
        arrays = {i: x for i, x in enumerate(leaves) if not isinstance(x, jax.ShapeDtypeStruct)}

        def of_arrays(arrays: dict[int, Any]) -> Any:
            return function(treedef.unflatten([arrays.get(i, x) for i, x in enumerate(leaves)]))

        # An array that is not used says on which devices the program is to run.
        return compiled_once(of_arrays, keep_unused=True)(arrays)

    return of_tree


def owners_of(
    method: str, sharding: Any, factor_sharding: Any = None, transport_dtype: Any = None
) -> Owners | None:
    """Who owns what, from the arguments; refuses what does not name the axes of a mesh."""
    if sharding is not None and factor_sharding is not None:
        raise ValueError(
            f"{method}: got both sharding={sharding!r} and factor_sharding={factor_sharding!r}, "
            "its old name; expected sharding= alone."
        )
    given = factor_sharding if sharding is None else sharding
    if given is None:
        return None
    if isinstance(given, Mesh | AbstractMesh):
        mesh, names = given, given.axis_names
    elif isinstance(given, NamedSharding) and len(given.spec) and given.spec[0]:
        first = given.spec[0]
        mesh, names = given.mesh, (first,) if isinstance(first, str) else first
    else:
        raise ValueError(
            f"{method}: expected sharding to be None, a jax.sharding.Mesh, over all of whose axes "
            "the work is divided, or a NamedSharding whose first entry names mesh axes, such as "
            f"NamedSharding(mesh, PartitionSpec(('data', 'model'))), got {given!r}."
        )
    axes = tuple(axis for axis in reversed(mesh.axis_names) if axis in names)
    return Owners(method, mesh, axes, transport_dtype)


def with_sharding_types(update: Callable) -> Callable:
    """`update` that also takes leaves whose shardings are part of their types.

    On meshes of `AxisType.Explicit` such types would have to be given at every reshape and product.
    Here the compiler chooses them within the update; what comes out has the types of the gradients
    and of the old state. The mesh is that of `jax.set_mesh`, or else that of the leaves' types.
    """

    @functools.wraps(update)
    def typed(updates, state, params=None, **extra_args):
        given = updates, state, params, extra_args

        def of_tree(given):
            updates, state, params, extra_args = given
            return update(updates, state, params, **extra_args)

        def type_of(x, mesh):
            kept = jax.typeof(x).sharding
            return NamedSharding(mesh, PartitionSpec()) if kept.mesh.empty else kept

        def types(mesh):
            return jax.tree.map(functools.partial(type_of, mesh=mesh), (updates, state))

        return _by_compiler(of_tree, given, types)

    return typed


def evenly_divided(function: Callable, tree: Any) -> Any:
    """`function(tree)`, also of leaves whose shardings are part of their types.

    Then what it returns is divided along the first axis that the devices divide.
    """

    def types(mesh):
        axes = _explicit_axes(mesh)
        structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
        return jax.tree.map(
            lambda x: NamedSharding(mesh, divided_spec(x.shape, mesh, axes)),
            jax.eval_shape(function, structs),
        )

    return _by_compiler(function, tree, types)


def on_mesh_of(params: Any, state: Any) -> Any:
    """A new state; eagerly made for parameters with explicit axes, all of it on their mesh.

    There the first update would put what is on one device, and so be compiled twice.
    """
    leaves = jax.tree.leaves(params)
    if any(isinstance(x, Tracer) for x in [*leaves, *jax.tree.leaves(state)]):
        return state
    meshes = [getattr(x.sharding, "mesh", None) for x in leaves if isinstance(x, jax.Array)]
    mesh = next((m for m in meshes if m is not None and EXPLICIT in m.axis_types), None)
    if mesh is None:
        return state

    def of_array(x: jax.Array) -> jax.Array:
        is_there = not jax.typeof(x).sharding.mesh.empty
        whole = PartitionSpec(*[None] * x.ndim)  # as the types of an update's results are written
        return x if is_there else jax.device_put(x, NamedSharding(mesh, whole))

    return jax.tree.map(of_array, state)


def _by_compiler(function: Callable, tree: Any, types: Callable[[Any], Any]) -> Any:
    """`function(tree)`; on a mesh of explicit axes with results of these types, a tree of them."""
    leaves, treedef = jax.tree.flatten(tree)
    mesh = _explicit_mesh(leaves)
    if mesh is None:
        return function(tree)
    arrays = {i: jnp.asarray(x) for i, x in enumerate(leaves) if hasattr(x, "dtype")}

    def of_arrays(arrays):
        return function(treedef.unflatten([arrays.get(i, x) for i, x in enumerate(leaves)]))

    axes = _explicit_axes(mesh)
    of_all = jax.sharding.auto_axes(of_arrays, axes=axes, out_sharding=types(mesh))
    if jax.sharding.get_abstract_mesh().empty:
        of_all = compiled_once(of_all)  # called eagerly it would look for a mesh around it
    return of_all(arrays)


def _explicit_axes(mesh: Any) -> tuple[str, ...]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(axis for axis, kind in kinds if kind == EXPLICIT)


def without_types(tree: Any) -> Any:
    """Arrays whose shardings are part of their types, whole on every device; others as they are.

    What is divided so cannot be cut into the slices of layers.
    """

    def of_array(x: jax.Array) -> jax.Array:
        mesh: Any = jax.typeof(x).sharding.mesh
        if EXPLICIT not in mesh.axis_types:
            return x
        mesh = mesh if isinstance(x, Tracer) else getattr(x.sharding, "mesh", mesh)
        return _constrained(x, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(of_array, tree)


def _explicit_mesh(leaves: Any) -> Any:
    """The mesh with explicit axes, around the call or in the types of arrays; None without any."""
    arrays = [x for x in leaves if isinstance(x, jax.Array)]
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(x).sharding.mesh for x in arrays)]
    return next((mesh for mesh in meshes if EXPLICIT in mesh.axis_types), None)
