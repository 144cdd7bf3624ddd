"""The options of the PSGD family, what is refused of them, and the probes that `update` takes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from optax_curv.preconditioners._transformation.numbers import (
    is_python_number,
    require_choice,
    require_dtype,
    require_flags,
    require_numbers,
    structural,
)
from optax_curv.preconditioners._transformation.trees import require_same_leaves
from optax_curv.typing import (
    CRITERIA,
    GEOMETRIES,
    WHITENS,
    Criterion,
    Geometry,
    Key,
    Number,
    Schedulable,
    Whiten,
)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FitOptions:
    """How P is fitted; `scale_by_kron_psgd` documents the options."""

    precond_lr: Schedulable
    criterion: Criterion
    b1: Schedulable
    whiten: Whiten
    update_probability: Schedulable
    init_scale: Number | None
    damping: Schedulable
    lipschitz_decay: Number
    key: Key

    @property
    def always_updates(self) -> bool:
        """Whether the factors move at every step, whatever the count."""
        return is_python_number(self.update_probability, 1)

    @property
    def keeps_momentum(self) -> bool:
        """Whether there is a momentum at all."""
        return not is_python_number(self.b1, 0)

    def check_fit(self, method: str):
        """Refuses options that cannot be, by name."""
        require_choice(method, CRITERIA, criterion=self.criterion)
        require_choice(method, WHITENS, whiten=self.whiten)
        require_numbers(method, precond_lr=self.precond_lr, above=0, schedule=True)
        require_numbers(method, init_scale=self.init_scale, above=0, or_none=True)
        shares: dict[str, Any] = {"b1": self.b1, "update_probability": self.update_probability}
        require_numbers(method, at_least=0, at_most=1, schedule=True, **shares)
        require_numbers(method, lipschitz_decay=self.lipschitz_decay, at_least=0, at_most=1)
        require_numbers(method, damping=self.damping, at_least=0, schedule=True)
        if self.criterion == "newton" and self.whiten == "momentum":
            raise ValueError(
                f"{method}: criterion='newton' fits P to Hessian-vector products; use "
                "whiten='gradient'."
            )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class PsgdOptions(FitOptions):
    """The options of a P with a factor for each axis."""

    geometry: Geometry
    max_dense_dim: int
    max_skew: float
    precond_dtype: Any
    block_size: int | None
    eps: Number
    update_last: bool

    @property
    def keeps_preconditioners(self) -> bool:
        """Whether P is kept for the steps on which Q does not move; in "quad4p" P is the factor."""
        return self.geometry != "quad4p" and not self.always_updates

    def check_options(self, method: str):
        """Refuses options that cannot be, by name."""
        require_choice(method, GEOMETRIES, geometry=self.geometry)
        self.check_fit(method)
        require_dtype(method, precond_dtype=self.precond_dtype)
        require_flags(method, update_last=self.update_last)
        limits = {"max_dense_dim": self.max_dense_dim, "max_skew": self.max_skew}
        structural(method, **limits, block_size=self.block_size)
        require_numbers(method, max_dense_dim=self.max_dense_dim, above=0)
        require_numbers(method, block_size=self.block_size, above=0, or_none=True)
        require_numbers(method, max_skew=self.max_skew, eps=self.eps, at_least=0)
        if self.criterion == "newton" and self.geometry == "right_triangular":
            raise ValueError(
                f"{method}: criterion='newton' fits P to Hessian-vector products, which "
                "geometry='right_triangular' does not; use another geometry."
            )


def checked_probes(
    method: str, criterion: Criterion, updates: Any, extra_args: Mapping[str, Any]
) -> tuple[Any, Any]:
    """The probe and the Hessian-vector product among the extra arguments, both or neither.

    One without the other, "newton" without both, and trees unlike the gradients' are refused.
    """
    given = {name: extra_args.get(name) for name in ("probe", "hvp")}
    missing = [name for name, tree in given.items() if tree is None]
    if len(missing) == 1 or (criterion == "newton" and missing):
        found = ", ".join(f"{n}={'missing' if n in missing else 'given'}" for n in given)
        raise ValueError(
            f"{method}: criterion={criterion!r} got {found}; pass both, as hessian_probe(loss_fn, "
            "params, *batch, key=key) returns them: update(grads, state, params, probe=probe, "
            "hvp=hvp)."
        )
    for name, tree in given.items():
        if tree is not None and jax.tree.leaves(updates):
            require_same_leaves(method, name, tree, "the gradients", updates)
    return given["probe"], given["hvp"]
