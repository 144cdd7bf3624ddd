"""From the uses that the walk found to layers: which uses belong to one layer, and what is measured at each."""

import dataclasses
import itertools
import math
from typing import Any

import jax
import numpy as np

from optax_curv.capture import layouts
from optax_curv.capture.layers import Layer, Layers
from optax_curv.capture.layouts import Arrangement, Piece, size_of
from optax_curv.capture.marks import Examples, Found
from optax_curv.capture.products import without_own_stack

ELEMENTWISE = ("scale", "shift")


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """One use of a layer: everything static that its statistics need.

    Attributes:
      layer: the layer.
      kind: the kind of this use.
      inputs, outputs: how input and output become [*stack, examples, positions, features].
      windows: parts of input and output that belong to this layer, see `Found`.
      conv: how to take patches, or None.
      swapped: whether the input lies on the side of the layer's outputs, as where a tied embedding makes logits.
      bias: whether the bias is added to this use's output.
      slots: static index into the stack for each slice of the leaf, after the scans' axes.
      gain: number that multiplies the kernel (or the scale, or the shift).
      loops: for each scan around it, whether the layer's stack runs along it.
      positions: entries of the leaf that a shift or scale touches, None for all.
      batch: number of examples.
      examples: number of examples that can be told apart, `batch` or 1.
      example_loop: depth of the scan that walks from example to example; None: the examples are in the rows.
      rows: rows of all uses of the layer, R.
    """

    layer: Layer
    kind: str
    inputs: Arrangement | None
    outputs: Arrangement
    windows: tuple
    conv: tuple | None
    swapped: bool
    bias: bool
    slots: tuple[int, ...]
    gain: float
    loops: tuple[bool, ...]
    positions: Any
    batch: int
    examples: int
    example_loop: int | None
    rows: int
    found: Found


@dataclasses.dataclass
class Matrix:
    """One leaf as a matrix [*stack, inputs, outputs], or the reason why it is none."""

    stack: tuple[Piece, ...] = ()
    inputs: tuple[Piece, ...] = ()
    outputs: tuple[Piece, ...] = ()
    swapped: tuple[bool, ...] = ()
    reason: str = ""


def _stack(found: Found) -> tuple[Piece, ...]:
    """The stack's pieces: scans from the outside in, slices, then the equation's own."""
    loops = sorted((s for s in found.view.slots if s.loop is not None), key=lambda slot: slot.loop or 0)
    fixed = [s for s in found.view.slots if s.loop is None]
    own = sorted(((abs(stride), size) for stride, size in found.stack), reverse=True)
    return (*((s.stride, s.size) for s in (*loops, *fixed)), *own)


def _matrix(uses: list[Found], size: int) -> Matrix:
    """The matrix that all uses of a kernel agree on; a use may have its sides swapped."""
    first = next((f for f in uses if f.kind == "embedding"), uses[0])
    stack, sides = _stack(first), (layouts.in_order(first.inputs), layouts.in_order(first.outputs))
    swapped = []
    for found in uses:
        given = (layouts.in_order(found.inputs), layouts.in_order(found.outputs))
        if not found.view.aligned:
            return Matrix(reason="it is cut into unequal slices")
        if _stack(found) != stack or given not in (sides, sides[::-1]):
            return Matrix(reason="its uses do not fit one matrix: they contract different axes")
        swapped.append(given != sides)
    if _split((*stack, *sides[0], *sides[1]), size) is None:
        return Matrix(reason="only a part of it is used")
    return Matrix(stack, *sides, swapped=tuple(swapped))


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
    """`kernel_split` and `kernel_axes` of pieces in a wanted order; None where the leaf lies so already."""
    ordered = _split(pieces, math.prod(shape)) or []
    split, axes = tuple(size for _, size in ordered), tuple(ordered.index(piece) for piece in pieces)
    if axes == tuple(range(len(axes))):
        return None, None
    return (None if split == tuple(shape) else split), axes


def _bias_axes(found: Found, shape) -> tuple[bool, tuple[int, ...] | None]:
    """Whether a bias leaf in the order stack, outputs is a permutation of its own axes, and which."""
    pieces = layouts.merged(piece for piece in (*_stack(found), *found.outputs) if piece[1] > 1)
    ordered = _split(pieces, math.prod(shape))
    if ordered is None:
        return False, None
    if list(pieces) == ordered:
        return True, None
    own = [axis[0] for axis in layouts.whole(0, tuple(shape)).axes if axis]
    if len(own) != len(shape) or sorted(own) != sorted(pieces):
        return False, None
    return True, tuple(own.index(piece) for piece in pieces)


def group(uses: list[Found], refused: dict[int, str], unused: dict[int, str], paths, shapes, batch: int):
    """Groups uses into layers.

    Args:
      uses: what the walk found.
      refused: leaves that met the examples in a way no layer describes.
      unused: reason for leaves without any use.
      paths: key path of each leaf (tuples of JAX key entries).
      shapes: shape of each leaf.
      batch: number of examples.

    Returns:
      The layers, and the `Use` of each use that has a tap, by its number.
    """
    keys = [jax.tree_util.keystr(path) for path in paths]
    by_leaf: dict[int, list[int]] = {}
    for number, found in enumerate(uses):
        by_leaf.setdefault(found.view.source, []).append(number)
    uncovered, matrices = dict(refused), {}
    for leaf, numbers in by_leaf.items():
        kinds = {uses[n].kind in ELEMENTWISE for n in numbers}
        if leaf in uncovered:
            continue
        if kinds == {True, False}:
            uncovered[leaf] = "it is used both as a kernel and element-wise"
        elif kinds == {False}:
            matrix = _matrix([uses[n] for n in numbers], math.prod(shapes[leaf]))
            if matrix.reason and any(uses[n].far for n in numbers):
                matrix = _matrix([without_own_stack(uses[n]) for n in numbers], math.prod(shapes[leaf]))
            if matrix.reason:
                uncovered[leaf] = matrix.reason
            else:
                matrices[leaf] = matrix
    biases = _biases(uses, by_leaf, matrices, uncovered, shapes)
    drafts = []  # layer without its final name, numbers of its uses, canonical pieces
    for leaf, numbers in sorted(by_leaf.items(), key=lambda item: min(item[1])):
        if leaf in uncovered or leaf in biases.values():
            continue
        if leaf in matrices:
            drafts.append(_kernel_layer(uses, numbers, leaf, matrices[leaf], biases.get(leaf), keys, shapes))
        else:
            draft = _elementwise_layer(uses, numbers, leaf, keys, shapes)
            if isinstance(draft, str):
                uncovered[leaf] = draft
            else:
                drafts.append(draft)
    names = _names([paths[leaf] for leaf, _, _ in drafts])
    drafts = [
        (leaf, dataclasses.replace(layer, name=name), n) for (leaf, layer, n), name in zip(drafts, names, strict=True)
    ]
    for leaf in range(len(keys)):
        if leaf not in by_leaf:
            uncovered.setdefault(
                leaf, unused.get(leaf, "the loss does not depend on it; leave it out of the parameters")
            )
    layers = Layers(
        [layer for _, layer, _ in drafts], {keys[leaf]: reason for leaf, reason in sorted(uncovered.items())}
    )
    taps = {}
    for leaf, layer, numbers in drafts:
        taps |= _uses(uses, numbers, layer, matrices.get(leaf), biases.get(leaf), batch)
    return layers, taps


def _biases(uses, by_leaf, matrices, uncovered, shapes) -> dict[int, int]:
    """The bias leaf of each kernel leaf that has one: all its uses follow uses of that kernel."""
    biases: dict[int, int] = {}
    for leaf, numbers in by_leaf.items():
        partners = [uses[n].partner for n in numbers]
        if leaf in uncovered or None in partners:
            continue
        kernels = {uses[p].view.source for p in partners}
        kernel = min(kernels)
        if len(kernels) != 1 or kernel not in matrices or kernel in biases:
            continue
        own = by_leaf[kernel]
        straight = not any(matrices[kernel].swapped[own.index(p)] for p in partners)
        orders = {_bias_axes(uses[n], shapes[leaf]) for n in numbers}
        if straight and len(set(partners)) == len(partners) and len(orders) == 1 and orders.pop()[0]:
            biases[kernel] = leaf
    return biases


def _shared(uses, numbers) -> int:
    """How often a leaf is used in one call."""
    return _over_branches([(uses[n], math.prod(n for n, own in uses[n].loops if not own)) for n in numbers])


def _rows(found: Found) -> int:
    """Rows of one use, without scans."""
    return math.prod(size for role, pieces in found.output_segments if role == "row" for _, size in pieces)


def _over_branches(counted) -> int:
    """A sum over uses, of which only one branch of each cond runs."""
    total, conds = 0, {}
    for found, count in counted:
        if found.branch is None:
            total += count
        else:
            branches = conds.setdefault(found.branch[0], {})
            branches[found.branch[1]] = branches.get(found.branch[1], 0) + count
    return total + sum(max(branches.values()) for branches in conds.values())


def _kernel_layer(uses, numbers, leaf, matrix, bias, keys, shapes):
    first = uses[numbers[matrix.swapped.index(False)]]
    split, axes = _axes((*matrix.stack, *matrix.inputs, *matrix.outputs), shapes[leaf])
    bias_axes = None
    if bias is not None:
        shift = next(f for f in uses if f.view.source == bias)
        bias_axes = _bias_axes(shift, shapes[bias])[1]
    layer = Layer(
        name="?",
        kind=first.kind,
        kernel=keys[leaf],
        bias=None if bias is None else keys[bias],
        in_dim=size_of(matrix.inputs),
        out_dim=size_of(matrix.outputs),
        stack=tuple(size for _, size in matrix.stack),
        shared=_shared(uses, numbers),
        kernel_split=split,
        kernel_axes=axes,
        bias_axes=bias_axes,
        rows=_rows(first),
    )
    return leaf, layer, numbers


def _elementwise_layer(uses, numbers, leaf, keys, shapes):
    """A scale or shift; the reason why not if its uses differ too much."""
    size, found = math.prod(shapes[leaf]), [uses[n] for n in numbers]
    loops = tuple((s.stride, s.size) for s in found[0].view.slots if s.loop is not None)
    whole = (*loops, *layouts.in_order(found[0].outputs))
    for f in found:
        own = tuple((s.stride, s.size) for s in f.view.slots if s.loop is not None)
        if f.examples == Examples():
            return "the examples cannot be told apart where it is used"
        if own != loops or any(stride < 0 for stride, _ in f.outputs):
            return "its uses run along different axes"
        if loops and _split((*own, *layouts.in_order(f.outputs)), size) is None:
            return "only a part of it is used in a scan"
    split, axes = _axes(whole, shapes[leaf]) if loops else (None, None)
    scale = any(f.kind == "scale" for f in found)
    if split is not None and not scale:
        return "a scan walks along an inner axis of it"
    layer = Layer(
        name="?",
        kind="scale" if scale else "shift",
        kernel=keys[leaf] if scale else None,
        bias=None if scale else keys[leaf],
        in_dim=1 if scale else 0,
        out_dim=size // size_of(loops),
        stack=tuple(length for _, length in loops),
        shared=_shared(uses, numbers),
        kernel_split=split,
        kernel_axes=axes if scale else None,
        bias_axes=None if scale else axes,
        rows=_rows(found[0]),
    )
    return leaf, layer, numbers


def _uses(uses, numbers, layer, matrix, bias, batch) -> dict[int, Use]:
    """What is measured at each use of one layer."""
    rows = _over_branches(
        [(uses[n], _rows(uses[n]) * math.prod(length for length, own in uses[n].loops if not own)) for n in numbers]
    )
    told_apart, example_loop = _told_apart([uses[n] for n in numbers])
    biased = {f.partner for f in uses if bias is not None and f.view.source == bias}
    measured = {}
    for place, number in enumerate(numbers):
        found = uses[number]
        stack = sorted(((abs(stride), size) for stride, size in found.stack), reverse=True)
        if layer.kind in ELEMENTWISE:
            stack = []
        fixed = tuple(s.index for s in found.view.slots if s.loop is None)
        arranged = [
            layouts.arrangement(segments, stack, found.examples if told_apart else None, batch)
            for segments in (found.input_segments, found.output_segments)
        ]
        measured[number] = Use(
            layer=layer,
            kind=found.kind,
            inputs=arranged[0],
            outputs=arranged[1],
            windows=found.windows,
            conv=found.conv,
            swapped=matrix is not None and matrix.swapped[place],
            bias=number in biased,
            slots=fixed if matrix is not None else (),
            gain=found.view.gain * found.sign,
            loops=tuple(own for _, own in found.loops),
            positions=_positions(found, layer) if matrix is None else None,
            batch=batch,
            examples=batch if told_apart else 1,
            example_loop=example_loop,
            rows=rows,
            found=found,
        )
    return measured


def _told_apart(uses: list[Found]) -> tuple[bool, int | None]:
    """Whether all uses of a layer tell the examples apart in one way, and the `example_loop` of each `Use`."""
    ways = {None if f.examples is None else (f.examples.row is None, f.examples.loop) for f in uses}
    way = ways.pop()
    return (False, None) if ways or way in (None, (True, None)) else (True, way[1])


def _positions(found: Found, layer: Layer):
    """Entries of the leaf that a scale or shift touches, in the order of its features; None for all."""
    if size_of(found.outputs) == layer.out_dim:
        return None
    pieces = sorted(found.outputs, reverse=True)
    steps = itertools.product(*(range(0, stride * size, stride) for stride, size in pieces))
    return np.array([found.view.offset + sum(step) for step in steps], np.int32)


def _names(paths) -> list[str]:
    """A short unique name for each layer: the module's path, or the leaf's where that is not unique."""
    # an nnx.State's paths end in .value, which says nothing
    paths = [path[:-1] if len(path) > 1 and getattr(path[-1], "name", "") == "value" else path for path in paths]
    full = ["/".join(_text(key) for key in path) or "params" for path in paths]
    short = ["/".join(_text(key) for key in path[:-1]) for path in paths]
    return [s if s and short.count(s) == 1 and s not in full else f for s, f in zip(short, full, strict=True)]


def _text(key) -> str:
    """One entry of a key path as a word."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
