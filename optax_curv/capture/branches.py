"""Branches in parameter space: per-example gradients, Jacobian rows, weighted residuals."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_curv.capture._graph.holomorphy import is_holomorphic
from optax_curv.curvature import SplitRows
from optax_curv.rows import LazyRows
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
      ValueError: by f, where the batch has no example, its leading axes differ, or the loss is not
        one real number.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> loss = lambda w, x, y: 0.5 * jnp.mean((x @ w - y) ** 2)
      >>> x, y = jnp.eye(2), jnp.array([1.0, 2.0])
      >>> rows = optax_curv.per_example_grads(loss)(jnp.zeros(2), x, y)
      >>> print(-rows)
      [[1. 0.]
       [0. 2.]]
    """
    method = "per_example_grads"

    def rows(params, *batch):
        _require_batch(method, batch)
        loss = _outputs_of(method, loss_fn, params, batch, 1)
        if loss.shape or not jnp.issubdtype(loss.dtype, jnp.floating):
            raise ValueError(
                f"{method}: expected a loss that is one real number, got {loss.dtype}"
                f"{list(loss.shape)} for a batch of one example; take its mean, and make a loss of "
                "one example into one of a batch by jax.vmap(loss, (None, 0))."
            )
        return _map_examples(lambda *one: jax.grad(loss_fn)(params, *one), batch, chunk_size)

    return rows


def jacobian_rows(
    fn: Callable, *, holomorphic: bool = False, chunk_size: int | None = None
) -> Callable:
    """Makes a function that returns the Jacobian of a network's outputs, as branches.

    There is one row for each output of an example, by reverse mode.
    `scale_by_branch_fisher(centered=False)` divides by the number of rows K = N O: for the
    Gauss-Newton matrix Σ_n J_nᵀ J_n / N of a sum over O outputs multiply rows by √O.

    Complex outputs have complex rows. In a complex leaf z of the parameters a function ψ has two
    derivatives, along the real and along the imaginary part, and its rows are their
    `optax_curv.SplitRows`. Where ψ is holomorphic the second is i times the first, which then
    stands alone as a complex row; whether it is so is read off the function's program, and can be
    promised by `holomorphic=True`.

    Args:
      fn: `fn(params, *batch)` -> outputs [N, ...], or one number for a batch of one; called with
        batches of one.
      holomorphic: whether outputs are promised to depend holomorphically on the parameters, which
        then have to be complex. The promise is not checked here, but by
        `optax_curv.testing.check_holomorphic`.
      chunk_size: examples differentiated at once, which bounds the memory; None: all.

    Returns:
      f(params, *batch) -> a tree like the parameters with a leading axis K = N O, example by
      example, and with `SplitRows` in the place of some complex leaves.

    Raises:
      ValueError: for `holomorphic` that is no bool; by f, where the batch has no example, its
        leading axes differ, the outputs are no array of floating-point numbers or do not begin with
        N, or `holomorphic=True` is said of real parameters or outputs.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> predict = lambda w, x: jnp.sin(x @ w)
      >>> print(optax_curv.jacobian_rows(predict)(jnp.zeros(2), jnp.eye(2)))
      [[1. 0.]
       [0. 1.]]
    """
    method = "jacobian_rows"
    if not isinstance(holomorphic, bool):
        raise ValueError(
            f"{method}: expected holomorphic to be True or False, got {holomorphic=!r}."
        )

    def rows(params, *batch):
        outputs = _require_outputs(method, fn, params, batch)
        leaves = jax.tree.leaves(params)
        if holomorphic and not all(map(jnp.iscomplexobj, (outputs, *leaves))):
            raise ValueError(
                f"{method}: holomorphic=True promises complex outputs of complex parameters, got "
                f"outputs of {outputs.dtype} and parameters of "
                f"{sorted({str(jnp.result_type(x)) for x in leaves})}; leave it out."
            )
        return _jacobian(fn, params, batch, chunk_size, holomorphic)[1]

    return rows


def lazy_rows(fn: Callable, params: Tree, *batch: Any, chunk_size: int | None = None) -> LazyRows:
    """Makes rows that are never stored, for networks whose K rows of n numbers fit no memory.

    They stand for what `jacobian_rows(fn)(params, *batch)` returns, wherever rows are accepted. A
    solve makes the rows again, chunk by chunk, for the kernel of K × K numbers, and its direction
    by one pull-back; the memory is that of the kernel and of two chunks. They are taken over real
    coordinates, so that `fn` need not be holomorphic in complex parameters.

    Args:
      fn: `fn(params, *batch)` -> outputs [N, ...], real or complex, or one number for a batch of
        one; called with batches of one. Use one function for all steps: a new one is compiled anew.
      params: the parameters, at which the rows are taken.
      *batch: arrays with one leading axis N, which may be sharded over the devices of a mesh.
      chunk_size: examples differentiated at once; None: as many as make some 2²⁴ numbers.

    Returns:
      A pytree that `scale_by_branch_fisher`, `branch_fisher` and `levenberg_marquardt` take as
      `branches`, with one row for each output of an example.

    Raises:
      ValueError: where the batch has no example, its leading axes differ, the outputs are no array
        of floating-point numbers or do not begin with N, or `chunk_size` is not positive.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_curv
      >>> predict = lambda w, x: jnp.sin(x @ w)
      >>> rows = optax_curv.lazy_rows(predict, jnp.zeros(2), jnp.eye(2))
      >>> tx = optax_curv.scale_by_branch_fisher(0.5, solver="auto", centered=False)
      >>> direction, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), branches=rows)
      >>> print(direction)  # the metric is half of the identity
      [1. 1.]
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"lazy_rows: expected a positive chunk_size, got {chunk_size=}.")
    _require_outputs("lazy_rows", fn, params, batch)
    return LazyRows(fn, params, jax.tree.map(jnp.asarray, batch), chunk_size)


def residual_rows(
    *residual_fns: Callable, weights: Sequence[Number] | None = None, chunk_size: int | None = None
) -> Callable:
    r"""Makes a function that returns loss, gradient and rows of least squares over several blocks.

    Blocks are, for instance, the interior and the boundary of a PDE.

    .. math::
      L = \frac{1}{2} \sum_b w_b \frac{1}{N_b} \sum_{n \in b} \|r_{bn}\|^2

    The rows are those of the residuals times √(w_b K / N_b), K the number of all rows, so that
    `scale_by_branch_fisher(centered=False)` takes the Gauss-Newton matrix of L from them. One pass
    of reverse mode gives all.

    Args:
      *residual_fns: one a block: `fn(params, batch)` -> residuals [N_b, ...], or one number for a
        batch of one; called with batches of one. A complex residual counts as the two real ones of
        its real and its imaginary part, each of which has a row.
      weights: w_b, one number a block; None: 1.
      chunk_size: examples differentiated at once, which bounds the memory; None: all.

    Returns:
      f(params, *batches) -> (L, its gradient, rows), where each block's batch has its own leading
      axis. The gradient of a complex leaf is the steepest ascent ∂L/∂Re + i ∂L/∂Im, the conjugate
      of `jax.grad`'s, and its rows are `SplitRows`.

    Raises:
      ValueError: where the number of weights or batches is not that of the blocks, a batch is
        empty, or residuals are no array of floating-point numbers or do not begin with N_b.

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
        pairs = list(zip(residual_fns, batches, strict=True))
        for fn, batch in pairs:
            _require_outputs("residual_rows", fn, params, (batch,))
        found = [_jacobian(_in_real_parts(fn), params, (b,), chunk_size) for fn, b in pairs]
        residuals, jacobians = zip(*found, strict=True)
        total = sum(r.size for r in residuals)
        scales = [jnp.sqrt(w * total / len(r)) for w, r in zip(weights, residuals, strict=True)]

        def scaled(blocks):
            return jnp.concatenate(
                [x * s.astype(x.dtype) for x, s in zip(blocks, scales, strict=True)]
            )

        residual = scaled(map(jnp.ravel, residuals))
        branches = jax.tree.map(lambda *blocks: scaled(blocks), *jacobians)

        def ascent(rows):
            if isinstance(rows, SplitRows):
                return ascent(rows.real) + 1j * ascent(rows.imag)
            product = jnp.tensordot(residual, rows, 1, precision="highest")
            return (product / total).astype(rows.dtype)

        grads = jax.tree.map(ascent, branches, is_leaf=lambda x: isinstance(x, SplitRows))
        return jnp.sum(residual**2) / (2 * total), grads, branches

    return rows


def _in_real_parts(fn: Callable) -> Callable:
    """Makes a function whose outputs are those of `fn`, or their real and imaginary parts."""

    def parts(params, batch):
        outputs = fn(params, batch)
        if not jnp.iscomplexobj(outputs):
            return outputs
        return jnp.stack([outputs.real, outputs.imag], -1)

    return parts


def _jacobian(
    fn: Callable, params: Tree, batch: tuple, chunk_size: int | None, holomorphic: bool = False
) -> tuple[jax.Array, Tree]:
    """Outputs [N, O] of the examples, and the tree of their rows [N O, *shape]."""
    if not holomorphic and any(map(jnp.iscomplexobj, jax.tree.leaves(params))):
        holomorphic = is_holomorphic(fn, params, *_examples(batch, 1))

    def of_one(*one):
        outputs, pullback = jax.vjp(lambda p: jnp.ravel(fn(p, *one)), params)
        one_hot = jnp.eye(outputs.size, dtype=outputs.dtype)
        of_real = jax.vmap(pullback)(one_hot)[0]
        if not jnp.iscomplexobj(outputs):
            return outputs, jax.tree.map(of_real_output, of_real)
        # The pull-back of a cotangent c is the derivative of Re(c ψ), for a complex leaf that along
        # its real part minus i times that along its imaginary part: from 1 that of Re ψ, and from
        # -i that of Im ψ.
        of_imaginary = jax.vmap(pullback)(-1j * one_hot)[0]
        return outputs, jax.tree.map(of_complex_output, of_real, of_imaginary)

    def of_real_output(a):
        return SplitRows(a.real, -a.imag) if jnp.iscomplexobj(a) else a

    def of_complex_output(a, b):
        if not jnp.iscomplexobj(a):
            return a + 1j * b
        return a if holomorphic else SplitRows(a.real + 1j * b.real, -a.imag - 1j * b.imag)

    outputs, rows = _map_examples(of_one, batch, chunk_size)
    leaves, treedef = jax.tree.flatten(params)

    def one_axis(entry, leaf):
        return jax.tree.map(lambda row: row.reshape(-1, *jnp.shape(leaf)), entry)

    pairs = zip(treedef.flatten_up_to(rows), leaves, strict=True)
    return outputs, treedef.unflatten([one_axis(*pair) for pair in pairs])


def _require_batch(method: str, batch: tuple):
    """Refuses arrays whose leading axes differ or are empty."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]
    counts = {shape[:1] for shape in shapes}
    if len(counts) != 1 or counts <= {(), (0,)}:
        raise ValueError(
            f"{method}: expected arrays with one leading axis of examples, not empty, got {shapes}."
        )


def _require_outputs(method: str, fn: Callable, params: Tree, batch: tuple) -> Any:
    """The outputs for a batch of one; refuses what does not begin with the number of examples."""
    _require_batch(method, batch)
    one = _outputs_of(method, fn, params, batch, 1)
    if not jnp.issubdtype(one.dtype, jnp.inexact):
        raise ValueError(
            f"{method}: expected outputs of floating-point or complex numbers, got {one.dtype}."
        )
    if not one.shape:
        return one
    advice = "a function of one example is made into one of a batch by jax.vmap(fn, (None, 0))"
    if one.shape[0] == 1:
        try:
            two = _outputs_of(method, fn, params, batch, 2)
        except (TypeError, ValueError, IndexError) as error:
            raise ValueError(
                f"{method}: the function fails for a batch of two examples, though not of one; "
                f"{advice}. It says: {error}"
            ) from error
        if two.shape == (2, *one.shape[1:]):
            return one
        got = f"{one.shape} for one example and {two.shape} for two"
    else:
        got = f"{one.shape} for one example"
    raise ValueError(
        f"{method}: expected outputs [N, ...] for a batch of N examples, got shape {got}; {advice}."
    )


def _outputs_of(method: str, fn: Callable, params: Tree, batch: tuple, count: int) -> Any:
    """The shape and dtype of the outputs for a batch of `count` examples."""
    outputs = jax.eval_shape(fn, params, *_examples(batch, count))
    if jax.tree.structure(outputs) != jax.tree.structure(0):
        raise ValueError(
            f"{method}: expected the function to return one array, got a tree, "
            f"{jax.tree.structure(outputs)}; join its parts with jnp.concatenate."
        )
    return outputs


def _examples(batch: tuple, count: int) -> Any:
    """The shapes and dtypes of a batch of `count` examples."""

    def struct(x):
        x = jax.typeof(jnp.asarray(x))
        return jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype)

    return jax.tree.map(struct, batch)


def _map_examples(function: Callable, batch: tuple, chunk_size: int | None) -> Tree:
    """Calls `function` on every example as a batch of one, and stacks the results."""

    def one(example):
        return function(*jax.tree.map(lambda leaf: leaf[None], example))

    batch = jax.tree.map(jnp.asarray, batch)
    return (
        jax.vmap(one)(batch)
        if chunk_size is None
        else jax.lax.map(one, batch, batch_size=chunk_size)
    )
