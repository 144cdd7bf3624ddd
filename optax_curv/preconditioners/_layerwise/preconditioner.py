"""K-FAC's blocks as a preconditioner of another solve, such as that of Gauss-Newton."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from optax_curv.layers import Layers
from optax_curv.linalg._compiler import not_recomputed
from optax_curv.preconditioners._layerwise.blocks import Blocks, precondition
from optax_curv.preconditioners._layerwise.factors import LayerFactors, mean_eigenvalue
from optax_curv.preconditioners._layerwise.members import present_layers
from optax_curv.preconditioners._layerwise.statistics import of_kernels
from optax_curv.preconditioners._layerwise.view import LayerStacks, averaged_of
from optax_curv.preconditioners._transformation.soundness import is_squarable
from optax_curv.typing import Schedulable

STATISTIC_BOUND = 10.0  # the default of `scale_by_kfac`


def layer_view(method: str, layers: Layers, tree: Any) -> LayerStacks:
    """The layers of a tree as stacks; leaves that no layer covers are stacks of their own."""
    return LayerStacks(method, tree, present_layers(method, layers, tree, True))


def layer_preconditioner(
    view: LayerStacks,
    factors: Mapping[str, LayerFactors],
    count: jax.Array,
    curvature: Mapping[str, Any],
    decay: Schedulable,
    damping: jax.Array,
) -> tuple[dict[str, LayerFactors], jax.Array, Callable[[Any], Any]]:
    """The averaged factors, whether what entered is sound, and r ↦ (A ⊗ G + λI)⁻¹ r of trees.

    A leaf that no layer covers is divided by the mean eigenvalue of all blocks plus λ.

    Args:
      view: the layers of the gradients.
      factors: the averages before the step, by stack.
      count: steps taken.
      curvature: the statistics of the step, by layer.
      decay: of the averages.
      damping: λ.
    """
    found = view.factors(of_kernels(curvature))
    sound = not_recomputed(is_squarable(found))
    new, _ = averaged_of(factors, found, count, decay, STATISTIC_BOUND, sound)
    inverses, _ = Blocks(view, new, damping, "pi").invert("cholesky")
    mean = mean_eigenvalue(new) + damping

    def apply(r: Any) -> Any:
        stacks = view.take(r)
        ours = {name: stacks[name] for name in view.layers}
        rest = {name: x / mean.astype(x.dtype) for name, x in stacks.items() if name not in ours}
        return view.give({**precondition(inverses, ours), **rest}, r)

    return new, sound, apply
