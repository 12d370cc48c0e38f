#!/usr/bin/env python3
"""Perplexities of Hugging Face transformers, float32, that tests/eval/perplexity_test.cc holds ours to:
perplexity.py WIKI.TEST.RAW MODEL:LENGTH:WINDOWS ... (windows are spread evenly, as PerplexityOptions says)."""
import math
import pathlib
import sys

import torch
import transformers


def mean_nll(model, ids, length, windows):
    total = len(ids) // length
    sums = []
    for i in range(windows):
        start = i * total // windows * length
        window = ids[start : start + length]
        logits = model(window[None]).logits[0]
        sums.append(torch.nn.functional.cross_entropy(logits[:-1], window[1:]).double().item())
    return sum(sums) / len(sums)


def main():
    text = pathlib.Path(sys.argv[1]).read_text(encoding="utf-8")
    for asked in sys.argv[2:]:
        folder, length, windows = asked.rsplit(":", 2)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        with torch.no_grad():
            nll = mean_nll(model, ids, int(length), int(windows))
        print(transformers.__version__, asked, math.exp(nll), flush=True)


main()
