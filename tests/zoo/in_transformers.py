"""Flax models of transformers 4.x, but for T5's, which call functions of JAX by old names."""

import jax
import jax.numpy as jnp
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

SOURCE = "transformers"
TEXT = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"intermediate_size": 12, "max_position_embeddings": 16}
BART = {"vocab_size": V, "d_model": D, "encoder_layers": 1, "decoder_layers": 1}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 12}
BART |= {"decoder_ffn_dim": 12, "max_position_embeddings": 16, "pad_token_id": 0}
BART |= {"decoder_start_token_id": 1, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"image_size": 8, "patch_size": 4, "hidden_size": D, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 2, "intermediate_size": 12}
CONV = {"embedding_size": 6, "hidden_sizes": [6, 8], "depths": [1, 1]}
NO_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")

# name -> (configuration, model, its options, what it sees)
MODELS = {
    "bert": ("BertConfig", "FlaxBertForMaskedLM", TEXT, "words"),
    "roberta": ("RobertaConfig", "FlaxRobertaModel", TEXT, "words"),
    "roberta_prelayernorm": (
        "RobertaPreLayerNormConfig",
        "FlaxRobertaPreLayerNormModel",
        TEXT,
        "words",
    ),
    "xlm_roberta": ("XLMRobertaConfig", "FlaxXLMRobertaModel", TEXT, "words"),
    "albert": ("AlbertConfig", "FlaxAlbertModel", TEXT | {"embedding_size": 6}, "words"),
    "electra": ("ElectraConfig", "FlaxElectraModel", TEXT | {"embedding_size": 6}, "words"),
    "distilbert": (
        "DistilBertConfig",
        "FlaxDistilBertModel",
        {"vocab_size": V, "dim": D, "n_layers": 1, "n_heads": 2, "hidden_dim": 12},
        "words",
    ),
    "roformer": ("RoFormerConfig", "FlaxRoFormerModel", TEXT | {"embedding_size": D}, "words"),
    "big_bird": (
        "BigBirdConfig",
        "FlaxBigBirdModel",
        TEXT | {"attention_type": "original_full"},
        "words",
    ),
    "gpt2": (
        "GPT2Config",
        "FlaxGPT2LMHeadModel",
        {"vocab_size": V, "n_embd": D, "n_layer": 1, "n_head": 2, "n_positions": 16},
        "language",
    ),
    "gpt_neo": (
        "GPTNeoConfig",
        "FlaxGPTNeoForCausalLM",
        {
            "vocab_size": V,
            "hidden_size": D,
            "num_layers": 2,
            "num_heads": 2,
            "max_position_embeddings": 16,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 2,
        },
        "language",
    ),
    "gptj": (
        "GPTJConfig",
        "FlaxGPTJForCausalLM",
        {
            "vocab_size": V,
            "n_embd": D,
            "n_layer": 1,
            "n_head": 2,
            "n_positions": 16,
            "rotary_dim": 2,
        },
        "language",
    ),
    "llama": ("LlamaConfig", "FlaxLlamaForCausalLM", TEXT, "language"),
    "mistral": (
        "MistralConfig",
        "FlaxMistralForCausalLM",
        TEXT | {"num_key_value_heads": 1, "sliding_window": 8},
        "language",
    ),
    "gemma": (
        "GemmaConfig",
        "FlaxGemmaForCausalLM",
        TEXT | {"num_key_value_heads": 1, "head_dim": 4},
        "language",
    ),
    "opt": (
        "OPTConfig",
        "FlaxOPTForCausalLM",
        {
            "vocab_size": V,
            "hidden_size": D,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "ffn_dim": 12,
            "max_position_embeddings": 16,
            "word_embed_proj_dim": D,
        },
        "language",
    ),
    "bloom": (
        "BloomConfig",
        "FlaxBloomForCausalLM",
        {"vocab_size": V, "hidden_size": D, "n_layer": 1, "n_head": 2},
        "language",
    ),
    "xglm": (
        "XGLMConfig",
        "FlaxXGLMForCausalLM",
        {
            "vocab_size": V,
            "d_model": D,
            "ffn_dim": 12,
            "num_layers": 1,
            "attention_heads": 2,
            "max_position_embeddings": 16,
        },
        "language",
    ),
    "bart": ("BartConfig", "FlaxBartForConditionalGeneration", BART, "pairs"),
    "mbart": ("MBartConfig", "FlaxMBartForConditionalGeneration", BART, "pairs"),
    "pegasus": ("PegasusConfig", "FlaxPegasusForConditionalGeneration", BART, "pairs"),
    "blenderbot": ("BlenderbotConfig", "FlaxBlenderbotForConditionalGeneration", BART, "pairs"),
    "blenderbot_small": (
        "BlenderbotSmallConfig",
        "FlaxBlenderbotSmallForConditionalGeneration",
        BART,
        "pairs",
    ),
    "marian": ("MarianConfig", "FlaxMarianMTModel", BART, "pairs"),
    "whisper": (
        "WhisperConfig",
        "FlaxWhisperForConditionalGeneration",
        BART | {"num_mel_bins": 4, "max_source_positions": 4, "max_target_positions": 8},
        "speech",
    ),
    "wav2vec2": (
        "Wav2Vec2Config",
        "FlaxWav2Vec2Model",
        {
            "hidden_size": D,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 12,
            "conv_dim": [6, 6],
            "conv_stride": [2, 2],
            "conv_kernel": [3, 3],
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "do_stable_layer_norm": True,
            "feat_extract_norm": "layer",
            "mask_time_prob": 0.0,
        },
        "waves",
    ),
    "vit": ("ViTConfig", "FlaxViTModel", VISION, "images"),
    "beit": (
        "BeitConfig",
        "FlaxBeitModel",
        VISION | {"use_relative_position_bias": True},
        "images",
    ),
    "dinov2": ("Dinov2Config", "FlaxDinov2Model", VISION, "images"),
    "resnet": ("ResNetConfig", "FlaxResNetModel", CONV, "images"),
    "regnet": ("RegNetConfig", "FlaxRegNetModel", CONV | {"groups_width": 2}, "images"),
}


def builder(config_name, model_name, options, sees):
    def build():
        import transformers

        config = getattr(transformers, config_name)(
            **options, **{name: 0.0 for name in NO_DROPOUT if name not in options}
        )
        model = getattr(transformers, model_name)(
            config, _do_init=False, dtype=jnp.result_type(float), input_shape=shape_of(sees)
        )
        variables = jax.eval_shape(lambda: model.init_weights(jax.random.key(0), shape_of(sees)))
        variables = dict(variables)
        state = {"params": variables} if "params" not in variables else variables
        values = filled(state)
        params = values.pop("params")
        return loss_of(model, sees, values), params, *inputs_of(sees)

    return build


def shape_of(sees):
    shapes = {"images": (1, 8, 8, 3), "waves": (1, 40), "speech": (1, 4, 8)}
    return shapes.get(sees, (1, T))


def inputs_of(sees):
    if sees == "images":
        return (normal(1, N, 3, 8, 8),)
    if sees == "waves":
        return (normal(1, N, 40),)
    if sees == "speech":
        return normal(1, N, 4, 8), tokens(2, N, T)
    return (tokens(1, N, T), tokens(2, N, T)) if sees == "pairs" else (tokens(1, N, T),)


def loss_of(model, sees, rest):
    """The next word's cross-entropy, or a square of the last hidden states."""

    def loss(params, *inputs):
        given = {"params": params, **rest} if rest else params
        if sees in ("pairs", "speech"):
            source, target = inputs
            first = {"input_features" if sees == "speech" else "input_ids": source}
            out = model(**first, decoder_input_ids=target, params=given)
            return next_word(out.logits, target)
        out = model(*inputs, params=given)
        if sees == "language":
            return next_word(out.logits, inputs[0])
        return mean_square(out.logits if "logits" in out else out.last_hidden_state)

    return loss


for name, (config, model, options, sees) in MODELS.items():
    build = builder(config, model, options, sees)
    build.__name__ = name
    network(SOURCE, tolerance=SINGLE)(build)
