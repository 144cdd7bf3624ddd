"""What layer-wise methods share: finding the layers' leaves, reading their statistics, one call for equal shapes."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_curv.curvature import FactorRows, KroneckerFactors, factors_of_rows
from optax_curv.layers import Layer, Layers, layer_leaves, layer_matrix
from optax_curv.linalg._compiler import cut_out
from optax_curv.preconditioners._axes.axis_factors import running_weight
from optax_curv.preconditioners._stacks.owners import (
    as_kept,
    divided,
    require_sharding,
    with_sharding_types,
)
from optax_curv.preconditioners._transformation import contracts

HIGHEST = jax.lax.Precision.HIGHEST
# A stack is a tuple of (layer's name, shape of its own leading axes).
Layout = tuple[tuple[tuple[str, tuple[int, ...]], ...], ...]


@dataclasses.dataclass(frozen=True)
class PresentLayer:
    """A layer as far as a tree holds it: without its kernel or bias where that leaf is masked.

    Attributes:
      layer: the layer with the paths of this tree and only its present leaves.
      whole: the layer as described, whose statistics arrive.
      dtype: of the layer's factors, float32 at least.
    """

    layer: Layer
    whole: Layer
    dtype: jnp.dtype

    @property
    def own_rows(self) -> slice:
        """Which rows of the whole layer's matrix, and coordinates of its input, are present."""
        first = self.whole.in_dim if self.layer.kernel is None else 0
        return slice(first, self.whole.in_dim + (self.layer.bias is not None))

    def statistic(self, method: str, value) -> tuple[jax.Array, jax.Array]:
        """Input and output factor of the layer's statistic, in the shapes of `layer.factor_shapes`."""
        whole, stack = self.whole, self.whole.stack
        if isinstance(value, FactorRows):
            self._require_rows(method, value)
            value = KroneckerFactors(*factors_of_rows(value, whole), jnp.int32(1))
        if not (hasattr(value, "input_factor") and hasattr(value, "output_factor")):
            raise ValueError(
                f"{method}: the statistic of layer {whole.name!r} is a {type(value).__name__}, expected one with "
                "input_factor and output_factor as optax_curv.value_grad_and_curvature makes."
            )
        widths = {"input_factor": whole.rows_of_matrix, "output_factor": whole.out_dim}
        for what, width in widths.items():
            shape, full, diagonal = (
                jnp.shape(getattr(value, what)),
                (*stack, width, width),
                (*stack, width),
            )
            if shape not in (full, diagonal):
                raise ValueError(
                    f"{method}: the {what} of layer {whole.name!r} has shape {shape}, expected {full} or its diagonal "
                    f"{diagonal}."
                )
        a, g = (jnp.asarray(getattr(value, what), self.dtype) for what in widths)
        rows = self.own_rows
        a = a[..., rows, rows] if a.ndim == len(stack) + 2 else a[..., rows]
        return tuple(map(_in_shape, (a, g), self.layer.factor_shapes))

    def _require_rows(self, method, value):
        for what, rows, width in (
            ("inputs", value.inputs, self.whole.rows_of_matrix),
            ("output_grads", value.output_grads, self.whole.out_dim),
        ):
            no_features = what == "inputs" and rows.ndim == value.output_grads.ndim - 1
            if not no_features and (rows.shape[:-2] != self.whole.stack or rows.shape[-1] != width):
                raise ValueError(
                    f"{method}: the {what} of layer {self.whole.name!r} have shape {rows.shape}, expected "
                    f"{(*self.whole.stack, 'R', width)}."
                )


def _in_shape(factor, shape):
    """A full factor as its diagonal or a diagonal one as a full factor, where `shape` asks for it."""
    if factor.ndim > len(shape):
        return jnp.diagonal(factor, axis1=-2, axis2=-1)
    return (
        factor
        if factor.ndim == len(shape)
        else factor[..., None] * jnp.eye(shape[-1], dtype=factor.dtype)
    )


def _is_gap(leaf):
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def leaves_by_path(tree) -> dict:
    """Leaves by key path as `jax.tree_util.keystr` writes it; None and optax.MaskedNode count as leaves."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=_is_gap)
    }


def match_layers(
    method: str, layers: Layers, tree, uncovered_allowed: bool
) -> dict[str, PresentLayer]:
    """The layers that a tree of parameters or updates holds, by name; wholly masked ones are left out."""
    leaves = leaves_by_path(tree)
    present, covered = {}, set()
    for layer in layers:
        # An nnx.State ends its paths in .value, while nnx.Optimizer hands over pure arrays.
        paths = [
            next((q for q in (p, p + ".value", p.removesuffix(".value")) if q in leaves), p)
            for p in layer.paths
        ]
        missing = [path for path in paths if path not in leaves]
        if missing and leaves:
            raise ValueError(
                f"{method}: layer {layer.name!r} covers {missing}, which the tree lacks; it has {list(leaves)}. Are "
                "these the layers of another model? Make them with optax_curv.find_layers from the same parameters."
            )
        covered.update(paths)
        found = dict(zip(layer.paths, paths, strict=True))
        kernel, bias = (
            None if path is None or _is_gap(leaves.get(found[path], 0)) else found[path]
            for path in (layer.kernel, layer.bias)
        )
        if kernel is None and bias is None:
            continue
        changes: dict = {"kernel": kernel, "bias": bias}
        if kernel is None:
            changes |= {"kind": "shift", "in_dim": 0, "kernel_split": None, "kernel_axes": None}
        dtypes = [leaves[path].dtype for path in (kernel, bias) if path in leaves]
        dtype = jnp.promote_types(jnp.float32, jnp.result_type(*dtypes or [jnp.float32]))
        present[layer.name] = PresentLayer(dataclasses.replace(layer, **changes), layer, dtype)
    gaps = [path for path, leaf in leaves.items() if path not in covered and not _is_gap(leaf)]
    if gaps and not uncovered_allowed:
        reasons = [
            f"{path} ({layers.uncovered[path]})" if path in layers.uncovered else path
            for path in gaps
        ]
        raise ValueError(
            f"{method}: no layer covers {', '.join(reasons)}. Pass fallback=, an Optax transformation for such leaves "
            "(for instance optax.scale_by_adam()), or leave them out with optax.masked or optax.partition."
        )
    return present


def read_curvature(method: str, layers: Layers, curvature) -> Mapping:
    """Refuses a curvature that is missing or not of these layers."""
    if curvature is None:
        raise ValueError(
            f"{method}: the extra argument curvature= is missing. Make it with value, grads, curvature = "
            "optax_curv.value_grad_and_curvature(loss_fn)(params, ...) and call update(grads, state, params, "
            "curvature=curvature)."
        )
    names = {layer.name for layer in layers}
    if not isinstance(curvature, Mapping) or set(curvature) != names:
        given = (
            sorted(curvature) if isinstance(curvature, Mapping) else f"a {type(curvature).__name__}"
        )
        raise ValueError(
            f"{method}: curvature must be a dict with the layers {sorted(names)}, got {given}. Make it with "
            "optax_curv.value_grad_and_curvature from the same layers."
        )
    return curvature


def layout_of(present: Mapping) -> Layout:
    """The stacks that hold the present layers, one for each kind of layer."""
    kinds: dict = {}
    for name in sorted(present):
        layer = present[name].layer
        shapes = tuple(shape[len(layer.stack) :] for shape in layer.factor_shapes)
        kind = (shapes, layer.rows_of_matrix, present[name].dtype, layer.kind in ("scale", "shift"))
        kinds.setdefault(kind, []).append((name, layer.stack))
    return tuple(map(tuple, kinds.values()))


class LayerStacks(Mapping):
    """Pytrees of arrays by layer, kept as stacks of equal shapes.

    As a mapping it cuts a layer's own arrays [*stack, ...] out of its stack.

    Attributes:
      layout: what lies where.
      groups: one pytree a stack, its arrays [layers, ...].
    """

    def __init__(self, layout: Layout, groups):
        self.layout, self.groups = layout, tuple(groups)

    @classmethod
    def of(cls, layout: Layout, values: Mapping[str, Any]) -> "LayerStacks":
        """Stacks of the layers' pytrees of arrays [*stack, ...]."""

        def group(entries):
            rows = [
                jax.tree.map(
                    lambda x, stack=stack: x.reshape(math.prod(stack), *x.shape[len(stack) :]),
                    values[name],
                )
                for name, stack in entries
            ]
            return rows[0] if len(rows) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *rows)

        return cls(layout, map(group, layout))

    def map(self, function: Callable, *others: "LayerStacks") -> "LayerStacks":
        """`function` of each stack's pytrees."""
        return LayerStacks(
            self.layout, map(function, self.groups, *(other.groups for other in others))
        )

    def __getitem__(self, name: str):
        for entries, group in zip(self.layout, self.groups, strict=True):
            ends = itertools.accumulate(math.prod(stack) for _, stack in entries)
            for (own, stack), end in zip(entries, ends, strict=True):
                if own == name:
                    part = functools.partial(cut_out, start=end - math.prod(stack), stack=stack)
                    return jax.tree.map(part, group)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (name for entries in self.layout for name, _ in entries)

    def __len__(self) -> int:
        return sum(map(len, self.layout))

    def __eq__(self, other) -> bool:
        return isinstance(other, LayerStacks) and (self.layout, self.groups) == (
            other.layout,
            other.groups,
        )

    __hash__ = None  # type: ignore[assignment]


jax.tree_util.register_pytree_with_keys(
    LayerStacks,
    lambda stacks: (
        [(jax.tree_util.SequenceKey(i), group) for i, group in enumerate(stacks.groups)],
        stacks.layout,
    ),
    LayerStacks,
)


def is_silent(statistic, batch: int = 0) -> jax.Array:
    """Whether a statistic is zero, or too small for arithmetic: bool of its first `batch` axes."""
    axes = tuple(range(batch, statistic.ndim))
    return jnp.max(jnp.abs(statistic), axis=axes, initial=0) < jnp.finfo(statistic.dtype).tiny


def average_factors(factors: KroneckerFactors, new_input, new_output, decay) -> KroneckerFactors:
    """Averages decay · old + (1 - decay) · new, or takes the new factors where the old ones are zero."""
    # They are while nothing reaches a layer: averaged in, zeros would make its first factors too
    # small, steps too long.

    def average(old, new):
        return jnp.where(is_silent(old), new, decay * old + (1 - decay) * new).astype(old.dtype)

    return KroneckerFactors(
        average(factors.input_factor, new_input),
        average(factors.output_factor, new_output),
        factors.count + 1,
    )


def zero_factors(present) -> dict[str, KroneckerFactors]:
    """Factors of the layers before any step."""

    def zeros(x):
        input_shape, output_shape = x.layer.factor_shapes
        return KroneckerFactors(
            jnp.zeros(input_shape, x.dtype), jnp.zeros(output_shape, x.dtype), jnp.int32(0)
        )

    return {name: zeros(x) for name, x in present.items()}


def averaged_stacks(method, present, factors: LayerStacks, count, curvature, decay, good):
    """The factors with this step's statistics averaged in, and whether those are sound; if not, or not good, as before.

    The weight of the newest of k is (1 - decay) / (1 - decayᵏ), so that the first batch stays no
    heavier than the others. Factors that are still zero start with what comes; a statistic that is
    zero leaves them as they are.
    """
    given = {name: x.statistic(method, curvature[name]) for name, x in present.items()}
    given = LayerStacks.of(factors.layout, given)
    sound = good & contracts.is_squarable(given)

    def average(old, new):
        a, g, seen = old
        silent, unseen = (is_silent(x[0], batch=1) | is_silent(x[1], batch=1) for x in (old, new))
        seen = jnp.where(silent, 0, seen)
        averaged = sound & ~unseen
        weight = jnp.where(
            averaged, running_weight(contracts.value_at(decay, count, a.dtype), seen), 0
        )

        def moved(old, new):
            w = weight.reshape(-1, *(1,) * (old.ndim - 1))
            return jnp.where(w == 1, new, jnp.where(w == 0, old, old + w * (new - old)))

        return KroneckerFactors(
            moved(a, new[0]), moved(g, new[1]), jnp.where(averaged, seen + 1, old.count)
        )

    return factors.map(average, given), sound


def zero_stacks(present) -> LayerStacks:
    """Factors of the layers before any step, their counts for each slice of a stack."""
    layers = {
        name: KroneckerFactors(*x[:2], jnp.zeros(present[name].layer.stack, jnp.int32))
        for name, x in zero_factors(present).items()
    }
    return LayerStacks.of(layout_of(present), layers)


def averaged(method, present, state, curvature, decay, update_every) -> dict[str, KroneckerFactors]:
    """The state's factors with this step's statistics averaged in, where the period says so."""
    due = state.count % update_every == 0
    factors = {}
    for name, x in present.items():
        old = state.factors[name]
        input_factor, output_factor = x.statistic(method, curvature[name])
        decay_now = contracts.value_at(decay, state.count, x.dtype)
        new = average_factors(old, input_factor, output_factor, decay_now)
        factors[name] = jax.tree.map(lambda new, old: jnp.where(due, new, old), new, old)
    return factors


def map_grouped(
    function: Callable, stacks: Mapping[Any, tuple], *columns: Mapping[Any, Any], sharding=None
) -> dict:
    """Maps a function over every key's arrays [*stack, ...], with one call for all keys of equal trailing shapes.

    `function` sees one leading axis, the slices of every layer of the group, which the devices of
    `sharding` divide among them. A column may hold None.
    """
    function = divided(function, sharding)
    groups: dict = {}
    for key, stack in stacks.items():
        found = [column[key] for column in columns]
        arrays = [x if x is None else x.reshape(-1, *x.shape[len(stack) :]) for x in found]
        kind = tuple(x if x is None else (x.shape[1:], x.dtype) for x in arrays)
        groups.setdefault(kind, {})[key] = arrays
    results = {}
    for group in groups.values():
        joined = function(
            *(
                x[0] if x[0] is None else jnp.concatenate(x)
                for x in zip(*group.values(), strict=True)
            )
        )
        first = 0
        for key in group:
            results[key] = jax.tree.map(
                functools.partial(cut_out, start=first, stack=stacks[key]), joined
            )
            first += math.prod(stacks[key])
    return {key: results[key] for key in stacks}


def layerwise(
    method, layers, state_type, init_rule, update_rule, *, kl_clip, fallback, factor_sharding
):
    """The transformation of a rule that acts on layers seen as matrices.

    Args:
      method: name for error messages.
      layers: see `scale_by_kfac`, as for the last three.
      state_type: NamedTuple with the fields count, fallback, total_notfinite and the rule's.
      init_rule: dict of `PresentLayer` -> the rule's fields.
      update_rule: (present, state, matrices, curvature, good) -> (directions by layer, new fields
        of the state, those which it has kept itself where the step is not good, good); the first
        `good`, bool [], says whether gradients are finite, the last whether statistics are, too.
      kl_clip: see there.
      fallback: see there.
      factor_sharding: see there.
    """
    contracts.require_numbers(method, kl_clip=kl_clip, above=0)
    require_sharding(method, factor_sharding)
    if not isinstance(layers, Layers):
        raise ValueError(
            f"{method}: expected layers from optax_curv.find_layers, got a {type(layers).__name__}."
        )
    has_fallback = fallback is not None

    def uncovered(tree):
        covered = {
            path
            for x in match_layers(method, layers, tree, True).values()
            for path in x.layer.paths
        }
        return jax.tree.map_with_path(
            lambda path, _: jax.tree_util.keystr(path) not in covered, tree
        )

    others = optax.masked(fallback or optax.identity(), uncovered)

    def init(params):
        present = match_layers(method, layers, params, has_fallback)
        others_only = uncovered(params)
        own = jax.tree.map(lambda other, leaf: None if other else leaf, others_only, params)
        contracts.require_float_leaves(method, own)
        leaves = leaves_by_path(own)
        for x in present.values() if leaves else ():
            jax.eval_shape(lambda own, layer=x.layer: layer_matrix(layer, own), leaves)
        # numbers of their own, as a buffer that stands twice in a state cannot be donated
        counts = {"count": jnp.int32(0), "total_notfinite": jnp.int32(0)}
        return state_type(
            **counts, fallback=others.init(params), **as_kept(init_rule(present), factor_sharding)
        )

    def update(updates, state, params=None, *, curvature=None, **extra_args):
        if params is not None:
            contracts.require_same_leaves(method, "updates", updates, "params", params)
        present = match_layers(method, layers, updates, has_fallback)
        curvature = read_curvature(method, layers, curvature)
        paths, treedef = jax.tree_util.tree_flatten_with_path(updates, is_leaf=_is_gap)
        leaves = {jax.tree_util.keystr(path): leaf for path, leaf in paths}
        matrices = {
            name: layer_matrix(x.layer, leaves).astype(x.dtype) for name, x in present.items()
        }
        good = contracts.is_squarable(updates)
        directions, fields, guarded, good = update_rule(present, state, matrices, curvature, good)
        if kl_clip is not None:
            decrease = sum(
                jnp.vdot(directions[name], matrices[name], precision=HIGHEST).real
                for name in present
            )
            # a NaN-free 1 where the decrease is zero, as the root of infinity is infinite
            scale = jnp.minimum(1, jnp.sqrt(kl_clip / jnp.maximum(decrease, 0)))
            directions = {name: scale.astype(d.dtype) * d for name, d in directions.items()}
        for name, x in present.items():
            leaves |= layer_leaves(x.layer, directions[name], leaves)
        new_updates = jax.tree.unflatten(treedef, leaves.values())
        new_updates, fallback_state = others.update(
            new_updates, state.fallback, params, **extra_args
        )
        fields = as_kept(fields, factor_sharding) | {
            "count": state.count + 1,
            "fallback": fallback_state,
        }
        new_updates, new_state = contracts.skip_unless(
            good, new_updates, state._replace(**fields), state
        )
        return new_updates, new_state._replace(**as_kept(guarded, factor_sharding))

    return optax.GradientTransformationExtraArgs(init, with_sharding_types(update))
