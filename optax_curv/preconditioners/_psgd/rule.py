"""`KronRule`: PSGD with a factor for each axis of a tensor, on stacks."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_curv.linalg import kron_matvec
from optax_curv.linalg._checks import widen
from optax_curv.linalg.factors import Dense, Diagonal
from optax_curv.preconditioners._psgd import geometries, step
from optax_curv.preconditioners._psgd.geometries import Factors, array_of
from optax_curv.preconditioners._psgd.options import PsgdOptions, checked_probes
from optax_curv.preconditioners._stacks.axes import LeafRule
from optax_curv.preconditioners._stacks.blocks import factor_structs
from optax_curv.preconditioners._transformation import averages
from optax_curv.preconditioners._transformation.numbers import raw_key, split_key
from optax_curv.preconditioners._transformation.transformation import Step, counters

FACTOR_KINDS = {"quad4p": "P", "eq": "triangular Q", "right_triangular": "triangular Q"}


class ScaleByKronPsgdState(NamedTuple):
    """State of `scale_by_kron_psgd`; everything is kept by stack, N being its number of tensors.

    `axis_factors` shows the factors as a tree like the parameters, and `with_axis_factors` sets
    them.

    Attributes:
      count: steps taken, int32 [].
      key: the data of a PRNG key, uint32, in the shape of its kind.
      factors: by stack (or stack of blocks) a dict with one entry, the tuple of the axes' factors,
        `linalg.factors.Dense` [N, d, d] or `Diagonal` [N, d]. Its key says what they are: "P" for
        `geometry="quad4p"`, "triangular Q" for "eq" and "right_triangular", "Q" for all others. All
        are zero until they are set.
      lipschitz: by stack the running bounds L, [N, axes].
      momentum: by stack, [N, *shape], float32 at least, free of the bias of its start; an empty
        dict where b1 is the Python number 0.
      preconditioners: by stack P of each axis, like the factors, and zero where it is to be
        computed; an empty dict where P would be used once only, or is the factor itself.
      total_notfinite: steps skipped for a NaN or an infinity, int32 [].
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    key: jax.Array
    factors: dict[str, dict[str, Factors]]
    lipschitz: dict[str, jax.Array]
    momentum: dict[str, jax.Array]
    preconditioners: dict[str, Factors]
    total_notfinite: jax.Array

    def spectra(self) -> dict[str, Factors]:
        """The factors that diagnostics read, by stack and axis."""
        return {name: x for name, kinds in self.factors.items() for x in kinds.values()}


class _Layout(NamedTuple):
    """The stacks that have factors.

    Attributes:
      dtypes: of the arithmetic, by stack.
      structs: shapes and dtypes of the axes' factors, by stack.
    """

    dtypes: dict[str, Any]
    structs: dict[str, Factors]

    def take(self, stacks: Any) -> dict[str, jax.Array]:
        """The stacks with factors, in the dtype of the arithmetic."""
        return {name: stacks[name].astype(dtype) for name, dtype in self.dtypes.items()}

    def give(self, products: dict[str, jax.Array], like: dict[str, jax.Array]) -> Any:
        """The products in the dtypes of `like`, whose other stacks stay."""
        return {n: products[n].astype(x.dtype) if n in products else x for n, x in like.items()}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class KronRule(LeafRule, PsgdOptions):
    """Kronecker PSGD; `scale_by_kron_psgd` documents the mathematics and the options."""

    guarded = ("factors", "lipschitz", "preconditioners")  # `step_of_stack` moves no unsound ones
    like_gradients = ("probe", "hvp")

    @property
    def factor_kind(self) -> str:
        """The name of the factors of the geometry in the state."""
        return FACTOR_KINDS.get(self.geometry, "Q")

    def check(self, updates, params, extra_args):
        """Refuses missing probes and those of other trees."""
        del params
        return checked_probes(self.method, self.criterion, updates, extra_args)

    def layout(self, structs: Any) -> _Layout:
        """Which factors stacks have, by their shapes and dtypes.

        Stacks without numbers have none, and those that are no matrices have none under the
        original's rule.
        """
        filled = {name: x for name, x in structs.items() if 0 not in x.shape}
        if self.geometry == "right_triangular":
            filled = {name: x for name, x in filled.items() if len(x.shape) == 3}
        dtypes: dict[str, Any] = {}
        factors: dict[str, Any] = {}
        for name, struct in filled.items():
            short = jnp.dtype(self.precond_dtype)
            dtypes[name] = jnp.promote_types(struct.dtype, short)
            kept = short if struct.dtype == jnp.float32 else dtypes[name]
            diagonal = self.diagonal_axes(struct.shape[1:])
            structs_of_axes: Any = factor_structs(struct, diagonal, kept)
            factors[name] = tuple(
                Diagonal(x) if is_diagonal else Dense(x)
                for x, is_diagonal in zip(structs_of_axes, diagonal, strict=True)
            )
        return _Layout(dtypes, factors)

    def diagonal_axes(self, shape: tuple[int, ...]) -> tuple[bool, ...]:
        """Which axes of a tensor have diagonal factors."""
        if self.geometry == "right_triangular":
            return (False,) * len(shape)
        limit = self.max_skew * math.prod(shape)
        return tuple(bool(d == 1 or d > self.max_dense_dim or d * d > limit) for d in shape)

    def init_stacks(self, structs):
        """Factors of the scale that is given, or zeros, which the first gradients set."""
        layout = self.layout(structs)
        scale = self.init_scale
        if scale is None:
            scale = 1.0 if self.geometry == "right_triangular" else 0.0

        def factors_of(name):
            number = jnp.asarray(scale, jnp.finfo(layout.dtypes[name]).dtype)
            return geometries.scaled_identities(self.geometry, layout.structs[name], number)

        kept, zeros = self.keeps_preconditioners, jnp.zeros_like
        names = layout.structs
        return ScaleByKronPsgdState(
            **counters(),
            key=raw_key(self.method, self.key),
            factors={name: {self.factor_kind: factors_of(name)} for name in names},
            lipschitz={
                name: jnp.zeros((*structs[name].shape[:1], len(factors)), jnp.finfo(dtype).dtype)
                for (name, factors), dtype in zip(
                    names.items(), layout.dtypes.values(), strict=True
                )
            },
            momentum={
                name: jnp.zeros(x.shape, x.dtype)
                for name, x in structs.items()
                if self.keeps_momentum
            },
            preconditioners={n: jax.tree.map(zeros, factors_of(n)) for n in names if kept},
        )

    def drawn(self, structs, state):
        """The bits of all rows."""
        _, _, key = split_key(state.key, 3)
        layout = self.layout(structs)
        return {"bits": step.random_bits(self, {n: structs[n] for n in layout.structs}, key)}

    def update_stacks(self, grads, state, sound, *, probe=None, hvp=None, bits=None, **extra_args):
        """One step: the factors move where they do, and P is applied."""
        del extra_args
        layout = self.layout(grads)
        momentum, direction = {}, grads
        if self.keeps_momentum:
            weight = averages.weight_at(self.b1, state.count, sound)
            momentum = direction = {
                name: averages.averaged(state.momentum[name], weight, g)
                for name, g in grads.items()
            }
        newton = self.criterion == "newton"
        signal = hvp if newton else grads if self.whiten == "gradient" else direction
        key, step_key, noise_key = split_key(state.key, 3)
        now = step.numbers(self, state.count, sound, step_key)
        kept = {name: next(iter(kinds.values())) for name, kinds in state.factors.items()}
        kept = (kept, state.lipschitz, state.preconditioners)
        # Without a signal of its own the step whitens what P is applied to.
        given = (None if signal is direction else signal, direction, probe if newton else None)

        def moving(kept, given):
            return self._step(layout, now, bits or noise_key, kept, given)

        def resting(kept, given):
            return self._rest(layout, now, kept, given[1])

        if self.always_updates:
            products, kept, sound = moving(kept, given)
        else:
            usable = step.are_usable(kept[2] if self.keeps_preconditioners else kept[0])
            products, kept, sound = jax.lax.cond(now.moves | ~usable, moving, resting, kept, given)
        factors, lipschitz, preconditioners = kept
        state = state._replace(
            key=key,
            momentum=momentum,
            factors={name: {self.factor_kind: x} for name, x in factors.items()},
            lipschitz=lipschitz,
            preconditioners=preconditioners,
        )
        return Step(layout.give(products, direction), state, sound)

    def _step(self, layout, now, bits, kept, given):
        """(products, what is kept, whether all is sound); P is applied before or after Q moves.

        `bits` may be the key to draw them from.
        """
        factors, lipschitz, preconditioners = jax.tree.map(widen, kept)
        signal, direction, probe = given
        signals = None if signal is None else layout.take(signal)
        probes = None if probe is None else layout.take(probe)
        tensors = layout.take(direction)
        if not isinstance(bits, dict):
            bits = step.random_bits(self, tensors, bits)
        products, groups, sound = {}, {}, now.sound
        for name, tensor in tensors.items():
            group = step.Group(factors[name], lipschitz[name], preconditioners.get(name), tensor)
            read = step.Given(
                None if signals is None else signals[name],
                None if probes is None else probes[name],
                bits[name],
            )
            dtypes = tuple(array_of(x).dtype for x in layout.structs[name])
            flags = self.always_updates, self.keeps_preconditioners, self.update_last
            kind = step.Kind(self.geometry, *flags, dtypes)
            groups[name], fine = step.step_of_stack(kind, now, group, read)
            products[name], sound = groups[name].tensor, sound & fine
        new = (
            {name: group.factors for name, group in groups.items()},
            {name: group.lipschitz for name, group in groups.items()},
            {n: g.preconditioners for n, g in groups.items() if g.preconditioners is not None},
        )
        return products, jax.tree.map(lambda x, y: x.astype(y.dtype), new, kept), sound

    def _rest(self, layout, now, kept, direction):
        """Like `_step`, for steps that leave Q as it is: applies the P that is kept."""
        applied = jax.tree.map(widen, kept[2] if self.keeps_preconditioners else kept[0])
        tensors = layout.take(direction)
        products = {name: kron_matvec(applied[name], x) for name, x in tensors.items()}
        return products, kept, now.sound
