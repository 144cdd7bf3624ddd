"""What a K-FAC state says about its layers, as a table."""

from typing import NamedTuple

import jax


class LayerDiagnostics(NamedTuple):
    """What the latest inversion and the latest direction say about every layer; the worst over the slices of a stack.

    Attributes:
      input_damping: what was added to the diagonal of A, retries included, float [layers].
      output_damping: what was added to the diagonal of G, float [layers].
      input_condition: condition number of the damped A, float [layers]. Under "cholesky" the square of its largest over
        its smallest pivot, which is a lower bound.
      output_condition: that of the damped G, float [layers].
      trace_ratio: (tr A/d_A) / (tr G/d_G), which is π², float [layers].
      model_ratio: ⟨u, F u⟩ / ⟨u, ∇⟩ of the layer's direction u under the current damped factors, 1 for exact inverses,
        float [layers].
    """

    input_damping: jax.Array
    output_damping: jax.Array
    input_condition: jax.Array
    output_condition: jax.Array
    trace_ratio: jax.Array
    model_ratio: jax.Array


def layer_diagnostics(opt_state) -> str:
    """A table of the K-FAC layers in an optimizer's state: damping, condition, trace and model ratios.

    The figures themselves are in the state of `scale_by_kfac`, in `diagnostics`; `LayerDiagnostics` defines them. A
    damping above the one asked for, or a condition near the inverse of the machine epsilon, tells of a factor that is
    hardly definite; a model ratio far from 1 tells of stale inverses.

    Args:
      opt_state: the state of `scale_by_kfac`, alone or anywhere within the state of a chain, outside `jax.jit`.

    Returns:
      The table, one line a layer; print it.

    Raises:
      ValueError: if the state holds no such diagnostics.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> layer = optax_curv.Layer("dense", "dense", "['w']", None, in_dim=2, out_dim=1)
      >>> tx = optax_curv.kfac(0.1, optax_curv.Layers([layer]), damping=1.0)
      >>> params = {"w": jnp.ones((2, 1))}
      >>> statistic = optax_curv.KroneckerFactors(jnp.diag(jnp.array([3.0, 5.0])), jnp.eye(1), jnp.int32(1))
      >>> _, state = tx.update(params, tx.init(params), params, curvature={"dense": statistic})
      >>> print(optax_curv.layer_diagnostics(state))
      layer  input_damping  output_damping  input_condition  output_condition  trace_ratio  model_ratio
      dense  2              0.5             1.4              1                 4            1
    """

    def is_kfac(x):
        return isinstance(getattr(x, "diagnostics", None), LayerDiagnostics)

    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_kfac) if is_kfac(x)]
    if not found:
        raise ValueError(
            "layer_diagnostics: expected the state of scale_by_kfac, found no diagnostics of layers in it."
        )
    rows = [("layer", *LayerDiagnostics._fields)]
    for state in found:
        for name, *figures in sorted(zip(state.factors, *state.diagnostics, strict=True), key=lambda row: row[0]):
            rows.append((name, *(f"{float(figure):.3g}" for figure in figures)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
