#!/usr/bin/env python3
"""Tables from the records of bench: tables.py RECORDS.csv... prints the summary of
docs/results/h200.md, with --all every cell (docs/results/h200-tables.md).

A cell is a time in us and, in brackets, the best dense time of the same values (int4: of bf16), shape
and tokens over it; '-' where nobody took part, 'wrong' where the output was, 'refused' where the
library or kernel did.
"""
import csv
import math
import sys

LIMIT = 4.28e12  # bytes a second: what reading 8.6 GB by 16-byte loads reaches on this card


class Records:
    def __init__(self, files):
        self.times, self.bytes, self.reasons, self.spread = {}, {}, {}, []
        self.shapes, self.tokens, self.heads, self.clocks = [], [], [], {}
        for file in files:
            lines = list(open(file, newline=""))
            self.heads += [line[2:].strip() for line in lines if line.startswith("#")]
            for row in csv.DictReader(line for line in lines if not line.startswith("#")):
                shape = (int(row["n"]), int(row["k"]))
                key = (shape, int(row["t"]), row["values"], row["pattern"],
                       round(float(row["sparsity"]) * 100))
                if shape not in self.shapes:
                    self.shapes.append(shape)
                if key[1] not in self.tokens:
                    self.tokens.append(key[1])
                who = row["who"]
                if not row["us"] or row["us"] == "nan":
                    self.reasons[key, who] = row["note"]
                    continue
                if row.get("sm_mhz"):
                    self.clocks.setdefault(key[1], []).append(int(row["sm_mhz"]))
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
        """bf16: of cuBLAS and cuBLASLt; codes of 8 bits: also our own dense kernels."""
        library = values in ("bf16", "int4")
        found = self.best((shape, t, "bf16" if library else values, "dense", 0),
                          lambda who: who.startswith("cublas") or not library)
        return found[0] if found else None

    def cell(self, shape, t, values, pattern, percent, accepts):
        """(text, ratio or None)"""
        key = (shape, t, values, pattern, percent)
        dense, found = self.dense(shape, t, values), self.best(key, accepts)
        if found is None or dense is None:
            why = [note for (k, who), note in self.reasons.items() if k == key and accepts(who)]
            for word in ("wrong", "refused"):
                if any(note.startswith(word) for note in why):
                    return word, None
            return "-", None
        return f"{found[0]:.2f} ({dense / found[0]:.2f})", dense / found[0]


ENDS = (" expanded", " rounded", " codes")


def ours(who):
    return who.startswith("linear_") and not who.endswith(ENDS)


def ours_ending(end):
    return lambda who: who.startswith("linear_") and who.endswith(end)


def kernel(who):  # multiplies what is packed, whatever becomes of x
    return ours(who) or ours_ending(" rounded")(who)


def named(name):
    return lambda who: who == name


expanded = ours_ending(" expanded")
OTHERS = [("ours", ours), ("ours, expanded", expanded), ("MACKO", named("macko")),
          ("MACKO, its launch retuned", lambda who: who.startswith("macko_rows")),
          ("SpInfer", named("spinfer")), ("Flash-LLM", named("flash_llm")),
          ("cuSPARSE", named("cusparse"))]
TWO = [("ours", ours), ("cuSPARSELt", named("cusparselt"))]
CODES = [("ours, bf16 x", ours), ("ours, x rounded", ours_ending(" rounded")),
         ("ours, expanded", expanded), ("ours, codes and cuBLASLt", ours_ending(" codes"))]
TWO_CODES = CODES[:3] + [("cuSPARSELt, x in codes", named("cusparselt"))]
INT4 = [("ours", ours), ("ours, expanded", expanded), ("Sparse-Marlin", named("sparse_marlin"))]
BLOCKS = [("ours", ours), ("ours, expanded", expanded)]
PERCENTS = (50, 60, 70, 80)


def geometric(ratios):
    ratios = [r for r in ratios if r]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None


def table(records, title, values, pattern, percents, columns, tokens):
    """A row a shape and number of tokens; the columns of each share of zeros side by side, without
    those in which nobody took part."""
    many = len(percents) > 1
    heads, parts = [], []
    for p in percents:
        for name, accepts in columns:
            cells = {(s, t): records.cell(s, t, values, pattern, p, accepts)
                     for t in tokens for s in records.shapes}
            if any(text != "-" for text, _ in cells.values()):
                heads.append(f"{name} {p} %" if many else name)
                parts.append(cells)
    if not parts:
        return
    print(f"\n### {title}\n")
    print("| n x k | T | dense | " + " | ".join(heads) + " |")
    print("|---" * (3 + len(heads)) + "|")
    held = {t: [s for s in records.shapes if records.dense(s, t, values)
                and any(cells[s, t][0] != "-" for cells in parts)] for t in tokens}
    for t in tokens:
        for s in held[t]:
            print(f"| {s[0]}x{s[1]} | {t} | {records.dense(s, t, values):.2f} | "
                  + " | ".join(cells[s, t][0] for cells in parts) + " |")
    for t in tokens:
        row = []
        for cells in parts:
            ratios = [cells[s, t][1] for s in held[t]]
            mean = geometric(ratios)
            row.append("-" if mean is None else f"{mean:.2f}"
                       + ("" if all(ratios) else f" ({sum(map(bool, ratios))} of {len(ratios)})"))
        if any(cell != "-" for cell in row):
            print(f"| *geometric mean* | {t} | 1 | " + " | ".join(row) + " |")


def bytes_table(records, tokens):
    print("\n### Weight bytes, GB/s and share of 4.28 TB/s\n")
    print("Of the fastest of our kernels, packed bytes over time.\n")
    rows = [(values, "2:4", 50) for values in ("bf16", "fp8", "int8", "int4")]
    rows += [(v, "unstructured", p) for v in ("bf16", "fp8", "int8") for p in PERCENTS]
    rows += [("bf16", "block64x64", p) for p in (80, 90)]
    for t in tokens:
        print(f"\nT = {t}: MB of the weight (of its dense bytes), GB/s, share.\n")
        print("| weight | " + " | ".join(f"{n}x{k}" for n, k in records.shapes) + " |")
        print("|---" * (1 + len(records.shapes)) + "|")
        for values, pattern, p in rows:
            cells = []
            for shape in records.shapes:
                key = (shape, t, values, pattern, p)
                found = records.best(key, kernel)
                if found is None:
                    cells.append("-")
                    continue
                us, who = found
                size = records.bytes[key, who]
                dense = shape[0] * shape[1] * (1 if values in ("fp8", "int8") else 2)
                cells.append(f"{size / 1e6:.1f} ({size / dense:.2f}), {size / us / 1e3:.0f}, "
                             f"{size / us * 1e6 / LIMIT:.2f}")
            if any(c != "-" for c in cells):
                name = f"{values} {pattern}" + ("" if pattern == "2:4" else f" {p} %")
                print(f"| {name} | " + " | ".join(cells) + " |")


ROWS = [  # values, pattern, share of zeros, and who
    ("bf16", "2:4", 50, TWO), ("fp8", "2:4", 50, TWO_CODES), ("int8", "2:4", 50, TWO_CODES),
    ("int4", "2:4", 50, INT4),
] + [("bf16", "unstructured", p, OTHERS) for p in PERCENTS] + [
    (values, "unstructured", p, CODES) for values in ("fp8", "int8") for p in PERCENTS
] + [("bf16", "block64x64", p, BLOCKS) for p in (80, 90)]


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
                weight = f"{values} {pattern}" + ("" if pattern in ("2:4", "dense") else
                                                  f" {percent} %")
                print(f"| {weight} | {name} | " + " | ".join(cells) + " |")


def all_tables(records, tokens):
    for values, columns in (("bf16", TWO), ("fp8", TWO_CODES), ("int8", TWO_CODES), ("int4", INT4)):
        if values != "int4":
            table(records, f"Dense {values}", values, "dense", [0], [("our dense", ours)], tokens)
        table(records, f"2:4 {values}", values, "2:4", [50], columns, tokens)
    for p in PERCENTS:
        table(records, f"Unstructured bf16, {p} %", "bf16", "unstructured", [p], OTHERS, tokens)
    for values in ("fp8", "int8"):
        table(records, f"Unstructured {values}", values, "unstructured", PERCENTS, CODES, tokens)
    table(records, "Blocks of 64x64, bf16", "bf16", "block64x64", [80, 90], BLOCKS, tokens)


def real_tables(records, whole):
    """Masks of real pruning beside random ones: time over time, the geometric mean of the shapes and
    the largest; with `whole` also every cell."""
    who = [("ours", kernel), ("MACKO, best launch", lambda w: w.startswith("macko")),
           ("SpInfer", named("spinfer")), ("Flash-LLM", named("flash_llm"))]
    rows = [("bf16", "2:4", "real-2:4", 50, who[:1])]
    rows += [("bf16", "unstructured", "real", p, who) for p in PERCENTS]
    for values in ("fp8", "int8"):
        rows += [(values, "2:4", "real-2:4", 50, who[:1])]
        rows += [(values, "unstructured", "real", p, who[:1]) for p in PERCENTS]
    tokens = sorted({k[1] for k, _ in records.times if k[3].startswith("real")})
    if not tokens:
        return
    print("\n### Masks of real pruning beside random ones\n")
    print("Time with a SparseGPT mask over time with a random mask of the same sparsity, same run: "
          "geometric mean of the shapes, in brackets the largest.\n")
    print("| weight | who | " + " | ".join(f"T = {t}" for t in tokens) + " |")
    print("|---" * (2 + len(tokens)) + "|")
    for values, random, real, p, columns in rows:
        for name, accepts in columns:
            cells = []
            for t in tokens:
                ratios, wrong = [], False
                for shape in records.shapes:
                    a = records.best((shape, t, values, real, p), accepts)
                    b = records.best((shape, t, values, random, p), accepts)
                    if a and b:
                        ratios.append(a[0] / b[0])
                    wrong = wrong or records.cell(shape, t, values, real, p, accepts)[0] == "wrong"
                cells.append(f"{geometric(ratios):.2f} ({max(ratios):.2f})" if ratios
                             else "wrong" if wrong else "-")
            if any(c != "-" for c in cells):
                print(f"| {values} {random}" + ("" if p == 50 and random == "2:4" else f" {p} %")
                      + f" | {name} | " + " | ".join(cells) + " |")
    if not whole:
        print("\nThe dense time over that with such a mask:")
        summary(records, tokens, [(values, real, p, columns[:1]) for values, _, real, p, columns
                                  in rows if not real.endswith("2:4")])
        return
    for values in ("bf16", "fp8", "int8"):
        table(records, f"With a real mask: {values} 2:4", values, "real-2:4", [50], who[:1], tokens)
        table(records, f"With real masks: {values} unstructured", values, "real", PERCENTS, who[:1],
              tokens)


def main():
    whole = "--all" in sys.argv
    records = Records([a for a in sys.argv[1:] if a != "--all"])
    few = [t for t in records.tokens if t < 128]
    many = [t for t in records.tokens if t >= 128]
    spread = sorted(records.spread)
    for head in records.heads:
        print(head + "  ")
    print(f"Spread (largest - least) of a time's measurements: median "
          f"{100 * spread[len(spread) // 2]:.1f} %, 95 % of the rows under "
          f"{100 * spread[int(len(spread) * 0.95)]:.1f} %.")
    print("SM clock, MHz, least to largest of the medians of a shape: "
          + ", ".join(f"T = {t} {min(c)} to {max(c)}" for t, c in sorted(records.clocks.items()))
          + ".")
    if whole:
        all_tables(records, records.tokens)
        real_tables(records, whole)
        bytes_table(records, few)
        return
    summary(records, few, ROWS)
    real_tables(records, whole)
    if many:
        summary(records, many, [("bf16", "dense", 0, [("our dense", ours)])] + ROWS)


main()
