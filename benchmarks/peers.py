"""Other packages' optimizers: ``python -m benchmarks.peers`` installs private copies.

It also repairs in them what JAX has outrun.

Each stands alone in a directory of the cache, without its dependencies, so that none changes the
environment's JAX."""

import functools
import importlib
import sys

import jax
import jax.numpy as jnp
import optax

import optax_curv
from benchmarks.cache import CACHE, complete, pinned, pip
from benchmarks.methods import RMS, Absent, Method, _split, from_optax, schedule

# Packages of pins.txt, and what is replaced in which file: what the package was written for has
# changed since.
PEERS = {
    "kfac_jax": (
        ("kfac-jax", "immutabledict", "dm-tree", "wrapt", "attrs"),
        {
            "kfac_jax/_src/tag_graph_matcher.py": (
                "  subfuns, bind_params = eqn.primitive.get_bind_params(eqn.params)\n",
                "  subfuns, bind_params = (), eqn.primitive.get_bind_params(eqn.params)"
                "  # JAX 0.10 returns one\n",
            )
        },
    ),
    "distributed_kron": (
        ("distributed-kron",),
        {
            "distributed_kron/kron.py": (
                "from typing import Any",
                "from __future__ import annotations\n\nfrom typing import Any",
            ),
            "distributed_kron/pro.py": (
                "from typing import Any",
                "from __future__ import annotations\n\nfrom typing import Any",
            ),
        },
    ),
    "psgdax": (("psgdax",), {}),
    "somax": (("python-somax",), {}),
}

# kfac-jax imports distrax for three distributions; distrax needs TensorFlow Probability, which
# fails on this JAX.
DISTRAX = '''"""What kfac-jax uses of distrax."""
import jax
import jax.numpy as jnp
import optax


class Distribution:
    def __init__(self, logits=None, dtype=None, loc=None, scale_diag=None):
        self.logits, self.dtype, self.loc, self.scale_diag = logits, dtype, loc, scale_diag


class MultivariateNormalDiag(Distribution):
    def log_prob(self, x):
        return jnp.sum(jax.scipy.stats.norm.logpdf(x, self.loc, self.scale_diag), -1)

    def sample(self, seed):
        return self.loc + self.scale_diag * jax.random.normal(seed, self.loc.shape, self.loc.dtype)


class Bernoulli(Distribution):
    probs = property(lambda self: jax.nn.sigmoid(self.logits))

    def log_prob(self, x):
        return -optax.sigmoid_binary_cross_entropy(self.logits, x)

    def sample(self, seed):
        return jax.random.bernoulli(seed, self.probs).astype(self.dtype)


class Categorical(Distribution):
    probs = property(lambda self: jax.nn.softmax(self.logits))

    def log_prob(self, x):
        return -optax.softmax_cross_entropy_with_integer_labels(self.logits, x)

    def sample(self, seed):
        return jax.random.categorical(seed, self.logits).astype(self.dtype)


class OneHotCategorical(Categorical):
    def log_prob(self, x):
        return -optax.softmax_cross_entropy(self.logits, x)

    def sample(self, seed):
        return jax.nn.one_hot(super().sample(seed), self.logits.shape[-1], dtype=self.dtype)
'''


def install():
    """Installs and repairs every peer; one that cannot be installed is a line of output."""
    for module, (packages, repairs) in PEERS.items():
        make = functools.partial(_made, packages, repairs, module == "kfac_jax")
        try:
            complete(CACHE / "peers" / module, make)
            importlib.import_module(_on_path(module))
        except Exception as error:  # whatever a package does when it is imported
            print(f"{module}: {type(error).__name__}: {error}")
        else:
            print(f"{module}: ready ({pinned(packages[0]).split()[0]})")


def _made(packages, repairs, needs_distrax, folder):
    """Fills a folder with packages and repairs them; a repair without anything to repair fails."""
    pip("install", *packages, into=folder)
    for name, (old, new) in repairs.items():
        text = (folder / name).read_text()
        if old not in text:
            raise RuntimeError(f"{name} has nothing to repair: {old.strip()!r} is not in it")
        (folder / name).write_text(text.replace(old, new, 1))
    if needs_distrax:
        (folder / "distrax.py").write_text(DISTRAX)


def _on_path(module: str) -> str:
    folder = CACHE / "peers" / module
    if not folder.is_dir():
        raise Absent("not installed; run python -m benchmarks.peers")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # behind the environment's own packages
    return module


def load(module: str):
    return importlib.import_module(_on_path(module))


def kfac_jax(problem, steps, adaptive=True):
    """Its adaptive mode with its defaults but for the first damping, or a tuned learning rate."""
    peer, objective = load("kfac_jax"), problem.objective
    register = {
        "Bernoulli": "register_multi_bernoulli_predictive_distribution",
        "Categorical": "register_categorical_predictive_distribution",
    }.get(type(getattr(objective, "likelihood", None)).__name__)
    if register is None:
        raise Absent("needs an Objective with a likelihood that it knows")

    def loss(params, batch):
        outputs = objective.predict_fn(params, batch[0])
        rows, targets = outputs.reshape(-1, outputs.shape[-1]), batch[1]
        targets = targets.reshape(rows.shape if targets.shape == outputs.shape else -1)
        getattr(peer, register)(rows, targets, weight=outputs.shape[0] / rows.shape[0])
        return objective.loss_of_outputs(outputs, batch[1])

    @functools.cache  # it traces and compiles itself: one for each value of the settings
    def optimizer(damping):
        return peer.Optimizer(
            jax.value_and_grad(loss),
            l2_reg=0.0,
            use_adaptive_learning_rate=adaptive,
            use_adaptive_momentum=adaptive,
            use_adaptive_damping=adaptive,
            initial_damping=damping if adaptive else None,
            num_burnin_steps=0,
        )

    def init(params):
        return None

    def step(params, state, batch, settings):
        damping, key = float(settings["damping"]), jax.random.key_data(jax.random.key(0))
        if state is None:
            state = (optimizer(damping).init(params, key, batch), 0)
        inner, count = state
        fixed = {}
        if not adaptive:
            rate = schedule(float(settings["learning_rate"]), steps)(count)
            fixed = {
                "learning_rate": rate,
                "momentum": jnp.float32(0.9),
                "damping": jnp.float32(damping),
            }
        key = jax.random.key_data(jax.random.fold_in(jax.random.key(0), count))
        params, inner, _ = optimizer(damping).step(
            params, inner, key, batch=batch, global_step_int=count, **fixed
        )
        return params, (inner, count + 1)

    settings = {"damping": 1.0} if adaptive else {"learning_rate": 0.02, "damping": 0.01}
    return Method(init, step, settings, host=True)


def distributed_kron(problem, steps):
    peer = load("distributed_kron")

    def make(rate, _):
        return peer.kron(rate, merge_small_dims=False, partition_grads_into_blocks=False)

    return from_optax(problem, steps, make, learning_rate=0.005)


def psgdax(problem, steps):
    peer = load("psgdax")
    return from_optax(
        problem,
        steps,
        lambda rate, _: peer.kron(rate, preconditioner_update_probability=1.0),
        learning_rate=0.005,
    )


def psgdax_rms(problem, steps):
    """Momentum whitened fast and updates of matrices scaled to one RMS, as in `kron_psgd_rms`."""
    peer = load("psgdax")

    def matrices(rate, _):
        kron = peer.scale_by_kron(
            preconditioner_update_probability=1.0, whiten_grad=False, preconditioner_lr=0.5
        )
        return optax.chain(
            kron, optax_curv.normalize_by_rms(RMS), optax.scale_by_learning_rate(rate)
        )

    return from_optax(problem, steps, _split(problem, matrices), learning_rate=0.02)


def somax(problem, steps):
    """Its Gauss-Newton by conjugate gradients."""
    peer, objective = load("somax"), problem.objective
    if type(getattr(objective, "likelihood", None)).__name__ != "Categorical":
        raise Absent("has no Gauss-Newton matrix of this likelihood")

    def predict(params, inputs):
        outputs = objective.predict_fn(params, inputs)
        return outputs.reshape(-1, outputs.shape[-1])

    def method(settings):
        rate = schedule(settings["learning_rate"], steps)
        return peer.sgn_ce(predict_fn=predict, lam0=settings["damping"], learning_rate=rate)

    @functools.cache  # its damping has to be a Python number
    def jitted(damping):
        def step(params, state, batch, rate):
            inputs, targets = batch
            key = jax.random.fold_in(jax.random.key(0), state.step)
            now = method({"learning_rate": rate, "damping": damping})
            return now.step(params, {"x": inputs, "y": targets.reshape(-1)}, state, key)[:2]

        return jax.jit(step)

    def step(params, state, batch, settings):
        return jitted(float(settings["damping"]))(params, state, batch, settings["learning_rate"])

    settings = {"learning_rate": 0.3, "damping": 1.0}
    return Method(method(settings).init, step, settings, host=True)


METHODS = {
    "kfac_jax": kfac_jax,
    "kfac_jax_fixed": functools.partial(kfac_jax, adaptive=False),
    "distributed_kron": distributed_kron,
    "psgdax": psgdax,
    "psgdax_rms": psgdax_rms,
    "somax": somax,
}

if __name__ == "__main__":
    install()
