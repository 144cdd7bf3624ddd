"""K-FAC: natural gradient with one Kronecker-factored Fisher block for each layer."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_curv.curvature import FactorRows, KroneckerFactors
from optax_curv.layers import Layers
from optax_curv.linalg import symmetric_pairs
from optax_curv.preconditioners._layerwise.kronecker_factors import (
    RULES,
    Blocks,
    KroneckerInverse,
    LayerDiagnostics,
    held_to_rows,
    precondition,
)
from optax_curv.preconditioners._layerwise.layerwise import (
    LayerStacks,
    averaged_stacks,
    layerwise,
    zero_stacks,
)
from optax_curv.preconditioners._transformation import contracts
from optax_curv.preconditioners.quadratic_model import (
    adapt_damping,
    refuse_weight_decay,
    scale_by_quadratic_model,
)

INVERSES = ("cholesky", "eigh", "cg")
# A direction that its layer's current quadratic model finds this much too long or too short means
# stale inverses.
STALE_RATIO = 2.0
# Of the quadratic model's damping, what K-FAC takes in the adaptive mode: from 0.001 to 0.1 all
# train faster than 1.
ADAPTIVE_SHARE = 0.03


class ScaleByKFACState(NamedTuple):
    """State of `scale_by_kfac`.

    Attributes:
      count: steps taken, int32 [].
      stacks: the running averages as stacks of equal shapes, or pairs of them and their inverses
        where a later step needs these: not under inverse="cg", nor where invert_every is the Python
        number 1.
      moved: whether the factors have changed since they were inverted, bool [].
      stale: whether the next step inverts out of turn, bool [].
      diagnostics: `LayerDiagnostics` of the layers in the order of `factors`; zeros under
        inverse="cg".
      fallback: state of the transformation for uncovered leaves.
      total_notfinite: steps skipped, int32 [].
    """

    count: jax.Array  # type: ignore[override]
    stacks: LayerStacks
    moved: jax.Array
    stale: jax.Array
    diagnostics: LayerDiagnostics
    fallback: optax.OptState
    total_notfinite: jax.Array

    @property
    def factors(self) -> Mapping[str, KroneckerFactors]:
        """The running averages by layer."""
        return self.stacks.map(_factors)

    @property
    def inverses(self) -> Mapping[str, KroneckerInverse]:
        """The inverses of the damped factors by layer; none where none are kept."""
        kept = any(isinstance(group, _Pairs) for group in self.stacks.groups)
        return (self.stacks if kept else LayerStacks((), ())).map(_inverses)


class _Pairs(NamedTuple):
    """Factor and inverse of each side of a stack of layers, and how often averaged.

    Full ones are `symmetric_pairs`; diagonal ones are [layers, 2, 1, d], whose rank tells them from
    those.
    """

    input_pair: jax.Array
    output_pair: jax.Array
    count: jax.Array  # type: ignore[override]


def _zero_pair(factor):
    width, full = factor.shape[-1], factor.ndim == 3
    return jnp.zeros(
        (len(factor), width, width + 1) if full else (len(factor), 2, 1, width), factor.dtype
    )


def _part(pair, which: int):
    """The factors (0) or the inverses (1) of a stack of pairs."""
    return (
        pair[:, which, 0]
        if pair.ndim == 4
        else (symmetric_pairs.first, symmetric_pairs.second)[which](pair)
    )


def _with_part(pair, which: int, part):
    if pair.ndim == 4:
        return pair.at[:, which, 0].set(part)
    return (symmetric_pairs.with_first, symmetric_pairs.with_second)[which](pair, part)


def _factors(group) -> KroneckerFactors:
    if isinstance(group, KroneckerFactors):
        return group
    return KroneckerFactors(_part(group[0], 0), _part(group[1], 0), group[2])


def _inverses(group: _Pairs) -> KroneckerInverse:
    return KroneckerInverse(_part(group[0], 1), _part(group[1], 1))


def _with_factors(group, factors: KroneckerFactors):
    if isinstance(group, KroneckerFactors):
        return factors
    return _Pairs(
        _with_part(group[0], 0, factors[0]), _with_part(group[1], 0, factors[1]), factors[2]
    )


def _with_inverses(group: _Pairs, inverses: KroneckerInverse) -> _Pairs:
    return _Pairs(
        _with_part(group[0], 1, inverses[0]), _with_part(group[1], 1, inverses[1]), group[2]
    )


def scale_by_kfac(
    layers: Layers,
    damping=1e-3,
    *,
    decay=0.95,
    damping_rule="pi",
    inverse="cholesky",
    update_every=1,
    invert_every=1,
    kl_clip=None,
    fallback=None,
    factor_sharding=None,
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
      layers: from `find_layers`, or made by hand.
      damping: λ ≥ 0 of each block; a number or a schedule. A layer whose statistics have all been
        zero stays still.
      decay: weight of the old factors in the averages, in [0, 1]; a number or a schedule. Zero
        factors are replaced.
      damping_rule: "pi" (d_A = π√λ, d_G = √λ/π with π² = (tr A/d_A)/(tr G/d_G)) or "trace" (max(λ ·
        tr(F)/dim, 1e-10) for each factor F). An element-wise scale or shift takes all of λ at G.
      inverse: "cholesky", "eigh" (slower, for factors that are far from definite), or "cg"
        (conjugate gradients at every step, for layers too wide to factorise).
      update_every: steps between averaging statistics in; None: 1, or `invert_every` where the
        statistics are rows.
      invert_every: steps between inversions; the first step always inverts. The Python number 1,
        the default, keeps no inverses in the state, which halves it. Under `jax.vmap` over a
        hyper-parameter longer periods save nothing. Without effect under "cg".
      kl_clip: None, or c: all directions are scaled by min(1, sqrt(c / Σ ⟨u, ∇⟩)), the sum over all
        layers.
      fallback: transformation for leaves that no layer covers, such as `optax.scale_by_adam()`;
        None refuses them.
      factor_sharding: None, or a `jax.sharding.NamedSharding` whose first entry names mesh axes,
        such as ``NamedSharding(mesh, PartitionSpec(("data", "model")))``. Their devices invert and
        apply factors of equal widths in turn, and keep them divided along the first axis that their
        number divides.

    Returns:
      A transformation whose `update` needs `curvature=`, a dict from layer name to an object with
      input_factor and output_factor. With a gradient or statistic that is not finite it returns
      zeros and keeps its state.

    Raises:
      ValueError: for an unknown choice or a number out of range; in `init` and `update` for layers
        of another model, uncovered leaves without `fallback`, and a curvature that is missing or
        does not fit.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> layer = optax_curv.Layer("dense", "dense", "['w']", None, in_dim=2, out_dim=1)
      >>> tx = optax_curv.scale_by_kfac(optax_curv.Layers([layer]), damping=0.0)
      >>> params = {"w": jnp.ones((2, 1))}
      >>> statistic = optax_curv.KroneckerFactors(jnp.diag(jnp.array([4.0, 1.0])), jnp.eye(1), jnp.int32(1))
      >>> updates, state = tx.update(params, tx.init(params), params, curvature={"dense": statistic})
      >>> updates["w"].ravel().tolist()
      [0.25, 1.0]

    References:
      Martens and Grosse 2015, arXiv:1503.05671, eq. (1), §5, §6.3. Grosse and Martens 2016,
      arXiv:1602.01407, for convolutions. The KL clip is that of Ba, Grosse and Martens, ICLR 2017,
      §5, without the learning rate. The check of stale inverses is ours.
    """
    method = "scale_by_kfac"
    contracts.require_choice(method, "damping_rule", damping_rule, RULES)
    contracts.require_choice(method, "inverse", inverse, INVERSES)
    if (
        damping_rule == "pi"
    ):  # the floor of "trace" acts on the product, so that any number is meaningful
        contracts.require_numbers(method, damping=damping, at_least=0)
    contracts.require_numbers(method, decay=decay, at_least=0, at_most=1)
    contracts.require_numbers(
        method, update_every=update_every, invert_every=invert_every, at_least=1
    )
    always = (
        isinstance(invert_every, int) and invert_every == 1
    )  # then no step needs the inverses of an earlier one

    def init_rule(present):
        stacks = zero_stacks(present)
        dtype = jnp.result_type(jnp.float32, *(x.dtype for x in present.values()))
        if inverse != "cg" and not always:
            stacks = stacks.map(lambda f: _Pairs(_zero_pair(f[0]), _zero_pair(f[1]), f[2]))
        return {
            "stacks": stacks,
            "moved": jnp.bool_(False),
            "stale": jnp.bool_(False),
            "diagnostics": LayerDiagnostics(
                *(jnp.zeros(len(present), dtype) for _ in LayerDiagnostics._fields)
            ),
        }

    def update_rule(present, state, matrices, curvature, good):
        matrices = LayerStacks.of(state.stacks.layout, matrices)
        rows = any(isinstance(statistic, FactorRows) for statistic in curvature.values())
        period = update_every if update_every is not None else invert_every if rows else 1
        lam = jnp.asarray(damping(state.count) if callable(damping) else damping)

        def averaged():
            factors = state.stacks.map(_factors)
            factors, sound = averaged_stacks(
                method, present, factors, state.count, curvature, decay, good
            )
            return state.stacks.map(_with_factors, factors), sound

        def blocks():
            return Blocks(present, stacks.map(_factors), lam, damping_rule, factor_sharding)

        def inverted():
            inverses, diagnostics = blocks().invert(inverse)
            return stacks.map(_with_inverses, inverses), diagnostics

        averaging = state.count % period == 0
        if isinstance(period, int) and period == 1:
            stacks, good = averaged()
        else:
            stacks, good = jax.lax.cond(good & averaging, averaged, lambda: (state.stacks, good))
        if inverse == "cg":
            return blocks().solve_by_cg(matrices), {}, {"stacks": stacks}, good
        if always:
            inverses, diagnostics = blocks().invert(inverse)
            directions = precondition(inverses, matrices, factor_sharding)
            return directions, {"diagnostics": diagnostics}, {"stacks": stacks}, good
        due = good & ((state.count % invert_every == 0) | state.stale)
        stacks, diagnostics = jax.lax.cond(due, inverted, lambda: (stacks, state.diagnostics))
        directions = precondition(stacks.map(_inverses), matrices, factor_sharding)
        if rows:
            directions, ratio = held_to_rows(present, directions, matrices, curvature, diagnostics)
            fields = {"diagnostics": diagnostics._replace(model_ratio=ratio)}
            return directions, fields, {"stacks": stacks}, good
        moved = ~due & (state.moved | averaging)
        directions, ratio = jax.lax.cond(
            moved,
            lambda: blocks().checked(directions, matrices),
            lambda: (directions, jnp.ones_like(diagnostics.model_ratio)),
        )
        fields = {
            "moved": moved,
            "stale": jnp.any((ratio > STALE_RATIO) | (ratio < 1 / STALE_RATIO)),
            "diagnostics": diagnostics._replace(model_ratio=ratio),
        }
        return directions, fields, {"stacks": stacks}, good

    options = {"kl_clip": kl_clip, "fallback": fallback, "factor_sharding": factor_sharding}
    return layerwise(method, layers, ScaleByKFACState, init_rule, update_rule, **options)


def kfac(
    learning_rate: optax.ScalarOrSchedule | None,
    layers: Layers,
    damping=None,
    *,
    decay=0.95,
    damping_rule="pi",
    inverse="cholesky",
    update_every=None,
    invert_every=None,
    kl_clip=None,
    fallback=None,
    factor_sharding=None,
    momentum=0.9,
    weight_decay=0.0,
) -> optax.GradientTransformationExtraArgs:
    """K-FAC with decoupled weight decay, momentum and a learning rate; or with none of them to choose.

    With a learning rate: a chain of `scale_by_kfac`, `optax.add_decayed_weights`, `optax.trace` and
    `optax.scale_by_learning_rate`.

    With `learning_rate=None`, the adaptive mode: `adapt_damping` around `scale_by_kfac` and
    `scale_by_quadratic_model`. Step size and momentum minimise the objective's quadratic model at
    every step, and its damping λ follows how well it foretells the change of the objective. K-FAC
    is damped by 0.03 λ: its (A + π√λ I) ⊗ (G + √λ/π I) exceeds A ⊗ G + λI by terms in √λ, and the
    model sets the length of the step whatever the direction. `update` then also needs `objective=`
    (an `Objective`), `batch=` (inputs, targets) and `value=` (the loss already computed).

    Args:
      learning_rate: a number or a schedule; None for the adaptive mode.
      layers: see `scale_by_kfac`, as for all up to `factor_sharding`.
      damping: see there; None: 1e-3, and 0.1 as the first one of the adaptive mode.
      decay: see there.
      damping_rule: see there.
      inverse: see there.
      update_every: see there.
      invert_every: see there; None: 20, and 10 in the adaptive mode.
      kl_clip: see there.
      fallback: see there.
      factor_sharding: see there.
      momentum: decay of the heavy ball; without effect in the adaptive mode.
      weight_decay: added to the direction, times the parameters, before the momentum.

    Returns:
      A transformation whose `update` needs `curvature=`.

    Raises:
      ValueError: as `scale_by_kfac`; and for a weight decay in the adaptive mode, whose model would
        not know of it.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> layer = optax_curv.Layer("dense", "dense", "['w']", None, in_dim=2, out_dim=1)
      >>> tx = optax_curv.kfac(0.1, optax_curv.Layers([layer]), damping=0.0)
      >>> params = {"w": jnp.ones((2, 1))}
      >>> statistic = optax_curv.KroneckerFactors(jnp.diag(jnp.array([4.0, 1.0])), jnp.eye(1), jnp.int32(1))
      >>> updates, state = tx.update(params, tx.init(params), params, curvature={"dense": statistic})
      >>> print(updates["w"].ravel())
      [-0.025 -0.1 ]

    References:
      Martens and Grosse 2015, §6.4, §6.5 and §7 for the adaptive mode, whose §6.6 searches for
      K-FAC's own damping where here it is a part of λ; else see `scale_by_kfac`.
    """
    given, adaptive = locals(), learning_rate is None
    period = invert_every if invert_every is not None else 10 if adaptive else 20

    def direction(damping):
        return contracts.handed_on(
            scale_by_kfac, given | {"damping": damping, "invert_every": period}
        )

    if not adaptive:
        return optax.chain(
            direction(1e-3 if damping is None else damping),
            optax.add_decayed_weights(weight_decay),
            optax.trace(momentum),
            optax.scale_by_learning_rate(learning_rate),
        )
    refuse_weight_decay("kfac", weight_decay)

    def damped(lam):
        pieces = direction(ADAPTIVE_SHARE * lam), scale_by_quadratic_model(lam)
        return optax.chain(*pieces, optax.scale_by_learning_rate(1.0))

    return adapt_damping(damped, 0.1 if damping is None else damping)


def layer_diagnostics(opt_state) -> str:
    """A table of the K-FAC layers in an optimizer's state: damping, condition, trace and model ratios.

    `LayerDiagnostics`, the `diagnostics` of that state, defines the figures. A damping above the
    one asked for, or a condition near the inverse of the machine epsilon, tells of a factor that is
    hardly definite; a model ratio far from 1 of stale inverses.

    Args:
      opt_state: the state of `scale_by_kfac`, alone or anywhere within the state of a chain,
        outside `jax.jit`.

    Returns:
      The table, one line a layer; print it.

    Raises:
      ValueError: if the state holds no such diagnostics.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> layer = optax_curv.Layer("dense", "dense", "['w']", None, in_dim=2, out_dim=1)
      >>> tx = optax_curv.kfac(0.1, optax_curv.Layers([layer]), damping=1.0)
      >>> params = {"w": jnp.ones((2, 1))}
      >>> statistic = optax_curv.KroneckerFactors(jnp.diag(jnp.array([4.0, 1.0])), jnp.eye(1), jnp.int32(1))
      >>> updates, state = tx.update(params, tx.init(params), params, curvature={"dense": statistic})
      >>> print(optax_curv.layer_diagnostics(state))
      layer  input_damping  output_damping  input_condition  output_condition  trace_ratio  model_ratio
      dense  1.58           0.632           2.16             1                 2.5          1
    """

    def is_kfac(x):
        return isinstance(getattr(x, "diagnostics", None), LayerDiagnostics)

    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_kfac) if is_kfac(x)]
    if not found:
        raise ValueError(
            "layer_diagnostics: expected the state of scale_by_kfac, found no diagnostics of layers in it."
        )
    rows = [("layer", *LayerDiagnostics._fields)]
    for state in found:
        for name, *figures in sorted(
            zip(state.factors, *state.diagnostics, strict=True), key=lambda row: row[0]
        ):
            rows.append((name, *(f"{float(figure):.3g}" for figure in figures)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
