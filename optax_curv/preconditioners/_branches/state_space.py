"""`StateBranches`: what the methods on samples of a D-dimensional state share."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_curv.linalg import _lapack as lapack
from optax_curv.linalg._compiler import full_matmul
from optax_curv.preconditioners._branches import projections
from optax_curv.preconditioners._branches.rows import (
    are_sound_weights,
    covariance_rows,
    is_array,
    is_complex,
    require_weights,
)
from optax_curv.preconditioners._transformation.aliases import decayed
from optax_curv.preconditioners._transformation.bounds import bounded
from optax_curv.preconditioners._transformation.leaves import boxed_tree
from optax_curv.preconditioners._transformation.numbers import (
    raw_key,
    require_choice,
    require_flags,
    require_learning_rate,
    require_numbers,
    split_key,
    typed_key,
    value_at,
)
from optax_curv.preconditioners._transformation.placement import PlacedRule
from optax_curv.preconditioners._transformation.transformation import Step, transformation
from optax_curv.preconditioners._transformation.trees import require_params
from optax_curv.typing import PROJECTION_KINDS, Key, Number, ProjectionKind, Schedulable


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class StateBranches(PlacedRule):
    """The direction d = P M⁻¹ Pᵀ g, or λ (λI + P cov Pᵀ)⁻¹ g, for branches [K, D].

    A subclass says how it solves with M = BᵀB + λI, or with the part of it that it keeps (`solve`),
    and what the covariance is that it keeps (`root`). Its state has the fields `key` and
    `precond_norm`.
    """

    method: str
    damping: Schedulable
    projection: ProjectionKind
    complement: bool
    centered: bool
    ddof: int | None
    key: Key

    def check_options(self):
        """Refuses options that cannot be, by name."""
        require_numbers(self.method, damping=self.damping, at_least=0, schedule=True)
        require_choice(self.method, PROJECTION_KINDS, projection=self.projection)
        require_flags(self.method, complement=self.complement, centered=self.centered)
        known = isinstance(self.ddof, int) and not isinstance(self.ddof, bool)
        if self.ddof is not None and not (known and self.ddof in (0, 1)):
            raise ValueError(f"{self.method}: expected ddof to be None, 0 or 1, got {self.ddof!r}.")

    def solve(self, rows: jax.Array, b: jax.Array, damping: jax.Array) -> tuple[jax.Array, Any]:
        """(M⁻¹ b, whether it converged) for rows B [K, D] and b [D]; without `complement`."""
        raise NotImplementedError

    def root(self, rows: jax.Array) -> jax.Array:
        """R [r, D] with RᵀR the covariance that the method keeps; with `complement`."""
        raise NotImplementedError

    def numbers(self) -> dict[str, jax.Array]:
        """The fields of a new state that all branch methods have, but for the counters."""
        key = raw_key(self.method, self.key)
        return {"key": key, "precond_norm": jnp.zeros([], jnp.float32)}

    def given(self, extra_args: Any) -> Any:
        """The branches of this step, which have to be given, if only as None."""
        if "branches" not in extra_args:
            raise ValueError(
                f"{self.method}: the extra argument branches= is missing. Pass update(..., "
                "branches=samples): an array [K, D] of K samples of the state, or, for branch "
                "Fisher, rows in parameter space from optax_curv.per_example_grads, jacobian_rows "
                "or residual_rows; branches=None, said on purpose, passes the gradient unchanged. "
                "Flax's own TrainState drops it; optax_curv.flax.TrainState hands it on."
            )
        return extra_args["branches"]

    def check(self, updates, params, extra_args):
        """Refuses samples that are missing or do not fit; all of them must be sound."""
        del params
        branches = self.given(extra_args)
        if branches is not None and not is_array(branches):
            raise ValueError(
                f"{self.method}: expected branches to be an array [K, D] of samples of the state, "
                f"got a tree, {jax.tree.map(jnp.shape, branches)}; rows in parameter space go to "
                "optax_curv.scale_by_branch_fisher."
            )
        return self.state_statistics(updates, extra_args)

    def state_statistics(self, updates: Any, extra_args: Any) -> Any:
        """Checks and returns the extra arguments that enter a step in state space."""
        branches, projection = extra_args["branches"], extra_args.get("projection")
        if not is_state_sample(branches):
            return ()
        weights = extra_args.get("weights")
        for what, given in (
            ("branches [K, D]", branches),
            ("gradients for branches [K, D]", updates),
        ):
            if is_complex(given):
                raise ValueError(f"{self.method}: expected real {what}, got complex ones.")
        if weights is not None:
            require_weights(self.method, weights, len(branches))
        return branches, projection, weights

    def update(
        self,
        view,
        grads,
        state,
        params,
        sound,
        *,
        branches=None,
        projection=None,
        weights=None,
        **extra_args,
    ):
        """One step in state space."""
        del view, params, sound, extra_args
        if not is_state_sample(branches) or not optax.tree.size(grads):
            return self.step(state, grads)
        leaves = [jnp.asarray(x) for x in jax.tree.leaves((grads, branches, projection))]
        dtype = jnp.result_type(jnp.float32, *leaves)
        ddof = 1 if self.ddof is None else self.ddof
        rows = covariance_rows(jnp.asarray(branches, dtype), self.centered, ddof, weights)
        gradient = jax.tree.map(lambda g: jnp.asarray(g, dtype), grads)
        if not rows.shape[1]:
            nothing = gradient if self.complement else optax.tree.zeros_like(gradient)
            return self.step(state, nothing)
        basis, next_key = self._basis(projection, gradient, rows, state.key)
        damping, converged = value_at(self.damping, state.count, dtype), True
        if self.complement:
            direction = _keep_complement(basis, gradient, self.root(rows), damping)
        else:
            solution, converged = self.solve(rows, basis.pull(gradient), damping)
            direction = basis.push(solution)
        sound = are_sound_weights(weights)
        return self.step(state._replace(key=next_key), direction, sound, converged)

    def step(self, state: Any, direction: Any, sound: Any = True, converged: Any = True) -> Step:
        """The step along a direction, whose norm the state notes."""
        del converged
        # A norm beyond float32 is recorded as its largest number: the state stays finite.
        norm = jnp.nan_to_num(jnp.asarray(optax.tree.norm(direction), jnp.float32))
        return self.kept(Step(direction, state._replace(precond_norm=norm), sound), direction)

    def _basis(self, given, gradient, rows, key):
        """The Projection of this step, and the key's data for the next."""
        dimension, dtype = rows.shape[1], rows.dtype
        if given is not None:
            return projections.explicit(self.method, given, gradient, dimension, dtype), key
        if self.projection == "gaussian":
            following, now = split_key(key, 2)
            return projections.gaussian(now, gradient, dimension, dtype), following
        basis = projections.gaussian(typed_key(key), gradient, dimension, dtype)
        if self.projection == "fixed":
            return basis, key
        if dimension > (size := optax.tree.size(gradient)):
            raise ValueError(
                f'{self.method}: projection="orthonormal" needs D <= n, got branches with D = '
                f'{dimension} for n = {size} parameters; use projection="gaussian" or "fixed".'
            )
        return basis.factor()[0], key


def is_state_sample(branches: Any) -> bool:
    """Whether branches are an array [K, D], and not None or an array of another rank."""
    return is_array(branches) and jnp.ndim(branches) == 2


def _keep_complement(basis, gradient, root, damping):
    """λ (λI + P RᵀR Pᵀ)⁻¹ g, which is g - Q U diag(s² / (s² + λ)) Uᵀ Qᵀ g.

    There P = Q T and T Rᵀ = U s Vᵀ. Nothing is squared before it is divided, so that it is accurate
    where λ is far below the rounding of P cov Pᵀ.
    """
    columns, triangle = basis.factor()
    left, s, _ = lapack.svd(full_matmul(triangle, root.T))
    share = (s / jnp.maximum(jnp.hypot(s, jnp.sqrt(damping)), jnp.finfo(s.dtype).tiny)) ** 2
    inside = share * full_matmul(left.T, columns.pull(gradient))
    return optax.tree.sub(gradient, columns.push(full_matmul(left, inside)))


def descent(
    rule: StateBranches,
    learning_rate: Any,
    weight_decay: Number,
    gradient_bound: Any,
    param_bound: Any,
) -> optax.GradientTransformationExtraArgs:
    """The alias of a branch method: bounded gradients, weight decay, a learning rate, a box."""
    require_learning_rate(rule.method, learning_rate)
    require_numbers(rule.method, weight_decay=weight_decay)
    require_numbers(rule.method, param_bound=param_bound, at_least=0, or_none=True)
    rule.check_options()
    pieces = [*decayed(weight_decay), optax.scale_by_learning_rate(learning_rate)]

    def in_box(updates, params):
        require_params(rule.method, params)
        return boxed_tree(param_bound, updates, params)

    first, last = bounded(rule.method, gradient_bound), None if param_bound is None else in_box
    return transformation(rule, *pieces, first=first, last=last)
