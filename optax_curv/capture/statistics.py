"""Statistics of a layer: one small class for each, the table of them, and how they are collected.

Rows are inputs a and output gradients ḡ of the loss of the batch. A probe of zeros collects a
statistic (`probe`); each use of the layer adds its part in the backward pass (`contribution`); and
`finish` makes the statistic of the sum.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from optax_curv.capture._graph.uses import Use
from optax_curv.curvature import (
    EigenbasisMoments,
    FactorRows,
    InputFactor,
    InputRows,
    KroneckerFactors,
    RawSamples,
    counts_of_ids,
    factor_sums,
    moment_sums,
    second_moment,
)
from optax_curv.layers import Layer
from optax_curv.linalg._checks import widen
from optax_curv.typing import StatisticName

Arrays = dict[str, jax.Array]
Basis = tuple[jax.Array | None, jax.Array | None]  # (U_A, U_G), None for the identity


class Statistic(Protocol):
    """One kind of curvature, a row of `STATISTICS`."""

    def keeps_rows(self, layer: Layer) -> bool:
        """Whether the statistic of this layer is the rows of every use, which are not summed."""
        ...

    def kept(self, layer: Layer) -> tuple[str, ...]:
        """Names of the parts of rows that are kept.

        They are of "inputs", "features" (inputs without the bias's coordinate) and "output_grads".
        """
        ...

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """Shapes of what is summed over rows, by name."""
        ...

    def sums(self, layer: Layer, inputs: jax.Array, grads: jax.Array, basis: Basis) -> Arrays:
        """The sums over rows [*stack, R, ·]."""
        ...

    def finish(self, sums: Arrays) -> Any:
        """The statistic of a layer from the sums, A already divided by R, all else times N."""
        ...

    def finish_rows(self, uses: list[Use], samples: list[Arrays]) -> Any:
        """The statistic of a layer whose rows are kept, from those of each use."""
        ...


class Kronecker:
    """A = Σ a aᵀ / R and G = N Σ ḡ ḡᵀ."""

    def keeps_rows(self, layer: Layer) -> bool:
        """Returns False: rows are summed."""
        return False

    def kept(self, layer: Layer) -> tuple[str, ...]:
        """Returns the names of all parts of rows."""
        return "inputs", "output_grads"

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of A and G."""
        return dict(zip(("input", "output"), layer.factor_shapes, strict=True))

    def sums(self, layer: Layer, inputs: jax.Array, grads: jax.Array, basis: Basis) -> Arrays:
        """Returns Σ a aᵀ and Σ ḡ ḡᵀ."""
        return factor_sums(layer, inputs, grads)

    def finish(self, sums: Arrays) -> Any:
        """Returns the factors, of one batch."""
        return KroneckerFactors(sums["input"], sums["output"], jnp.ones([], jnp.int32))

    def finish_rows(self, uses: list[Use], samples: list[Arrays]) -> Any:
        """Is not called, as no rows are kept."""
        raise NotImplementedError


class Diagonal(Kronecker):
    """The diagonal of the Fisher, N Σ a² (ḡ²)ᵀ."""

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """Returns the shape of the layer as a matrix."""
        return {"moments": (*layer.stack, layer.rows_of_matrix, layer.out_dim)}

    def sums(self, layer: Layer, inputs: jax.Array, grads: jax.Array, basis: Basis) -> Arrays:
        """Returns Σ a² (ḡ²)ᵀ."""
        return moment_sums(layer, inputs, grads, (None, None))

    def finish(self, sums: Arrays) -> Any:
        """Returns the diagonal."""
        return sums["moments"]


class Eigenbasis(Kronecker):
    """Kronecker factors, and second moments of the gradient in a given eigenbasis."""

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of A, G and the moments."""
        return super().shapes(layer) | Diagonal().shapes(layer)

    def sums(self, layer: Layer, inputs: jax.Array, grads: jax.Array, basis: Basis) -> Arrays:
        """Returns the sums of both."""
        return factor_sums(layer, inputs, grads) | moment_sums(layer, inputs, grads, basis)

    def finish(self, sums: Arrays) -> Any:
        """Returns factors and moments."""
        a, g, count = super().finish(sums)
        return EigenbasisMoments(a, g, count, sums["moments"])


class Raw(Kronecker):
    """All rows, with output gradients of one example's own loss."""

    def keeps_rows(self, layer: Layer) -> bool:
        """Returns True."""
        return True

    def finish_rows(self, uses: list[Use], samples: list[Arrays]) -> Any:
        """Returns the rows of all uses, one after the other."""
        rows = rows_together(uses, samples)
        return rows._replace(output_grads=rows.output_grads * uses[0].batch)


class Rows(Kronecker):
    """All rows with their weights, of which factors are made later; of scales the factors."""

    def keeps_rows(self, layer: Layer) -> bool:
        """Returns whether the layer has rows: a scale or shift has one gradient an example."""
        return not layer.is_elementwise

    def finish_rows(self, uses: list[Use], samples: list[Arrays]) -> Any:
        """Returns the rows of all uses, and the weights 1 / R and N."""
        rows, one = rows_together(uses, samples), uses[0]
        weights = jnp.array([1 / one.rows, one.batch], rows.output_grads.dtype)
        return FactorRows(rows.inputs, rows.output_grads, weights)


class Input(Kronecker):
    """A = Σ a aᵀ / R alone: full ones as rows of which it is made later, diagonal ones at once."""

    def keeps_rows(self, layer: Layer) -> bool:
        """Returns True."""
        return True

    def kept(self, layer: Layer) -> tuple[str, ...]:
        """Returns the features, or nothing of a scale or shift, whose A is the number 1."""
        return () if layer.is_elementwise else ("features",)

    def finish_rows(self, uses: list[Use], samples: list[Arrays]) -> Any:
        """Returns the inputs of all uses and the weight 1 / R, or the factor."""
        layer, one = uses[0].layer, jnp.ones([], jnp.int32)
        if layer.is_elementwise:
            return InputFactor(jnp.ones(layer.factor_shapes[0], jnp.float32), one)
        inputs, last = _inputs_together(uses, samples, "features"), None
        if layer.bias is not None:
            ones = [{"last": _last_coordinate(*both)} for both in zip(uses, samples, strict=True)]
            last = jnp.concatenate(_by_use(uses, ones, "last"), axis=len(layer.stack))
        if layer.input_factor == "full":
            return InputRows(inputs, jnp.asarray(1 / uses[0].rows, inputs.dtype), last)
        if last is not None:
            inputs = jnp.concatenate([inputs, last[..., None].astype(inputs.dtype)], axis=-1)
        if inputs.dtype == jnp.int32:
            sums = counts_of_ids(inputs, layer.in_dim, jnp.ones(inputs.shape, jnp.float32))
        else:
            sums = second_moment(inputs, full=False)
        return InputFactor(sums.astype(samples[0]["features"].dtype) / uses[0].rows, one)


def _last_coordinate(use: Use, sample: Arrays) -> jax.Array:
    """The bias's coordinate of the rows of one use: 1 where it adds the bias, in its own slices."""
    zeros = jnp.zeros_like(sample["features"][..., 0])
    own = (*(slice(None) for _ in use.loops), *use.slots)
    return zeros.at[own].set(1) if use.bias else zeros


STATISTICS: dict[StatisticName, Statistic] = {
    "kronecker": Kronecker(),
    "diagonal": Diagonal(),
    "eigenbasis": Eigenbasis(),
    "raw": Raw(),
    "rows": Rows(),
    "input": Input(),
}


def rows_of(use: Use, operands: tuple, grad: jax.Array) -> tuple[jax.Array | None, jax.Array]:
    """Inputs and output gradients of one use, [*stack, examples, positions, features].

    One-hot inputs are row numbers, without features. A scale or shift has no inputs, and its own
    gradient in place of its output's.
    """
    grad = _part(grad, use.found.windows[1])
    if use.layer.is_elementwise:
        return None, _own_gradient(use, operands, grad)
    x = _part(operands[0], use.found.windows[0])
    if use.found.conv is not None:
        x = lax.conv_general_dilated_patches(x, *use.found.conv, precision=lax.Precision.HIGHEST)
    if use.one_hot:
        x = _row_numbers(use, x)
    inputs, grads = use.inputs(x), _placed(use.outputs(grad), use.output_places, use.widths[1])
    # Inputs may be shared by all examples, or by the members of an ensemble.
    if inputs.shape[:-1] != grads.shape[:-1]:
        inputs = jnp.broadcast_to(inputs, (*grads.shape[:-1], inputs.shape[-1]))
    if use.one_hot:
        return inputs[..., 0], grads
    inputs = _placed(inputs, use.input_places, use.widths[0])
    if use.gain != 1.0:
        inputs = inputs * use.gain
    for number in _factors(use, operands[1:]):
        inputs = inputs * number.astype(inputs.dtype)
    if use.swapped:  # which keeps the product, and the scale of the other uses' factors
        inputs, grads = grads * use.rows, inputs / use.rows
    if use.layer.bias is not None:
        one = jnp.full((*inputs.shape[:-1], 1), 1 if use.bias else 0, inputs.dtype)
        inputs = jnp.concatenate([inputs, one], axis=-1)
    return inputs, grads


def _factors(use: Use, operands: tuple) -> list:
    """The operands that scale a leaf, those that divide it inverted."""
    first = len(operands) - use.found.divisors
    return [*operands[:first], *(1 / divisor for divisor in operands[first:])]


def _row_numbers(use: Use, ids: jax.Array) -> jax.Array:
    """The numbers of the rows that a look-up reads; what it fills has none, and is not counted."""
    column, places = use.found.column, use.input_places
    ids = jnp.asarray(ids if column is None else ids[..., column], jnp.int32)
    last = (use.layer.in_dim if places is None else len(places)) - 1
    inside = jnp.clip(ids, 0, last)
    rows = inside if places is None else jnp.asarray(places)[inside]
    return rows if use.found.clips else jnp.where(ids == inside, rows, use.layer.in_dim)


def _own_gradient(use: Use, operands: tuple, grad: jax.Array) -> jax.Array:
    """The gradient of a scale or shift in each row, its coefficients included."""
    grad = widen(grad) * use.gain
    if use.found.choice is not None:
        operands = (operands[0] == use.found.choice, *operands[1:])
    for operand in _factors(use, operands):
        grad = grad * operand
    return _placed(use.outputs(grad), use.positions, use.layer.out_dim)


def _placed(rows: jax.Array, places: Any, width: int) -> jax.Array:
    """Rows of a part of a leaf as rows of the whole, zero elsewhere; None: they are already."""
    if places is None:
        return rows
    return jnp.zeros((*rows.shape[:-1], width), rows.dtype).at[..., places].set(rows)


def _part(x: jax.Array, window: tuple[int, int, int] | None) -> jax.Array:
    """A part (axis, start, size) of an array; None: all of it."""
    if window is None:
        return x
    axis, start, size = window
    return lax.slice_in_dim(x, start, start + size, axis=axis)


def _flat(x: jax.Array, stack: int) -> jax.Array:
    """Every row as an example: [*stack, examples · positions, ...]."""
    return x.reshape(*x.shape[:stack], -1, *x.shape[stack + 2 :])


def sums_examples(layer: Layer, reduces: bool) -> bool:
    """Whether rows are summed for each example before they are squared."""
    return reduces or layer.is_elementwise


def probe(statistic: Statistic, reduces: bool, use: Use, dtype: Any) -> Arrays:
    """The zeros that collect a statistic: of a whole layer, or for kept rows of one use.

    Args:
      statistic: the statistic.
      reduces: whether `sharing` is "reduce".
      use: a use of the layer; the one measured, where rows are kept.
      dtype: of the zeros.
    """
    layer = use.layer
    if statistic.keeps_rows(layer):
        shapes = _shapes_of_rows(use)
        shapes = {name: shapes[name] for name in statistic.kept(layer)}
    elif sums_examples(layer, reduces):
        shapes = _shapes_by_example(use)
    else:
        shapes = statistic.shapes(layer)
    return {name: jnp.zeros(shape, dtype) for name, shape in shapes.items()}


def _shapes_of_rows(use: Use) -> dict[str, tuple[int, ...]]:
    layer, (examples, positions) = use.layer, use.outputs.shape[-3:-1]
    stacked = sum(use.loops)
    lead = (
        *(length for length, _ in use.found.loops),
        *layer.stack[stacked : stacked + len(use.slots)],
        *use.outputs.shape[:-3],
        examples * (1 if layer.is_elementwise else positions),
    )
    numbers = use.one_hot or layer.is_elementwise
    inputs = lead if numbers else (*lead, layer.rows_of_matrix)
    features = lead if numbers else (*lead, layer.in_dim)
    return {"inputs": inputs, "features": features, "output_grads": (*lead, layer.out_dim)}


def _shapes_by_example(use: Use) -> dict[str, tuple[int, ...]]:
    layer = use.layer
    lead = (*layer.stack, use.examples)
    if use.example_loop is not None:  # the probe is sliced along that loop, too
        outer = sum(use.loops[: use.example_loop])
        lead = (*layer.stack[:outer], use.examples, *layer.stack[outer:], 1)
    shapes = {"grads": (*lead, layer.out_dim)}
    return shapes if layer.is_elementwise else shapes | {"inputs": (*lead, layer.rows_of_matrix)}


def contribution(
    statistic: Statistic,
    reduces: bool,
    use: Use,
    operands: tuple,
    grad: jax.Array,
    zeros: Arrays,
    basis: Basis,
) -> Arrays:
    """Returns the part of one use in its probe, from its operands and its output's gradient."""
    inputs, grads = rows_of(use, operands, grad)
    stack = grads.ndim - 3
    if statistic.keeps_rows(use.layer):
        if inputs is None:
            grads = jnp.sum(grads, axis=-2, keepdims=True)
            inputs = jnp.ones(grads.shape[:-1], grads.dtype)
        found = {"inputs": _flat(inputs, stack), "output_grads": widen(_flat(grads, stack))}
        numbers = use.one_hot or use.layer.is_elementwise
        found["features"] = found["inputs"][..., slice(None if numbers else use.layer.in_dim)]
    elif inputs is None or sums_examples(use.layer, reduces):
        found = _example_sums(use, inputs, grads)
    else:
        left, right = (u if u is None else u[use.slots] for u in basis)
        rows = _flat(inputs, stack), _flat(grads, stack)
        found = statistic.sums(use.layer, *rows, (left, right))
    placed = {}
    for name, zero in zeros.items():
        value = found[name].astype(zero.dtype)
        placed[name] = jnp.zeros_like(zero).at[use.slots].set(value) if use.slots else value
    return placed


def _example_sums(use: Use, inputs: jax.Array | None, grads: jax.Array) -> Arrays:
    """Sums over the positions of each example."""
    sums = {"grads": jnp.sum(widen(grads), axis=-2)}
    if inputs is not None:
        if use.one_hot:
            inputs = jax.nn.one_hot(inputs, use.layer.in_dim, dtype=jnp.float32)
        sums["inputs"] = jnp.sum(widen(inputs), axis=-2)
    merge = use.examples == 1
    return {name: jnp.sum(x, axis=-2, keepdims=True) if merge else x for name, x in sums.items()}


def finish(statistic: Statistic, reduces: bool, use: Use, sums: Arrays, basis: Basis) -> Any:
    """The statistic of a layer from the sum over all its uses, of which one is given.

    A = Σ a aᵀ / R and G = N Σ ḡ ḡᵀ; where rows were summed for each example first, inputs are
    averaged, and R = N.
    """
    layer, rows = use.layer, use.rows
    if sums_examples(layer, reduces):
        if use.example_loop is not None:
            outer = sum(use.loops[: use.example_loop])
            sums = {name: jnp.moveaxis(x, outer, -3)[..., 0, :] for name, x in sums.items()}
        grads, rows = sums["grads"], use.examples
        if "inputs" in sums:
            inputs = sums["inputs"] * (use.examples / use.rows)
        else:
            inputs = jnp.ones((*grads.shape[:-1], 1), grads.dtype)
        sums = statistic.sums(layer, inputs, grads, basis)
    return statistic.finish(
        {name: x * (1 / rows if name == "input" else use.batch) for name, x in sums.items()}
    )


def rows_together(uses: list[Use], samples: list[Arrays]) -> RawSamples:
    """All rows of a layer [*stack, R, ·], from the samples of each of its uses."""
    stack = len(uses[0].layer.stack)
    grads = jnp.concatenate(_by_use(uses, samples, "output_grads"), axis=stack)
    return RawSamples(_inputs_together(uses, samples, "inputs"), grads)


def _by_use(uses: list[Use], samples: list[Arrays], name: str) -> list[jax.Array]:
    """The inputs or output gradients of each use, [*stack, R, ·]."""
    stack, found = len(uses[0].layer.stack), []
    for use, sample in zip(uses, samples, strict=True):
        own = [axis for axis, stacked in enumerate(use.loops) if stacked]
        shared = [axis for axis, stacked in enumerate(use.loops) if not stacked]
        first = len(use.loops)
        rows = first + stack - len(own)
        x = sample[name]
        x = x.transpose([*own, *range(first, rows), *shared, *range(rows, x.ndim)])
        last = x.shape[stack + len(shared) + 1 :]
        found.append(x.reshape(*x.shape[:stack], -1, *last))
    return found


def _inputs_together(uses: list[Use], samples: list[Arrays], name: str) -> jax.Array:
    """The inputs of all uses, [*stack, R, in], or row numbers, int32 [*stack, R]."""
    layer, numbers = uses[0].layer, [use.one_hot for use in uses]
    inputs = _by_use(uses, samples, name)
    if any(numbers) and not all(numbers):  # a tied table: as rows, like those of its other uses
        inputs = [
            jax.nn.one_hot(x.astype(jnp.int32), layer.in_dim, dtype=x.dtype) if own else x
            for own, x in zip(numbers, inputs, strict=True)
        ]
    joined = jnp.concatenate(inputs, axis=len(layer.stack))
    return joined.astype(jnp.int32) if all(numbers) else joined


def joined(rows: Any) -> Any:
    """Takes rows of all cotangents, [positions, columns, *stack, R, ·], as rows of one."""
    if isinstance(rows, KroneckerFactors):  # of a scale or shift, whose A is the same for all
        return KroneckerFactors(
            rows.input_factor[0, 0], jnp.sum(rows.output_factor, (0, 1)), rows.count[0, 0]
        )
    (positions, columns), axis = rows.output_grads.shape[:2], rows.output_grads.ndim - 4
    count = positions * columns

    def join(x):
        x = jnp.moveaxis(x.reshape(count, *x.shape[2:]), 0, axis)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    inputs, output_grads = join(rows.inputs), join(rows.output_grads)
    if isinstance(rows, RawSamples):
        return RawSamples(inputs, output_grads * jnp.sqrt(float(count)))
    weights = rows.weights[0, 0] / jnp.array([count, 1], rows.weights.dtype)
    return FactorRows(inputs, output_grads, weights)
