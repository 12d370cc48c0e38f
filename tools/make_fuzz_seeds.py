"""Small inputs for the fuzzers of format and io: fuzz/corpus/{safetensors,config,checkpoint,exchange,tokenizer}.

    python3 tools/make_fuzz_seeds.py

The standard library is enough. The same run gives the same files.
"""

import json
import pathlib
import struct

ROOT = pathlib.Path(__file__).resolve().parents[1]
CORPUS = ROOT / "fuzz" / "corpus"
DEEP = 20_000  # levels: enough for a recursion to run out of stack
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


def i32(values):
    return struct.pack(f"<{len(values)}i", *values)


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


def declare(weights, formats=None):
    """weights: [(name, pattern, shape)] or [(name, pattern, shape, quantization)]; formats: {name: exchange format}"""
    entries = {}
    for name, pattern, shape, *quantization in weights:
        entries[name] = {"pattern": pattern, "shape": shape, "values": "BF16"}
        if quantization:
            entries[name]["quantization"] = quantization[0]
    for name, text in (formats or {}).items():
        entries[name]["format"] = text
    version = 3 if formats else 2 if any("quantization" in entry for entry in entries.values()) else 1
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


def block(config=None):
    whole, edge, corner = [1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11, 0, 12, 13, 14, 0], [15, 16, 17, 0, 0, 0, 0, 0]
    return checkpoint(config or declare([("w", "block:2x4", [3, 7])]), [
        ("w.block_columns", "I32", [3], i32([0, 1, 1])),
        ("w.block_offsets", "I64", [3], i64([0, 2, 3])),
        ("w.values", "BF16", [3, 2, 4], bf16(whole + edge + corner))])


def places(dense):
    """Row offsets, rows and columns of the non-zeros."""
    rows = [r for r, row in enumerate(dense) for value in row if value]
    columns = [c for row in dense for c, value in enumerate(row) if value]
    return [sum(row < r for row in rows) for r in range(len(dense) + 1)], rows, columns


def csr():
    dense = matrix(66, 11, lambda r, c: (r + c) % 3 == 0)
    offsets, _, columns = places(dense)
    return checkpoint(declare([("w", "unstructured", [66, 11])], {"w": "csr"}), [
        ("w.row_offsets", "I64", [67], i64(offsets)), ("w.columns", "I32", [len(columns)], i32(columns)),
        ("w.values", "BF16", [len(columns)], bf16(kept(dense)))])


def coo_keep_of():
    dense = matrix(3, 10, lambda r, c: c % 4 < 2 and r != 1)
    _, rows, columns = places(dense)
    return checkpoint(declare([("w", "2:4", [3, 10])], {"w": "coo"}), [
        ("w.rows", "I32", [len(rows)], i32(rows)), ("w.columns", "I32", [len(columns)], i32(columns)),
        ("w.values", "BF16", [len(columns)], bf16(kept(dense)))])


def bsr_unstructured():
    return block(declare([("w", "unstructured", [3, 7])], {"w": "bsr:2x4"}))


def indexed(kind, dtype, rows, columns, places_, values):
    """Input of fuzz_exchange. places_: bytes of the row offsets or rows, and the columns."""
    return struct.pack("<BBhhH", kind, dtype, rows, columns, len(places_[1])) + places_[0] + i32(places_[1]) + values


def exchange():
    dense = matrix(66, 11, lambda r, c: (r + c) % 3 == 0)
    offsets, rows, columns = places(dense)
    values = [float(i) for i in range(len(rows))]  # the first is a zero that is kept
    yield "csr_bf16", indexed(0, 1, 66, 11, (i64(offsets), columns), bf16(values))
    yield "coo_bf16", indexed(1, 1, 66, 11, (i32(rows), columns), bf16(values))
    yield "csr_f32", indexed(0, 0, 2, 3, (i64([0, 2, 3]), [0, 2, 1]), struct.pack("<3f", 1, -0.0, float("nan")))
    yield "coo_f16", indexed(1, 2, 2, 3, (i32([0, 0, 1]), [0, 2, 1]), struct.pack("<3e", 1, 2, 3))
    yield "csr_empty", indexed(0, 1, 3, 4, (i64([0, 0, 0, 0]), []), b"")
    yield "csr_no_rows", indexed(0, 1, 0, 4, (i64([0]), []), b"")
    yield "coo_no_columns", indexed(1, 1, 4, 0, (b"", []), b"")
    yield "csr_falling", indexed(0, 1, 3, 4, (i64([0, 2, 1, 2]), [0, 1]), bf16([1, 2]))
    yield "csr_past_the_end", indexed(0, 1, 1, 4, (i64([0, 1 << 62]), [0, 1]), bf16([1, 2]))
    yield "coo_twice", indexed(1, 1, 3, 4, (i32([1, 1]), [2, 2]), bf16([1, 2]))
    yield "coo_outside", indexed(1, 1, 3, 4, (i32([0, -1]), [4, 0]), bf16([1, 2]))


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
        ("w.block_columns", "I32", [3], i32([0, 1, 1])),
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
    yield "deep", b'{"architectures":' + b"[" * DEEP + b"]" * DEEP + b"}"
    yield "transformers4", json.dumps({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2,
        "num_attention_heads": 8, "vocab_size": 512, "torch_dtype": "float16", "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192}}, separators=(",", ":")).encode()
    yield "compact", json.dumps(declare([("a", "unstructured", [64, 64]), ("b", "2:4", [8, 8]),
                                         ("c", "block:32x32", [64, 64]), ("d", "dense", [8, 8], "int8"),
                                         ("e", "2:4", [8, 8], "int4g32z")]), separators=(",", ":")).encode()
    yield "exchange", json.dumps(declare([("a", "unstructured", [64, 64]), ("b", "2:4", [8, 8]),
                                          ("c", "block:32x32", [64, 64])],
                                         {"a": "csr", "b": "coo", "c": "bsr:16x8"}), separators=(",", ":")).encode()


def containers():
    yield "empty", safetensors([])
    yield "metadata", safetensors([("a", "F32", [1], b"abcd")], {"format": "pt"})
    yield "several", safetensors([("a", "F32", [2, 1], bytes(8)), ("b", "BF16", [3], bytes(6)),
                                  ("c", "I64", [0, 5], b""), ("d", "F8_E4M3", [2], b"ab"), ("e", "U8", [], b"x")])
    yield "header_2_60", struct.pack("<Q", 1 << 60) + b"{}"
    yield "truncated", safetensors([("a", "F32", [4], bytes(16))])[:-3]
    overlapping = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}'
    deep = b'{"a":{"dtype":' + b"[" * DEEP + b"]" * DEEP + b"}}"
    yield "deep", struct.pack("<Q", len(deep)) + deep
    yield "overlapping", struct.pack("<Q", len(overlapping)) + overlapping + bytes(6)


CHAT_TEMPLATES = {
    'c_chatml201': (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im"
        "_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %"
        '}'),
    'c_chatml330': (
        "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>syst"
        "em\\nYou\\'re the harbour master.<|im_end|>\\n' }}{% endif %}{{ '<|im_start|>' + message['role'] + '\\n'"
        " + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_sta"
        "rt|>assistant\\n' }}{% endif %}"),
    'c_llama2487': (
        "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set opening = '<<SYS>>\\n' +"
        " messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% else %}{% set turns = messages %}{% set opening = ''"
        " %}{% endif %}{% for message in turns %}{% if message['role'] == 'user' %}{% set text = (opening if "
        "loop.first else '') + message['content'] %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}{%"
        " else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"),
    'c_llama3296': (
        "{% for message in messages %}{% set turn = '<|start_header_id|>' + message['role'] + '<|end_header_i"
        "d|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set turn = bos_token + t"
        "urn %}{% endif %}{{ turn }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"),
    'c_llama3657': (
        "{{- bos_token }}{#- it's the date #}{%- set date_string = '01 Mar 2025' %}{%- if messages[0]['role']"
        " == 'system' %}{%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages["
        "1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}{{- '<|start_header_id|>system<|end_heade"
        "r_id|>\\n\\n' }}{{- 'Cutting Knowledge Date: May 2024\\n' }}{{- 'Today Date: ' + date_string + '\\n\\n' }"
        "}{{- system_message }}{{- '<|eot_id|>' }}{%- for message in messages %}{{- '<|start_header_id|>' + m"
        "essage['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}{"
        "{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"),
}

# What the fuzzer found and a fix was made for.
FOUND_TEMPLATE = (
    b'j{"afded_tokens":[{"id":10,"content":"<s>","special":true},{"id":11,"content":" \xc3\xa9","lstrip":true,"'
    b'rstrip":true,"normalized":true,"]ingle_word":true}],"normalizer":{"type":"Sequence","normalizers":[{"type'
    b'":"NFC"},{"type":"Replace","pattern":{"Regex":"c+"},"content":"c"}]},"pre_togenizer":{"type":"Sequence","'
    b'pretokenizers":[{"type":"Digits","individual_digits":true},{"type":"Split","pattern":{"Regex":"\\\\s+(?!'
    b'\\\\S)|\\\\s+| ?\\\\p{L}+"},"behavior":"MergedWithNext","invert":true},{"type":"ByteLevel","add_pri_xfesp'
    b'ace":true,"use_regex":true}]},"post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"i'
    b'd":"<s>","type_id":0}},{"Sequence":{"id":"A","type_id":0}}],"special_tokens":{"<s>":{"id":"<s>","ids":[10'
    b'],"tokens":["<s>)"]}}},"decoder":{"type":"ByteLevel"},"model":{"type":"BPE","ignore_merges":true,"vocab":'
    b'{"a":0,"b":1,"c":2,"\xc4\xa0":3,"\xc3\x83":4,"\xc2\xa9":5,"1":6,".":7,"ab":8,"\xc3\x83\xc2\xa9":9},"merge'
    b's":[["a","b"],"\xc3\x83 \xc2\xa9"]}}\x00ab \xc3\xa9 <s>cc ;.b\n\xc3\xa9')
FOUND_PIECE = (
    b'sx\x00\n\x0e\n\x05<un\x87\x01\x15\x00\x00\x00\x00\x18\x02\n\x0c\n\x03<s>\x15\x00\x00\x00\x00\x18\x03\n\r'
    b'\n\x04</s>\x15\x00\x00\x00\x00\x18\x03\n\x0c\n\x03\xe2\x96\x81\x15\x00\x00@\xc0\x18\x01\n\n\n\x01?\x15'
    b'\x00\x00\x00\xc0\x18\x01\n\r\n\x04\xe2\x96\x81a\x15\x00\x00\x80\xbf\x18\x01\n\x0c\n\x03<t>\x15\x00\x00'
    b"\x00\x00\x18\x04\x12\x02\x18\x02\x1a\x0e\n\x08identity\x18\x01 \x00 a<t>m_message = '' %}{%- endif %}{{- "
    b"'<|start_header_id|>sys\x87\x9am<|end_hea\xdcder_id|>\\n\\n' }\xaf{{- 'Cutting Knowledge Da\x04te: Ma_tok"
    b'en }}{#- it\'s the date #}{%- set date_strignb `e\xcc\x81<e>v{"a":0,"b= \'01 Mar 2025\' %}{%- if messages'
    b'[0][\'role\'] ==%- ystemtype":"Sequence","normal')


def tokenizer_json(value, text):
    return b"j" + json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\0" + text.encode()


def sentencepiece(pieces, text):
    """pieces: [(piece, score or None, kind)]"""
    def field(number, content):
        return bytes([number << 3 | 2, len(content)]) + content
    model = b"".join(field(1, field(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + bytes([3 << 3, kind]))
                     for piece, score, kind in pieces)
    model += field(2, bytes([3 << 3, 2])) + field(3, field(1, b"identity") + bytes([3 << 3, 1, 4 << 3, 0]))
    return b"s" + struct.pack("<H", len(model)) + model + text.encode()


def tokenizers():
    for name, template in CHAT_TEMPLATES.items():
        yield name, b"c" + template.encode() + b"\0 <|im_end|> "
    yield "j_byte_level", tokenizer_json({
        "added_tokens": [{"id": 10, "content": "<s>", "special": True},
                         {"id": 11, "content": " é", "lstrip": True, "rstrip": True, "normalized": True,
                          "single_word": True}],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": "c+"}, "content": "c"}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "Split", "pattern": {"Regex": r"\s+(?!\S)|\s+| ?\p{L}+"}, "behavior": "MergedWithNext",
             "invert": True},
            {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}]},
        "post_processor": {"type": "TemplateProcessing",
                           "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                                      {"Sequence": {"id": "A", "type_id": 0}}],
                           "special_tokens": {"<s>": {"id": "<s>", "ids": [10], "tokens": ["<s>"]}}},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "ignore_merges": True,
                  "vocab": {"a": 0, "b": 1, "c": 2, "Ġ": 3, "Ã": 4, "©": 5, "1": 6, ".": 7, "ab": 8, "Ã©": 9},
                  "merges": [["a", "b"], "Ã ©"]}}, "ab é <s>cc 1.b\né")
    yield "j_llama", tokenizer_json({
        "added_tokens": [{"id": 1, "content": "<s>", "normalized": True, "special": True}],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
                  "vocab": {"<unk>": 0, "<s>": 1, "<0xC3>": 2, "<0xA9>": 3, "▁": 4, "a": 5, "b": 6, "▁a": 7,
                            "<0xF0>": 8},
                  "merges": [["▁", "a"]]}}, "a é<s> a漢字b é")
    yield "j_plain", tokenizer_json(
        {"model": {"vocab": {"a": 0, "": 1, "ab": 2, "b": 3}, "merges": ["a b"]}}, "aab")
    yield "j_deep", b'j{"normalizer":' + b"[" * DEEP + b"]" * DEEP + b"}\0a"
    yield "j_template_unknown_id", FOUND_TEMPLATE
    yield "s_model", sentencepiece(
        [("<unk>", 0, 2), ("<s>", 0, 3), ("</s>", 0, 3), ("▁", -3, 1), ("a", -2, 1), ("▁a", -1, 1), ("<t>", 0, 4)],
        " a<t>a b")
    yield "s_piece_not_utf8", FOUND_PIECE
    yield "t_ranks", b"tIQ== 0\nYQ== 1\nYWI= 2\n"
    yield "v_gpt2", b'v{"a":0,"b":1,"ab":2,"<|endoftext|>":3}\0#version: 0.2\na b\n\0\0ab<|endoftext|>a'
    yield "v_qwen2", (
        'v{"a":0,"b":1,"ab":2,"Ã":3,"©":4}\0a b\r\n\0' + json.dumps({
            "tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": {"content": "<e>"},
            "add_eos_token": True, "add_prefix_space": True, "additional_special_tokens": ["b"],
            "added_tokens_decoder": {"7": {"content": "<e>", "special": True}},
            "chat_template": [{"name": "default", "template": "x"}]}, separators=(",", ":")) +
        "\0ab e\u0301<e>").encode()


def main():
    seeds = {
        "safetensors": dict(containers()),
        "config": dict(configs()),
        "exchange": dict(exchange()),
        "tokenizer": dict(tokenizers()),
        "checkpoint": {"unstructured": unstructured(), "keep_of": keep_of(), "block": block(),
                       "sparse_bitmask": sparse_bitmask(), "sparse_bitmask_old": sparse_bitmask("m.weight."),
                       "int4_unstructured": int4_unstructured(), "int8_keep_of": int8_keep_of(),
                       "int4_keep_of": int4_keep_of(), "fp8_block": fp8_block(), "int4_dense": int4_dense(),
                       "csr": csr(), "coo_keep_of": coo_keep_of(), "bsr_unstructured": bsr_unstructured(),
                       "sparse_24": sparse_24(), "dense_declared": dense_declared(), "vector": vector()},
    }
    for fuzzer, inputs in seeds.items():
        folder = CORPUS / fuzzer
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in inputs.items():
            (folder / name).write_bytes(content)


if __name__ == "__main__":
    main()
