"""Value, gradients and curvature of a loss in one backward pass."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, overload

import jax
import jax.numpy as jnp

from optax_curv.capture import statistics
from optax_curv.capture._graph.jaxpr import varying_like, with_automatic_sharding
from optax_curv.capture._graph.marks import LOST
from optax_curv.capture._graph.replay import Tap, run_with_taps
from optax_curv.capture._graph.trace import Trace, trace
from optax_curv.capture._graph.uses import Use
from optax_curv.capture.slopes import slopes, with_slopes
from optax_curv.capture.statistics import STATISTICS
from optax_curv.curvature import (
    EigenbasisMoments,
    FactorRows,
    InputFactor,
    InputRows,
    KroneckerFactors,
    RawSamples,
)
from optax_curv.layers import Layer, Layers
from optax_curv.objective import Objective
from optax_curv.typing import (
    FISHERS,
    SHARINGS,
    STATISTIC_NAMES,
    Fisher,
    Key,
    Sharing,
    StatisticName,
    Tree,
)

LossFn: TypeAlias = Callable[..., Any] | Objective
Params = TypeVar("Params")
Curvature = TypeVar("Curvature")


class Measure(Protocol[Curvature]):
    """The function that `value_grad_and_curvature` returns."""

    def __call__(
        self, params: Params, *args: Any, **kwargs: Any
    ) -> tuple[jax.Array, Params, dict[str, Curvature]]:
        """Returns value, gradients and curvature by layer."""
        ...


class MeasureWithAux(Protocol[Curvature]):
    """The function that `value_grad_and_curvature` returns with ``has_aux=True``."""

    def __call__(
        self, params: Params, *args: Any, **kwargs: Any
    ) -> tuple[tuple[jax.Array, Any], Params, dict[str, Curvature]]:
        """Returns (value, aux), gradients and curvature by layer."""
        ...


def find_layers(
    loss_fn: LossFn, params: Tree, *args: Any, batch_size: int | None = None, **kwargs: Any
) -> Layers:
    """Finds the layers of a loss by following its parameters through it.

    A parameter that meets an activation in a matrix product or a convolution is a layer's kernel,
    whatever reshaped, cast or sliced it on the way; one added to a layer's output is its bias; one
    that rows are picked from is an embedding; one that multiplies activations is a scale, one added
    to others a shift. Nothing is computed: arrays may be `jax.ShapeDtypeStruct`s.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs)`, or an `Objective`.
      params: parameters (a pytree of arrays, or an nnx Module or State).
      *args: further arguments of the loss.
      batch_size: number of examples, as `value_grad_and_curvature` takes it; None: it is read off
        the arrays.
      **kwargs: further arguments of the loss by name.

    Returns:
      The layers in the order of use; `print` shows a table, `uncovered` lists the parameters in no
      layer, with the reasons.

    Raises:
      ValueError: if a parameter is not a floating-point array, a `while_loop` surrounds a layer, or
        the loss is neither a scalar nor a pair (scalar, aux).

    Examples:
      >>> import jax, jax.numpy as jnp, optax_curv
      >>> params = {"hidden": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}}
      >>> def loss(params, x):
      ...     hidden = params["hidden"]
      ...     return jnp.mean(jnp.tanh(x @ hidden["kernel"] + hidden["bias"]))
      >>> print(optax_curv.find_layers(loss, params, jax.ShapeDtypeStruct((8, 3), jnp.float32)))
      layer   kind   kernel                in  out  stack  shared  bias                rows
      hidden  dense  ['hidden']['kernel']  3   4    -      1       ['hidden']['bias']  8
    """

    def checked(params: Tree, *args: Any, **kwargs: Any) -> Any:
        result = loss_fn(params, *args, **kwargs)
        has_aux = isinstance(result, tuple) and len(result) == 2
        _value_and_aux("find_layers", result, has_aux)
        return result

    return trace("find_layers", checked, params, args, kwargs, batch_size).layers


class Probing:
    """A traced function with probes at the layers to measure."""

    def __init__(
        self,
        traced: Trace,
        layers: Layers,
        statistic: StatisticName,
        sharing: Sharing,
        basis: dict[str, statistics.Basis] | None = None,
    ):
        self.traced, self.reduces = traced, sharing == "reduce"
        self.statistic = STATISTICS[statistic]
        self._layers = layers
        names = {layer.name for layer in layers}
        self._first: dict[str, Use] = {}
        self._basis: dict[str, statistics.Basis] = {}
        self._taps: dict[int, Tap] = {}
        self.zeros: dict[str, statistics.Arrays] = {}
        dtype = jnp.finfo(jnp.result_type(jnp.float32, *traced.leaves)).dtype  # real
        for number, use in traced.uses.items():
            if use.layer.name in names:
                self._add(number, use, basis, dtype)
        arrays = map(jnp.asarray, (*traced.leaves, *traced.arrays, *traced.node.jaxpr.consts))
        self.zeros = varying_like(self.zeros, list(arrays))

    def _add(self, number: int, use: Use, basis: dict[str, statistics.Basis] | None, dtype: Any):
        """Puts a tap at a use, and makes the probe that it writes."""
        if self.reduces and use.found.examples == LOST and use.batch > 1:
            raise ValueError(
                "value_grad_and_curvature: sharing='reduce' is by example, but nothing tells the "
                f"examples apart where the layer {use.layer.name!r} is used; take 'expand', or "
                "leave it out of layers=."
            )
        keeps_rows = self.statistic.keeps_rows(use.layer)
        key = f"{use.layer.name}#{number}" if keeps_rows else use.layer.name
        if key not in self.zeros:
            self._first[key] = use
            self._basis[key] = basis[use.layer.name] if basis is not None else (None, None)
            self.zeros[key] = statistics.probe(self.statistic, self.reduces, use, dtype)
        by_example = statistics.sums_examples(use.layer, self.reduces)
        loop = use.example_loop if by_example else None
        loops = tuple(own or keeps_rows or depth == loop for depth, own in enumerate(use.loops))
        self._taps[number] = Tap(use, key, self._tap(use), loops)

    def _tap(self, use: Use) -> Callable:
        """Makes an identity whose derivative writes the measured statistic into the probe."""
        contribution = functools.partial(statistics.contribution, self.statistic, self.reduces, use)

        @jax.custom_vjp
        def tap(output, operands, probe):
            return output

        def forward(output, operands, probe):
            return output, (operands, probe)

        def backward(kept, grad):
            operands, (zeros, basis) = kept
            measured = with_automatic_sharding(contribution, operands, grad, zeros, basis)
            return grad, None, (varying_like(measured, jax.tree.leaves(zeros)), None)

        tap.defvjp(forward, backward)
        return tap

    def __call__(self, leaves: list, probes: dict[str, statistics.Arrays]) -> tuple[Any, Any]:
        """Returns the function's result and what `traced.update` wants.

        The gradients of the probes are the measured statistics.
        """
        with_basis = {key: (probe, self._basis[key]) for key, probe in probes.items()}
        traced = self.traced
        operands = [*leaves, *traced.arrays]
        return traced.restore(run_with_taps(traced.node, operands, self._taps, with_basis))

    def with_slopes(self, curvature: dict[str, Any]) -> dict[str, Any]:
        """Returns the curvature with the slopes of made kernels."""
        return with_slopes(curvature, slopes(self.traced, self._layers), self._layers)

    def finish(self, sums: dict[str, statistics.Arrays]) -> dict[str, Any]:
        """Makes the curvature of each layer of the gradients of the probes."""
        found: dict[str, Any] = {}
        kept: dict[str, tuple[list[Use], list[statistics.Arrays]]] = {}
        for key, use in self._first.items():
            if self.statistic.keeps_rows(use.layer):
                uses, samples = kept.setdefault(use.layer.name, ([], []))
                uses.append(use)
                samples.append(sums[key])
                found[use.layer.name] = None  # keeps the order of the layers
            else:
                found[use.layer.name] = statistics.finish(
                    self.statistic, self.reduces, use, sums[key], self._basis[key]
                )
        return found | {name: self.statistic.finish_rows(*rows) for name, rows in kept.items()}


@overload
def value_grad_and_curvature(
    loss_fn: LossFn,
    *,
    layers: Layers | None = ...,
    statistic: Literal["kronecker"] = ...,
    fisher: Fisher = ...,
    samples: int = ...,
    sharing: Sharing = ...,
    batch_size: int | None = ...,
    has_aux: Literal[False] = ...,
) -> Measure[KroneckerFactors]: ...
@overload
def value_grad_and_curvature(
    loss_fn: LossFn,
    *,
    layers: Layers | None = ...,
    statistic: Literal["diagonal"],
    fisher: Fisher = ...,
    samples: int = ...,
    sharing: Sharing = ...,
    batch_size: int | None = ...,
    has_aux: Literal[False] = ...,
) -> Measure[jax.Array]: ...
@overload
def value_grad_and_curvature(
    loss_fn: LossFn,
    *,
    layers: Layers | None = ...,
    statistic: Literal["eigenbasis"],
    fisher: Fisher = ...,
    samples: int = ...,
    sharing: Sharing = ...,
    batch_size: int | None = ...,
    has_aux: Literal[False] = ...,
) -> Measure[EigenbasisMoments]: ...
@overload
def value_grad_and_curvature(
    loss_fn: LossFn,
    *,
    layers: Layers | None = ...,
    statistic: Literal["raw"],
    fisher: Fisher = ...,
    samples: int = ...,
    sharing: Sharing = ...,
    batch_size: int | None = ...,
    has_aux: Literal[False] = ...,
) -> Measure[RawSamples]: ...
@overload
def value_grad_and_curvature(
    loss_fn: LossFn,
    *,
    layers: Layers | None = ...,
    statistic: Literal["rows"],
    fisher: Fisher = ...,
    samples: int = ...,
    sharing: Sharing = ...,
    batch_size: int | None = ...,
    has_aux: Literal[False] = ...,
) -> Measure[FactorRows | KroneckerFactors]: ...
@overload
def value_grad_and_curvature(
    loss_fn: LossFn,
    *,
    layers: Layers | None = ...,
    statistic: Literal["input"],
    fisher: Literal["empirical"] = ...,
    samples: int = ...,
    sharing: Literal["expand"] = ...,
    batch_size: int | None = ...,
    has_aux: Literal[False] = ...,
) -> Measure[InputRows | InputFactor]: ...
@overload
def value_grad_and_curvature(
    loss_fn: LossFn,
    *,
    layers: Layers | None = ...,
    statistic: Literal["kronecker"] = ...,
    fisher: Fisher = ...,
    samples: int = ...,
    sharing: Sharing = ...,
    batch_size: int | None = ...,
    has_aux: Literal[True],
) -> MeasureWithAux[KroneckerFactors]: ...
@overload
def value_grad_and_curvature(
    loss_fn: LossFn,
    *,
    layers: Layers | None = ...,
    statistic: Literal["diagonal"],
    fisher: Fisher = ...,
    samples: int = ...,
    sharing: Sharing = ...,
    batch_size: int | None = ...,
    has_aux: Literal[True],
) -> MeasureWithAux[jax.Array]: ...
@overload
def value_grad_and_curvature(
    loss_fn: LossFn,
    *,
    layers: Layers | None = ...,
    statistic: Literal["eigenbasis"],
    fisher: Fisher = ...,
    samples: int = ...,
    sharing: Sharing = ...,
    batch_size: int | None = ...,
    has_aux: Literal[True],
) -> MeasureWithAux[EigenbasisMoments]: ...
@overload
def value_grad_and_curvature(
    loss_fn: LossFn,
    *,
    layers: Layers | None = ...,
    statistic: Literal["raw"],
    fisher: Fisher = ...,
    samples: int = ...,
    sharing: Sharing = ...,
    batch_size: int | None = ...,
    has_aux: Literal[True],
) -> MeasureWithAux[RawSamples]: ...
@overload
def value_grad_and_curvature(
    loss_fn: LossFn,
    *,
    layers: Layers | None = ...,
    statistic: Literal["rows"],
    fisher: Fisher = ...,
    samples: int = ...,
    sharing: Sharing = ...,
    batch_size: int | None = ...,
    has_aux: Literal[True],
) -> MeasureWithAux[FactorRows | KroneckerFactors]: ...
@overload
def value_grad_and_curvature(
    loss_fn: LossFn,
    *,
    layers: Layers | None = ...,
    statistic: Literal["input"],
    fisher: Literal["empirical"] = ...,
    samples: int = ...,
    sharing: Literal["expand"] = ...,
    batch_size: int | None = ...,
    has_aux: Literal[True],
) -> MeasureWithAux[InputRows | InputFactor]: ...
@overload
def value_grad_and_curvature(
    loss_fn: LossFn,
    *,
    layers: Layers | None = ...,
    statistic: StatisticName = ...,
    fisher: Fisher = ...,
    samples: int = ...,
    sharing: Sharing = ...,
    batch_size: int | None = ...,
    has_aux: bool = ...,
) -> Measure[Any] | MeasureWithAux[Any]: ...
def value_grad_and_curvature(
    loss_fn: LossFn,
    *,
    layers: Layers | None = None,
    statistic: StatisticName = "kronecker",
    fisher: Fisher = "empirical",
    samples: int = 1,
    sharing: Sharing = "expand",
    batch_size: int | None = None,
    has_aux: bool = False,
) -> Any:
    r"""Makes a function like `jax.value_and_grad`'s that returns each layer's curvature, too.

    One backward pass gives all three.

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
        "kronecker" for periods above 1), or "input" for `scale_by_input_factor`: A alone, as
        `InputRows`, of which it is made where it is asked for, and for embeddings, scales and
        shifts as `InputFactor`.
      fisher: "empirical": gradients of the loss itself. The other two need an `Objective`, and A ⊗
        G is on the scale of its Gauss-Newton matrix, however many rows of outputs an example has:
        "sampled" takes gradients at targets drawn from the model (the call takes `key=`), "exact"
        the columns of the root of the loss's Hessian, vectorised, one position of the outputs [N,
        *positions, O] after the other. Value and gradients stay those of the loss.
      samples: number of drawn targets; "sampled" only.
      sharing: "expand" takes every row as an example, "reduce" first averages inputs and sums
        output gradients over the positions and uses of one.
      batch_size: N; None: the leading axis of the first array after the parameters whose leading
        axis reaches the mean at the end of the loss (PRNG keys are not asked, and arrays in a tree
        of trees, as batch statistics are, come last).
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

    A kernel W may also be used transposed (a tied embedding, a derivative of the network inside the
    loss). All its uses share one pair (A, G). In a transposed use the roles swap: the scaled output
    gradient R ḡ is counted as an input, the scaled input a / R as an output gradient. Layers whose
    rows show no axis of length N count as one example in "reduce", scales and shifts.
    """
    _require_choices(loss_fn, statistic, fisher, samples, sharing, has_aux)
    is_objective = isinstance(loss_fn, Objective)

    def value_grads_curvature(params, *args, **kwargs):
        basis = kwargs.pop("basis", None) if statistic == "eigenbasis" else None
        key = kwargs.pop("key", None) if is_objective else None
        if fisher != "empirical":
            return of_model(params, args, kwargs, basis, key)
        traced = trace("value_grad_and_curvature", loss_fn, params, args, kwargs, batch_size)
        _require_examples(batch_size, traced.arrays)
        probing = Probing(traced, _measured(traced.layers, layers), statistic, sharing, basis)

        def loss(leaves, probes):
            result, after = probing(leaves, probes)
            value, aux = _value_and_aux("value_grad_and_curvature", result, has_aux)
            return value, (aux, after)

        take = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (value, (aux, after)), (grads, sums) = take(traced.leaves, probing.zeros)
        traced.update(after)
        curvature = probing.with_slopes(probing.finish(sums))
        return ((value, aux) if has_aux else value), traced.grads(grads), curvature

    def of_model(params, args, kwargs, basis, key):
        if fisher == "sampled" and key is None:
            raise ValueError(
                "value_grad_and_curvature: fisher='sampled' draws targets: call f(params, inputs, "
                "targets, key=key) with a fresh PRNG key at every step."
            )
        assert isinstance(loss_fn, Objective)
        function = loss_fn.value_and_outputs
        traced = trace("value_grad_and_curvature", function, params, args, kwargs, batch_size)
        probing = Probing(traced, _measured(traced.layers, layers), statistic, sharing, basis)
        (value, outputs), pull_back, after = jax.vjp(
            probing, traced.leaves, probing.zeros, has_aux=True
        )
        traced.update(after)
        grads, _ = pull_back((jnp.ones_like(value), jnp.zeros_like(outputs)))
        columns, positions = _cotangents(loss_fn, fisher, samples, outputs, key, kwargs)
        curvature = _model_curvature(
            lambda cotangent: probing.finish(pull_back((jnp.zeros_like(value), cotangent))[1]),
            columns / jnp.sqrt(jnp.asarray(traced.batch, columns.dtype)),
            positions,
            joins=statistic in ("raw", "rows"),
        )
        return value, traced.grads(grads), probing.with_slopes(curvature)

    return value_grads_curvature


def _require_examples(batch_size: int | None, arrays: Any):
    if batch_size is None and not any(map(jnp.ndim, arrays)):
        raise ValueError(
            "value_grad_and_curvature: no array after the parameters shows the number of "
            "examples, which scales the factors; give batch_size=."
        )


def _require_choices(
    loss_fn: Any, statistic: Any, fisher: Any, samples: int, sharing: Any, has_aux: Any
):
    """Refuses options that are none, or that do not fit the loss or each other."""
    choices = {
        "statistic": (statistic, STATISTIC_NAMES),
        "fisher": (fisher, FISHERS),
        "sharing": (sharing, SHARINGS),
        "has_aux": (has_aux, (True, False)),
    }
    for name, (given, expected) in choices.items():
        if not any(given is choice or given == choice for choice in expected):
            raise ValueError(
                f"value_grad_and_curvature: unknown {name}={given!r}; expected one of {expected}."
            )
    if statistic in ("rows", "input") and sharing == "reduce":
        raise ValueError(
            f"value_grad_and_curvature: {statistic=} needs sharing='expand'; 'reduce' sums rows "
            "first."
        )
    if statistic == "input" and fisher != "empirical":
        raise ValueError(
            f"value_grad_and_curvature: statistic='input' takes no targets, got {fisher=}; take "
            "fisher='empirical', whose inputs are the same."
        )
    if fisher != "empirical" and not isinstance(loss_fn, Objective):
        raise ValueError(
            f"value_grad_and_curvature: fisher={fisher!r} needs outputs and their likelihood, "
            "which a plain loss does not show; pass optax_curv.Objective(predict_fn, likelihood)."
        )
    if isinstance(loss_fn, Objective) and has_aux:
        raise ValueError(
            "value_grad_and_curvature: has_aux=True needs a plain loss; an Objective has no aux."
        )
    if isinstance(samples, str) or samples < 1:
        raise ValueError(f"value_grad_and_curvature: expected samples >= 1, got {samples=}.")


def _cotangents(
    objective: Objective,
    fisher: Fisher,
    samples: int,
    outputs: jax.Array,
    key: Key | None,
    kwargs: dict[str, Any],
) -> tuple[jax.Array, tuple[int, ...]]:
    """The cotangents of the outputs, and the axes of positions to pull back one after the other."""
    weights = kwargs.get("weights")
    if fisher == "sampled":
        drawn = objective.sampled_cotangents(key, outputs, samples=samples, weights=weights)
        return drawn, ()
    return objective.exact_cotangents(outputs, weights=weights), outputs.shape[1:-1]


def _model_curvature(
    measure: Callable, columns: jax.Array, positions: tuple[int, ...], joins: bool
) -> dict[str, Any]:
    """Sums G = Σ_c Σ_r g gᵀ over a layer's rows for cotangents c; A and the like enter once.

    Args:
      measure: the curvature for one cotangent.
      columns: the cotangents, [columns, *outputs.shape].
      positions: axes of the outputs between examples and features. Positions may meet inside the
        network, and so they are pulled back one after the other.
      joins: whether the statistic is rows, which are joined and not added.

    Returns:
      The curvature by layer.
    """
    count = math.prod(positions)
    if len(columns) * count == 1:
        return measure(columns[0])

    def at(position):
        if count == 1:
            return jax.vmap(measure)(columns)
        here = (jnp.arange(count) == position).reshape(1, *positions, 1)
        return jax.vmap(measure)(columns * here)

    if joins:
        rows = jax.lax.map(at, jnp.arange(count))
        return {name: statistics.joined(x) for name, x in rows.items()}
    still = measure(jnp.zeros(columns.shape[1:], columns.dtype))

    def add(total, position):
        def added(each, rest):  # `rest` is there without a cotangent, too
            return jnp.sum(each - rest, 0, dtype=each.dtype)

        return jax.tree.map(jnp.add, total, jax.tree.map(added, at(position), still)), None

    return jax.lax.scan(add, still, jnp.arange(count))[0]


def _value_and_aux(caller: str, result: Any, has_aux: bool) -> tuple[Any, Any]:
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise ValueError(
            f"{caller}: with has_aux=True expected a pair (loss, aux), got a "
            f"{type(result).__name__}."
        )
    pair: tuple[Any, Any] = result if has_aux else (result, None)
    value, aux = pair
    one = jax.tree_util.treedef_is_leaf(jax.tree.structure(value))
    if not one or jnp.shape(value):
        got = f"has shape {jnp.shape(value)}" if one else f"is a {type(value).__name__}"
        raise ValueError(
            f"{caller}: the loss {got}, expected a scalar; take the mean over the "
            "examples, or set has_aux=True if it returns (loss, aux)."
        )
    return value, aux


def _measured(found: Layers, wanted: Layers | None) -> Layers:
    """The wanted layers as they are in this loss; their rows and uses may differ."""
    if wanted is None:
        return found
    own = {layer.name: layer for layer in found}

    def described(layer: Layer) -> Layer:
        return dataclasses.replace(layer, rows=0, shared=1)

    for layer in wanted:
        same = own.get(layer.name)
        if same is None or described(same) != described(layer):
            but = "" if same is None else " as it was found, but with other axes or leaves"
            raise ValueError(
                f"value_grad_and_curvature: the layer {layer.name!r} is not in this loss{but}; "
                f"its layers are {list(own)}. Are these the layers of another model? Make them "
                "with find_layers(loss_fn, params, ...)."
            )
    return Layers([own[layer.name] for layer in wanted])
