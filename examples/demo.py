#!/usr/bin/env python3
"""The main job end to end: a dense model is pruned two ways, quantised as well, stored small, verified, measured and asked a question.

Every number that is printed comes out of the tool's own JSON; `./dev demo` says how this script is called.
"""
import argparse
import json
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

PATTERNS = {"unstructured 50 %": ("50", ["--pattern", "unstructured", "--sparsity", "0.5"], ["--expect-sparsity", "0.5"]),
            "2:4": ("24", ["--pattern", "2:4"], ["--expect-pattern", "2:4", "--expect-sparsity", "0.5"])}
QUANTISED = ["int8", "int4"]  # of the unstructured model, rounded afterwards
# Mask and codes made together, by the best method.
JOINT = {"unstructured 50 %, int4, ALPS": ("50-int4-alps", "unstructured 50 %"), "2:4, int4, ALPS": ("24-int4-alps", "2:4")}
CHAT_PROMPT = "What is the capital of France, and why is it famous?"
PLAIN_PROMPT = "The history of the city began when"


class Tool:
    """Runs verbs, shows each command, and keeps what they print for the report."""

    def __init__(self, binary, folder):
        self.binary, self.folder, self.runs = binary, folder, []

    def run(self, name, *arguments):
        command = [self.binary, *map(str, arguments), "--json"]
        print("\n$ " + shlex.join([c for c in command if c != "--json"]), file=sys.stderr, flush=True)
        started = time.monotonic()
        done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
        if done.returncode != 0:
            sys.exit(f"demo: `{shlex.join(command)}` ended with exit code {done.returncode}")
        result = json.loads(done.stdout)
        result["wall_seconds"] = time.monotonic() - started
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(result, indent=1))
        self.runs.append(path)
        return result


def megabytes(count):
    return f"{count / 1e6:.1f} MB"


def table(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for number, row in enumerate(rows):
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))))
        if number == 0:
            print("-" * (sum(widths) + 2 * len(widths) - 2))


def make_text(tool, model, path):
    """Text for the offline demo: what the model itself says at temperature 1, from several seeds."""
    if path.exists():
        return
    pieces = []
    for seed in range(6):
        piece = tool.run(f"text-{seed}", "generate", model, "--prompt", "The", "--temperature", "1", "--seed", seed,
                         "--max-new-tokens", "1200", "--ignore-eos", "-q")
        tool.runs.pop()  # not a result
        pieces.append(piece["text"])
    path.write_text("\n".join(pieces))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lacuna", required=True)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--gguf", type=pathlib.Path)
    source.add_argument("--model", type=pathlib.Path)
    parser.add_argument("--text", type=pathlib.Path, help="evaluation text; made by the model when absent")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    for name in ("samples", "length", "windows", "window-length"):
        parser.add_argument("--" + name, type=int, required=True)
    parser.add_argument("--chat", action="store_true")
    flags = parser.parse_args()

    started = time.monotonic()
    results = flags.out / "results"
    results.mkdir(parents=True, exist_ok=True)
    tool = Tool(flags.lacuna, results)
    for journal in flags.out.glob("sparse-*.journal"):  # of a demo that was interrupted
        shutil.rmtree(journal)
    dense = flags.model
    if flags.gguf:
        dense = flags.out / "dense"
        if not (dense / "config.json").exists():
            tool.run("convert", "convert", flags.gguf, "-o", dense)
            tool.runs.pop()
    text = flags.text
    if text is None:
        text = flags.out / "text.txt"
        make_text(tool, dense, text)

    prompt = ["--prompt", CHAT_PROMPT, "--chat"] if flags.chat else ["--prompt", PLAIN_PROMPT]
    window_flags = ["--windows", flags.windows, "--length", flags.window_length]
    models = {"dense bf16": {"inspect": tool.run("inspect-dense", "inspect", dense)}}
    models["dense bf16"]["generate"] = tool.run("generate-dense", "generate", dense, *prompt, "--max-new-tokens", 64)
    ids = flags.out / "calibration.safetensors"
    calibration = ["--calibration", "self", "--samples", flags.samples, "--length", flags.length,
                   "--save-calibration-ids", ids]
    for label, (suffix, prune_flags, expect) in PATTERNS.items():
        out = flags.out / f"sparse-{suffix}"
        row = models[label] = {}
        row["prune"] = tool.run(f"prune-{suffix}", "prune", dense, "-o", out, "--overwrite", *prune_flags, *calibration)
        calibration = ["--calibration-ids", ids]  # the second pattern uses the same tokens
        row["verify"] = tool.run(f"verify-{suffix}", "verify", out, *expect)
        row["inspect"] = tool.run(f"inspect-{suffix}", "inspect", out)
        row["eval"] = tool.run(f"eval-{suffix}", "eval", out, "--text", text, "--compare", dense, *window_flags)
        row["generate"] = tool.run(f"generate-{suffix}", "generate", out, *prompt, "--max-new-tokens", 64)

    pruned = flags.out / "sparse-50"
    for code in QUANTISED:
        out = flags.out / f"sparse-50-{code}"
        row = models[f"unstructured 50 %, {code}"] = {}
        row["convert"] = tool.run(f"convert-{code}", "convert", pruned, "-o", out, "--overwrite", "--quantize", code)
        row["verify"] = tool.run(f"verify-{code}", "verify", out, "--expect-sparsity", "0.5", "--against", pruned)
        row["inspect"] = tool.run(f"inspect-{code}", "inspect", out)
        row["eval"] = tool.run(f"eval-{code}", "eval", out, "--text", text, *window_flags)
        row["generate"] = tool.run(f"generate-{code}", "generate", out, *prompt, "--max-new-tokens", 64)

    for label, (suffix, pattern) in JOINT.items():
        out = flags.out / f"sparse-{suffix}"
        row = models[label] = {}
        _, prune_flags, expect = PATTERNS[pattern]
        row["prune"] = tool.run(f"prune-{suffix}", "prune", dense, "-o", out, "--overwrite", *prune_flags, *calibration,
                                "--method", "alps", "--quantize", "int4", "--group", 64)
        row["verify"] = tool.run(f"verify-{suffix}", "verify", out, *expect)
        row["inspect"] = tool.run(f"inspect-{suffix}", "inspect", out)
        row["eval"] = tool.run(f"eval-{suffix}", "eval", out, "--text", text, "--compare", dense, *window_flags)
        row["generate"] = tool.run(f"generate-{suffix}", "generate", out, *prompt, "--max-new-tokens", 64)

    report = tool.run("report", "report", *tool.runs, "-o", flags.out / "report.html")["path"]

    evaluated = models["2:4"]["eval"]
    print(f"\nperplexity on {text.name}: {evaluated['windows']} windows of {evaluated['length']} tokens, "
          f"protocol {evaluated['protocol']}\n")
    rows = [["model", "bytes", "sparsity", "perplexity", "KL to dense", "same top", "tokens/s", "verified"]]
    if flags.gguf:
        rows.append(["the 4-bit download", megabytes(flags.gguf.stat().st_size), "", "", "", "", "", ""])
    for label, row in models.items():
        scores = row.get("eval")
        rows.append([label, megabytes(row["inspect"]["bytes"]), f"{row['inspect']['sparsity']:.3f}",
                     f"{scores['perplexity'] if scores else evaluated['perplexity_reference']:.2f}",
                     f"{scores['kl_mean']:.3f}" if scores and "kl_mean" in scores else "-" if scores else "0",
                     f"{scores['same_top']:.1%}" if scores and "same_top" in scores else "-" if scores else "100 %",
                     # An answer of one token has no rate.
                     f"{row['generate']['tokens_per_second']:.1f}" if row["generate"]["tokens_per_second"] else "-", "yes" if row.get("verify", {}).get("ok") else "-"])
    table(rows)
    if flags.gguf:
        print("\nThe 4-bit download is smaller than a sparse bf16 file: 4.5 to 5 bits a weight against 9. Sparse int4, at\n"
              "3 to 3.5 bits, is smaller than it (embedding and output matrix are int8 there).")
    for label, row in models.items():
        print(f"\n[{label}] {row['generate']['text'].strip()}")
    print(f"\nreport: {report}\n{time.monotonic() - started:.0f} s after the build")


if __name__ == "__main__":
    main()
