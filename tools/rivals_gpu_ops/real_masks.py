#!/usr/bin/env python3
"""Masks of real pruning for bench: the kept weights of one block's q_proj, gate_proj and down_proj.

    lacuna convert SmolLM2-135M-Instruct.Q4_1.gguf -o smol --store dense
    A="--method sparsegpt --samples 32 --length 512 --calibration c4.jsonl --store dense"
    for s in 50 60 70 80; do lacuna prune smol -o smol-$s --sparsity 0.$s $A; done
    lacuna prune smol -o smol-2of4 --pattern 2:4 $A
    real_masks.py --out masks --block 15 50=smol-50 60=smol-60 70=smol-70 80=smol-80 2of4=smol-2of4

Writes masks/MATRIX-NAME.mask: a line "rows columns", then a bit a weight, row by row, the highest bit
of a byte first; 1 is kept. bench lays it out side by side over its larger matrices.
"""
import argparse
import json
import pathlib
import struct

import numpy as np

MATRICES = {"q_proj": "self_attn.q_proj", "gate_proj": "mlp.gate_proj", "down_proj": "mlp.down_proj"}
TYPES = {"F32": np.uint32, "BF16": np.uint16, "F16": np.uint16}


def kept(folder, name):
    """True where a weight of a dense safetensors store is neither 0 nor -0."""
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as f:
            length = struct.unpack("<Q", f.read(8))[0]
            entry = json.loads(f.read(length)).get(name)
            if entry is None:
                continue
            begin, end = entry["data_offsets"]
            f.seek(8 + length + begin)
            kind = TYPES[entry["dtype"]]
            bits = np.frombuffer(f.read(end - begin), kind).reshape(entry["shape"])
        return (bits << 1).astype(kind) != 0
    raise SystemExit(f"{folder} has no {name}: prune with --store dense")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--block", type=int, required=True)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for model in options.models:
        name, folder = model.split("=", 1)
        for short, path in MATRICES.items():
            mask = kept(pathlib.Path(folder), f"model.layers.{options.block}.{path}.weight")
            rows, columns = mask.shape
            with open(options.out / f"{short}-{name}.mask", "wb") as f:
                f.write(f"{rows} {columns}\n".encode() + np.packbits(mask).tobytes())
            print(f"{short}-{name}: {rows}x{columns}, {1 - mask.mean():.4f} zeros; of rows "
                  f"{1 - mask.mean(axis=1).max():.3f} to {1 - mask.mean(axis=1).min():.3f}, of columns "
                  f"{1 - mask.mean(axis=0).max():.3f} to {1 - mask.mean(axis=0).min():.3f}")


main()
