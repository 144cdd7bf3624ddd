"""What is measured at a layer: the probe that collects a statistic, what one use adds to it, and what the sum becomes.

Rows are inputs a and output gradients ḡ of the loss of the batch.
"""

import jax
import jax.numpy as jnp
from jax import lax

from optax_curv.curvature import (
    EigenbasisMoments,
    FactorRows,
    KroneckerFactors,
    RawSamples,
    quadratic_sums,
)
from optax_curv.layers import ELEMENTWISE
from optax_curv.linalg._checks import widen


def rows_of(use, operands, grad) -> tuple[jax.Array | None, jax.Array]:
    """Inputs and output gradients of one use, [*stack, examples, positions, features]."""
    # one-hot inputs have no features; a scale or shift has no inputs, and its own gradient
    found = use.found
    grad = _part(grad, found.windows[1])
    if use.layer.kind in ELEMENTWISE:
        grad = widen(grad) * use.gain
        if found.choice is not None:
            operands = (operands[0] == found.choice, *operands[1:])
        for operand in operands:
            grad = grad * operand
        rows = use.outputs(grad)
        if use.positions is not None:
            rows = (
                jnp.zeros((*rows.shape[:-1], use.layer.out_dim), rows.dtype)
                .at[..., use.positions]
                .set(rows)
            )
        return None, rows
    x = _part(operands[0], found.windows[0])
    if found.conv is not None:
        x = lax.conv_general_dilated_patches(x, *found.conv, precision=lax.Precision.HIGHEST)
    inputs, grads = use.inputs(x if found.kind != "embedding" else x[..., 0]), use.outputs(grad)
    if (
        inputs.shape[:-1] != grads.shape[:-1]
    ):  # the same for all examples, or members of an ensemble
        inputs = jnp.broadcast_to(inputs, (*grads.shape[:-1], inputs.shape[-1]))
    if found.kind == "embedding":
        return inputs[..., 0], grads
    if use.gain != 1.0:
        inputs = inputs * use.gain
    if use.swapped:  # which keeps the product, and the scale of the other uses' factors
        inputs, grads = grads * use.rows, inputs / use.rows
    if use.layer.bias is not None:
        one = jnp.full((*inputs.shape[:-1], 1), 1 if use.bias else 0, inputs.dtype)
        inputs = jnp.concatenate([inputs, one], axis=-1)
    return inputs, grads


def _part(x, window):
    """A part (axis, start, size) of an array; None: all of it."""
    return (
        x
        if window is None
        else lax.slice_in_dim(x, window[1], window[1] + window[2], axis=window[0])
    )


def _flat(x, stack: int):
    """Every row an example: [*stack, examples · positions, ...]."""
    return x.reshape(*x.shape[:stack], -1, *x.shape[stack + 2 :])


def is_linear(layer, sharing: str) -> bool:
    """Whether rows are summed for each example before they are squared."""
    return sharing == "reduce" or layer.kind in ELEMENTWISE


def keeps_rows(statistic: str, layer) -> bool:
    """Whether a statistic is the rows of every use on its own; "rows" has the factors of scales and shifts."""
    return statistic == "raw" or (statistic == "rows" and not is_linear(layer, "expand"))


def probe(statistic: str, sharing: str, use, dtype) -> dict[str, jax.Array]:
    """The zeros that collect a statistic: of a whole layer, or for rows of one use inside its scans."""
    layer = use.layer
    rows, out = layer.rows_of_matrix, layer.out_dim
    if keeps_rows(statistic, layer):
        examples, positions = use.outputs.shape[-3:-1]
        stacked, elementwise = sum(use.loops), layer.kind in ELEMENTWISE
        loops = (length for length, _ in use.found.loops)
        lead = (*loops, *layer.stack[stacked : stacked + len(use.slots)], *use.outputs.shape[:-3])
        lead = (*lead, examples * (1 if elementwise else positions))
        ids = use.found.kind == "embedding" or elementwise
        shapes = {"inputs": lead if ids else (*lead, rows), "output_grads": (*lead, out)}
    elif is_linear(layer, sharing):
        lead = (*layer.stack, use.examples)
        if use.example_loop is not None:  # along which the probe is sliced too
            outer = sum(use.loops[: use.example_loop])
            lead = (*layer.stack[:outer], use.examples, *layer.stack[outer:], 1)
        shapes = {"inputs": (*lead, rows), "grads": (*lead, out)}
        if layer.kind in ELEMENTWISE:
            del shapes["inputs"]
    else:
        input_shape, output_shape = layer.factor_shapes
        shapes = {} if statistic == "diagonal" else {"input": input_shape, "output": output_shape}
        shapes |= {} if statistic == "kronecker" else {"moments": (*layer.stack, rows, out)}
    return {name: jnp.zeros(shape, dtype) for name, shape in shapes.items()}


def contribution(
    statistic: str, sharing: str, use, operands, grad, zeros, basis
) -> dict[str, jax.Array]:
    """What one use adds to its probe."""
    inputs, grads = rows_of(use, operands, grad)
    stack = grads.ndim - 3
    if keeps_rows(statistic, use.layer):
        if inputs is None:
            grads = jnp.sum(grads, axis=-2, keepdims=True)
            inputs = jnp.ones(grads.shape[:-1], grads.dtype)
        grads = widen(_flat(grads, stack))
        found = {
            "inputs": _flat(inputs, stack),
            "output_grads": grads * use.batch if statistic == "raw" else grads,
        }
    elif is_linear(use.layer, sharing):
        found = _example_sums(use, inputs, grads)
    else:
        basis = tuple(u if u is None else u[use.slots] for u in basis)
        found = quadratic_sums(
            statistic, use.layer, _flat(inputs, stack), _flat(grads, stack), basis
        )
    placed = {}
    for name, value in found.items():
        value = value.astype(zeros[name].dtype)
        placed[name] = jnp.zeros_like(zeros[name]).at[use.slots].set(value) if use.slots else value
    return placed


def _example_sums(use, inputs, grads):
    """Sums over the positions of each example."""
    sums = {"grads": jnp.sum(widen(grads), axis=-2)}
    if inputs is not None:
        if use.found.kind == "embedding":
            inputs = jax.nn.one_hot(inputs, use.layer.in_dim, dtype=jnp.float32)
        sums["inputs"] = jnp.sum(widen(inputs), axis=-2)
    merge = use.examples == 1
    return {name: jnp.sum(x, axis=-2, keepdims=True) if merge else x for name, x in sums.items()}


def finish(statistic: str, sharing: str, use, sums: dict, basis):
    """The statistic of a layer from the sum over all its uses, of which one is given.

    A = Σ a aᵀ / R and G = N Σ ḡ ḡᵀ; where rows were summed for each example first, inputs are
    averaged, and R = N.
    """
    layer, rows = use.layer, use.rows
    if is_linear(layer, sharing):
        if use.example_loop is not None:
            outer = sum(use.loops[: use.example_loop])
            sums = {name: jnp.moveaxis(x, outer, -3)[..., 0, :] for name, x in sums.items()}
        inputs, grads, rows = sums.get("inputs"), sums["grads"], use.examples
        inputs = (
            jnp.ones((*grads.shape[:-1], 1), grads.dtype)
            if inputs is None
            else inputs * (use.examples / use.rows)
        )
        sums = quadratic_sums(statistic, layer, inputs, grads, basis)
    scaled = {name: x * (1 / rows if name == "input" else use.batch) for name, x in sums.items()}
    if statistic == "diagonal":
        return scaled["moments"]
    factors = KroneckerFactors(scaled["input"], scaled["output"], jnp.ones([], jnp.int32))
    return EigenbasisMoments(*factors, scaled["moments"]) if statistic == "eigenbasis" else factors


def finish_rows(uses, samples) -> FactorRows:
    """All rows of a layer with their weights."""
    raw = finish_raw(uses, samples)
    return FactorRows(*raw, jnp.array([1 / uses[0].rows, uses[0].batch], raw.output_grads.dtype))


def finish_raw(uses, samples) -> RawSamples:
    """All rows of a layer, from the samples of each of its uses."""
    layer, stack, joined = uses[0].layer, len(uses[0].layer.stack), {}
    for use, sample in zip(uses, samples, strict=True):
        own = [axis for axis, stacked in enumerate(use.loops) if stacked]
        shared = [axis for axis, stacked in enumerate(use.loops) if not stacked]
        first = len(use.loops)
        rows = first + stack - len(own)
        for name, x in sample.items():
            x = x.transpose([*own, *range(first, rows), *shared, *range(rows, x.ndim)])
            joined.setdefault(name, []).append(
                x.reshape(*x.shape[:stack], -1, *x.shape[stack + len(shared) + 1 :])
            )
    one_hot = [use.found.kind == "embedding" for use in uses]
    inputs = joined["inputs"]
    if layer.kind == "embedding" and not all(one_hot):
        inputs = [
            jax.nn.one_hot(x.astype(jnp.int32), layer.in_dim, dtype=x.dtype) if own else x
            for own, x in zip(one_hot, inputs, strict=True)
        ]
    inputs = jnp.concatenate(inputs, axis=stack)
    grads = jnp.concatenate(joined["output_grads"], axis=stack)
    return RawSamples(inputs.astype(jnp.int32) if all(one_hot) else inputs, grads)


def joined(rows):
    """Rows of all cotangents [positions, columns, *stack, R, ·] as rows of one."""
    if isinstance(
        rows, KroneckerFactors
    ):  # of a scale or shift, whose A does not depend on cotangents
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
    return FactorRows(
        inputs, output_grads, rows.weights[0, 0] / jnp.array([count, 1], rows.weights.dtype)
    )
