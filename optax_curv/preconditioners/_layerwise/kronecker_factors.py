"""K-FAC's arithmetic: factors and their damping, the damped Kronecker blocks of all layers and their inverses."""

import collections
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_curv.curvature import FactorRows, KroneckerFactors
from optax_curv.linalg import _lapack as lapack
from optax_curv.linalg import cholesky, cholesky_solve, conjugate_gradient
from optax_curv.linalg._compiler import cut_out
from optax_curv.linalg.cholesky import damped_inverse
from optax_curv.preconditioners._layerwise.layerwise import (
    HIGHEST,
    LayerStacks,
    PresentLayer,
    average_factors,
)
from optax_curv.preconditioners._stacks.owners import divided
from optax_curv.preconditioners._transformation.contracts import require_choice, require_numbers

RULES = ("pi", "trace")
TRACE_FLOOR = 1e-10  # the original's: the least that the "trace" rule adds to a factor
SAMPLED_ROWS = 64  # by which directions are held, see `curvature_along`
# Damping of a layer that is not to move: its inverses are 1e-18 each, and their product still is no
# denormal number.
STILL = 1e18


def mean_diagonal(factor: jax.Array, full: bool) -> jax.Array:
    """tr(F)/dim of a full factor [..., d, d] or of a diagonal one [..., d]."""
    if not full:
        return jnp.mean(factor, axis=-1)
    return jnp.sum(factor * jnp.eye(factor.shape[-1], dtype=factor.dtype), axis=(-2, -1)) / max(
        1, factor.shape[-1]
    )


def factor_damping(
    rule, damping, input_mean, output_mean, elementwise: bool | np.ndarray = False
) -> tuple[jax.Array, jax.Array]:
    """What is added to the diagonals of A and of G, given tr(A)/d_A and tr(G)/d_G, by a rule of `scale_by_kfac`."""
    # π is 1 where either trace is not positive. An element-wise layer has the input factor [[1]].
    if rule == "trace":
        # fmax, as the original's max: a NaN damping counts as the floor
        input_damping = jnp.fmax(damping * input_mean, TRACE_FLOOR)
        output_damping = jnp.fmax(damping * output_mean, TRACE_FLOOR)
        return jnp.where(elementwise, 0, input_damping), output_damping
    damping = jnp.maximum(damping, 0)
    tiny = jnp.finfo(input_mean.dtype).tiny
    # the quotient of roots, as the root of the quotient would overflow sooner
    ratio = jnp.sqrt(jnp.maximum(input_mean, tiny)) / jnp.sqrt(jnp.maximum(output_mean, tiny))
    pi = jnp.where((input_mean > 0) & (output_mean > 0), ratio, 1)
    root = jnp.sqrt(damping)
    return jnp.where(elementwise, 0, pi * root), jnp.where(elementwise, damping, root / pi)


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


def update_factors(factors: KroneckerFactors, inputs, output_grads, decay=0.95) -> KroneckerFactors:
    """Averages one batch into a layer's factors.

    A ← decay · A + (1 - decay) · Σ a aᵀ / N and G likewise with the output gradients g, without
    centring; the first batch replaces the zero factors.

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

    return average_factors(
        factors, second_moment(inputs), second_moment(output_grads), jnp.clip(decay, 0, 1)
    )


def natural_gradient(
    factors: KroneckerFactors, kernel_grad, damping=1e-3, *, rule="pi"
) -> jax.Array:
    """A layer's natural gradient, (A + d_A I)⁻¹ ∇ (G + d_G I)⁻¹.

    Args:
      factors: the layer's factors, full [*stack, d, d] or diagonal [*stack, d].
      kernel_grad: gradient of the kernel, [*stack, in_dim, out_dim] as Flax stores it.
      damping: λ of the whole block A ⊗ G, at least 0 under "pi"; any number under "trace", whose
        floor acts on the product.
      rule: "pi" or "trace", see `scale_by_kfac`.

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
    require_choice("natural_gradient", "rule", rule, RULES)
    if rule == "pi":
        require_numbers("natural_gradient", damping=damping, at_least=0)
    grad = jnp.asarray(kernel_grad)
    a, g = factors.input_factor, factors.output_factor
    full_a, full_g = a.ndim == grad.ndim, g.ndim == grad.ndim
    stack = grad.shape[:-2]
    expected = [
        (*stack, d, d) if full else (*stack, d)
        for d, full in zip(grad.shape[-2:], (full_a, full_g), strict=False)
    ]
    if grad.ndim < 2 or [a.shape, g.shape] != expected:
        raise ValueError(
            f"natural_gradient: kernel_grad has shape {grad.shape}, expected [*stack, {a.shape[-1]}, {g.shape[-1]}] to "
            f"match factors of shapes {a.shape} and {g.shape}; a kernel stored as [out, in] must be transposed."
        )
    damping = jnp.asarray(damping, a.dtype)
    damping_a, damping_g = factor_damping(
        rule, damping, mean_diagonal(a, full_a), mean_diagonal(g, full_g)
    )

    def solve(factor, added, full, b):
        if not full:
            return b / (factor + added[..., None])[..., None]
        return cholesky_solve(cholesky(factor, added)[0], b)

    half = solve(a, damping_a, full_a, grad.astype(a.dtype))
    result = solve(g, damping_g, full_g, half.mT).mT
    return result.astype(grad.dtype)


class LayerDiagnostics(NamedTuple):
    """What the latest inversion and direction say about every layer; the worst over the slices of a stack.

    Attributes:
      input_damping: what was added to the diagonal of A, retries included, float [layers].
      output_damping: what was added to the diagonal of G, float [layers].
      input_condition: condition number of the damped A, float [layers]; under "cholesky" a lower
        bound, the square of its largest over its smallest pivot.
      output_condition: that of the damped G, float [layers].
      trace_ratio: (tr A/d_A) / (tr G/d_G), which is π², float [layers].
      model_ratio: ⟨u, F u⟩ / ⟨u, ∇⟩ of the layer's direction u under the current damped factors, 1
        for exact inverses, float [layers].
    """

    input_damping: jax.Array
    output_damping: jax.Array
    input_condition: jax.Array
    output_condition: jax.Array
    trace_ratio: jax.Array
    model_ratio: jax.Array


class KroneckerInverse(NamedTuple):
    """(A + d_A I)⁻¹ and (G + d_G I)⁻¹ of a layer, full [*stack, d, d] or diagonal [*stack, d]."""

    input_inverse: jax.Array
    output_inverse: jax.Array


def _inverse(factor, damping, method):
    """Inverses of damped factors [B, d, d] or diagonals [B, d], the damping used [B] and the condition [B]."""
    if factor.shape[-1] == 1 and factor.ndim == 3:
        inverse, *figures = _inverse(factor[..., 0], damping, method)
        return inverse[..., None], *figures
    if factor.ndim == 2:
        damped = factor + damping[:, None]
        inverse = jnp.where(
            damped > 0, 1 / damped, 0
        )  # a coordinate without curvature or damping is left out
        return inverse, damping, jnp.max(damped, -1) * jnp.max(inverse, -1)
    if method == "eigh":
        values, vectors = lapack.eigh(factor)
        floor = jnp.finfo(factor.dtype).eps * jnp.maximum(
            values[:, -1], jnp.finfo(factor.dtype).eps
        )
        used = jnp.maximum(damping, floor - jnp.minimum(values[:, 0], 0))
        values = values + used[:, None]
        inverse = jnp.matmul(vectors / values[:, None, :], vectors.mT, precision=HIGHEST)
        return inverse, used, values[:, -1] / values[:, 0]
    return damped_inverse(factor, damping)


def _common_widths(widths) -> dict[int, int]:
    """The width that each is padded to, for so many matrices of each; as few as an eighth more work allows."""
    # A width is a factorisation to compile. So d and d + 1 share one, and so do widths too small to
    # matter.
    common, spare = {}, sum(count * width**3 for width, count in widths.items()) // 8
    largest = max(widths, default=0)
    for width in sorted(widths, reverse=True):
        more = widths[width] * (largest**3 - width**3)
        if more > spare:
            largest, more = width, 0
        common[width], spare = largest, spare - more
    return common


def _padded(factor, width):
    """diag(F, f, …, f) with f = F[0, 0], which keeps the range of F's eigenvalues and of its pivots."""
    own = factor.shape[-1]
    if own == width:
        return factor
    fill = jnp.diag((jnp.arange(width) >= own).astype(factor.dtype)) * factor[..., :1, :1]
    return jnp.pad(factor, [(0, 0)] * (factor.ndim - 2) + [(0, width - own)] * 2) + fill


def _solve_by_cg(factor, damping, x):
    """(F + d I)⁻¹ X for a batch of matrices [B, d, k], column by column."""
    if factor.ndim == 2:
        return _inverse(factor, damping, "cg")[0][..., None] * x

    def solve(factor, damping, column):
        def matvec(v):
            return jnp.matmul(factor, v, precision=HIGHEST) + damping * v

        # As many iterations as unknowns are exact but for rounding, which asks for some more.
        limits = {"max_iters": 2 * column.shape[0], "tol": 8 * jnp.finfo(x.dtype).eps}
        return conjugate_gradient(matvec, column, **limits)[0]

    return jax.vmap(jax.vmap(solve, (None, None, 1), 1))(factor, damping, x)


def curvature_along(u, rows: FactorRows, own_rows: slice):
    """N Σ_r (a_rᵀ U ḡ_r)² of a layer's directions [*stack, rows, out], by every k-th of its rows: [*stack]."""
    step = max(1, rows.output_grads.shape[-2] // SAMPLED_ROWS)
    grads = rows.output_grads[..., ::step, :].astype(u.dtype)
    if rows.inputs.ndim < rows.output_grads.ndim:  # the one-hot rows of an embedding
        seen = jnp.take_along_axis(u, rows.inputs[..., ::step, None], axis=-2)
    else:
        inputs = rows.inputs[..., ::step, :].astype(u.dtype)
        seen = jnp.matmul(inputs[..., own_rows], u, precision=HIGHEST)
    share = rows.output_grads.shape[-2] / grads.shape[-2]
    return share * rows.weights[1] * jnp.sum(jnp.square(jnp.sum(seen * grads, -1)), -1)


class Blocks:
    """The damped blocks (A + d_A I) ⊗ (G + d_G I) of all layers, and what is computed with them."""

    def __init__(
        self,
        present: Mapping[str, PresentLayer],
        factors: LayerStacks,
        damping,
        rule,
        sharding=None,
    ):
        self.factors, self.layout, self.sharding = factors, factors.layout, sharding
        self.dampings, self.trace_ratios = [], []
        for entries, (a, g, _) in zip(self.layout, factors.groups, strict=True):
            mean_a, mean_g = mean_diagonal(a, a.ndim == 3), mean_diagonal(g, g.ndim == 3)
            elementwise = present[entries[0][0]].layer.kind in ("scale", "shift")
            added = factor_damping(rule, damping.astype(mean_a.dtype), mean_a, mean_g, elementwise)
            # Nothing has reached such a layer yet, and a gradient without any curvature is no
            # reason to move it.
            silent = ~(mean_a * mean_g > 0)
            self.dampings.append(tuple(jnp.where(silent, STILL, x).astype(a.dtype) for x in added))
            self.trace_ratios.append(mean_a / jnp.where(mean_g > 0, mean_g, 1))

    def _each(self, function, *columns) -> LayerStacks:
        """`function(a, d_A, g, d_G, ...)` of every stack, whose entries the devices divide among them."""
        function = divided(function, self.sharding)
        rows = zip(
            self.factors.groups, self.dampings, *(column.groups for column in columns), strict=True
        )
        return LayerStacks(
            self.layout, [function(a, d_a, g, d_g, *x) for (a, g, _), (d_a, d_g), *x in rows]
        )

    def _largest(self, vectors):
        """The largest over each layer's slices, [layers] in the order of the layout."""
        joined = jnp.concatenate([jnp.zeros(0, jnp.float32), *vectors])
        sizes = [math.prod(stack) for entries in self.layout for _, stack in entries]
        if set(sizes) <= {1}:
            return joined
        return jax.ops.segment_max(joined, np.repeat(np.arange(len(sizes)), sizes), len(sizes))

    def invert(self, method):
        """Inverses and diagnostics: factors of about one width, over all layers, in one batch."""
        keyed = {(i, side): x[side] for side in (0, 1) for i, x in enumerate(self.factors.groups)}
        dampings = {(i, side): self.dampings[i][side] for i, side in keyed}
        widths = {key: f.shape[-1] for key, f in keyed.items() if f.ndim == 3}
        counts = collections.Counter()
        for key, width in widths.items():
            counts[width] += len(keyed[key])
        common = _common_widths(counts)
        keyed |= {key: _padded(keyed[key], common[width]) for key, width in widths.items()}
        inverse = divided(functools.partial(_inverse, method=method), self.sharding)
        found = dict(
            zip(keyed, lapack.joined(inverse, keyed.values(), dampings.values()), strict=True)
        )
        cut = {
            key: x[..., : widths[key], : widths[key]] if key in widths else x
            for key, (x, *_) in found.items()
        }
        places = range(len(self.layout))
        inverses = LayerStacks(
            self.layout, [KroneckerInverse(cut[i, 0], cut[i, 1]) for i in places]
        )
        figures = [[found[i, side][figure] for i in places] for figure in (1, 2) for side in (0, 1)]
        ones = [jnp.ones_like(x) for x in self.trace_ratios]
        return inverses, LayerDiagnostics(*map(self._largest, (*figures, self.trace_ratios, ones)))

    def solve_by_cg(self, matrices: LayerStacks) -> LayerStacks:
        """The directions without any inverse."""

        def solve(a, damping_a, g, damping_g, x):
            return _solve_by_cg(g, damping_g, _solve_by_cg(a, damping_a, x).mT).mT

        return self._each(solve, matrices)

    def checked(self, directions: LayerStacks, matrices: LayerStacks):
        """The directions, none longer than the minimiser of its layer's model along it; and how the two compare."""
        # Along u the model ½ t² ⟨u, F u⟩ − t ⟨u, ∇⟩ has its minimum at t = 1 / ratio, ratio = ⟨u, F
        # u⟩ / ⟨u, ∇⟩. Of a layer's ratios the one that is furthest from 1 on either side comes
        # back.

        def check(a, damping_a, g, damping_g, u, grad):
            left = jnp.matmul(a, u, precision=HIGHEST) if a.ndim == 3 else a[..., None] * u
            right = jnp.matmul(u, g, precision=HIGHEST) if g.ndim == 3 else u * g[:, None]
            curved = (left + damping_a[:, None, None] * u) * (right + damping_g[:, None, None] * u)
            bend, slope = jnp.sum(curved, (1, 2)), jnp.sum(u * grad, (1, 2))
            ratio = _quotient(bend, slope)
            return u / jnp.maximum(1, ratio)[:, None, None], ratio

        results = self._each(check, directions, matrices).groups
        ratios = [ratio for _, ratio in results]
        high = self._largest(ratios)
        low = 1 / self._largest([1 / jnp.maximum(x, jnp.finfo(x.dtype).tiny) for x in ratios])
        return LayerStacks(self.layout, [u for u, _ in results]), jnp.where(
            high * low > 1, high, low
        )


def _quotient(bend, slope):
    """Their quotient; 1 for a direction that does not descend."""
    return jnp.where(slope > 0, bend / jnp.where(slope > 0, slope, 1), 1)


def kron_product(left: jax.Array, x: jax.Array, right: jax.Array) -> jax.Array:
    """L X R for a batch of matrices [B, m, n], each factor full [B, d, d] or diagonal [B, d], symmetric."""
    x = jnp.matmul(left, x, precision=HIGHEST) if left.ndim == 3 else left[..., None] * x
    return jnp.matmul(x, right, precision=HIGHEST) if right.ndim == 3 else x * right[..., None, :]


def precondition(inverses: LayerStacks, matrices: LayerStacks, sharding=None) -> LayerStacks:
    """The directions that these inverses give."""
    return inverses.map(
        divided(lambda inverse, x: kron_product(inverse[0], x, inverse[1]), sharding), matrices
    )


def held_to_rows(present, directions: LayerStacks, matrices: LayerStacks, curvature, diagnostics):
    """As `Blocks.checked`, but by some of the step's own rows, for layers that come with rows."""
    found, ratios = dict(directions), {}
    dampings = diagnostics.input_damping * diagnostics.output_damping
    dampings = {name: cut_out(dampings, i, ()) for i, name in enumerate(directions)}
    for name, x in present.items():
        u, rows, ratios[name] = found[name], curvature[name], jnp.ones(x.layer.stack, x.dtype)
        if isinstance(rows, FactorRows):
            # ⟨u, F u⟩ = N Σ_r (a_rᵀ U ḡ_r)² + d_A d_G ⟨u, u⟩
            bend = curvature_along(u, rows, x.own_rows) + dampings[name] * jnp.sum(
                jnp.square(u), (-1, -2)
            )
            slope = jnp.sum(u * matrices[name], (-1, -2))
            ratios[name] = _quotient(bend, slope)
            found[name] = u / jnp.maximum(1, ratios[name])[..., None, None]
    ratio = jnp.stack([jnp.float32(1), *(jnp.max(ratios[name]) for name in directions)])[1:]
    return LayerStacks.of(directions.layout, found), ratio
