"""SOAP: Adam in the eigenbasis of Shampoo's factors."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_curv.layers import Layers
from optax_curv.linalg import _lapack, kron_matvec
from optax_curv.linalg._chunks import each_in_chunks
from optax_curv.linalg._compiler import full_matmul
from optax_curv.linalg.roots import eigenvectors, orthogonal_iteration, power_in_basis
from optax_curv.preconditioners._axes import moments
from optax_curv.preconditioners._stacks.axes import LeafRule
from optax_curv.preconditioners._stacks.owners import owners_of
from optax_curv.preconditioners._transformation import averages
from optax_curv.preconditioners._transformation.aliases import matrices_and_adam
from optax_curv.preconditioners._transformation.numbers import (
    require_choice,
    require_dtype,
    require_flags,
    require_numbers,
    static,
    structural,
)
from optax_curv.preconditioners._transformation.transformation import (
    Step,
    counters,
    transformation,
)
from optax_curv.typing import BASES, AdamFor, Basis, Number, Schedulable, Sharding, Stacked, Tree

KL_DAMPING = 1e-6  # of the roots by which `kl` whitens, as in `scale_by_shampoo`


class ScaleBySoapState(NamedTuple):
    """State of `scale_by_soap`; everything is kept by stack, N being its number of tensors.

    Attributes:
      count: steps taken, int32 [].
      momentum: by stack (or stack of blocks) the average gradient in the basis, [N, *shape].
      moments: by stack the average square there, [N, *shape], real.
      factors: by stack the tuple of its axes' factors, [N, d, d], or the diagonal [N, d].
      bases: like factors: orthonormal columns, or ones where the factor is diagonal.
      fallback: state of the transformation for leaves that SOAP does not take.
      total_notfinite: steps skipped, int32 [].
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    momentum: dict[str, jax.Array]
    moments: dict[str, jax.Array]
    factors: dict[str, tuple[jax.Array, ...]]
    bases: dict[str, tuple[jax.Array, ...]]
    fallback: Any
    total_notfinite: jax.Array

    def spectra(self) -> dict[str, tuple[jax.Array, ...]]:
        """The factors that diagnostics read, by stack and axis."""
        return self.factors


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _Soap(LeafRule):
    """SOAP's mathematics; `scale_by_soap` documents the options."""

    complex_leaves = True
    guarded = ("momentum", "moments", "factors", "bases")  # whose averages have weight zero

    b1: Schedulable
    b2: Schedulable
    eps: Number
    decay: Schedulable
    basis_every: Number
    basis: Basis
    kl: bool
    max_dim: int
    precond_dtype: Any

    def check_options(self):
        """Refuses options that cannot be, by name."""
        require_choice(self.method, BASES, basis=self.basis)
        require_dtype(self.method, precond_dtype=self.precond_dtype)
        require_flags(self.method, kl=self.kl)
        fractions: Any = {"at_least": 0, "at_most": 1, "schedule": True}
        require_numbers(self.method, b1=self.b1, b2=self.b2, decay=self.decay, **fractions)
        require_numbers(self.method, eps=self.eps, at_least=0)
        require_numbers(self.method, basis_every=self.basis_every, at_least=1)
        sizes = {"max_dim": self.max_dim, "block_size": self.block_size}
        structural(self.method, **sizes)
        require_numbers(self.method, **sizes, at_least=1, or_none=True)

    def diagonal_axes(self, shape):
        """Which axes of a tensor have diagonal factors."""
        return moments.diagonal_axes(shape, self.max_dim)

    def axes(self, structs):
        """The axes of all stacks but those without numbers."""
        filled = {name: x for name, x in structs.items() if 0 not in x.shape}
        return moments.axes_of(filled, self.max_dim, self.precond_dtype)

    def init_stacks(self, structs):
        """Zeros, and bases that are the identity: the first gradient sets factors and bases."""
        axes = self.axes(structs)
        shapes = {name: x.struct for name, x in axes.items()}
        real = {name: jnp.finfo(x.dtype).dtype for name, x in shapes.items()}
        return ScaleBySoapState(
            **counters(),
            momentum={name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()},
            moments={name: jnp.zeros(x.shape, real[name]) for name, x in shapes.items()},
            factors={
                name: tuple(jnp.zeros(f.shape, f.dtype) for f in x.factors)
                for name, x in axes.items()
            },
            bases={name: moments.identities(x) for name, x in axes.items()},
            fallback=(),
        )

    def update_stacks(self, grads, state, sound, **extra_args):
        """One step of Adam in the bases, which are renewed where their period says so."""
        del extra_args
        axes = self.axes(grads)
        seen = jnp.maximum(state.count - 1, 0)  # gradients in M and V, not the first one
        weights = [averages.weight_at(b, state.count, sound, seen) for b in (self.b1, self.b2)]
        weights.append(averages.weight_at(self.decay, state.count, sound))
        due = jnp.where(averages.is_due(state.count, self.basis_every), 2, 0)
        due = jnp.where(sound, jnp.where(state.count == 0, 1, due), 0)
        step = functools.partial(self._step_of, axes, weights, due)
        fields = "momentum", "moments", "factors", "bases"
        # Directions take the place of gradients.
        moved = {n: (*(getattr(state, field)[n] for field in fields), grads[n]) for n in axes}
        new, _ = each_in_chunks(step, moved)
        directions = {n: x[-1] for n, x in new.items()}
        rest = {n: g for n, g in grads.items() if 0 in g.shape}
        changes = {field: {n: x[i] for n, x in new.items()} for i, field in enumerate(fields)}
        return Step({**directions, **rest}, state._replace(**changes))

    def _step_of(self, axes, weights, due, moved):
        """Momentum, moments, factors, bases and directions by stack, after the step."""
        axes = {n: axes[n] for n in moved}
        wide = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), moved)
        *old, factors, bases, tensors = ({n: x[i] for n, x in wide.items()} for i in range(5))
        factors = {
            n: self._averaged(weights[2], axes[n], x, factors[n], bases[n])
            for n, x in tensors.items()
        }

        def taken(bases, averages_there):
            steps = {
                n: self._adam(weights, axes[n], x, bases[n], *(tree[n] for tree in averages_there))
                for n, x in tensors.items()
            }
            directions = {n: kron_matvec(bases[n], step) for n, (step, *_) in steps.items()}
            momentum, v = ({n: step[i] for n, step in steps.items()} for i in (1, 2))
            return directions, bases, momentum, v

        def first():
            # A gradient is diagonal in its own bases: off the diagonal V would be rounding.
            renewed = self._renewed(eigenvectors, axes, factors, bases)
            return jax.tree.map(jnp.zeros_like, tensors), renewed, *old

        def refreshed():
            directions, _, momentum, v = taken(bases, old)
            find = eigenvectors if self.basis == "eigh" else orthogonal_iteration
            new = self._renewed(find, axes, factors, bases)
            turned = {n: _turned(x, bases[n], new[n], momentum[n], v[n]) for n, x in axes.items()}
            momentum, v = ({n: x[i] for n, x in turned.items()} for i in (0, 1))
            return directions, new, momentum, v

        # The branches are whole, so that none copies the bases.
        branches = lambda: taken(bases, old), first, refreshed
        directions, new_bases, *new = jax.lax.switch(due, branches)
        found = {
            n: (new[0][n], new[1][n], factors[n], new_bases[n], u) for n, u in directions.items()
        }
        return jax.tree.map(lambda x, y: x.astype(y.dtype), found, moved), {}

    def _averaged(self, weight, axes, x, factors, bases):
        """A stack's factors with this step's second moments averaged in, as they will be kept."""
        if self.kl:
            roots = map(_whitening_root, axes.diagonal, factors, bases)
            own = moments.whitened_moments(x, list(roots), axes.diagonal)
        else:
            own = [moments.axis_moment(x, axis, d) for axis, d in enumerate(axes.diagonal)]

        def averaged(factor, moment, struct):
            return moments.rounded(averages.averaged(factor, weight, moment), struct.dtype)

        return tuple(map(averaged, factors, own, axes.factors))

    def _adam(self, weights, axes, x, bases, momentum, v):
        """(direction within the basis, momentum, moments) of a stack."""
        rows = zip(bases, axes.diagonal, strict=True)
        x = kron_matvec([q if diagonal else q.mT.conj() for q, diagonal in rows], x)
        momentum = averages.averaged(momentum, weights[0], x)
        v = averages.averaged(v, weights[1], jnp.square(jnp.abs(x)))
        scale = averages.root_of_moments(v, self.eps)
        return jnp.where(scale > 0, momentum / jnp.where(scale > 0, scale, 1), 0), momentum, v

    def _renewed(self, find, axes, factors, bases):
        """The bases, with those of dense factors found anew."""
        places = [(n, i) for n, x in axes.items() for i, d in enumerate(x.diagonal) if not d]
        columns = ([tree[n][i] for n, i in places] for tree in (factors, bases))
        found = _lapack.for_each(lambda factor, basis: (find(factor, basis),), *columns)
        found = dict(zip(places, found, strict=True))
        return {
            n: tuple(
                q if (n, i) not in found else moments.rounded(found[n, i][0], x.factor_dtype)
                for i, q in enumerate(bases[n])
            )
            for n, x in axes.items()
        }


def _whitening_root(diagonal, factor, basis):
    """F^(-1/2) of one axis with the values that F has in the basis; before there are any, I."""
    if diagonal:
        root = moments.diagonal_power(factor, 0.5, KL_DAMPING)
    else:
        dtype = jnp.finfo(factor.dtype).dtype
        power, damping = (jnp.full(len(factor), x, dtype) for x in (-0.5, KL_DAMPING))
        root = power_in_basis(factor, basis, power, damping)[0]
    return moments.root_or_identity(root, diagonal)


def _turned(axes, old, new, momentum, v):
    """The momentum in the new bases, and the moments there as far as their diagonal says."""
    rows = zip(axes.diagonal, new, old, strict=True)
    turns = [to if diagonal else full_matmul(to.mT.conj(), base) for diagonal, to, base in rows]
    return kron_matvec(turns, momentum), kron_matvec([jnp.square(jnp.abs(r)) for r in turns], v)


def scale_by_soap(
    b1: Schedulable = 0.95,
    b2: Schedulable = 0.95,
    *,
    eps: Number = 1e-8,
    decay: Schedulable | None = None,
    basis_every: Number = 10,
    basis: Basis = "qr",
    kl: bool = False,
    max_dim: int = static(8192),
    block_size: int | None = None,
    stacked: Stacked = None,
    layers: Layers | None = None,
    precond_dtype: Any = "float32",
    sharding: Sharding = None,
    transport_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam in the eigenbasis of the gradients' second moment along every axis.

    With Qᵢ the basis of axis i and G' = ⊗Qᵢᴴ · G, which is Q_Lᵀ G Q_R for a matrix,

        M ← b1 M + (1 - b1) G',    V ← b2 V + (1 - b2) |G'|²,    u = ⊗Qᵢ · [M / (√V + eps)],

    M and V free of the bias of their start. Then Fᵢ ← decay · Fᵢ + (1 - decay) · G₍ᵢ₎G₍ᵢ₎ᴴ, and
    every `basis_every` steps Qᵢ ← QR(Fᵢ Qᵢ), after the columns have been sorted by qᴴ Fᵢ q. With
    Rᵢ = Qᵢ'ᴴ Qᵢ, M ← ⊗Rᵢ · M and V ← ⊗|Rᵢ|² · V, which is V in the new basis as far as a diagonal
    says, so that √V bounds M there, too. The first gradient only sets the bases, and its update is
    zero: in its own bases it is diagonal, and all else in V would be rounding.

    Args:
      b1: decay of the momentum, in [0, 1]; a number or a schedule.
      b2: decay of V, in [0, 1]; a number or a schedule.
      eps: at least 0. Beside it stands ρ² max V / √V, with ρ of 256 roundings: what the change of
        basis leaves where a leaf has no gradient is rounding, and moves nothing.
      decay: of the factors; None: b2, as published.
      basis_every: steps between refreshes of the basis.
      basis: how: "qr", one step of orthogonal iteration as above, or "eigh", the eigenvectors
        themselves. On CPU these take up to twice as long; on an H200, for 768 to 1024 rows, 1 ms a
        matrix, and a QR 19 ms.
      kl: whether each factor is estimated from the gradient multiplied by the other factors' roots
        in their bases, Fᵢ = E[G₍ᵢ₎ (⊗ⱼ≠ᵢ Fⱼ)⁻¹ G₍ᵢ₎ᴴ] dᵢ/N, as in `scale_by_shampoo`.
      max_dim: longer axes keep their own basis, as axes of length 1 do.
      block_size: longer axes are cut into the fewest blocks of nearly equal length, each with
        factors of its own.
      stacked: how many leading axes of a leaf count layers, each with factors of its own: an int or
        bool for all leaves, a prefix of the parameters' tree with them, or a function of the
        parameters that returns one.
      layers: from `find_layers`; they say what of every kernel is a matrix, see `matrix_axes`.
        None: a factor for every axis of a leaf.
      precond_dtype: of dense factors and bases of leaves up to float32; "bfloat16" halves the
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
      `total_notfinite`.

    Raises:
      ValueError: for a number out of range or a leaf that is not of floating point; in `update` for
        trees or shapes that differ from those of `init`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_curv
      >>> tx = optax.chain(optax_curv.scale_by_soap(), optax.scale_by_learning_rate(3e-3))
      >>> params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
      >>> state = tx.init(params)
      >>> [basis.shape for basis in state[0].bases["['w']"]]
      [(1, 4, 4), (1, 3, 3)]
      >>> updates, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state)
      >>> jax.tree.map(jnp.shape, updates)
      {'b': (3,), 'w': (4, 3)}

    References:
      Vyas et al. 2024, arXiv:2409.11321, Algorithms 3 and 4. Lin et al. 2025, arXiv:2509.03378:
      `kl`. Deviations from the former: they keep M outside the basis, for two products more a step;
      and they sort V with the columns of an old basis without turning it, so that where gradients
      have one direction M is divided by what V had of rounding.
    """
    rule = _Soap(
        method="scale_by_soap",
        layers=layers,
        stacked=stacked,
        b1=b1,
        b2=b2,
        eps=eps,
        decay=b2 if decay is None else decay,
        basis_every=basis_every,
        basis=basis,
        kl=kl,
        max_dim=max_dim,
        block_size=block_size,
        precond_dtype=precond_dtype,
        owners=owners_of("scale_by_soap", sharding, transport_dtype=transport_dtype),
    )
    rule.check_options()
    return transformation(rule)


def soap(
    learning_rate: Schedulable,
    b1: Schedulable = 0.95,
    *,
    layers: Layers | None = None,
    b2: Schedulable = 0.95,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    weight_decay_mask: Tree | None = None,
    gradient_bound: Number | None = 3.0,
    rms: Number | None = None,
    adam_for: AdamFor = None,
    adam: optax.GradientTransformation | None = None,
    stacked: Stacked = None,
    basis_every: Number = 10,
    basis: Basis = "qr",
    sharding: Sharding = None,
    transport_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """SOAP for matrices, Adam for the rest, decoupled weight decay and a learning rate.

    Matrices receive `scale_by_soap` and, where `rms` is given, `normalize_by_rms(rms)`. What is not
    a matrix, or what `adam_for` selects, receives Adam. On the first step matrices only find their
    bases, and do not move but for their decay.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the matrices' momentum, in [0, 1]; a number or a schedule.
      layers: from `find_layers`; they say what of every kernel is a matrix, see `matrix_axes`.
        None: by names and shapes.
      b2: decay of their second moments and factors, in [0, 1]; a number or a schedule.
      eps: what is added to the root of the second moments, at least 0.
      weight_decay: decoupled, as in AdamW. Other than the Python number 0, update needs params.
      weight_decay_mask: which leaves decay, as in `optax.add_decayed_weights`.
      gradient_bound: b ≥ 1, or None. After ten steps the norm of each leaf's gradient is held to b
        times its own running mean, so that an outlier moves and teaches no more than a few ordinary
        gradients; `bound_by_running_norm` has the rule. The state counts in `held` how often.
      rms: root mean square of each matrix's update before decay and learning rate, a number; None
        leaves SOAP's own.
      adam_for: which matrices Adam takes, embeddings and the output layer above all: a function of
        a leaf's path and the leaf, or a prefix of the parameters' tree, with values True or "adam";
        False for the rule of `matrix_axes`; or "soap", whatever the
        rank.
      adam: the transformation for all other leaves; None: `optax.scale_by_adam()`. Its moments are
        float32 at least.
      stacked: how many leading axes of a leaf count layers, each with factors of its own: an int or
        bool for all leaves, a prefix of the parameters' tree with them, or a function of the
        parameters that returns one. Layers say it of their kernels themselves.
      basis_every: steps between refreshes of the basis.
      basis: how: "qr", one step of orthogonal iteration, or "eigh", the eigenvectors themselves.
      sharding: None, or the devices that share the work and the state: a `jax.sharding.Mesh`, all
        of whose axes count, or a `NamedSharding` whose first entry names mesh axes. Each device
        owns equally many tensors of every shape, keeps what belongs to them, and alone computes
        their directions.
      transport_dtype: in which gradients go to their owners and directions come back, such as
        "bfloat16"; None: in which they are.

    Returns:
      A `GradientTransformationExtraArgs`. With a NaN or an infinity in any gradient no leaf moves.

    Raises:
      ValueError: as `scale_by_soap`; for a learning rate that is none, for labels of another kind,
        and for labels that miss a leaf.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_curv
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
      >>> tx = optax_curv.soap(3e-3, weight_decay=1e-2)
      >>> state = tx.init(params)
      >>> updates, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state, params)
      >>> print(updates["bias"].round(4))
      [-0.003 -0.003 -0.003]

    References:
      Vyas et al. 2024, arXiv:2409.11321, Algorithms 3 and 4.
    """
    rule = _Soap(
        method="soap",
        layers=layers,
        stacked=stacked,
        b1=b1,
        b2=b2,
        eps=eps,
        decay=b2,
        basis_every=basis_every,
        basis=basis,
        kl=False,
        max_dim=static(8192),
        block_size=None,
        precond_dtype="float32",
        owners=owners_of("soap", sharding, transport_dtype=transport_dtype),
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
