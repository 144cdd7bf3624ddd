"""K-FAC's input side alone, before any optimizer."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_curv.curvature import InputFactor
from optax_curv.layers import Layers
from optax_curv.linalg.factors import Factor
from optax_curv.preconditioners._axes.refresh import is_scheduled
from optax_curv.preconditioners._layerwise.factors import array_of, by_layer
from optax_curv.preconditioners._layerwise.inputs import (
    InputPairs,
    averaged_inputs,
    measured_inputs,
    with_roots,
    zero_inputs,
)
from optax_curv.preconditioners._layerwise.members import present_layers
from optax_curv.preconditioners._layerwise.rule import LayerRule
from optax_curv.preconditioners._layerwise.view import LayerStacks
from optax_curv.preconditioners._stacks.owners import owners_of
from optax_curv.preconditioners._transformation.numbers import require_numbers, value_at
from optax_curv.preconditioners._transformation.transformation import (
    Step,
    counters,
    transformation,
)
from optax_curv.typing import Number, Schedulable, Sharding


class ScaleByInputFactorState(NamedTuple):
    """State of `scale_by_input_factor`; layers of equal shapes share a stack of N matrices.

    Attributes:
      count: steps taken, int32 [].
      since: steps since the last refresh, int32 [].
      stacks: by stack the averaged input factors with their roots.
      total_notfinite: steps skipped, int32 [].
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    since: jax.Array
    stacks: dict[str, InputPairs]
    total_notfinite: jax.Array

    @property
    def factors(self) -> dict[str, InputFactor]:
        """The running averages by layer."""
        pairs = self.stacks.items()
        return by_layer({name: InputFactor(array_of(x.factor), x.count) for name, x in pairs})

    def spectra(self) -> dict[str, dict[str, Factor]]:
        """The factors that diagnostics read, by stack and side."""
        return {name: {"input_factor": x.factor} for name, x in self.stacks.items()}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _InputFactor(LayerRule):
    """The input side's mathematics; `scale_by_input_factor` documents the options."""

    guarded = ("stacks",)  # whose averages have weight zero, and whose roots are taken when sound

    power: Number
    ridge: Number

    def check_options(self):
        """Refuses options that cannot be, by name."""
        require_numbers(self.method, power=self.power, above=0, at_most=1)
        require_numbers(self.method, ridge=self.ridge, at_least=0)
        require_numbers(self.method, every=self.update_every, at_least=1)
        self.check_layers()

    def view(self, tree: Any) -> LayerStacks:
        """The layers of a tree that have inputs of their own; all other leaves pass."""
        present = present_layers(self.method, self.layers, tree, uncovered_allowed=True)
        with_inputs = {name: x for name, x in present.items() if not x.layer.is_elementwise}
        return LayerStacks(self.method, tree, with_inputs)

    def diagonals(self, name, shape):
        """Whether the factors of rows and of columns are diagonal; columns have none."""
        return not self.seen.kind(name).dense_input, True

    def init_stacks(self, structs):
        """Zeros: the first statistics set everything."""
        since, stacks = jnp.zeros([], jnp.int32), zero_inputs(self.seen, structs)
        return ScaleByInputFactorState(**counters(), since=since, stacks=stacks)

    def measured(self, curvature):
        """The input factors of this step's statistics, by stack."""
        return {"factors": measured_inputs(self.method, self.seen, curvature)}

    def is_due(self, state):
        """Whether this step averages its statistics in and takes roots: sooner at the start."""
        period = jnp.asarray(self.update_every).astype(jnp.int32)
        return is_scheduled(state.count, state.since, period)

    def update_stacks(self, grads, state, sound, *, factors, **extra_args):
        """The step u = (A + ridge · tr(A)/d · I)^(-power) ∇."""
        del extra_args
        decay = value_at(self.decay, state.count, jnp.result_type(float))

        def refreshed():
            bound = self.statistic_bound
            return with_roots(
                averaged_inputs(state.stacks, factors, decay, bound, sound), self.power, self.ridge
            )

        stacks = self.when_due(state, sound, refreshed, lambda: state.stacks)
        directions = {name: x.root.matmul(grads[name]) for name, x in stacks.items()}
        since = jnp.where(self.is_due(state), 1, optax.safe_increment(state.since))
        return Step(directions, state._replace(since=since, stacks=stacks), sound)


def scale_by_input_factor(
    layers: Layers,
    power: Number = 0.5,
    ridge: Number = 0.15,
    *,
    decay: Schedulable = 0.95,
    every: Number = 10,
    statistic_bound: Number | None = 10.0,
    sharding: Sharding = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies each layer's gradient by a root of its inputs' second moment; for any optimizer.

    It is the input side of K-FAC alone, which needs no output gradients. With A = E[a aᵀ] of a
    layer's inputs, averaged over the steps, d the width of A and ∇ [rows, out] the layer's gradient
    as a matrix (the bias is the last row),

        u = (A + ridge · tr(A)/d · I)^(-power) ∇.

    Nothing else is scaled: u is as much smaller than ∇ as the inputs' second moment to that power.
    Muon, Shampoo with `rms` and Adam do not see such a factor; before others let
    `normalize_by_reference(optax.identity())` follow with ``grad=``, or choose the learning rate
    anew. `power=1` is what `scale_by_kfac` does at the input with ``damping_rule="trace"`` and this
    damping. Scales, shifts and leaves that no layer covers pass as they are.

        capture = optax_curv.value_grad_and_curvature(loss_fn, layers=layers, statistic="input")
        tx = optax.chain(optax_curv.scale_by_input_factor(layers), optax.contrib.muon(0.02))
        value, grads, curvature = capture(params, batch)
        updates, state = tx.update(grads, state, params, curvature=curvature)

    Args:
      layers: the layers of the loss, from `find_layers` or made by hand; or some of them, such as
        the head, which are then also those of the capture.
      power: above 0, at most 1.
      ridge: at least 0, in units of the mean eigenvalue tr(A)/d. A layer whose inputs have all been
        zero stays still; with 0, so do directions without inputs.
      decay: of the averages of A, in [0, 1]; a number or a schedule. The averages are free of the
        bias of their start.
      every: most steps between two refreshes, of the average and of its roots; early on 1 + count /
        4. Statistics of the steps between are not looked at, so that "input" costs nothing there.
      statistic_bound: b ≥ 1, or None. After a layer's first ten statistics a factor whose largest
        entry is more than b times that of its average is scaled down to that before it is averaged
        in, so that an outlier neither stalls the layer nor stays. A second one in a row
        may be b² times as large, and so on, so that growth is followed within a few refreshes. The
        state counts them in `held`.
      sharding: None, or the devices that share the work and the state: a `jax.sharding.Mesh`, all
        of whose axes count, or a `NamedSharding` whose first entry names mesh axes. Each device
        owns equally many layers of every shape, keeps what belongs to them, and alone computes
        their directions.

    Returns:
      A `GradientTransformationExtraArgs` whose `update` needs `curvature=`, a dict from layer name
      to an object with input_factor (``statistic="input"`` or "kronecker"), or to `FactorRows`.
      With a gradient or a statistic that is not finite it returns zeros and keeps its state but for
      `total_notfinite`.

    Raises:
      ValueError: for a number out of range; in `init` and `update` for layers of another model and
        for a curvature that is missing or does not fit.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> layer = optax_curv.Layer("dense", "dense", "['w']", None, in_dim=2, out_dim=1)
      >>> tx = optax_curv.scale_by_input_factor(optax_curv.Layers([layer]), ridge=0.0)
      >>> params = {"w": jnp.ones((2, 1))}
      >>> statistic = optax_curv.InputFactor(jnp.diag(jnp.array([4.0, 1.0])), jnp.int32(1))
      >>> updates, state = tx.update(params, tx.init(params), curvature={"dense": statistic})
      >>> updates["w"].ravel().tolist()
      [0.5, 1.0]

    References:
      Martens and Grosse 2015, arXiv:1503.05671, §3, for A; the power and the ridge are ours to
      choose.
    """
    rule = _InputFactor(
        method="scale_by_input_factor",
        layers=layers,
        power=power,
        ridge=ridge,
        decay=decay,
        update_every=every,
        statistic_bound=statistic_bound,
        owners=owners_of("scale_by_input_factor", sharding),
    )
    rule.check_options()
    return transformation(rule)
