"""One registry of every method: how it is made, a number it takes, and the extra arguments its update needs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_curv

SHAPES = {"w": (4, 2), "b": (2,), "scalar": (), "tensor": (1, 2, 1, 3, 2)}
LAYERS = optax_curv.Layers(
    [optax_curv.Layer("dense", "dense", "['w']", "['b']", in_dim=4, out_dim=2)]
)
OBJECTIVE = optax_curv.Objective(
    lambda params, inputs: inputs @ params["w"] + params["b"], "normal"
)


class Case(NamedTuple):
    """One method."""

    make: Callable  # (**numbers) -> transformation
    number: str | None = None  # the name of a number which a sweep may trace
    value: float = 0.1
    extras: Callable = lambda rng: {}  # (numpy generator) -> arrays for update
    static: dict[str, Any] = {}  # noqa: RUF012 - extra arguments that are no arrays
    any_tree: bool = (
        True  # False: what it is made of, or its extra arguments, belong to the tree below
    )

    def transformation(self):
        return self.make(**({self.number: self.value} if self.number else {}))


def tree(seed, dtype="float32"):
    """Parameters or gradients of every rank, with a leaf that is None."""
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in SHAPES.items()} | {
        "none": None
    }


def _array(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def _branches(rng):
    return {"branches": _array(rng, 5, 3)}


def _factors(rng):
    inputs, grads = _array(rng, 8, 5), _array(rng, 8, 2)
    factors = optax_curv.KroneckerFactors(inputs.T @ inputs / 8, grads.T @ grads / 8, jnp.int32(1))
    return {"curvature": {"dense": factors}}


def _layer_rows(rng):
    rows = optax_curv.FactorRows(_array(rng, 8, 5), _array(rng, 8, 2), jnp.full(2, 1 / 8))
    return {"curvature": {"dense": rows}}


def _moments(rng):
    factors = _factors(rng)["curvature"]["dense"]
    moments = jnp.square(_array(rng, 5, 2))
    return {"curvature": {"dense": optax_curv.EigenbasisMoments(*factors, moments)}}


def _batch(rng):
    return {"batch": (_array(rng, 6, 4), _array(rng, 6, 2)), "value": jnp.float32(1.0)}


def _kfac(method, **options):
    def make(damping=1e-3):
        return method(LAYERS, damping, fallback=optax.identity(), **options)

    return {"make": make, "number": "damping", "any_tree": False}


def _psgd(method, **options):
    def make(precond_lr=0.1):
        return method(precond_lr, **options)

    return Case(make, "precond_lr")


def _branch(method, **options):
    def make(damping=1e-3):
        return method(damping, **options)

    return {"make": make, "number": "damping", "extras": _branches}


def _gauss_newton(damping=1e-3):
    return optax_curv.scale_by_gauss_newton(damping, max_iters=3, backtrack=True)


fisher, branch_kfac = optax_curv.scale_by_branch_fisher, optax_curv.scale_by_branch_kfac
METHODS = {
    "kron_psgd": _psgd(optax_curv.scale_by_kron_psgd),
    "kron_psgd_sometimes": _psgd(
        optax_curv.scale_by_kron_psgd, geometry="qeq", update_probability=0.5, b1=0.9
    ),
    "dense_psgd": _psgd(optax_curv.scale_by_dense_psgd),
    "lra_psgd": _psgd(optax_curv.scale_by_lra_psgd, rank=2),
    "shampoo": Case(
        lambda damping=1e-6: optax_curv.scale_by_shampoo(damping=damping, root_every=2), "damping"
    ),
    "soap": Case(lambda eps=1e-8: optax_curv.scale_by_soap(eps=eps, basis_every=2), "eps", 1e-6),
    "adam_in_basis": Case(
        lambda: optax_curv.scale_by_adam_in_basis(LAYERS, fallback=optax.identity()),
        extras=_factors,
        any_tree=False,
    ),
    "branch_fisher": Case(**_branch(fisher)),
    "branch_fisher_complement": Case(**_branch(fisher, projection="orthonormal", complement=True)),
    "branch_kfac": Case(**_branch(branch_kfac, blocks=2)),
    "kfac": Case(**_kfac(optax_curv.scale_by_kfac, invert_every=2), extras=_factors),
    "gauss_newton": Case(
        _gauss_newton, "damping", extras=_batch, static={"objective": OBJECTIVE}, any_tree=False
    ),
    "ekfac": Case(**_kfac(optax_curv.scale_by_ekfac), extras=_moments),
}
PIECES = {
    "clip_by_max_abs": Case(optax_curv.clip_by_max_abs, "max_abs"),
    "normalize_by_rms": Case(optax_curv.normalize_by_rms, "target"),
    "normalize_by_reference": Case(
        lambda: optax_curv.normalize_by_reference(optax.scale_by_adam())
    ),
    "keep_params_in_box": Case(optax_curv.keep_params_in_box, "bound"),
    "estimate_gradients": Case(
        lambda: optax_curv.estimate_gradients(
            lambda params, **_: jax.tree.map(lambda p: 2 * p, params)
        )
    ),
    "scale_by_quadratic_model": Case(
        optax_curv.scale_by_quadratic_model,
        "damping",
        extras=_batch,
        static={"objective": OBJECTIVE},
        any_tree=False,
    ),
}
CASES = METHODS | PIECES


def _newton(method, **options):
    def extras(rng):
        trees = [
            {name: _array(rng, *shape) for name, shape in SHAPES.items()} | {"none": None}
            for _ in range(2)
        ]
        return dict(zip(("probe", "hvp"), trees, strict=True))

    return _psgd(method, criterion="newton", **options)._replace(extras=extras)


def _rows(rng):
    return {
        "branches": {name: _array(rng, 5, *shape) for name, shape in SHAPES.items()}
        | {"none": None}
    }


def _parameter_branches(**options):
    return Case(**(_branch(fisher, **options) | {"extras": _rows, "any_tree": False}))


# Every other choice of a geometry, solver, rule and the like: through the tests that only trace.
VARIANTS = {
    **{
        f"kron_psgd_{geometry}": _psgd(optax_curv.scale_by_kron_psgd, geometry=geometry)
        for geometry in ("eq", "qep", "qeq", "quad", "quad4p", "right_triangular")
    },
    "kron_psgd_newton": _newton(optax_curv.scale_by_kron_psgd),
    "kron_psgd_newton_eq": _newton(optax_curv.scale_by_kron_psgd, geometry="eq"),
    "kron_psgd_momentum": _psgd(optax_curv.scale_by_kron_psgd, whiten="momentum", b1=0.9),
    "kron_psgd_bfloat16": _psgd(
        optax_curv.scale_by_kron_psgd, precond_dtype="bfloat16", block_size=2
    ),
    "dense_psgd_newton": _newton(optax_curv.scale_by_dense_psgd, geometry="quad"),
    "lra_psgd_newton": _newton(optax_curv.scale_by_lra_psgd, rank=1),
    **{
        f"branch_fisher_{solver}": Case(**_branch(fisher, solver=solver))
        for solver in ("woodbury", "cholesky", "auto")
    },
    "branch_fisher_fixed": Case(**_branch(fisher, projection="fixed", centered=False)),
    **{
        f"branch_fisher_rows_{solver}": _parameter_branches(solver=solver)
        for solver in ("cg", "woodbury", "cholesky", "auto")
    },
    "branch_fisher_rows_momentum": _parameter_branches(solver="auto", momentum=0.9, centered=False),
    "branch_kfac_complement": Case(
        **_branch(branch_kfac, projection="orthonormal", complement=True)
    ),
    "branch_kfac_fixed": Case(**_branch(branch_kfac, projection="fixed")),
    "kfac_trace": Case(
        **_kfac(optax_curv.scale_by_kfac, damping_rule="trace", kl_clip=1.0), extras=_factors
    ),
    "kfac_rows": Case(
        **_kfac(optax_curv.scale_by_kfac, update_every=2, invert_every=4), extras=_layer_rows
    ),
    "kfac_eigh": Case(
        **_kfac(optax_curv.scale_by_kfac, inverse="eigh", update_every=2), extras=_factors
    ),
    "kfac_cg": Case(**_kfac(optax_curv.scale_by_kfac, inverse="cg"), extras=_factors),
    "shampoo_qr": Case(
        lambda damping=1e-6: optax_curv.scale_by_shampoo(damping=damping, root_every=2, root="qr"),
        "damping",
    ),
    "soap_eigh": Case(
        lambda eps=1e-8: optax_curv.scale_by_soap(eps=eps, basis_every=2, basis="eigh"), "eps", 1e-6
    ),
    "ekfac_seldom": Case(
        **_kfac(optax_curv.scale_by_ekfac, invert_every=5, kl_clip=1.0), extras=_moments
    ),
}
# What takes complex leaves; every other method refuses them in init, by name.
COMPLEX = (
    *("clip_by_max_abs", "normalize_by_rms", "normalize_by_reference", "estimate_gradients"),
    *("kron_psgd", "kron_psgd_sometimes", "shampoo", "shampoo_qr", "soap", "soap_eigh"),
)
