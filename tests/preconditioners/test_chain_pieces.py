import functools
import itertools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import cases

import optax_curv
from optax_curv.preconditioners._stacks.axes import LeafRule
from optax_curv.preconditioners._transformation import bounds
from optax_curv.preconditioners._transformation.transformation import (
    Step,
    counters,
    transformation,
)

DTYPES = ("float32", "bfloat16", "float16")
ROUNDING = {"float32": 1e-6, "bfloat16": 1e-2, "float16": 1e-3}
LARGEST_STEP = 10  # in units of the box: the rounding of an update is relative to the step
PIECES = {
    "bound_by_running_norm": optax_curv.bound_by_running_norm,
    "clip_by_max_abs": lambda: optax_curv.clip_by_max_abs(0.5),
    "normalize_by_rms": lambda: optax_curv.normalize_by_rms(0.2),
    "normalize_by_reference": lambda: optax_curv.normalize_by_reference(optax.scale_by_adam()),
    "keep_params_in_box": lambda: optax_curv.keep_params_in_box(0.25),
    "add_cautious_weight_decay": lambda: optax_curv.add_cautious_weight_decay(0.1),
    "keep_params_norm": optax_curv.keep_params_norm,
    "estimate_gradients": lambda: optax_curv.estimate_gradients(lambda params: params),
}


def tree(dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"matrix": (3, 4), "scalar": (), "tensor": (1, 2, 1, 3, 2), "empty": (0, 2)}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()} | {
        "none": None
    }


@pytest.fixture(params=PIECES)
def piece(request):
    return PIECES[request.param]()


@pytest.mark.parametrize("dtype", DTYPES)
def test_updates_keep_tree_shape_and_dtype_with_and_without_jit(piece, dtype):
    params, updates = tree("float32"), tree(dtype, seed=1)
    state = piece.init(jax.eval_shape(lambda: params))
    state = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), state)
    plain, _ = piece.update(updates, state, params)
    jitted, jitted_state = jax.jit(piece.update)(updates, state, params)
    assert jax.tree.map(lambda u: (u.shape, u.dtype), plain) == jax.tree.map(
        lambda u: (u.shape, u.dtype), updates
    )
    assert jax.eval_shape(lambda: jitted_state) == jax.eval_shape(lambda: state)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(
            a.astype("float32"), b.astype("float32"), rtol=ROUNDING[dtype], atol=1e-6
        )


def test_masked_and_none_leaves_are_left_alone(piece):
    params, updates = tree(), tree(seed=1)
    masked = optax.masked(piece, {name: name == "matrix" for name in updates})
    new, _ = masked.update(updates, masked.init(params), params)
    alone, _ = piece.update(
        {"matrix": updates["matrix"]},
        piece.init({"matrix": params["matrix"]}),
        {"matrix": params["matrix"]},
    )
    np.testing.assert_array_equal(new["tensor"], updates["tensor"])
    np.testing.assert_array_equal(new["matrix"], alone["matrix"])
    assert new["none"] is None


def test_an_update_without_a_leaf_that_params_have_is_left_alone():
    for piece in (PIECES["keep_params_in_box"](), PIECES["estimate_gradients"]()):
        params = {"frozen": jnp.ones(2), "w": jnp.ones(2)}
        new, _ = piece.update({"frozen": None, "w": jnp.ones(2)}, piece.init(params), params)
        assert new["frozen"] is None and new["w"].shape == (2,)


@pytest.mark.parametrize("name", [name for name in PIECES if name != "estimate_gradients"])
def test_zero_updates_stay_zero(name):
    piece, updates = PIECES[name](), jax.tree.map(jnp.zeros_like, tree())
    new, _ = piece.update(updates, piece.init(updates), updates)
    assert all(jnp.all(u == 0) for u in jax.tree.leaves(new))


def test_bounds_may_be_traced_under_vmap():
    u = jnp.array([3.0, -4.0])

    def clipped_and_boxed(bound):
        clip, box = optax_curv.clip_by_max_abs(bound), optax_curv.keep_params_in_box(bound)
        return clip.update(u, clip.init(u))[0], box.update(u, box.init(u), jnp.zeros(2))[0]

    clipped, boxed = jax.jit(jax.vmap(clipped_and_boxed))(jnp.array([1.0, 2.0, 8.0]))
    np.testing.assert_allclose(clipped, [[0.75, -1], [1.5, -2], [3, -4]], rtol=1e-6)
    np.testing.assert_array_equal(boxed, [[1, -1], [2, -2], [3, -4]])


def test_hyperparameters_may_be_injected():
    u = jnp.array([3.0, -4.0])
    tx = optax.inject_hyperparams(optax_curv.clip_by_max_abs)(max_abs=lambda count: 1 + count)
    first, state = tx.update(u, tx.init(u), u)
    second, _ = tx.update(u, state, u)
    np.testing.assert_allclose([first, second], [[0.75, -1], [1.5, -2]], rtol=1e-6)


class TestClipByMaxAbs:
    def test_scales_a_leaf_by_its_largest_entry_and_keeps_its_direction(self):
        clip = optax_curv.clip_by_max_abs(1.0)
        updates = {"large": jnp.array([[2.0, -8.0], [1.0, 4.0]]), "small": jnp.array([0.3, -1.0])}
        new, _ = clip.update(updates, clip.init(updates))
        np.testing.assert_array_equal(new["large"], updates["large"] / 8)
        np.testing.assert_array_equal(new["small"], updates["small"])

    def test_never_exceeds_the_bound_by_rounding(self):
        u = jnp.asarray(np.random.default_rng(0).normal(size=(500, 1)), jnp.float32)
        clip = optax_curv.clip_by_max_abs(0.3)
        new = jax.vmap(lambda u: clip.update(u, clip.init(u))[0])(u)
        assert jnp.all(jnp.abs(new) <= jnp.float32(0.3))

    def test_an_infinite_bound_and_complex_leaves(self):
        u = jnp.array([3 + 4j, 1j])
        for bound, expected in ((jnp.inf, u), (1.0, u / 5)):
            clip = optax_curv.clip_by_max_abs(bound)
            np.testing.assert_allclose(clip.update(u, clip.init(u))[0], expected, rtol=1e-6)

    @pytest.mark.parametrize("max_abs", [0, -1.0, float("nan")])
    def test_refuses_a_bound_that_is_not_above_zero(self, max_abs):
        with pytest.raises(
            ValueError, match=r"clip_by_max_abs: expected max_abs > 0, got max_abs="
        ):
            optax_curv.clip_by_max_abs(max_abs)


class TestNormalize:
    @pytest.mark.parametrize("scale", [1e-37, 1.0, 1e30])
    def test_rms_is_the_target_whatever_the_scale(self, scale):
        normalize = optax_curv.normalize_by_rms(0.2)
        u = scale * jnp.array([[3.0, -1.0], [2.0, 0.5]])
        new, _ = normalize.update(u, normalize.init(u))
        np.testing.assert_allclose(
            new, u * (0.2 / scale) / np.sqrt(np.mean(np.square(u / scale))), rtol=1e-5
        )

    def test_refuses_a_negative_target(self):
        with pytest.raises(
            ValueError, match=r"normalize_by_rms: expected target >= 0, got target=-0.1"
        ):
            optax_curv.normalize_by_rms(-0.1)

    def test_reference_gives_the_norm_and_updates_the_direction(self):
        updates, grad = tree(seed=1), tree(seed=2)
        adam = optax.scale_by_adam()
        graft = optax_curv.normalize_by_reference(adam)
        for extra, seen in (({}, updates), ({"grad": grad}, grad)):
            new, state = graft.update(updates, graft.init(updates), updates, **extra)
            reference, adam_state = adam.update(seen, adam.init(updates), updates)
            for u, r, v in zip(*map(jax.tree.leaves, (updates, reference, new)), strict=True):
                np.testing.assert_allclose(
                    v * jnp.linalg.norm(u), u * jnp.linalg.norm(r), rtol=1e-5
                )
            assert jax.tree.all(jax.tree.map(jnp.array_equal, state, adam_state))

    def test_reference_receives_the_extra_arguments(self):
        seen = {}
        tx = optax.GradientTransformationExtraArgs(
            lambda params: optax.EmptyState(),
            lambda u, s, p=None, **extra: (seen.update(extra), (u, s))[1],
        )
        graft = optax_curv.normalize_by_reference(tx)
        graft.update(jnp.ones(2), graft.init(jnp.ones(2)), curvature=3)
        assert seen == {"curvature": 3}


def with_and_without(piece, name, **extra):
    """(gradients, updates of a method alone, updates with the piece behind it) of two steps."""
    case, params = cases.CASES[name], cases.tree(0)
    rng, alone, chained = (
        np.random.default_rng(1),
        case.transformation(),
        optax.chain(case.transformation(), piece),
    )
    # Small trees take longer to compile than to run.
    quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    update, chained_update = quick_jit(alone.update), quick_jit(chained.update)
    state, chained_state = alone.init(params), chained.init(params)
    for seed in (1, 2):
        grads, extras = cases.tree(seed), case.extras(rng)
        u, state = update(grads, state, params, **extras)
        given = {key: value(grads) for key, value in extra.items()}
        v, chained_state = chained_update(grads, chained_state, params, **extras, **given)
        yield grads, u, v


@pytest.mark.parametrize("name", ["kfac", "kron_psgd", "branch_fisher", "shampoo", "soap"])
class TestBehindMethods:
    def test_every_leaf_has_the_methods_direction_and_the_given_rms(self, name):
        for _, u, v in with_and_without(optax_curv.normalize_by_rms(0.2), name):
            for x, y in zip(jax.tree.leaves(u), jax.tree.leaves(v), strict=True):
                assert jnp.any(x)
                np.testing.assert_allclose(
                    y, x * 0.2 / np.sqrt(np.mean(np.square(x))), rtol=1e-4, atol=1e-6
                )

    def test_every_leaf_has_the_methods_direction_and_the_norm_of_the_reference_for_the_gradients(
        self, name
    ):
        graft = optax_curv.normalize_by_reference(optax.scale(0.1))
        for grads, u, v in with_and_without(graft, name, grad=lambda grads: grads):
            for g, x, y in zip(*map(jax.tree.leaves, (grads, u, v)), strict=True):
                expected = x * 0.1 * np.linalg.norm(g.ravel()) / np.linalg.norm(x.ravel())
                np.testing.assert_allclose(y, expected, rtol=1e-4, atol=5e-6)  # of 0.1


def bounded(sizes, directions=None, **options):
    """Norms behind the piece of a leaf whose incoming norms are given."""
    tx = optax_curv.bound_by_running_norm(**options)
    unit = jnp.array([0.6, 0.8])

    def step(state, size):
        update, state = tx.update(size * unit, state)
        return state, jnp.linalg.norm(update)

    state, norms = jax.lax.scan(step, tx.init(unit), jnp.asarray(sizes, jnp.float32))
    return np.asarray(norms), state


class SignState(NamedTuple):
    count: jax.Array
    fallback: Any
    total_notfinite: jax.Array


class Sign(LeafRule):
    """The smallest rule on stacks."""

    def init_stacks(self, structs):
        return SignState(**counters(), fallback=())

    def update_stacks(self, grads, state, sound, **extra_args):
        return Step(jax.tree.map(jnp.sign, grads), state)


class TestBoundByRunningNorm:
    def test_ordinary_gradients_pass_bit_for_bit(self):
        sizes = np.random.default_rng(0).uniform(0.5, 1.5, size=100).astype(np.float32)
        tx = optax_curv.bound_by_running_norm()
        state = tx.init(jnp.zeros(3))
        for size in sizes:
            u = size * jnp.array([1.0, -2.0, 0.3])
            new, state = tx.update(u, state)
            np.testing.assert_array_equal(new, u)
        assert int(state.held) == 0

    @pytest.mark.parametrize("outlier", [10.0, 1e4, 1e8])
    def test_an_outlier_is_three_ordinary_steps_and_its_mean_says_so(self, outlier):
        sizes = np.ones(60)
        sizes[50] = outlier
        norms, state = bounded(sizes)
        np.testing.assert_allclose(norms[50], 3.0, rtol=1e-5)
        np.testing.assert_array_equal(np.delete(norms, 50), np.delete(norms, 50) * 0 + norms[0])
        assert int(state.held) == 1
        decayed = 2 * 0.05 / (1 - 0.95**51) * 0.95**9 * (1 - 0.95**51) / (1 - 0.95**60)
        np.testing.assert_allclose(state.norms, 1 + decayed, rtol=1e-4)

    def test_the_first_steps_are_free(self):
        norms, _ = bounded([1, 1e6, 1, 1e6], start=2)
        np.testing.assert_allclose(norms[1], 1e6, rtol=1e-5)
        tight, _ = bounded([1, 1, 1e6], start=2, factor=1.0)
        np.testing.assert_allclose(tight[2], 1.0, rtol=1e-5)

    @pytest.mark.parametrize("idle", [0.0, 1e-12])
    @pytest.mark.parametrize("before", [0, 50])
    def test_a_leaf_that_idled_follows_freely_within_twenty_steps(self, idle, before):
        sizes = np.concatenate([np.ones(before), np.full(1000, idle), np.full(40, 100.0)])
        norms, _ = bounded(sizes)
        np.testing.assert_allclose(norms[before + 1020 :], 100.0, rtol=1e-5)

    def test_a_leaf_that_wakes_as_it_was_is_not_held_at_all(self):
        norms, state = bounded(np.concatenate([np.ones(50), np.zeros(1000), np.ones(40)]))
        np.testing.assert_allclose(norms[1050:], 1.0, rtol=1e-5)
        assert int(state.held) == 0

    def test_what_is_not_finite_passes_and_changes_no_mean(self):
        tx = optax_curv.bound_by_running_norm()
        state = tx.init(jnp.zeros(2))
        for _ in range(12):
            _, state = tx.update(jnp.ones(2), state)
        for bad in (jnp.nan, jnp.inf):
            new, after = tx.update(jnp.array([1.0, bad]), state)
            assert not np.isfinite(new).all()
            jax.tree.map(np.testing.assert_array_equal, after, state)

    def test_rows_of_a_stack_are_bounded_one_by_one_within_an_alias(self):
        tx = transformation(Sign(method="sign"), first=bounds.bounded("sign", 3.0))
        params = {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 2))}
        state = tx.init(params)
        update = jax.jit(tx.update)
        for scale in (*[1.0] * bounds.START, 1e6):
            grads = {"a": params["a"], "b": scale * params["b"]}
            _, state = update(grads, state)
        (norms,) = jax.tree.leaves(state[1].norms)
        assert norms.shape == (2,) and int(state[1].held) == 1
        np.testing.assert_allclose(norms[1] / norms[0], 1 + 2 * 0.05 / (1 - 0.95**11), rtol=1e-4)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"factor": 0.5}, "factor >= 1, got factor=0.5"),
            ({"decay": 1.5}, "decay <= 1"),
            ({"start": 0}, "start >= 1"),
            ({"factor": "3"}, "factor='3'"),
        ],
    )
    def test_refuses_numbers_out_of_range(self, options, message):
        with pytest.raises(ValueError, match=message):
            optax_curv.bound_by_running_norm(**options)


class TestKeepParamsInBox:
    @pytest.mark.parametrize(
        ("param_dtype", "update_dtype"), list(itertools.product(DTYPES, DTYPES))
    )
    @pytest.mark.parametrize("bound", [0.1, 3.0])
    def test_applied_params_lie_in_the_box_and_on_its_wall_where_they_would_leave_it(
        self, param_dtype, update_dtype, bound
    ):
        rng = np.random.default_rng(0)
        params = jnp.asarray(bound * rng.normal(size=1000), param_dtype)
        updates = jnp.asarray(
            bound * rng.normal(size=1000) * 10.0 ** rng.integers(-3, 2, 1000), update_dtype
        )
        box = optax_curv.keep_params_in_box(bound)

        @jax.jit
        def apply(params, updates):
            new, _ = box.update(updates, box.init(params), params)
            return new, optax.apply_updates(params, new)

        free = np.asarray(params).astype(float) + np.asarray(updates).astype(float)
        new, applied = apply(params, updates)
        applied = np.asarray(applied).astype(float)
        eager = np.asarray(optax.apply_updates(params, new)).astype(float)
        assert max(np.abs(applied).max(), np.abs(eager).max()) <= bound
        rounding = max(float(jnp.finfo(dtype).eps) for dtype in (param_dtype, update_dtype))
        leaves, stays = np.abs(free) > bound, np.abs(free) < bound * (1 - rounding)
        assert 0.2 < leaves.mean() < 0.9
        np.testing.assert_allclose(
            eager[leaves], bound * np.sign(free[leaves]), rtol=LARGEST_STEP * rounding
        )
        np.testing.assert_array_equal(np.asarray(new)[stays], np.asarray(updates)[stays])

    def test_params_outside_are_brought_back_also_by_a_zero_update(self):
        box = optax_curv.keep_params_in_box(0.0)
        params = jnp.array([2.0, -3.0])
        new, _ = box.update(jnp.zeros(2), box.init(params), params)
        np.testing.assert_array_equal(optax.apply_updates(params, new), [0, 0])

    def test_missing_params_are_refused_in_the_words_of_optax(self):
        with pytest.raises(ValueError, match=re.escape(optax._src.base.NO_PARAMS_MSG)):
            optax_curv.keep_params_in_box(1.0).update(jnp.ones(2), optax.EmptyState())

    def test_refuses_complex_leaves_by_name_and_a_negative_bound(self):
        with pytest.raises(ValueError, match=r"the leaf \['z'\] has dtype complex64"):
            optax_curv.keep_params_in_box(1.0).init({"z": jnp.ones(2, complex)})
        with pytest.raises(ValueError, match="expected bound >= 0, got bound=-1"):
            optax_curv.keep_params_in_box(-1)


class TestEstimateGradients:
    def test_replaces_updates_by_the_estimate_in_their_dtype(self):
        tx = optax.chain(
            optax_curv.estimate_gradients(lambda params, *, slope, **_: slope * params),
            optax.sgd(0.5),
        )
        params = jnp.array([1.0, 2.0])
        update = jax.jit(lambda g, s: tx.update(g, s, params, slope=jnp.float32(3), other=1))
        for incoming, dtype in (
            (jnp.full(2, jnp.nan, jnp.bfloat16), jnp.bfloat16),
            (None, jnp.float32),
        ):
            new, _ = update(incoming, tx.init(params))
            assert new.dtype == dtype
            np.testing.assert_array_equal(new, [-1.5, -3])

    @pytest.mark.parametrize(
        ("estimate", "message"),
        [
            (lambda params: params["w"], "the tree of the estimate differs from that of params"),
            (
                lambda params: {"w": jnp.ones(3)},
                r"differ in shape at \['w'\]: got \(3,\), expected \(2,\)",
            ),
        ],
    )
    def test_refuses_an_estimate_unlike_the_params(self, estimate, message):
        tx, params = optax_curv.estimate_gradients(estimate), {"w": jnp.ones(2)}
        with pytest.raises(ValueError, match=message):
            tx.update(params, tx.init(params), params)

    def test_missing_params_are_refused_in_the_words_of_optax(self):
        with pytest.raises(ValueError, match=re.escape(optax._src.base.NO_PARAMS_MSG)):
            optax_curv.estimate_gradients(lambda params: params).update(
                jnp.ones(2), optax.EmptyState()
            )


@pytest.mark.parametrize("kind", ["float64", "complex128"])
def test_cautious_decay_is_that_of_entries_whose_own_step_lessens_them(kind, x64):
    rng = np.random.default_rng(0)
    u, p = rng.normal(size=(2, 4, 3))
    if kind == "complex128":
        u, p = u + 1j * rng.normal(size=u.shape), p + 1j * rng.normal(size=p.shape)
    tx = optax_curv.add_cautious_weight_decay(0.3)
    found, _ = tx.update(jnp.asarray(u), tx.init(p), jnp.asarray(p))
    lessens = np.abs(p - 1e-6 * u) < np.abs(p)  # a short step of the update alone
    np.testing.assert_allclose(found, np.where(lessens, u + 0.3 * p, u), rtol=1e-12)
    zero, _ = tx.update(jnp.zeros_like(p), tx.init(p), jnp.asarray(p))
    assert not np.any(zero)
    with pytest.raises(ValueError, match="expected weight_decay >= 0"):
        optax_curv.add_cautious_weight_decay(-0.1)
    with pytest.raises(ValueError, match="params"):
        tx.update(jnp.asarray(u), tx.init(p))


def test_parameters_keep_their_norm_and_their_direction_is_that_of_the_step(x64):
    rng = np.random.default_rng(0)
    p, u = (jnp.asarray(x) for x in rng.normal(size=(2, 5, 4)))
    tx = optax.chain(optax.scale(-0.1), optax_curv.keep_params_norm())
    state, q = tx.init(p), p
    for _ in range(20):
        updates, state = tx.update(u, state, q)
        wanted = q - 0.1 * u
        q = optax.apply_updates(q, updates)
        unit = np.linalg.norm(q)
        np.testing.assert_allclose(unit, np.linalg.norm(p), rtol=1e-12)
        np.testing.assert_allclose(q / unit, wanted / np.linalg.norm(wanted), rtol=1e-9, atol=1e-12)
    free, _ = tx.update(u, tx.init(p), jnp.zeros_like(p))
    np.testing.assert_allclose(free, -0.1 * u)
    assert not np.any(tx.update(jnp.zeros_like(u), tx.init(p), p)[0])
    with pytest.raises(ValueError, match="params"):
        tx.update(u, tx.init(p))
