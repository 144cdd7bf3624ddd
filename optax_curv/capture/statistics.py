"""What is measured at a layer.

Everything is a pure function of a layer's rows: inputs a and output gradients ḡ of the batch loss, arranged as
[*stack, examples, positions, features]. A statistic is three functions: the probe that collects it, what one use adds
to the probe, and what the sum over all uses becomes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class KroneckerFactors(NamedTuple):
    """The two factors of a layer's Fisher block, F ≈ A ⊗ G.

    Attributes:
      input_factor: A = E[a aᵀ], float [*stack, in, in], or its diagonal [*stack, in] (embeddings).
      output_factor: G = E[g gᵀ], float [*stack, out, out], or its diagonal [*stack, out].
      count: number of batches averaged so far, int32 [].
    """

    input_factor: jax.Array
    output_factor: jax.Array
    count: jax.Array  # type: ignore[override]


class EigenbasisMoments(NamedTuple):
    """Kronecker factors, and the second moments of the gradient in a given eigenbasis (EKFAC).

    Attributes:
      input_factor: as in `KroneckerFactors`.
      output_factor: as in `KroneckerFactors`.
      count: number of batches averaged so far, int32 [].
      moments: E[(U_Aᵀ a gᵀ U_G)²], float [*stack, rows, out].
    """

    input_factor: jax.Array
    output_factor: jax.Array
    count: jax.Array  # type: ignore[override]
    moments: jax.Array


class RawSamples(NamedTuple):
    """The rows of a layer themselves, all uses one after the other.

    Attributes:
      inputs: a, [*stack, R, in] with the bias's coordinate; integer [*stack, R] for an embedding.
      output_grads: g, gradients of one example's own loss, [*stack, R, out].
    """

    inputs: jax.Array
    output_grads: jax.Array


class FactorRows(NamedTuple):
    """Rows of a layer of which its Kronecker factors can be made later, A = w_A Σ a aᵀ and G = w_G Σ g gᵀ.

    Attributes:
      inputs: a, [*stack, R, in] with the bias's coordinate; integer [*stack, R] for an embedding.
      output_grads: g, gradients of the loss of the batch, [*stack, R, out].
      weights: (w_A, w_G), float [2].
    """

    inputs: jax.Array
    output_grads: jax.Array
    weights: jax.Array


class Rows(NamedTuple):
    """Rows of one use; for a scale or shift `inputs` is None and `output_grads` the leaf's own gradient.

    Attributes:
      inputs: a, [*stack, examples, positions, in]; integer [*stack, examples, positions] of a one-hot row; or None.
      output_grads: ḡ of the batch loss, [*stack, examples, positions, out].
    """

    inputs: Any
    output_grads: jax.Array


def rows_of(use, operands, grad) -> Rows:
    """Arranges what a tap sees into rows.

    Args:
      use: the use.
      operands: the layer's input and coefficients.
      grad: gradient of the batch loss with respect to the layer's output.

    Returns:
      The rows in float32 at least; on one side bfloat16 stays.
    """
    if use.layer.kind in ("scale", "shift"):
        return _elementwise_rows(use, operands, grad)
    x = operands[0]
    if use.windows[0] is not None:
        x = lax.slice_in_dim(x, use.windows[0][1], sum(use.windows[0][1:]), axis=use.windows[0][0])
    if use.windows[1] is not None:
        grad = lax.slice_in_dim(grad, use.windows[1][1], sum(use.windows[1][1:]), axis=use.windows[1][0])
    if use.conv is not None:
        kernel, strides, padding, lhs_dilation, rhs_dilation, spec = use.conv
        x = lax.conv_general_dilated_patches(
            x, kernel, strides, padding, lhs_dilation, rhs_dilation, spec, precision=lax.Precision.HIGHEST
        )
    inputs, grads = use.inputs(x if use.kind != "embedding" else x[..., 0]), use.outputs(grad)
    if inputs.shape[:-1] != grads.shape[:-1]:  # the same for all examples, or for all members of an ensemble
        inputs = jnp.broadcast_to(inputs, (*grads.shape[:-1], inputs.shape[-1]))
    if use.kind == "embedding":
        return Rows(inputs[..., 0], grads)
    if use.gain != 1.0:
        inputs = inputs * use.gain
    if use.swapped:  # a' = R ḡ and g' = a / R: the same product, and factors on the scale of the other uses
        inputs, grads = grads * use.rows, inputs / use.rows
    if use.layer.bias is not None:
        one = jnp.full((*inputs.shape[:-1], 1), 1 if use.bias else 0, inputs.dtype)
        inputs = jnp.concatenate([inputs, one], axis=-1)
    return Rows(inputs, grads)


def _elementwise_rows(use, operands, grad) -> Rows:
    if use.windows[1] is not None:
        grad = lax.slice_in_dim(grad, use.windows[1][1], sum(use.windows[1][1:]), axis=use.windows[1][0])
    grad = _wide(grad) * use.gain
    if use.found.choice is not None:
        operands = (operands[0] == use.found.choice, *operands[1:])
    for operand in operands:
        grad = grad * operand
    rows = use.outputs(grad)
    if use.positions is not None:
        rows = jnp.zeros((*rows.shape[:-1], use.layer.out_dim), rows.dtype).at[..., use.positions].set(rows)
    return Rows(None, rows)


def _wide(x):
    """In float32 at least."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _second_moment(rows, full: bool):
    """Σ x xᵀ over the rows [*stack, R, d], or its diagonal; products of half-precision rows are exact in float32."""
    if not full:
        return jnp.sum(jnp.square(_wide(rows)), axis=-2)
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    return jnp.einsum("...ri,...rj->...ij", rows, rows, precision=lax.Precision.HIGHEST, preferred_element_type=wide)


def _counts(ids, width: int, weights=None):
    """Σ of one-hot rows, [*stack, R] to [*stack, width], or of their products with weights [*stack, R, k]."""
    if ids.ndim > 1 and weights is None:
        return jax.vmap(lambda i: _counts(i, width))(ids)
    if ids.ndim > 1:
        return jax.vmap(lambda i, w: _counts(i, width, w))(ids, weights)
    if weights is None:
        return jnp.zeros(width, jnp.float32).at[ids].add(1.0, mode="drop")
    return jnp.zeros((width, weights.shape[-1]), weights.dtype).at[ids].add(weights, mode="drop")


def _flat(rows):
    """Every row an example: [*stack, examples · positions, features]."""
    return rows.reshape(*rows.shape[:-3], -1, rows.shape[-1])


def _quadratic(statistic: str, layer, inputs, grads, basis) -> dict[str, jax.Array]:
    """Σ a aᵀ, Σ g gᵀ and Σ (U_Aᵀ a)² (U_Gᵀ g)² over rows [*stack, R, ·], as far as the statistic has them."""
    sums = {}
    input_shape, output_shape = layer.factor_shapes
    if statistic != "diagonal":
        sums["output"] = _second_moment(grads, full=len(output_shape) == len(layer.stack) + 2)
        if layer.kind == "embedding" and inputs.ndim == grads.ndim - 1:
            sums["input"] = _counts(inputs, layer.in_dim)
        else:
            sums["input"] = _second_moment(inputs, full=len(input_shape) == len(layer.stack) + 2)
    if statistic not in ("kronecker", "rows"):
        left, right = basis
        squares = jnp.square(_wide(grads) if right is None else _rotated(grads, right))
        if layer.kind == "embedding" and inputs.ndim == grads.ndim - 1:
            sums["moments"] = _counts(inputs, layer.in_dim, squares)
        else:
            a = jnp.square(_wide(inputs) if left is None else _rotated(inputs, left))
            sums["moments"] = jnp.einsum("...ri,...rj->...ij", a, squares, precision=lax.Precision.HIGHEST)
    return sums


def _rotated(rows, basis):
    """The rows in a basis whose vectors are the columns of `basis`."""
    return jnp.einsum("...ri,...ij->...rj", _wide(rows), basis, precision=lax.Precision.HIGHEST)


def is_linear(layer, sharing: str) -> bool:
    """Whether rows are summed for each example before they are squared."""
    return sharing == "reduce" or layer.kind in ("scale", "shift")


def keeps_rows(statistic: str, layer) -> bool:
    """Whether a statistic is the rows themselves, of every use of the layer on its own.

    In "rows" a scale or shift has its factors, as its uses are summed for each example before they are squared.
    """
    return statistic == "raw" or (statistic == "rows" and not is_linear(layer, "expand"))


def probe(statistic: str, sharing: str, use, dtype, loops: tuple[int, ...] = ()) -> dict[str, jax.Array]:
    """The zeros that collect a statistic: of a whole layer, or for "raw" of one use inside scans of these lengths."""
    layer = use.layer
    rows, out = layer.rows_of_matrix, layer.out_dim
    if keeps_rows(statistic, layer):
        examples, positions = use.outputs.shape[-3:-1]
        lead = (*loops, *_static_slots(use), *use.outputs.shape[:-3])
        positions = 1 if layer.kind in ("scale", "shift") else positions
        ids = use.kind == "embedding" or layer.kind in ("scale", "shift")
        shapes: dict[str, tuple[int, ...]] = {
            "inputs": (*lead, examples * positions) if ids else (*lead, examples * positions, rows),
            "output_grads": (*lead, examples * positions, out),
        }
    elif is_linear(layer, sharing):
        lead = (*layer.stack, use.examples)
        if use.example_loop is not None:  # along which the probe is sliced as along those of the stack
            outer = sum(use.loops[: use.example_loop])
            lead = (*layer.stack[:outer], use.examples, *layer.stack[outer:], 1)
        shapes = {"inputs": (*lead, rows), "grads": (*lead, out)}
        if layer.kind in ("scale", "shift"):
            del shapes["inputs"]
    else:
        shapes = {
            "input": layer.factor_shapes[0],
            "output": layer.factor_shapes[1],
            "moments": (*layer.stack, rows, out),
        }
        kept = {"kronecker": ("input", "output"), "diagonal": ("moments",)}
        shapes = {name: shapes[name] for name in kept.get(statistic, shapes)}
    return {name: jnp.zeros(shape, dtype) for name, shape in shapes.items()}


def _static_slots(use):
    """Sizes of the stack axes that slices of the leaf have fixed."""
    loops = sum(use.loops)
    return use.layer.stack[loops : loops + len(use.slots)]


def contribution(statistic: str, sharing: str, use, operands, grad, zeros, basis) -> dict[str, jax.Array]:
    """What one use adds to its probe."""
    rows = rows_of(use, operands, grad)
    linear = is_linear(use.layer, sharing)
    if keeps_rows(statistic, use.layer):
        found = _raw(use, rows, use.batch if statistic == "raw" else 1)
    elif linear:
        found = _example_sums(use, rows)
    else:
        inputs = (
            rows.inputs.reshape(*rows.inputs.shape[: len(rows.output_grads.shape) - 3], -1)
            if (use.kind == "embedding")
            else _flat(rows.inputs)
        )
        basis = tuple(u if u is None else u[use.slots] for u in basis)
        found = _quadratic(statistic, use.layer, inputs, _flat(rows.output_grads), basis)
    placed = {}
    for name, value in found.items():
        value = value.astype(zeros[name].dtype)
        placed[name] = jnp.zeros_like(zeros[name]).at[use.slots].set(value) if use.slots else value
    return placed


def _raw(use, rows, scale):
    grads = rows.output_grads
    if rows.inputs is None:
        grads = jnp.sum(grads, axis=-2, keepdims=True)
        inputs = jnp.ones(grads.shape[:-1], grads.dtype)
    else:
        inputs = rows.inputs
    inputs = inputs.reshape(*inputs.shape[: grads.ndim - 3], -1, *inputs.shape[grads.ndim - 1 :])
    grads = _wide(_flat(grads))
    return {"inputs": inputs, "output_grads": grads if scale == 1 else grads * scale}


def _example_sums(use, rows):
    """Sums over the positions of each example."""
    sums = {"grads": jnp.sum(_wide(rows.output_grads), axis=-2)}
    if rows.inputs is not None:
        inputs = rows.inputs
        if use.kind == "embedding":
            inputs = jax.nn.one_hot(inputs, use.layer.in_dim, dtype=jnp.float32)
        sums["inputs"] = jnp.sum(_wide(inputs), axis=-2)
    merge = use.examples == 1
    return {name: jnp.sum(x, axis=-2, keepdims=True) if merge else x for name, x in sums.items()}


def finish(statistic: str, sharing: str, use, sums: dict, basis):
    """The statistic of a layer from the sum over all its uses (any of which is given).

    With R rows and N examples in a batch whose loss is a mean, A = Σ a aᵀ / R and G = N Σ ḡ ḡᵀ; for rows that were
    summed for each example first, inputs are averaged, and R = N.
    """
    layer, rows = use.layer, use.rows
    if is_linear(layer, sharing):
        if use.example_loop is not None:
            outer = sum(use.loops[: use.example_loop])
            sums = {name: jnp.moveaxis(x, outer, -3)[..., 0, :] for name, x in sums.items()}
        inputs = sums.get("inputs")
        rows = use.examples
        if inputs is None:
            inputs = jnp.ones((*sums["grads"].shape[:-1], 1), sums["grads"].dtype)
        else:
            inputs = inputs * (use.examples / use.rows)
        sums = _quadratic(statistic, layer, inputs, sums["grads"], basis)
    scaled = {name: x * (1 / rows if name == "input" else use.batch) for name, x in sums.items()}
    if statistic == "diagonal":
        return scaled["moments"]
    one = jnp.ones([], jnp.int32)
    if statistic == "eigenbasis":
        return EigenbasisMoments(scaled["input"], scaled["output"], one, scaled["moments"])
    return KroneckerFactors(scaled["input"], scaled["output"], one)


def finish_rows(uses, samples: list[dict]) -> FactorRows:
    """All rows of a layer with the weights that make them its factors."""
    raw = finish_raw(uses, samples)
    return FactorRows(*raw, jnp.array([1 / uses[0].rows, uses[0].batch], raw.output_grads.dtype))


def factors_of_rows(rows: FactorRows, layer) -> tuple[jax.Array, jax.Array]:
    """A and G in the shapes of `layer.factor_shapes`."""
    sums = _quadratic("kronecker", layer, rows.inputs, rows.output_grads, None)
    return rows.weights[0] * sums["input"], rows.weights[1] * sums["output"]


def finish_raw(uses, samples: list[dict]) -> RawSamples:
    """All rows of a layer, from the samples of each of its uses."""
    joined: dict[str, list] = {"inputs": [], "output_grads": []}
    for use, sample in zip(uses, samples, strict=True):
        own = [axis for axis, stacked in enumerate(use.loops) if stacked]
        shared = [axis for axis, stacked in enumerate(use.loops) if not stacked]
        lead = len(use.layer.stack) - len(own)
        for name, x in sample.items():
            first = len(use.loops)
            order = [*own, *range(first, first + lead), *shared, *range(first + lead, x.ndim)]
            x = x.transpose(order)
            keep = len(use.layer.stack)
            joined[name].append(x.reshape(*x.shape[:keep], -1, *x.shape[keep + len(shared) + 1 :]))
    embedding = all(use.kind == "embedding" for use in uses)
    elementwise = uses[0].layer.kind in ("scale", "shift")
    inputs = joined["inputs"]
    if not embedding and not elementwise and uses[0].layer.kind == "embedding":
        width = uses[0].layer.in_dim
        inputs = [
            jax.nn.one_hot(x.astype(jnp.int32), width, dtype=x.dtype) if use.kind == "embedding" else x
            for use, x in zip(uses, inputs, strict=True)
        ]
    inputs = jnp.concatenate(inputs, axis=len(uses[0].layer.stack))
    grads = jnp.concatenate(joined["output_grads"], axis=len(uses[0].layer.stack))
    return RawSamples(inputs.astype(jnp.int32) if embedding else inputs, grads)
