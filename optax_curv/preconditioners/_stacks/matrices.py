"""Which axes of a leaf are a matrix, and who takes it: from layers, else by a rule on shapes."""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from optax_curv.layers import Layer, Layers, aligned
from optax_curv.preconditioners._stacks.names import leaf_name
from optax_curv.preconditioners._stacks.stacks import Member, leaf_member, permuted_member
from optax_curv.preconditioners._transformation.trees import (
    by_prefix,
    is_function,
    is_gap,
    path_of,
)

MATRIX_KINDS = ("dense", "conv")
# Leaves of these names are vectors whatever their rank: Flax's attention has biases [heads, width].
VECTOR_NAMES = ("bias", "scale", "b", "beta", "gamma")


@dataclasses.dataclass(frozen=True)
class LeafAxes:
    """One leaf's row of a `MatrixAxes`.

    Attributes:
      leaf: key path.
      shape: of the leaf.
      is_matrix: whether the method sees a stack of matrices [*stack, rows, columns].
      by_method: whether the method takes the leaf, and not the transformation for the rest.
      reason: why.
      split: shape to which the leaf is reshaped first, where one axis holds two meanings.
      stack: axes of the split leaf that count matrices.
      rows: axes of the split leaf that are a matrix's rows.
      columns: axes of the split leaf that are its columns.
    """

    leaf: str
    shape: tuple[int, ...]
    is_matrix: bool
    by_method: bool
    reason: str
    split: tuple[int, ...]
    stack: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """(number of matrices, rows, columns)."""
        sizes = [
            math.prod(self.split[i] for i in axes) for axes in (self.stack, self.rows, self.columns)
        ]
        return sizes[0], sizes[1], sizes[2]

    def member(self, place: int, path: Any, leaf: Any) -> Member:
        """The leaf as a member of a stack: matrices, or one tensor."""
        if not self.is_matrix:
            return leaf_member(place, path, leaf, len(self.stack))
        axes = (*self.stack, *self.rows, *self.columns)
        return permuted_member(place, path, leaf, self.split, axes, self.matrix_shape)


@dataclasses.dataclass(frozen=True)
class MatrixAxes:
    """A table of what each leaf is to a method for matrices: iterable, hashable, printable.

    Attributes:
      leaves: one `LeafAxes` a leaf, in `jax.tree.leaves` order.
    """

    leaves: tuple[LeafAxes, ...]

    def __iter__(self) -> Iterator[LeafAxes]:
        return iter(self.leaves)

    def __len__(self) -> int:
        return len(self.leaves)

    def __getitem__(self, leaf: str) -> LeafAxes:
        by_leaf = {row.leaf: row for row in self.leaves}
        if leaf not in by_leaf:
            raise KeyError(f"There is no leaf {leaf!r}; there are {list(by_leaf)}.")
        return by_leaf[leaf]

    def __str__(self) -> str:
        rows = [("leaf", "shape", "stack", "matrix", "taken by", "why")]
        for x in self.leaves:
            count, height, width = x.matrix_shape
            matrix = f"{height} × {width}" if x.is_matrix else "-"
            stack = str(count) if x.is_matrix and x.stack else "-"
            taken = "the method" if x.by_method else "adam"
            rows.append((x.leaf, str(x.shape), stack, matrix, taken, x.reason))
        return "\n".join(aligned(rows))


def axes_of_leaves(
    method: str,
    tree: Any,
    *,
    layers: Layers | None = None,
    adam_for: Any = None,
    stacked: Any = None,
) -> MatrixAxes:
    """The table of a tree; `optax_curv.matrix_axes` documents the rule."""
    leaves = jax.tree.leaves_with_path(tree)
    choices = _choices(method, adam_for, leaves, tree)
    counts = stack_ndims(method, stacked, tree)
    kernels = {} if layers is None else _kernels(method, layers, tree)
    table = []
    for (path, leaf), choice, count in zip(leaves, choices, counts, strict=True):
        name = leaf_name(path_of(path))
        row = _by_layer(name, leaf, kernels, layers) if layers is not None else None
        row = row or _by_shape(name, leaf, count)
        table.append(_chosen(method, row, choice, count))
    return MatrixAxes(tuple(table))


def stack_ndims(method: str, stacked: Any, tree: Any) -> list[int]:
    """How many leading axes of each leaf are a stack, from the option `stacked`."""
    stacked = stacked(tree) if is_function(stacked) else stacked
    counts = [int(count or 0) for count in by_prefix(method, "stacked", stacked or 0, tree)]
    for (path, leaf), count in zip(jax.tree.leaves_with_path(tree), counts, strict=True):
        if not hasattr(leaf, "shape"):
            raise ValueError(
                f"{method}: expected a tree of arrays, got {leaf!r} at {path_of(path)}; make it "
                "one with jnp.asarray(...)."
            )
        if not 0 <= count <= len(leaf.shape):
            raise ValueError(
                f"{method}: stacked={count} leading axes at {path_of(path)}, but its shape is "
                f"{leaf.shape}; expected at most {len(leaf.shape)}."
            )
    return counts


def _choices(method: str, adam_for: Any, leaves: Sequence[Any], tree: Any) -> list[Any]:
    """Reads `adam_for` for every leaf: True for Adam, False for the rule, or who takes it."""
    if adam_for is None:
        return [False] * len(leaves)
    if is_function(adam_for):
        chosen = [adam_for(path, leaf) for path, leaf in leaves]
    else:
        chosen = by_prefix(method, "adam_for", adam_for, tree)
    for (path, _), choice in zip(leaves, chosen, strict=True):
        if isinstance(choice, str) and choice in ("adam", method):
            continue
        if isinstance(choice, str) or choice not in (True, False):
            raise ValueError(
                f"{method}: adam_for gives {choice!r} for the leaf {path_of(path)}; expected True "
                f"or 'adam', False, or {method!r}."
            )
    return chosen


def _chosen(method: str, row: LeafAxes, choice: Any, count: int) -> LeafAxes:
    """A row after what `adam_for` says of it."""
    if isinstance(choice, str):
        if choice == "adam":
            return dataclasses.replace(row, by_method=False, reason="adam_for")
        if not row.by_method and not row.is_matrix:
            row = dataclasses.replace(row, split=row.shape, stack=tuple(range(count)))
        return dataclasses.replace(row, by_method=True, reason=f"adam_for says {method!r}")
    return dataclasses.replace(row, by_method=False, reason="adam_for") if choice else row


def _kernels(method: str, layers: Layers, tree: Any) -> dict[str, Layer]:
    """The layers of kernels by the kernel's path in this tree; refuses those of another model."""
    found = jax.tree.leaves_with_path(tree, is_leaf=is_gap)
    names = {leaf_name(path_of(path)): leaf for path, leaf in found}
    kernels = {}
    for layer in layers:
        for path in layer.paths:
            name = leaf_name(path)
            hidden = any(name.startswith(gap) for gap, leaf in names.items() if is_gap(leaf))
            if name not in names and names and not hidden:
                raise ValueError(
                    f"{method}: layer {layer.name!r} covers {path}, which the tree lacks; it has "
                    f"{list(names)}. Are these the layers of another model? Make them with "
                    "optax_curv.find_layers from the same parameters."
                )
        if layer.kernel is not None:
            kernels[leaf_name(layer.kernel)] = layer
    return kernels


def _by_layer(name: str, leaf: Any, kernels: dict[str, Layer], layers: Any) -> LeafAxes | None:
    """The row of a leaf whose loss was traced."""
    shape = tuple(leaf.shape)
    rest = LeafAxes(name, shape, False, False, "", shape)
    if name not in kernels:
        covered = {leaf_name(path) for layer in layers for path in layer.paths}
        uncovered = {leaf_name(path): why for path, why in layers.uncovered.items()}
        reason = "no kernel" if name in covered else uncovered.get(name, "in no layer")
        return dataclasses.replace(rest, reason=reason)
    layer = kernels[name]
    split = layer.kernel_split or shape
    axes = layer.kernel_axes or tuple(range(len(split)))
    sizes = math.prod(layer.stack), layer.in_dim, layer.out_dim
    if math.prod(shape) != math.prod(sizes):
        raise ValueError(
            f"layer {layer.name!r}: the kernel {name} has shape {shape}, expected the size of "
            f"stack={layer.stack} × in_dim={layer.in_dim} × out_dim={layer.out_dim}; are these the "
            "layers of another model?"
        )
    if layer.kind not in MATRIX_KINDS:
        return dataclasses.replace(rest, reason=f"kind {layer.kind}")
    stack, rows, columns = _divided(split, axes, sizes)
    return LeafAxes(name, shape, True, True, f"kind {layer.kind}", split, stack, rows, columns)


def _divided(split: Any, axes: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Ordered axes, as many as make up each of the sizes."""
    rest, groups = list(axes), []
    for size in sizes[:-1]:
        group: list[int] = []
        while math.prod(split[i] for i in group) != size:
            group.append(rest.pop(0))
        groups.append(tuple(group))
    return [*groups, tuple(rest)]


def _by_shape(name: str, leaf: Any, count: int) -> LeafAxes:
    """The row of a leaf by its name and shape."""
    shape = tuple(leaf.shape)
    stack = tuple(range(count))
    last = re.search(r"(?:^|[\['\"./])(\w+)['\"\]]*$", name)  # the last key, if it is one word
    row = LeafAxes(name, shape, False, False, "", shape, stack)
    if last and last[1] in VECTOR_NAMES:
        return dataclasses.replace(row, reason=f"named {last[1]}")
    own = range(count, len(shape))
    if len(own) < 2 or 0 in shape:
        return dataclasses.replace(row, reason=f"rank {len(own)}" if len(own) < 2 else "empty")

    def skewness(fold: int) -> float:
        sides = math.prod(shape[count:fold]), math.prod(shape[fold:])
        return max(sides) / min(sides)

    fold = min(range(count + 1, len(shape)), key=skewness)
    reason = "rank 2" if len(own) == 2 else "folded to be most nearly square"
    rows, columns = tuple(range(count, fold)), tuple(range(fold, len(shape)))
    return LeafAxes(name, shape, True, True, reason, shape, stack, rows, columns)
