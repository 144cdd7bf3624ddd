"""EKFAC equals dense solves in its basis, which it finds, keeps and hands out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_curv import (
    EigenbasisMoments,
    KroneckerFactors,
    Layer,
    Layers,
    eigenbasis,
    ekfac,
    scale_by_ekfac,
    scale_by_kfac,
)

EXACT = 1e-9  # relative, in float64
DAMPING = 0.1

LAYERS = Layers(
    [
        Layer("dense", "dense", "['w']", "['b']", 3, 2),
        Layer("tokens", "embedding", "['e']", None, 5, 2),
        Layer("stacked", "dense", "['s']", None, 4, 2, (2,)),
    ]
)
SHAPES = {"w": (3, 2), "b": (2,), "e": (5, 2), "s": (2, 4, 2)}


def draw(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in SHAPES.items()}


def statistics(seed):
    rng = np.random.default_rng(seed)

    def factor(shape, stack):
        x = rng.normal(size=(*shape, 6))
        return (
            jnp.asarray(np.einsum("...ai,...bi->...ab", x[..., 0, :, :], x[..., 0, :, :]))
            if (len(shape) == len(stack) + 2)
            else jnp.asarray(np.square(x).sum(-1))
        )

    return {
        x.name: EigenbasisMoments(
            *(factor(shape, x.stack) for shape in x.factor_shapes),
            jnp.int32(1),
            jnp.asarray(rng.uniform(0.1, 1, size=(*x.stack, x.rows_of_matrix, x.out_dim))),
        )
        for x in LAYERS
    }


def matrices(tree):
    return {
        "dense": jnp.concatenate([tree["w"], tree["b"][None]]),
        "tokens": tree["e"],
        "stacked": tree["s"],
    }


def dense(factor):
    return factor if factor.ndim == 2 else jnp.diag(factor)


def assert_solves(block, direction, grad):
    expected = np.linalg.solve(np.asarray(block) + DAMPING * np.eye(len(block)), np.ravel(grad))
    np.testing.assert_allclose(
        np.ravel(direction), expected, rtol=0, atol=EXACT * np.max(np.abs(expected))
    )


def in_basis(basis, moments, i=()):
    """The block with the basis's products for eigenvectors and the moments for eigenvalues."""
    u_a, u_g = (
        jnp.eye(d) if u is None else u[i] for u, d in zip(basis, moments.shape[-2:], strict=True)
    )
    u = jnp.kron(u_a, u_g)
    return u @ jnp.diag(moments[i].ravel()) @ u.T


def stepper(tx):
    return jax.jit(lambda grads, state, curvature: tx.update(grads, state, curvature=curvature))


def slices(name):
    return [(0,), (1,)] if name == "stacked" else [()]


def test_the_first_step_is_kfac_with_joint_damping(x64):
    tx, grads, first = scale_by_ekfac(LAYERS, DAMPING), draw(0), statistics(1)
    updates, _ = stepper(tx)(grads, tx.init(grads), first)
    for name, direction in matrices(updates).items():
        for i in slices(name):
            block = jnp.kron(*(dense(factor[i]) for factor in first[name][:2]))
            assert_solves(block, direction[i], matrices(grads)[name][i])


def test_later_steps_use_the_measured_moments_in_the_kept_basis(x64):
    tx = scale_by_ekfac(
        LAYERS, lambda count: DAMPING + 0 * count, decay=0.25, invert_every=jnp.array(10)
    )
    step, grads, second = stepper(tx), draw(0), statistics(2)
    _, state = step(grads, tx.init(grads), statistics(1))
    updates, after = step(grads, state, second)
    for name, direction in matrices(updates).items():
        # of two, the newest has the weight (1 - 0.25) / (1 - 0.25²), as in K-FAC's factors
        moments = 0.2 * state.moments[name] + 0.8 * second[name].moments
        for i in slices(name):
            assert_solves(
                in_basis(eigenbasis(state)[name], moments, i),
                direction[i],
                matrices(grads)[name][i],
            )
    assert after.count == 2
    jax.tree.map(np.testing.assert_array_equal, after.bases, state.bases)


def test_a_change_of_basis_keeps_the_moments_that_it_can(x64):
    tx = scale_by_ekfac(LAYERS, DAMPING, update_every=1000)
    step, grads = stepper(tx), draw(0)
    _, state = step(grads, tx.init(grads), statistics(1))
    _, same = step(grads, state, statistics(2))  # the factors, and so the basis, stay
    for name, moments in state.moments.items():
        np.testing.assert_allclose(same.moments[name], moments, rtol=1e-7)
    turned = state._replace(
        bases=tx.init(grads).bases
    )  # as if the moments had been measured without a basis
    _, after = step(grads, turned, statistics(2))
    for name, moments in state.moments.items():
        for i in slices(name):
            whole = in_basis(turned.basis[name], moments, i)
            u = jnp.kron(*(jnp.eye(5) if u is None else u[i] for u in after.basis[name]))
            np.testing.assert_allclose(
                after.moments[name][i].ravel(), jnp.diag(u.T @ whole @ u), rtol=1e-7
            )


def test_kfac_and_ekfac_have_the_same_factors(x64):
    grads, seen = draw(0), []
    for tx in (scale_by_kfac(LAYERS, decay=0.9), scale_by_ekfac(LAYERS, decay=0.9)):
        step, state = stepper(tx), tx.init(grads)
        for seed in (1, 2, 3):
            _, state = step(grads, state, statistics(seed))
        seen.append(state.factors)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=EXACT), *seen)


def test_the_basis_is_found_in_a_chain_and_is_the_identity_at_first():
    state = ekfac(0.1, LAYERS).init(draw(0))
    basis = eigenbasis(state)
    np.testing.assert_array_equal(
        basis["stacked"].input_basis, jnp.broadcast_to(jnp.eye(4), (2, 4, 4))
    )
    assert basis["tokens"].input_basis is None
    np.testing.assert_array_equal(basis["dense"].input_basis, jnp.eye(4))
    with pytest.raises(ValueError, match=r"expected one state of scale_by_ekfac .* found 2"):
        eigenbasis((state, state))


def test_a_bad_moment_leaves_the_state_alone(x64):
    tx, grads, curvature = scale_by_ekfac(LAYERS), draw(0), statistics(1)
    curvature["dense"] = curvature["dense"]._replace(
        moments=curvature["dense"].moments.at[0, 0].set(jnp.nan)
    )
    state = tx.init(grads)
    updates, after = stepper(tx)(grads, state, curvature)
    assert not any(jnp.any(u) for u in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, after, state._replace(total_notfinite=jnp.int32(1)))


def test_what_does_not_fit_is_refused():
    tx, grads, curvature = scale_by_ekfac(LAYERS), draw(0), statistics(1)
    state = tx.init(grads)
    plain = KroneckerFactors(*curvature["dense"][:3])
    with pytest.raises(
        ValueError, match=r"'dense' is a KroneckerFactors without moments.*statistic=\"eigenbasis\""
    ):
        tx.update(grads, state, curvature=curvature | {"dense": plain})
    narrow = curvature["dense"]._replace(moments=jnp.ones((3, 2)))
    with pytest.raises(
        ValueError, match=r"moments of layer 'dense' have shape \(3, 2\), expected \(4, 2\)"
    ):
        tx.update(grads, state, curvature=curvature | {"dense": narrow})
    with pytest.raises(ValueError, match="'dense' is masked in part"):
        tx.init(grads | {"b": None})
    with pytest.raises(ValueError, match="scale_by_ekfac: expected damping >= 0, got damping=-1"):
        scale_by_ekfac(LAYERS, -1)
