"""Shampoo: momentum multiplied on every axis by a root of the gradients' second moment."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_curv.layers import Layers
from optax_curv.linalg._chunks import moved_in_chunks
from optax_curv.linalg.roots import factor_roots, power_in_basis
from optax_curv.preconditioners._axes import kept as kept_axes
from optax_curv.preconditioners._axes import moments, refresh
from optax_curv.preconditioners._stacks.axes import LeafRule
from optax_curv.preconditioners._stacks.owners import owners_of
from optax_curv.preconditioners._transformation import averages
from optax_curv.preconditioners._transformation.aliases import matrices_and_adam
from optax_curv.preconditioners._transformation.numbers import (
    is_python_number,
    require_choice,
    require_dtype,
    require_flags,
    require_numbers,
    static,
    structural,
    value_at,
)
from optax_curv.preconditioners._transformation.transformation import (
    Step,
    counters,
    transformation,
)
from optax_curv.typing import ROOTS, AdamFor, Number, Root, Schedulable, Sharding, Stacked, Tree


class ScaleByShampooState(NamedTuple):
    """State of `scale_by_shampoo`; everything is kept by stack, N being its number of tensors.

    Attributes:
      count: steps taken, int32 [].
      since: steps since the last scheduled refresh of the roots, int32 [].
      momentum: by stack (or stack of blocks), [N, *shape], float32 at least.
      factors: by stack the tuple of its axes: a `linalg.factors.SymmetricPair`
        of a factor and its root, [N, d, d + 1], or a `Diagonal` factor [N, d].
      bases: with `root="qr"` by stack the tuple of its axes' orthonormal columns [N, d, d], or ones
        [N, d] where the factor is diagonal; else an empty dict.
      energies: by stack tr(F R) of every axis, and what it was when R was taken, [N, axes, 2].
      fallback: state of the transformation for leaves that Shampoo does not take.
      total_notfinite: steps skipped, int32 [].
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    since: jax.Array
    momentum: dict[str, jax.Array]
    factors: dict[str, kept_axes.Kept]
    bases: dict[str, tuple[jax.Array, ...]]
    energies: dict[str, jax.Array]
    fallback: Any
    total_notfinite: jax.Array

    def spectra(self) -> dict[str, tuple[jax.Array, ...]]:
        """The factors that diagnostics read, by stack and axis."""
        return {name: kept_axes.factors_of(kept) for name, kept in self.factors.items()}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _Shampoo(LeafRule):
    """Shampoo's mathematics; `scale_by_shampoo` documents the options."""

    complex_leaves = True
    guarded = ("momentum", "factors", "bases", "energies")  # whose averages have weight zero

    decay: Schedulable
    b1: Schedulable
    nesterov: bool
    exponent: Number
    damping: Number
    root_every: Schedulable
    root: Root
    refresh_growth: Number
    kl: bool
    fresh_values: bool
    drop_below: Number | None
    max_dim: int
    precond_dtype: Any

    def check_options(self):
        """Refuses options that cannot be, by name."""
        require_choice(self.method, ROOTS, root=self.root)
        require_flags(
            self.method, nesterov=self.nesterov, kl=self.kl, fresh_values=self.fresh_values
        )
        require_dtype(self.method, precond_dtype=self.precond_dtype)
        fractions: Any = {"at_least": 0, "at_most": 1, "schedule": True}
        require_numbers(self.method, decay=self.decay, b1=self.b1, **fractions)
        require_numbers(self.method, exponent=self.exponent, above=0)
        require_numbers(self.method, damping=self.damping, at_least=0)
        require_numbers(self.method, refresh_growth=self.refresh_growth, above=1)
        require_numbers(self.method, root_every=self.root_every, at_least=1, schedule=True)
        sizes = {"max_dim": self.max_dim, "block_size": self.block_size}
        structural(self.method, **sizes)
        require_numbers(self.method, **sizes, at_least=1, or_none=True)
        drop_below = self.drop_below
        require_numbers(self.method, drop_below=drop_below, at_least=0, below=1, or_none=True)
        if self.fresh_values and self.root != "qr":
            raise ValueError(
                f'{self.method}: fresh_values=True needs the basis that root="qr" keeps, got '
                f"root={self.root!r}."
            )
        if drop_below is not None and self.root == "newton":
            raise ValueError(
                f'{self.method}: root="newton" sees no eigenvalues and cannot drop any, got '
                f'drop_below={drop_below!r}; use root="eigh" or "qr".'
            )
        if self.kl and not is_python_number(self.exponent, 0.5):
            raise ValueError(
                f"{self.method}: kl=True whitens by the roots and needs exponent=0.5, got "
                f"{self.exponent}."
            )
        whole = isinstance(self.exponent, int | float) and (1 / self.exponent).is_integer()
        if self.root == "newton" and not whole:
            raise ValueError(
                f'{self.method}: root="newton" needs an exponent whose inverse is whole, got '
                f'exponent={self.exponent}; use root="eigh".'
            )

    def diagonal_axes(self, shape):
        """Which axes of a tensor have diagonal factors."""
        return moments.diagonal_axes(shape, self.max_dim)

    def axes(self, structs):
        """The axes of all stacks but those without numbers."""
        filled = {name: x for name, x in structs.items() if 0 not in x.shape}
        return moments.axes_of(filled, self.max_dim, self.precond_dtype)

    def init_stacks(self, structs):
        """Zeros: the first gradient sets everything."""
        axes = self.axes(structs)
        tracks = self.root == "qr"
        return ScaleByShampooState(
            **counters(),
            since=jnp.zeros([], jnp.int32),
            momentum={name: jnp.zeros(x.shape, x.dtype) for name, x in structs.items()},
            factors={name: kept_axes.zero_pairs(x) for name, x in axes.items()},
            bases={name: moments.identities(x) for name, x in axes.items()} if tracks else {},
            energies=refresh.zero_energies(axes),
            fallback=(),
        )

    def update_stacks(self, grads, state, sound, **extra_args):
        """The step u = ⊗Rᵢ · m, with roots of the factors that this step's gradients have moved."""
        del extra_args
        axes = self.axes(grads)
        momentum, ahead = self._momentum(grads, state, sound)
        weight = averages.weight_at(self.decay, state.count, sound)
        measured = {
            n: self._measured(weight, x, state.factors[n], grads[n]) for n, x in axes.items()
        }
        period = value_at(self.root_every, state.count).astype(jnp.int32)
        due = sound & refresh.is_scheduled(state.count, state.since, period)
        take_roots = functools.partial(
            factor_roots,
            exponent=self.exponent,
            damping=self.damping,
            method=self.root,
            drop_below=self.drop_below,
        )
        kept, bases, energies = refresh.refreshed(
            axes,
            measured,
            state.bases,
            state.energies,
            ahead,
            weight=weight,
            due=due,
            limit=self.refresh_growth,
            anywhere=self.anywhere,
            take_roots=take_roots,
        )
        own = bases if self.fresh_values else dict.fromkeys(axes, ())
        directions = {n: moved_in_chunks(self._applied, ahead[n], kept[n], own[n])[0] for n in axes}
        state = state._replace(
            since=jnp.where(due, 1, optax.safe_increment(state.since)),
            momentum=momentum,
            factors=kept,
            bases=bases,
            energies=energies,
        )
        return Step({**ahead, **directions}, state)

    def _measured(self, weight, axes, kept, x):
        """A stack with this step's moments averaged in; see `kept.Measured`."""

        def of_part(kept, x):
            kept, *sizes = kept_axes.measured(x, kept, self._moments(axes, x, kept), weight)
            return kept, sizes

        kept, sizes = moved_in_chunks(of_part, kept, x, read_once=True)
        return kept_axes.Measured(kept, *sizes)

    def _applied(self, x, kept, bases):
        """The product ⊗R · x for a part of a stack, and nothing else."""
        # A root that could not be taken stops its own tensor only; the next step takes it anew.
        roots = kept_axes.roots_with(kept, self._diagonal_root)
        if self.fresh_values:
            rows = zip(kept_axes.wide(kept), kept_axes.wide(bases), roots, strict=True)
            roots = [root if root.ndim == 2 else self._fresh(*both) for *both, root in rows]
        u = moments.apply_roots(roots, x)
        return jnp.where(jnp.isfinite(u), u, jnp.zeros_like(u)), ()

    def _momentum(self, grads, state, sound):
        """(new momentum, what is preconditioned), both free of the bias of their start."""
        weight = averages.weight_at(self.b1, state.count, sound)
        momentum = {n: averages.averaged(state.momentum[n], weight, g) for n, g in grads.items()}
        if not self.nesterov:
            return momentum, momentum
        ahead = averages.weight_at(self.b1, state.count + 1)  # one step more of the same gradient
        return momentum, {n: averages.averaged(momentum[n], ahead, g) for n, g in grads.items()}

    def _moments(self, axes, x, kept):
        """The second moments of this step, of every axis of a stack."""
        if not self.kl:
            return tuple(moments.axis_moment(x, i, d) for i, d in enumerate(axes.diagonal))
        roots = kept_axes.roots_with(kept, self._diagonal_root)
        roots = [
            moments.root_or_identity(root, d) for root, d in zip(roots, axes.diagonal, strict=True)
        ]
        return moments.whitened_moments(x, roots, axes.diagonal)

    def _diagonal_root(self, factor):
        """The root of a diagonal factor, which is cheap and new at every step."""
        return moments.diagonal_power(factor, self.exponent, self.damping, self.drop_below)

    def _fresh(self, pair, basis):
        """The root of a dense factor with the values that it has now in its basis."""
        factor = pair.factor
        dtype = jnp.finfo(factor.dtype).dtype
        power, added = (
            jnp.broadcast_to(jnp.asarray(x, dtype), factor.shape[:1])
            for x in (-jnp.asarray(self.exponent, dtype), self.damping)
        )
        return power_in_basis(factor, basis, power, added, drop_below=self.drop_below)[0]


def scale_by_shampoo(
    decay: Schedulable = 0.95,
    *,
    b1: Schedulable = 0.95,
    nesterov: bool = True,
    exponent: Number = 0.5,
    damping: Number = 1e-6,
    root_every: Schedulable = 20,
    root: Root = "eigh",
    refresh_growth: Number = 20.0,
    kl: bool = False,
    fresh_values: bool = False,
    drop_below: Number | None = None,
    max_dim: int = static(8192),
    block_size: int | None = None,
    stacked: Stacked = None,
    layers: Layers | None = None,
    precond_dtype: Any = "float32",
    sharding: Sharding = None,
    transport_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies each leaf's momentum, along every axis, by a root of its gradients' second moment.

    With X₍ᵢ₎ the unfolding of X along axis i, e the `exponent` and δ the `damping`, the step is

        Fᵢ ← decay · Fᵢ + (1 - decay) · G₍ᵢ₎G₍ᵢ₎ᴴ,    Rᵢ = (Fᵢ + δ λ_max(Fᵢ) I)⁻ᵉ,    u = ⊗Rᵢ · m,

    for a matrix u = L⁻ᵉ m R⁻ᵉ with L the average of G Gᵀ and R that of Gᵀ G. The (Nesterov)
    momentum m and the averages are free of the bias of their start. With e = 1/2, L ⊗ R is up to
    its scale the best Kronecker product for the gradients' covariance; the 1/4 of the first Shampoo
    learns slower. As u has an arbitrary scale, let `normalize_by_rms` follow.

    Args:
      decay: of the factors, in [0, 1]; 1 averages all steps alike. A number or a schedule.
      b1: decay of the momentum, in [0, 1); 0 for none. A number or a schedule.
      nesterov: whether the newest gradient counts as one step more of the momentum.
      exponent: e > 0.
      damping: δ ≥ 0, relative to each factor's largest eigenvalue.
      root_every: most steps between two computations of the roots, a number or a schedule; early on
        1 + count / 4.
      root: "eigh" or "newton" (matrix products only, for whole 1/e), see `linalg.inverse_root`; or
        "qr", which turns a basis of each factor by one orthogonal iteration a refresh, Q ← QR(F Q),
        R = Q (diag(Qᴴ F Q) + δ λ_max)⁻ᵉ Qᴴ.
      refresh_growth: above 1; the roots R are computed out of schedule when tr(F R) of a factor has
        grown by more than this since R was taken (`float("inf")`: with a leaf's first gradients
        only). It easily doubles in between; to follow that costs more than it brings.
      kl: whether each factor is estimated from the gradient multiplied by the other factors' roots,
        Fᵢ = E[G₍ᵢ₎ (⊗ⱼ≠ᵢ Fⱼ)⁻¹ G₍ᵢ₎ᴴ] dᵢ/N, which brings N(0, ⊗F) nearest to the gradients in the
        Kullback-Leibler divergence. It needs exponent 1/2. A gradient that is more
        than ten times too large or small after all roots is shared among the factors.
      fresh_values: whether the eigenvalues are those of the present factor at every step, in the
        basis of the last refresh, R = Q (diag(Qᴴ F Q) + δ λ_max)⁻ᵉ Qᴴ; for root="qr", and two
        products more a factor and step.
      drop_below: None, or a share in [0, 1) of a factor's largest eigenvalue; what is below it is
        left out (R is 0 there, a pseudo-inverse) and not damped.
      max_dim: longer axes have diagonal factors, as have axes of length 1.
      block_size: longer axes are cut into the fewest blocks of nearly equal length, each with
        factors of its own.
      stacked: how many leading axes of a leaf count layers, each with factors of its own: an int or
        bool for all leaves, a prefix of the parameters' tree with them, or a function of the
        parameters that returns one.
      layers: from `find_layers`; they say what of every kernel is a matrix, see `matrix_axes`.
        None: a factor for every axis of a leaf.
      precond_dtype: of dense factors and roots of leaves up to float32; "bfloat16" halves the
        memory, not the precision of the arithmetic.
      sharding: None, or the devices that share the work and the state: a `jax.sharding.Mesh`, all
        of whose axes count, or a `NamedSharding` whose first entry names mesh axes. Each device
        owns equally many tensors of every shape, keeps what belongs to them, and alone computes
        their directions.
      transport_dtype: in which gradients go to their owners and directions come back, such as
        "bfloat16"; None: in which they are.

    Returns:
      A `GradientTransformationExtraArgs` with `update(grads, state, params=None)`. With a NaN or an
      infinity in any gradient the update is zero and the state keeps its last value but for
      `total_notfinite`. Under `jax.vmap` over hyper-parameters a longer `root_every` saves nothing,
      because both branches of every conditional are computed there.

    Raises:
      ValueError: for an unknown choice, a number out of range, a leaf that is not of floating
        point; in `update` for trees or shapes that differ from those of `init`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_curv
      >>> pieces = optax_curv.normalize_by_rms(0.2), optax.scale(-0.02)
      >>> tx = optax.chain(optax_curv.scale_by_shampoo(), *pieces)
      >>> params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
      >>> state = tx.init(params)
      >>> [pair.factor.shape for pair in state[0].factors["['w']"]]
      [(1, 4, 4), (1, 3, 3)]
      >>> updates, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state)
      >>> print(updates["b"].round(4))
      [-0.004 -0.004 -0.004]

    References:
      Gupta, Koren and Singer 2018, arXiv:1802.09568. Morwani et al. 2024, arXiv:2406.17748:
      exponent 1/2. Lin et al. 2025, arXiv:2509.03378: `kl`. Deviations: averages in place of sums,
      damping relative to the largest eigenvalue.
    """
    rule = _Shampoo(
        method="scale_by_shampoo",
        layers=layers,
        stacked=stacked,
        decay=decay,
        b1=b1,
        nesterov=nesterov,
        exponent=exponent,
        damping=damping,
        root_every=root_every,
        root=root,
        refresh_growth=refresh_growth,
        kl=kl,
        fresh_values=fresh_values,
        drop_below=drop_below,
        max_dim=max_dim,
        block_size=block_size,
        precond_dtype=precond_dtype,
        owners=owners_of("scale_by_shampoo", sharding, transport_dtype=transport_dtype),
    )
    rule.check_options()
    return transformation(rule)


def shampoo(
    learning_rate: Schedulable,
    b1: Schedulable = 0.95,
    *,
    layers: Layers | None = None,
    nesterov: bool = True,
    weight_decay: Number = 0.0,
    weight_decay_mask: Tree | None = None,
    gradient_bound: Number | None = 3.0,
    rms: Number | None = 0.2,
    adam_for: AdamFor = None,
    adam: optax.GradientTransformation | None = None,
    stacked: Stacked = None,
    decay: Schedulable = 0.95,
    damping: Number = 1e-5,
    root_every: Schedulable = 20,
    sharding: Sharding = None,
    transport_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Shampoo for matrices, Adam for the rest, decoupled weight decay and a learning rate.

    Matrices receive `scale_by_shampoo` and `normalize_by_rms(rms)`. What is not a matrix, or what
    `adam_for` selects, receives Adam, whose updates have a root mean square of 0.2 to 1 likewise.
    The research options of `scale_by_shampoo` are not arguments here; `optax.partition` combines it
    with another transformation.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the matrices' momentum, in [0, 1); 0 for none. A number or a schedule.
      layers: from `find_layers`; they say what of every kernel is a matrix, see `matrix_axes`.
        None: by names and shapes.
      nesterov: whether the newest gradient counts as one step more of the momentum.
      weight_decay: decoupled, as in AdamW. Other than the Python number 0, update needs params.
      weight_decay_mask: which leaves decay, as in `optax.add_decayed_weights`.
      gradient_bound: b ≥ 1, or None. After ten steps the norm of each leaf's gradient is held to b
        times its own running mean, so that an outlier moves and teaches no more than a few ordinary
        gradients; `bound_by_running_norm` has the rule. The state counts in `held` how often.
      rms: root mean square of each matrix's update before decay and learning rate, a number; None
        leaves it as it is.
      adam_for: which matrices Adam takes, embeddings and the output layer above all: a function of
        a leaf's path and the leaf, or a prefix of the parameters' tree, with values True or "adam";
        False for the rule of `matrix_axes`; or "shampoo", whatever the
        rank.
      adam: the transformation for all other leaves; None: `optax.scale_by_adam()`. Its moments are
        float32 at least.
      stacked: how many leading axes of a leaf count layers, each with factors of its own: an int or
        bool for all leaves, a prefix of the parameters' tree with them, or a function of the
        parameters that returns one. Layers say it of their kernels themselves.
      decay: of the factors, in [0, 1]; 1 averages all steps alike. A number or a schedule.
      damping: δ ≥ 0, relative to each factor's largest eigenvalue; ten times the default of
        `scale_by_shampoo`, with which training starts faster.
      root_every: most steps between two computations of the roots, a number or a schedule; early on
        1 + count / 4.
      sharding: None, or the devices that share the work and the state: a `jax.sharding.Mesh`, all
        of whose axes count, or a `NamedSharding` whose first entry names mesh axes. Each device
        owns equally many tensors of every shape, keeps what belongs to them, and alone computes
        their directions.
      transport_dtype: in which gradients go to their owners and directions come back, such as
        "bfloat16"; None: in which they are.

    Returns:
      A `GradientTransformationExtraArgs`. With a NaN or an infinity in any gradient no leaf moves.

    Raises:
      ValueError: as `scale_by_shampoo`; for a learning rate that is none, for labels of another
        kind, and for labels that miss a leaf.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_curv
      >>> kernel = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
      >>> params = {"embedding": jnp.ones((9, 4)), "dense": kernel}
      >>> is_embedding = lambda path, leaf: "embedding" in jax.tree_util.keystr(path)
      >>> tx = optax_curv.shampoo(0.02, adam_for=is_embedding)
      >>> state = tx.init(params)
      >>> updates, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state, params)
      >>> print(updates["dense"]["kernel"][0].round(4), updates["dense"]["bias"].round(4))
      [-0.004 -0.004 -0.004] [-0.02 -0.02 -0.02]

    References:
      Gupta, Koren and Singer 2018, arXiv:1802.09568. Agarwal et al. 2020, arXiv:2002.11803: one
      method's direction, another one's size.
    """
    rule = _Shampoo(
        method="shampoo",
        layers=layers,
        stacked=stacked,
        decay=decay,
        b1=b1,
        nesterov=nesterov,
        exponent=0.5,
        damping=damping,
        root_every=root_every,
        root="eigh",
        refresh_growth=20.0,
        kl=False,
        fresh_values=False,
        drop_below=None,
        max_dim=static(8192),
        block_size=None,
        precond_dtype="float32",
        owners=owners_of("shampoo", sharding, transport_dtype=transport_dtype),
    )
    rule.check_options()
    return matrices_and_adam(
        rule,
        learning_rate,
        rms=rms,
        adam_for=adam_for,
        adam=adam,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        gradient_bound=gradient_bound,
    )
