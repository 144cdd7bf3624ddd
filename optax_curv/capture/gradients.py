"""Value, gradients and curvature of a loss in one backward pass."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_curv.capture import statistics
from optax_curv.capture._graph.jaxpr import varying_like, with_automatic_sharding
from optax_curv.capture._graph.marks import LOST
from optax_curv.capture._graph.trace import Trace, trace
from optax_curv.capture._graph.uses import Use
from optax_curv.capture._graph.walk import Tap, run_with_taps
from optax_curv.layers import Layers
from optax_curv.objective import Objective

STATISTICS = ("kronecker", "diagonal", "eigenbasis", "raw", "rows")
FISHERS = ("empirical", "sampled", "exact")
SHARINGS = ("expand", "reduce")


def find_layers(loss_fn: Callable, params, *args, **kwargs) -> Layers:
    """Finds the layers of a loss by following its parameters through it.

    A parameter that meets an activation in a matrix product or a convolution is a layer's kernel,
    whatever reshaped, cast or sliced it on the way; one added to a layer's output is its bias; one
    that rows are picked from is an embedding; one that multiplies activations is a scale, one added
    to others a shift. Nothing is computed: arrays may be `jax.ShapeDtypeStruct`s.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs)`, or an `Objective`.
      params: parameters (a pytree of arrays, or an nnx Module or State).
      *args: further arguments of the loss.
      **kwargs: likewise.

    Returns:
      The layers in the order of use; `print` shows a table, `uncovered` what is in no layer, and
      why.

    Raises:
      ValueError: if a parameter is not a floating-point array, or a `while_loop` surrounds a layer.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_curv
      >>> params = {"hidden": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}}
      >>> loss = lambda params, x: jnp.mean(jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"]))
      >>> print(optax_curv.find_layers(loss, params, jax.ShapeDtypeStruct((8, 3), jnp.float32)))
      layer   kind   kernel                in  out  stack  shared  bias                rows
      hidden  dense  ['hidden']['kernel']  3   4    -      1       ['hidden']['bias']  8
    """
    return trace(loss_fn, params, args, kwargs).layers


class Probing:
    """A traced function with probes at the layers to measure."""

    def __init__(self, traced: Trace, layers: Layers, statistic: str, sharing: str, basis=None):
        self.traced, self.statistic, self.sharing = traced, statistic, sharing
        names = {layer.name for layer in layers}
        self._first: dict[str, Use] = {}
        self._basis: dict[str, Any] = {}
        self._taps, self.zeros = {}, {}
        dtype = jnp.finfo(jnp.result_type(jnp.float32, *traced.leaves)).dtype  # real
        for number, use in traced.uses.items():
            if use.layer.name not in names:
                continue
            if sharing == "reduce" and use.found.examples == LOST and use.batch > 1:
                raise ValueError(
                    "value_grad_and_curvature: sharing='reduce' is by example, but nothing tells the examples apart "
                    f"where the layer {use.layer.name!r} is used; take 'expand', or leave it out of layers=."
                )
            keeps_rows = statistics.keeps_rows(statistic, use.layer)
            key = f"{use.layer.name}#{number}" if keeps_rows else use.layer.name
            if key not in self.zeros:
                self._first[key] = use
                self._basis[key] = basis[use.layer.name] if basis is not None else (None, None)
                self.zeros[key] = statistics.probe(statistic, sharing, use, dtype)
            loop = use.example_loop if statistics.is_linear(use.layer, sharing) else None
            loops = tuple(own or keeps_rows or depth == loop for depth, own in enumerate(use.loops))
            self._taps[number] = Tap(use, key, self._tap(use), loops)
        arrays = map(jnp.asarray, (*traced.leaves, *traced.arrays, *traced.node.jaxpr.consts))
        self.zeros = varying_like(self.zeros, list(arrays))

    def _tap(self, use: Use) -> Callable:
        """An identity whose derivative writes what is measured into the probe."""

        @jax.custom_vjp
        def tap(output, operands, probe):
            return output

        def forward(output, operands, probe):
            return output, (operands, probe)

        def backward(kept, grad):
            operands, (zeros, basis) = kept
            measure = functools.partial(statistics.contribution, self.statistic, self.sharing, use)
            measured = with_automatic_sharding(measure, operands, grad, zeros, basis)
            return grad, None, (varying_like(measured, jax.tree.leaves(zeros)), None)

        tap.defvjp(forward, backward)
        return tap

    def __call__(self, leaves, probes):
        """The function's result, and what `traced.update` wants; the gradients of the probes are measured."""
        probes = {key: (probe, self._basis[key]) for key, probe in probes.items()}
        traced = self.traced
        return traced.restore(
            run_with_taps(traced.node, [*leaves, *traced.arrays], self._taps, probes)
        )

    def finish(self, sums: dict) -> dict[str, Any]:
        """The curvature of each layer from the gradients of the probes."""
        finish_rows = statistics.finish_raw if self.statistic == "raw" else statistics.finish_rows
        found: dict[str, Any] = {}
        for key, use in self._first.items():
            name = use.layer.name
            if statistics.keeps_rows(self.statistic, use.layer):
                found.setdefault(name, []).append((use, sums[key]))
            else:
                found[name] = statistics.finish(
                    self.statistic, self.sharing, use, sums[key], self._basis[key]
                )
        return {
            name: finish_rows(*zip(*x, strict=True)) if isinstance(x, list) else x
            for name, x in found.items()
        }


def value_grad_and_curvature(
    loss_fn: Callable | Objective,
    *,
    layers: Layers | None = None,
    statistic: str = "kronecker",
    fisher: str = "empirical",
    samples: int = 1,
    sharing: str = "expand",
    batch_size: int | None = None,
    has_aux: bool = False,
) -> Callable:
    r"""As `jax.value_and_grad`, with the curvature of every layer from the same backward pass.

    With a layer's inputs a and output gradients ḡ of the loss of the whole batch (a mean over N
    examples), "kronecker" gives the factors of the per-example loss

    .. math::
      A = \frac{1}{R} \sum_r a_r a_r^T, \qquad G = N \sum_r \bar g_r \bar g_r^T,

    over all R rows (examples × positions × uses of the kernel), so that duplicating the batch
    changes neither. Scales and shifts have the block of their own per-example gradients u as G = N
    Σ ū ūᵀ, and A = 1.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs) -> scalar`, a *mean* over examples, or an
        `Objective`.
      layers: the layers to measure, from `find_layers`; None: all.
      statistic: "kronecker" (`KroneckerFactors`), "diagonal" (of the Fisher, [*stack, rows, out]),
        "eigenbasis" (`EigenbasisMoments`; the call takes `basis=`, a dict from layer name to (U_A,
        U_G), None for the side of a diagonal factor), "raw" (`RawSamples`) or "rows" (`FactorRows`,
        of which `scale_by_kfac` makes the factors where its period asks for them: cheaper than
        "kronecker" for periods above 1).
      fisher: "empirical": gradients of the loss itself. The other two need an `Objective`, and A ⊗
        G is on the scale of its Gauss-Newton matrix, however many rows of outputs an example has:
        "sampled" takes gradients at targets drawn from the model (the call takes `key=`), "exact"
        the columns of the root of the loss's Hessian, vectorised, one position of the outputs [N,
        *positions, O] after the other. Value and gradients stay those of the loss.
      samples: number of drawn targets; "sampled" only.
      sharing: "expand" takes every row as an example, "reduce" first averages inputs and sums
        output gradients over the positions and uses of one.
      batch_size: N; None: the leading axis of the first array after the parameters that is no PRNG
        key and, where there are others, in no tree of trees (as batch statistics are).
      has_aux: whether the loss returns (loss, aux).

    Returns:
      `f(params, *args, **kwargs) -> (value, grads, curvature)`, or `((value, aux), grads,
      curvature)`; `curvature` is a dict from layer name to its statistic, in float32 at least.

    Raises:
      ValueError: for an unknown choice; in `f`, for a loss that is not a scalar, parameters that
        are not floating-point, layers of another model, `fisher` "sampled" or "exact" with a plain
        loss, or no key to sample.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> loss = lambda params, x, y: jnp.mean((x @ params["w"] - y) ** 2)
      >>> params, x, y = {"w": jnp.ones((3, 1))}, jnp.ones((8, 3)), jnp.zeros((8, 1))
      >>> value, grads, curvature = optax_curv.value_grad_and_curvature(loss)(params, x, y)
      >>> curvature["w"].input_factor.shape, float(curvature["w"].output_factor[0, 0])
      ((3, 3), 36.0)

    References:
      Martens & Grosse, 2015, arXiv:1503.05671, eq. 1; Eschenhagen et al., 2023, arXiv:2311.00636,
      eqs. 8 and 9.

    A kernel used on both sides (a tied embedding, derivatives of the network inside the loss) has
    one pair of factors: where the input lies on the output side, R ḡ takes the place of a and a / R
    that of g. Layers whose rows show no axis of length N count as one example in "reduce", scales
    and shifts.
    """
    chosen = {"statistic": statistic, "fisher": fisher, "sharing": sharing}
    for (name, given), choices in zip(chosen.items(), (STATISTICS, FISHERS, SHARINGS), strict=True):
        if given not in choices:
            raise ValueError(
                f"value_grad_and_curvature: unknown {name}={given!r}; expected one of {choices}."
            )
    if statistic == "rows" and sharing == "reduce":
        raise ValueError(
            "value_grad_and_curvature: statistic='rows' needs sharing='expand'; 'reduce' sums rows first."
        )
    is_objective = isinstance(loss_fn, Objective)
    if fisher != "empirical" and not is_objective:
        raise ValueError(
            f"value_grad_and_curvature: fisher={fisher!r} needs outputs and their likelihood, which a plain loss does "
            "not show; pass optax_curv.Objective(predict_fn, likelihood)."
        )
    if is_objective and has_aux:
        raise ValueError(
            "value_grad_and_curvature: has_aux=True needs a plain loss; an Objective has no aux."
        )
    if samples < 1:
        raise ValueError(f"value_grad_and_curvature: expected samples >= 1, got {samples=}.")

    def value_grads_curvature(params, *args, **kwargs):
        basis = kwargs.pop("basis", None) if statistic == "eigenbasis" else None
        key = kwargs.pop("key", None) if is_objective else None
        if fisher != "empirical":
            return of_model(params, args, kwargs, basis, key)
        traced = trace(loss_fn, params, args, kwargs, batch_size)
        if batch_size is None and not any(map(jnp.ndim, traced.arrays)):
            raise ValueError(
                "value_grad_and_curvature: no array after the parameters shows the number of examples, which scales "
                "the factors; give batch_size=."
            )
        probing = Probing(traced, _measured(traced.layers, layers), statistic, sharing, basis)

        def loss(leaves, probes):
            result, after = probing(leaves, probes)
            value, aux = _value_and_aux(result, has_aux)
            return value, (aux, after)

        take = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (value, (aux, after)), (grads, sums) = take(traced.leaves, probing.zeros)
        traced.update(after)
        return ((value, aux) if has_aux else value), traced.grads(grads), probing.finish(sums)

    def of_model(params, args, kwargs, basis, key):
        if fisher == "sampled" and key is None:
            raise ValueError(
                "value_grad_and_curvature: fisher='sampled' draws targets: call f(params, inputs, targets, key=key) "
                "with a fresh PRNG key at every step."
            )
        assert isinstance(loss_fn, Objective)
        traced = trace(loss_fn.value_and_outputs, params, args, kwargs, batch_size)
        probing = Probing(traced, _measured(traced.layers, layers), statistic, sharing, basis)
        (value, outputs), pull_back, after = jax.vjp(
            probing, traced.leaves, probing.zeros, has_aux=True
        )
        traced.update(after)
        grads, _ = pull_back((jnp.ones_like(value), jnp.zeros_like(outputs)))
        weights, positions = kwargs.get("weights"), ()
        if fisher == "sampled":
            columns = loss_fn.sampled_cotangents(key, outputs, samples=samples, weights=weights)
        else:
            columns, positions = (
                loss_fn.exact_cotangents(outputs, weights=weights),
                outputs.shape[1:-1],
            )
        curvature = _model_curvature(
            lambda cotangent: probing.finish(pull_back((jnp.zeros_like(value), cotangent))[1]),
            columns / jnp.sqrt(jnp.asarray(traced.batch, columns.dtype)),
            positions,
            joins=statistic in ("raw", "rows"),
        )
        return value, traced.grads(grads), curvature

    return value_grads_curvature


def _model_curvature(
    measure: Callable, columns, positions: tuple[int, ...], joins: bool
) -> dict[str, Any]:
    """G = Σ_c Σ_r g gᵀ over a layer's rows for cotangents c [columns, *outputs.shape]; A and the like enter once."""
    # positions of the outputs may meet inside the network, and so are pulled back one after the
    # other
    count = math.prod(positions)
    if len(columns) * count == 1:
        return measure(columns[0])

    def at(position):
        if count == 1:
            return jax.vmap(measure)(columns)
        here = (jnp.arange(count) == position).reshape(1, *positions, 1)
        return jax.vmap(measure)(columns * here)

    if joins:
        return {
            name: statistics.joined(x) for name, x in jax.lax.map(at, jnp.arange(count)).items()
        }
    still = measure(jnp.zeros(columns.shape[1:], columns.dtype))

    def add(total, position):
        # without what is there at no cotangent
        moved = jax.tree.map(
            lambda each, rest: jnp.sum(each - rest, 0, dtype=each.dtype), at(position), still
        )
        return jax.tree.map(jnp.add, total, moved), None

    return jax.lax.scan(add, still, jnp.arange(count))[0]


def _value_and_aux(result: Any, has_aux: bool) -> tuple[Any, Any]:
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise ValueError(
            f"value_grad_and_curvature: with has_aux=True expected a pair (loss, aux), got a {type(result).__name__}."
        )
    pair: tuple[Any, Any] = result if has_aux else (result, None)
    value, aux = pair
    one = jax.tree_util.treedef_is_leaf(jax.tree.structure(value))
    if not one or jnp.shape(value):
        got = f"has shape {jnp.shape(value)}" if one else f"is a {type(value).__name__}"
        raise ValueError(
            f"value_grad_and_curvature: the loss {got}, expected a scalar; take the mean over the examples, or set "
            "has_aux=True if it returns (loss, aux)."
        )
    return value, aux


def _measured(found: Layers, wanted: Layers | None) -> Layers:
    """The wanted layers as found; rows and uses may differ."""
    if wanted is None:
        return found
    own = {layer.name: layer for layer in found}
    for layer in wanted:
        same = own.get(layer.name)
        if same is None or dataclasses.replace(same, rows=0, shared=1) != dataclasses.replace(
            layer, rows=0, shared=1
        ):
            raise ValueError(
                f"value_grad_and_curvature: the layer {layer!r} is not in this loss, which has {list(own.values())}; "
                "are these the layers of another model? Make them with find_layers(loss_fn, params, ...)."
            )
    return Layers([own[layer.name] for layer in wanted])
