"""K-FAC's arithmetic for one layer, on plain arrays."""

import jax
import jax.numpy as jnp

from optax_curv.capture.statistics import KroneckerFactors
from optax_curv.linalg import cholesky, cholesky_solve
from optax_curv.preconditioners.contracts import require_choice, require_number
from optax_curv.preconditioners.damping import RULES, factor_damping, mean_diagonal

HIGHEST = jax.lax.Precision.HIGHEST


def init_factors(in_dim: int, out_dim: int) -> KroneckerFactors:
    """Zero factors of a layer with `in_dim` inputs and `out_dim` outputs, before any batch.

    Args:
      in_dim: width of the layer's input; one more if a bias is to be the kernel's last row.
      out_dim: width of the layer's output.

    Returns:
      Factors [in_dim, in_dim] and [out_dim, out_dim] in JAX's default float type, count 0. Calling this again is how
      one resets a layer.

    Raises:
      ValueError: if a width is below 1.

    Examples:
      >>> import optax_curv
      >>> factors = optax_curv.init_factors(3, 2)
      >>> factors.input_factor.shape, factors.output_factor.shape, int(factors.count)
      ((3, 3), (2, 2), 0)
    """
    require_number("init_factors", "in_dim", in_dim, at_least=1)
    require_number("init_factors", "out_dim", out_dim, at_least=1)
    return KroneckerFactors(jnp.zeros((in_dim, in_dim)), jnp.zeros((out_dim, out_dim)), jnp.int32(0))


def is_silent(statistic, batch: int = 0) -> jax.Array:
    """Whether a statistic is zero, or too small for arithmetic: bool of its first `batch` axes."""
    axes = tuple(range(batch, statistic.ndim))
    return jnp.max(jnp.abs(statistic), axis=axes, initial=0) < jnp.finfo(statistic.dtype).tiny


def average_factors(factors: KroneckerFactors, new_input, new_output, decay) -> KroneckerFactors:
    """Averages decay · old + (1 - decay) · new, or takes the new factors where the old ones are zero."""
    # They are before the first batch, and while nothing reaches a layer: averaging zeros in would make the first
    # factors that say anything too small, and the steps too long.

    def average(old, new):
        return jnp.where(is_silent(old), new, decay * old + (1 - decay) * new).astype(old.dtype)

    return KroneckerFactors(
        average(factors.input_factor, new_input), average(factors.output_factor, new_output), factors.count + 1
    )


def update_factors(factors: KroneckerFactors, inputs, output_grads, decay=0.95) -> KroneckerFactors:
    """Averages one batch into a layer's factors.

    A ← decay · A + (1 - decay) · Σ a aᵀ / N and G likewise with the output gradients g, without centring; the first
    batch replaces the zero factors.

    Args:
      factors: from `init_factors` or an earlier update.
      inputs: the layer's inputs [N, in_dim], one row an example.
      output_grads: gradients of each example's *own* loss with respect to the layer's output, [N, out_dim]. Those of
        a mean loss are smaller by 1/N: multiply them by N first.
      decay: weight of the old factors, limited to [0, 1].

    Returns:
      The new factors, with `count` one higher.

    Raises:
      ValueError: if a batch is empty or no matrix, if the two differ in rows, or if a width is not the factor's.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> factors = optax_curv.update_factors(
      ...     optax_curv.init_factors(2, 1), jnp.array([[1.0, 2.0], [3.0, 0.0]]), jnp.ones((2, 1)))
      >>> print(factors.input_factor)
      [[5. 1.]
       [1. 2.]]

    References:
      Martens and Grosse, Optimizing Neural Networks with Kronecker-factored Approximate Curvature, 2015, §3 and §5.
    """
    dtype = factors.input_factor.dtype
    inputs, output_grads = jnp.asarray(inputs), jnp.asarray(output_grads)
    for name, rows, factor in (
        ("inputs", inputs, factors.input_factor),
        ("output_grads", output_grads, factors.output_factor),
    ):
        if rows.ndim != 2 or rows.shape[1] != factor.shape[-1]:
            raise ValueError(
                f"update_factors: {name} has shape {rows.shape}, expected [N, {factor.shape[-1]}] to match the factor "
                f"of shape {factor.shape}."
            )
    if inputs.shape[0] != output_grads.shape[0] or inputs.shape[0] == 0:
        raise ValueError(
            "update_factors: inputs and output_grads need the same number of rows, at least one: got shapes "
            f"{inputs.shape} and {output_grads.shape}."
        )

    def second_moment(rows):
        rows = rows.astype(dtype)
        return jnp.matmul(rows.T, rows, precision=HIGHEST) / rows.shape[0]

    return average_factors(factors, second_moment(inputs), second_moment(output_grads), jnp.clip(decay, 0, 1))


def natural_gradient(factors: KroneckerFactors, kernel_grad, damping=1e-3, *, rule="pi") -> jax.Array:
    """A layer's natural gradient, (A + d_A I)⁻¹ ∇ (G + d_G I)⁻¹.

    Args:
      factors: the layer's factors, full [*stack, d, d] or diagonal [*stack, d].
      kernel_grad: gradient of the kernel, [*stack, in_dim, out_dim] as Flax stores it.
      damping: λ of the whole block A ⊗ G. Under "pi" at least 0; under "trace" any number, as its floor acts on the
        product.
      rule: "pi", d_A = π√λ and d_G = √λ/π with π² = (tr A/d_A)/(tr G/d_G), or "trace", max(λ · tr(F)/dim, 1e-10) for
        each factor F.

    Returns:
      The natural gradient in the shape and dtype of `kernel_grad`. A NaN in the factors gives NaN; factors that are not
      positive definite even with their damping get more of it, tenfold at a time (where the original refuses).

    Raises:
      ValueError: if `kernel_grad` does not match the factors (the original ignored additional columns), if `rule` is
        unknown, or if `damping` is a negative Python number under "pi".

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> factors = optax_curv.KroneckerFactors(4 * jnp.eye(3), jnp.eye(2), jnp.int32(1))
      >>> print(optax_curv.natural_gradient(factors, jnp.ones((3, 2)), damping=0.0)[0])
      [0.25 0.25]

    References:
      Martens and Grosse 2015, eq. (1) and §6.3.
    """
    require_choice("natural_gradient", "rule", rule, RULES)
    if rule == "pi":
        require_number("natural_gradient", "damping", damping, at_least=0)
    grad = jnp.asarray(kernel_grad)
    a, g = factors.input_factor, factors.output_factor
    full_a, full_g = a.ndim == grad.ndim, g.ndim == grad.ndim
    stack = grad.shape[:-2]
    expected = [
        (*stack, d, d) if full else (*stack, d) for d, full in zip(grad.shape[-2:], (full_a, full_g), strict=False)
    ]
    if grad.ndim < 2 or [a.shape, g.shape] != expected:
        raise ValueError(
            f"natural_gradient: kernel_grad has shape {grad.shape}, expected [*stack, {a.shape[-1]}, {g.shape[-1]}] to "
            f"match factors of shapes {a.shape} and {g.shape}; a kernel stored as [out, in] must be transposed."
        )
    damping = jnp.asarray(damping, a.dtype)
    damping_a, damping_g = factor_damping(rule, damping, mean_diagonal(a, full_a), mean_diagonal(g, full_g))

    def solve(factor, added, full, b):
        if not full:
            return b / (factor + added[..., None])[..., None]
        return cholesky_solve(cholesky(factor, added)[0], b)

    half = solve(a, damping_a, full_a, grad.astype(a.dtype))
    result = solve(g, damping_g, full_g, half.mT).mT
    return result.astype(grad.dtype)
