"""Named runs of every method and alias, and the record of what they did before the refactoring.

Each run makes a transformation and feeds it 25 steps of fixed gradients, parameters and extra
arguments. Only public constructors, `init` and `update` are used, never what a state holds. Every
transformation is made in `RUNS`: whoever renames an argument edits it there and nowhere else.

    python tests/trajectories.py record tests/data/trajectories.npz [NAME ...]

records the runs (those named only, beside what the file has), each with its sensitivity: how far
its updates move, relative to the largest entry of the leaf, when gradients, extra arguments and
state are off by one unit in the last place, or when the program is compiled without optimizations.
"""

import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_curv

COUNT = 25
STEPS = (1, 2, 5, 10, 25)  # whose updates are kept
DTYPES = ("float32", "float64")
SENSITIVITY = "/sensitivity"  # after the name of the array that it belongs to

SHAPES = {
    "w": (4, 3),
    "u": (4, 3),
    "b": (3,),
    "scalar": (),
    "tensor": (1, 2, 1, 3, 2),
    "none": None,
}
SMALL_SHAPES = {"w": (4, 3), "b": (3,)}  # options beside a method's own run: it compiles sooner
STACKED_SHAPES = {"stack": (2, 4, 3), "b": (3,)}
STACKED = {"stack": 1, "b": 0}
ZOO_SHAPES = {
    **{"a": (4, 3), "a_bias": (3,), "c": (4, 3), "c_bias": (3,), "embedding": (6, 3)},
    **{"scale": (3,), "shift": (3,), "stack": (2, 3, 4), "stack_bias": (2, 4), "rest": (3,)},
}
LAYERS = optax_curv.Layers([optax_curv.Layer("dense", "dense", "['w']", "['b']", 4, 3)])
ZOO = optax_curv.Layers(
    [
        optax_curv.Layer("a", "dense", "['a']", "['a_bias']", 4, 3),
        optax_curv.Layer("c", "dense", "['c']", "['c_bias']", 4, 3),
        optax_curv.Layer("embedding", "embedding", "['embedding']", None, 6, 3),
        optax_curv.Layer("scale", "scale", "['scale']", None, 1, 3),
        optax_curv.Layer("shift", "shift", None, "['shift']", 0, 3),
        optax_curv.Layer("stack", "dense", "['stack']", "['stack_bias']", 3, 4, stack=(2,)),
    ]
)
OBJECTIVE = optax_curv.Objective(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]), "normal")


class Run(NamedTuple):
    """A transformation and what it is fed."""

    make: Callable  # () -> transformation
    extras: Callable = lambda rng: {}  # NumPy generator -> arrays of one step
    given: Callable = lambda arrays: arrays  # arrays of a step -> extra arguments of `update`
    shapes: dict[str, Any] = SMALL_SHAPES
    rate: float = 0.0  # the parameters move by this multiple of the updates
    descends: bool = False  # gradients and value are those of OBJECTIVE, at parameters that move
    leaves: str | None = None  # another dtype of the leaves: "complex" or "bfloat16"
    bad_step: int = 0  # whose gradient has a NaN
    in_state: bool = True  # whether the state may be off by rounding


def shaped(rng, shapes, function):
    """A dict of arrays, None where there is no shape."""
    return {k: None if shape is None else function(rng, shape) for k, shape in shapes.items()}


def normal(rng, shape):
    return rng.normal(size=shape)


def gradient(rng, shape):
    """Numbers that fall off along every axis, so that no two eigenvalues are near each other."""
    x = rng.normal(size=shape)
    for axis, size in enumerate(shape):
        x = x * 0.5 ** np.arange(size).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return x


def branches(rng):
    return {"branches": rng.normal(size=(5, 3))}


def branches_and_projection(rng):
    return branches(rng) | {"projection": 0.3 * rng.normal(size=(15, 3))}


def rows(rng):
    return {"branches": shaped(rng, SHAPES, lambda rng, shape: normal(rng, (5, *shape)))}


def complex_rows(rng):
    return {
        "branches": jax.tree.map(lambda x: x + 1j * normal(rng, x.shape), rows(rng)["branches"])
    }


def probes(rng):
    """A probe and a Hessian-vector product, of a diagonal Hessian that is not definite."""
    probe = shaped(rng, SMALL_SHAPES, normal)
    hessian = shaped(np.random.default_rng(9), SMALL_SHAPES, gradient)
    return {"probe": probe, "hvp": jax.tree.map(np.multiply, hessian, probe)}


def batch(rng):
    return {"batch": (rng.normal(size=(6, 4)), 0.5 * rng.normal(size=(6, 3)))}


def with_objective(arrays):
    return arrays | {"objective": OBJECTIVE}


def products(rng):
    diagonal = shaped(rng, SMALL_SHAPES, lambda *x: normal(*x) ** 2)
    return {"diagonal": diagonal, "v": shaped(rng, SMALL_SHAPES, normal)}


def with_product(arrays, diagonal=False):
    """The product with a diagonal and a matrix of rank one."""

    def product(x):
        along = 0.1 * optax.tree.vdot(arrays["v"], x)
        return jax.tree.map(lambda d, v, x: d * x + v * along, arrays["diagonal"], arrays["v"], x)

    return {"curvature_product": product} | ({"diagonal": arrays["diagonal"]} if diagonal else {})


def second_moment(rng, shape, stack):
    """E[x xᵀ] over a few rows, or its diagonal."""
    width, full = shape[-1], len(shape) == len(stack) + 2
    x = normal(rng, (*stack, 8, width)) * 0.5 ** np.arange(width)
    return x.swapaxes(-1, -2) @ x / 8 if full else (x**2).mean(-2)


def factors(layers, moments=False):
    def of_layer(rng, layer):
        a, g = (second_moment(rng, shape, layer.stack) for shape in layer.factor_shapes)
        a = np.ones_like(a) if layer.kind in ("scale", "shift") else a
        if not moments:
            return optax_curv.KroneckerFactors(a, g, np.int32(1))
        shape = (*layer.stack, layer.rows_of_matrix, layer.out_dim)
        return optax_curv.EigenbasisMoments(a, g, np.int32(1), normal(rng, shape) ** 2)

    return lambda rng: {"curvature": {layer.name: of_layer(rng, layer) for layer in layers}}


def layer_rows(layers):
    def of_layer(rng, layer):
        if layer.kind in ("scale", "shift"):
            return factors([layer])(rng)["curvature"][layer.name]
        inputs = normal(rng, (*layer.stack, 8, layer.rows_of_matrix))
        if layer.kind == "embedding":
            inputs = rng.integers(layer.in_dim, size=8).astype(np.int32)
        grads = normal(rng, (*layer.stack, 8, layer.out_dim))
        return optax_curv.FactorRows(inputs, grads, np.full(2, 1 / 8))

    return lambda rng: {"curvature": {layer.name: of_layer(rng, layer) for layer in layers}}


def batch_and_factors(rng):
    return batch(rng) | factors(LAYERS)(rng)


def cyclic(count):
    """A schedule."""
    return 0.1 / (1 + jnp.asarray(count, jnp.float32) % 4)


oc, identity, adam = optax_curv, optax.identity, optax.scale_by_adam
MOVES, NETWORK = {"rate": 1.0}, {"shapes": SMALL_SHAPES, "given": with_objective}
DESCENDS = NETWORK | {"rate": 1.0, "descends": True}
TREE, STACK, BROKEN = {"shapes": SHAPES}, {"shapes": STACKED_SHAPES}, {"bad_step": 8}
# What is kept belongs to one fingerprint, or lies exactly where nothing moves.
KEPT = {"in_state": False}
COMPLEX, BFLOAT16 = {"leaves": "complex"}, {"leaves": "bfloat16"}
IN_W, IN_ZOO = {"extras": factors(LAYERS)}, {"extras": factors(ZOO), "shapes": ZOO_SHAPES}
ROWS_W = {"extras": layer_rows(LAYERS)}
ROWS_ZOO = {"extras": layer_rows(ZOO), "shapes": ZOO_SHAPES}
MOMENTS_W = {"extras": factors(LAYERS, moments=True)}
MOMENTS_ZOO = {"extras": factors(ZOO, moments=True), "shapes": ZOO_SHAPES}
STATES, TREES, PROBES = {"extras": branches}, {"extras": rows, "shapes": SHAPES}, {"extras": probes}
MASK = {"w": True, "u": False, "b": False, "scalar": True, "tensor": False, "none": None}

PIECES = {
    "clip_by_max_abs": Run(lambda: oc.clip_by_max_abs(1.0), **TREE),
    "normalize_by_rms": Run(lambda: oc.normalize_by_rms(0.2), **TREE),
    "normalize_by_reference": Run(lambda: oc.normalize_by_reference(adam()), **TREE),
    "keep_params_in_box": Run(lambda: oc.keep_params_in_box(1.5), **MOVES),
    "estimate_gradients": Run(
        lambda: oc.estimate_gradients(lambda params, **_: jax.tree.map(lambda p: 2 * p, params)),
        rate=-0.1,
    ),
    "quadratic_model": Run(lambda: oc.scale_by_quadratic_model(0.1), batch, rate=-0.1, **NETWORK),
    "quadratic_model_descends": Run(
        lambda: optax.chain(oc.scale_by_quadratic_model(0.1), optax.scale(-1.0)), batch, **DESCENDS
    ),
    "adapt_damping": Run(
        lambda: oc.adapt_damping(
            lambda damping: optax.chain(oc.scale_by_quadratic_model(damping), optax.scale(-1.0)),
            1.0,
            adapt_every=2,
        ),
        batch,
        **DESCENDS,
    ),
    "clip_by_max_abs_complex": Run(lambda: oc.clip_by_max_abs(1.0), **COMPLEX),
    "normalize_by_rms_complex": Run(lambda: oc.normalize_by_rms(0.2), **COMPLEX),
    "normalize_by_reference_complex": Run(lambda: oc.normalize_by_reference(adam()), **COMPLEX),
}


def kron(precond_lr=0.1, **options):
    return lambda: oc.scale_by_kron_psgd(precond_lr, **options, key=1)


KRON = {
    "kron_psgd": Run(kron(), **TREE),
    "kron_psgd_sometimes": Run(
        kron(geometry="qeq", update_probability=0.5, b1=0.9), **KEPT, **TREE
    ),
    "kron_psgd_scheduled": Run(
        kron(update_probability=oc.flat_then_decay(5, 0.1, 0.3), b1=0.9), **KEPT
    ),
    "kron_psgd_eq": Run(kron(geometry="eq"), **TREE),
    "kron_psgd_qep": Run(kron(geometry="qep")),
    "kron_psgd_qeq": Run(kron(geometry="qeq")),
    "kron_psgd_quad": Run(kron(geometry="quad")),
    "kron_psgd_quad4p": Run(kron(geometry="quad4p")),
    "kron_psgd_quad4p_sometimes": Run(
        kron(geometry="quad4p", update_probability=0.5, b1=0.9), **KEPT
    ),
    "kron_psgd_right_triangular": Run(kron(geometry="right_triangular"), **KEPT, **TREE),
    "kron_psgd_newton": Run(kron(criterion="newton"), **PROBES),
    "kron_psgd_newton_eq": Run(kron(criterion="newton", geometry="eq"), **PROBES),
    "kron_psgd_newton_quad4p": Run(kron(criterion="newton", geometry="quad4p"), **PROBES),
    "kron_psgd_momentum": Run(kron(whiten="momentum", b1=0.9)),
    "kron_psgd_injected": Run(
        lambda: optax.inject_hyperparams(oc.scale_by_kron_psgd)(precond_lr=cyclic, b1=0.9, key=1)
    ),
    "kron_psgd_numbers": Run(
        kron(precond_lr=cyclic, damping=0.1, lipschitz_decay=0.5, init_scale=2.0)
    ),
    "kron_psgd_bfloat16": Run(kron(precond_dtype="bfloat16", block_size=2)),
    "kron_psgd_blocks": Run(kron(block_size=2, b1=0.9)),
    "kron_psgd_blocks_sometimes": Run(kron(block_size=2, update_probability=0.5), **KEPT),
    "kron_psgd_stacked": Run(kron(stacked=STACKED), **STACK),
    "kron_psgd_stacked_eq": Run(kron(stacked=STACKED, geometry="eq", b1=0.9), **STACK),
    "kron_psgd_dense": Run(kron(max_skew=float("inf"))),
    "kron_psgd_diagonal": Run(kron(max_dense_dim=1)),
    "kron_psgd_complex": Run(kron(b1=0.9), **COMPLEX),
    "kron_psgd_complex_eq": Run(kron(geometry="eq"), **COMPLEX),
    "kron_psgd_complex_quad4p": Run(kron(geometry="quad4p"), **COMPLEX),
    "kron_psgd_bfloat16_leaves": Run(kron(b1=0.9), **BFLOAT16, **BROKEN),
    "dense_psgd": Run(lambda: oc.scale_by_dense_psgd(key=1), **TREE),
    "dense_psgd_eq": Run(lambda: oc.scale_by_dense_psgd(geometry="eq", b1=0.9, key=1)),
    "dense_psgd_sometimes": Run(
        lambda: oc.scale_by_dense_psgd(update_probability=0.5, key=1), **KEPT
    ),
    "dense_psgd_newton": Run(
        lambda: oc.scale_by_dense_psgd(criterion="newton", geometry="quad", key=1), **PROBES
    ),
    "lra_psgd": Run(lambda: oc.scale_by_lra_psgd(rank=2, key=1), **TREE),
    "lra_psgd_newton": Run(
        lambda: oc.scale_by_lra_psgd(rank=1, criterion="newton", key=1), **PROBES
    ),
    "lra_psgd_sometimes": Run(lambda: oc.scale_by_lra_psgd(update_probability=0.5, b1=0.9, key=1)),
    "lra_psgd_diagonal": Run(
        lambda: oc.scale_by_lra_psgd(rank=0, whiten="momentum", b1=0.9, key=1)
    ),
    "lra_psgd_bfloat16_leaves": Run(lambda: oc.scale_by_lra_psgd(rank=2, key=1), **BFLOAT16),
}


def shampoo(damping=1e-6, root_every=2, **options):
    return lambda: oc.scale_by_shampoo(damping=damping, root_every=root_every, **options)


def soap(eps=1e-6, basis_every=2, **options):
    return lambda: oc.scale_by_soap(eps=eps, basis_every=basis_every, **options)


MATRICES = {
    "shampoo": Run(shampoo(), **TREE),
    "shampoo_qr": Run(shampoo(root="qr")),
    "shampoo_newton": Run(shampoo(root="newton")),
    "shampoo_defaults": Run(lambda: oc.scale_by_shampoo()),
    "shampoo_qr_defaults": Run(lambda: oc.scale_by_shampoo(root="qr")),
    "shampoo_damped": Run(shampoo(0.03)),
    "shampoo_damped_qr": Run(shampoo(0.03, root="qr")),
    "shampoo_damped_newton": Run(shampoo(0.03, root="newton")),
    "shampoo_kl": Run(shampoo(0.03, kl=True)),
    "shampoo_kl_qr": Run(shampoo(0.03, kl=True, root="qr")),
    "shampoo_numbers": Run(shampoo(0.03, decay=1, b1=cyclic, nesterov=False, exponent=0.25)),
    "shampoo_no_momentum": Run(shampoo(0.03, b1=0.0, root_every=4)),
    "shampoo_seldom": Run(shampoo(0.03, root_every=8, refresh_growth=1.5)),
    "shampoo_injected": Run(lambda: optax.inject_hyperparams(oc.scale_by_shampoo)(damping=cyclic)),
    "shampoo_on_schedule": Run(shampoo(0.03, root_every=3, refresh_growth=float("inf"))),
    "shampoo_blocks": Run(shampoo(0.03, block_size=2)),
    "shampoo_blocks_qr": Run(shampoo(0.03, block_size=2, root="qr")),
    "shampoo_stacked": Run(shampoo(0.03, stacked=STACKED), **STACK),
    "shampoo_stacked_newton": Run(shampoo(0.03, stacked=STACKED, root="newton"), **STACK),
    "shampoo_diagonal": Run(shampoo(0.03, max_dim=3)),
    "shampoo_bfloat16": Run(shampoo(0.03, precond_dtype="bfloat16")),
    "shampoo_complex": Run(shampoo(0.03), **COMPLEX),
    "shampoo_complex_qr": Run(shampoo(0.03, root="qr"), **COMPLEX),
    "shampoo_bfloat16_leaves": Run(shampoo(0.03), **BFLOAT16, **BROKEN),
    "soap": Run(soap(), **TREE),
    "soap_eigh": Run(soap(basis="eigh")),
    "soap_defaults": Run(lambda: oc.scale_by_soap()),
    "soap_damped": Run(soap(0.1)),
    "soap_damped_eigh": Run(soap(0.1, basis="eigh")),
    "soap_numbers": Run(soap(0.1, b1=0.5, b2=cyclic, decay=0.9, basis_every=5)),
    "soap_injected": Run(lambda: optax.inject_hyperparams(oc.scale_by_soap)(eps=cyclic)),
    "soap_blocks": Run(soap(0.1, block_size=2)),
    "soap_stacked": Run(soap(0.1, stacked=STACKED), **STACK),
    "soap_diagonal": Run(soap(0.1, max_dim=3)),
    "soap_bfloat16": Run(soap(0.1, precond_dtype="bfloat16")),
    "soap_complex": Run(soap(0.1), **COMPLEX),
    "soap_complex_eigh": Run(soap(0.1, basis="eigh"), **COMPLEX),
    "soap_bfloat16_leaves": Run(soap(0.1), **BFLOAT16, **BROKEN),
}


def kfac(layers=LAYERS, **options):
    return lambda: oc.scale_by_kfac(layers, 1e-3, fallback=adam(), **options)


def ekfac(layers=LAYERS, **options):
    return lambda: oc.scale_by_ekfac(layers, 1e-3, fallback=adam(), **options)


IS_KEPT = {k: k not in ("a_bias", "embedding") for k in ZOO_SHAPES}


def adam_in_basis(layers=LAYERS, **options):
    return lambda: oc.scale_by_adam_in_basis(layers, fallback=adam(), **options)


LAYERWISE = {
    "kfac": Run(kfac(invert_every=2), **IN_W, **TREE),
    "kfac_trace": Run(kfac(damping_rule="trace", kl_clip=1.0), **IN_W),
    "kfac_rows": Run(kfac(update_every=2, invert_every=4), **ROWS_W),
    "kfac_eigh": Run(kfac(inverse="eigh", update_every=2), **IN_W),
    "kfac_cg": Run(kfac(inverse="cg"), **IN_W),
    "kfac_zoo": Run(kfac(ZOO), **IN_ZOO),
    "kfac_zoo_seldom": Run(kfac(ZOO, invert_every=4, kl_clip=0.1, decay=cyclic), **IN_ZOO),
    "kfac_zoo_trace": Run(kfac(ZOO, invert_every=3, damping_rule="trace"), **IN_ZOO),
    "kfac_zoo_eigh": Run(kfac(ZOO, invert_every=3, inverse="eigh"), **IN_ZOO),
    "kfac_zoo_cg": Run(kfac(ZOO, inverse="cg"), **IN_ZOO),
    "kfac_zoo_rows": Run(kfac(ZOO, update_every=None, invert_every=3), **ROWS_ZOO),
    "kfac_masked": Run(lambda: optax.masked(kfac(ZOO, invert_every=2)(), IS_KEPT), **IN_ZOO),
    "kfac_bfloat16_leaves": Run(kfac(ZOO, invert_every=2), **IN_ZOO, **BFLOAT16, **BROKEN),
    "ekfac": Run(ekfac(), **MOMENTS_W),
    "ekfac_seldom": Run(ekfac(invert_every=5, kl_clip=1.0), **MOMENTS_W),
    "ekfac_zoo": Run(ekfac(ZOO, update_every=2, invert_every=4), **MOMENTS_ZOO),
    "ekfac_bfloat16_leaves": Run(ekfac(ZOO), **MOMENTS_ZOO, **BFLOAT16, **BROKEN),
    "adam_in_basis": Run(adam_in_basis(), **IN_W),
    "adam_in_basis_zoo": Run(adam_in_basis(ZOO, basis_every=3, update_every=2), **IN_ZOO),
}


# The defaults of before, where a run does not say otherwise.
BEFORE = {"complement": False, "ddof": 1}


def fisher(damping=1e-3, **options):
    return lambda: oc.scale_by_branch_fisher(damping, **BEFORE | options, key=1)


def branch_kfac(damping=1e-3, **options):
    return lambda: oc.scale_by_branch_kfac(damping, **BEFORE | options, key=1)


BRANCHES = {
    "branch_fisher": Run(fisher(), **STATES, **TREE),
    "branch_fisher_complement": Run(fisher(projection="orthonormal", complement=True), **STATES),
    "branch_fisher_complement_gaussian": Run(fisher(complement=True), **STATES),
    "branch_fisher_woodbury": Run(fisher(solver="woodbury"), **STATES),
    "branch_fisher_cholesky": Run(fisher(solver="cholesky"), **STATES),
    "branch_fisher_auto": Run(fisher(cyclic, solver="auto"), **STATES),
    "branch_fisher_fixed": Run(fisher(projection="fixed", centered=False), **STATES),
    "branch_fisher_projected": Run(fisher(complement=True), branches_and_projection),
    "branch_fisher_bfloat16_leaves": Run(
        fisher(0.1, complement=True), **STATES, **BFLOAT16, **BROKEN
    ),
    "branch_fisher_rows_cg": Run(fisher(solver="cg"), **TREES),
    "branch_fisher_rows_woodbury": Run(fisher(solver="woodbury"), **TREES),
    "branch_fisher_rows_cholesky": Run(fisher(solver="cholesky"), **TREES),
    "branch_fisher_rows_auto": Run(fisher(solver="auto"), **TREES),
    "branch_fisher_rows_complement": Run(fisher(0.1, solver="auto", complement=True), **TREES),
    "branch_fisher_rows_momentum": Run(
        fisher(solver="auto", momentum=0.9, centered=False), **TREES
    ),
    "branch_fisher_rows_real": Run(
        fisher(solver="auto", complex_metric="real"), complex_rows, **TREE
    ),
    "branch_fisher_rows_full": Run(
        fisher(solver="auto", complex_metric="full"), complex_rows, **TREE, **COMPLEX
    ),
    "branch_fisher_rows_full_cg": Run(
        fisher(solver="cg", complex_metric="full"), complex_rows, **TREE, **COMPLEX
    ),
    "branch_kfac": Run(branch_kfac(blocks=2), **STATES, **TREE),
    "branch_kfac_complement": Run(branch_kfac(projection="orthonormal", complement=True), **STATES),
    "branch_kfac_fixed": Run(branch_kfac(projection="fixed"), **STATES),
    "branch_kfac_blocks": Run(
        branch_kfac(0.1, blocks=2, complement=True, centered=False), **STATES
    ),
}


def gauss_newton(damping=1e-3, max_iters=3, **options):
    return lambda: oc.scale_by_gauss_newton(damping, max_iters=max_iters, **options)


GAUSS_NEWTON = {
    "gauss_newton": Run(gauss_newton(backtrack=True), batch, rate=-0.1, **NETWORK),
    "gauss_newton_product": Run(gauss_newton(0.1), products, with_product),
    "gauss_newton_diagonal": Run(
        gauss_newton(0.1, max_iters=20, warm_start=0.5, diagonal_power=1.0),
        products,
        lambda arrays: with_product(arrays, diagonal=True),
    ),
    "gauss_newton_layers": Run(
        gauss_newton(0.1, layers=LAYERS, decay=0.8), batch_and_factors, rate=-0.1, **NETWORK
    ),
}


def mostly_adam(path, leaf):
    return leaf.ndim != 2 or path[-1].key == "u"


DECAY = {"weight_decay": 0.1}
SOME_DECAY = DECAY | {"weight_decay_mask": MASK}
# Only the arguments that an alias keeps whatever becomes of the research switches of its method.
ALIASES = {
    "shampoo_alias": Run(lambda: oc.shampoo(0.02), **MOVES, **BROKEN, **TREE),
    "shampoo_alias_decays": Run(
        lambda: oc.shampoo(cyclic, 0.9, **SOME_DECAY, rms=0.1, adam_for=mostly_adam, damping=0.03),
        **MOVES,
        **TREE,
    ),
    "shampoo_alias_stacked": Run(
        lambda: oc.shampoo(0.02, stacked=STACKED, **DECAY), **MOVES, **STACK
    ),
    "shampoo_alias_complex": Run(lambda: oc.shampoo(0.02, damping=0.03), **MOVES, **COMPLEX),
    "shampoo_alias_bfloat16_leaves": Run(lambda: oc.shampoo(0.02, **DECAY), **MOVES, **BFLOAT16),
    "soap_alias": Run(lambda: oc.soap(3e-3), **MOVES, **BROKEN, **TREE),
    "soap_alias_decays": Run(
        lambda: oc.soap(cyclic, 0.9, b2=0.9, **SOME_DECAY, rms=0.2, adam_for=mostly_adam),
        **MOVES,
        **TREE,
    ),
    "soap_alias_stacked": Run(
        lambda: oc.soap(3e-3, basis="eigh", stacked=STACKED, **DECAY), **MOVES, **STACK
    ),
    "kron_psgd_alias": Run(lambda: oc.kron_psgd(0.01, key=1), **MOVES, **BROKEN, **TREE),
    "kron_psgd_alias_decays": Run(
        lambda: oc.kron_psgd(cyclic, 0.5, **SOME_DECAY, max_rms=0.5, key=1),
        **MOVES,
        **TREE,
    ),
    "kron_psgd_alias_sometimes": Run(
        lambda: optax.chain(
            oc.scale_by_kron_psgd(update_probability=0.5, b1=0.9, key=1),
            oc.clip_by_max_abs(1.0),
            optax.scale_by_learning_rate(0.01),
        ),
        **MOVES,
        **KEPT,
    ),
    "kron_psgd_alias_stacked": Run(
        lambda: optax.chain(
            oc.scale_by_kron_psgd(stacked=STACKED, block_size=3, geometry="eq", b1=0.9, key=1),
            oc.clip_by_max_abs(10.0),
            optax.clip_by_block_rms(2.0),
            optax.scale_by_learning_rate(0.01),
        ),
        **MOVES,
        **STACK,
    ),
    "dense_psgd_alias": Run(lambda: oc.dense_psgd(0.01, key=1), **MOVES, **BROKEN, **TREE),
    "dense_psgd_alias_decays": Run(lambda: oc.dense_psgd(0.01, 0.5, **DECAY, key=1), **MOVES),
    "lra_psgd_alias": Run(lambda: oc.lra_psgd(0.01, key=1), **MOVES, **BROKEN, **TREE),
    "lra_psgd_alias_decays": Run(lambda: oc.lra_psgd(0.01, 0.5, rank=2, **DECAY, key=1), **MOVES),
    "kfac_alias": Run(
        lambda: oc.kfac(0.01, ZOO, fallback=adam(), kl_clip=None), **IN_ZOO, **MOVES, **BROKEN
    ),
    "kfac_alias_decays": Run(
        lambda: oc.kfac(
            0.01, ZOO, 0.1, fallback=adam(), momentum=0.5, kl_clip=0.1, invert_every=5, **DECAY
        ),
        **IN_ZOO,
        **MOVES,
    ),
    "kfac_alias_rows": Run(
        lambda: oc.kfac(0.01, ZOO, fallback=adam(), invert_every=5, kl_clip=None),
        **ROWS_ZOO,
        **MOVES,
    ),
    "kfac_alias_adaptive": Run(lambda: oc.kfac(None, LAYERS), batch_and_factors, **DESCENDS),
    "kfac_alias_adaptive_damping": Run(
        lambda: oc.kfac(None, LAYERS, 1.0, invert_every=3), batch_and_factors, **DESCENDS
    ),
    "ekfac_alias": Run(
        lambda: oc.ekfac(0.01, ZOO, fallback=adam()), **MOMENTS_ZOO, **MOVES, **BROKEN
    ),
    "ekfac_alias_decays": Run(
        lambda: oc.ekfac(
            0.01, ZOO, 0.1, fallback=adam(), momentum=0.5, kl_clip=0.1, invert_every=5, **DECAY
        ),
        **MOMENTS_ZOO,
        **MOVES,
    ),
    "gauss_newton_alias": Run(
        lambda: oc.gauss_newton(0.1, max_iters=5, **DECAY), batch, **DESCENDS
    ),
    "gauss_newton_alias_adaptive": Run(lambda: oc.gauss_newton(None), batch, **DESCENDS),
    "gauss_newton_alias_adaptive_backtracks": Run(
        lambda: oc.gauss_newton(None, 0.1, max_iters=5, backtrack=True, layers=LAYERS),
        batch_and_factors,
        **DESCENDS,
    ),
    "branch_fisher_alias": Run(
        lambda: oc.branch_fisher(0.01, 0.1, **BEFORE, key=1), **STATES, **MOVES, **TREE
    ),
    "branch_fisher_alias_decays": Run(
        lambda: oc.branch_fisher(0.1, 0.1, complement=True, param_bound=1.0, key=1, **DECAY),
        **STATES,
        **MOVES,
        **BROKEN,
    ),
    "branch_fisher_alias_rows": Run(
        lambda: oc.branch_fisher(0.01, 0.1, solver="auto", centered=False, momentum=0.9),
        **TREES,
        **MOVES,
    ),
    "branch_kfac_alias": Run(
        lambda: oc.branch_kfac(0.01, 0.1, **BEFORE, key=1), **STATES, **MOVES, **TREE
    ),
    "branch_kfac_alias_decays": Run(
        lambda: oc.branch_kfac(
            0.1, 0.1, blocks=2, complement=True, param_bound=1.0, key=1, **DECAY
        ),
        **STATES,
        **MOVES,
        **BROKEN,
    ),
}
RUNS = PIECES | KRON | MATRICES | LAYERWISE | BRANCHES | GAUSS_NEWTON | ALIASES
# Each method and alias once, by the run that goes through most of its code.
FEW = (
    *(name for name in PIECES if not name.endswith("_complex")),
    *("kron_psgd", "kron_psgd_sometimes", "kron_psgd_stacked", "dense_psgd", "lra_psgd"),
    *("shampoo", "shampoo_damped_qr", "shampoo_blocks", "soap", "soap_stacked"),
    *("kfac_zoo_seldom", "kfac_rows", "ekfac_zoo", "adam_in_basis_zoo"),
    *("branch_fisher_complement", "branch_fisher_rows_auto", "branch_kfac_blocks"),
    *("gauss_newton_layers", "kfac_alias_adaptive", "gauss_newton_alias_adaptive"),
    *(name for name in ALIASES if name.endswith("_decays")),
)


def dtypes(name):
    """Those a run is recorded in: what is rounded to bfloat16 needs no second one."""
    return DTYPES[:1] if RUNS[name].leaves == "bfloat16" else DTYPES


def cast(tree, dtype):
    """Numbers in `dtype`, or the complex one that has it; integers stay 32 bits wide."""

    def kind(x):
        return jnp.result_type(x, dtype) if np.iscomplexobj(x) else dtype

    return jax.tree.map(
        lambda x: jnp.asarray(x, np.int32 if x.dtype.kind == "i" else kind(x)), tree
    )


def inputs(name, dtype):
    """Parameters, and gradients and arrays of all steps, stacked."""
    run = RUNS[name]

    def leaves(seed, function):
        tree = shaped(np.random.default_rng(seed), run.shapes, function)
        if run.leaves == "complex":
            rng = np.random.default_rng(seed + 1000)
            tree = jax.tree.map(lambda x: x + 1j * function(rng, x.shape), tree)
        return jax.tree.map(np.asarray, tree)

    def grads(step):
        tree = jax.tree.map(
            lambda mean, x: scale(step) * (0.2 * mean + x), drift, leaves(step, gradient)
        )
        first = next(iter(tree))
        return tree | {first: tree[first] * np.nan} if step == run.bad_step else tree

    def scale(step):
        return np.exp(np.sin(0.7 * step))

    def stacked(trees):
        return jax.tree.map(lambda *x: np.stack(x), *trees)

    drift = leaves(99, normal)
    numbers = "bfloat16" if run.leaves == "bfloat16" else dtype
    steps = range(1, COUNT + 1)
    grads = {} if run.descends else cast(stacked(map(grads, steps)), numbers)
    arrays = [
        jax.tree.map(np.asarray, run.extras(np.random.default_rng(100 + step))) for step in steps
    ]
    return cast(leaves(0, normal), numbers), grads, cast(stacked(arrays), dtype)


def off_by_rounding(tree, key, share):
    """Every number up or down by `share` of float32's or float64's rounding."""

    def moved(x, key):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        info = jnp.finfo(jnp.promote_types(x.dtype, jnp.float32))
        sign = jax.random.rademacher(key, x.shape, info.dtype)
        return (x * (1 + share.astype(info.dtype) * sign * info.eps)).astype(x.dtype)

    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, max(1, len(leaves)))
    return treedef.unflatten(map(moved, leaves, keys[: len(leaves)]))


def walk(run, params, grads, arrays, disturbed=None):
    """Updates of all steps; `disturbed` is a key and by how much it moves inputs and state."""
    tx = run.make()

    def step(carry, given):
        (params, state), (key, grads, arrays) = carry, given
        value = None
        if run.descends:
            value, grads = jax.value_and_grad(OBJECTIVE)(params, *arrays["batch"])
        if disturbed is not None:
            keys, (_, of_inputs, of_state) = jax.random.split(key), disturbed
            grads, arrays = off_by_rounding((grads, arrays), keys[0], of_inputs)
            state = off_by_rounding(state, keys[1], of_state)
        extra = run.given(arrays) | ({"value": value} if run.descends else {})
        updates, state = tx.update(grads, state, params, **extra)
        if run.rate:
            params = jax.tree.map(lambda p, u: (p + run.rate * u).astype(p.dtype), params, updates)
        return (params, state), updates

    keys = None if disturbed is None else jax.random.split(disturbed[0], COUNT)
    return jax.lax.scan(step, (params, tx.init(params)), (keys, grads, arrays))[1]


def flat(updates):
    """Of the kept steps, the numbers of all leaves in a row."""
    leaves = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in jax.tree.leaves(updates)]
    kept = np.array(STEPS) - 1
    return np.concatenate([np.asarray(x)[kept].reshape(len(kept), -1) for x in leaves], axis=1)


def run(name, dtype):
    """The updates at STEPS, [steps, numbers]."""
    with jax.enable_x64(dtype == "float64"):
        return flat(jax.jit(lambda *given: walk(RUNS[name], *given))(*inputs(name, dtype)))


def run_disturbed(name, dtype):
    """The same for inputs and, where that may be, state that are off by rounding."""
    with jax.enable_x64(dtype == "float64"):
        walked = jax.jit(lambda *given: walk(RUNS[name], *given))
        shares = [(1, 0), (1, 0), *[(0, 1), (1, 1)] * RUNS[name].in_state]
        draws = [
            (jax.random.key(seed), *jnp.array(share, dtype)) for seed, share in enumerate(shares)
        ]
        return [flat(walked(*inputs(name, dtype), draw)) for draw in draws]


def leaf_slices(name):
    """Where each leaf lies in a row, by its name."""
    shapes = {k: shape for k, shape in sorted(RUNS[name].shapes.items()) if shape is not None}
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
    starts = [0, *ends[:-1]]
    return {k: slice(*ends) for k, *ends in zip(shapes, starts, ends, strict=True)}


def deviation(name, found, expected):
    """Largest difference over largest entry, [steps, leaves]; infinite beside a zero."""

    def of_leaf(part):
        size = np.abs(expected[:, part]).max(1)
        difference = np.abs(found[:, part] - expected[:, part]).max(1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(difference == 0, 0, difference / size)

    return np.stack([of_leaf(part) for part in leaf_slices(name).values()], axis=1)


def read(path):
    """(updates, sensitivity) by name and dtype."""
    arrays = np.load(path)
    names = [name for name in arrays.files if not name.endswith(SENSITIVITY)]
    return {tuple(name.split("/")): (arrays[name], arrays[name + SENSITIVITY]) for name in names}


def write_disturbed(path, names):
    """What `record` asks of a process that compiles without optimizations."""
    keys = [(name, dtype) for name in names for dtype in dtypes(name)]
    runs = {"/".join(key): np.stack([run(*key), *run_disturbed(*key)]) for key in keys}
    np.savez(path, **runs)


def record(path, names):
    """Runs what is named, here and with disturbances, and puts it into the file."""
    names = names or list(RUNS)
    known = read(path) if path.exists() else {}
    kept = {key: value for key, value in known.items() if key[0] in RUNS and key[0] not in names}
    for key in [(name, dtype) for name in names for dtype in dtypes(name)]:
        kept[key] = run(*key), None
        print(*key, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        other = pathlib.Path(folder) / "disturbed.npz"
        code = (
            "import conftest, sys, trajectories as t; t.write_disturbed(sys.argv[1], sys.argv[2:])"
        )
        here = pathlib.Path(__file__).parent
        command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(here)!r}); {code}"]
        subprocess.run([*command, str(other), *names], check=True)
        for name, found in np.load(other).items():
            key = tuple(name.split("/"))
            expected, _ = kept[key]
            deviations = [deviation(key[0], x, expected) for x in found]
            kept[key] = expected, np.max(deviations, axis=0).astype(np.float32)
    arrays = {}
    for key, (updates, sensitivity) in sorted(kept.items()):
        arrays["/".join(key)], arrays["/".join(key) + SENSITIVITY] = updates, sensitivity
    np.savez_compressed(path, **arrays)


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] != "record" or set(sys.argv[3:]) - set(RUNS):
        sys.exit(__doc__)
    record(pathlib.Path(sys.argv[2]), sys.argv[3:])
