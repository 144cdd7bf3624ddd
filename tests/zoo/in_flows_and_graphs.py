"""Flows (distrax, flowjax, numpyro), graph networks (jraph, e3nn-jax), and penzai."""

import jax
import jax.numpy as jnp
import numpy as np
from zoo.catalogue import (
    SINGLE,
    D,
    N,
    T,
    V,
    filled,
    mean_square,
    network,
    next_word,
    normal,
    tokens,
)

SOURCE = "flows, graphs and penzai"
KEY = jax.random.key(0)


def flow(build, width=4):
    """A flowjax distribution; the loss is minus the mean log-likelihood."""
    import equinox as eqx
    from paramax import unwrap

    params, rest = eqx.partition(build(), eqx.is_inexact_array)

    def loss(params, x):
        return -jnp.mean(jax.vmap(unwrap(eqx.combine(params, rest)).log_prob)(x))

    params = jax.tree.map(lambda x: x + 0.05 * normal(x.size, *x.shape), params)
    return loss, params, normal(1, N, width)


@network(SOURCE, tolerance=SINGLE)
def masked_autoregressive_flow():
    from flowjax.distributions import Normal
    from flowjax.flows import masked_autoregressive_flow

    return flow(
        lambda: masked_autoregressive_flow(
            KEY, base_dist=Normal(jnp.zeros(4)), flow_layers=2, nn_width=8, nn_depth=1
        )
    )


@network(SOURCE, tolerance=SINGLE)
def coupling_flow():
    from flowjax.bijections import RationalQuadraticSpline
    from flowjax.distributions import Normal
    from flowjax.flows import coupling_flow

    return flow(
        lambda: coupling_flow(
            KEY,
            base_dist=Normal(jnp.zeros(4)),
            transformer=RationalQuadraticSpline(knots=3, interval=3),
            flow_layers=2,
            nn_width=8,
            nn_depth=1,
        )
    )


@network(SOURCE, tolerance=SINGLE)
def planar_flow():
    from flowjax.distributions import Normal
    from flowjax.flows import planar_flow

    return flow(
        lambda: planar_flow(
            KEY, base_dist=Normal(jnp.zeros(4)), flow_layers=2, invert=False, negative_slope=0.1
        )
    )


@network(SOURCE, tolerance=SINGLE, rises=True)
def triangular_spline_flow():
    """Half of its leaves are in no layer and move by Adam with the momentum of `kfac`, too far."""
    from flowjax.distributions import Normal
    from flowjax.flows import triangular_spline_flow

    return flow(
        lambda: triangular_spline_flow(KEY, base_dist=Normal(jnp.zeros(4)), flow_layers=2, knots=3)
    )


@network(SOURCE, tolerance=SINGLE)
def real_nvp():
    """Distrax's affine coupling on haiku's networks."""
    import distrax
    import haiku as hk

    mask = np.arange(4) % 2 == 0

    def log_prob(x):
        layers = []
        for k in range(2):
            net = hk.nets.MLP([8, 8])
            layers.append(
                distrax.MaskedCoupling(
                    mask=mask ^ bool(k),
                    bijector=lambda p: distrax.ScalarAffine(p[..., :4], log_scale=p[..., 4:]),
                    conditioner=net,
                )
            )
        base = distrax.MultivariateNormalDiag(jnp.zeros(4), jnp.ones(4))
        return distrax.Transformed(base, distrax.Inverse(distrax.Chain(layers))).log_prob(x)

    made = hk.without_apply_rng(hk.transform(log_prob))
    x = normal(1, N, 4)
    params = filled(jax.eval_shape(lambda x: made.init(KEY, x), x))
    return (lambda p, x: -jnp.mean(made.apply(p, x))), params, x


@network(SOURCE, tolerance=SINGLE, rises=True)
def numpyro_autoregressive():
    """The masked dense layers of MADE; the density of three examples has no bound."""
    from numpyro.nn import AutoregressiveNN

    init, apply = AutoregressiveNN(4, [8, 8], param_dims=[1, 1])
    params = filled(init(jax.random.PRNGKey(0), (4,))[1])

    def loss(params, x):
        mean, log_scale = apply(params, x)
        return jnp.mean(jnp.sum(((x - mean) * jnp.exp(-log_scale)) ** 2 / 2 + log_scale, -1))

    return loss, params, normal(1, N, 4)


def graph_of(edges=6, nodes=4):
    import jraph

    senders, receivers = np.random.default_rng(0).integers(0, nodes, (2, edges))
    return lambda x: jraph.GraphsTuple(
        nodes=x,
        edges=normal(3, edges, 3),
        senders=jnp.asarray(senders),
        receivers=jnp.asarray(receivers),
        n_node=jnp.array([nodes]),
        n_edge=jnp.array([edges]),
        globals=jnp.ones((1, 2)),
    )


def graph_network(make):
    """A network on one graph, whose nodes have other features in each example."""
    import haiku as hk

    make_graph = graph_of()

    def forward(x):
        return make(hk)(make_graph(x)).nodes

    made = hk.without_apply_rng(hk.transform(forward))
    x = normal(1, N, 4, 5)
    params = filled(jax.eval_shape(lambda x: made.init(KEY, x), x[0]))
    return (lambda p, x: mean_square(jax.vmap(lambda x: made.apply(p, x))(x))), params, x


@network(SOURCE)
def graph_net():
    import jraph

    def make(hk):
        def mlp(*parts):
            return hk.nets.MLP([6, 5])(jnp.concatenate(parts, -1))

        return jraph.GraphNetwork(
            lambda e, s, r, g: mlp(e, s, r, g),
            lambda n, s, r, g: mlp(n, s, r, g),
            lambda n, e, g: mlp(n, e, g),
        )

    return graph_network(make)


@network(SOURCE)
def graph_attention():
    import jraph

    def make(hk):
        return jraph.GAT(
            lambda n: hk.Linear(6)(n),
            lambda s, r, e: hk.Linear(1)(jax.nn.leaky_relu(jnp.concatenate([s, r], -1))),
            lambda n: jax.nn.elu(n),
        )

    return graph_network(make)


@network(SOURCE)
def graph_convolution():
    import jraph

    return graph_network(lambda hk: jraph.GraphConvolution(lambda n: hk.Linear(6)(n)))


def equivariant(build, width):
    import e3nn_jax as e3nn

    module, irreps = build(e3nn)
    x = normal(1, N, width)

    def apply(params, x):
        return module.apply({"params": params}, e3nn.IrrepsArray(irreps, x)).array

    shapes = jax.eval_shape(lambda x: module.init(KEY, e3nn.IrrepsArray(irreps, x)), x)["params"]
    return (lambda p, x: mean_square(apply(p, x))), filled(shapes), x


@network(SOURCE, tolerance=SINGLE)
def e3nn_linear():
    def build(e3nn):
        return e3nn.flax.Linear("3x0e + 2x1o"), "4x0e + 2x1o"

    return equivariant(build, 10)


@network(SOURCE, tolerance=SINGLE)
def e3nn_perceptron():
    def build(e3nn):
        return e3nn.flax.MultiLayerPerceptron([6, 6, 3], jax.nn.silu), "5x0e"

    return equivariant(build, 5)


@network(SOURCE, tolerance=SINGLE)
def penzai_llama():
    from penzai import pz
    from penzai.models.transformer.variants import llamalike_common

    config = llamalike_common.LlamalikeTransformerConfig(
        num_kv_heads=1,
        query_head_multiplier=2,
        embedding_dim=D,
        projection_dim=4,
        mlp_hidden_dim=12,
        num_decoder_blocks=1,
        vocab_size=V,
        mlp_variant="swiglu",
        tie_embedder_and_logits=True,
        rope_wavelength=10_000,
        rms_norm_eps=1e-6,
        attention_type=llamalike_common.AttentionTypeGlobalCausal(),
        use_post_attn_norm=False,
        use_post_ffw_norm=False,
        final_logit_softcap=None,
        attn_logits_soft_cap=None,
        query_scaling_factor="default",
        parameter_dtype=jnp.float32,
        activation_dtype=jnp.float32,
        use_layer_stack=False,
    )
    model = llamalike_common.build_llamalike_transformer(
        config, init_base_rng=jax.random.key(0), name="model"
    )
    unbound, variables = pz.unbind_params(model, freeze=True)
    arrays = {v.label: v.value for v in variables}
    names = {label: tuple(x.named_shape) for label, x in arrays.items()}
    params = filled({k: x.unwrap(*names[k]) for k, x in arrays.items()})

    def loss(params, ids):
        values = [
            pz.ParameterValue(value=pz.nx.wrap(params[k]).tag(*names[k]), label=k) for k in params
        ]
        bound = pz.bind_variables(unbound, values)
        logits = bound(
            pz.nx.wrap(ids).tag("batch", "seq"),
            token_positions=pz.nx.wrap(jnp.arange(T)).tag("seq"),
        )
        return next_word(logits.unwrap("batch", "seq", "vocabulary"), ids)

    return loss, params, tokens(1, N, T)
