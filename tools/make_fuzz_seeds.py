"""Small inputs for the fuzzers of io: fuzz/corpus/{safetensors,config,checkpoint}.

    python3 tools/make_fuzz_seeds.py

The standard library is enough. The same run gives the same files.
"""

import json
import pathlib
import struct

ROOT = pathlib.Path(__file__).resolve().parents[1]
CORPUS = ROOT / "fuzz" / "corpus"
SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1}


def safetensors(tensors, metadata=None):
    """tensors: [(name, dtype, shape, bytes)]"""
    header, data = {}, b""
    if metadata:
        header["__metadata__"] = metadata
    for name, dtype, shape, content in tensors:
        count = 1
        for extent in shape:
            count *= extent
        assert len(content) == count * SIZES[dtype], name
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data


def bf16(values):
    return b"".join(struct.pack("<f", value)[2:] for value in values)


def i64(values):
    return struct.pack(f"<{len(values)}q", *values)


def matrix(rows, columns, keep):
    """A dense matrix as lists, 1, 2, 3, ... where keep(row, column)."""
    return [[float(r * columns + c + 1) if keep(r, c) else 0.0 for c in range(columns)] for r in range(rows)]


def bitmap(dense):
    packed = b""
    for row in dense:
        bits = bytearray((len(row) + 7) // 8)
        for column, value in enumerate(row):
            bits[column // 8] |= (value != 0) << (column % 8)
        packed += bytes(bits)
    return packed


def kept(dense):
    return [value for row in dense for value in row if value]


def declare(weights):
    return {"model_type": "llama", "lacuna": {"format_version": 1, "weights": {
        name: {"pattern": pattern, "shape": shape, "values": "BF16"} for name, pattern, shape in weights}}}


def checkpoint(config, tensors):
    return json.dumps(config, separators=(",", ":")).encode() + b"\0" + safetensors(tensors)


def unstructured():
    dense = matrix(66, 11, lambda r, c: (r + c) % 3 == 0)
    groups = [0, len(kept(dense[:64])), len(kept(dense))]
    return checkpoint(declare([("w", "unstructured", [66, 11])]), [
        ("w.bitmap", "U8", [66, 2], bitmap(dense)),
        ("w.values", "BF16", [groups[-1]], bf16(kept(dense))),
        ("w.offsets", "I64", [3], i64(groups)),
        ("norm.weight", "F32", [2], struct.pack("<2f", 1, 2))])


def keep_of():
    dense = matrix(3, 10, lambda r, c: c % 4 < 2)
    return checkpoint(declare([("w", "2:4", [3, 10])]), [
        ("w.bitmap", "U8", [3, 2], bitmap(dense)), ("w.values", "BF16", [3, 6], bf16(kept(dense)))])


def block():
    return checkpoint(declare([("w", "block:2x4", [3, 7])]), [
        ("w.block_columns", "I32", [3], struct.pack("<3i", 0, 1, 1)),
        ("w.block_offsets", "I64", [3], i64([0, 2, 3])),
        ("w.values", "BF16", [3, 2, 4], bf16([float(i) for i in range(24)]))])


def sparse_bitmask(prefix="m."):
    dense = matrix(3, 9, lambda r, c: (r + c) % 2)
    offsets = [len(kept(dense[:r])) for r in range(3)]
    return checkpoint({"quantization_config": {"sparsity_config": {"format": "sparse-bitmask"}}}, [
        (prefix + "bitmask", "U8", [3, 2], bitmap(dense)),
        (prefix + "compressed", "BF16", [len(kept(dense))], bf16(kept(dense))),
        (prefix + "row_offsets", "I64", [3], i64(offsets)),
        (prefix + "shape", "I64", [2], i64([3, 9]))])


def sparse_24():
    dense = matrix(2, 8, lambda r, c: (r + c) % 4 < 2)
    return checkpoint({"quantization_config": {"sparsity_config": {"format": "sparse-24-bitmask"}}}, [
        ("m.bitmask", "U8", [2, 1], bitmap(dense)), ("m.compressed", "BF16", [2, 4], bf16(kept(dense))),
        ("m.shape", "I64", [2, 1], i64([2, 8]))])


def dense_declared():
    dense = matrix(2, 8, lambda r, c: c % 8 < 4)
    return checkpoint(declare([("w", "4:8", [2, 8])]), [
        ("w", "BF16", [2, 8], bf16([value for row in dense for value in row]))])


def vector():
    return checkpoint({"model_type": "opt"}, [
        ("decoder.embed_tokens.weight", "BF16", [1, 2], bf16([1, 2])),
        ("n.bias.bitmask", "U8", [1], bytes([5])), ("n.bias.compressed", "BF16", [2], bf16([1, 2])),
        ("n.bias.row_offsets", "I64", [], i64([0])), ("n.bias.shape", "I64", [1], i64([3]))])


def configs():
    for folder in sorted((ROOT / "tests" / "golden" / "tiny_models").iterdir()):
        config = json.loads((folder / "config.json").read_text())
        yield folder.name, json.dumps(config, separators=(",", ":")).encode() + b"\0" + b'{"eos_token_id":[2,3]}'
    yield "transformers4", json.dumps({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2,
        "num_attention_heads": 8, "vocab_size": 512, "torch_dtype": "float16", "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192}}, separators=(",", ":")).encode()
    yield "compact", json.dumps(declare([("a", "unstructured", [64, 64]), ("b", "2:4", [8, 8]),
                                         ("c", "block:32x32", [64, 64])]), separators=(",", ":")).encode()


def containers():
    yield "empty", safetensors([])
    yield "metadata", safetensors([("a", "F32", [1], b"abcd")], {"format": "pt"})
    yield "several", safetensors([("a", "F32", [2, 1], bytes(8)), ("b", "BF16", [3], bytes(6)),
                                  ("c", "I64", [0, 5], b""), ("d", "F8_E4M3", [2], b"ab"), ("e", "U8", [], b"x")])
    yield "header_2_60", struct.pack("<Q", 1 << 60) + b"{}"
    yield "truncated", safetensors([("a", "F32", [4], bytes(16))])[:-3]
    overlapping = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}'
    yield "overlapping", struct.pack("<Q", len(overlapping)) + overlapping + bytes(6)


def main():
    seeds = {
        "safetensors": dict(containers()),
        "config": dict(configs()),
        "checkpoint": {"unstructured": unstructured(), "keep_of": keep_of(), "block": block(),
                       "sparse_bitmask": sparse_bitmask(), "sparse_bitmask_old": sparse_bitmask("m.weight."),
                       "sparse_24": sparse_24(), "dense_declared": dense_declared(), "vector": vector()},
    }
    for fuzzer, inputs in seeds.items():
        folder = CORPUS / fuzzer
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in inputs.items():
            (folder / name).write_bytes(content)


if __name__ == "__main__":
    main()
