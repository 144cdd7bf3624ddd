"""Which axes of every leaf are a matrix: as a table, and as `optax.contrib.muon` takes it."""

from collections.abc import Callable
from typing import Any

import jax
import optax.contrib

from optax_curv.layers import Layers
from optax_curv.preconditioners._stacks.matrices import LeafAxes as LeafAxes
from optax_curv.preconditioners._stacks.matrices import MatrixAxes as MatrixAxes
from optax_curv.preconditioners._stacks.matrices import axes_of_leaves
from optax_curv.preconditioners._transformation.trees import require_parameters
from optax_curv.typing import AdamFor, Stacked, Tree


def matrix_axes(
    params: Tree,
    layers: Layers | None = None,
    *,
    adam_for: AdamFor | None = None,
    stacked: Stacked | None = None,
) -> MatrixAxes:
    """Tells what a method for matrices sees in each leaf: stack, rows, columns, who takes it, why.

    With `layers` every kernel of a dense or convolutional layer is a stack of matrices
    [*stack, in, out] as the traced loss uses it: heads lie among the rows or the columns as the
    contraction says, the window of a convolution among the rows, groups, scanned blocks and experts
    in the stack. Biases, scales, embeddings and leaves in no layer go to Adam.

    Without `layers` leaves named bias, scale, b, beta or gamma go to Adam, and so do those of rank
    below 2. A leaf of rank 2 is a matrix, one of higher rank is folded at the axis that makes it
    most nearly square. `shampoo`, `soap` and the like follow this table.

    Args:
      params: parameters, or a tree of their shapes.
      layers: from `find_layers` for the same parameters; None: by names and shapes.
      adam_for: a function of a leaf's path and the leaf, or a prefix of the parameters' tree, with
        values True or "adam" for Adam, False for the rule above, or "matrix_axes" for the method
        whatever the rank.
      stacked: how many leading axes of each leaf count matrices: an int or bool for all leaves, a
        prefix of the tree with them, or a function of the parameters that returns one. Layers say
        it of their kernels themselves.

    Returns:
      A `MatrixAxes`, which iterates over rows of type `LeafAxes`; print it.

    Raises:
      ValueError: for layers of another model, labels of another kind, and labels that miss a leaf.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> params = {"query": {"kernel": jnp.ones((32, 4, 8)), "bias": jnp.ones((4, 8))}}
      >>> print(optax_curv.matrix_axes(params))
      leaf                 shape       stack  matrix   taken by    why
      ['query']['bias']    (4, 8)      -      -        adam        named bias
      ['query']['kernel']  (32, 4, 8)  -      32 × 32  the method  folded to be most nearly square
    """
    require_parameters("matrix_axes", params, complex_leaves=True)
    return axes_of_leaves("matrix_axes", params, layers=layers, adam_for=adam_for, stacked=stacked)


def muon_dimension_numbers(layers: Layers) -> Callable[[Tree], Tree]:
    """The axes of every kernel for `optax.contrib.muon(..., muon_weight_dimension_numbers=...)`.

    They say the same as `matrix_axes` with `layers`: which axes are contracted and which are
    outputs; all others are a stack. None stands for leaves that Muon leaves to Adam, and for
    kernels one of whose axes holds two meanings, as the outputs of a grouped convolution do:
    Muon's numbers name whole axes only.

    Args:
      layers: from `find_layers`.

    Returns:
      A function of the parameters that returns a tree like them, as Muon takes it.

    Raises:
      ValueError: in that function, for layers of another model.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_curv
      >>> params = {"query": jnp.ones((6, 2, 3))}
      >>> loss = lambda params, x: jnp.mean(jnp.einsum("nd,dhk->nhk", x, params["query"]) ** 2)
      >>> layers = optax_curv.find_layers(loss, params, jnp.ones((8, 6)))
      >>> numbers = optax_curv.muon_dimension_numbers(layers)
      >>> numbers(params)["query"]
      MuonDimensionNumbers(reduction_axis=(0,), output_axis=(1, 2))
      >>> tx = optax.contrib.muon(0.02, muon_weight_dimension_numbers=numbers)
    """

    def of_leaf(row: LeafAxes) -> Any:
        if not row.is_matrix or row.split != row.shape:
            return None
        return optax.contrib.MuonDimensionNumbers(row.rows, row.columns)

    def of_tree(params: Tree) -> Tree:
        rows = axes_of_leaves("muon_dimension_numbers", params, layers=layers)
        return jax.tree.unflatten(jax.tree.structure(params), list(map(of_leaf, rows)))

    return of_tree
