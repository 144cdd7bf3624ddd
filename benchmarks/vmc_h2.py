"""The hydrogen molecule by K-FAC: `kfac` with the likelihood "score" beside kfac-jax.

python -m benchmarks.vmc_h2 [--steps 400] [--seeds 0 1 2] [--width 32] [--save]

The network, the sampler and the local energy are those of `examples/h2_kfac.py`. All methods start
from the same parameters and walkers with the same keys, and take in turn a block of steps each, in
an order that rotates. kfac-jax is used as FermiNet does: the loss is a `custom_jvp` whose tangent
registers log ψ as the mean of a normal distribution. Its variance is 1 here, so that the metric is
that of "score"; then damping, decay, learning rate and norm constraint mean the same in both, with
`kl_clip` for the norm constraint. Both invert at every step, or both every 20 steps."""

import argparse
import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_curv
from benchmarks import peers
from examples.h2_kfac import ATOMS, EXACT, Wavefunction, energy_and_targets, walked

RESULTS = pathlib.Path(__file__).parent / "results" / "vmc_h2.md"
BLOCK, WALKERS, EVALUATIONS = 20, 1024, 200
DAMPING, DECAY, CONSTRAINT, PERIODS = 1e-3, 0.95, 1e-3, (1, 20)
ALONE = "energies and gradient alone", None


def rate(count):
    """The learning rate of FermiNet."""
    return 0.05 / (1 + count / 10_000)


def ours(model, period):
    """(init, step) of `kfac`; init(params, x) -> state, step(params, state, x, count) -> three."""
    objective = optax_curv.Objective(model.apply, "score")

    @functools.cache
    def made():
        x = jnp.ones((2, 6))
        params = model.init(jax.random.key(0), x)
        layers = optax_curv.find_layers(objective, params, x, jnp.zeros((2, 1)))
        capture = optax_curv.value_grad_and_curvature(objective, layers=layers, fisher="exact")
        options = {"decay": DECAY, "momentum": 0.0, "kl_clip": CONSTRAINT}
        return capture, optax_curv.kfac(rate, layers, DAMPING, invert_every=period, **options)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state, x):
        capture, tx = made()
        energy, targets = energy_and_targets(model, params, x)
        _, grads, curvature = capture(params, x, targets)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, energy

    return lambda params, x: made()[1].init(params), lambda p, s, x, count: update(p, s, x)


def kfac_jax(model, period):
    """(init, step) of kfac-jax, as in `ours`."""
    peer = peers.load("kfac_jax")

    @jax.custom_jvp
    def energy_of(params, x):
        return energy_and_targets(model, params, x)[0]

    @energy_of.defjvp
    def _(primals, tangents):
        energy, targets = energy_and_targets(model, *primals)
        log_psi, tangent = jax.jvp(model.apply, primals, tangents)
        peer.register_normal_predictive_distribution(log_psi, variance=1.0)
        return energy, jnp.mean(targets * tangent)

    optimizer = peer.Optimizer(
        jax.value_and_grad(energy_of),
        l2_reg=0.0,
        norm_constraint=CONSTRAINT,
        estimation_mode="fisher_exact",
        num_burnin_steps=0,
        inverse_update_period=period,
        curvature_ema=DECAY,
        learning_rate_schedule=rate,
        momentum_schedule=lambda count: jnp.zeros([]),
        damping_schedule=lambda count: jnp.float32(DAMPING),
        register_only_generic=False,
        multi_device=False,
    )
    key = jax.random.key_data(jax.random.key(0))  # nothing is drawn for the exact Fisher

    def step(params, state, x, count):
        params, state, stats = optimizer.step(params, state, key, batch=x, global_step_int=count)
        return params, state, stats["loss"]

    return lambda params, x: optimizer.init(params, key, x), step


def gradient_alone(model):
    """(init, step) of energies and their gradient, with which nothing is done."""
    objective = optax_curv.Objective(model.apply, "score")

    @jax.jit
    def update(params, x):
        energy, targets = energy_and_targets(model, params, x)
        return jax.grad(objective)(params, x, targets), energy

    return lambda params, x: (), lambda params, state, x, count: (params, *update(params, x))


walk = jax.jit(walked, static_argnums=0)
energy_alone = jax.jit(lambda *arguments: energy_and_targets(*arguments)[0], static_argnums=0)


class Run:
    """One method's training from a seed, and its times."""

    def __init__(self, model, method, seed, walkers=WALKERS):
        self.model, self.key, self.count = model, jax.random.key(seed), 0
        self.params = model.init(self.key, jnp.ones((1, 6)))
        self.x = ATOMS.reshape(-1) + jax.random.normal(self.key, (walkers, 6))
        jax.block_until_ready(self.moved())  # compiles it
        self.walks, self.updates, self.energies = [], [], []
        start = time.process_time()
        init, self.update = method
        self.state = init(self.params, self.x)
        self.step()
        self.first = time.process_time() - start

    def moved(self):
        return walk(self.model, self.params, self.x, jax.random.fold_in(self.key, self.count))

    def step(self):
        """Moves and updates; returns the processor time of each."""
        times = [time.process_time()]
        self.x = jax.block_until_ready(self.moved())
        times.append(time.process_time())
        step = self.update(self.params, self.state, self.x, self.count)
        self.params, self.state, energy = jax.block_until_ready(step)
        self.count += 1
        self.energies.append(float(energy))
        return np.diff([*times, time.process_time()])

    def block(self, steps):
        walks, updates = np.sum([self.step() for _ in range(steps)], axis=0)
        self.walks.append(1e3 * walks / steps)
        self.updates.append(1e3 * updates / steps)

    def evaluated(self, walks=EVALUATIONS):
        """The energy of the last parameters over further walks."""
        means = []
        for _ in range(walks):
            self.x, self.count = self.moved(), self.count + 1
            means.append(float(energy_alone(self.model, self.params, self.x)))
        return np.mean(means)


def trained(model, steps, seeds):
    """{(name, period): the runs of all seeds}."""
    methods = {
        (name, period): make(model, period)
        for period in PERIODS
        for name, make in {"kfac-jax": kfac_jax, "optax_curv": ours}.items()
    }
    methods[ALONE] = gradient_alone(model)
    found = {key: [] for key in methods}
    for seed in seeds:
        for key, method in methods.items():
            found[key].append(Run(model, method, seed))
        order = list(methods)
        for block in range(steps // BLOCK):
            for key in order:
                found[key][-1].block(BLOCK)
            order = order[1:] + order[:1]
            print(f"seed {seed}, step {BLOCK * (block + 1)}", flush=True)
    return found


def row(found, key):
    """A line of the table."""
    runs, (name, period) = found[key], key
    updates, walks = (np.concatenate([getattr(r, x) for r in runs]) for x in ("updates", "walks"))
    peer = np.concatenate([r.updates for r in found[("kfac-jax", period or PERIODS[0])]])
    low, middle, high = np.quantile(updates / peer, (0.25, 0.5, 0.75))
    first = runs[0].first - 1e-3 * np.median(updates + walks)
    beside = "1" if name == "kfac-jax" else f"{middle:.2f} ({low:.2f} to {high:.2f})"
    times = f"{np.median(updates):.1f} | {np.min(updates):.1f}"
    if key == ALONE:
        return f"| {name} | - | - | - | {times} | {beside} | {first:.1f} |"
    energies = np.array([r.evaluated() for r in runs])
    error = np.std(energies, ddof=1) / np.sqrt(len(energies)) if len(energies) > 1 else np.nan
    above = ", ".join(f"{1e3 * (x - EXACT):.2f}" for x in energies)
    energy = f"{energies.mean():.5f} ± {error:.5f} | {above}"
    return f"| {name} | {period} | {energy} | {times} | {beside} | {first:.1f} |"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    found = trained(Wavefunction(options.width), options.steps, options.seeds)
    walks = np.median(np.concatenate([r.walks for runs in found.values() for r in runs]))
    lines = [
        f"Width {options.width}, {WALKERS} walkers, {options.steps} steps, seeds "
        f"{', '.join(map(str, options.seeds))}; exact energy {EXACT} Hartree.",
        "",
        "| method | inverses every | energy | above exact, mHa, by seed | ms an update, median "
        "| least | beside kfac-jax | compile, s |",
        "|---|---|---|---|---|---|---|---|",
        *(row(found, key) for key in found),
        "",
        f"Moving the walkers is the same function for all and takes {walks:.1f} ms a step more.",
        "",
        f"The energy is that of the last parameters over {EVALUATIONS} further walks, its mean and "
        "standard error over the seeds. Times are processor time, on cores that other programs "
        "shared; beside kfac-jax are ratios of blocks of steps, median and quartiles.",
    ]
    print("\n".join(lines), flush=True)
    if options.save:
        RESULTS.write_text("# The hydrogen molecule\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
