"""Methods in the form in which Optax's own suites take optimizers: made from a learning rate."""

import functools

import jax
import jax.numpy as jnp
import optax

import optax_curv


def layer_of(path, leaf):
    """Any leaf as a layer: a matrix as a dense kernel, every other one as a shift."""
    name = jax.tree_util.keystr(path)
    if leaf.ndim == 2:
        return optax_curv.Layer(name, "dense", name, None, *leaf.shape)
    return optax_curv.Layer(name, "shift", None, name, 0, leaf.size)


def with_curvature(method, statistic):
    """A layer-wise method that makes layers and statistics from the gradients.

    The suites hand over nothing else. Seen as a matrix, each of its rows is the output gradient of
    one example whose input is that row's unit vector."""

    def layers_and_method(tree, learning_rate, damping):
        layers = [layer_of(path, leaf) for path, leaf in jax.tree.leaves_with_path(tree)]
        return layers, method(learning_rate, optax_curv.Layers(layers), damping)

    def measure(layer, g):
        rows = jnp.asarray(g, jnp.promote_types(g.dtype, jnp.float32)).reshape(
            layer.rows_of_matrix, -1
        )
        count = len(rows)
        factors = jnp.eye(count, dtype=rows.dtype) / count, rows.T @ rows / count, jnp.int32(1)
        extra = (jnp.square(rows),) if statistic is optax_curv.EigenbasisMoments else ()
        return statistic(*factors, *extra)

    def make(learning_rate: optax.ScalarOrSchedule, damping=10.0):
        # optax.tree.map_params asks for the state of a tree without leaves, with the structure of
        # the last one.
        seen = {}

        def init(params):
            tree = seen["tree"] = params if jax.tree.leaves(params) else seen["tree"]
            return layers_and_method(tree, learning_rate, damping)[1].init(params)

        def update(updates, state, params=None, **extra_args):
            layers, tx = layers_and_method(updates, learning_rate, damping)
            curvature = {
                x.name: measure(x, g) for x, g in zip(layers, jax.tree.leaves(updates), strict=True)
            }
            return tx.update(updates, state, params, curvature=curvature, **extra_args)

        return optax.GradientTransformationExtraArgs(init, update)

    return make


kfac = with_curvature(functools.partial(optax_curv.kfac, momentum=0.0), optax_curv.KroneckerFactors)
ekfac = with_curvature(
    functools.partial(optax_curv.ekfac, momentum=0.0), optax_curv.EigenbasisMoments
)


def _adam_in_basis(learning_rate, layers, damping):
    del damping
    return optax.chain(
        optax_curv.scale_by_adam_in_basis(layers), optax.scale_by_learning_rate(learning_rate)
    )


adam_in_basis = with_curvature(_adam_in_basis, optax_curv.KroneckerFactors)


def _input_factor(learning_rate, layers, damping):
    del damping
    method = optax_curv.scale_by_input_factor(layers)
    return optax.chain(method, optax.scale_by_adam(), optax.scale_by_learning_rate(learning_rate))


input_factor = with_curvature(_input_factor, optax_curv.KroneckerFactors)


def gauss_newton(learning_rate: optax.ScalarOrSchedule, damping=100.0):
    """Gauss-Newton with F = g gᵀ of the gradients, which are all that the suites hand over."""
    tx = optax_curv.gauss_newton(learning_rate, damping, max_iters=3)

    def update(updates, state, params=None, **extra_args):
        def product(v):
            return optax.tree.scale(optax.tree.vdot(updates, v), updates)

        return tx.update(updates, state, params, curvature_product=product, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def branch(method, **options):
    """A branch method in a suite that has no branches: it is told so, and passes the gradient."""

    def make(learning_rate: optax.ScalarOrSchedule):
        tx = method(learning_rate, **options)

        def update(updates, state, params=None, **extra_args):
            return tx.update(updates, state, params, **{"branches": None} | extra_args)

        return optax.GradientTransformationExtraArgs(tx.init, update)

    return make


def with_learning_rate(*pieces):
    """Chainable pieces as an optimizer."""

    def make(learning_rate: optax.ScalarOrSchedule):
        return optax.chain(*pieces, optax.scale_by_learning_rate(learning_rate))

    return make
