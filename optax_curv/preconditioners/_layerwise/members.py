"""Layers as members of stacks: which leaves of a tree a layer has, as one matrix, and back."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_curv.layers import Layer, Layers, layer_leaves, layer_matrix
from optax_curv.preconditioners._stacks.names import layer_member_name
from optax_curv.preconditioners._stacks.rule import FALLBACK, METHOD
from optax_curv.preconditioners._stacks.stacks import Member, leaf_member
from optax_curv.preconditioners._transformation.trees import advice_on_modules, is_gap


class LayerKind(NamedTuple):
    """The properties that the members of a stack share besides the shape of their matrices.

    Attributes:
      role: `METHOD` for layers, `FALLBACK` for leaves that no layer covers.
      decays: whether weight decay acts on them.
      dense_input: whether the input factor is a full matrix, else it is its diagonal.
      dense_output: whether the output factor is one.
      elementwise: whether the layers are scales or shifts, whose input factor is the number 1.
    """

    role: str
    decays: bool = True
    dense_input: bool = False
    dense_output: bool = False
    elementwise: bool = False


@dataclasses.dataclass(frozen=True)
class PresentLayer:
    """A layer as far as a tree holds it: without its kernel or bias where that leaf is masked.

    Attributes:
      layer: the layer with the paths of this tree and only its present leaves.
      whole: the layer as described, whose statistics arrive.
      dtype: of the layer's factors, float32 at least.
    """

    layer: Layer
    whole: Layer
    dtype: Any

    @property
    def own_rows(self) -> slice:
        """Which rows of the whole layer's matrix, and coordinates of its input, are present."""
        first = self.whole.in_dim if self.layer.kernel is None else 0
        return slice(first, self.whole.in_dim + (self.layer.bias is not None))

    @property
    def is_whole(self) -> bool:
        """True if no leaf of the layer is masked."""
        return self.layer.rows_of_matrix == self.whole.rows_of_matrix

    @property
    def kind(self) -> LayerKind:
        """The kind of stack that the layer belongs to."""
        dense = self.layer.input_factor != "diagonal", self.layer.output_factor != "diagonal"
        return LayerKind(METHOD, True, *dense, self.layer.is_elementwise)


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by key path, as `jax.tree_util.keystr` writes it.

    None and `optax.MaskedNode` count as leaves.
    """
    found = jax.tree.leaves_with_path(tree, is_leaf=is_gap)
    return {jax.tree_util.keystr(path): leaf for path, leaf in found}


def present_layers(
    method: str, layers: Layers, tree: Any, uncovered_allowed: bool
) -> dict[str, PresentLayer]:
    """The layers that a tree of parameters or gradients holds, by name, in the order of `layers`.

    Layers whose leaves are all masked are left out. One `optax.MaskedNode` may stand for all leaves
    below it, as a mask or labels that are a prefix of the tree make it.
    """
    leaves = leaves_by_path(tree)
    gaps = [path for path, leaf in leaves.items() if is_gap(leaf)]
    present: dict[str, PresentLayer] = {}
    covered: set[str] = set()
    for layer in layers:
        paths = {path: _path_in(leaves, path) for path in layer.paths}
        missing = [path for path in paths.values() if path not in leaves]
        missing = [path for path in missing if not any(_is_below(path, gap) for gap in gaps)]
        if missing and leaves:
            raise ValueError(
                f"{method}: layer {layer.name!r} covers {missing}, which the tree lacks; it has "
                f"{list(leaves)}. Are these the layers of another model? Make them with "
                "optax_curv.find_layers from the same parameters. "
                f"{advice_on_modules(tree)}".rstrip()
            )
        covered.update(paths.values())
        found = _present(layer, paths, leaves)
        if found is not None:
            present[layer.name] = found
    open_paths = [path for path in leaves if path not in covered and path not in gaps]
    if open_paths and not uncovered_allowed:
        reasons = [
            f"{path} ({layers.uncovered[path]})" if path in layers.uncovered else path
            for path in open_paths
        ]
        raise ValueError(
            f"{method}: no layer covers {', '.join(reasons)}. Pass fallback=, an Optax "
            "transformation for such leaves (for instance optax.scale_by_adam()), or leave them "
            f"out with optax.masked or optax.partition. {advice_on_modules(tree)}".rstrip()
        )
    return present


def _path_in(leaves: dict[str, Any], path: str) -> str:
    """The path as this tree has it: an nnx.State ends its paths in .value, pure arrays do not."""
    candidates = path, path + ".value", path.removesuffix(".value")
    return next((q for q in candidates if q in leaves), path)


def _is_below(path: str, gap: str) -> bool:
    """Says whether a key path leads through the node at another one."""
    return path.startswith(gap) and path[len(gap) :][:1] in ("", "[", ".")


def _present(layer: Layer, paths: dict[str, str], leaves: dict[str, Any]) -> PresentLayer | None:
    """The layer with those of its leaves that are there; None without any."""
    kernel, bias = (
        None if path is None or is_gap(leaves.get(paths[path])) else paths[path]
        for path in (layer.kernel, layer.bias)
    )
    if kernel is None and bias is None:
        return None
    changes: dict[str, Any] = {"kernel": kernel, "bias": bias}
    if kernel is None:
        changes |= {"kind": "shift", "in_dim": 0, "kernel_split": None, "kernel_axes": None}
    dtypes = [leaves[path].dtype for path in (kernel, bias) if path is not None]
    dtype = jnp.promote_types(jnp.float32, jnp.result_type(*dtypes))
    return PresentLayer(dataclasses.replace(layer, **changes), layer, dtype)


def members_of_tree(present: dict[str, PresentLayer], tree: Any) -> list[tuple[Member, LayerKind]]:
    """The layers of a tree as members of stacks, and all other leaves, for the fallback."""
    leaves = jax.tree.leaves_with_path(tree)
    places = {jax.tree_util.keystr(path): place for place, (path, _) in enumerate(leaves)}
    covered = {path for x in present.values() for path in x.layer.paths}
    members = [(_layer_member(x, places, leaves), x.kind) for x in present.values()]
    members += [
        (leaf_member(places[name], path, leaf), LayerKind(FALLBACK))
        for name, (path, leaf) in zip(places, leaves, strict=True)
        if name not in covered
    ]
    return members


def _layer_member(x: PresentLayer, places: dict[str, int], leaves: Sequence[Any]) -> Member:
    """A layer as rows [prod(stack), rows, out]: its kernel, and its bias below."""
    layer = x.layer
    own = {path: places[path] for path in layer.paths}
    shapes = {path: jnp.shape(leaves[place][1]) for path, place in own.items()}
    _require_sizes(layer, shapes)
    rows = math.prod(layer.stack)
    shape = layer.rows_of_matrix, layer.out_dim

    def take(leaves: Sequence[Any]) -> jax.Array:
        matrix = layer_matrix(layer, {path: leaves[place] for path, place in own.items()})
        return matrix.reshape(rows, *shape)

    def give(array: jax.Array, leaves: Sequence[Any]) -> dict[int, jax.Array]:
        def like(path: str) -> Any:
            leaf = leaves[own[path]]
            dtype = array.dtype if isinstance(leaf, optax.MaskedNode) else jnp.result_type(leaf)
            return jax.ShapeDtypeStruct(shapes[path], dtype)

        matrix = array.reshape(*layer.stack, *shape)
        parts = layer_leaves(layer, matrix, {path: like(path) for path in own})
        return {own[path]: part for path, part in parts.items()}

    return Member(layer_member_name(layer.name, layer.stack), rows, shape, x.dtype, take, give)


def _require_sizes(layer: Layer, shapes: dict[str, tuple[int, ...]]):
    """Refuses leaves that do not have the layer's size."""
    for path, rows in ((layer.kernel, layer.in_dim), (layer.bias, 1)):
        size = math.prod((*layer.stack, rows, layer.out_dim))
        if path is not None and math.prod(shapes[path]) != size:
            raise ValueError(
                f"Layer {layer.name!r}: the leaf {path} has shape {shapes[path]}, expected the "
                f"size of stack={layer.stack} × {rows} × out_dim={layer.out_dim}; are these the "
                "layers of another model?"
            )
