#!/usr/bin/env python3
"""Our pruners against the original implementations: same model, same calibration tokens, same test text.

The reference numbers and token ids are the folder `quality` of the test data ($LACUNA_DATA; original_implementations.json says
how they were made). Prunes with every method and pattern that stands there, measures WikiText-2 perplexity (raw test file,
windows of 2,048), and holds the result to the original:

    up to 50 %, 2:4, 4:8   perplexity at most 1 % above the original's
    60 and 70 %            2 %
    80 %                   4 %
    rows above perplexity 1,000, and magnitude with N:M (the 4-bit grid of SmolLM2 decides its ties)
                           layer error within 3 % instead

With --joint the rows that prune and quantise together instead: int4 and int8 with one scale a row at most the original's
perplexity, groups of 64 below that, and each below the same method's model rounded afterwards.

    tools/quality.py models/lab-16m
    tools/quality.py models/lab-16m --joint --methods alps sparsegpt
    tools/quality.py smollm2 --reference smollm2-135m --device cuda --methods sparsegpt wanda --patterns u50 2:4
"""
import argparse
import collections
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROJECTIONS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "gate_proj": "gate", "up_proj": "up",
               "down_proj": "down"}


def run(*command):
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, check=False)
    if done.returncode != 0:
        sys.exit(f"quality: {' '.join(map(str, command))} ended with exit code {done.returncode}")
    return json.loads(done.stdout)


def pattern_flags(pattern):
    if pattern.startswith("u"):
        return ["--pattern", "unstructured", "--sparsity", f"{int(pattern[1:]) / 100:g}"]
    return ["--pattern", pattern]


def reordered(ids, seed, out):
    """The calibration file with its rows in a random order: the same sums, rounded differently."""
    content = ids.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    [rows] = [tensor["shape"][0] for tensor in header.values() if "shape" in tensor]
    width = (len(content) - start) // rows
    order = list(range(rows))
    random.Random(seed).shuffle(order)
    out.write_bytes(content[:start] + b"".join(content[start + i * width:start + (i + 1) * width] for i in order))
    return out


def layer_errors(layers):
    """Mean error of each projection over the blocks."""
    errors = collections.defaultdict(list)
    for layer in layers:
        module = layer["name"].removesuffix(".weight").split(".")[-1]
        errors[PROJECTIONS[module]].append(layer["error"])
    return {name: sum(values) / len(values) for name, values in errors.items()}


def tolerance(pattern):
    share = int(pattern[1:]) if pattern.startswith("u") else 50
    return 0.01 if share <= 50 else 0.02 if share <= 70 else 0.04


def joint(flags, name, common):
    """Pruned and quantised together, held to the original's joint rows and to rounding afterwards."""
    quality = flags.data / "quality"
    originals = {(r["pattern"], r["quantised_bits"]): r["perplexity"]
                 for r in json.loads((quality / "original_implementations.json").read_text())["results"]
                 if r["model"] == name and "quantised_bits" in r}
    score = lambda model: run(flags.lacuna, "eval", model, "--text",  # noqa: E731
                              flags.data / "text/wikitext-2/wiki.test.raw", *common)["perplexity"]
    failed = 0
    print(f"| {name}: method | pattern | codes | original | together | rounded afterwards | layer error | bytes | |\n"
          "|---|---|---|---|---|---|---|---|---|", flush=True)
    for method in flags.methods:
        for pattern in sorted({p for p, _ in originals} & set(flags.patterns)):
            with tempfile.TemporaryDirectory() as folder:
                out = pathlib.Path(folder)
                prune = ["prune", flags.model, "--method", method, *pattern_flags(pattern), "--calibration-ids",
                         quality / f"calibration-{name}.safetensors", *common]
                run(flags.lacuna, *prune, "-o", out / "plain")
                rows = {}
                for codes in ("int8", "int4row", "int4"):
                    done = run(flags.lacuna, *prune, "-o", out / codes, "--quantize", codes, "--keep-head")
                    run(flags.lacuna, "convert", out / "plain", "-o", out / f"{codes}-after", "--quantize", codes,
                        "--keep-head", "-q", "--json")
                    original = originals.get((pattern, 8 if codes == "int8" else 4))
                    together, after = rows[codes] = score(out / codes), score(out / f"{codes}-after")
                    good = together < after and (codes != "int4" or together < rows["int4row"][0])
                    good = good and (original is None or together <= original)
                    failed += not good
                    error = sum(layer["error"] for layer in done["layers"]) / len(done["layers"])
                    print(f"| {method} | {pattern} | {codes} | {original or '-'} | {together:.2f} | {after:.2f} | "
                          f"{error:.4f} | {done['bytes_out']} | {'ok' if good else 'FAILED'}, {done['seconds']:.0f} s |",
                          flush=True)
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--reference", help="the model's name in the reference file (default: the folder's name)")
    parser.add_argument("--lacuna", type=pathlib.Path, default=ROOT / "build/release/lacuna")
    parser.add_argument("--data", type=pathlib.Path,
                        default=pathlib.Path(os.environ.get("LACUNA_DATA", ROOT.parent / "shared/data")))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", nargs="+", default=["sparsegpt", "wanda", "magnitude"])
    parser.add_argument("--patterns", nargs="+", default=["u50", "u60", "u70", "u80", "2:4", "4:8"])
    parser.add_argument("--reorder", type=int, metavar="SEED",
                        help="put the calibration rows in another order first, to see how far rounding alone moves a row")
    parser.add_argument("--joint", action="store_true", help="pruned and quantised together")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows there")
    flags = parser.parse_args()
    name = flags.reference or flags.model.name
    quality = flags.data / "quality"
    originals = {(r["method"], r["pattern"]): r
                 for r in json.loads((quality / "original_implementations.json").read_text())["results"]
                 if r["model"] == name and "quantised_bits" not in r}
    if not originals:
        sys.exit(f"quality: {quality}/original_implementations.json has no rows for {name}")
    common = ["--device", flags.device, "--dtype", "float32", "-q", "--json"]
    if flags.joint:
        sys.exit(1 if joint(flags, name, common) else 0)
    rows, failed = [], 0
    print(f"| {name}: method | pattern | original | ours | difference | layer error, original | ours | |\n"
          "|---|---|---|---|---|---|---|---|", flush=True)
    for method in flags.methods:
        for pattern in flags.patterns:
            original = originals.get((method, pattern))
            if original is None:
                continue
            with tempfile.TemporaryDirectory() as folder:
                out = pathlib.Path(folder) / "out"
                ids = quality / f"calibration-{name}.safetensors"
                if flags.reorder is not None:
                    ids = reordered(ids, flags.reorder, pathlib.Path(folder) / "ids.safetensors")
                pruned = run(flags.lacuna, "prune", flags.model, "-o", out, "--method", method, *pattern_flags(pattern),
                             "--calibration-ids", ids, "--store", "dense", *common)
                scored = run(flags.lacuna, "eval", out, "--text", flags.data / "text/wikitext-2/wiki.test.raw", *common)
            errors = layer_errors(pruned["layers"])
            worst = max((abs(errors[k] / original["layer_error"][k] - 1) for k in errors if errors[k] >= 0), default=0)
            difference = scored["perplexity"] / original["perplexity"] - 1
            ties = method == "magnitude" and ":" in pattern
            by_error = original["perplexity"] > 1000 or ties
            good = worst <= 0.03 if by_error else difference <= tolerance(pattern)
            failed += not good
            mean = lambda values: sum(values.values()) / len(values)  # noqa: E731
            rows.append({"model": name, "method": method, "pattern": pattern, "original": original["perplexity"],
                         "perplexity": scored["perplexity"], "difference": difference, "layer_error": errors,
                         "worst_layer_error_difference": worst, "seconds": pruned["seconds"], "device": flags.device,
                         "ok": bool(good)})
            print(f"| {method} | {pattern} | {original['perplexity']:.2f} | {scored['perplexity']:.2f} | {difference:+.2%} | "
                  f"{mean(original['layer_error']):.4f} | {mean(errors):.4f} (worst {worst:.1%}) | "
                  f"{'ok' if good else 'FAILED'}{' by layer error' if by_error else ''}, {pruned['seconds']:.0f} s |",
                  flush=True)
    if flags.json:
        flags.json.write_text(json.dumps(rows, indent=1) + "\n")
    # Better methods must give better models wherever all three stand.
    table = {(r["method"], r["pattern"]): r["perplexity"] for r in rows}
    for pattern in flags.patterns:
        have = [table[m, pattern] for m in ("sparsegpt", "wanda", "magnitude") if (m, pattern) in table]
        if have != sorted(have):
            failed += 1
            print(f"order at {pattern}: FAILED {have}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
