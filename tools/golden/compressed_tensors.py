"""Sparse folders written by compressed-tensors, and a check of ours by it.

    python tools/golden/compressed_tensors.py make
        writes tests/golden/compressed_tensors/STORE[-VERSION]/{config.json, model.safetensors} and, once,
        dense-STORE.safetensors with the weights that went in
    python tools/golden/compressed_tensors.py write DENSE SPARSE STORE
        writes the model folder DENSE as the folder SPARSE, its Linears in STORE, for us to read
    python tools/golden/compressed_tensors.py check DENSE SPARSE
        reads the folder SPARSE (sparse-bitmask, sparse-24-bitmask or dense) with compressed-tensors and compares every
        tensor with the folder or file DENSE, bit by bit (a -0.0 that was compressed has come back as +0.0)

Needs torch, numpy, safetensors, transformers 4 and compressed-tensors==0.10.2, which reads and writes both stores. Run
`make` under compressed-tensors==0.4.0 too for the older names (MODULE.weight.bitmask). Runs on the CPU.

Both directions hold for whole models too. Run once with torch 2.11.0, transformers 4.52.4 and compressed-tensors 0.10.2
on examples/demo-model (bf16, 56 tensors, 42 of them sparse), for PATTERN 2:4 and unstructured at 50 %:

    lacuna prune examples/demo-model -o DENSE --method magnitude --pattern PATTERN --store dense
    ours   lacuna prune ... -o SPARSE --store compressed-tensors (`lacuna convert` from the dense and from the compact
           store gives the same file): check DENSE SPARSE finds no difference
    theirs write DENSE SPARSE STORE; lacuna convert SPARSE -o BACK --store dense: check DENSE BACK finds no difference
"""

import importlib.metadata
import json
import pathlib
import shutil
import sys

sys.path.pop(0)  # the folder of this script, which has the name of the package

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.config import SparsityCompressionConfig
from safetensors import safe_open
from safetensors.torch import save_file

OUT = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden" / "compressed_tensors"
VERSION = importlib.metadata.version("compressed-tensors")
NEWEST = "0.10.2"
STORES = {"sparse-bitmask": "unstructured", "sparse-24-bitmask": "2:4"}


def two_of_four(weight):
    """Zeros the two smallest of every four; some groups lose more."""
    groups = weight.view(-1, 4)
    groups.scatter_(1, groups.abs().topk(2, dim=1, largest=False).indices, 0)
    groups[::7, :3] = 0  # one non-zero, or none
    groups[::11] = 0
    return weight


def weights(store):
    torch.manual_seed(7)
    two = store == "sparse-24-bitmask"

    def sparse(rows, columns, dtype):
        weight = torch.randn(rows, columns, dtype=torch.float32).to(dtype)
        if two:
            return two_of_four(weight)
        weight[torch.rand(rows, columns) < 0.5] = 0
        return weight

    state = {
        "model.layers.0.self_attn.q_proj.weight": sparse(70, 36 if two else 37, torch.bfloat16),
        "model.layers.0.mlp.up_proj.weight": sparse(5, 20 if two else 9, torch.float16),
        "model.layers.0.mlp.down_proj.weight": sparse(8, 16, torch.float32),
        "model.layers.0.mlp.up_proj.bias": torch.randn(5),
    }
    state["model.layers.0.mlp.down_proj.weight"][3] = 0
    state["model.layers.0.mlp.down_proj.weight"][0, 0] = -0.0
    if not two:  # without targets, every .weight is compressed, vectors too
        state["model.norm.weight"] = torch.tensor([1.5, 0.0, 2.5, 0.0, 3.5, 4.5, 0.0, 5.5, 6.5])
    return state


def compressor(sparsity):
    config = SparsityCompressionConfig.load_from_registry(sparsity["format"], **sparsity)
    return ModelCompressor(sparsity_config=config)


def make():
    for store, structure in STORES.items():
        folder = OUT / (store if VERSION == NEWEST else f"{store}-{VERSION}")
        dense = OUT / f"dense-{store}.safetensors"
        state = weights(store)
        try:
            theirs = compressor(dict(format=store, targets=["Linear"], ignore=["lm_head"], global_sparsity=0.5,
                                     sparsity_structure=structure))
        except KeyError:
            print(f"{store}: unknown to {VERSION}")
            continue
        written = dict(theirs.sparsity_compressor.compress({k: v.clone() for k, v in state.items()}))
        folder.mkdir(parents=True, exist_ok=True)
        if VERSION == NEWEST:
            save_file(state, dense)
        save_file(written, folder / "model.safetensors", metadata={"made_with": f"compressed-tensors {VERSION}"})
        (folder / "config.json").write_text(json.dumps(dict(architectures=["LlamaForCausalLM"], model_type="llama")))
        theirs.update_config(str(folder))
        print(folder, sorted((k, tuple(v.shape), str(v.dtype)) for k, v in written.items()))


def write(dense, sparse, store):
    from transformers import AutoModelForCausalLM

    dense, sparse = pathlib.Path(dense), pathlib.Path(sparse)
    model = AutoModelForCausalLM.from_pretrained(dense, torch_dtype="auto")
    theirs = compressor(dict(format=store, targets=["Linear"], ignore=["lm_head"], global_sparsity=0.5,
                             sparsity_structure=STORES[store]))
    state = {name: tensor for name, tensor in model.state_dict().items() if name in load(dense)}  # lm_head may be tied
    written = dict(theirs.compress(model, state))
    sparse.mkdir(parents=True)
    for file in dense.glob("*token*.json"):
        shutil.copy(file, sparse)
    save_file(written, sparse / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    config.pop("lacuna", None)  # as a program that knows nothing of us writes it
    (sparse / "config.json").write_text(json.dumps(config, indent=2))
    theirs.update_config(str(sparse))
    print(f"{sparse}: {len(written)} tensors of {len(state)} weights by compressed-tensors {VERSION}")


def load(path):
    path = pathlib.Path(path)
    tensors = {}
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors.update({name: opened.get_tensor(name) for name in opened.keys()})
    return tensors


def same(one, other):
    """Equal in type, shape and bits: torch.equal takes -0.0 for 0.0."""
    return (one.dtype == other.dtype and one.shape == other.shape
            and torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8)))


def check(dense, sparse):
    config = json.loads((pathlib.Path(sparse) / "config.json").read_text())
    stored = config.get("quantization_config", {}).get("sparsity_config")
    got = dict(compressor(stored).sparsity_compressor.decompress(str(sparse))) if stored else load(sparse)
    want = load(dense)
    differing = [name for name in sorted(set(got) | set(want))
                 if name not in got or name not in want or not same(got[name], want[name])]
    print(f"{sparse}: {len(want)} tensors, {len(differing)} differ by compressed-tensors {VERSION} {differing[:3]}")
    return 1 if differing or not want else 0


if __name__ == "__main__":
    if sys.argv[1:] == ["make"]:
        make()
    elif len(sys.argv) == 5 and sys.argv[1] == "write" and sys.argv[4] in STORES:
        write(*sys.argv[2:])
    elif len(sys.argv) == 4 and sys.argv[1] == "check":
        sys.exit(check(sys.argv[2], sys.argv[3]))
    else:
        sys.exit(__doc__)
