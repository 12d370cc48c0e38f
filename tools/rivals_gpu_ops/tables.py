#!/usr/bin/env python3
"""Tables from the records of bench: tables.py RECORDS.csv... prints the summary of
docs/results/h200.md, with --all every cell (docs/results/h200-tables.md).

A cell is a time in us and, in brackets, the best dense time of the same values, shape and tokens over
it; '-' where nobody took part, 'wrong' where the output was.
"""
import csv
import math
import sys

LIMIT = 4.28e12  # bytes a second: what reading 8.6 GB by 16-byte loads reaches on this card


class Records:
    def __init__(self, files):
        self.times, self.bytes, self.wrong, self.spread = {}, {}, set(), []
        self.shapes, self.tokens = [], []
        for file in files:
            for row in csv.DictReader(open(file, newline="")):
                shape = (int(row["n"]), int(row["k"]))
                key = (shape, int(row["t"]), row["values"], row["pattern"],
                       round(float(row["sparsity"]) * 100))
                if shape not in self.shapes:
                    self.shapes.append(shape)
                if key[1] not in self.tokens:
                    self.tokens.append(key[1])
                who = row["who"]
                if not row["us"] or row["us"] == "nan":
                    self.wrong.add((key, who))
                    continue
                us = float(row["us"])
                self.spread.append((float(row["high"]) - float(row["low"])) / us)
                if us < self.times.get((key, who), 1e30):  # of several ways to run it the fastest
                    self.times[key, who] = us
                    self.bytes[key, who] = float(row["weight_bytes"])
        self.tokens.sort()

    def best(self, key, accepts):
        found = [(us, who) for (k, who), us in self.times.items() if k == key and accepts(who)]
        return min(found) if found else None

    def dense(self, shape, t, values):
        """bf16: of cuBLAS and cuBLASLt; codes: also our own dense kernels."""
        library = values == "bf16"
        found = self.best((shape, t, values, "dense", 0),
                          lambda who: who.startswith("cublas") or not library)
        return found[0] if found else None

    def cell(self, shape, t, values, pattern, percent, accepts):
        """(text, ratio or None)"""
        key = (shape, t, values, pattern, percent)
        dense, found = self.dense(shape, t, values), self.best(key, accepts)
        if found is None or dense is None:
            wrong = any(k == key and accepts(who) for k, who in self.wrong)
            return ("wrong" if wrong else "-"), None
        return f"{found[0]:.2f} ({dense / found[0]:.2f})", dense / found[0]


def ours(who):
    return who.startswith("linear_") and not who.endswith("expanded")


def expanded(who):
    return who.startswith("linear_") and who.endswith("expanded")


def named(name):
    return lambda who: who == name


OTHERS = [("ours", ours), ("ours, expanded", expanded), ("MACKO", named("macko")),
          ("MACKO, its launch retuned", lambda who: who.startswith("macko_rows")),
          ("SpInfer", named("spinfer")), ("Flash-LLM", named("flash_llm")),
          ("cuSPARSE", named("cusparse"))]
PROMPTS = [("ours", ours), ("ours, expanded", expanded), ("cuSPARSELt", named("cusparselt"))]


def geometric(ratios):
    ratios = [r for r in ratios if r]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None


def table(records, title, values, pattern, percents, columns, tokens):
    """A row a shape and number of tokens; the columns of each share of zeros side by side."""
    print(f"\n### {title}\n")
    many = len(percents) > 1
    heads = [f"{name} {p} %" if many else name for p in percents for name, _ in columns]
    print("| n x k | T | dense | " + " | ".join(heads) + " |")
    print("|---" * (3 + len(heads)) + "|")
    means = {}
    for t in tokens:
        for shape in records.shapes:
            dense = records.dense(shape, t, values)
            if dense is None:
                continue
            row = []
            for p in percents:
                for name, accepts in columns:
                    text, ratio = records.cell(shape, t, values, pattern, p, accepts)
                    means.setdefault((t, p, name), []).append(ratio)
                    row.append(text)
            print(f"| {shape[0]}x{shape[1]} | {t} | {dense:.2f} | " + " | ".join(row) + " |")
    for t in tokens:
        row = []
        for p in percents:
            for name, _ in columns:
                ratios = means.get((t, p, name), [])
                mean = geometric(ratios)
                row.append("-" if mean is None else f"{mean:.2f}"
                           + ("" if all(ratios) else f" ({sum(map(bool, ratios))} of {len(ratios)})"))
        if any(cell != "-" for cell in row):
            print(f"| *geometric mean* | {t} | 1 | " + " | ".join(row) + " |")


def bytes_table(records, tokens):
    print("\n### Weight bytes, GB/s and share of 4.28 TB/s\n")
    print("Of our kernels' packed bytes over their times.\n")
    rows = [("bf16", "2:4", 50), ("fp8", "2:4", 50), ("int8", "2:4", 50)]
    rows += [("bf16", "unstructured", p) for p in (50, 60, 70, 80)]
    rows += [("fp8", "unstructured", 50), ("int8", "unstructured", 50)]
    rows += [("bf16", "block64x64", p) for p in (80, 90)]
    for t in tokens:
        print(f"\nT = {t}: MB of the weight (of its dense bytes), GB/s, share.\n")
        print("| weight | " + " | ".join(f"{n}x{k}" for n, k in records.shapes) + " |")
        print("|---" * (1 + len(records.shapes)) + "|")
        for values, pattern, p in rows:
            cells = []
            for shape in records.shapes:
                key = (shape, t, values, pattern, p)
                found = records.best(key, ours)
                if found is None:
                    cells.append("-")
                    continue
                us, who = found
                size = records.bytes[key, who]
                dense = shape[0] * shape[1] * (2 if values == "bf16" else 1)
                cells.append(f"{size / 1e6:.1f} ({size / dense:.2f}), {size / us / 1e3:.0f}, "
                             f"{size / us * 1e6 / LIMIT:.2f}")
            if any(c != "-" for c in cells):
                name = f"{values} {pattern}" + ("" if pattern == "2:4" else f" {p} %")
                print(f"| {name} | " + " | ".join(cells) + " |")


ROWS = [  # values, pattern, share of zeros, and who
    ("bf16", "2:4", 50, [("ours", ours), ("cuSPARSELt", named("cusparselt"))]),
    ("fp8", "2:4", 50, [("ours, bf16 x", ours), ("cuSPARSELt, fp8 x", named("cusparselt"))]),
    ("int8", "2:4", 50, [("ours, bf16 x", ours), ("cuSPARSELt, int8 x", named("cusparselt"))]),
] + [("bf16", "unstructured", p, OTHERS) for p in (50, 60, 70, 80)] + [
    ("fp8", "unstructured", 50, [("ours, bf16 x", ours)]),
    ("int8", "unstructured", 50, [("ours, bf16 x", ours)]),
    ("bf16", "block64x64", 80, [("ours", ours)]), ("bf16", "block64x64", 90, [("ours", ours)])]


def summary(records, tokens, rows):
    """Geometric means over the shapes, the least in brackets: one line for everyone."""
    print("\n| weight | who | " + " | ".join(f"T = {t}" for t in tokens) + " |")
    print("|---" * (2 + len(tokens)) + "|")
    for values, pattern, percent, columns in rows:
        for name, accepts in columns:
            cells = []
            for t in tokens:
                ratios = [records.cell(s, t, values, pattern, percent, accepts)[1]
                          for s in records.shapes]
                found = [r for r in ratios if r]
                cells.append("-" if not found else
                             f"{geometric(found):.2f} ({min(found):.2f})"
                             + ("" if len(found) == len(ratios) else
                                f", {len(found)} of {len(ratios)}"))
            if any(c != "-" for c in cells):
                weight = f"{values} {pattern}" + ("" if pattern == "2:4" else f" {percent} %")
                print(f"| {weight} | {name} | " + " | ".join(cells) + " |")


def all_tables(records, few, many):
    two = [("ours", ours), ("cuSPARSELt", named("cusparselt"))]
    for values in ("bf16", "fp8", "int8"):
        table(records, f"Dense {values}", values, "dense", [0], [("our dense", ours)], few)
        table(records, f"2:4 {values}", values, "2:4", [50], two, few)
    for p in (50, 60, 70, 80):
        table(records, f"Unstructured bf16, {p} %", "bf16", "unstructured", [p], OTHERS, few)
    for values in ("fp8", "int8"):
        table(records, f"Unstructured {values}, 50 %", values, "unstructured", [50],
              [("ours", ours)], few)
    table(records, "Blocks of 64x64, bf16", "bf16", "block64x64", [80, 90], [("ours", ours)], few)
    for values in ("bf16", "fp8", "int8") if many else ():
        table(records, f"2:4 {values}, many tokens", values, "2:4", [50], PROMPTS, many)


def main():
    whole = "--all" in sys.argv
    records = Records([a for a in sys.argv[1:] if a != "--all"])
    few = [t for t in records.tokens if t < 128]
    many = [t for t in records.tokens if t >= 128]
    spread = sorted(records.spread)
    print(f"Spread (largest - least) of a time's measurements: median "
          f"{100 * spread[len(spread) // 2]:.1f} %, 95 % of the rows under "
          f"{100 * spread[int(len(spread) * 0.95)]:.1f} %.")
    if whole:
        all_tables(records, few, many)
        bytes_table(records, [t for t in few if t in (1, 8)])
        return
    summary(records, few, ROWS)
    if many:
        summary(records, many, [(v, "2:4", 50, PROMPTS) for v in ("bf16", "fp8", "int8")])


main()
