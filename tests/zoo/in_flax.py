"""Published architectures written here with Flax or plain JAX, in a few lines each."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from zoo.catalogue import (
    SINGLE,
    D,
    N,
    T,
    V,
    filled,
    linen,
    mean_square,
    network,
    next_word,
    normal,
    tokens,
)

SOURCE = "Flax and JAX"


def pure(forward, shapes, *inputs, measure=mean_square):
    """A function of a dict of parameters with these shapes."""
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.result_type(float)) for name, shape in shapes.items()
    }
    return (lambda p, *x: measure(forward(p, *x))), filled(params), *inputs


class Block(nn.Module):
    """A transformer block before whose parts the norms stand."""

    norm: type = nn.LayerNorm

    @nn.compact
    def __call__(self, x, mask=None):
        x = x + nn.MultiHeadDotProductAttention(2)(self.norm()(x), mask=mask)
        return x + nn.Dense(D)(nn.gelu(nn.Dense(12)(self.norm()(x))))


@network(SOURCE)
def vision_transformer():
    class ViT(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(D, (4, 4), (4, 4))(x).reshape(len(x), -1, D)
            token = self.param("token", nn.initializers.zeros, (1, 1, D))
            x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], 1)
            x = x + self.param("positions", nn.initializers.zeros, (1, 5, D))
            return nn.Dense(3)(nn.LayerNorm()(Block()(x))[:, 0])

    return linen(ViT(), normal(1, N, 8, 8, 3))


@network(SOURCE)
def masked_autoencoder():
    class MAE(nn.Module):
        @nn.compact
        def __call__(self, x):
            token = self.param("token", nn.initializers.zeros, (D,))
            seen = Block()(nn.Dense(D)(x)[:, :2])
            hidden = jnp.broadcast_to(token, (len(x), 2, D))
            return nn.Dense(6)(Block()(jnp.concatenate([seen, hidden], 1)))

    return linen(MAE(), normal(1, N, T, 6))


@network(SOURCE, mixes=True)
def residual_network():
    class ResNet(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.BatchNorm(False)(nn.Conv(6, (3, 3), use_bias=False)(x)))
            h = nn.relu(nn.BatchNorm(False)(nn.Conv(6, (3, 3), use_bias=False)(x)))
            h = nn.BatchNorm(False)(nn.Conv(6, (3, 3), use_bias=False)(h))
            return nn.Dense(3)(nn.relu(x + h).mean((1, 2)))

    return linen(ResNet(), normal(1, N, 6, 6, 3))


@network(SOURCE)
def standardised_network():
    """Weight-standardised convolutions (BiT) and a weight-normalised head."""

    class BiT(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(6, (3, 3))(x)
            for k in range(2):
                kernel = self.param(f"kernel{k}", nn.initializers.normal(), (3, 3, 6, 6))
                kernel = kernel - kernel.mean((0, 1, 2))
                kernel = kernel / jnp.sqrt(jnp.mean(kernel**2, (0, 1, 2)) + 1e-5)
                h = lax.conv_general_dilated(
                    x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
                x = x + nn.relu(nn.GroupNorm(2)(h))
            return nn.WeightNorm(nn.Dense(3))(x.mean((1, 2)))

    return linen(BiT(), normal(1, N, 6, 6, 3))


@network(SOURCE)
def convnext():
    class ConvNeXt(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.LayerNorm()(nn.Conv(D, (2, 2), (2, 2))(x))
            h = nn.LayerNorm()(nn.Conv(D, (3, 3), feature_group_count=D)(x))
            h = nn.Dense(D)(nn.gelu(nn.Dense(12)(h)))
            x = x + h * self.param("scale", nn.initializers.ones, (D,))
            return nn.Dense(3)(nn.LayerNorm()(x.mean((1, 2))))

    return linen(ConvNeXt(), normal(1, N, 8, 8, 3))


@network(SOURCE)
def mobile_net_with_excitation():
    class Inverted(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.relu6(nn.Conv(12, (1, 1))(x))
            h = nn.relu6(nn.Conv(12, (3, 3), feature_group_count=12)(h))
            gate = nn.sigmoid(nn.Dense(12)(nn.relu(nn.Dense(4)(h.mean((1, 2))))))
            return (x + nn.Conv(4, (1, 1))(h * gate[:, None, None])).mean((1, 2))

    return linen(Inverted(), normal(1, N, 6, 6, 4))


@network(SOURCE)
def unet():
    class UNet(nn.Module):
        @nn.compact
        def __call__(self, x, t):
            time = nn.Dense(6)(nn.silu(nn.Dense(6)(jnp.sin(t[:, None] * jnp.arange(1.0, 5)))))
            first = nn.silu(nn.Conv(6, (3, 3))(x) + time[:, None, None])
            low = nn.silu(nn.Conv(8, (3, 3), (2, 2))(first))
            high = nn.ConvTranspose(6, (2, 2), (2, 2))(low)
            return nn.Conv(2, (3, 3))(jnp.concatenate([high, first], -1))

    return linen(UNet(), normal(1, N, 4, 4, 2), normal(2, N))


@network(SOURCE)
def diffusion_transformer():
    class DiT(nn.Module):
        @nn.compact
        def __call__(self, x, t):
            c = nn.Dense(D)(nn.silu(nn.Dense(D)(jnp.sin(t[:, None] * jnp.arange(1.0, 5)))))
            s1, g1, b1, s2, g2, b2 = jnp.split(nn.Dense(6 * D)(nn.silu(c))[:, None], 6, -1)
            h = nn.LayerNorm(use_bias=False, use_scale=False)(x) * (1 + s1) + b1
            x = x + g1 * nn.MultiHeadDotProductAttention(2)(h)
            h = nn.LayerNorm(use_bias=False, use_scale=False)(x) * (1 + s2) + b2
            return x + g2 * nn.Dense(D)(nn.gelu(nn.Dense(12)(h)))

    return linen(DiT(), normal(1, N, T, D), normal(2, N))


@network(SOURCE)
def scanned_language_model():
    """Blocks under `nn.scan` and `nn.remat`, the embedding tied to the logits."""

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(V, D)
            x = embed(ids) + self.param("positions", nn.initializers.zeros, (T, D))
            mask = nn.make_causal_mask(ids)
            stack = nn.scan(
                lambda block, x, _: (block(x, mask), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
            )
            x, _ = stack(nn.remat(Block)(), x, None)
            return embed.attend(nn.LayerNorm()(x))

    return linen(Scanned(), tokens(1, N, T))


@network(SOURCE)
def mixture_of_experts():
    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x):
            gates = nn.softmax(nn.Dense(3, use_bias=False)(x))
            expert = nn.vmap(
                nn.Dense,
                in_axes=None,
                out_axes=-2,
                axis_size=3,
                variable_axes={"params": 0},
                split_rngs={"params": True},
            )
            return nn.Dense(2)(jnp.einsum("nte,nted->ntd", gates, nn.gelu(expert(6)(x))))

    return linen(Experts(), normal(1, N, T, D))


@network(SOURCE)
def mlp_mixer():
    class Mixer(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
            x = x + jnp.swapaxes(nn.Dense(T)(nn.gelu(nn.Dense(6)(h))), 1, 2)
            return nn.Dense(3)(nn.Dense(D)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x)))).mean(1))

    return linen(Mixer(), normal(1, N, T, D))


def recurrent(cell):
    return linen(nn.RNN(cell), normal(1, N, T, D))


@network(SOURCE)
def lstm():
    return recurrent(nn.LSTMCell(5, param_dtype=jnp.float64))


@network(SOURCE)
def optimized_lstm():
    return recurrent(nn.OptimizedLSTMCell(5, param_dtype=jnp.float64))


@network(SOURCE)
def gru():
    return recurrent(nn.GRUCell(5, param_dtype=jnp.float64))


@network(SOURCE)
def convolutional_lstm():
    return linen(nn.RNN(nn.ConvLSTMCell(3, (3,), param_dtype=jnp.float64)), normal(1, N, T, 5, 2))


@network(SOURCE)
def bidirectional():
    return linen(
        nn.Bidirectional(
            nn.RNN(nn.GRUCell(4, param_dtype=jnp.float64)),
            nn.RNN(nn.MGUCell(4, param_dtype=jnp.float64)),
        ),
        normal(1, N, T, D),
    )


@network(SOURCE)
def fused_gru():
    """A recurrent kernel of unequal parts, as dm-haiku's and cuDNN's are."""

    def forward(p, x):
        gates, candidate = jnp.split(p["hidden"], [10], 1)

        def step(h, x):
            a = x @ p["input"] + p["bias"]
            z, r = jnp.split(nn.sigmoid(a[:, :10] + h @ gates), 2, -1)
            return (1 - z) * h + z * jnp.tanh(a[:, 10:] + (r * h) @ candidate), None

        return lax.scan(step, jnp.zeros((len(x), 5)), jnp.swapaxes(x, 0, 1))[0]

    return pure(forward, {"hidden": (5, 15), "input": (D, 15), "bias": (15,)}, normal(1, N, T, D))


@network(SOURCE)
def mamba2():
    """A state space dual layer: short convolution, decays, a scan over time, and a gated norm."""

    def forward(p, x):
        z, u, dt = jnp.split(x @ p["in"], [D, 2 * D + 4], -1)
        padded = jnp.pad(u, ((0, 0), (2, 0), (0, 0)))
        u = nn.silu(sum(padded[:, k : k + T] * p["conv"][k] for k in range(3)) + p["conv_bias"])
        u, b, c = jnp.split(u, [D, D + 2], -1)
        dt = nn.softplus(dt + p["dt_bias"])
        decay = jnp.exp(-dt * jnp.exp(p["log_a"]))

        def step(h, now):
            decay, dt, u, b, c = now
            h = decay[..., None, None] * h + (dt[..., None] * u)[..., None] * b[:, None, None]
            return h, jnp.einsum("nhds,ns->nhd", h, c)

        u = u.reshape(len(x), T, 2, D // 2)
        moved = [jnp.swapaxes(a, 0, 1) for a in (decay, dt, u, b, c)]
        start = jnp.zeros((len(x), 2, D // 2, 2))
        y = jnp.swapaxes(lax.scan(step, start, tuple(moved))[1], 0, 1) + u * p["skip"][:, None]
        y = y.reshape(len(x), T, D) * nn.silu(z)
        y = y * lax.rsqrt(jnp.mean(y**2, -1, keepdims=True) + 1e-5) * p["scale"]
        return y @ p["out"]

    shapes = {"in": (D, 2 * D + 4 + 2), "conv": (3, D + 4), "conv_bias": (D + 4,)}
    shapes |= {"dt_bias": (2,), "log_a": (2,), "skip": (2,), "scale": (D,), "out": (D, D)}
    return pure(forward, shapes, normal(1, N, T, D))


@network(SOURCE)
def linear_recurrent_unit():
    """Diagonal complex states; decays and angles are real parameters."""

    def forward(p, x):
        size = jnp.exp(-jnp.exp(p["nu"]))
        real, imag = size * jnp.cos(p["theta"]), size * jnp.sin(p["theta"])

        def step(h, x):
            a, b = h
            u, v = x @ p["b_real"], x @ p["b_imag"]
            a, b = real * a - imag * b + u, real * b + imag * a + v
            return (a, b), a @ p["c_real"] - b @ p["c_imag"] + x * p["skip"]

        start = (jnp.zeros((len(x), 6)),) * 2
        return jnp.swapaxes(lax.scan(step, start, jnp.swapaxes(x, 0, 1))[1], 0, 1)

    shapes = dict.fromkeys(("b_real", "b_imag"), (D, 6)) | {"nu": (6,), "theta": (6,)}
    shapes |= dict.fromkeys(("c_real", "c_imag"), (6, D)) | {"skip": (D,)}
    return pure(forward, shapes, normal(1, N, T, D))


@network(SOURCE)
def fourier_operator():
    """FNO: complex kernels multiply the Fourier modes."""

    def forward(p, x):
        h = x @ p["lift"]
        modes = jnp.fft.rfft(h, axis=1)[:, :2]
        kernel = p["real"] + 1j * p["imag"]
        mixed = jnp.einsum("nkd,kde->nke", modes, kernel)
        h = jnp.fft.irfft(jnp.pad(mixed, ((0, 0), (0, 1), (0, 0))), T, axis=1) + h @ p["local"]
        return nn.gelu(h) @ p["project"]

    shapes = {"lift": (2, D), "real": (2, D, D), "imag": (2, D, D), "local": (D, D)}
    return pure(forward, shapes | {"project": (D, 1)}, normal(1, N, T, 2))


@network(SOURCE)
def operator_network():
    """DeepONet: the trunk sees the same points for every function."""

    def forward(p, x):
        points = jnp.linspace(0, 1, T)[:, None]
        trunk = jnp.tanh(jnp.tanh(points @ p["t1"] + p["tb1"]) @ p["t2"] + p["tb2"])
        branch = jnp.tanh(x @ p["b1"] + p["bb1"]) @ p["b2"]
        return branch @ trunk.T + p["bias"]

    shapes = {"t1": (1, 6), "tb1": (6,), "t2": (6, 5), "tb2": (5,), "b1": (D, 6), "bb1": (6,)}
    return pure(forward, shapes | {"b2": (6, 5), "bias": ()}, normal(1, N, D))


@network(SOURCE)
def physics_informed():
    """A Laplacian by the network's input inside the loss."""

    def forward(p, x):
        def u(x):
            return jnp.dot(jnp.tanh(jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]), p["w3"])

        return jax.vmap(lambda x: jnp.trace(jax.hessian(u)(x)) + jnp.sin(u(x)))(x)[:, None]

    shapes = {"w1": (2, 6), "b1": (6,), "w2": (6, 6), "b2": (6,), "w3": (6,)}
    return pure(forward, shapes, normal(1, N, 2))


@network(SOURCE)
def siren():
    class Siren(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x = jnp.sin(3.0 * nn.Dense(6)(x))
            return nn.Dense(1)(x)

    return linen(Siren(), normal(1, N, 2))


@network(SOURCE)
def perceiver():
    """Learned queries that attend to each example."""

    class Perceiver(nn.Module):
        @nn.compact
        def __call__(self, x):
            latents = self.param("latents", nn.initializers.normal(), (2, D))
            latents = jnp.broadcast_to(nn.LayerNorm()(latents), (len(x), 2, D))
            latents = latents + nn.MultiHeadDotProductAttention(2)(latents, x)
            return nn.Dense(3)(Block()(latents).mean(1))

    return linen(Perceiver(), normal(1, N, T, D))


@network(SOURCE)
def slot_attention():
    def forward(p, x):
        slots, keys, values = p["slots"], x @ p["key"], x @ p["value"]
        for _ in range(2):
            attention = jax.nn.softmax((slots @ p["query"]) @ jnp.swapaxes(keys, 1, 2), axis=1)
            slots = jnp.tanh(slots + (attention @ values) @ p["update"])
        return slots

    shapes = dict.fromkeys(("query", "key", "value", "update"), (D, D)) | {"slots": (2, D)}
    return pure(forward, shapes, normal(1, N, T, D))


@network(SOURCE)
def hyper_network():
    """The kernel of the second layer is the output of the first."""

    def forward(p, x, z):
        kernel = (jnp.tanh(z @ p["w"] + p["b"]) @ p["out"]).reshape(len(z), D, 3)
        return jnp.einsum("nd,nde->ne", x, kernel)

    shapes = {"w": (4, 6), "b": (6,), "out": (6, 3 * D)}
    return pure(forward, shapes, normal(1, N, D), normal(2, N, 4))


@network(SOURCE)
def made():
    """Masks on kernels."""

    def forward(p, x):
        first = jnp.arange(D)[:, None] <= jnp.arange(12)[None] % D
        h = jnp.tanh(x @ (p["w"] * first) + p["b"])
        return h @ jnp.where(first.T[:, :D] & (jnp.arange(D) > 0), p["v"], 0) + p["c"]

    return pure(forward, {"w": (D, 12), "b": (12,), "v": (12, D), "c": (D,)}, normal(1, N, D))


@network(SOURCE)
def low_rank_adapters():
    """LoRA beside a frozen kernel."""

    def forward(p, x):
        frozen = normal(5, D, D)
        h = jnp.tanh(x @ frozen + (x @ p["a"]) @ p["b"] * 2.0)
        return h @ (frozen + p["a"] @ p["b"]) * p["magnitude"]

    return pure(forward, {"a": (D, 2), "b": (2, D), "magnitude": (D,)}, normal(1, N, D))


@network(SOURCE)
def variational_autoencoder():
    class VAE(nn.Module):
        @nn.compact
        def __call__(self, x, noise):
            h = nn.relu(nn.Dense(8)(x))
            mean, scale = nn.Dense(3)(h), nn.softplus(nn.Dense(3)(h))
            return nn.Dense(D)(nn.relu(nn.Dense(8)(mean + scale * noise)))

    return linen(VAE(), normal(1, N, D), normal(2, N, 3))


@network(SOURCE)
def dcgan_generator():
    class Generator(nn.Module):
        @nn.compact
        def __call__(self, z):
            x = nn.leaky_relu(nn.Dense(4 * 6)(z).reshape(len(z), 2, 2, 6))
            x = nn.leaky_relu(nn.GroupNorm(2)(nn.ConvTranspose(4, (3, 3), (2, 2))(x)))
            return jnp.tanh(nn.ConvTranspose(2, (3, 3), (2, 2))(x))

    return linen(Generator(), normal(1, N, 5))


@network(SOURCE, mixes=True)
def contrastive():
    """Two towers whose examples meet in the loss, with a learned temperature."""

    def forward(p, x, y):
        a, b = jnp.tanh(x @ p["wx"]) @ p["vx"], jnp.tanh(y @ p["wy"]) @ p["vy"]
        a, b = (z / jnp.linalg.norm(z, axis=-1, keepdims=True) for z in (a, b))
        scores = jnp.mean(a * b, -1, keepdims=True) * jnp.exp(p["temperature"])
        return scores + 0.1 * jnp.mean(a, 0)

    shapes = {"wx": (D, 6), "vx": (6, 4), "wy": (5, 6), "vy": (6, 4), "temperature": ()}
    return pure(forward, shapes, normal(1, N, D), normal(2, N, 5))


@network(SOURCE)
def wave_net():
    class WaveNet(nn.Module):
        @nn.compact
        def __call__(self, x):
            x, skips = nn.Conv(6, (1,))(x), 0.0
            for dilation in (1, 2):
                h = nn.Conv(12, (2,), kernel_dilation=dilation, padding="CAUSAL")(x)
                h = jnp.tanh(h[..., :6]) * nn.sigmoid(h[..., 6:])
                x, skips = x + nn.Conv(6, (1,))(h), skips + nn.Conv(4, (1,))(h)
            return nn.Conv(3, (1,))(nn.relu(skips))

    return linen(WaveNet(), normal(1, N, 6, 2))


@network(SOURCE)
def rwkv():
    """Token shift with learned mixing, decays through exp, and a scan over time."""

    def forward(p, x):
        before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        k, v, r = ((x * p[f"mix_{c}"] + before * (1 - p[f"mix_{c}"])) @ p[c] for c in "kvr")

        def step(state, now):
            (a, b), (k, v) = state, now
            e = jnp.exp(p["bonus"] + k)
            out = (a + e * v) / (b + e)
            decay = jnp.exp(-jnp.exp(p["decay"]))
            return (decay * a + jnp.exp(k) * v, decay * b + jnp.exp(k)), out

        start = (jnp.zeros((len(x), D)), jnp.ones((len(x), D)))
        mixed = lax.scan(step, start, (jnp.swapaxes(k, 0, 1), jnp.swapaxes(v, 0, 1)))[1]
        return (jax.nn.sigmoid(r) * jnp.swapaxes(mixed, 0, 1)) @ p["o"]

    shapes = dict.fromkeys("kvro", (D, D)) | {f"mix_{c}": (D,) for c in "kvr"}
    return pure(forward, shapes | {"bonus": (D,), "decay": (D,)}, normal(1, N, T, D))


@network(SOURCE, tolerance=SINGLE)
def grouped_queries():
    """Llama's attention on one fused kernel, with rotary positions and a gated MLP."""

    def forward(p, ids):
        x = p["words"][ids]
        h = x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * p["scale"]
        q, k, v = jnp.split(h @ p["qkv"], [D, D + 4], -1)
        q, k, v = (a.reshape(*a.shape[:2], -1, 4) for a in (q, k, v))
        angle = jnp.arange(T)[:, None, None] * jnp.array([1.0, 0.1])

        def turned(a):
            left, right = a[..., :2], a[..., 2:]
            turned = left * jnp.cos(angle) - right * jnp.sin(angle)
            return jnp.concatenate([turned, left * jnp.sin(angle) + right * jnp.cos(angle)], -1)

        mixed = jax.nn.dot_product_attention(turned(q), turned(k), v, is_causal=True)
        x = x + mixed.reshape(*x.shape) @ p["out"]
        up, gate = jnp.split(x @ p["up"], 2, -1)
        return (x + (jax.nn.silu(gate) * up) @ p["down"]) @ p["words"].T, ids

    shapes = {"words": (V, D), "scale": (D,), "qkv": (D, D + 8), "out": (D, D)}
    shapes |= {"up": (D, 24), "down": (12, D)}
    return pure(forward, shapes, tokens(1, N, T), measure=lambda out: next_word(*out))


@network(SOURCE)
def kolmogorov_arnold():
    """Splines on edges: radial functions of each input, with a kernel for each."""

    def forward(p, x):
        for name in ("first", "second"):
            basis = jnp.exp(-((x[..., None] - jnp.linspace(-1, 1, 4)) ** 2) * 4)
            x = jnp.einsum("ndk,dke->ne", basis, p[name]) + nn.silu(x) @ p[f"{name}_base"]
        return x

    shapes = {"first": (D, 4, 5), "first_base": (D, 5), "second": (5, 4, 2), "second_base": (5, 2)}
    return pure(forward, shapes, normal(1, N, D))
