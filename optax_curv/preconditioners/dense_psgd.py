"""PSGD with one dense preconditioner for a small whole tree."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_curv.preconditioners import contracts
from optax_curv.preconditioners.contracts import static
from optax_curv.preconditioners.distribution import with_sharding_types
from optax_curv.preconditioners.kron_psgd import scale_by_kron_psgd


def on_flat_vector(method: str, tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """Lets `tx` see the tree, the probe and the Hessian-vector product as vectors [n], leaves in flattening order."""

    def dtype_of(tree):
        return jnp.result_type(jnp.float32, *[leaf.dtype for leaf in jax.tree.leaves(tree)])

    def size_of(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    def ravel(tree):
        leaves = [jnp.ravel(leaf).astype(dtype_of(tree)) for leaf in jax.tree.leaves(tree)]
        return jnp.concatenate(leaves) if size_of(tree) else jnp.zeros(1)

    def unravel(vector, like):
        leaves, treedef = jax.tree.flatten(like)
        ends = [0]
        for leaf in leaves:
            ends.append(ends[-1] + leaf.size)
        parts = [vector[start:end] for start, end in itertools.pairwise(ends)]
        return treedef.unflatten([p.reshape(x.shape).astype(x.dtype) for p, x in zip(parts, leaves, strict=True)])

    def init(params):
        contracts.require_float_leaves(method, params)
        # A tree without numbers counts as one: the state's structure must not depend on how many there are.
        vector: Any = jax.ShapeDtypeStruct((max(1, size_of(params)),), dtype_of(params))
        return tx.init(vector)

    def update(updates, state, params=None, *, probe=None, hvp=None, **extra_args):
        del extra_args
        for name, tree in (("params", params), ("probe", probe), ("hvp", hvp)):
            if tree is not None:
                contracts.require_same_leaves(method, name, tree, "the gradients", updates)
        flat = {name: ravel(tree) for name, tree in (("probe", probe), ("hvp", hvp)) if tree is not None}
        vector, state = tx.update(ravel(updates), state, **flat)
        return unravel(vector, updates), state

    return optax.GradientTransformationExtraArgs(init, with_sharding_types(update))


def scale_by_dense_psgd(
    precond_lr=0.1,
    *,
    geometry="q0.5eq1.5",
    criterion="whitening",
    b1=static(0.0),
    whiten="gradient",
    update_probability=static(1.0),
    init_scale=None,
    damping=1e-9,
    lipschitz_decay=0.9,
    precond_dtype="float32",
    key=0,
) -> optax.GradientTransformationExtraArgs:
    """Preconditions a small whole tree by one matrix P = QᵀQ of its n parameters, learned as in Kronecker PSGD.

    The tree is seen as one vector with one dense factor: memory n², time n³ a step. Nothing about P is assumed, so for
    "newton" with exact products it reaches |H|⁻¹, of an indefinite H too.

    Args:
      precond_lr: see `scale_by_kron_psgd`, as for all that follow.
      geometry: any but "right_triangular".
      criterion: see there.
      b1: see there.
      whiten: see there.
      update_probability: see there.
      init_scale: see there.
      damping: see there.
      lipschitz_decay: see there.
      precond_dtype: see there.
      key: see there.

    Returns:
      A `GradientTransformationExtraArgs` with `update(grads, state, params=None, *, probe=None, hvp=None)`. Its state
      is a `ScaleByKronPsgdState` whose `factors` are the tuple of one matrix [n, n].

    Raises:
      ValueError: as `scale_by_kron_psgd`; for geometry="right_triangular", which knows matrices only.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_curv
      >>> tx = optax_curv.scale_by_dense_psgd()
      >>> params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
      >>> state = tx.init(params)
      >>> [q.shape for q in state.factors]
      [(9, 9)]

    References:
      Li, *Stochastic Hessian fittings with Lie groups*, 2024, arXiv:2402.11858.
    """
    if geometry == "right_triangular":
        raise ValueError("scale_by_dense_psgd: geometry='right_triangular' knows matrices only; use another geometry.")
    kron = scale_by_kron_psgd(
        precond_lr,
        geometry=geometry,
        criterion=criterion,
        b1=b1,
        whiten=whiten,
        update_probability=update_probability,
        init_scale=init_scale,
        damping=damping,
        lipschitz_decay=lipschitz_decay,
        max_dense_dim=2**31,
        max_skew=float("inf"),
        precond_dtype=precond_dtype,
        key=key,
    )
    return on_flat_vector("scale_by_dense_psgd", kron)


def dense_psgd(
    learning_rate: optax.ScalarOrSchedule,
    b1=0.9,
    *,
    weight_decay=0.0,
    precond_lr=0.1,
    geometry="q0.5eq1.5",
    criterion="whitening",
    whiten="gradient",
    update_probability=static(1.0),
    init_scale=None,
    damping=1e-9,
    lipschitz_decay=0.9,
    precond_dtype="float32",
    key=0,
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_dense_psgd`, decoupled weight decay and a learning rate.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the momentum.
      weight_decay: decoupled from the preconditioner; update needs params.
      precond_lr: see `scale_by_kron_psgd`, as for all that follow.
      geometry: any but "right_triangular".
      criterion: see there.
      whiten: see there.
      update_probability: see there.
      init_scale: see there.
      damping: see there.
      lipschitz_decay: see there.
      precond_dtype: see there.
      key: see there.

    Returns:
      The chain, a `GradientTransformationExtraArgs`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_curv
      >>> tx = optax_curv.dense_psgd(0.1)
      >>> params = jnp.ones(3)
      >>> updates, state = jax.jit(tx.update)(jnp.full(3, 1e-5), tx.init(params), params)
      >>> print(updates.round(1))
      [-0.1 -0.1 -0.1]
    """
    return optax.chain(
        scale_by_dense_psgd(
            precond_lr,
            geometry=geometry,
            criterion=criterion,
            b1=b1,
            whiten=whiten,
            update_probability=update_probability,
            init_scale=init_scale,
            damping=damping,
            lipschitz_decay=lipschitz_decay,
            precond_dtype=precond_dtype,
            key=key,
        ),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
