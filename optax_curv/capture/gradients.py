"""Value, gradients and curvature of a loss in one backward pass."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_curv.capture import layouts, statistics
from optax_curv.capture.batch import UNKNOWN
from optax_curv.capture.grouping import Use, group
from optax_curv.capture.jaxpr import inlined
from optax_curv.capture.layers import Layers
from optax_curv.capture.marks import Batch, Examples, Mark, Node
from optax_curv.capture.model_fisher import model_curvature
from optax_curv.capture.nnx_models import take_apart
from optax_curv.capture.objective import Objective
from optax_curv.capture.tracing import Tap, Walk, run_with_taps

STATISTICS = ("kronecker", "diagonal", "eigenbasis", "raw", "rows")
FISHERS = ("empirical", "sampled", "exact")
SHARINGS = ("expand", "reduce")


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """A function's jaxpr with the layers found in it.

    Attributes:
      layers: the layers.
      node: the function of parameter leaves and array arguments, flat, and where the uses are.
      uses: the uses of layers by number.
      leaves: the parameter leaves as given.
      arrays: the array arguments as given.
      restore: takes flat results to (the function's own result, what `update` wants).
      grads: takes the leaves' gradients to a tree like the parameters.
      update: writes the state of an nnx module after the call back into it.
      batch: number of examples.
    """

    layers: Layers
    node: Node
    uses: dict[int, Use]
    leaves: list
    arrays: list
    restore: Callable
    grads: Callable
    update: Callable
    batch: int


def _is_array(x) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _is_numeric(x) -> bool:
    return _is_array(x) or isinstance(x, bool | int | float | complex)


def trace(function: Callable, params, args, kwargs, batch_size: int | None = None) -> Trace:
    """Traces a function of parameters and finds its layers; nothing is computed.

    Args:
      function: `function(params, *args, **kwargs)`.
      params: parameters, arrays or `jax.ShapeDtypeStruct`.
      args: positional arguments; leaves that are not arrays are static.
      kwargs: keyword arguments, likewise.
      batch_size: number of examples; None: the leading axis of the first array after `params`.

    Returns:
      The trace.

    Raises:
      ValueError: if a parameter is not a floating-point array, or a `while_loop` surrounds a layer.
    """
    model = take_apart(params)
    grads_tree = jax.tree.structure(model.grads_like if model else params)
    if model:
        function, params = model.wrap(function), model.params
    paths_and_leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    paths, leaves = [path for path, _ in paths_and_leaves], [leaf for _, leaf in paths_and_leaves]
    for path, leaf in paths_and_leaves:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise ValueError(
                f"value_grad_and_curvature: the parameter {jax.tree_util.keystr(path) or 'at the root'} has dtype "
                f"{jnp.result_type(leaf)}, expected a floating-point array; pass what is not trained as another "
                "argument."
            )
    others, other_tree = jax.tree.flatten((args, kwargs))
    arrays = [x for x in others if _is_array(x)]

    def flat(leaves, arrays):
        given = iter(arrays)
        args, kwargs = jax.tree.unflatten(other_tree, [next(given) if _is_array(x) else x for x in others])
        results, results_tree = jax.tree.flatten(function(jax.tree.unflatten(tree, leaves), *args, **kwargs))
        static[:] = [results_tree, [None if _is_numeric(x) else x for x in results]]
        return [x for x in results if _is_numeric(x)]

    def restore(flat):
        given = iter(flat)
        result = jax.tree.unflatten(static[0], [next(given) if x is None else x for x in static[1]])
        return result if model else (result, None)

    static: list = []
    jaxpr = inlined(jax.make_jaxpr(flat)(leaves, arrays))
    shapes = [tuple(v.aval.shape) for v in jaxpr.jaxpr.invars]
    batch = batch_size or next((shape[0] for shape in shapes[len(leaves) :] if shape), 1)
    walk = Walk([jax.tree_util.keystr(path) for path in paths], batch)
    node = Node(jaxpr)
    results = walk.node(node, *_initial_marks(shapes, [*map(jnp.shape, jaxpr.consts)], len(leaves), batch))
    walk.seeds.settle(walk.uses, results)
    unused = {leaf: reason for mark in results for leaf, reason in mark.derived}
    layers, uses = group(walk.uses, walk.refused, unused, paths, shapes[: len(leaves)], batch)
    update, unflatten = model.update if model else lambda after: None, functools.partial(jax.tree.unflatten, grads_tree)
    return Trace(layers, node, uses, leaves, arrays, restore, unflatten, update, batch)


def _initial_marks(shapes, constants, parameters: int, batch: int) -> tuple[list[Mark], list[Mark]]:
    """Marks of the arguments and of the constants: whole leaves, and arrays whose leading axis holds the examples.

    Constants count only where no argument has such an axis; where nothing has, every array may depend on the examples.
    """
    leaves = [Mark(leaves=(layouts.whole(leaf, shapes[leaf]),)) for leaf in range(parameters)]
    groups = [[shape[:1] == (batch,) for shape in group] for group in (shapes[parameters:], constants)]
    if any(groups[0]) or not any(groups[1]):
        groups[1] = [False] * len(constants)
    unknown = None if any(groups[0] + groups[1]) else UNKNOWN
    marks = [[Mark(batch=Batch(0) if holds else unknown) for holds in group] for group in groups]
    return leaves + marks[0], marks[1]


def find_layers(loss_fn: Callable, params, *args, **kwargs) -> Layers:
    """Finds the layers of a loss by following its parameters through it.

    A parameter that meets an activation in a matrix product or a convolution is a layer's kernel, whatever reshaped,
    cast or sliced it on the way; one that is added to a layer's output is its bias; one that rows are picked from is an
    embedding; one that multiplies or is added to activations is a scale or a shift. The loss is only traced: arrays
    may be `jax.ShapeDtypeStruct`s, and nothing is computed.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs)`, or an `Objective`.
      params: parameters (a pytree of arrays, or an nnx Module or State).
      *args: further arguments as the loss takes them.
      **kwargs: further keyword arguments.

    Returns:
      The layers in the order of use; `print` shows a table, `uncovered` what is in no layer, and why.

    Raises:
      ValueError: if a parameter is not a floating-point array, or a `while_loop` surrounds a layer.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_curv
      >>> params = {"hidden": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}}
      >>> def loss(params, x):
      ...     return jnp.mean(jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"]))
      >>> print(optax_curv.find_layers(loss, params, jax.ShapeDtypeStruct((8, 3), jnp.float32)))
      layer   kind   kernel                in  out  stack  shared  bias                rows
      hidden  dense  ['hidden']['kernel']  3   4    -      1       ['hidden']['bias']  8
    """
    return trace(loss_fn, params, args, kwargs).layers


class Probing:
    """A traced function with probes at its layers.

    Args:
      traced: the function.
      layers: the layers to measure, of those in the trace.
      statistic: see `value_grad_and_curvature`.
      sharing: likewise.
      basis: (U_A, U_G) by layer name, for "eigenbasis".
    """

    def __init__(self, traced: Trace, layers: Layers, statistic: str, sharing: str, basis=None):
        self.traced, self.statistic, self.sharing = traced, statistic, sharing
        names = {layer.name for layer in layers}
        self._uses = {number: use for number, use in traced.uses.items() if use.layer.name in names}
        self._first: dict[str, Use] = {}
        self._basis: dict[str, Any] = {}
        self._taps, self.zeros = {}, {}
        dtype = jnp.finfo(jnp.result_type(jnp.float32, *traced.leaves)).dtype  # real
        for number, use in self._uses.items():
            if sharing == "reduce" and use.found.examples == Examples() and use.batch > 1:
                raise ValueError(
                    "value_grad_and_curvature: sharing='reduce' sums over the rows of each example, but nothing tells "
                    f"the examples apart where the layer {use.layer.name!r} is used; take sharing='expand', or leave "
                    "it out of layers=."
                )
            keeps_rows = statistics.keeps_rows(statistic, use.layer)
            key = f"{use.layer.name}#{number}" if keeps_rows else use.layer.name
            lengths = tuple(length for length, _ in use.found.loops)
            if key not in self.zeros:
                self._first[key] = use
                self._basis[key] = basis[use.layer.name] if basis is not None else (None, None)
                self.zeros[key] = statistics.probe(statistic, sharing, use, dtype, lengths)
            loop = use.example_loop if statistics.is_linear(use.layer, sharing) else None
            loops = tuple(own or keeps_rows or depth == loop for depth, own in enumerate(use.loops))
            self._taps[number] = Tap(use.found, key, self._tap(use), loops, use.batch)

    def _tap(self, use: Use) -> Callable:
        """An identity on a layer's output whose derivative writes what is measured into the probe."""

        @jax.custom_vjp
        def tap(output, operands, probe):
            return output

        def forward(output, operands, probe):
            return output, (operands, probe)

        def backward(kept, grad):
            operands, (zeros, basis) = kept
            measured = statistics.contribution(self.statistic, self.sharing, use, operands, grad, zeros, basis)
            return grad, None, (measured, None)

        tap.defvjp(forward, backward)
        return tap

    def __call__(self, leaves, probes):
        """The function's result at parameter leaves, with probes (zeros) whose gradients are what is measured.

        The second result is what `traced.update` wants.
        """
        probes = {key: (probe, self._basis[key]) for key, probe in probes.items()}
        traced = self.traced
        return traced.restore(run_with_taps(traced.node, [*leaves, *traced.arrays], self._taps, probes))

    def finish(self, sums: dict) -> dict[str, Any]:
        """The curvature of each layer from the gradients of the probes."""
        finish_rows = statistics.finish_raw if self.statistic == "raw" else statistics.finish_rows
        found, by_layer = {}, {}
        for key, use in self._first.items():
            name = use.layer.name
            if statistics.keeps_rows(self.statistic, use.layer):
                by_layer.setdefault(name, []).append((use, sums[key]))
                found[name] = None  # which keeps its place
            else:
                found[name] = statistics.finish(self.statistic, self.sharing, use, sums[key], self._basis[key])
        rows = {name: finish_rows(*map(list, zip(*parts, strict=True))) for name, parts in by_layer.items()}
        return found | rows


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

    At each layer, with inputs a and output gradients ḡ of the loss of the whole batch (a mean over N examples), the
    backward pass also returns a statistic of the rows. "kronecker" gives the factors of the per-example loss

    .. math::
      A = \frac{1}{R} \sum_r a_r a_r^T, \qquad G = N \sum_r \bar g_r \bar g_r^T,

    over all R rows (examples × positions × uses of the kernel), so that duplicating the batch changes neither. Scales
    and shifts have the block of their own per-example gradients u as G = N Σ ū ūᵀ, and A = 1.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs) -> scalar`, a *mean* over examples, or an `Objective`.
      layers: the layers to measure, from `find_layers`; None: all.
      statistic: "kronecker" (`KroneckerFactors`), "diagonal" (diagonal of the Fisher as [*stack, rows, out]),
        "eigenbasis" (`EigenbasisMoments`; the call takes `basis=`, a dict from layer name to (U_A, U_G),
        None for the side of a diagonal factor), "raw" (`RawSamples`) or "rows" (`FactorRows`, of which `scale_by_kfac`
        makes the factors itself, only where its period asks for them: cheaper than "kronecker" for periods above 1).
      fisher: "empirical": gradients of the loss itself. The other two need an `Objective`; value and gradients stay
        those of its loss, and A ⊗ G is on the scale of its Gauss-Newton matrix, however many rows of outputs an example
        has: "sampled" takes gradients at targets drawn from the model (the call takes `key=`), "exact" the columns of
        the root of the loss's Hessian, vectorised, one position of the outputs [N, *positions, O] after the other.
      samples: number of drawn targets, vectorised; "sampled" only.
      sharing: "expand" takes every row as an example, "reduce" averages inputs and sums output gradients over the
        positions and uses that belong to one example first.
      batch_size: N; None: the leading axis of the first array after the parameters.
      has_aux: whether the loss returns (loss, aux).

    Returns:
      `f(params, *args, **kwargs) -> (value, grads, curvature)`, or `((value, aux), grads, curvature)`; `curvature` is
      a dict from layer name to its statistic, in float32 at least.

    Raises:
      ValueError: for an unknown choice; in `f`, for a loss that is not a scalar, parameters that are not
        floating-point, layers of another model, `fisher` "sampled" or "exact" with a plain loss, or "sampled" without
        a key.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> def loss(params, x, y):
      ...     return jnp.mean((x @ params["w"] - y) ** 2)
      >>> params, x, y = {"w": jnp.ones((3, 1))}, jnp.ones((8, 3)), jnp.zeros((8, 1))
      >>> value, grads, curvature = optax_curv.value_grad_and_curvature(loss)(params, x, y)
      >>> curvature["w"].input_factor.shape, float(curvature["w"].output_factor[0, 0])
      ((3, 3), 36.0)

    References:
      Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", 2015, eq. 1;
      Eschenhagen et al., "Kronecker-factored approximate curvature for modern neural network architectures", 2023,
      eqs. 8 and 9 ("expand" and "reduce").

    A kernel used on both sides (a tied embedding, derivatives of the network inside the loss) has one pair of factors:
    for the use whose input lies on the output side, R ḡ takes the place of a and a / R that of g, which keeps their
    product. Layers whose rows show no axis of length N count as one example in "reduce", scales and shifts.
    """
    for name, given, choices in (
        ("statistic", statistic, STATISTICS),
        ("fisher", fisher, FISHERS),
        ("sharing", sharing, SHARINGS),
    ):
        if given not in choices:
            raise ValueError(f"value_grad_and_curvature: unknown {name}={given!r}; expected one of {choices}.")
    if statistic == "rows" and sharing == "reduce":
        raise ValueError("value_grad_and_curvature: statistic='rows' needs sharing='expand'; 'reduce' sums rows first.")
    is_objective = isinstance(loss_fn, Objective)
    if fisher != "empirical" and not is_objective:
        raise ValueError(
            f"value_grad_and_curvature: fisher={fisher!r} needs the network's outputs and their likelihood, which a "
            "plain loss function does not show; pass optax_curv.Objective(predict_fn, likelihood)."
        )
    if is_objective and has_aux:
        raise ValueError("value_grad_and_curvature: has_aux=True needs a plain loss; an Objective has no aux.")
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
                "value_grad_and_curvature: no array after the parameters shows the number of examples, by which the "
                "output factors are scaled; give batch_size=."
            )
        probing = Probing(traced, _measured(traced.layers, layers), statistic, sharing, basis)

        def loss(leaves, probes):
            result, after = probing(leaves, probes)
            value, aux = result if has_aux else (result, None)
            if jnp.shape(value):
                raise ValueError(
                    f"value_grad_and_curvature: the loss has shape {jnp.shape(value)}, expected a scalar; take the "
                    "mean over the examples, or set has_aux=True if it returns (loss, aux)."
                )
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
        (value, outputs), pull_back, after = jax.vjp(probing, traced.leaves, probing.zeros, has_aux=True)
        traced.update(after)
        grads, _ = pull_back((jnp.ones_like(value), jnp.zeros_like(outputs)))
        curvature = model_curvature(
            loss_fn,
            outputs,
            lambda cotangent: probing.finish(pull_back((jnp.zeros_like(value), cotangent))[1]),
            fisher=fisher,
            batch=traced.batch,
            weights=kwargs.get("weights"),
            key=key,
            samples=samples,
            keeps_rows=statistic in ("raw", "rows"),
        )
        return value, traced.grads(grads), curvature

    return value_grads_curvature


def _measured(found: Layers, wanted: Layers | None) -> Layers:
    """The layers to measure; the wanted ones must be among those found, up to the number of rows."""
    if wanted is None:
        return found
    own = {layer.name: layer for layer in found}
    for layer in wanted:
        same = own.get(layer.name)
        if same is None or dataclasses.replace(same, rows=0, shared=1) != dataclasses.replace(layer, rows=0, shared=1):
            raise ValueError(
                f"value_grad_and_curvature: the layer {layer!r} is not in this loss, which has {list(own.values())}; "
                "are these the layers of another model? Make them with find_layers(loss_fn, params, ...)."
            )
    return Layers([own[layer.name] for layer in wanted])
