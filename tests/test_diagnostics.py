import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_curv
from optax_curv.diagnostics import curvature_table, factor_spectra, plot_curvature

LAYER = optax_curv.Layer("dense", "dense", "['w']", None, in_dim=2, out_dim=1)
PARAMS = {"w": jnp.ones((2, 1))}


def kfac_state():
    tx = optax_curv.kfac(0.1, optax_curv.Layers([LAYER]), damping=1.0)
    statistic = optax_curv.KroneckerFactors(
        jnp.diag(jnp.array([3.0, 6.0])), 5 * jnp.eye(1), jnp.int32(1)
    )
    return tx.update(PARAMS, tx.init(PARAMS), PARAMS, curvature={"dense": statistic})[1]


def test_spectra_are_those_of_the_factors():
    matrix = np.random.default_rng(0).normal(size=(2, 3, 3)).astype("float32")
    state = optax_curv.scale_by_kron_psgd(stacked=1).init(
        {"a": jnp.ones((2, 3, 3)), "b": jnp.ones(5)}
    )
    state = state._replace(
        factors={"a": (jnp.asarray(matrix), jnp.asarray(matrix)), "b": (jnp.arange(5.0),)}
    )
    found = {(s.name, s.factor): s.eigenvalues for s in factor_spectra((state, optax.EmptyState()))}
    assert list(found) == [("['a']", "axis 0"), ("['a']", "axis 1"), ("['b']", "axis 0")]
    np.testing.assert_allclose(found["['a']", "axis 1"], np.linalg.svd(matrix)[1], rtol=1e-6)
    np.testing.assert_array_equal(found["['b']", "axis 0"], [4, 3, 2, 1, 0])


def test_the_table_has_a_line_for_each_state_and_each_factor():
    lines = [line.split() for line in curvature_table(kfac_state()).splitlines()]
    assert lines[0] == ["ScaleByKFACState:", "1", "steps,", "0", "skipped"]
    assert lines[2:] == [
        ["dense", "input_factor", "2", "4.5", "6", "2", "1.5"],
        ["dense", "output_factor", "1", "5", "5", "1", "1"],
    ]


def test_blocks_of_a_cut_leaf_are_named():
    state = optax_curv.scale_by_kron_psgd(block_size=2).init(jnp.ones((4, 2)))
    assert [s.factor for s in factor_spectra(state)] == [
        f"block {b}, axis {a}" for b in (0, 1) for a in (0, 1)
    ]


@pytest.mark.parametrize(
    ("tx", "rows"),
    [
        (optax_curv.dense_psgd(0.1), 1),
        (optax_curv.lra_psgd(0.1, rank=1), 2),
        (optax_curv.branch_fisher(0.1), 0),
        (optax_curv.ekfac(0.1, optax_curv.Layers([LAYER])), 2),
        (optax_curv.kfac(None, optax_curv.Layers([LAYER])), 2),
        (optax_curv.kron_psgd(0.1, precond_dtype="bfloat16"), 2),
    ],
)
def test_every_method_has_its_lines(tx, rows):
    state = tx.init(PARAMS)
    spectra = factor_spectra(state)
    assert len(spectra) == rows
    table = curvature_table(state)
    assert all(table.count(f"  {s.factor}  ") == 1 for s in spectra)


def test_adaptive_damping_is_in_the_table():
    table = curvature_table(
        optax_curv.kfac(None, optax_curv.Layers([LAYER]), damping=0.25).init(PARAMS)
    )
    assert table.startswith(
        "AdaptDampingState: 0 steps, 0 skipped, damping 0.25, reduction_ratio 1\n"
    )


def test_the_plot_has_one_line_a_slice_each_from_one_downwards():
    axes = plot_curvature(jax.tree.map(lambda x: x, kfac_state()))
    assert [line.get_label() for line in axes.lines] == [
        "dense input_factor",
        "dense output_factor",
    ]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [1, 0.5])


def test_a_state_without_curvature_is_refused():
    state = optax.adam(0.1).init(PARAMS)
    with pytest.raises(ValueError, match="holds a state of optax_curv"):
        curvature_table(state)
    with pytest.raises(ValueError, match="found none"):
        plot_curvature(state)
