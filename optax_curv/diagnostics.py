"""What optimizer states know of curvature, as a table and as a plot. Outside `jax.jit` only."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_curv import layers
from optax_curv.linalg import _checks as checks


class FactorSpectrum(NamedTuple):
    """The eigenvalues of one factor that a state keeps.

    Attributes:
      state: name of the state's type.
      name: the layer, or the key path of the leaf.
      factor: "input_factor", "output_factor" of a layer, "axis 0", … of a leaf, "block 1, axis 0"
        of a cut one, "diagonal", "low_rank" of a whole tree.
      eigenvalues: magnitudes in falling order, float [*stack, d]; singular values where the factor
        is not symmetric, as the Q of Kronecker PSGD.
    """

    state: str
    name: str
    factor: str
    eigenvalues: np.ndarray


def _is_ours(x) -> bool:
    return (
        hasattr(x, "_fields")
        and hasattr(x, "total_notfinite")
        and type(x).__module__.startswith("optax_curv.")
    )


def _states(opt_state) -> list:
    """Those of this package within a state, outer before inner."""
    found = []

    def visit(x):
        if _is_ours(x):
            found.append(x)
            for field in x:
                jax.tree.map(visit, field, is_leaf=_is_ours)

    jax.tree.map(visit, opt_state, is_leaf=_is_ours)
    return found


def _magnitudes(factor) -> np.ndarray:
    """Of a factor [*stack, d, d] or a diagonal one [*stack, d]; a square stack of diagonals looks dense."""
    factor = np.asarray(checks.widen(factor))
    if factor.ndim >= 2 and factor.shape[-1] == factor.shape[-2]:
        return np.linalg.svd(factor, compute_uv=False)
    return -np.sort(-np.abs(factor), axis=-1)


def _place(path) -> tuple[str, str]:
    """(layer or leaf, factor) of an array among a state's factors."""
    last = path[-1]
    if isinstance(last, jax.tree_util.GetAttrKey):
        return path[0].key, last.name
    if len(path) > 1 and isinstance(path[-2], jax.tree_util.SequenceKey):
        return jax.tree_util.keystr(path[:-2]), f"block {path[-2].idx}, axis {last.idx}"
    return jax.tree_util.keystr(path[:-1]) or "the root", f"axis {last.idx}"


def factor_spectra(opt_state) -> list[FactorSpectrum]:
    """The eigenvalues of every factor in a state.

    Args:
      opt_state: a state of this package, or any that holds some.

    Returns:
      One `FactorSpectrum` a factor.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> state = optax_curv.kron_psgd(0.1, init_scale=2.0).init({"w": jnp.ones((3, 2))})
      >>> for spectrum in optax_curv.diagnostics.factor_spectra(state):
      ...     print(spectrum.name, spectrum.factor, spectrum.eigenvalues.round(2))
      ['w'] axis 0 [1.41 1.41 1.41]
      ['w'] axis 1 [1.41 1.41]
    """
    spectra = []
    for state in _states(opt_state):
        method = type(state).__name__
        factors = getattr(state, "factors", None)
        factors = dict(factors) if isinstance(factors, Mapping) else factors
        for path, factor in jax.tree.leaves_with_path(factors):
            if jnp.issubdtype(factor.dtype, jnp.inexact):  # a layer's factors carry their count
                spectra.append(FactorSpectrum(method, *_place(path), _magnitudes(factor)))
        if hasattr(state, "diagonal"):
            r_u, r_v = (np.asarray(jnp.linalg.qr(x, mode="r")) for x in (state.u, state.v))
            low_rank = np.linalg.svd(r_u @ r_v.T, compute_uv=False)
            for factor, values in (
                ("diagonal", _magnitudes(state.diagonal)),
                ("low_rank", low_rank),
            ):
                spectra.append(FactorSpectrum(method, "all parameters", factor, values))
    return spectra


def curvature_table(opt_state) -> str:
    """A table of the states of this package: one line a state, one for each of its factors.

    The condition is the largest over the smallest eigenvalue; the effective rank is their sum over
    the largest, from 1 (one direction has all curvature) to the size (all alike). Of a stack of
    slices the worst condition and the least rank are given. `layer_diagnostics` tells of K-FAC's
    damping.

    Args:
      opt_state: a state of this package, or any that holds some.

    Returns:
      The table; print it.

    Raises:
      ValueError: if there is no state of this package.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_curv
      >>> tx = optax.chain(optax_curv.scale_by_kron_psgd(init_scale=1.0), optax.scale(-0.1))
      >>> print(optax_curv.diagnostics.curvature_table(tx.init({"w": jnp.ones((3, 2))})))
      ScaleByKronPsgdState: 0 steps, 0 skipped
        name   factor  size  mean  largest  condition  effective rank
        ['w']  axis 0  3     1     1        1          3
        ['w']  axis 1  2     1     1        1          2
    """
    states = _states(opt_state)
    if not states:
        raise ValueError(
            f"curvature_table: expected an optimizer state that holds a state of optax_curv, got {type(opt_state)}."
        )
    lines = []
    for state in states:
        figures = [
            f"{int(jnp.max(state.count))} steps",
            f"{int(jnp.max(state.total_notfinite))} skipped",
        ]
        for name in ("damping", "reduction_ratio", "precond_norm"):
            if hasattr(state, name):
                figures.append(f"{name} {float(getattr(state, name)):.3g}")
        lines.append(f"{type(state).__name__}: {', '.join(figures)}")
        nested = {"inner", "fallback"}.intersection(state._fields)
        rows = [
            _row(spectrum) for spectrum in factor_spectra(state._replace(**dict.fromkeys(nested)))
        ]
        if rows:
            table = layers.aligned(
                [
                    ("name", "factor", "size", "mean", "largest", "condition", "effective rank"),
                    *rows,
                ]
            )
            lines += ["  " + line for line in table]
    return "\n".join(lines)


def _row(spectrum: FactorSpectrum) -> tuple[str, ...]:
    values = spectrum.eigenvalues
    largest, smallest = values.max(-1, initial=0), values.min(-1, initial=np.inf)
    condition = np.divide(largest, smallest, out=np.full(largest.shape, np.inf), where=smallest > 0)
    rank = np.divide(values.sum(-1), largest, out=np.zeros(largest.shape), where=largest > 0)
    size = "×".join(map(str, values.shape))
    figures = (values.mean(), largest.max(), condition.max(), rank.min())
    return spectrum.name, spectrum.factor, size, *(f"{float(figure):.3g}" for figure in figures)


def plot_curvature(opt_state, axes: Any = None):
    """Draws the spectrum of every factor with matplotlib: eigenvalues over the largest, in falling order, logarithmic.

    A flat line treats all directions alike; the steeper it falls, the more there is to
    precondition.

    Args:
      opt_state: a state of this package, or any that holds some.
      axes: where to draw; None: on a new figure.

    Returns:
      The axes.

    Raises:
      ValueError: if no state has factors.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> state = optax_curv.kron_psgd(0.1, init_scale=1.0).init({"w": jnp.ones((3, 2))})
      >>> optax_curv.diagnostics.plot_curvature(state).get_ylabel()
      'eigenvalue / largest'
    """
    spectra = factor_spectra(opt_state)
    if not spectra:
        raise ValueError(
            "plot_curvature: expected an optimizer state with factors of curvature, found none in it."
        )
    if axes is None:
        from matplotlib.figure import Figure

        axes = Figure(figsize=(7, 4.5), layout="constrained").add_subplot()
    styles = {}
    for spectrum in spectra:
        values = spectrum.eigenvalues.reshape(-1, spectrum.eigenvalues.shape[-1])
        relative = values / np.maximum(values[:, :1], np.finfo(values.dtype).tiny)
        position = (np.arange(values.shape[1]) + 0.5) / values.shape[1]
        style = styles.setdefault(spectrum.factor, ("-", "--", ":", "-.")[len(styles) % 4])
        label = f"{spectrum.name} {spectrum.factor}"
        axes.plot(
            position, relative.T, style, label=label, marker="." if values.shape[1] < 3 else None
        )
    axes.set(
        xlabel="position in the spectrum (0: largest, 1: smallest)",
        ylabel="eigenvalue / largest",
        yscale="log",
    )
    axes.set_ylim(bottom=1e-8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=1 + len(spectra) // 12)
    return axes
