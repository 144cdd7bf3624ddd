"""Small published networks under `kfac` at three learning rates, and the time to compile its step:
``python -m benchmarks.published``; see ``--help``.

GPT-2 (published initialisation: 0.02, residual projections smaller), a ViT, a ResNet with batch
normalisation, Mamba-2 and an LSTM are trained for 200 steps on Shakespeare's characters or
scikit-learn's digits. "No clip" is ``kl_clip=None``. Compilation is the time to trace and compile
the whole step beside that of `jax.value_and_grad`, in processor time, interleaved."""

import argparse
import functools
import json
import pathlib
import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import optax_curv
from benchmarks.cache import shakespeare_texts

RESULTS = pathlib.Path(__file__).parent / "results"
RATES, STEPS, BATCH, D, T = (0.03, 0.1, 0.3), 200, 32, 32, 32
ADAM = (1e-3, 3e-3, 1e-2)
CLIP = 2e-3  # the default of `kfac`
CLIPS = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 3e-2)
NO_CLIP = 1e30  # a bound that no step reaches, so that one program serves both
SMALL = nn.initializers.normal(0.02)


class Attention(nn.Module):
    causal: bool
    init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    out: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x, bias=0.0):
        q, k, v = jnp.split(nn.Dense(3 * D, kernel_init=self.init)(x), 3, -1)
        q, k, v = (a.reshape(*a.shape[:2], 4, D // 4).swapaxes(1, 2) for a in (q, k, v))
        scores = q @ k.swapaxes(2, 3) / np.sqrt(D // 4) + bias
        if self.causal:
            scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), scores, -1e9)
        mixed = (nn.softmax(scores) @ v).swapaxes(1, 2).reshape(x.shape)
        return nn.Dense(D, kernel_init=self.out)(mixed)


class GPT2(nn.Module):
    words: int
    depth: int = 2

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(self.words, D, embedding_init=SMALL)
        x = embed(ids) + self.param("positions", nn.initializers.normal(0.01), (T, D))
        out = nn.initializers.normal(0.02 / np.sqrt(2 * self.depth))
        for _ in range(self.depth):
            x = x + Attention(True, SMALL, out)(nn.LayerNorm()(x))
            h = nn.gelu(nn.Dense(4 * D, kernel_init=SMALL)(nn.LayerNorm()(x)))
            x = x + nn.Dense(D, kernel_init=out)(h)
        return embed.attend(nn.LayerNorm()(x))


class T5(nn.Module):
    """The decoder: relative positions, RMS norms, a gated MLP."""

    words: int
    depth: int = 2

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(self.words, D)
        x = embed(ids)
        distance = jnp.clip(jnp.arange(T)[:, None] - jnp.arange(T), 0, 15)
        table = self.param("relative", nn.initializers.normal(0.1), (16, 4))
        bias = jnp.moveaxis(table[distance], -1, 0)[None]
        for _ in range(self.depth):
            x = x + Attention(True)(nn.RMSNorm()(x), bias)
            h = nn.RMSNorm()(x)
            x = x + nn.Dense(D)(nn.gelu(nn.Dense(2 * D)(h)) * nn.Dense(2 * D)(h))
        return nn.Dense(self.words)(nn.RMSNorm()(x))


class StateSpace(nn.Module):
    """Mamba-2's mixer: a short convolution, decays, a scan over time, a gated norm."""

    heads: int = 4
    state: int = 8

    @nn.compact
    def __call__(self, x):
        width, inner = self.state, D + 2 * self.state
        z, u, dt = jnp.split(nn.Dense(D + inner + self.heads)(x), [D, D + inner], -1)
        u = nn.silu(nn.Conv(inner, (4,), padding="CAUSAL", feature_group_count=inner)(u))
        u, b, c = jnp.split(u, [D, D + width], -1)
        dt = nn.softplus(dt + self.vector("dt", -2.0))
        decay = jnp.exp(-dt * jnp.exp(self.vector("log_a", 0.0)))
        u = u.reshape(*x.shape[:2], self.heads, -1)

        def step(h, now):
            decay, dt, u, b, c = now
            h = decay[..., None, None] * h + (dt[..., None] * u)[..., None] * b[:, None, None]
            return h, jnp.einsum("nhds,ns->nhd", h, c)

        moved = [jnp.swapaxes(a, 0, 1) for a in (decay, dt, u, b, c)]
        start = jnp.zeros((len(x), self.heads, D // self.heads, width))
        y = jnp.swapaxes(lax.scan(step, start, tuple(moved))[1], 0, 1)
        y = (y + u * self.vector("skip", 1.0)[:, None]).reshape(x.shape)
        return nn.Dense(D)(nn.RMSNorm()(y * nn.silu(z)))

    def vector(self, name, value):
        return self.param(name, nn.initializers.constant(value), (self.heads,))


class Mamba2(nn.Module):
    words: int
    depth: int = 2

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(self.words, D)(ids)
        for _ in range(self.depth):
            x = x + StateSpace()(nn.RMSNorm()(x))
        return nn.Dense(self.words)(nn.RMSNorm()(x))


class ViT(nn.Module):
    depth: int = 2

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(D, (2, 2), (2, 2))(x).reshape(len(x), -1, D)
        token = self.param("token", nn.initializers.zeros, (1, 1, D))
        x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], 1)
        x = x + self.param("positions", SMALL, (1, x.shape[1], D))
        for _ in range(self.depth):
            x = x + Attention(False)(nn.LayerNorm()(x))
            x = x + nn.Dense(D)(nn.gelu(nn.Dense(4 * D)(nn.LayerNorm()(x))))
        return nn.Dense(10)(nn.LayerNorm()(x)[:, 0])


class ResNet(nn.Module):
    """Batch normalisation by the batch's own statistics."""

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=False)
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), use_bias=False)
        x = nn.relu(norm()(conv(16)(x)))
        for width, stride in ((16, 1), (32, 2)):
            h = nn.relu(norm()(conv(width, strides=stride)(x)))
            h = norm(scale_init=nn.initializers.zeros)(conv(width)(h))
            if stride > 1:
                x = norm()(nn.Conv(width, (1, 1), stride, use_bias=False)(x))
            x = nn.relu(x + h)
        return nn.Dense(10)(x.mean((1, 2)))


class ConvNeXt(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Conv(D, (2, 2), (2, 2))(x))
        for _ in range(2):
            h = nn.LayerNorm()(nn.Conv(D, (3, 3), feature_group_count=D)(x))
            h = nn.Dense(D)(nn.gelu(nn.Dense(4 * D)(h)))
            x = x + h * self.param(f"scale{_}", nn.initializers.constant(0.1), (D,))
        return nn.Dense(10)(nn.LayerNorm()(x.mean((1, 2))))


class LSTM(nn.Module):
    """An image's rows one after the other."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.RNN(nn.OptimizedLSTMCell(D))(x[..., 0])[:, -1])


TEXT = {"GPT-2": GPT2, "Mamba-2": Mamba2, "T5": T5}
IMAGES = {"ViT": ViT, "ResNet": ResNet, "LSTM": LSTM, "ConvNeXt": ConvNeXt}
TRAINED = ("GPT-2", "ViT", "ResNet", "Mamba-2", "LSTM")
COMPILED = ("ViT", "ConvNeXt", "Mamba-2", "GPT-2", "T5")


def problem(name: str):
    """The loss of a network, its first parameters, and batches for all steps."""
    rng = np.random.default_rng(0)
    if name in TEXT:
        text = np.frombuffer(shakespeare_texts().encode("latin-1"), np.uint8)[: 2**20]
        letters, codes = np.unique(text, return_inverse=True)
        starts = rng.integers(0, len(codes) - T - 1, (STEPS, BATCH))
        ids = jnp.asarray(codes[starts[..., None] + np.arange(T + 1)], jnp.int32)
        module, batches = TEXT[name](len(letters)), (ids[..., :-1], ids[..., 1:])
    else:
        from sklearn.datasets import load_digits

        digits = load_digits()
        chosen = rng.integers(0, len(digits.target), (STEPS, BATCH))
        images = jnp.asarray(digits.images[chosen] / 8 - 1, jnp.float32)[..., None]
        module, batches = IMAGES[name](), (images, jnp.asarray(digits.target[chosen]))
    params = module.init(jax.random.key(0), batches[0][0])["params"]

    def loss(params, x, y):
        logits, _ = module.apply({"params": params}, x, mutable=["batch_stats"])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    return loss, params, batches


def kfac_step(loss, layers, rate, clip):
    """One step of `kfac`: (parameters, state), batch -> the same, loss."""
    measure = optax_curv.value_grad_and_curvature(loss, layers=layers, statistic="rows")
    fallback = optax.scale_by_adam() if layers.uncovered else None
    tx = optax_curv.kfac(rate, layers, kl_clip=clip, fallback=fallback)

    def step(carry, batch):
        params, state = carry
        value, grads, curvature = measure(params, *batch)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return (optax.apply_updates(params, updates), state), value

    return tx, step


def adam_step(loss, rate):
    tx = optax.adam(rate)

    def step(carry, batch):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    return tx, step


def kfac_run(loss, params, batches):
    """A compiled run of `kfac`, rate and bound -> the losses of all steps."""
    layers = optax_curv.find_layers(loss, params, *(x[0] for x in batches))

    @jax.jit
    def run(rate, clip):
        tx, step = kfac_step(loss, layers, rate, clip)
        return lax.scan(step, (params, tx.init(params)), batches)[1]

    return run


def clips(name: str):
    """By bound, the largest loss and the last, at the middle rate."""
    run = kfac_run(*problem(name))
    return {f"{clip:g}": summary([float(x) for x in run(RATES[1], clip)]) for clip in CLIPS}


def curves(name: str):
    """The losses of all steps, by method and rate."""
    loss, params, batches = problem(name)
    by_kfac = kfac_run(loss, params, batches)

    @jax.jit
    def by_adam(rate):
        tx, step = adam_step(loss, rate)
        return lax.scan(step, (params, tx.init(params)), batches)[1]

    found = {f"kfac {rate}": by_kfac(rate, CLIP) for rate in RATES}
    found |= {f"kfac {rate}, no clip": by_kfac(rate, NO_CLIP) for rate in RATES}
    found |= {f"adam {rate}": by_adam(rate) for rate in ADAM}
    return {key: [float(f"{x:.5g}") for x in values] for key, values in found.items()}


def compile_ratio(name: str, rounds: int = 3):
    """Times to trace and compile the plain gradient and the whole step, and their ratio."""
    loss, params, batches = problem(name)
    batch = tuple(x[0] for x in batches)
    times: dict[str, list[float]] = {"gradient": [], "kfac": []}
    for _ in range(rounds):
        for key in times:
            jax.clear_caches()
            start = time.process_time()
            if key == "gradient":
                jax.jit(jax.value_and_grad(loss)).lower(params, *batch).compile()
            else:
                layers = optax_curv.find_layers(loss, params, *batch)
                tx, step = kfac_step(loss, layers, 0.1, CLIP)
                state = jax.eval_shape(tx.init, params)
                jax.jit(step).lower((params, state), batch).compile()
            times[key].append(time.process_time() - start)
    median = {key: statistics.median(values) for key, values in times.items()}
    return median | {"ratio": median["kfac"] / median["gradient"]}


def summary(values):
    """First loss, largest after ten steps, and mean of the last twenty."""
    tail = values[10:]
    largest = max(tail) if all(np.isfinite(tail)) else float("inf")
    last = np.mean(values[-20:])
    return " / ".join(f"{x:.1e}" if x >= 1000 else f"{x:.3f}" for x in (largest, last))


def table(results) -> str:
    lines = ["# Published networks", "", __doc__.split("\n\n", 1)[1].strip(), ""]
    rows = results.get("curves", {})
    if rows:
        lines += [
            f"{STEPS} steps, batch {BATCH}: the largest loss after the tenth step / the mean "
            "of the last 20.",
            "",
        ]
        keys = list(next(iter(rows.values())))
        lines += ["| network | first | " + " | ".join(keys) + " |", "|---" * (len(keys) + 2) + "|"]
        for name, curves in rows.items():
            cells = [f"{curves[keys[0]][0]:.2f}", *(summary(curves[key]) for key in keys)]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    rows = results.get("clips", {})
    if rows:
        lines += ["", f"The same of `kfac` at rate {RATES[1]}, by its bound `kl_clip`.", ""]
        lines += ["| network | " + " | ".join(f"{x:g}" for x in CLIPS) + " |"]
        lines += ["|---" * (len(CLIPS) + 1) + "|"]
        lines += [f"| {name} | {' | '.join(cells.values())} |" for name, cells in rows.items()]
    rows = results.get("compile", {})
    if rows:
        lines += ["", "Processor seconds to trace and compile, the median of three.", ""]
        lines += ["| network | value_and_grad | kfac's step | ratio |", "|---|---|---|---|"]
        for name, x in rows.items():
            cells = f"{x['gradient']:.1f} | {x['kfac']:.1f} | {x['ratio']:.1f}"
            lines.append(f"| {name} | {cells} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("curves", "clips", "compile", "table"))
    parser.add_argument("names", nargs="*", help="networks; by default all")
    given = parser.parse_args()
    file = RESULTS / "published.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    todo = {
        "curves": (curves, TRAINED),
        "clips": (clips, TRAINED),
        "compile": (compile_ratio, COMPILED),
    }
    for measure, names in [todo[given.what]] if given.what in todo else []:
        for name in given.names or names:
            results.setdefault(given.what, {})[name] = measure(name)
            file.write_text(json.dumps(results) + "\n")
            print(table(results), flush=True)
    (RESULTS / "published.md").write_text(table(results))


if __name__ == "__main__":
    main()
