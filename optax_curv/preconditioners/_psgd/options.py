"""The options of Kronecker PSGD, what it refuses, and the layout of a tree."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_curv.preconditioners._psgd import geometries as kron_geometries
from optax_curv.preconditioners._psgd import kron_layout
from optax_curv.preconditioners._stacks.owners import require_sharding
from optax_curv.preconditioners._transformation import contracts
from optax_curv.preconditioners._transformation.contracts import is_python_number, structural

METHOD = "scale_by_kron_psgd"


class Options(NamedTuple):
    """The arguments of `scale_by_kron_psgd`, which documents them."""

    precond_lr: Any
    geometry: str
    criterion: str
    b1: Any
    whiten: str
    update_probability: Any
    init_scale: Any
    damping: Any
    lipschitz_decay: Any
    max_dense_dim: int
    max_skew: float
    precond_dtype: Any
    stacked: Any
    block_size: int | None
    factor_sharding: Any
    eps: Any
    key: Any

    @property
    def always_updates(self) -> bool:
        """Whether the factors move at every step, whatever the count."""
        return is_python_number(self.update_probability, 1)

    @property
    def caches(self) -> bool:
        """Whether P is kept for the steps on which Q does not move; for "quad4p" it is the factor itself."""
        return self.geometry != "quad4p" and not self.always_updates


def check_options(options: Options):
    """Refuses what cannot be, by name."""
    contracts.require_choice(METHOD, "geometry", options.geometry, kron_geometries.GEOMETRIES)
    check_fit(METHOD, options)
    contracts.require_numbers(
        METHOD, max_dense_dim=options.max_dense_dim, block_size=options.block_size, above=0
    )
    contracts.require_numbers(METHOD, max_skew=options.max_skew, eps=options.eps, at_least=0)
    require_sharding(METHOD, options.factor_sharding)
    for name in ("block_size", "stacked"):
        structural(METHOD, name, getattr(options, name))
    if options.criterion == "newton" and options.geometry == "right_triangular":
        raise ValueError(
            f"{METHOD}: criterion='newton' fits P to Hessian-vector products, which geometry='right_triangular' does "
            "not; use another geometry."
        )


def check_fit(method: str, options):
    """Refuses what neither Kronecker nor low-rank PSGD can fit."""
    contracts.require_choice(method, "criterion", options.criterion, ("whitening", "newton"))
    contracts.require_choice(method, "whiten", options.whiten, ("gradient", "momentum"))
    contracts.require_numbers(
        method, precond_lr=options.precond_lr, init_scale=options.init_scale, above=0
    )
    for name in ("b1", "update_probability", "lipschitz_decay"):
        contracts.require_numbers(method, **{name: getattr(options, name)}, at_least=0, at_most=1)
    contracts.require_numbers(method, damping=options.damping, at_least=0)
    if options.criterion == "newton" and options.whiten == "momentum":
        raise ValueError(
            f"{method}: criterion='newton' fits P to Hessian-vector products; use whiten='gradient'."
        )


def _pieces(options, tree):
    """The pieces of each leaf; the original's rule knows matrices only."""
    leaves = zip(
        jax.tree.leaves(tree), kron_layout.stack_ndims(METHOD, options.stacked, tree), strict=True
    )
    return [
        kron_layout.pieces_of(position, leaf, stack, options.block_size, options.precond_dtype)
        if options.geometry != "right_triangular" or len(leaf.shape) - stack == 2
        else []
        for position, (leaf, stack) in enumerate(leaves)
    ]


def layout_of_params(options: Options, params) -> kron_layout.Layout:
    """The layout that `init` decides on."""

    def with_kinds(piece):
        limit, skew = (
            structural(METHOD, name, getattr(options, name))
            for name in ("max_dense_dim", "max_skew")
        )
        size = math.prod(piece.shape)
        diagonal = [bool(d == 1 or d > limit or d * d > skew * size) for d in piece.shape]
        if options.geometry == "right_triangular":
            diagonal = [False, False]
        return piece._replace(diagonal=tuple(diagonal))

    by_leaf = [[with_kinds(piece) for piece in pieces] for pieces in _pieces(options, params)]
    return kron_layout.Layout(jax.tree.structure(params), by_leaf)


def layout_of_state(options: Options, grads, state) -> kron_layout.Layout:
    """The gradients' layout with axes dense or diagonal as the state's factors are; refuses those of other shapes."""
    treedef = jax.tree.structure(grads)
    try:
        factors = treedef.flatten_up_to(state.factors)
    except ValueError as error:
        raise ValueError(
            f"{METHOD}: the gradients' tree differs from that of the state's factors, made by init: got {treedef}; "
            f"{error}"
        ) from None

    def with_kinds(path, pieces, factors):
        given = [
            [jnp.shape(q) for q in of_piece] for of_piece in kron_layout.blocks_of(pieces, factors)
        ]
        known = [
            p._replace(diagonal=tuple(len(shape) == len(p.stack) + 1 for shape in shapes))
            for p, shapes in zip(pieces, given, strict=False)
            if len(shapes) == len(p.shape)
        ]
        if [[q.shape for q in p.factors] for p in known] != given or len(known) != len(pieces):
            raise ValueError(
                f"{METHOD}: the gradient at {jax.tree_util.keystr(path) or 'the root'} needs factors for shapes "
                f"{[(*p.stack, *p.shape) for p in pieces]}, the state has factors of shapes {given}; init the state "
                "with parameters of the gradients' shapes."
            )
        return known

    paths = [path for path, _ in jax.tree.leaves_with_path(grads)]
    by_leaf = [
        with_kinds(*of_leaf)
        for of_leaf in zip(paths, _pieces(options, grads), factors, strict=True)
    ]
    return kron_layout.Layout(treedef, by_leaf)


def check_extras(options: Options, grads, state, params, probe, hvp):
    """Refuses missing extra arguments and trees that differ from the gradients'."""
    if params is not None:
        contracts.require_same_leaves(METHOD, "the gradients", grads, "the parameters", params)
    require_probe(METHOD, options.criterion, probe, hvp)
    for name, tree in (("probe", probe), ("hvp", hvp)):
        if tree is not None:
            contracts.require_same_leaves(METHOD, name, tree, "the gradients", grads)
    if state.momentum is not None:
        contracts.require_same_leaves(
            METHOD, "the gradients", grads, "the state's momentum", state.momentum
        )


def require_probe(method: str, criterion: str, probe, hvp):
    """Refuses one without the other, and "newton" without both."""
    if (probe is None) != (hvp is None) or (criterion == "newton" and hvp is None):
        given = f"probe={'missing' if probe is None else 'given'}, hvp={'missing' if hvp is None else 'given'}"
        raise ValueError(
            f"{method}: criterion={criterion!r} got {given}; pass both, as hessian_probe(loss_fn, params, *batch, "
            "key=key) returns them: update(grads, state, params, probe=probe, hvp=hvp)."
        )
