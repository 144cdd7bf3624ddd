import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_curv
from optax_curv.diagnostics import (
    CurvatureState,
    curvature_table,
    factor_spectra,
    plot_curvature,
)
from optax_curv.linalg.factors import Dense, Diagonal

LAYER = optax_curv.Layer("dense", "dense", "['w']", None, in_dim=2, out_dim=1)
PARAMS = {"w": jnp.ones((2, 1))}
SAME = 1e-5  # relative, against dense factors in float64


def kfac_state():
    tx = optax_curv.kfac(0.1, optax_curv.Layers([LAYER]), damping=1.0)
    statistic = optax_curv.KroneckerFactors(
        jnp.diag(jnp.array([3.0, 6.0])), 5 * jnp.eye(1), jnp.int32(1)
    )
    return tx.update(PARAMS, tx.init(PARAMS), PARAMS, curvature={"dense": statistic})[1]


class Written(tuple):
    """A state with the factors that a test writes into it."""

    count, total_notfinite = jnp.int32(3), jnp.int32(1)

    def __new__(cls, factors):
        state = super().__new__(cls)
        state.factors = factors
        return state

    def spectra(self):
        return self.factors


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def test_dense_or_diagonal_is_told_by_type_or_by_rank_and_never_by_size():
    square = random(3, 3)  # three diagonals of three numbers, or one dense factor
    state = Written(
        {
            "a | b | c": (jnp.asarray(square), Diagonal(jnp.asarray(square))),
            "d": {"input_factor": Dense(jnp.asarray(square)[None]), "output_factor": square[None]},
        }
    )
    found = {(s.name, s.factor): s.eigenvalues for s in factor_spectra(state)}
    assert list(found) == [
        *((name, axis) for name in "abc" for axis in ("axis 0", "axis 1")),
        *(("d", factor) for factor in ("input_factor", "output_factor")),
    ]
    falling = -np.sort(-np.abs(square), axis=-1)
    for row, name in enumerate("abc"):
        for axis in ("axis 0", "axis 1"):
            np.testing.assert_array_equal(found[name, axis], falling[row])
    for factor in ("input_factor", "output_factor"):
        np.testing.assert_allclose(found["d", factor], np.linalg.svd(square)[1], rtol=SAME)


def test_slices_of_one_leaf_and_blocks_have_a_line_each():
    state = Written(
        {
            "a ×2 | b in 2 blocks of 2": (jnp.asarray(random(6, 2)),),
            "a ×2 | b in 1 block of 1": (jnp.asarray(random(3, 1)),),
        }
    )
    found = {(s.name, s.factor): s.eigenvalues.shape for s in factor_spectra(state)}
    assert found == {
        **{("a", f"block {block}, axis 0"): (2, 2) for block in (0, 1)},
        **{("b", f"block {block}, axis 0"): (2,) for block in (0, 1)},
        ("a", "block 2, axis 0"): (2, 1),
        ("b", "block 2, axis 0"): (1,),
    }


def test_keys_that_look_like_a_name_of_a_stack_are_keys():
    keys = ["a | b", "c ×3", " in 2 blocks of ", "d \\| in\\ 2 blocks of 2", "|", "plain"]
    params = {key: jnp.asarray(random(2, 2)) for key in keys}
    for tx in (optax_curv.scale_by_shampoo(block_size=1), optax_curv.soap(0.1)):
        state = tx.update(params, tx.init(params), params)[1]
        assert {s.name for s in factor_spectra(state)} == {f"[{key!r}]" for key in keys}
    tx = optax_curv.scale_by_kron_psgd()
    state = tx.update(params, tx.init(params), params)[1]
    factors = optax_curv.axis_factors(state, params)
    assert factors.keys() == params.keys()
    again = optax_curv.with_axis_factors(state, params, factors)
    assert jax.tree.structure(again) == jax.tree.structure(state)


def test_the_tables_as_dicts_have_the_numbers_of_their_lines():
    state = kfac_state()
    for table in (curvature_table, optax_curv.layer_diagnostics):
        numbers, lines = table(state, as_dict=True), table(state).splitlines()
        rows = [line.split() for line in lines if line.split()[0] == "dense"]
        found = numbers["dense"]
        found = list(found.values()) if table is curvature_table else [found]
        for row, values in zip(rows, found, strict=True):
            values = list(values.values())
            assert [f"{x:.3g}" for x in values] == row[-len(values) :]


def test_a_sweep_is_refused_with_advice():
    with pytest.raises(ValueError, match=r"got \(2, 1, 3, 3\). Of the states of a sweep take one"):
        factor_spectra(Written({"a": (jnp.ones((2, 1, 3, 3)),)}))


def test_figures_are_those_of_the_worst_slice():
    values = jnp.array([[8.0, 2.0], [3.0, 1.0]])
    line = curvature_table(Written({"a ×2": (Diagonal(values),)})).splitlines()[-1].split()
    #                      name factor    size  mean  largest smallest condition rank
    assert line == ["a", "axis", "0", "2×2", "3.5", "8", "1", "4", "1.25"]


@pytest.mark.parametrize("method", ["shampoo", "soap"])
@pytest.mark.parametrize("where", ["alone", "in a chain"])
def test_figures_of_shampoo_and_soap_are_those_of_dense_factors(method, where):
    """The factors are averages of G Gᵀ and Gᵀ G, of gradients that the test has itself."""
    tx = getattr(optax_curv, method)(0.1)
    if where == "in a chain":
        tx = optax.chain(optax.clip_by_global_norm(1e9), tx)
    params = {"b": jnp.ones(3), "v": jnp.ones((3, 5)), "w": jnp.ones((3, 5))}
    state, decay, weights = tx.init(params), 0.95, 0.0
    dense = {name: (np.zeros((3, 3)), np.zeros((5, 5))) for name in ("v", "w")}
    for step in range(6):
        grads = {
            name: jnp.asarray(
                np.random.default_rng([step, len(name), ord(name)]).normal(size=x.shape), "float32"
            )
            for name, x in params.items()
        }
        _, state = tx.update(grads, state, params)
        weights = decay * weights + 1
        for name, (rows, columns) in dense.items():
            g = np.asarray(grads[name], float)
            dense[name] = decay * rows + g @ g.T, decay * columns + g.T @ g
    found = {(s.name, s.factor): s.eigenvalues for s in factor_spectra(state)}
    assert len(found) == 4
    for name, factors in dense.items():
        for axis, factor in enumerate(factors):
            values = found[f"['{name}']", f"axis {axis}"]
            expected = np.linalg.eigvalsh(factor / weights)[::-1]
            np.testing.assert_allclose(values, expected, rtol=SAME)
            np.testing.assert_allclose(values[0] / values[-1], np.linalg.cond(factor), rtol=SAME)


def test_the_table_has_a_line_for_each_state_and_each_factor():
    lines = [line.split() for line in curvature_table(kfac_state()).splitlines()]
    assert lines[0] == ["ScaleByKFACState:", "1", "steps,", "0", "skipped"]
    assert lines[2:] == [
        ["dense", "input_factor", "2", "4.5", "6", "3", "2", "1.5"],
        ["dense", "output_factor", "1", "5", "5", "5", "1", "1"],
    ]


def test_an_optimizer_of_nnx_shows_its_state():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax_curv.shampoo(0.1), wrt=nnx.Param)
    assert len(factor_spectra(optimizer.opt_state)) == 2


def test_states_of_others_are_no_states_of_ours():
    state = optax.apply_if_finite(optax.adam(0.1), 3).init(PARAMS)
    assert not isinstance(state, CurvatureState)


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
