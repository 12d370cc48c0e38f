"""Dense exports of the demo model, read by Hugging Face transformers.

Prunes examples/demo-model by magnitude (no calibration, so it is the same everywhere) to 2:4 and to 50 % unstructured,
writes dense folders and loads them with AutoModelForCausalLM and AutoTokenizer. tests/golden/dense_export.json keeps,
for each, the ids of some prompts, the ten largest logits after them and 32 greedy tokens (the end token ends nothing).
tests/api/dense_export_test.cc holds our own forward pass to it.

    python tools/golden/dense_export.py [LACUNA]        LACUNA: the tool; default build/release/lacuna

Needs torch, numpy, safetensors and transformers==5.17.0; runs on the CPU.

A folder that comes from GGUF loads as well. Checked once by hand with the same versions: of `lacuna convert
SmolLM2-135M-Instruct.Q4_1.gguf` AutoTokenizer gives the ids of WikiText-2 (303,415) and of the six prompts of
models/smollm2-135m/reference.json, its chat template the texts of the three chat prompts, and AutoModelForCausalLM in
float32 the ten largest logits within 1.4e-6 of the largest and all greedy tokens.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

sys.path.pop(0)  # the folder of this script: tokenizers.py there has the name of a package

import torch
import transformers

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUT = ROOT / "tests" / "golden" / "dense_export.json"
EXPORTS = {
    "2:4": ["--pattern", "2:4"],
    "unstructured": ["--pattern", "unstructured", "--sparsity", "0.5"],
}
# On both sides of the 16 tokens from which a compact matrix is multiplied in another way.
PROMPTS = [
    "The history of the city began when",
    "In the summer of 1941 the regiment moved to the north of the river, where it was to hold the bridge until the "
    "second division arrived. The first attack came in the early morning and",
    "Music",
]
TOP, GREEDY = 10, 32
NEAR_TIE = 1e-3  # a greedy choice closer than this would hang on rounding


def export(tool, flags, folder):
    subprocess.run([tool, "prune", ROOT / "examples" / "demo-model", "-o", folder, "--method", "magnitude", *flags,
                    "--store", "dense", "--quiet"], check=True, stdout=subprocess.DEVNULL)


def load(folder):
    """The model and its tokenizer; stops unless every tensor found its place and the blocks' Linears are half zeros."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                                    output_loading_info=True)
    if any(info.values()):
        sys.exit(f"{folder}: not every tensor found its place: {info}")
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            zeros = (module.weight == 0).double().mean().item()
            if abs(zeros - 0.5) > 1e-3:
                sys.exit(f"{folder}: {name} has {zeros:.4f} zeros")
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def answer(model, tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    top = model(torch.tensor([ids]), use_cache=False).logits[0, -1].topk(TOP)
    greedy = []
    for _ in range(GREEDY):
        logits = model(torch.tensor([ids + greedy]), use_cache=False).logits[0, -1]
        (first, second), (best, _) = (part.tolist() for part in logits.topk(2))
        if first - second < NEAR_TIE:
            sys.exit(f"\"{text}\": near tie at greedy token {len(greedy)}; choose another prompt")
        greedy.append(best)
    return dict(text=text, ids=ids, top10_ids=top.indices.tolist(), top10_logits=top.values.tolist(),
                greedy_32_ids=greedy, greedy_32_text=tokenizer.decode(greedy))


def main(tool):
    exports = {}
    for pattern, flags in EXPORTS.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = pathlib.Path(scratch) / "model"
            export(tool, flags, folder)
            model, tokenizer = load(folder)
            exports[pattern] = [answer(model, tokenizer, text) for text in PROMPTS]
            print(pattern, [one["greedy_32_text"] for one in exports[pattern]])
    made_with = f"transformers {transformers.__version__}, torch {torch.__version__}, float32"
    OUT.write_text(json.dumps(dict(made_with=made_with, exports=exports), indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 2 or sys.argv[1:] in (["-h"], ["--help"]):
        sys.exit(__doc__)
    main(sys.argv[1] if len(sys.argv) == 2 else ROOT / "build" / "release" / "lacuna")
