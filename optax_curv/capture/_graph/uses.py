"""From uses of parameters to layers: which uses make one layer, and what is measured at each."""

import collections
import dataclasses
import itertools
import math
from typing import NamedTuple

import jax
import numpy as np

from optax_curv.capture._graph import views
from optax_curv.capture._graph.marks import LOST, Found
from optax_curv.capture._graph.parts import of_whole_leaf, places
from optax_curv.capture._graph.products import without_own_stack
from optax_curv.capture._graph.views import Arrangement, Piece, size_of
from optax_curv.layers import KINDS, Layer, Layers


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """One use of a layer: everything static that its statistics need.

    Attributes:
      layer: the layer.
      found: the use as the walk found it.
      inputs: how the input becomes [*stack, examples, positions, features].
      outputs: how the output does.
      swapped: whether the input lies on the side of the layer's outputs, as where a tied embedding
        makes logits.
      bias: whether the bias is added to the output.
      slots: indices into the stack of the slices of the leaf, after the scans' axes.
      input_places: where its inputs lie among the layer's, None: they are all.
      output_places: where its outputs lie.
      gain: number that multiplies the leaf.
      loops: for each scan around it, whether the layer's stack runs along it.
      positions: entries of the leaf that a shift or scale touches, None for all.
      batch: number of examples.
      examples: how many can be told apart, `batch` or 1.
      example_loop: depth of the scan that walks from example to example; None: they are in the
        rows.
      rows: R, of all uses of the layer.
    """

    layer: Layer
    found: Found
    inputs: Arrangement
    outputs: Arrangement
    swapped: bool
    bias: bool
    slots: tuple[int, ...]
    input_places: np.ndarray | None
    output_places: np.ndarray | None
    gain: float
    loops: tuple[bool, ...]
    positions: np.ndarray | None
    batch: int
    examples: int
    example_loop: int | None
    rows: int

    @property
    def widths(self) -> tuple[int, int]:
        """Widths of the input and of the output, those of the whole leaf where it uses a part."""
        return size_of(self.found.inputs), size_of(self.found.outputs)

    @property
    def one_hot(self) -> bool:
        """Whether the input comes as row numbers; a table may be used as a kernel, too."""
        return KINDS[self.found.kind].one_hot


SCALE, SHIFT = "scale", "shift"


class Matrix(NamedTuple):
    """A leaf as a matrix [*stack, inputs, outputs], and whether each use swaps its sides."""

    stack: tuple[Piece, ...]
    inputs: tuple[Piece, ...]
    outputs: tuple[Piece, ...]
    swapped: list[bool]


def _loops(found: Found) -> tuple[Piece, ...]:
    """The pieces that scans walk along, in the order they took them."""
    return tuple((slot.stride, slot.size) for slot in found.view.slots if slot.loop is not None)


def _stack(found: Found) -> tuple[Piece, ...]:
    """The pieces of the stack: scans from the outside in, slices, then the equation's own."""
    slots = sorted(found.view.slots, key=lambda slot: math.inf if slot.loop is None else slot.loop)
    return (*((slot.stride, slot.size) for slot in slots), *_own_stack(found))


def _own_stack(found: Found) -> list[Piece]:
    return sorted(((abs(stride), size) for stride, size in found.stack), reverse=True)


def _matrix(uses: list[Found], size: int) -> Matrix | str:
    """The matrix that all uses of a kernel agree on, or the reason why there is none."""
    first = next((f for f in uses if KINDS[f.kind].one_hot), uses[0])
    stack, sides = _stack(first), (views.in_order(first.inputs), views.in_order(first.outputs))
    swapped = []
    for found in uses:
        given = (views.in_order(found.inputs), views.in_order(found.outputs))
        if found.view.cuts and not found.cuts:
            return "it is cut into unequal slices"
        if _stack(found) != stack or given not in (sides, sides[::-1]):
            return "its uses do not fit one matrix: they contract different axes"
        swapped.append(given != sides)
    if _split((*stack, *sides[0], *sides[1]), size) is None:
        return "only a part of it is used"
    return Matrix(stack, *sides, swapped)


def _as_parts(uses: list[Found], size: int) -> list[Found] | None:
    """The uses as parts of one matrix, where they agree on one."""

    def sides(found: Found) -> set:
        return {views.in_order(found.inputs), views.in_order(found.outputs)}

    ways = [of_whole_leaf(found) for found in uses]
    for first in ways[0]:
        fitting = [
            next((f for f in way if sides(f) == sides(first)), None) for way in [[first], *ways[1:]]
        ]
        found = [f for f in fitting if f is not None]
        if len(found) == len(uses) and not isinstance(_matrix(found, size), str):
            return found
    return None


def _split(pieces, size: int) -> list[Piece] | None:
    """The pieces as the leaf orders them, if they are the whole leaf."""
    ordered = sorted(pieces, reverse=True)
    inner = size
    for stride, length in ordered:
        inner //= length
        if stride != inner:
            return None
    return ordered if inner == 1 else None


def _axes(pieces, shape):
    """`kernel_split` and `kernel_axes` for pieces in a wanted order; None where they lie so."""
    ordered = _split(pieces, math.prod(shape)) or []
    split, axes = (
        tuple(size for _, size in ordered),
        tuple(ordered.index(piece) for piece in pieces),
    )
    if axes == tuple(range(len(axes))):
        return None, None
    return (None if split == tuple(shape) else split), axes


def _bias_axes(found: Found, shape) -> tuple[int, ...] | None:
    """The axes of a bias leaf in the order stack, outputs: () if they lie so; None: impossible."""
    pieces = views.merged(piece for piece in (*_stack(found), *found.outputs) if piece[1] > 1)
    ordered = _split(pieces, math.prod(shape))
    if ordered is None or list(pieces) == ordered:
        return None if ordered is None else ()
    own = [axis[0] for axis in views.whole(0, shape).axes if axis]
    if len(own) != len(shape) or sorted(own) != sorted(pieces):
        return None
    return tuple(own.index(piece) for piece in pieces)


def group(
    uses: dict[int, Found],
    refused: dict[int, str],
    unused: dict[int, str],
    paths,
    shapes,
    batch: int,
):
    """Makes layers of the uses of the leaves, and a `Use` of each use that has a tap, by number.

    Args:
      uses: the uses as the walk found them, by number, those without a gradient left out.
      refused: reasons, by leaf, for leaves that met the examples in a way no layer describes.
      unused: reasons for leaves without a use.
      paths: key paths of the leaves.
      shapes: their shapes.
      batch: number of examples.
    """
    keys = [jax.tree_util.keystr(path) for path in paths]
    by_leaf: dict[int, list[int]] = {}  # in the order of first use
    for number, found in uses.items():
        by_leaf.setdefault(found.view.source, []).append(number)
    untold = {found.view.source: found.untold for found in uses.values() if found.untold}
    uses, uncovered = dict(uses), untold | refused
    matrices = _matrices(uses, by_leaf, uncovered, shapes)
    biases = _biases(uses, by_leaf, matrices, uncovered, shapes)
    layers: dict[int, Layer] = {}
    for leaf, numbers in by_leaf.items():
        if leaf in uncovered or any(leaf == bias for bias, _ in biases.values()):
            continue
        own, shape, key = [uses[n] for n in numbers], shapes[leaf], keys[leaf]
        layer = (
            _kernel_layer(own, shape, key, matrices[leaf])
            if leaf in matrices
            else _elementwise_layer(own, shape, key, batch)
        )
        if isinstance(layer, str):
            uncovered[leaf] = layer
            continue
        if leaf in biases:
            bias, axes = biases[leaf]
            layer = dataclasses.replace(layer, bias=keys[bias], bias_axes=axes or None)
        layers[leaf] = layer
    for leaf in set(range(len(keys))).difference(by_leaf, uncovered):
        uncovered[leaf] = unused.get(
            leaf, "the loss does not depend on it; leave it out of the parameters"
        )
    taps = {}
    for leaf, name in zip(layers, _names([paths[leaf] for leaf in layers]), strict=True):
        layers[leaf] = dataclasses.replace(layers[leaf], name=name)
        shifts = by_leaf[biases[leaf][0]] if leaf in biases else []
        taps |= _uses(uses, by_leaf[leaf], layers[leaf], matrices.get(leaf), shifts, batch)
    return Layers(
        layers.values(), {keys[leaf]: reason for leaf, reason in sorted(uncovered.items())}
    ), taps


def _matrices(
    uses: dict[int, Found], by_leaf: dict[int, list[int]], uncovered: dict[int, str], shapes
) -> dict[int, Matrix]:
    """Finds the matrix of each kernel leaf; notes in `uncovered` why there is none.

    Where uses only agree without a stack of their own, `uses` is changed so.
    """
    matrices = {}
    for leaf, numbers in by_leaf.items():
        own, size = [uses[n] for n in numbers], math.prod(shapes[leaf])
        elementwise = {KINDS[found.kind].is_elementwise for found in own}
        if leaf in uncovered or elementwise == {True}:
            continue
        if len(elementwise) > 1:
            uncovered[leaf] = "it is used both as a kernel and element-wise"
            continue
        matrix = _matrix(own, size)
        if isinstance(matrix, str) and any(found.far for found in own):
            own = [without_own_stack(found) for found in own]
            for number, found in zip(numbers, own, strict=True):
                uses[number] = found
            matrix = _matrix(own, size)
        parts = _as_parts(own, size) if isinstance(matrix, str) else None
        if parts is not None:
            uses.update(zip(numbers, parts, strict=True))
            matrix = _matrix(parts, size)
        if len({found.made for found in own}) > 1:
            matrix = "its uses meet the data through different functions of it"
        if isinstance(matrix, str):
            uncovered[leaf] = matrix
        else:
            matrices[leaf] = matrix
    return matrices


def _biases(uses, by_leaf, matrices, uncovered, shapes) -> dict[int, tuple[int, tuple[int, ...]]]:
    """The bias leaf of a kernel leaf, all of whose uses follow the kernel's, and its axes."""
    biases = {}
    for leaf, numbers in by_leaf.items():
        partners = [uses[n].partner for n in numbers]
        if leaf in uncovered or None in partners:
            continue
        if not uses.keys() >= set(partners) or any(uses[p].cuts for p in partners):
            continue
        kernels = {uses[p].view.source for p in partners}
        kernel = min(kernels)
        if len(kernels) != 1 or kernel not in matrices or kernel in biases:
            continue
        own = by_leaf[kernel]
        straight = not any(matrices[kernel].swapped[own.index(p)] for p in partners)
        orders = {_bias_axes(uses[n], shapes[leaf]) for n in numbers}
        if (
            straight
            and len(set(partners)) == len(partners)
            and len(orders) == 1
            and None not in orders
        ):
            biases[kernel] = leaf, orders.pop()
    return biases


def _total(uses: list[Found], count) -> int:
    """Sums `count` over uses, and over steps of scans that share the leaf; of a cond one branch."""
    total, conds = 0, {}
    for found in uses:
        counted = count(found) * math.prod(length for length, own in found.loops if not own)
        if found.branch is None:
            total += counted
        else:
            cond, branch = found.branch
            conds.setdefault(cond, collections.Counter())[branch] += counted
    return total + sum(max(branches.values()) for branches in conds.values())


def _shared(uses: list[Found]) -> int:
    return _total(uses, lambda found: 1)


def _rows(found: Found) -> int:
    """Rows of one use, without scans."""
    return math.prod(
        size for role, pieces in found.output_segments if role == "row" for _, size in pieces
    )


def _kernel_layer(uses: list[Found], shape, kernel: str, matrix: Matrix) -> Layer:
    first = uses[matrix.swapped.index(False)]
    split, axes = _axes((*matrix.stack, *matrix.inputs, *matrix.outputs), shape)
    return Layer(
        name="?",
        kind=first.kind,
        kernel=kernel,
        bias=None,
        in_dim=size_of(matrix.inputs),
        out_dim=size_of(matrix.outputs),
        stack=tuple(size for _, size in matrix.stack),
        shared=_shared(uses),
        kernel_split=split,
        kernel_axes=axes,
        rows=_rows(first),
        made=first.made is not None,
    )


def _elementwise_layer(uses: list[Found], shape, key: str, batch: int) -> Layer | str:
    """A scale or shift; the reason why not if its uses differ too much."""
    loops = _loops(uses[0])
    for found in uses:
        if found.examples == LOST and batch > 1:
            return "the examples cannot be told apart where it is used"
        if _loops(found) != loops or any(stride < 0 for stride, _ in found.outputs):
            return "its uses run along different axes"
        if loops and _split((*loops, *views.in_order(found.outputs)), math.prod(shape)) is None:
            return "only a part of it is used in a scan"
    split, axes = (
        _axes((*loops, *views.in_order(uses[0].outputs)), shape) if loops else (None, None)
    )
    scale = any(found.kind == SCALE for found in uses)
    if split is not None and not scale:
        return "a scan walks along an inner axis of it"
    return Layer(
        name="?",
        kind=SCALE if scale else SHIFT,
        kernel=key if scale else None,
        bias=None if scale else key,
        in_dim=1 if scale else 0,
        out_dim=math.prod(shape) // size_of(loops),
        stack=tuple(length for _, length in loops),
        shared=_shared(uses),
        kernel_split=split,
        kernel_axes=axes if scale else None,
        bias_axes=None if scale else axes,
        rows=_rows(uses[0]),
    )


def _uses(uses, numbers, layer, matrix, shifts, batch) -> dict[int, Use]:
    """Describes what is measured at each use of a layer, whose bias has the uses `shifts`."""
    own = [uses[n] for n in numbers]
    rows, (told_apart, example_loop) = _total(own, _rows), _told_apart(own)
    biased, measured = {uses[n].partner for n in shifts}, {}
    for place, (number, found) in enumerate(zip(numbers, own, strict=True)):
        stack = [] if matrix is None else _own_stack(found)
        examples = found.examples if told_apart else None
        measured[number] = Use(
            layer=layer,
            found=found,
            inputs=views.arrangement(found.input_segments, stack, examples, batch),
            outputs=views.arrangement(found.output_segments, stack, examples, batch),
            swapped=matrix is not None and matrix.swapped[place],
            bias=number in biased,
            slots=()
            if matrix is None
            else tuple(s.index for s in found.view.slots if s.loop is None),
            input_places=None if matrix is None else places(found.inputs, found.cuts),
            output_places=None if matrix is None else places(found.outputs, found.cuts),
            gain=(1.0 if found.made is not None else found.view.gain) * found.sign,
            loops=tuple(own for _, own in found.loops),
            positions=_positions(found, layer) if matrix is None else None,
            batch=batch,
            examples=batch if told_apart else 1,
            example_loop=example_loop,
            rows=rows,
        )
    return measured


def _told_apart(uses: list[Found]) -> tuple[bool, int | None]:
    """Tells if all uses know the examples apart in one way, and returns their `example_loop`."""
    ways = {
        None if f.examples is None else (f.examples.axis is None, f.examples.loop) for f in uses
    }
    way = ways.pop()
    return (False, None) if ways or way in (None, (True, None)) else (True, way[1])


def _positions(found: Found, layer: Layer) -> np.ndarray | None:
    """See `Use`; in the order of its features."""
    if size_of(found.outputs) == layer.out_dim:
        return None
    pieces = sorted(found.outputs, reverse=True)
    steps = itertools.product(*(range(0, stride * size, stride) for stride, size in pieces))
    return np.array([found.view.offset + sum(step) for step in steps], np.int32)


def _names(paths) -> list[str]:
    """Finds short unique names: the module's path, or the leaf's where that is not unique."""
    # those of an nnx.State end in .value
    paths = [
        path[:-1] if len(path) > 1 and getattr(path[-1], "name", "") == "value" else path
        for path in paths
    ]
    full = ["/".join(_text(key) for key in path) or "params" for path in paths]
    short = ["/".join(_text(key) for key in path[:-1]) for path in paths]
    return [
        s if s and short.count(s) == 1 and s not in full else f
        for s, f in zip(short, full, strict=True)
    ]


def _text(key) -> str:
    """One entry of a key path as a word."""
    return str(
        next((getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name)), key)
    )
