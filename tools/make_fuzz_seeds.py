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
    """weights: [(name, pattern, shape)] or [(name, pattern, shape, quantization)]"""
    entries = {}
    for name, pattern, shape, *quantization in weights:
        entries[name] = {"pattern": pattern, "shape": shape, "values": "BF16"}
        if quantization:
            entries[name]["quantization"] = quantization[0]
    version = 2 if any("quantization" in entry for entry in entries.values()) else 1
    return {"model_type": "llama", "lacuna": {"format_version": version, "weights": entries}}


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


def nibbles(codes):
    """Two 4-bit codes a byte, the first in the low half."""
    codes = codes + [0] * (len(codes) % 2)
    return bytes(low | high << 4 for low, high in zip(codes[::2], codes[1::2]))


def codes(dense):
    """Made-up 4-bit codes of the kept columns of each row, chunk by chunk of 64 columns."""
    return [b"".join(nibbles([(i * 5 + 1) % 16 for i, value in enumerate(row[first:first + 64]) if value])
                     for first in range(0, len(row), 64)) for row in dense]


def int4_unstructured():
    dense = matrix(66, 70, lambda r, c: (r + c) % 3 == 0)
    rows = codes(dense)
    offsets = [0, len(b"".join(rows[:64])), len(b"".join(rows))]
    return checkpoint(declare([("w", "unstructured", [66, 70], "int4g32z")]), [
        ("w.bitmap", "U8", [66, 9], bitmap(dense)),
        ("w.values", "U8", [offsets[-1]], b"".join(rows)),
        ("w.offsets", "I64", [3], i64(offsets)),
        ("w.scales", "BF16", [66, 3], bf16([0.5, 1, 0.25] * 66)),
        ("w.zeros", "I8", [66, 3], bytes([0, 8, 15] * 66))])


def int8_keep_of():
    dense = matrix(3, 10, lambda r, c: c % 4 < 2)
    return checkpoint(declare([("w", "2:4", [3, 10], "int8")]), [
        ("w.bitmap", "U8", [3, 2], bitmap(dense)), ("w.values", "I8", [3, 6], bytes(range(250, 256)) * 3),
        ("w.scales", "BF16", [3, 1], bf16([1, 2, 0]))])


def int4_keep_of():
    """Groups of five and chunks of 64 columns don't fall together: rows are padded."""
    dense = matrix(2, 70, lambda r, c: c % 5 < 3 if r else c % 5 in (0, 1, 4))
    return checkpoint(declare([("w", "3:5", [2, 70], "int4g128")]), [
        ("w.bitmap", "U8", [2, 9], bitmap(dense)),
        ("w.values", "U8", [2, 22], b"".join(row + bytes(22 - len(row)) for row in codes(dense))),
        ("w.scales", "BF16", [2, 1], bf16([1, 2]))])


def fp8_block():
    whole, edge, corner = [56, 184, 1, 126, 0, 2, 130, 7], [56, 184, 1, 0, 0, 2, 130, 0], [56, 184, 1, 0, 0, 0, 0, 0]
    return checkpoint(declare([("w", "block:2x4", [3, 7], "fp8g32")]), [
        ("w.block_columns", "I32", [3], struct.pack("<3i", 0, 1, 1)),
        ("w.block_offsets", "I64", [3], i64([0, 2, 3])),
        ("w.values", "F8_E4M3", [3, 2, 4], bytes(whole + edge + corner)),
        ("w.scales", "BF16", [3, 1], bf16([1, 2, 3]))])


def int4_dense():
    return checkpoint(declare([("w", "dense", [3, 5], "int4g64")]), [
        ("w.values", "U8", [3, 3], bytes([0x21, 0x43, 0x05] * 3)), ("w.scales", "BF16", [3, 1], bf16([1, 2, 3]))])


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
                                         ("c", "block:32x32", [64, 64]), ("d", "dense", [8, 8], "int8"),
                                         ("e", "2:4", [8, 8], "int4g32z")]), separators=(",", ":")).encode()


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
                       "int4_unstructured": int4_unstructured(), "int8_keep_of": int8_keep_of(),
                       "int4_keep_of": int4_keep_of(), "fp8_block": fp8_block(), "int4_dense": int4_dense(),
                       "sparse_24": sparse_24(), "dense_declared": dense_declared(), "vector": vector()},
    }
    for fuzzer, inputs in seeds.items():
        folder = CORPUS / fuzzer
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in inputs.items():
            (folder / name).write_bytes(content)


if __name__ == "__main__":
    main()
