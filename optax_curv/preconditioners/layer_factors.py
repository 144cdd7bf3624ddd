"""K-FAC's arithmetic for one layer, on plain arrays."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_curv.curvature import KroneckerFactors
from optax_curv.linalg import cholesky, cholesky_solve
from optax_curv.linalg._compiler import full_matmul
from optax_curv.linalg.factors import Dense, Diagonal, Factor
from optax_curv.preconditioners._layerwise.blocks import factor_damping
from optax_curv.preconditioners._layerwise.factors import is_silent
from optax_curv.preconditioners._transformation.numbers import require_choice, require_numbers
from optax_curv.typing import DAMPING_RULES, DampingRule, Number


def init_factors(in_dim: int, out_dim: int) -> KroneckerFactors:
    """Zero factors of a layer with `in_dim` inputs and `out_dim` outputs, before any batch.

    Args:
      in_dim: width of the layer's input; one more if a bias is to be the kernel's last row.
      out_dim: width of the layer's output.

    Returns:
      Factors [in_dim, in_dim] and [out_dim, out_dim] in JAX's default float type, count 0.

    Raises:
      ValueError: if a width is below 1.

    Examples:
      >>> import optax_curv
      >>> factors = optax_curv.init_factors(3, 2)
      >>> factors.input_factor.shape, factors.output_factor.shape, int(factors.count)
      ((3, 3), (2, 2), 0)
    """
    require_numbers("init_factors", in_dim=in_dim, out_dim=out_dim, at_least=1)
    return KroneckerFactors(
        jnp.zeros((in_dim, in_dim)), jnp.zeros((out_dim, out_dim)), jnp.int32(0)
    )


def update_factors(
    factors: KroneckerFactors, inputs: ArrayLike, output_grads: ArrayLike, decay: Number = 0.95
) -> KroneckerFactors:
    """Averages one batch into a layer's factors.

    A ← decay · A + (1 - decay) · Σ a aᵀ / N and G likewise with the output gradients g, without
    centring; the first batch replaces the zero factors, as in the original. `scale_by_kfac` weighs
    its first batches otherwise, so that none is heavier than the others.

    Args:
      factors: from `init_factors` or an earlier update.
      inputs: the layer's inputs [N, in_dim], one row an example.
      output_grads: gradients of each example's *own* loss with respect to the layer's output, [N,
        out_dim]; those of a mean loss times N.
      decay: weight of the old factors, limited to [0, 1].

    Returns:
      The new factors, with `count` one higher.

    Raises:
      ValueError: if a batch is empty or no matrix, if the two differ in rows, or if a width is not
        the factor's.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> factors = optax_curv.update_factors(
      ...     optax_curv.init_factors(2, 1), jnp.array([[1.0, 2.0], [3.0, 0.0]]), jnp.ones((2, 1)))
      >>> print(factors.input_factor)
      [[5. 1.]
       [1. 2.]]

    References:
      Martens and Grosse 2015, arXiv:1503.05671, §3 and §5.
    """
    require_numbers("update_factors", decay=decay)
    dtype = factors.input_factor.dtype
    inputs, output_grads = jnp.asarray(inputs), jnp.asarray(output_grads)
    for name, rows, factor in (
        ("inputs", inputs, factors.input_factor),
        ("output_grads", output_grads, factors.output_factor),
    ):
        if rows.ndim != 2 or rows.shape[1] != factor.shape[-1]:
            raise ValueError(
                f"update_factors: {name} has shape {rows.shape}, expected [N, {factor.shape[-1]}] "
                f"to match the factor of shape {factor.shape}."
            )
    if inputs.shape[0] != output_grads.shape[0] or inputs.shape[0] == 0:
        raise ValueError(
            "update_factors: inputs and output_grads need the same number of rows, at least one: "
            f"got shapes {inputs.shape} and {output_grads.shape}."
        )

    kept = jnp.clip(decay, 0, 1)

    def average(old: jax.Array, rows: jax.Array) -> jax.Array:
        rows = rows.astype(dtype)
        new = full_matmul(rows.T, rows) / rows.shape[0]
        # Factors are zero while nothing reaches a layer: averaged in, zeros would make its first
        # factors too small, and steps too long.
        return jnp.where(is_silent(old[None])[0], new, kept * old + (1 - kept) * new).astype(dtype)

    return KroneckerFactors(
        average(factors.input_factor, inputs),
        average(factors.output_factor, output_grads),
        factors.count + 1,
    )


def natural_gradient(
    factors: KroneckerFactors,
    kernel_grad: ArrayLike,
    damping: Number = 1e-3,
    *,
    rule: DampingRule = "pi",
) -> jax.Array:
    """A layer's natural gradient, (A + d_A I)⁻¹ ∇ (G + d_G I)⁻¹.

    Args:
      factors: the layer's factors, full [*stack, d, d] or diagonal [*stack, d].
      kernel_grad: gradient of the kernel, [*stack, in_dim, out_dim] as Flax stores it.
      damping: λ of the whole block A ⊗ G, at least 0 under "pi"; any number under "trace", whose
        floor acts on the product.
      rule: "pi" (d_A = π√λ, d_G = √λ/π with π² = (tr A/d_A)/(tr G/d_G)) or "trace" (max(λ ·
        tr(F)/dim, 1e-10) for each factor F).

    Returns:
      The natural gradient in the shape and dtype of `kernel_grad`; NaN for a NaN in the factors.
      Factors that are not positive definite even with their damping get more of it, tenfold at a
      time (where the original refuses).

    Raises:
      ValueError: if `kernel_grad` does not match the factors (the original ignored additional
        columns), for an unknown `rule`, or for a negative `damping` under "pi".

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> factors = optax_curv.KroneckerFactors(4 * jnp.eye(3), jnp.eye(2), jnp.int32(1))
      >>> print(optax_curv.natural_gradient(factors, jnp.ones((3, 2)), damping=0.0)[0])
      [0.25 0.25]

    References:
      Martens and Grosse 2015, eq. (1) and §6.3.
    """
    require_choice("natural_gradient", DAMPING_RULES, rule=rule)
    require_numbers("natural_gradient", damping=damping, at_least=0 if rule == "pi" else None)
    grad = jnp.asarray(kernel_grad)
    a, g = (_as_factor(x, grad.ndim) for x in (factors.input_factor, factors.output_factor))
    if grad.ndim < 2 or not _fits(a, g, grad):
        shapes = factors.input_factor.shape, factors.output_factor.shape
        raise ValueError(
            f"natural_gradient: kernel_grad has shape {grad.shape}, expected [*stack, "
            f"{shapes[0][-1]}, {shapes[1][-1]}] to match factors of shapes {shapes[0]} and "
            f"{shapes[1]}; a kernel stored as [out, in] must be transposed."
        )
    given = jnp.asarray(damping, a.dtype)
    damping_a, damping_g = factor_damping(rule, given, a.mean_diagonal(), g.mean_diagonal())

    def solve(factor: Factor, added: jax.Array, b: jax.Array) -> jax.Array:
        if isinstance(factor, Diagonal):
            return b / (factor.vector + added[..., None])[..., None]
        return cholesky_solve(cholesky(factor.matrix, added)[0], b)

    half = solve(a, damping_a, grad.astype(a.dtype))
    return solve(g, damping_g, half.mT).mT.astype(grad.dtype)


def _as_factor(array: jax.Array, ndim: int) -> Factor:
    """A full factor if it has as many axes as the gradient, else a diagonal one."""
    return Dense(array) if array.ndim == ndim else Diagonal(array)


def _fits(a: Factor, g: Factor, grad: jax.Array) -> bool:
    """Says whether the factors' stacks and widths are those of a gradient [*stack, in, out]."""
    square = all(x.matrix.shape[-2] == x.size for x in (a, g) if isinstance(x, Dense))
    stacks = a.stack == g.stack == grad.shape[:-2]
    return square and stacks and (a.size, g.size) == grad.shape[-2:]
