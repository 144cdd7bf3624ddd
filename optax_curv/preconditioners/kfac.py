"""K-FAC: natural gradient with one Kronecker-factored Fisher block for each layer."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import optax

from optax_curv.curvature import KroneckerFactors
from optax_curv.layers import Layers, aligned, require_concrete
from optax_curv.linalg.factors import Factor
from optax_curv.preconditioners._layerwise import pairs
from optax_curv.preconditioners._layerwise.blocks import (
    Blocks,
    KroneckerInverse,
    LayerDiagnostics,
    precondition,
    worst_of_layers,
    zero_figures,
)
from optax_curv.preconditioners._layerwise.factors import (
    array_of,
    by_layer,
    kronecker_factors,
    names_in_order,
    spectra_of,
)
from optax_curv.preconditioners._layerwise.rows import held_to_rows
from optax_curv.preconditioners._layerwise.rule import LayerRule, fallback_of, heavy_ball
from optax_curv.preconditioners._stacks.owners import owners_of
from optax_curv.preconditioners._transformation.averages import is_due
from optax_curv.preconditioners._transformation.numbers import (
    is_python_number,
    require_choice,
    require_numbers,
    value_at,
)
from optax_curv.preconditioners._transformation.transformation import (
    Step,
    counters,
    transformation,
)
from optax_curv.preconditioners.quadratic_model import (
    adapt_damping,
    refuse_weight_decay,
    scale_by_quadratic_model,
)
from optax_curv.typing import (
    DAMPING_RULES,
    INVERSES,
    DampingRule,
    Inverse,
    Number,
    Schedulable,
    Sharding,
)

# A direction that its layer's current quadratic model finds this much too long or too short means
# stale inverses.
STALE_RATIO = 2.0
# Of the quadratic model's damping, what K-FAC takes in the adaptive mode: from 0.001 to 0.1 all
# train faster than 1.
ADAPTIVE_SHARE = 0.03


class ScaleByKFACState(NamedTuple):
    """State of `scale_by_kfac`; layers of equal shapes share a stack of N matrices.

    Attributes:
      count: steps taken, int32 [].
      stacks: by stack the averaged factors, or pairs of them and their inverses where a later step
        needs these: not under inverse="cg", nor where invert_every is the Python number 1.
      places: by stack, the place of each row's layer among all, int32 [N].
      moved: whether the factors have changed since they were inverted, bool [].
      stale: whether the next step inverts out of turn, bool [].
      figures: by stack the `LayerDiagnostics` of its rows; zeros under inverse="cg".
      diagnostics: the worst of these of each layer, in the order of `layers`; a field, as
        `optax.tree_utils.tree_get` finds no property.
      fallback: state of the transformation for uncovered leaves.
      total_notfinite: steps skipped, int32 [].
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    stacks: dict[str, pairs.Kept]
    places: dict[str, jax.Array]
    moved: jax.Array
    stale: jax.Array
    figures: dict[str, LayerDiagnostics]
    diagnostics: LayerDiagnostics
    fallback: Any
    total_notfinite: jax.Array

    @property
    def factors(self) -> Mapping[str, KroneckerFactors]:
        """The running averages by layer."""
        return kronecker_factors(pairs.factors_of(self.stacks))

    @property
    def inverses(self) -> Mapping[str, KroneckerInverse]:
        """The inverses of the damped factors by layer; none where none are kept."""
        arrays = {
            name: KroneckerInverse(*map(array_of, inverse))
            for name, inverse in pairs.inverses_of(self.stacks).items()
        }
        return by_layer(arrays)

    def spectra(self) -> dict[str, dict[str, Factor]]:
        """The factors that diagnostics read, by stack and side."""
        return spectra_of(pairs.factors_of(self.stacks))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _KFAC(LayerRule):
    """K-FAC's mathematics; `scale_by_kfac` documents the options."""

    guarded = ("stacks",)  # whose averages have weight zero, and which are inverted when sound

    damping: Schedulable
    damping_rule: DampingRule
    inverse: Inverse
    invert_every: Number

    def check_options(self):
        """Refuses options that cannot be, by name."""
        require_choice(self.method, DAMPING_RULES, damping_rule=self.damping_rule)
        require_choice(self.method, INVERSES, inverse=self.inverse)
        # The floor of "trace" acts on the product, so that any number is meaningful there.
        least = 0 if self.damping_rule == "pi" else None
        require_numbers(self.method, damping=self.damping, at_least=least, schedule=True)
        require_numbers(self.method, invert_every=self.invert_every, at_least=1)
        self.check_layers()

    @property
    def inverts_always(self) -> bool:
        """True if every step inverts, so that none needs the inverses of an earlier one."""
        return is_python_number(self.invert_every, 1)

    def init_stacks(self, structs):
        """Zeros: the first statistics set everything."""
        view = self.seen
        kept: dict[str, pairs.Kept] = dict(view.zero_factors(structs))
        if self.inverse != "cg" and not self.inverts_always:
            kept = {n: pairs.zero_pairs(x) for n, x in view.zero_factors(structs).items()}
        places = {name: view.places(name, len(x)) for name, x in structs.items()}
        figures = zero_figures(structs)
        return ScaleByKFACState(
            **counters(),
            stacks=kept,
            places=places,
            moved=jnp.zeros([], bool),
            stale=jnp.zeros([], bool),
            figures=figures,
            diagnostics=worst_of_layers(figures, places),
            fallback=(),
        )

    @property
    def period(self):
        """Steps between averaging statistics in; rows are averaged when factors are inverted."""
        if self.update_every is not None:
            return self.update_every
        return self.invert_every if self.has_rows else 1

    def update_stacks(self, grads, state, sound, *, factors, **extra_args):
        """The step u = (A + d_A I)⁻¹ ∇ (G + d_G I)⁻¹, with factors that this step has moved."""
        del extra_args

        def average():
            old = pairs.factors_of(state.stacks)
            new, _ = self.with_statistics(old, factors, state, sound)
            return pairs.with_factors(state.stacks, new)

        stacks = self.when_due(state, sound, average, lambda: state.stacks)
        # Numbers as they are: the factors decide in which dtype they are used.
        damping = value_at(self.damping, state.count, jnp.result_type(float))

        def blocks(kept):
            return Blocks(self.seen, pairs.factors_of(kept), damping, self.damping_rule)

        new = state._replace(stacks=stacks)
        if self.inverse == "cg":
            return Step(blocks(stacks).solve_by_cg(grads), new, sound)
        if self.inverts_always:
            inverses, figures = blocks(stacks).invert(self.inverse)
            return Step(precondition(inverses, grads), new._replace(figures=figures), sound)

        def inverted():
            inverses, figures = blocks(stacks).invert(self.inverse)
            return pairs.with_inverses(stacks, inverses), figures

        due = sound & (is_due(state.count, self.invert_every) | state.stale)
        kept, figures = jax.lax.cond(due, inverted, lambda: (stacks, state.figures))
        directions = precondition(pairs.inverses_of(kept), grads)
        new = new._replace(stacks=kept, figures=figures)
        if self.has_rows:
            return Step(directions, new, sound)
        moved = ~due & (state.moved | self.is_due(state))
        directions, ratios = jax.lax.cond(
            moved,
            lambda: blocks(kept).checked(directions, grads),
            lambda: (directions, {n: jnp.ones_like(x.model_ratio) for n, x in figures.items()}),
        )
        off = [jnp.any((x > STALE_RATIO) | (x < 1 / STALE_RATIO)) for x in ratios.values()]
        stale = self.anywhere(jnp.any(jnp.array(off, bool)))
        figures = {n: x._replace(model_ratio=ratios[n]) for n, x in figures.items()}
        return Step(directions, new._replace(figures=figures, moved=moved, stale=stale), sound)

    def held(self, step, grads, curvature):
        """The step within what its own rows say of it, where inverses are of earlier ones."""
        directions, state = step.directions, step.state
        if self.has_rows and self.inverse != "cg" and not self.inverts_always:
            given = directions, grads, curvature, state.figures
            directions, figures = held_to_rows(self.seen, *given)
            state = state._replace(figures=figures)
        worst = worst_of_layers(state.figures, state.places)
        return step._replace(directions=directions, state=state._replace(diagnostics=worst))


def scale_by_kfac(
    layers: Layers,
    damping: Schedulable = 1e-3,
    *,
    decay: Schedulable = 0.95,
    damping_rule: DampingRule = "pi",
    inverse: Inverse = "cholesky",
    update_every: Number | None = 1,
    statistic_bound: Number | None = 10.0,
    invert_every: Number = 1,
    kl_clip: Number | None = None,
    fallback: optax.GradientTransformation | None = None,
    sharding: Sharding = None,
    factor_sharding: Sharding = None,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions each layer's gradient by its Kronecker-factored Fisher block.

    With A = E[a aᵀ] of a layer's inputs and G = E[g gᵀ] of its output gradients, averaged over the
    steps, the direction of the layer seen as a matrix ∇ [rows, out] (the bias is the last row) is

        u = (A + d_A I)⁻¹ ∇ (G + d_G I)⁻¹.

    `update(grads, state, params, curvature=curvature)` takes the statistics of the same step.
    Between inversions a direction that is longer than the minimiser of its layer's *current*
    quadratic model along it is cut to that, and where the two differ by more than a factor of two
    the next step inverts out of turn. So long periods are safe.

    With ``statistic="rows"`` the layers' rows come in the place of factors, which are made of them
    only in the steps that average them in. Every direction is held to what some 64 of the step's
    own rows say of it, ⟨u, F u⟩ = N Σ_r (a_rᵀ U ḡ_r)², which costs far less and keeps a period of
    20 safe. The rows must be those of the whole batch: within `jax.shard_map` and over
    micro-batches give factors, which can be averaged.

    Args:
      layers: the layers of the loss, from `find_layers` or made by hand.
      damping: λ ≥ 0 of each block; a number or a schedule. A layer whose statistics have all been
        zero stays still.
      decay: of the averages of A and G, in [0, 1]; a number or a schedule. The averages are free of
        the bias of their start: after k statistics the newest one has the weight (1 - decay) / (1 -
        decayᵏ). Zero factors are replaced.
      damping_rule: "pi" (d_A = π√λ, d_G = √λ/π with π² = (tr A/d_A)/(tr G/d_G)) or "trace" (max(λ ·
        tr(F)/dim, 1e-10) for each factor F). An element-wise scale or shift takes all of λ at G.
      inverse: "cholesky", "eigh" (slower, for factors that are far from definite), or "cg"
        (conjugate gradients at every step, for layers too wide to factorise).
      update_every: steps between averaging statistics in; None: 1, or `invert_every` where the
        statistics are rows.
      statistic_bound: b ≥ 1, or None. After a layer's first ten statistics a factor whose largest
        entry is more than b times that of its average is scaled down to that before it is averaged
        in, so that an outlier neither stalls the layer nor stays. A second one in a row
        may be b² times as large, and so on, so that growth is followed within a few steps. The
        state counts them in `held`.
      invert_every: steps between inversions; the first step always inverts. The Python number 1,
        the default, keeps no inverses in the state, which halves it. Under `jax.vmap` over a
        hyper-parameter longer periods save nothing. Without effect under "cg".
      kl_clip: None, or c > 0: all directions are scaled by min(1, sqrt(c / Σ ⟨u, ∇⟩)), the sum over
        all layers, so that Σ ⟨u, F u⟩ ≤ c where the direction itself is the step.
      fallback: transformation for leaves that no layer covers, such as `optax.scale_by_adam()`. It
        sees the tree of these leaves in float32 at least. None refuses them.
      sharding: None, or the devices that share the work and the state: a `jax.sharding.Mesh`, all
        of whose axes count, or a `NamedSharding` whose first entry names mesh axes. Each device
        owns equally many layers of every shape, keeps what belongs to them, and alone computes
        their directions.
      factor_sharding: the old name of `sharding`.

    Returns:
      A `GradientTransformationExtraArgs` whose `update` needs `curvature=`, a dict from layer name
      to an object with input_factor and output_factor, or to `FactorRows`. With a gradient or
      statistic that is not finite it returns zeros and keeps its state but for `total_notfinite`.

    Raises:
      ValueError: for an unknown choice or a number out of range; in `init` and `update` for layers
        of another model, uncovered leaves without `fallback`, and a curvature that is missing or
        does not fit.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> layer = optax_curv.Layer("dense", "dense", "['w']", None, in_dim=2, out_dim=1)
      >>> tx = optax_curv.scale_by_kfac(optax_curv.Layers([layer]), damping=0.0)
      >>> params = {"w": jnp.ones((2, 1))}
      >>> a, g = jnp.diag(jnp.array([4.0, 1.0])), jnp.eye(1)
      >>> statistic = optax_curv.KroneckerFactors(a, g, jnp.int32(1))
      >>> updates, state = tx.update(params, tx.init(params), curvature={"dense": statistic})
      >>> updates["w"].ravel().tolist()
      [0.25, 1.0]

    References:
      Martens and Grosse 2015, arXiv:1503.05671, eq. (1), §5, §6.3. Grosse and Martens 2016,
      arXiv:1602.01407, for convolutions. The KL clip is that of Ba, Grosse and Martens, ICLR 2017,
      §5. The check of stale inverses is ours.
    """
    rule = _KFAC(
        method="scale_by_kfac",
        layers=layers,
        damping=damping,
        decay=decay,
        damping_rule=damping_rule,
        inverse=inverse,
        update_every=update_every,
        statistic_bound=statistic_bound,
        invert_every=invert_every,
        kl_clip=kl_clip,
        fallback=fallback_of(fallback),
        owners=owners_of("scale_by_kfac", sharding, factor_sharding),
    )
    rule.check_options()
    return transformation(rule)


def kfac(
    learning_rate: Schedulable | None,
    layers: Layers,
    damping: Schedulable | None = None,
    *,
    decay: Schedulable = 0.95,
    damping_rule: DampingRule = "pi",
    inverse: Inverse = "cholesky",
    update_every: Number | None = None,
    statistic_bound: Number | None = 10.0,
    invert_every: Number | None = None,
    kl_clip: Number | None = 2e-3,
    fallback: optax.GradientTransformation | None = None,
    sharding: Sharding = None,
    factor_sharding: Sharding = None,
    momentum: Number = 0.9,
    weight_decay: Number = 0.0,
    gradient_bound: Number | None = 3.0,
) -> optax.GradientTransformationExtraArgs:
    """K-FAC with weight decay, momentum and a learning rate; or with none of them to choose.

    With a learning rate η, and u the direction of `scale_by_kfac` for parameters θ, the step is

        m ← momentum · m + u + weight_decay · θ,    θ ← θ - η m,

    layer by layer, but m ← u + weight_decay · θ for a layer whose m would climb, ⟨m, ∇⟩ < 0.

    With `learning_rate=None`, the adaptive mode: `adapt_damping` around `scale_by_kfac` and
    `scale_by_quadratic_model`. Step size and momentum minimise the objective's quadratic model at
    every step, and its damping λ follows how well it foretells the change of the objective. K-FAC
    is damped by 0.03 λ: its (A + π√λ I) ⊗ (G + √λ/π I) exceeds A ⊗ G + λI by terms in √λ, and the
    model sets the length of the step whatever the direction. `update` then also needs `objective=`
    (an `Objective`), `batch=` (inputs, targets) and `value=` (the loss already computed).

    Args:
      learning_rate: η, a number or a schedule; None for the adaptive mode.
      layers: the layers of the loss, from `find_layers` or made by hand.
      damping: λ ≥ 0 of each layer's block; a number or a schedule. None: 1e-3, and 0.1 as the first
        one of the adaptive mode, which takes a number only.
      decay: of the averages of A and G, in [0, 1]; a number or a schedule. The averages are free of
        the bias of their start: after k statistics the newest one has the weight (1 - decay) / (1 -
        decayᵏ). Zero factors are replaced.
      damping_rule: "pi" (d_A = π√λ, d_G = √λ/π with π² = (tr A/d_A)/(tr G/d_G)) or "trace" (max(λ ·
        tr(F)/dim, 1e-10) for each factor F). An element-wise scale or shift takes all of λ at G.
      inverse: "cholesky", "eigh" (slower, for factors that are far from definite), or "cg"
        (conjugate gradients at every step, for layers too wide to factorise).
      update_every: steps between averaging statistics in; None: 1, or `invert_every` where the
        statistics are rows.
      statistic_bound: b ≥ 1, or None. After a layer's first ten statistics a factor whose largest
        entry is more than b times that of its average is scaled down to that before it is averaged
        in, so that an outlier neither stalls the layer nor stays. A second one in a row
        may be b² times as large, and so on, so that growth is followed within a few steps. The
        state counts them in `held`.
      invert_every: steps between inversions; the first step always inverts, and a direction that
        the current factors find off by more than a factor of two inverts out of turn. None: 20, and
        10 in the adaptive mode.
      kl_clip: None, or c > 0: all directions are scaled down where the step -η u would exceed
        Σ ⟨ηu, F ηu⟩ = c, the sum over all layers and F the damped blocks; momentum adds to that.
        kfac-jax's `norm_constraint` is this with `momentum=0`, or of the step before momentum.
        Without effect in the adaptive mode, which chooses the length of the step. The default keeps
        networks stable whose weights are small at first: at η = 0.1 a GPT-2 of width 32 on
        Shakespeare ends 150 steps at 2.78 with 2e-3 and at 3.27 with 5e-3, a ViT on digits at 0.31
        and 0.50. An autoencoder needs 105 steps to its target with it, 91 with 5e-3 and more than
        120 with 1e-3.
      fallback: transformation for leaves that no layer covers, such as `optax.scale_by_adam()`. It
        sees the tree of these leaves in float32 at least. None refuses them.
      sharding: None, or the devices that share the work and the state: a `jax.sharding.Mesh`, all
        of whose axes count, or a `NamedSharding` whose first entry names mesh axes. Each device
        owns equally many layers of every shape, keeps what belongs to them, and alone computes
        their directions.
      factor_sharding: the old name of `sharding`.
      momentum: decay of the heavy ball, a number; without effect in the adaptive mode. `kl_clip`
        bounds u and not m, which may have been gathered where the curvature was far lower, hence
        the restart: at 5e-3 the loss of that GPT-2 rises from 4.5 to 7.5 without it, to no more
        than 4.5 with it.
      weight_decay: decoupled, added to the direction, times the parameters, before the momentum.
        Other than the Python number 0, `update` needs `params`.
      gradient_bound: b ≥ 1, or None. After ten steps the norm of each layer's gradient is held to b
        times its own running mean, so that an outlier moves and teaches no more than a few ordinary
        gradients; `bound_by_running_norm` has the rule. The state counts in `held` how often.
        Without effect in the adaptive mode, which refuses steps that are too long.

    Returns:
      A `GradientTransformationExtraArgs` whose `update` needs `curvature=`, as `scale_by_kfac`.
      With a NaN or an infinity in a gradient or statistic no leaf moves.

    Raises:
      ValueError: as `scale_by_kfac`; and for a weight decay in the adaptive mode, whose model would
        not know of it.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> layer = optax_curv.Layer("dense", "dense", "['w']", None, in_dim=2, out_dim=1)
      >>> tx = optax_curv.kfac(0.1, optax_curv.Layers([layer]), damping=0.0, kl_clip=None)
      >>> params = {"w": jnp.ones((2, 1))}
      >>> a, g = jnp.diag(jnp.array([4.0, 1.0])), jnp.eye(1)
      >>> statistic = optax_curv.KroneckerFactors(a, g, jnp.int32(1))
      >>> updates, state = tx.update(params, tx.init(params), curvature={"dense": statistic})
      >>> print(updates["w"].ravel())
      [-0.025 -0.1  ]

    References:
      Martens and Grosse 2015, arXiv:1503.05671: eq. (1), §5 and §6.3 for the direction; §6.4, §6.5
      and §7 for the adaptive mode, whose §6.6 searches for K-FAC's own damping where here it is a
      part of λ. Ba, Grosse and Martens, ICLR 2017, §5: the KL clip. O'Donoghue and Candès 2015,
      arXiv:1204.3982, §3.2, for the restart, which here is by layer.
    """
    adaptive = learning_rate is None
    start: Any = (0.1 if adaptive else 1e-3) if damping is None else damping
    period = (10 if adaptive else 20) if invert_every is None else invert_every
    rule = _KFAC(
        method="kfac",
        layers=layers,
        damping=start,
        decay=decay,
        damping_rule=damping_rule,
        inverse=inverse,
        update_every=update_every,
        statistic_bound=statistic_bound,
        invert_every=period,
        kl_clip=kl_clip,
        step_rate=1.0 if learning_rate is None else learning_rate,
        fallback=fallback_of(fallback),
        owners=owners_of("kfac", sharding, factor_sharding),
    )
    rule.check_options()
    if not adaptive:
        return heavy_ball(rule, learning_rate, momentum, weight_decay, gradient_bound)
    refuse_weight_decay("kfac", weight_decay)

    def damped(lam: Any) -> optax.GradientTransformation:
        direction = dataclasses.replace(rule, damping=ADAPTIVE_SHARE * lam, kl_clip=None)
        return optax.chain(
            transformation(direction),
            scale_by_quadratic_model(lam),
            optax.scale_by_learning_rate(1.0),
        )

    return adapt_damping(damped, start)


@overload
def layer_diagnostics(opt_state: Any, *, as_dict: Literal[False] = False) -> str: ...
@overload
def layer_diagnostics(opt_state: Any, *, as_dict: Literal[True]) -> dict[str, dict[str, float]]: ...
def layer_diagnostics(
    opt_state: Any, *, as_dict: bool = False
) -> str | dict[str, dict[str, float]]:
    """Writes a table of the K-FAC layers in an optimizer's state.

    `LayerDiagnostics`, the `diagnostics` of that state, defines the figures. A damping above the
    one asked for, or a condition near the inverse of the machine epsilon, tells of a factor that is
    hardly definite; a model ratio far from 1 of stale inverses.

    Args:
      opt_state: the state of `scale_by_kfac`, alone or anywhere within the state of a chain,
        outside `jax.jit`.
      as_dict: whether to return the numbers instead, for a log.

    Returns:
      The table, one line a layer in the order of `layers`; print it. With `as_dict`
      {layer: {figure: number}} in this order.

    Raises:
      ValueError: if the state holds no such diagnostics, or under `jax.jit`.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> layer = optax_curv.Layer("dense", "dense", "['w']", None, in_dim=2, out_dim=1)
      >>> tx = optax_curv.scale_by_kfac(optax_curv.Layers([layer]), damping=1.0)
      >>> params = {"w": jnp.ones((2, 1))}
      >>> a, g = jnp.diag(jnp.array([4.0, 1.0])), jnp.eye(1)
      >>> statistic = optax_curv.KroneckerFactors(a, g, jnp.int32(1))
      >>> _, state = tx.update(params, tx.init(params), params, curvature={"dense": statistic})
      >>> for line in optax_curv.layer_diagnostics(state).splitlines():
      ...     print(line[:58].rstrip())
      layer  input_damping  output_damping  input_condition  out
      dense  1.58           0.632           2.16             1
    """

    def is_kfac(x: Any) -> bool:
        return isinstance(x, ScaleByKFACState)

    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_kfac) if is_kfac(x)]
    if not found:
        raise ValueError(
            "layer_diagnostics: expected the state of scale_by_kfac, found no diagnostics of "
            "layers in it. For other methods take optax_curv.diagnostics.curvature_table."
        )
    require_concrete("layer_diagnostics", found)
    columns = LayerDiagnostics._fields
    numbers = {
        name: dict(zip(columns, map(float, row), strict=True))
        for state in found
        for name, row in zip(
            names_in_order(state.places), zip(*state.diagnostics, strict=True), strict=True
        )
    }
    if as_dict:
        return numbers
    rows = [(name, *(f"{x:.3g}" for x in row.values())) for name, row in numbers.items()]
    return "\n".join(aligned([("layer", *columns), *rows]))
