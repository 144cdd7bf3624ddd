"""K-FAC's damped blocks (A + d_A I) ⊗ (G + d_G I) of all layers: inverses, solves and checks."""

import collections
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_curv.linalg import _lapack as lapack
from optax_curv.linalg import conjugate_gradient
from optax_curv.linalg._compiler import FULL, full_matmul
from optax_curv.linalg.cholesky import damped_inverse
from optax_curv.linalg.factors import Dense, Diagonal, Factor
from optax_curv.preconditioners._layerwise.factors import LayerFactors, array_of
from optax_curv.preconditioners._layerwise.view import LayerStacks
from optax_curv.preconditioners._stacks.names import layers_of
from optax_curv.preconditioners._stacks.owners import without_types
from optax_curv.typing import DampingRule, Inverse

TRACE_FLOOR = 1e-10  # the original's: the least that the "trace" rule adds to a factor
# Damping of a layer that is not to move: its inverses are 1e-18 each, and their product still is no
# denormal number.
STILL = 1e18


class KroneckerInverse(NamedTuple):
    """(A + d_A I)⁻¹ and (G + d_G I)⁻¹ of a stack or of a layer.

    Attributes:
      input_inverse: full [..., rows, rows] or diagonal [..., rows].
      output_inverse: full [..., out, out] or diagonal [..., out].
    """

    input_inverse: Any
    output_inverse: Any


class LayerDiagnostics(NamedTuple):
    """Figures of the latest inversion and direction, for every row of a stack or for every layer.

    Of a layer they are the worst of its slices. Figure i then belongs to layer i of `layers`, those
    left out whose leaves are all masked.

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


def factor_damping(
    rule: DampingRule,
    damping: jax.Array,
    input_mean: jax.Array,
    output_mean: jax.Array,
    elementwise: bool | np.ndarray = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns what is added to the diagonals of A and of G, by a rule of `scale_by_kfac`.

    Args:
      rule: "pi" or "trace".
      damping: λ.
      input_mean: tr(A)/d_A.
      output_mean: tr(G)/d_G.
      elementwise: whether the layer has the input factor [[1]], which takes no damping.
    """
    if rule == "trace":
        # fmax, as the original's max: a NaN damping counts as the floor
        input_damping = jnp.fmax(damping * input_mean, TRACE_FLOOR)
        output_damping = jnp.fmax(damping * output_mean, TRACE_FLOOR)
        return jnp.where(elementwise, 0, input_damping), output_damping
    damping = jnp.maximum(damping, 0)
    tiny = jnp.finfo(input_mean.dtype).tiny
    # The quotient of roots, as the root of the quotient would overflow sooner. π is 1 where either
    # trace is not positive.
    ratio = jnp.sqrt(jnp.maximum(input_mean, tiny)) / jnp.sqrt(jnp.maximum(output_mean, tiny))
    pi = jnp.where((input_mean > 0) & (output_mean > 0), ratio, 1)
    root = jnp.sqrt(damping)
    return jnp.where(elementwise, 0, pi * root), jnp.where(elementwise, damping, root / pi)


class _Block(NamedTuple):
    """The damped factors of one stack.

    Attributes:
      factors: A and G.
      damping: d_A and d_G, [N] each.
      trace_ratio: (tr A/d_A) / (tr G/d_G), [N].
    """

    factors: tuple[Factor, Factor]
    damping: tuple[jax.Array, jax.Array]
    trace_ratio: jax.Array


class Blocks:
    """The damped blocks of all layers of a view, and what is computed with them.

    Args:
      view: the layers, and more where some of their stacks are computed with elsewhere.
      factors: the averages of those here, by stack.
      damping: λ, [].
      rule: how it is shared out between A and G.
    """

    def __init__(
        self,
        view: LayerStacks,
        factors: Mapping[str, LayerFactors],
        damping: jax.Array,
        rule: DampingRule,
    ):
        self._blocks: dict[str, _Block] = {}
        for name, x in factors.items():
            a, g = x.input_factor, x.output_factor
            means = a.mean_diagonal(), g.mean_diagonal()
            elementwise = view.kind(name).elementwise
            added = factor_damping(rule, damping.astype(a.dtype), *means, elementwise)
            # Nothing has reached such a layer yet, and a gradient without any curvature is no
            # reason to move it.
            silent = ~(means[0] * means[1] > 0)
            added_a, added_g = (jnp.where(silent, STILL, x).astype(a.dtype) for x in added)
            ratio = means[0] / jnp.where(means[1] > 0, means[1], 1)
            self._blocks[name] = _Block((a, g), (added_a, added_g), ratio)

    def _each(self, function: Callable, *columns: Mapping[str, Any]) -> dict[str, Any]:
        """`function(A, d_A, G, d_G, ...)` of every stack."""
        found = {}
        for name, ((a, g), (added_a, added_g), _) in self._blocks.items():
            found[name] = function(a, added_a, g, added_g, *(column[name] for column in columns))
        return found

    def invert(
        self, method: Inverse
    ) -> tuple[dict[str, KroneckerInverse], dict[str, LayerDiagnostics]]:
        """The inverses and figures of all rows; factors of about one width share one batch."""
        keys = [(name, side) for side in (0, 1) for name in self._blocks]
        factors = {(n, i): self._blocks[n].factors[i] for n, i in keys}
        dampings = [self._blocks[name].damping[side] for name, side in keys]
        widths = {key: x.size for key, x in factors.items() if isinstance(x, Dense)}
        counts: collections.Counter[int] = collections.Counter()
        for key, width in widths.items():
            counts[width] += len(array_of(factors[key]))
        common = _common_widths(counts)
        arrays = [
            _padded(array_of(x), common[x.size]) if key in widths else array_of(x)
            for key, x in factors.items()
        ]
        inverse = functools.partial(_inverse, method=method)
        found = dict(zip(keys, lapack.joined(inverse, arrays, dampings), strict=True))

        def cut(key: tuple[str, int]) -> Factor:
            array = found[key][0]
            if key not in widths:
                return Diagonal(array)
            return Dense(array[..., : widths[key], : widths[key]])

        inverses = {n: KroneckerInverse(cut((n, 0)), cut((n, 1))) for n in self._blocks}
        figures = {
            name: LayerDiagnostics(
                *(found[name, side][figure] for figure in (1, 2) for side in (0, 1)),
                trace_ratio=x.trace_ratio,
                model_ratio=jnp.ones_like(x.trace_ratio),
            )
            for name, x in self._blocks.items()
        }
        return inverses, figures

    def solve_by_cg(self, grads: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The directions, without any inverse."""

        def solve(
            a: Factor, damping_a: jax.Array, g: Factor, damping_g: jax.Array, x: jax.Array
        ) -> jax.Array:
            return _solve_by_cg(g, damping_g, _solve_by_cg(a, damping_a, x).mT).mT

        return self._each(solve, grads)

    def checked(
        self, directions: Mapping[str, jax.Array], grads: Mapping[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """The directions, none longer than the minimiser of its model along it, and ratios [N].

        Along u the model ½ t² ⟨u, F u⟩ - t ⟨u, ∇⟩ has its minimum at t = 1 / ratio with ratio =
        ⟨u, F u⟩ / ⟨u, ∇⟩.
        """

        def check(
            a: Factor,
            damping_a: jax.Array,
            g: Factor,
            damping_g: jax.Array,
            u: jax.Array,
            grad: jax.Array,
        ) -> tuple[jax.Array, jax.Array]:
            left = a.matmul(u) + damping_a[:, None, None] * u
            right = g.matmul(u, "right") + damping_g[:, None, None] * u
            bend, slope = jnp.sum(left * right, (1, 2)), jnp.sum(u * grad, (1, 2))
            ratio = model_ratio(bend, slope)
            return u / jnp.maximum(1, ratio)[:, None, None], ratio

        results = self._each(check, directions, grads)
        ratios = {name: ratio for name, (_, ratio) in results.items()}
        return {name: u for name, (u, _) in results.items()}, ratios


def model_ratio(bend: jax.Array, slope: jax.Array) -> jax.Array:
    """Bend / slope; 1 for a direction that does not descend."""
    return jnp.where(slope > 0, bend / jnp.where(slope > 0, slope, 1), 1)


def worst_of_layers(
    figures: Mapping[str, LayerDiagnostics], places: Mapping[str, jax.Array]
) -> LayerDiagnostics:
    """The worst figures of each layer's rows, of ratios those that are furthest from 1.

    Args:
      figures: of the rows of every stack, [N].
      places: by stack the place of each row's layer, int32 [N]; -1 where it has none.
    """
    figures, places = without_types((dict(figures), dict(places)))
    count = sum(len(layers_of(name)) for name in places)
    rows = jnp.concatenate([jnp.zeros(0, jnp.int32), *places.values()])
    # Those beyond the last layer are dropped.
    worst = functools.partial(
        jax.ops.segment_max, segment_ids=jnp.where(rows < 0, count, rows), num_segments=count
    )
    of_rows = [
        jnp.concatenate([jnp.zeros(0, jnp.float32), *(getattr(figures[n], x) for n in places)])
        for x in LayerDiagnostics._fields
    ]
    found = LayerDiagnostics(*map(worst, of_rows))
    low = 1 / worst(1 / jnp.maximum(of_rows[-1], jnp.finfo(of_rows[-1].dtype).tiny))
    high = found.model_ratio
    return found._replace(model_ratio=jnp.where(high * low > 1, high, low))


def precondition(
    inverses: Mapping[str, KroneckerInverse], grads: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """The directions A⁻¹ ∇ G⁻¹ that these inverses give, by stack."""
    return {
        name: inverse.output_inverse.matmul(inverse.input_inverse.matmul(grads[name]), "right")
        for name, inverse in inverses.items()
    }


def _inverse(
    factor: jax.Array, damping: jax.Array, method: Inverse
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Inverses of damped [N, d, d] or diagonals [N, d], the damping used [N], the condition [N]."""
    if factor.ndim == 2:
        return _diagonal_inverse(factor, damping)
    if factor.shape[-1] == 1:
        inverse, used, condition = _diagonal_inverse(factor[..., 0], damping)
        return inverse[..., None], used, condition
    if method == "eigh":
        values, vectors = lapack.eigh(factor)
        eps = jnp.finfo(factor.dtype).eps
        floor = eps * jnp.maximum(values[:, -1], eps)
        used = jnp.maximum(damping, floor - jnp.minimum(values[:, 0], 0))
        values = values + used[:, None]
        inverse = full_matmul(vectors / values[:, None, :], vectors.mT)
        return inverse, used, values[:, -1] / values[:, 0]
    return damped_inverse(factor, damping)


def _diagonal_inverse(
    factor: jax.Array, damping: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    inverse, used, condition = Diagonal(factor).inverse(damping)
    return inverse.vector, used, condition


def _common_widths(widths: Mapping[int, int]) -> dict[int, int]:
    """The width that each width is padded to, given how many matrices have it.

    Every distinct width costs one compiled factorisation. Widths are therefore rounded up to a few
    common ones, as long as the padding adds at most an eighth of the arithmetic: a layer's d and d
    + 1 (bias), or many small widths.
    """
    common, spare = {}, sum(count * width**3 for width, count in widths.items()) // 8
    largest = max(widths, default=0)
    for width in sorted(widths, reverse=True):
        more = widths[width] * (largest**3 - width**3)
        if more > spare:
            largest, more = width, 0
        common[width], spare = largest, spare - more
    return common


def _padded(factor: jax.Array, width: int) -> jax.Array:
    """diag(F, f, …, f) with f = F[0, 0], which keeps the range of F's eigenvalues and pivots."""
    own = factor.shape[-1]
    if own == width:
        return factor
    fill = jnp.diag((jnp.arange(width) >= own).astype(factor.dtype)) * factor[..., :1, :1]
    return jnp.pad(factor, [(0, 0)] * (factor.ndim - 2) + [(0, width - own)] * 2) + fill


def _solve_by_cg(factor: Factor, damping: jax.Array, x: jax.Array) -> jax.Array:
    """(F + d I)⁻¹ X for a batch of matrices [N, d, k], column by column."""
    if isinstance(factor, Diagonal):
        return factor.inverse(damping).factor.matmul(x)

    def solve(factor: jax.Array, damping: jax.Array, column: jax.Array) -> jax.Array:
        def matvec(v: jax.Array) -> jax.Array:
            return jnp.matmul(factor, v, precision=FULL) + damping * v

        # As many iterations as unknowns are exact but for rounding, which asks for some more.
        limits = {"max_iters": 2 * column.shape[0], "tol": 8 * jnp.finfo(x.dtype).eps}
        return conjugate_gradient(matvec, column, **limits)[0]

    return jax.vmap(jax.vmap(solve, (None, None, 1), 1))(factor.matrix, damping, x)


def zero_figures(structs: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, LayerDiagnostics]:
    """Zeros for stacks of these shapes, before any step."""

    def of_stack(struct: jax.ShapeDtypeStruct) -> LayerDiagnostics:
        return LayerDiagnostics(
            *(jnp.zeros(struct.shape[:1], struct.dtype) for _ in LayerDiagnostics._fields)
        )

    return {name: of_stack(struct) for name, struct in structs.items()}
