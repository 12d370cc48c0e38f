#!/usr/bin/env python3
"""Tables of docs/results/h200.md from the records of bench: tables.py RECORDS.csv... > tables.md

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


def main():
    records = Records(sys.argv[1:])
    few = [t for t in records.tokens if t < 128]
    many = [t for t in records.tokens if t >= 128]
    spread = sorted(records.spread)
    if spread:
        print(f"Spread (largest - least) of a time's measurements: median "
              f"{100 * spread[len(spread) // 2]:.1f} %, 95 % of the rows under "
              f"{100 * spread[int(len(spread) * 0.95)]:.1f} %.")
    two = [("ours", ours), ("cuSPARSELt", named("cusparselt"))]
    for values in ("bf16", "fp8", "int8"):
        dense = [("our dense", ours)]
        table(records, f"Dense {values}", values, "dense", [0], dense, few)
        table(records, f"2:4 {values}", values, "2:4", [50], two, few)
    others = [("ours", ours), ("expanded", expanded), ("MACKO", named("macko")),
              ("MACKO, its launch retuned", lambda who: who.startswith("macko_rows")),
              ("SpInfer", named("spinfer")), ("Flash-LLM", named("flash_llm")),
              ("cuSPARSE", named("cusparse"))]
    for p in (50, 60, 70, 80):
        table(records, f"Unstructured bf16, {p} %", "bf16", "unstructured", [p], others, few)
    for values in ("fp8", "int8"):
        table(records, f"Unstructured {values}, 50 %", values, "unstructured", [50],
              [("ours", ours)], few)
    table(records, "Blocks of 64x64, bf16", "bf16", "block64x64", [80, 90], [("ours", ours)], few)
    if many:
        prompts = [("ours", ours), ("expanded", expanded), ("cuSPARSELt", named("cusparselt"))]
        for values in ("bf16", "fp8", "int8"):
            table(records, f"2:4 {values}, many tokens", values, "2:4", [50], prompts, many)
    bytes_table(records, [t for t in few if t in (1, 8)])


main()
