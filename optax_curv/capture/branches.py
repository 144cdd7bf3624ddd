"""Branches in parameter space: per-example gradients, Jacobian rows, weighted residuals."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from optax_curv.typing import Number, Tree


def per_example_grads(loss_fn: Callable, *, chunk_size: int | None = None) -> Callable:
    """Makes a function that returns the gradient of every example's own loss, as branches.

    Their mean is the batch's gradient; `scale_by_branch_fisher(centered=False)` takes the empirical
    Fisher Σ_n g_n g_nᵀ / N from them.

    Args:
      loss_fn: `loss_fn(params, *batch)`, a scalar that is a mean over examples; it is called with
        batches of one.
      chunk_size: examples differentiated at once, which bounds the memory; None: all.

    Returns:
      f(params, *batch) -> a tree like the parameters with a leading axis N, that of the arrays in
      `batch`.

    Raises:
      ValueError: by f, where the batch has no example or its leading axes differ.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> loss = lambda w, x, y: 0.5 * jnp.mean((x @ w - y) ** 2)
      >>> x, y = jnp.eye(2), jnp.array([1.0, 2.0])
      >>> rows = optax_curv.per_example_grads(loss)(jnp.zeros(2), x, y)
      >>> print(-rows)
      [[1. 0.]
       [0. 2.]]
    """
    return lambda params, *batch: _map_examples(
        "per_example_grads", lambda *one: jax.grad(loss_fn)(params, *one), batch, chunk_size
    )


def jacobian_rows(fn: Callable, *, chunk_size: int | None = None) -> Callable:
    """Makes a function that returns the Jacobian of a network's outputs, as branches.

    There is one row for each output of an example, by reverse mode.
    `scale_by_branch_fisher(centered=False)` divides by the number of rows K = N O:
    for the Gauss-Newton matrix Σ_n J_nᵀ J_n / N of a sum over O outputs multiply rows by √O.

    Args:
      fn: `fn(params, *batch)` -> outputs [N, ...]; called with batches of one. Complex outputs,
        which must be holomorphic in complex parameters, have complex rows.
      chunk_size: examples differentiated at once, which bounds the memory; None: all.

    Returns:
      f(params, *batch) -> a tree like the parameters with a leading axis K = N O, example by
      example.

    Raises:
      ValueError: by f, where the batch has no example or its leading axes differ.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> predict = lambda w, x: jnp.sin(x @ w)
      >>> print(optax_curv.jacobian_rows(predict)(jnp.zeros(2), jnp.eye(2)))
      [[1. 0.]
       [0. 1.]]
    """
    return lambda params, *batch: _jacobian("jacobian_rows", fn, params, batch, chunk_size)[1]


def residual_rows(
    *residual_fns: Callable, weights: Sequence[Number] | None = None, chunk_size: int | None = None
) -> Callable:
    r"""Makes a function that returns loss, gradient and rows of least squares over several blocks.

    Blocks are, for instance, the interior and the boundary of a PDE.

    .. math::
      L = \frac12 \sum_b w_b \frac{1}{N_b} \sum_{n \in b} \|r_{bn}\|^2

    The rows are those of the residuals times √(w_b K / N_b), K the number of all rows, so that
    `scale_by_branch_fisher(centered=False)` takes the Gauss-Newton matrix of L from them. One pass
    of reverse mode gives all.

    Args:
      *residual_fns: one a block: `fn(params, batch)` -> residuals [N_b, ...], real; called with
        batches of one.
      weights: w_b, one number a block; None: 1.
      chunk_size: examples differentiated at once, which bounds the memory; None: all.

    Returns:
      f(params, *batches) -> (L, its gradient, rows), where each block's batch has its own leading
      axis.

    Raises:
      ValueError: where the number of weights or batches is not that of the blocks, or a batch is
        empty.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_curv
      >>> fit, pin = (lambda w, x: x[:, 0] * w - x[:, 1]), (lambda w, x: w - x)
      >>> points, ends = jnp.array([[1.0, 2.0], [2.0, 4.0]]), jnp.array([2.0])
      >>> take = optax_curv.residual_rows(fit, pin, weights=(1.0, 10.0))
      >>> loss, grad, rows = take(jnp.float32(0), points, ends)
      >>> tx = optax_curv.scale_by_branch_fisher(1e-6, centered=False, solver="auto")
      >>> step, _ = tx.update({"w": grad}, tx.init({"w": grad}), branches={"w": rows})
      >>> print(-step["w"].round(3))  # linear least squares in one step
      2.0
    """
    weights = (1.0,) * len(residual_fns) if weights is None else tuple(weights)
    if not residual_fns or len(weights) != len(residual_fns):
        raise ValueError(
            f"residual_rows: expected one weight a block, got {len(weights)} for "
            f"{len(residual_fns)}."
        )

    def rows(params, *batches):
        if len(batches) != len(residual_fns):
            raise ValueError(
                f"residual_rows: expected one batch a block, got {len(batches)} batches for "
                f"{len(residual_fns)} blocks."
            )
        found = [
            _jacobian("residual_rows", fn, params, (batch,), chunk_size)
            for fn, batch in zip(residual_fns, batches, strict=True)
        ]
        residuals, jacobians = zip(*found, strict=True)
        total = sum(r.size for r in residuals)
        scales = [jnp.sqrt(w * total / len(r)) for w, r in zip(weights, residuals, strict=True)]

        def scaled(blocks):
            return jnp.concatenate(
                [x * s.astype(x.dtype) for x, s in zip(blocks, scales, strict=True)]
            )

        residual = scaled(map(jnp.ravel, residuals))
        branches = jax.tree.map(lambda *blocks: scaled(blocks), *jacobians)
        grads = jax.tree.map(
            lambda j: (jnp.tensordot(residual, j, 1, precision="highest") / total).astype(j.dtype),
            branches,
        )
        return jnp.sum(residual**2) / (2 * total), grads, branches

    return rows


def _jacobian(
    method: str, fn: Callable, params: Tree, batch: tuple, chunk_size: int | None
) -> tuple[jax.Array, Tree]:
    """Outputs [N, O] of the examples, and the tree of their gradients [N O, *shape]."""

    def of_one(*one):
        outputs, pullback = jax.vjp(lambda p: jnp.ravel(fn(p, *one)), params)
        one_hot = jnp.eye(outputs.size, dtype=outputs.dtype)
        rows = jax.vmap(pullback)(one_hot)[0]
        if not jnp.iscomplexobj(outputs):
            return outputs, rows
        # A real parameter takes the real part of what is pulled back: from 1 the real part of J,
        # from -i that of -iJ, which is J's imaginary part.
        imaginary = jax.vmap(pullback)(-1j * one_hot)[0]
        return outputs, jax.tree.map(
            lambda a, b: a if jnp.iscomplexobj(a) else a + 1j * b, rows, imaginary
        )

    outputs, rows = _map_examples(method, of_one, batch, chunk_size)
    return outputs, jax.tree.map(lambda row, leaf: row.reshape(-1, *jnp.shape(leaf)), rows, params)


def _map_examples(method: str, function: Callable, batch: tuple, chunk_size: int | None) -> Tree:
    """Calls `function` on every example as a batch of one, and stacks the results."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]
    counts = {shape[:1] for shape in shapes}
    if len(counts) != 1 or counts <= {(), (0,)}:
        raise ValueError(
            f"{method}: expected arrays with one leading axis of examples, not empty, got {shapes}."
        )

    def one(example):
        return function(*jax.tree.map(lambda leaf: leaf[None], example))

    batch = jax.tree.map(jnp.asarray, batch)
    return (
        jax.vmap(one)(batch)
        if chunk_size is None
        else jax.lax.map(one, batch, batch_size=chunk_size)
    )
