"""The damped Kronecker blocks of all layers, their inverses, and how a direction compares with its layer's model."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_curv.linalg import cholesky, cholesky_solve, conjugate_gradient, lapack
from optax_curv.preconditioners.damping import factor_damping, mean_diagonal
from optax_curv.preconditioners.diagnostics import LayerDiagnostics
from optax_curv.preconditioners.layerwise import HIGHEST, kron_product, map_grouped

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
    lower, used = cholesky(factor, damping)
    eye = jnp.broadcast_to(jnp.eye(factor.shape[-1], dtype=factor.dtype), factor.shape)
    pivots = jnp.diagonal(lower, axis1=-2, axis2=-1)
    return cholesky_solve(lower, eye), used, jnp.square(jnp.max(pivots, -1) / jnp.min(pivots, -1))


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


class Blocks:
    """The damped blocks (A + d_A I) ⊗ (G + d_G I) of all layers, and what is computed with them.

    Numbers of single slices are computed as one vector over all slices of all layers: as many small kernels as there
    are layers would take most of the time to compile.
    """

    def __init__(self, present, factors, damping, rule, sharding=None):
        self.sharding = sharding
        self.present = {name: present[name] for name in sorted(present)}
        self.stacks = {name: x.layer.stack for name, x in self.present.items()}
        self.a = {name: factors[name].input_factor for name in self.present}
        self.g = {name: factors[name].output_factor for name in self.present}
        self.sizes = [math.prod(stack) for stack in self.stacks.values()]
        mean_a, mean_g = (
            self._joined({name: mean_diagonal(f, f.ndim == len(self.stacks[name]) + 2) for name, f in side.items()})
            for side in (self.a, self.g)
        )
        elementwise = np.array([x.layer.kind in ("scale", "shift") for x in self.present.values()], bool)
        elementwise = np.repeat(elementwise, self.sizes)
        added = factor_damping(rule, damping.astype(mean_a.dtype), mean_a, mean_g, elementwise)
        # Nothing has reached such a layer yet, and a gradient without any curvature is no reason to move it.
        silent = ~(mean_a * mean_g > 0)
        self.damping_a, self.damping_g = (self._by_layer(jnp.where(silent, STILL, x)) for x in added)
        self.trace_ratio = mean_a / jnp.where(mean_g > 0, mean_g, 1)

    def _joined(self, values):
        """One vector of the values [*stack] of every layer."""
        return jnp.concatenate([jnp.zeros(0, jnp.float32), *(values[name].ravel() for name in self.present)])

    def _by_layer(self, vector):
        """The values [*stack] of every layer from one vector."""
        ends = np.cumsum(self.sizes)
        return {
            name: vector[end - size : end].reshape(x.layer.stack).astype(x.dtype)
            for (name, x), size, end in zip(self.present.items(), self.sizes, ends, strict=True)
        }

    def _largest(self, vector):
        """The largest over the slices of each layer, [layers]."""
        if set(self.sizes) <= {1}:
            return vector
        layer_of_slice = np.repeat(np.arange(len(self.sizes)), self.sizes)
        return jax.ops.segment_max(vector, layer_of_slice, len(self.sizes))

    def invert(self, method):
        """Inverses and diagnostics: A- and G-factors of about one width, over all layers, in one batch."""
        keyed = {(name, side): factor for side in ("a", "g") for name, factor in getattr(self, side).items()}
        damping = {(name, side): getattr(self, f"damping_{side}")[name] for name, side in keyed}
        stacks = {key: self.stacks[key[0]] for key in keyed}
        widths = {key: f.shape[-1] for key, f in keyed.items() if f.ndim == len(stacks[key]) + 2}
        common = _common_widths(widths.values())
        keyed |= {key: _padded(keyed[key], common[width]) for key, width in widths.items()}

        def inverse(factor, damping):
            return _inverse(factor, damping, method)

        results = map_grouped(inverse, stacks, keyed, damping, sharding=self.sharding)
        found = {key: x[..., : widths[key], : widths[key]] if key in widths else x for key, (x, *_) in results.items()}
        inverses = {name: KroneckerInverse(found[name, "a"], found[name, "g"]) for name in self.stacks}
        figures = [
            self._joined({name: results[name, side][i] for name in self.stacks}) for i in (1, 2) for side in ("a", "g")
        ]
        ones = jnp.ones_like(self.trace_ratio)
        return inverses, LayerDiagnostics(*map(self._largest, (*figures, self.trace_ratio, ones)))

    def precondition(self, inverses, matrices):
        """The directions that these inverses give."""
        left = {name: x.input_inverse for name, x in inverses.items()}
        right = {name: x.output_inverse for name, x in inverses.items()}
        return map_grouped(kron_product, self.stacks, left, matrices, right, sharding=self.sharding)

    def solve_by_cg(self, matrices):
        """The directions without any inverse."""

        def solve(a, damping_a, g, damping_g, x):
            return _solve_by_cg(g, damping_g, _solve_by_cg(a, damping_a, x).mT).mT

        columns = (self.a, self.damping_a, self.g, self.damping_g, matrices)
        return map_grouped(solve, self.stacks, *columns, sharding=self.sharding)

    def checked(self, directions, matrices):
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

        columns = (self.a, self.damping_a, self.g, self.damping_g, directions, matrices)
        results = map_grouped(check, self.stacks, *columns, sharding=self.sharding)
        ratio = self._joined({name: ratio for name, (_, ratio) in results.items()})
        high, low = self._largest(ratio), 1 / self._largest(1 / jnp.maximum(ratio, jnp.finfo(ratio.dtype).tiny))
        return {name: u for name, (u, _) in results.items()}, jnp.where(high * low > 1, high, low)
