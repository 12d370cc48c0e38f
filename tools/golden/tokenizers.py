#!/usr/bin/env python3
"""Makes tests/golden/tokenizers/cases.json: what Hugging Face's `tokenizers`, Jinja2 and Python say.

    python3 -m venv /tmp/golden && /tmp/golden/bin/pip install tokenizers==0.22.1 jinja2==3.1.6
    LACUNA_DATA=.../data /tmp/golden/bin/python tools/golden/tokenizers.py

The file holds strings and ids. Vocabularies of other people stay in the data folder and are named by their path in it;
the small ones under "bases" are trained here on the text below. (tokenizers 0.23 decodes added tokens with
"normalized": true in their normalised spelling and no longer knows them as special; 0.19 to 0.22 agree with each other
and are the reference.)
"""
import json
import os
import pathlib
import random
import sys
import unicodedata

sys.path.pop(0)  # this file's folder, where it would be found in place of the package of its name

import jinja2
import tokenizers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

REPO = pathlib.Path(__file__).resolve().parents[2]
DATA = pathlib.Path(os.environ["LACUNA_DATA"])
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
TEXT = """The lake was quiet, and the boats were tied to the pier. Nobody had seen the ferryman since
1987, when the old bridge still carried trains; they're gone, and it'll stay so. We've counted 12 boats, 345 nets
and 6 lamps. "Come back before the rain," she said, "or don't come at all!" The café served naïve tourists. foo bar
foobar the theory of other weather, there then gather: x = f(y) + 10; return x"""
WORDS = ("the quick brown Fox don't I'LL we've 'S '\u017f 123 4567 3.14 x=y+2; def f(n): é naïve ﬁ 中文字符 日本語 русский "
         "العربية हिन्दी ไทย 한국어 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 😀 e\u0301 A\u030a \u212b n\u0303 d\u0323\u0307 d\u0307\u0323 Ⅷ ½ ² ٣ 𝟘 \u200d "
         "\u180e \u00ad \ufeff \ufffd <x> <xy> foo foobar 12345 The ... aab boats weather ▁ Ġ").split(" ")
SPACES = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\u0085", "\u180e", "\x0b", "\x0c", "\u200b",
          "\x1c", "\x00", " \n ", "   \t", "\n\n\n", "\r", " " * 17]
# Unicode 3.2 is in all versions that the libraries at hand were made for.
ASSIGNED = [chr(c) for c in range(1, 0x110000)
            if not 0xD800 <= c < 0xE000 and unicodedata.ucd_3_2_0.category(chr(c)) != "Cn"]


def strings(rng, specials, count):
    """Words, white-space storms, special tokens next to anything, NFC and NFD, any characters."""
    kinds = [lambda: rng.choice(WORDS), lambda: rng.choice(SPACES), lambda: rng.choice(WORDS + SPACES),
             lambda: rng.choice(WORDS + SPACES + specials * 8), lambda: rng.choice(ASSIGNED),
             lambda: chr(rng.randrange(32, 127))]
    for i in range(count):
        text = "".join(kinds[i % len(kinds)]() for _ in range(rng.randrange(1, 16)))
        yield unicodedata.normalize("NFD", text) if i % 4 == 3 else text


def cases(tokenizer, texts):
    rows = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=True).ids
        rows.append({"text": text, "ids": ids, "decoded": tokenizer.decode(ids, skip_special_tokens=False),
                     "decoded_skip": tokenizer.decode(ids, skip_special_tokens=True)})
    return rows


def gpt2():
    tokenizer = Tokenizer(models.BPE.from_file(str(DATA / "tokenizers/gpt2/encoder.json"),
                                               str(DATA / "tokenizers/gpt2/vocab.bpe")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def qwen2():
    tokenizer = Tokenizer(models.BPE.from_file(str(DATA / "tokenizers/qwen2/vocab.json"),
                                               str(DATA / "tokenizers/qwen2/merges.txt")))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN2), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return tokenizer


def from_data(path):
    return lambda: Tokenizer.from_file(str(DATA / path / "tokenizer.json"))


FOLDERS = {
    "tokenizers/gpt2": (gpt2, ["<|endoftext|>"]),
    "tokenizers/qwen2": (qwen2, ["<|im_start|>", "<|im_end|>", "<|im_start|>user\n"]),
    "tokenizers/llama2": (from_data("tokenizers/llama2"), ["<s>", "</s>", "|||IP_ADDRESS|||"]),
    "tokenizers/dolma2": (from_data("tokenizers/dolma2"), ["<|endoftext|>", "<|im_start|>", "|||IP_ADDRESS|||"]),
    "models/lab-16m": (from_data("models/lab-16m"), ["<|endoftext|>"]),
}


def base(byte_level):
    """A tokenizer of some 330 tokens; with `byte_level` over bytes, else over characters with an unknown token."""
    tokenizer = Tokenizer(models.BPE(unk_token=None if byte_level else "<unk>"))
    tokenizer.pre_tokenizer = (pre_tokenizers.ByteLevel(add_prefix_space=False) if byte_level
                               else pre_tokenizers.Split(" ", "merged_with_next"))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) if byte_level else []
    trainer = trainers.BpeTrainer(vocab_size=330 if byte_level else 150, initial_alphabet=alphabet,
                                  special_tokens=[] if byte_level else ["<unk>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    if not byte_level:  # what byte_fallback needs; 0xA9 is missing, so that some characters stay unknown
        for byte in range(256):
            if byte != 0xA9:
                model["vocab"][f"<0x{byte:02X}>"] = len(model["vocab"])
    return model


def component_file(rng, bases):
    """A random tokenizer.json from every component that is read; its model is a base and what differs from it."""
    byte_level = rng.random() < 0.6

    def split():
        pattern = rng.choice([{"String": rng.choice([" ", "the", "ab", "."])},
                              {"Regex": rng.choice([r"\s+", r"\p{N}{1,3}", r"[a-z]+|\d", r"(?i:the)|\S+", r" ?\p{L}+",
                                                    r"\s*", QWEN2, r"\s+(?!\S)|\s+", r"(?<=a)b"])}])
        behavior = rng.choice(["Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"])
        return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": rng.random() < 0.4}

    normalizer = [rng.choice([{"type": form} for form in ("NFC", "NFD", "NFKC", "NFKD")] +
                             [{"type": "Prepend", "prepend": rng.choice(["▁", " ", "x"])},
                              {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                              {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}])
                  for _ in range(rng.randrange(3))]
    pre = [split() for _ in range(rng.randrange(3))]
    if rng.random() < 0.4:
        pre.append({"type": "Digits", "individual_digits": rng.random() < 0.5})
    if byte_level:
        pre.append({"type": "ByteLevel", "add_prefix_space": rng.random() < 0.4, "trim_offsets": True,
                    "use_regex": rng.random() < 0.6})
    llama_decoder = {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": rng.randrange(3), "stop": 0}]}
    byte_decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    name = "bytes" if byte_level else "characters"
    patch = {"ignore_merges": rng.random() < 0.3}
    if not byte_level:
        patch.update(fuse_unk=rng.random() < 0.5, byte_fallback=rng.random() < 0.6)
    vocab = bases[name]["vocab"]
    added, fresh = [], len(vocab)
    for content in rng.sample(["<x>", "<xy>", "foo", " bar", "the", "é", "e\u0301", "<|a|>", "<|a|>b", "12"],
                              rng.randrange(6)):
        token = {"id": vocab.get(content, fresh), "content": content, "single_word": rng.random() < 0.25,
                 "lstrip": rng.random() < 0.25, "rstrip": rng.random() < 0.25, "normalized": rng.random() < 0.4,
                 "special": rng.random() < 0.5}
        fresh += content not in vocab
        added.append(token)
    post = None
    if added and rng.random() < 0.5:
        token = rng.choice(added)
        special = {"SpecialToken": {"id": token["content"], "type_id": 0}}
        text = {"Sequence": {"id": "A", "type_id": 0}}
        post = {"type": "TemplateProcessing", "single": rng.choice([[special, text], [text, special]]),
                "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {token["content"]: {"id": token["content"], "ids": [token["id"]],
                                                      "tokens": [token["content"]]}}}
    file = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": normalizer} if normalizer else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre} if pre else None, "post_processor": post,
            "decoder": byte_decoder if byte_level else rng.choice([None, llama_decoder])}
    return {"base": name, "patch": patch, "file": file}


def components(rng, bases, count):
    rows = []
    for _ in range(count):
        row = component_file(rng, bases)
        whole = dict(row["file"], model=dict(bases[row["base"]], **row["patch"]))
        tokenizer = Tokenizer.from_str(json.dumps(whole))
        specials = [token["content"] for token in row["file"]["added_tokens"]]
        rows.append(dict(row, cases=cases(tokenizer, strings(rng, specials, 12))))
    return rows


CHATML = ("{% for message in messages %}DEFAULT{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
          "'<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
DEFAULT = ("{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\\nYou\\'re the harbour "
           "master.<|im_end|>\\n' }}{% endif %}")
LLAMA3 = ("{% for message in messages %}{% set turn = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' "
          "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set turn = bos_token + turn %}{% endif %}"
          "{{ turn }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}")
LLAMA31 = ("{{- bos_token }}{#- it's the date #}{%- set date_string = '01 Mar 2025' %}"
           "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] | trim %}"
           "{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}"
           "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}{{- 'Cutting Knowledge Date: May 2024\\n' }}"
           "{{- 'Today Date: ' + date_string + '\\n\\n' }}{{- system_message }}{{- '<|eot_id|>' }}"
           "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + "
           "message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
           "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}")
LLAMA2 = ("{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
          "{% set opening = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% else %}"
          "{% set turns = messages %}{% set opening = '' %}{% endif %}{% for message in turns %}"
          "{% if message['role'] == 'user' %}{% set text = (opening if loop.first else '') + message['content'] %}"
          "{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}{% else %}"
          "{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}")


def chats():
    """Templates of our own wording in the shape of the published ones, and one published one by its path."""
    config = json.loads((DATA / "tokenizers/qwen2/tokenizer_config.json").read_text())
    templates = [
        {"kind": "ChatML", "template": CHATML.replace("DEFAULT", ""), "bos": "", "eos": "<|im_end|>"},
        {"kind": "ChatML", "template": CHATML.replace("DEFAULT", DEFAULT), "bos": "", "eos": "<|im_end|>"},
        {"kind": "Llama-3", "template": LLAMA3, "bos": "<|begin_of_text|>", "eos": "<|eot_id|>"},
        {"kind": "Llama-3", "template": LLAMA31, "bos": "<|begin_of_text|>", "eos": "<|eot_id|>"},
        {"kind": "Llama-2", "template": LLAMA2, "bos": "<s>", "eos": "</s>"},
        {"kind": "ChatML", "data": "tokenizers/qwen2", "bos": "", "eos": "<|im_end|>"}]
    talks = [[("user", "Who goes there?")],
             [("system", "Answer in verse."), ("user", "  Who goes there?\n")],
             [("user", "One"), ("assistant", "Two "), ("user", "Three")],
             [("system", ""), ("user", "é 😀"), ("assistant", "Yes."), ("user", "<|im_end|>")]]
    rows = []
    for template in templates:
        text = template.get("template", config["chat_template"])
        compiled = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(text)
        for talk in talks:
            messages = [{"role": role, "content": content} for role, content in talk]
            prompt = compiled.render(messages=messages, bos_token=template["bos"], eos_token=template["eos"],
                                     add_generation_prompt=True)
            rows.append(dict(template, messages=messages, prompt=prompt))
    return rows


def repairs(rng):
    """Ill-formed UTF-8 and what Python's decoder makes of it."""
    samples = [b"\xff", b"a\xc3", b"\xe2\x82", b"\xf0\x9f\x98", b"\xed\xa0\x80", b"\xc0\xaf", b"\xe0\x80\xaf",
               b"\xf4\x90\x80\x80", b"\xf0\x9f\x98\xf0\x9f\x98\x80", b"\x80\x80x\xe2\x28\xa1"]
    samples += [bytes(rng.choice([rng.randrange(256), 0x41, 0xE2, 0x82, 0xF0, 0x9F]) for _ in range(rng.randrange(1, 12)))
                for _ in range(60)]
    return [{"hex": raw.hex(), "text": raw.decode("utf-8", "replace")} for raw in samples]


def main():
    rng = random.Random(3)
    bases = {"bytes": base(True), "characters": base(False)}
    golden = {
        "made_by": "tools/golden/tokenizers.py",
        "tokenizers": tokenizers.__version__, "jinja2": jinja2.__version__,
        "folders": {path: cases(make(), strings(rng, specials, 60)) for path, (make, specials) in FOLDERS.items()},
        "bases": bases, "components": components(rng, bases, 40), "chats": chats(), "repairs": repairs(rng)}
    out = REPO / "tests/golden/tokenizers/cases.json"
    out.write_text(json.dumps(golden, indent=None, separators=(",", ":"), sort_keys=True) + "\n")
    print(out, out.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
