"""The damped Kronecker blocks of all layers, their inverses, and how a direction compares with its layer's model."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_curv.capture.statistics import FactorRows
from optax_curv.linalg import conjugate_gradient, lapack
from optax_curv.linalg.cholesky import damped_inverse
from optax_curv.preconditioners.damping import factor_damping, mean_diagonal
from optax_curv.preconditioners.diagnostics import LayerDiagnostics
from optax_curv.preconditioners.distribution import divided
from optax_curv.preconditioners.layer_stacks import LayerStacks
from optax_curv.preconditioners.layerwise import HIGHEST, kron_product

SAMPLED_ROWS = 64
# Damping of a layer that is not to move: its inverses are 1e-18 each, and their product still is no denormal number.
STILL = 1e18


class KroneckerInverse(NamedTuple):
    """Inverses of a layer's damped factors.

    Attributes:
      input_inverse: (A + d_A I)⁻¹, float [*stack, rows, rows], or its diagonal [*stack, rows].
      output_inverse: (G + d_G I)⁻¹, float [*stack, out, out], or its diagonal [*stack, out].
    """

    input_inverse: jax.Array
    output_inverse: jax.Array


def _inverse(factor, damping, method):
    """Inverses of a batch of damped factors [B, d, d] or diagonals [B, d]; damping used and condition, [B] each."""
    if factor.shape[-1] == 1 and factor.ndim == 3:
        inverse, *figures = _inverse(factor[..., 0], damping, method)
        return inverse[..., None], *figures
    if factor.ndim == 2:
        damped = factor + damping[:, None]
        inverse = jnp.where(damped > 0, 1 / damped, 0)  # a coordinate without curvature or damping is left out
        return inverse, damping, jnp.max(damped, -1) * jnp.max(inverse, -1)
    if method == "eigh":
        values, vectors = lapack.eigh(factor)
        floor = jnp.finfo(factor.dtype).eps * jnp.maximum(values[:, -1], jnp.finfo(factor.dtype).eps)
        used = jnp.maximum(damping, floor - jnp.minimum(values[:, 0], 0))
        values = values + used[:, None]
        inverse = jnp.matmul(vectors / values[:, None, :], vectors.mT, precision=HIGHEST)
        return inverse, used, values[:, -1] / values[:, 0]
    return damped_inverse(factor, damping)


def _common_widths(widths) -> dict[int, int]:
    """The width that each is padded to: a 16th more at most, so that d and d + 1 share a factorisation.

    Each distinct width is one more factorisation to compile; the padding costs a fifth more arithmetic at most.
    """
    common, largest = {}, 0
    for width in sorted(set(widths), reverse=True):
        if not largest or largest > width + max(2, width // 16):
            largest = width
        common[width] = largest
    return common


def _padded(factor, width):
    """diag(F, f, …, f) with f = F[0, 0], which leaves the range of F's eigenvalues and of its pivots as it is."""
    own = factor.shape[-1]
    if own == width:
        return factor
    fill = jnp.diag((jnp.arange(width) >= own).astype(factor.dtype)) * factor[..., :1, :1]
    return jnp.pad(factor, [(0, 0)] * (factor.ndim - 2) + [(0, width - own)] * 2) + fill


def _solve_by_cg(factor, damping, x):
    """(F + d I)⁻¹ X for a batch of matrices [B, d, k], a conjugate-gradient solve for each column."""
    if factor.ndim == 2:
        return _inverse(factor, damping, "cg")[0][..., None] * x

    def solve(factor, damping, column):
        def matvec(v):
            return jnp.matmul(factor, v, precision=HIGHEST) + damping * v

        # As many iterations as unknowns are exact without rounding; rounding asks for some more.
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
    """The damped blocks (A + d_A I) ⊗ (G + d_G I) of all layers, and what is computed with them.

    Args:
      present: the layers, `PresentLayer` by name.
      factors: their `KroneckerFactors`, as `LayerStacks`.
      damping: λ, [].
      rule: how λ is split.
      sharding: over which devices the stacks are divided, or None.
    """

    def __init__(self, present, factors: LayerStacks, damping, rule, sharding=None):
        self.factors, self.layout, self.sharding = factors, factors.layout, sharding
        self.dampings, self.trace_ratios = [], []
        for entries, (a, g, _) in zip(self.layout, factors.groups, strict=True):
            mean_a, mean_g = mean_diagonal(a, a.ndim == 3), mean_diagonal(g, g.ndim == 3)
            elementwise = present[entries[0][0]].layer.kind in ("scale", "shift")
            added = factor_damping(rule, damping.astype(mean_a.dtype), mean_a, mean_g, elementwise)
            # Nothing has reached such a layer yet, and a gradient without any curvature is no reason to move it.
            silent = ~(mean_a * mean_g > 0)
            self.dampings.append(tuple(jnp.where(silent, STILL, x).astype(a.dtype) for x in added))
            self.trace_ratios.append(mean_a / jnp.where(mean_g > 0, mean_g, 1))

    def _each(self, function, *columns) -> LayerStacks:
        """`function(a, d_A, g, d_G, ...)` of every stack, whose entries the devices divide among them."""
        function = divided(function, self.sharding)
        rows = zip(self.factors.groups, self.dampings, *(column.groups for column in columns), strict=True)
        return LayerStacks(self.layout, [function(a, d_a, g, d_g, *x) for (a, g, _), (d_a, d_g), *x in rows])

    def _largest(self, vectors):
        """The largest over the slices of each layer, [layers] in the order of the layout."""
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
        common = _common_widths(widths.values())
        keyed |= {key: _padded(keyed[key], common[width]) for key, width in widths.items()}
        inverse = divided(functools.partial(_inverse, method=method), self.sharding)
        found = dict(zip(keyed, lapack.joined(inverse, keyed.values(), dampings.values()), strict=True))
        cut = {key: x[..., : widths[key], : widths[key]] if key in widths else x for key, (x, *_) in found.items()}
        places = range(len(self.layout))
        inverses = LayerStacks(self.layout, [KroneckerInverse(cut[i, 0], cut[i, 1]) for i in places])
        figures = [[found[i, side][figure] for i in places] for figure in (1, 2) for side in (0, 1)]
        ones = [jnp.ones_like(x) for x in self.trace_ratios]
        return inverses, LayerDiagnostics(*map(self._largest, (*figures, self.trace_ratios, ones)))

    def solve_by_cg(self, matrices: LayerStacks) -> LayerStacks:
        """The directions without any inverse."""

        def solve(a, damping_a, g, damping_g, x):
            return _solve_by_cg(g, damping_g, _solve_by_cg(a, damping_a, x).mT).mT

        return self._each(solve, matrices)

    def checked(self, directions: LayerStacks, matrices: LayerStacks):
        """The directions, none longer than the minimiser of its layer's model along it; and how the two compare.

        Along u the model ½ t² ⟨u, F u⟩ − t ⟨u, ∇⟩ has its minimum at t = 1 / ratio, ratio = ⟨u, F u⟩ / ⟨u, ∇⟩; for
        u = F⁻¹ ∇ it is 1. The ratio that is furthest from 1 on either side comes back for each layer, [layers].
        """

        def check(a, damping_a, g, damping_g, u, grad):
            left = jnp.matmul(a, u, precision=HIGHEST) if a.ndim == 3 else a[..., None] * u
            right = jnp.matmul(u, g, precision=HIGHEST) if g.ndim == 3 else u * g[:, None]
            curved = (left + damping_a[:, None, None] * u) * (right + damping_g[:, None, None] * u)
            bend, slope = jnp.sum(curved, (1, 2)), jnp.sum(u * grad, (1, 2))
            ratio = jnp.where(slope > 0, bend / jnp.where(slope > 0, slope, 1), 1)
            return u / jnp.maximum(1, ratio)[:, None, None], ratio

        results = self._each(check, directions, matrices).groups
        ratios = [ratio for _, ratio in results]
        high = self._largest(ratios)
        low = 1 / self._largest([1 / jnp.maximum(x, jnp.finfo(x.dtype).tiny) for x in ratios])
        return LayerStacks(self.layout, [u for u, _ in results]), jnp.where(high * low > 1, high, low)


def precondition(inverses: LayerStacks, matrices: LayerStacks, sharding=None) -> LayerStacks:
    """The directions that these inverses give."""
    return inverses.map(divided(lambda inverse, x: kron_product(inverse[0], x, inverse[1]), sharding), matrices)


def held_to_rows(present, directions: LayerStacks, matrices: LayerStacks, curvature, diagnostics):
    """As `Blocks.checked`, by what the step's own rows say of each direction instead of the factors.

    ⟨u, F u⟩ = N Σ_r (a_rᵀ U ḡ_r)² + d_A d_G ⟨u, u⟩ of every k-th row, so that some `SAMPLED_ROWS` are taken. Layers
    that come with their factors are left as they are.
    """
    found, ratios = dict(directions), {}
    dampings = dict(zip(directions, diagnostics.input_damping * diagnostics.output_damping, strict=True))
    for name, x in present.items():
        u, rows, ratios[name] = found[name], curvature[name], jnp.ones(x.layer.stack, x.dtype)
        if isinstance(rows, FactorRows):
            bend = curvature_along(u, rows, x.own_rows) + dampings[name] * jnp.sum(jnp.square(u), (-1, -2))
            slope = jnp.sum(u * matrices[name], (-1, -2))
            ratios[name] = jnp.where(slope > 0, bend / jnp.where(slope > 0, slope, 1), 1)
            found[name] = u / jnp.maximum(1, ratios[name])[..., None, None]
    ratio = jnp.stack([jnp.float32(1), *(jnp.max(ratios[name]) for name in directions)])[1:]
    return LayerStacks.of(directions.layout, found), ratio
