"""Layers: static, hashable descriptions of how a loss uses its parameters."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

# Widths beyond which a factor is kept as its diagonal.
MAX_FULL_ELEMENTWISE = 512  # keeps every usual normalisation scale full
MAX_FULL = 8192  # where one factor takes 256 MiB

InputFactor = Literal["full", "diagonal", "one"]
OutputFactor = Literal["full", "diagonal"]


class Kind(NamedTuple):
    """The row of a kind of layer in `KINDS`: everything that the rest of the package asks of it.

    Attributes:
      input_factor: "full"; "diagonal" where the input is one-hot; "one" where the layer has no
        input of its own, and A = 1.
      is_elementwise: whether the leaf acts entry by entry, so that its block of the Fisher is that
        of the leaf's own per-example gradients.
      one_hot: whether the input comes as row numbers.
    """

    input_factor: InputFactor
    is_elementwise: bool = False
    one_hot: bool = False


KINDS = {
    "dense": Kind("full"),
    "conv": Kind("full"),
    "embedding": Kind("diagonal", one_hot=True),
    "scale": Kind("one", is_elementwise=True),
    "shift": Kind("one", is_elementwise=True),
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One linear map inside a loss, and the parameter leaves that hold it.

    As a matrix, the layer is the kernel ``[*stack, in_dim, out_dim]`` and, where there is a bias,
    one more row below: the input carries the coordinate 1 at its end.

    Attributes:
      name: the layer's key in the curvature dict.
      kind: "dense", "conv" (input is a patch), "embedding" (input is one-hot, its factor the
        diagonal of token frequencies), "scale" (element-wise product) or "shift" (sum).
      kernel: key path of the kernel leaf as ``jax.tree_util.keystr`` writes it, None for a "shift".
      bias: key path of the bias leaf, or None.
      in_dim: width of the input without the bias's coordinate, 0 for a "shift", 1 for a "scale".
      out_dim: width of the output of one slice.
      stack: shape of the slices (stacked scans, ensembles, groups), each with a factor pair of its
        own.
      shared: how often one call of the loss uses the kernel (time steps of a scan, tied uses).
      kernel_split: shape to which the kernel leaf is reshaped first, where one axis holds two
        meanings, as the output axis of a grouped convolution does; None: its own.
      kernel_axes: the axes of the split kernel in the order stack, inputs, outputs; None: they lie
        so.
      bias_axes: the axes of the bias leaf in the order stack, outputs; None: they lie so.
      rows: rows (examples times positions) seen in one use; 0: not counted.
      made: whether the kernel that meets the input is made of the leaf entry by entry, as
        ``w * mask`` or ``softplus(w)``; a `MadeKernelStatistic` then has the slope c of the making,
        and methods precondition the gradient by the made kernel, ∇ / c, and take u / c for the
        leaf.
    """

    name: str
    kind: str
    kernel: str | None
    bias: str | None
    in_dim: int
    out_dim: int
    stack: tuple[int, ...] = ()
    shared: int = 1
    kernel_split: tuple[int, ...] | None = None
    kernel_axes: tuple[int, ...] | None = None
    bias_axes: tuple[int, ...] | None = None
    rows: int = 0
    made: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"Layer {self.name!r}: unknown kind={self.kind!r}; expected one of {tuple(KINDS)}."
            )
        if self.kernel is None and self.bias is None:
            raise ValueError(f"Layer {self.name!r} has neither a kernel nor a bias.")

    @property
    def paths(self) -> tuple[str, ...]:
        """The key paths of the leaves this layer covers, kernel first."""
        return tuple(path for path in (self.kernel, self.bias) if path is not None)

    @property
    def rows_of_matrix(self) -> int:
        """Width of the input factor: ``in_dim`` and one more for the bias."""
        return self.in_dim + (self.bias is not None)

    @property
    def is_elementwise(self) -> bool:
        """Whether the leaf acts entry by entry, as scales and shifts do."""
        return KINDS[self.kind].is_elementwise

    @property
    def input_factor(self) -> InputFactor:
        """How A is kept: "full", as its "diagonal", or "one" where it is the number 1, [1, 1]."""
        kept = KINDS[self.kind].input_factor
        return "diagonal" if kept == "full" and self.rows_of_matrix > MAX_FULL else kept

    @property
    def output_factor(self) -> OutputFactor:
        """How G is kept: "full", or as its "diagonal" beyond the width at which it is too large."""
        limit = MAX_FULL_ELEMENTWISE if self.is_elementwise else MAX_FULL
        return "full" if self.out_dim <= limit else "diagonal"

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and G, ``stack`` first; a diagonal factor lacks the last axis."""
        kept = (self.input_factor, self.rows_of_matrix), (self.output_factor, self.out_dim)
        first, second = (
            (*self.stack, *[width] * (1 if how == "diagonal" else 2)) for how, width in kept
        )
        return first, second


@jax.tree_util.register_static
class Layers:
    """The layers of one loss in the order of use: iterable, hashable, and a table when printed.

    Args:
      layers: the layers.
      uncovered: pairs (key path, reason), or a mapping, of leaves that no layer covers.

    Raises:
      ValueError: if two layers have one name or cover the same leaf.

    Examples:
      >>> import optax_curv
      >>> layers = optax_curv.Layers([
      ...     optax_curv.Layer("hidden", "dense", "['w']", "['b']", in_dim=3, out_dim=2)])
      >>> [layer.name for layer in layers], len(layers)
      (['hidden'], 1)
    """

    def __init__(
        self,
        layers: Iterable[Layer],
        uncovered: Mapping[str, str] | Iterable[tuple[str, str]] = (),
    ):
        self._layers = tuple(layers)
        self._uncovered = tuple(dict(uncovered).items())
        paths = [path for layer in self._layers for path in layer.paths]
        for what, seen in (
            ("name", [layer.name for layer in self._layers]),
            ("parameter leaf", paths),
        ):
            twice = sorted({name for name in seen if seen.count(name) > 1})
            if twice:
                raise ValueError(f"Layers: more than one layer has the {what} {twice}.")

    @property
    def uncovered(self) -> dict[str, str]:
        """Key path of every parameter leaf that no layer covers, with the reason."""
        return dict(self._uncovered)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, name: str) -> Layer:
        by_name = {layer.name: layer for layer in self._layers}
        if name not in by_name:
            raise KeyError(f"No layer {name!r}; there are {list(by_name)}.")
        return by_name[name]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layers) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self._layers, self._uncovered))

    def __repr__(self) -> str:
        return f"Layers({list(self._layers)!r}, uncovered={self.uncovered!r})"

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("layer", "kind", "kernel", "in", "out", "stack", "shared", "bias", "rows")
        ]
        for layer in self._layers:
            cells = (layer.name, layer.kind, layer.kernel, layer.in_dim, layer.out_dim)
            cells += (layer.stack, layer.shared, layer.bias, layer.rows or None)
            rows.append(tuple("-" if cell in (None, ()) else str(cell) for cell in cells))
        return "\n".join(
            [*aligned(rows), *(f"uncovered: {path}: {reason}" for path, reason in self._uncovered)]
        )


def aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Writes a table: each row as a line, its cells below each other."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def layer_matrix(layer: Layer, leaves: Mapping[str, jax.Array]) -> jax.Array:
    """Puts a layer's leaves together as one matrix [*stack, rows_of_matrix, out_dim], bias below.

    Args:
      layer: the layer.
      leaves: arrays by key path, the layer's own among them.

    Returns:
      The matrix.
    """
    parts = []
    for path, rows, split, axes in _parts(layer, leaves):
        leaf = jnp.reshape(leaves[path], split)
        parts.append(jnp.reshape(jnp.transpose(leaf, axes), (*layer.stack, rows, layer.out_dim)))
    return jnp.concatenate(parts, axis=-2)


def slope_matrix(layer: Layer, slope: jax.Array) -> jax.Array:
    """Puts the slope of a made kernel as the layer's matrix, with 1 for the bias below.

    Args:
      layer: the layer.
      slope: in the shape of the kernel leaf.

    Returns:
      The matrix [*stack, rows_of_matrix, out_dim].
    """
    kernel = dataclasses.replace(layer, bias=None)
    matrix = layer_matrix(kernel, {str(layer.kernel): slope})
    if layer.bias is None:
        return matrix
    ones = jnp.ones((*layer.stack, 1, layer.out_dim), matrix.dtype)
    return jnp.concatenate([matrix, ones], axis=-2)


def layer_leaves(
    layer: Layer, matrix: jax.Array, like: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Takes a matrix apart into a layer's leaves, by key path: the inverse of `layer_matrix`.

    Args:
      layer: the layer.
      matrix: the matrix, [*stack, rows_of_matrix, out_dim].
      like: arrays by key path, which give the shapes and dtypes.

    Returns:
      The leaves by key path.
    """
    leaves, first = {}, 0
    for path, rows, split, axes in _parts(layer, like):
        part = matrix[..., first : first + rows, :].reshape([split[axis] for axis in axes])
        back = sorted(range(len(axes)), key=axes.__getitem__)
        leaves[path] = part.transpose(back).reshape(like[path].shape).astype(like[path].dtype)
        first += rows
    return leaves


def _parts(layer: Layer, leaves: Mapping[str, Any]) -> list[tuple]:
    """For each leaf: key path, rows of the matrix, split shape, order of the split axes."""
    parts = []
    for path, rows, split, axes in (
        (layer.kernel, layer.in_dim, layer.kernel_split, layer.kernel_axes),
        (layer.bias, 1, None, layer.bias_axes),
    ):
        if path is None:
            continue
        shape = tuple(leaves[path].shape)
        if math.prod(shape) != math.prod((*layer.stack, rows, layer.out_dim)):
            raise ValueError(
                f"Layer {layer.name!r}: the leaf {path} has shape {shape}, expected the size of "
                f"stack={layer.stack} × {rows} × out_dim={layer.out_dim}; are these the layers of "
                "another model?"
            )
        split = split or shape
        parts.append((path, rows, split, axes or tuple(range(len(split)))))
    return parts


def require_concrete(caller: str, states: Any):
    """Refuses states whose numbers are not there yet, as within a jitted function.

    Raises:
      ValueError: if some array is being traced.
    """
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(states)):
        raise ValueError(
            f"{caller}: expected a state with numbers, got one that is being traced. Return the "
            f"state from the function under jax.jit, and call {caller} outside of it."
        )
