"""Small decoders of every family: our configuration and the `transformers` model of the same sizes, random weights."""

import torch
import transformers
from towers import randomise

from coincide_jax.models.decoder import DecoderConfig

VOCAB, WIDTH, DEPTH, HEADS, MLP, LENGTH = 96, 64, 2, 4, 80, 256
BASE = dict(
    vocab=VOCAB, width=WIDTH, depth=DEPTH, heads=HEADS, kv_heads=HEADS, head_dim=WIDTH // HEADS, mlp=MLP, norm="rms",
    norm_eps=1e-4, activation="silu", gated=True, parallel=False, biases=(), head_bias=False, rotary=WIDTH // HEADS,
    rope_theta=5000.0, rope_scaling=(), positions=512, qk_norm=False, tied=False, layer_shapes=(),
)  # fmt: skip
QKV = ("wq", "wk", "wv")
OURS = {
    "llama": dict(kv_heads=2),
    "stablelm": dict(norm="layer", biases=QKV, rotary=4),
    "phi": dict(
        norm="layer", biases=(*QKV, "wo", "up", "down"), rotary=8, gated=False, parallel=True, head_bias=True,
        activation="gelu_pytorch_tanh",
    ),
    "qwen2": dict(kv_heads=2, biases=QKV, tied=True),
    "openelm": dict(qk_norm=True, tied=True, depth=3, layer_shapes=((2, 1, 48), (4, 2, 80), (4, 2, 80))),
}  # fmt: skip
THEIRS = {
    "llama": (transformers.LlamaConfig, dict(num_key_value_heads=2, rms_norm_eps=1e-4)),
    "stablelm": (
        transformers.StableLmConfig,
        dict(use_qkv_bias=True, layer_norm_eps=1e-4, partial_rotary_factor=0.25, num_key_value_heads=HEADS),
    ),
    "phi": (transformers.PhiConfig, dict(hidden_act="gelu_new", layer_norm_eps=1e-4, partial_rotary_factor=0.5)),
    "qwen2": (transformers.Qwen2Config, dict(num_key_value_heads=2, rms_norm_eps=1e-4, tie_word_embeddings=True)),
}


def config(family: str, **changes) -> DecoderConfig:
    """The small decoder of a family."""
    return DecoderConfig(family=family, **BASE | OURS[family] | changes)


def oracle(family: str, seed: int = 0) -> torch.nn.Module:
    """The same decoder in PyTorch."""
    kind, own = THEIRS[family]
    made = kind(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=DEPTH,
        num_attention_heads=HEADS, max_position_embeddings=512, rope_theta=5000.0, attn_implementation="eager",
        pad_token_id=None, bos_token_id=1, eos_token_id=2, **own,
    )  # fmt: skip
    return randomise(transformers.AutoModelForCausalLM.from_config(made).float(), seed)


# published sizes, for abstract checks
PUBLISHED = {
    "llama": dict(  # LLaMA-7B of LLaVA-1.5
        vocab=32064, width=4096, depth=32, heads=32, kv_heads=32, head_dim=128, mlp=11008, rotary=128, positions=4096,
    ),
    "stablelm": dict(  # StableLM-2-1.6B of TinyLLaVA-2.0B
        vocab=100352, width=2048, depth=24, heads=32, kv_heads=32, head_dim=64, mlp=5632, rotary=16, positions=4096,
    ),
    "phi": dict(  # Phi-2
        vocab=51200, width=2560, depth=32, heads=32, kv_heads=32, head_dim=80, mlp=10240, rotary=32, positions=2048,
    ),
    "qwen2": dict(  # Qwen2-0.5B
        vocab=151936, width=896, depth=24, heads=14, kv_heads=2, head_dim=64, mlp=4864, rotary=64, positions=32768,
    ),
    "openelm": dict(  # OpenELM-450M: layer-wise scaling of heads (12 to 24) and of the MLP (0.5 to 4 widths)
        vocab=32000, width=1536, depth=20, heads=24, kv_heads=6, head_dim=64, mlp=6144, rotary=64, positions=2048,
        layer_shapes=(
            (12, 3, 768), (12, 3, 1024), (12, 3, 1280), (12, 3, 1536), (12, 3, 1792), (16, 4, 2048), (16, 4, 2560),
            (16, 4, 2816), (16, 4, 3072), (16, 4, 3328), (20, 5, 3584), (20, 5, 3840), (20, 5, 4096), (20, 5, 4352),
            (20, 5, 4608), (20, 5, 5120), (24, 6, 5376), (24, 6, 5632), (24, 6, 5888), (24, 6, 6144),
        ),
    ),
}  # fmt: skip
