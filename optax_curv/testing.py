"""Dense oracles for tests with small models: the matrices that curvature methods approximate.

All flatten the parameters in `jax.tree.leaves` order, n numbers, compute in their dtype (float64
under ``jax.enable_x64``), and cost O(n²) memory.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike, DTypeLike

from optax_curv.linalg import _lapack as lapack
from optax_curv.objective import Objective
from optax_curv.typing import Number, Tree


def _of_flat(function: Callable, params: Tree) -> tuple[Callable, jax.Array]:
    """The function as one of the flat parameters, and these."""
    flat, unravel = ravel_pytree(params)
    return (lambda vector: function(unravel(vector))), flat


def _flat_jacobian(
    objective: Objective, params: Tree, inputs: Tree
) -> tuple[jax.Array, jax.Array, int]:
    """The outputs as rows [R, O], their Jacobian [R, O, n], and how many axes the rows have."""
    predict, flat = _of_flat(lambda p: objective.predict_fn(p, inputs), params)
    outputs = predict(flat)
    rows = outputs.reshape(-1, outputs.shape[-1])
    return rows, jax.jacobian(predict)(flat).reshape(*rows.shape, flat.size), outputs.ndim - 1


@functools.partial(jax.jit, static_argnums=0)
def per_example_gradients(
    loss_fn: Callable, params: Tree, inputs: Tree, targets: Tree
) -> jax.Array:
    """Computes the gradient of every example's own loss, one a row.

    Args:
      loss_fn: ``loss_fn(params, inputs, targets)``, a mean over examples; it is called with batches
        of one.
      params: the parameters.
      inputs: array or tree with a leading axis N.
      targets: array or tree with a leading axis N.

    Returns:
      The rows g_n, [N, n]; their mean is the gradient of the batch.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_curv import testing
      >>> loss = lambda w, x, y: jnp.mean(0.5 * (x @ w - y) ** 2)
      >>> x, y = jnp.eye(2), jnp.array([1.0, 2.0])
      >>> testing.per_example_gradients(loss, jnp.zeros(2), x, y)
      Array([[-1., -0.],
             [-0., -2.]], dtype=float32)
    """

    def gradient(x, y):
        x, y = jax.tree.map(lambda leaf: leaf[None], (x, y))
        return ravel_pytree(jax.grad(loss_fn)(params, x, y))[0]

    return jax.vmap(gradient)(inputs, targets)


@functools.partial(jax.jit, static_argnums=0)
def dense_hessian(loss_fn: Callable, params: Tree, *args: Any) -> jax.Array:
    """Computes the Hessian of ``loss_fn(params, *args)`` in the flat parameters.

    Args:
      loss_fn: ``loss_fn(params, *args)``, a scalar.
      params: the parameters.
      *args: further arguments.

    Returns:
      An array [n, n].

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_curv import testing
      >>> params = {"a": jnp.float32(1), "b": jnp.float32(3)}
      >>> testing.dense_hessian(lambda p: p["a"] ** 2 * p["b"], params)
      Array([[6., 2.],
             [2., 0.]], dtype=float32)
    """
    loss, flat = _of_flat(lambda p: loss_fn(p, *args), params)
    return jax.hessian(loss)(flat)


@jax.jit
def dense_gauss_newton(objective: Objective, params: Tree, inputs: Tree, targets: Any) -> jax.Array:
    """Computes the Gauss-Newton matrix Σ_r J_rᵀ H_r J_r / R of an objective.

    H_r is the `jax.hessian` of its likelihood's `loss` in row r of the outputs.

    Args:
      objective: an `optax_curv.Objective`; its regularizer does not enter.
      params: the parameters.
      inputs: the inputs of the batch.
      targets: its targets.

    Returns:
      The symmetric matrix, [n, n].

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_curv
      >>> from optax_curv import testing
      >>> objective = optax_curv.Objective(lambda w, x: x @ w, "normal")
      >>> x = jnp.diag(jnp.array([1.0, 2.0]))
      >>> testing.dense_gauss_newton(objective, jnp.zeros((2, 1)), x, jnp.ones((2, 1)))
      Array([[0.5, 0. ],
             [0. , 2. ]], dtype=float32)
    """
    outputs, jacobian, leading = _flat_jacobian(objective, params, inputs)
    targets = jnp.reshape(targets, (len(outputs), *jnp.shape(targets)[leading:]))
    hessians = jax.vmap(jax.hessian(objective.likelihood.loss))(outputs, targets)
    total = jnp.einsum("rin,rij,rjm->nm", jacobian, hessians, jacobian, precision="highest")
    return total / len(outputs)


@functools.partial(jax.jit, static_argnames="kind")
def dense_fisher(
    objective: Objective,
    params: Tree,
    inputs: Tree,
    targets: Any = None,
    kind: Literal["exact", "empirical"] = "exact",
) -> jax.Array:
    """Computes the Fisher matrix of an objective.

    - "exact": Σ_r J_rᵀ B_r B_rᵀ J_r / R, with B_r the likelihood's `hessian_sqrt`: the expectation
      over targets drawn from the model, on the scale of the mean loss; `dense_gauss_newton` where
      B_r B_rᵀ is the Hessian.
    - "empirical": Σ_n g_n g_nᵀ / N, with g_n the gradient of example n's own loss.

    Args:
      objective: an `optax_curv.Objective`; its regularizer does not enter.
      params: the parameters.
      inputs: the inputs of the batch.
      targets: its targets; only "empirical" needs them.
      kind: "exact" or "empirical".

    Returns:
      The positive semi-definite matrix, [n, n].

    Raises:
      ValueError: for another `kind`, or "empirical" without targets.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_curv
      >>> from optax_curv import testing
      >>> objective = optax_curv.Objective(lambda w, x: x @ w, "bernoulli")
      >>> fisher = testing.dense_fisher(objective, jnp.zeros((1, 1)), jnp.full((2, 1), 2.0))
      >>> float(fisher[0, 0])  # x² p (1 − p)
      1.0
    """
    if kind == "exact":
        outputs, jacobian, _ = _flat_jacobian(objective, params, inputs)
        columns = objective.likelihood.hessian_sqrt(outputs)
        rows = jnp.einsum("cri,rin->crn", columns, jacobian, precision="highest").reshape(
            -1, jacobian.shape[-1]
        )
        return jnp.matmul(rows.T, rows, precision="highest") / len(outputs)
    if kind != "empirical":
        raise ValueError(f"dense_fisher: unknown {kind=}; expected 'exact' or 'empirical'.")
    if targets is None:
        raise ValueError("dense_fisher: kind='empirical' needs targets, got None.")

    def loss(p, x, y):
        return objective.loss_of_outputs(objective.predict_fn(p, x), y)

    gradients = per_example_gradients(loss, params, inputs, targets)
    return jnp.matmul(gradients.T, gradients, precision="highest") / len(gradients)


@functools.partial(jax.jit, static_argnames="centered")
def dense_covariance(branches: Tree, centered: bool = True) -> jax.Array:
    """Computes the covariance of K samples that branch methods take.

    Args:
      branches: an array [K, D], or a tree whose leaves have a leading axis K.
      centered: whether the mean is removed; divides by max(1, K − 1), else by max(1, K).

    Returns:
      The covariance, [D, D].

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_curv import testing
      >>> testing.dense_covariance(jnp.array([[1.0, 0.0], [3.0, 0.0]]))
      Array([[2., 0.],
             [0., 0.]], dtype=float32)
    """
    rows = jax.vmap(lambda row: ravel_pytree(row)[0])(branches)
    if centered:
        rows = rows - jnp.sum(rows, 0) / max(1, len(rows))
    return jnp.matmul(rows.T, rows, precision="highest") / max(1, len(rows) - centered)


@jax.jit
def matrix_with_spectrum(key: jax.Array, eigenvalues: ArrayLike) -> jax.Array:
    """Draws a matrix U diag(eigenvalues) Uᵀ, with U a random rotation.

    Args:
      key: PRNG key.
      eigenvalues: the spectrum, [n].

    Returns:
      The exactly symmetric matrix, [n, n], in the dtype of `eigenvalues`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from optax_curv import testing
      >>> matrix = testing.matrix_with_spectrum(jax.random.key(0), jnp.array([1.0, 2.0, 4.0]))
      >>> jnp.round(jnp.linalg.eigvalsh(matrix), 4)
      Array([1., 2., 4.], dtype=float32)
    """
    eigenvalues = jnp.asarray(eigenvalues)
    basis = lapack.qr(jax.random.normal(key, (eigenvalues.size,) * 2, eigenvalues.dtype))[0]
    matrix = jnp.matmul(basis * eigenvalues, basis.T, precision="highest")
    return (matrix + matrix.T) / 2


@functools.partial(jax.jit, static_argnames=("n", "dtype"))
def random_spd(
    key: jax.Array, n: int, condition: Number = 10.0, *, dtype: DTypeLike | None = None
) -> jax.Array:
    """Draws a symmetric positive definite matrix with eigenvalues from 1 / condition to 1.

    The eigenvalues are evenly spaced in the logarithm.

    Args:
      key: PRNG key.
      n: size of the matrix.
      condition: the largest eigenvalue over the smallest.
      dtype: dtype of the matrix; None: JAX's default float.

    Returns:
      The matrix, [n, n].

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from optax_curv import testing
      >>> matrix = testing.random_spd(jax.random.key(0), 3, 100.0)
      >>> round(float(jnp.linalg.cond(matrix)))
      100
    """
    return matrix_with_spectrum(
        key, jnp.logspace(-jnp.log10(jnp.asarray(condition, dtype)), 0, n, dtype=dtype)
    )


def check_holomorphic(
    fn: Callable, params: Tree, *batch: Tree, tolerance: float = 1e-3, seed: int = 0
) -> None:
    """Tests the promise `jacobian_rows(fn, holomorphic=True)` makes, along one random direction.

    A function is holomorphic where its derivative along i v is i times that along v. One direction
    finds a function that is not with probability one; functions that are so only elsewhere pass.

    Args:
      fn: `fn(params, *batch)` -> complex outputs.
      params: the parameters at which it is tested, all of them complex.
      *batch: the other arguments.
      tolerance: how far the two may be apart, relative to their size.
      seed: of the direction.

    Raises:
      ValueError: if the function is not holomorphic there, or the parameters or the outputs are not
        complex.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_curv import testing
      >>> testing.check_holomorphic(lambda z: jnp.sin(z) ** 2, jnp.array([1.0 + 2.0j]))
      >>> testing.check_holomorphic(lambda z: z * jnp.conj(z), jnp.array([1.0 + 2.0j]))
      Traceback (most recent call last):
      ValueError: check_holomorphic: the function is not holomorphic: ...
    """
    leaves, treedef = jax.tree.flatten(params)
    if not leaves or not all(map(jnp.iscomplexobj, leaves)):
        kinds = sorted({str(jnp.result_type(x)) for x in leaves})
        raise ValueError(f"check_holomorphic: expected complex parameters, got {kinds}.")
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    v = treedef.unflatten([jax.random.normal(k, jnp.shape(x), x.dtype) for k, x in pairs])
    outputs, pushforward = jax.linearize(lambda p: fn(p, *batch), params)
    if not jnp.iscomplexobj(outputs):
        raise ValueError(f"check_holomorphic: expected complex outputs, got {outputs.dtype}.")
    along = 1j * pushforward(v)
    across = pushforward(jax.tree.map(lambda x: 1j * x, v))
    size = jnp.linalg.norm(jnp.ravel(along)) + jnp.linalg.norm(jnp.ravel(across))
    error = jnp.linalg.norm(jnp.ravel(along - across)) / jnp.where(size == 0, 1, size)
    if not error <= tolerance:
        raise ValueError(
            "check_holomorphic: the function is not holomorphic: its derivatives along v and i v "
            f"disagree by {float(error):.3g} of their size. Leave holomorphic=True out of "
            "jacobian_rows."
        )
