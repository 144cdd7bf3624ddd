"""Diagnostics show what optimizer states know of curvature, as a table and as a plot.

They run outside `jax.jit` only, and read states through the protocol `CurvatureState`.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, overload, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from optax_curv import layers
from optax_curv.linalg.factors import Dense, Diagonal
from optax_curv.preconditioners._stacks.names import parts_of

Factor: TypeAlias = jax.Array | Dense | Diagonal
Factors: TypeAlias = tuple[Factor, ...] | Mapping[str, Factor]


@runtime_checkable
class CurvatureState(Protocol):
    """Protocol of the states that diagnostics read; that of every method of this package is one.

    Attributes:
      count: steps taken, int32 [].
      total_notfinite: steps skipped because a number was not finite, int32 [].
    """

    count: Any  # a named tuple's own method in the eyes of a type checker
    total_notfinite: Any

    def spectra(self) -> Mapping[str, Factors]:
        """The factors that the state keeps, by stack.

        Returns:
          A mapping from a stack's name, which lists its members, to its factors: a tuple with one
          entry an axis, or a mapping from their names. A factor of N tensors is a `linalg.factors`
          `Dense` or `Diagonal`, or an array, [N, d, d] if dense and [N, d] if diagonal. A state
          without factors returns an empty mapping.
        """
        ...


COLUMNS = ("name", "factor", "size", "mean", "largest", "smallest", "condition", "effective rank")


class FactorSpectrum(NamedTuple):
    """The eigenvalues of one factor that a state keeps.

    Attributes:
      state: name of the state's type.
      name: the layer, or the key path of the leaf.
      factor: "input_factor", "output_factor" of a layer, "axis 0", … of a leaf, "block 1, axis 0"
        of a cut one, or another name that the method gives.
      eigenvalues: magnitudes in falling order, float64 [d], or [slices, d] of a stacked leaf or
        layer; singular values where the factor is not symmetric, as the Q of Kronecker PSGD.
    """

    state: str
    name: str
    factor: str
    eigenvalues: np.ndarray


def _is_ours(x: Any) -> bool:
    return isinstance(x, CurvatureState)


def _holds_an_array(x: Any) -> bool:
    """Whether `x` is a variable in which `flax.nnx.Optimizer` keeps an array of the state."""
    return hasattr(x, "get_value") and hasattr(x, "set_value")


def _states(opt_state: Any) -> list[CurvatureState]:
    """The states of this package within a state, outer before inner."""
    opt_state = jax.tree.map(
        lambda x: x.get_value() if _holds_an_array(x) else x, opt_state, is_leaf=_holds_an_array
    )
    found = []

    def visit(x):
        if _is_ours(x):
            found.append(x)
            for field in x:  # a named tuple: a method may keep the state of another one within
                jax.tree.map(visit, field, is_leaf=_is_ours)

    jax.tree.map(visit, opt_state, is_leaf=_is_ours)
    return found


def _magnitudes(rows: np.ndarray, dense: bool) -> np.ndarray:
    """The magnitudes [N, d] of factors [N, d, d] or [N, d], in falling order and in float64."""
    # In the factors' own float32 an eigenvalue below 1e-7 of the largest would be rounding.
    wide = np.complex128 if np.iscomplexobj(rows) else np.float64
    if dense:
        return np.linalg.svd(rows.astype(wide), compute_uv=False)
    return -np.sort(-np.abs(rows.astype(wide)), axis=-1)


def _array_of(factor: Factor) -> tuple[jax.Array, bool]:
    """The array of a factor, and whether it is dense: by its type, or by its rank beside [N]."""
    if isinstance(factor, Dense):
        return factor.matrix, True
    if isinstance(factor, Diagonal):
        return factor.vector, False
    if jnp.ndim(factor) not in (2, 3):
        raise ValueError(
            f"diagnostics: expected factors [N, d, d] or [N, d], got {jnp.shape(factor)}. Of the "
            "states of a sweep take one, jax.tree.map(lambda x: x[0], state)."
        )
    return factor, jnp.ndim(factor) == 3


def _spectra_of(state: CurvatureState) -> Iterator[FactorSpectrum]:
    """The spectra of one state, not of those within it."""
    method = type(state).__name__
    blocks_before: dict[str, int] = {}
    for stack, factors in state.spectra().items():
        named = dict(factors) if isinstance(factors, Mapping) else dict(_by_axis(factors))
        blocks_here: dict[str, int] = {}
        found = []
        for factor, array in named.items():
            array, dense = _array_of(array)
            for name, block, rows in parts_of(stack, array):
                values = _magnitudes(np.asarray(rows), dense)
                values = values[0] if len(values) == 1 else values
                if block is not None:
                    blocks_here[name] = block + 1
                    block += blocks_before.get(name, 0)
                found.append((name, block, factor, values))
        for name, count in blocks_here.items():
            blocks_before[name] = blocks_before.get(name, 0) + count
        # Members and blocks one after the other, each with all its factors.
        places = list(dict.fromkeys((name, block) for name, block, _, _ in found))
        for name, block, factor, values in sorted(found, key=lambda x: places.index(x[:2])):
            label = factor if block is None else f"block {block}, {factor}"
            yield FactorSpectrum(method, name, label, values)


def _by_axis(factors: tuple[Factor, ...]) -> Iterator[tuple[str, Factor]]:
    for axis, factor in enumerate(factors):
        yield f"axis {axis}", factor


def factor_spectra(opt_state: Any) -> list[FactorSpectrum]:
    """Computes the eigenvalues of every factor in a state, on the host and in float64.

    Args:
      opt_state: a state of this package, or any that holds some.

    Returns:
      One `FactorSpectrum` a factor.

    Raises:
      ValueError: under `jax.jit`.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> state = optax_curv.scale_by_kron_psgd(init_scale=2.0).init({"w": jnp.ones((3, 2))})
      >>> for spectrum in optax_curv.diagnostics.factor_spectra(state):
      ...     print(spectrum.name, spectrum.factor, spectrum.eigenvalues.round(2))
      ['w'] axis 0 [1.41 1.41 1.41]
      ['w'] axis 1 [1.41 1.41]
    """
    states = _states(opt_state)
    layers.require_concrete("factor_spectra", states)
    return [spectrum for state in states for spectrum in _spectra_of(state)]


@overload
def curvature_table(opt_state: Any, *, as_dict: Literal[False] = False) -> str: ...
@overload
def curvature_table(
    opt_state: Any, *, as_dict: Literal[True]
) -> dict[str, dict[str, dict[str, float]]]: ...
def curvature_table(
    opt_state: Any, *, as_dict: bool = False
) -> str | dict[str, dict[str, dict[str, float]]]:
    """Writes a table of the states of this package, with a line for each of their factors.

    The condition is the largest over the smallest eigenvalue; the effective rank is their sum over
    the largest, from 1 (one direction has all curvature) to the size (all alike). Of a stack of
    slices the worst condition and the least rank are given, and the mean, largest and smallest of
    all. Of a factor that is not symmetric they are those of its singular values.
    `layer_diagnostics` tells of K-FAC's damping.

    Args:
      opt_state: a state of this package, or any that holds some.
      as_dict: whether to return the numbers instead, for a log.

    Returns:
      The table; print it. With `as_dict` {name: {factor: {column: number}}}, in the table's order,
      with the columns size (of one slice), mean, largest, smallest, condition and effective rank.

    Raises:
      ValueError: if there is no state of this package, or under `jax.jit`.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_curv
      >>> tx = optax.chain(optax_curv.scale_by_kron_psgd(init_scale=1.0), optax.scale(-0.1))
      >>> print(optax_curv.diagnostics.curvature_table(tx.init({"w": jnp.ones((3, 2))})))
      ScaleByKronPsgdState: 0 steps, 0 skipped
        name   factor  size  mean  largest  smallest  condition  effective rank
        ['w']  axis 0  3     1     1        1         1          3
        ['w']  axis 1  2     1     1        1         1          2
    """
    states = _states(opt_state)
    if not states:
        raise ValueError(
            "curvature_table: expected an optimizer state that holds a state of optax_curv, got "
            f"a {type(opt_state).__name__} without any. Pass what init or update returned."
        )
    layers.require_concrete("curvature_table", states)
    if as_dict:
        numbers: dict[str, dict[str, dict[str, float]]] = {}
        for state in states:
            for spectrum in _spectra_of(state):
                figures = (spectrum.eigenvalues.shape[-1], *_figures(spectrum.eigenvalues))
                row: dict[str, float] = dict(zip(COLUMNS[2:], map(float, figures), strict=True))
                numbers.setdefault(spectrum.name, {})[spectrum.factor] = row
        return numbers
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
        rows = [_row(spectrum) for spectrum in _spectra_of(state)]
        if rows:
            lines += ["  " + line for line in layers.aligned([COLUMNS, *rows])]
    return "\n".join(lines)


def _figures(values: np.ndarray) -> tuple[np.ndarray, ...]:
    """The mean, largest, smallest, condition and effective rank of eigenvalues [*slices, d]."""
    largest, smallest = values.max(-1, initial=0), values.min(-1, initial=np.inf)
    condition = np.divide(largest, smallest, out=np.full(largest.shape, np.inf), where=smallest > 0)
    rank = np.divide(values.sum(-1), largest, out=np.zeros(largest.shape), where=largest > 0)
    return values.mean(), largest.max(), smallest.min(), condition.max(), rank.min()


def _row(spectrum: FactorSpectrum) -> tuple[str, ...]:
    size = "×".join(map(str, spectrum.eigenvalues.shape))
    figures = (f"{float(figure):.3g}" for figure in _figures(spectrum.eigenvalues))
    return spectrum.name, spectrum.factor, size, *figures


def plot_curvature(opt_state: Any, axes: Any = None) -> Any:
    """Draws the spectrum of every factor with matplotlib.

    A line shows the eigenvalues of one factor over its largest one, in falling order, on a
    logarithmic scale. A flat line treats all directions alike; the steeper it falls, the more there
    is to precondition.

    Args:
      opt_state: a state of this package, or any that holds some.
      axes: where to draw; None: on a new figure.

    Returns:
      The axes.

    Raises:
      ValueError: if no state has factors, or under `jax.jit`.

    Examples:
      >>> import jax.numpy as jnp, optax_curv
      >>> state = optax_curv.scale_by_kron_psgd(init_scale=1.0).init({"w": jnp.ones((3, 2))})
      >>> optax_curv.diagnostics.plot_curvature(state).get_ylabel()
      'eigenvalue / largest'
    """
    layers.require_concrete("plot_curvature", _states(opt_state))
    spectra = factor_spectra(opt_state)
    if not spectra:
        raise ValueError(
            "plot_curvature: expected an optimizer state with factors of curvature, found none in "
            f"{type(opt_state)}."
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
