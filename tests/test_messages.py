"""Mistakes that people make, and what the message has to name and to advise.

One row a mistake: a name, what provokes it, and words that the message must contain.
"""

import re

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training import train_state

import optax_curv as oc

PARAMS = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
X, Y = jnp.arange(8.0).reshape(2, 4) / 8, jnp.zeros((2, 3))
ROWS = {"w": jnp.ones((5, 4, 3)), "b": jnp.ones((5, 3))}


def loss(params, x, y):
    return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)


OBJECTIVE = oc.Objective(lambda params, x: x @ params["w"] + params["b"], "normal")
LAYERS = oc.find_layers(loss, PARAMS, X, Y)
OTHER = {"v": jnp.ones((4, 3))}
CAPTURE = oc.value_grad_and_curvature(loss, layers=LAYERS)


def updated(tx, grads=None, params=PARAMS, state=None, **extra):
    state = tx.init(PARAMS) if state is None else state
    return tx.update(PARAMS if grads is None else grads, state, params, **extra)


def flax_state():
    model = nn.Dense(3)
    params = model.init(jax.random.key(0), X)["params"]
    loss = lambda params, x, y: jnp.mean((model.apply({"params": params}, x) - y) ** 2)  # noqa: E731
    layers = oc.find_layers(loss, params, X, Y)
    state = train_state.TrainState.create(
        apply_fn=model.apply, params=params, tx=oc.kfac(0.1, layers)
    )
    _, grads, curvature = oc.value_grad_and_curvature(loss, layers=layers)(params, X, Y)
    return state.apply_gradients(grads=grads, curvature=curvature)


def under_jit(read, tx):
    return jax.jit(lambda state: len(read(state)))(tx.init(PARAMS))


def deep_loss(params, x, y):
    return loss(params["a"], x, y) + loss(params["c"], x, y)


DEEP = {"a": PARAMS, "c": PARAMS}
DEEP_LAYERS = oc.find_layers(deep_loss, DEEP, X, Y)


def mini_steps_of_rows():
    tx = optax.MultiSteps(oc.kfac(0.1, LAYERS), 2)
    capture = oc.value_grad_and_curvature(loss, layers=LAYERS, statistic="rows")
    state, mean = tx.init(PARAMS), None
    for _ in range(2):
        _, grads, rows = capture(PARAMS, X, Y)
        mean = rows if mean is None else oc.average_curvature(mean, rows, state.mini_step)
        _, state = tx.update(grads, state, PARAMS, curvature=mean)


MISTAKES = {
    # numbers and choices
    "a rate that is a string": (lambda: oc.shampoo("0.1"), ["learning_rate", "'0.1'"]),
    "no learning rate": (lambda: oc.soap(None), ["learning_rate", "None"]),
    "a decay above one": (lambda: oc.shampoo(0.1, decay=1.5), ["decay", "1.5"]),
    "a negative damping": (lambda: oc.scale_by_kfac(LAYERS, -1.0), ["damping", "-1"]),
    "a misspelt geometry": (lambda: oc.kron_psgd(0.1, geometry="qqq"), ["geometry", "q0.5eq1.5"]),
    "a misspelt root": (lambda: oc.scale_by_shampoo(root="cholesky"), ["root", "eigh", "newton"]),
    "a misspelt inverse": (lambda: oc.kfac(0.1, LAYERS, inverse="lu"), ["inverse", "cholesky"]),
    "a misspelt solver": (lambda: oc.branch_fisher(0.1, solver="lu"), ["solver", "auto"]),
    "a misspelt basis": (lambda: oc.soap(0.1, basis="svd"), ["basis", "eigh"]),
    "a misspelt statistic": (
        lambda: oc.value_grad_and_curvature(loss, statistic="factors"),
        ["statistic", "kronecker"],
    ),
    "a misspelt fisher": (
        lambda: oc.value_grad_and_curvature(loss, fisher="true"),
        ["fisher", "exact"],
    ),
    "mse for normal": (
        lambda: oc.Objective(lambda p, x: x, "mse"),
        ["'mse'", "'normal'", "squared"],
    ),
    "cross entropy for categorical": (
        lambda: oc.Objective(lambda p, x: x, "cross_entropy"),
        ["'cross_entropy'", "'categorical'", "softmax", "'bernoulli'"],
    ),
    "a likelihood that is a class": (
        lambda: oc.Objective(lambda p, x: x, type("Poisson", (), {})),
        ["Poisson", "loss", "hessian_sqrt"],
    ),
    "a word for a bool": (lambda: oc.shampoo(0.1, nesterov="no"), ["nesterov", "'no'"]),
    "a rank of zero": (lambda: oc.scale_by_lra_psgd(rank=-1), ["rank", "-1"]),
    "a period of zero": (lambda: oc.scale_by_shampoo(root_every=0), ["root_every", "0"]),
    # parameters and gradients
    "a module given to init": (
        lambda: oc.shampoo(0.1).init(nn.Dense(3)),
        ["Dense", "model.init(key, x)"],
    ),
    "a module given to kfac's init": (
        lambda: oc.kfac(0.1, LAYERS).init(nn.Dense(3)),
        ["Dense", "model.init(key, x)"],
    ),
    "a module given to find_layers": (
        lambda: oc.find_layers(loss, nn.Dense(3), X, Y),
        ["Dense", "model.init(key, x)"],
    ),
    "an nnx module given to kfac's init": (
        lambda: oc.kfac(0.1, LAYERS).init(nnx.Linear(4, 3, rngs=nnx.Rngs(0))),
        ["nnx.state(model, nnx.Param)"],
    ),
    "an Equinox module given to init": (
        lambda: oc.shampoo(0.1).init(eqx.nn.MLP(4, 3, 5, 1, key=jax.random.key(0))),
        [".activation", "eqx.filter"],
    ),
    "the class of a module given to init": (lambda: oc.shampoo(0.1).init(nn.Dense), ["type"]),
    "numbers for parameters": (lambda: oc.shampoo(0.1).init([1.0]), ["1.0", "[0]", "asarray"]),
    "integer parameters": (lambda: oc.shampoo(0.1).init({"n": jnp.arange(3)}), ["['n']", "int32"]),
    "gradients of another tree": (
        lambda: updated(oc.shampoo(0.1), OTHER),
        ["gradients", "['v']", "['w']", "update(grads, state, params)"],
    ),
    "parameters of another tree": (
        lambda: updated(oc.soap(0.1), params=OTHER),
        ["gradients", "['v']", "['w']", "update(grads, state, params)"],
    ),
    "gradients of another shape": (
        lambda: updated(oc.kron_psgd(0.1), {"w": jnp.ones((3, 4)), "b": jnp.ones(3)}),
        ["['w']", "(3, 4)", "(4, 3)", "update(grads, state, params)"],
    ),
    "the loss given with the gradients": (
        lambda: updated(oc.shampoo(0.1), (jnp.ones(()), PARAMS)),
        ["[0]", "update(grads, state, params)"],
    ),
    "a tuple for a list": (
        lambda: oc.shampoo(0.1).update((X,), oc.shampoo(0.1).init([X]), [X]),
        ["gradients", "PyTreeDef([*])", "PyTreeDef((*,))"],
    ),
    "state and gradients exchanged": (
        lambda: oc.shampoo(0.1).update(oc.shampoo(0.1).init(PARAMS), PARAMS, PARAMS),
        ["13 more", "update(grads, state, params)"],
    ),
    "a state of another tree": (
        lambda: updated(oc.shampoo(0.1), state=oc.shampoo(0.1).init(OTHER)),
        ["state", "init"],
    ),
    "a state of another method": (
        lambda: updated(oc.scale_by_soap(), state=oc.scale_by_shampoo().init(PARAMS)),
        ["state", "scale_by_soap"],
    ),
    "decay without parameters": (
        lambda: updated(oc.shampoo(0.1, weight_decay=0.1), params=None),
        ["params"],
    ),
    "a mask of another tree": (
        lambda: oc.shampoo(0.1, weight_decay=0.1, weight_decay_mask={"v": True}).init(PARAMS),
        ["weight_decay_mask", "['w']", "['v']", "below a key"],
    ),
    "a mask that is a prefix of another tree": (
        lambda: oc.dense_psgd(0.1, weight_decay=0.1, weight_decay_mask={"a": True}).init(DEEP),
        ["weight_decay_mask", "['c']['w']", "['a']", "below a key"],
    ),
    "a mask of words": (
        lambda: oc.shampoo(0.1, weight_decay_mask={"w": "yes", "b": False}).init(PARAMS),
        ["weight_decay_mask", "'yes'", "True or False"],
    ),
    "a mask of arrays": (
        lambda: oc.shampoo(0.1, weight_decay_mask={"w": jnp.ones(2), "b": False}).init(PARAMS),
        ["weight_decay_mask", "Array", "True or False"],
    ),
    "stacked axes that a leaf lacks": (
        lambda: oc.scale_by_shampoo(stacked={"w": 3, "b": 0}).init(PARAMS),
        ["stacked", "['w']"],
    ),
    # layers and curvature
    "kfac without curvature": (lambda: updated(oc.kfac(0.1, LAYERS)), ["curvature="]),
    "a curvature that is not a dict": (
        lambda: updated(oc.kfac(0.1, LAYERS), curvature=jnp.ones(3)),
        ["curvature"],
    ),
    "layers of another model": (lambda: oc.kfac(0.1, LAYERS).init(OTHER), ["['w']"]),
    "layers that are a list": (lambda: oc.kfac(0.1, list(LAYERS)), ["layers", "find_layers"]),
    "layers of another loss": (
        lambda: oc.value_grad_and_curvature(loss, layers=DEEP_LAYERS)(PARAMS, X, Y),
        ["layer 'a'", "['w']", "find_layers"],
    ),
    "curvature of other layers": (
        lambda: updated(
            oc.kfac(0.1, LAYERS),
            curvature=oc.value_grad_and_curvature(deep_loss, layers=DEEP_LAYERS)(DEEP, X, Y)[2],
        ),
        ["['w']", "['a', 'c']", "same layers"],
    ),
    "uncovered leaves": (
        lambda: oc.kfac(
            0.1, oc.find_layers(lambda p, x: jnp.sum(p["w"] ** 3 * x), PARAMS, X[0, 0])
        ).init(PARAMS),
        ["fallback"],
    ),
    "the exact Fisher of a plain loss": (
        lambda: oc.value_grad_and_curvature(loss, fisher="exact")(PARAMS, X, Y),
        ["Objective"],
    ),
    "a sampled Fisher without key": (
        lambda: oc.value_grad_and_curvature(OBJECTIVE, fisher="sampled")(PARAMS, X, Y),
        ["key="],
    ),
    "adaptive kfac without objective": (
        lambda: updated(oc.kfac(None, LAYERS), curvature=CAPTURE(PARAMS, X, Y)[2]),
        ["objective="],
    ),
    "a loss that is no number": (
        lambda: oc.find_layers(lambda p, x: x @ p["w"], PARAMS, X),
        ["scalar"],
    ),
    "flax's own TrainState": (flax_state, ["curvature=", "optax_curv.flax.TrainState"]),
    "ekfac with kfac's statistic": (
        lambda: updated(oc.ekfac(0.1, LAYERS), curvature=CAPTURE(PARAMS, X, Y)[2]),
        ["eigenbasis"],
    ),
    "rows that are averaged": (
        lambda: oc.average_curvature(
            *[oc.value_grad_and_curvature(loss, layers=LAYERS, statistic="rows")(PARAMS, X, Y)[2]]
            * 2,
            0,
        ),
        ["rows", "kronecker"],
    ),
    "rows under MultiSteps": (mini_steps_of_rows, ["rows", 'statistic="kronecker"']),
    # branches
    "no branches": (lambda: updated(oc.branch_fisher(0.1)), ["branches="]),
    "rows of another tree": (
        lambda: updated(oc.branch_fisher(0.1), branches={"v": ROWS["w"]}),
        ["branches"],
    ),
    "rows of another shape": (
        lambda: updated(oc.branch_fisher(0.1), branches=ROWS | {"w": jnp.ones((5, 3, 4))}),
        ["(5, 3, 4)", "(4, 3)"],
    ),
    "too few weights": (
        lambda: updated(oc.branch_fisher(0.1), branches=ROWS, weights=jnp.ones(4)),
        ["weights", "5"],
    ),
    "holomorphic rows of real parameters": (
        lambda: oc.jacobian_rows(lambda p, x: x @ p["w"], holomorphic=True)(PARAMS, X),
        ["holomorphic", "complex"],
    ),
    "gauss_newton without objective": (lambda: updated(oc.gauss_newton(0.1)), ["objective="]),
    # the rest
    "diagnostics of Adam": (
        lambda: oc.diagnostics.curvature_table(optax.adam(0.1).init(PARAMS)),
        ["optax_curv"],
    ),
    "diagnostics under jit": (
        lambda: under_jit(oc.diagnostics.curvature_table, oc.shampoo(0.1)),
        ["curvature_table", "jax.jit", "outside"],
    ),
    "a plot under jit": (
        lambda: under_jit(oc.diagnostics.plot_curvature, oc.shampoo(0.1)),
        ["plot_curvature", "jax.jit", "outside"],
    ),
    "layer diagnostics under jit": (
        lambda: under_jit(oc.layer_diagnostics, oc.kfac(0.1, LAYERS)),
        ["layer_diagnostics", "jax.jit", "outside"],
    ),
    "a plot of branch Fisher": (
        lambda: oc.diagnostics.plot_curvature(oc.branch_fisher(0.1).init(PARAMS)),
        ["factors", "none"],
    ),
    "layer diagnostics of shampoo": (
        lambda: oc.layer_diagnostics(oc.shampoo(0.1).init(PARAMS)),
        ["scale_by_kfac", "curvature_table"],
    ),
    "two basis states": (
        lambda: oc.eigenbasis(oc.shampoo(0.1).init(PARAMS)),
        ["scale_by_ekfac"],
    ),
    "a probe without its product": (
        lambda: updated(oc.scale_by_kron_psgd(), probe=PARAMS),
        ["hvp"],
    ),
    "a sharding that names no axis": (
        lambda: oc.shampoo(0.1, sharding="data"),
        ["sharding", "Mesh"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_message_names_the_mistake_and_what_to_do(mistake):
    provoke, words = MISTAKES[mistake]
    with pytest.raises((ValueError, TypeError)) as caught:
        provoke()
    message = str(caught.value)
    assert "optax_curv" in repr(caught.traceback[-1].path), message
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"
    assert not re.search(r"\bLayer\(| at 0x", message), message
