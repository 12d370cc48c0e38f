"""Tiny random models of every architecture, with their logits by Hugging Face transformers.

Writes tests/golden/tiny_models/NAME/{config.json, model.safetensors, golden.safetensors}; the last holds
`ids` (int64 [2, 24]) and `logits` (float32 [2, 24, vocab]). Needs torch, numpy, safetensors and
transformers==5.17.0; runs on the CPU.

    python tools/golden/tiny_models.py
"""

import pathlib

import torch
import transformers
from safetensors.torch import save_file

OUT = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden" / "tiny_models"
VOCAB, TOKENS = 61, 24

COMMON = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
              max_position_embeddings=32, bos_token_id=0, eos_token_id=2)
LLAMA = dict(COMMON, intermediate_size=44, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False)
# Wavelengths of head_dim 16 and base 100 lie on both sides of, and between, the two borders 8 and 32.
LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=100.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=32)
OPT = dict(COMMON, ffn_dim=48, pad_token_id=1, activation_function="relu")

MODELS = {
    "llama2": transformers.LlamaConfig(**dict(LLAMA, num_key_value_heads=4)),
    "llama3": transformers.LlamaConfig(**dict(LLAMA, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                                              max_position_embeddings=128, rope_parameters=LLAMA3_ROPE,
                                              tie_word_embeddings=True)),
    "llama_linear_rope": transformers.LlamaConfig(**LLAMA, rope_parameters=dict(rope_type="linear", factor=2.0,
                                                                                rope_theta=10000.0)),
    "llama_biased": transformers.LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True),
    "mistral": transformers.MistralConfig(**LLAMA, sliding_window=7),
    "qwen2": transformers.Qwen2Config(**{k: v for k, v in LLAMA.items() if k != "head_dim"}),
    "qwen3": transformers.Qwen3Config(**dict(LLAMA, head_dim=12)),
    "arcee": transformers.ArceeConfig(**LLAMA),
    "opt": transformers.OPTConfig(**OPT),
    "opt_post_norm": transformers.OPTConfig(**OPT, do_layer_norm_before=False, word_embed_proj_dim=20),
}


def make(name, config, seed):
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            is_norm = "norm" in key and key.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if is_norm else 0.0))
        ids = torch.randint(3, VOCAB, (2, TOKENS))
        logits = model(ids, use_cache=False).logits
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_file({"ids": ids, "logits": logits.contiguous()}, folder / "golden.safetensors",
              metadata={"made_with": f"transformers {transformers.__version__}, torch {torch.__version__}, float32"})


for number, (model_name, model_config) in enumerate(MODELS.items()):
    make(model_name, model_config, number)
    print(model_name)
