"""Sparse linear layers of Lacuna for PyTorch (docs/python.md).

    import lacuna
    layer = lacuna.Linear.from_dense(pruned, "2:4")      # a torch.nn.Linear whose weight follows 2:4
    y = torch.compile(layer)(x)
"""

import os
import pathlib

import torch

LIBRARY = "liblacuna_torch.so"


def load(path=None):
    """Registers torch.ops.lacuna from a library: `path`, $LACUNA_TORCH_LIBRARY, beside this file, or build/release."""
    here = pathlib.Path(__file__).resolve().parent
    candidates = [path, os.environ.get("LACUNA_TORCH_LIBRARY"), here / LIBRARY, here.parent / "build/release" / LIBRARY]
    for candidate in candidates:
        if candidate and pathlib.Path(candidate).exists():
            torch.ops.load_library(str(candidate))
            return
    raise FileNotFoundError(f"{LIBRARY} is not there. Build it (./dev build) or set LACUNA_TORCH_LIBRARY.")


def pack(weight, pattern):
    """A weight [out, in] that follows `pattern`, packed for its device: (bytes, form) for linear() and unpack()."""
    packed, form = torch.ops.lacuna.pack(weight, pattern)
    return packed, tuple(form)


def linear(x, packed, form, bias=None):
    """x W^T + bias. @shape x [..., in] -> [..., out]"""
    return torch.ops.lacuna.linear(x, packed, form, bias)


def unpack(packed, form):
    """W again, dense; what was dropped is +0."""
    return torch.ops.lacuna.unpack(packed, form)


class Linear(torch.nn.Module):
    """torch.nn.Linear with a weight that stays packed: fixed, while gradients reach x and the bias."""

    def __init__(self, packed, form, bias=None):
        super().__init__()
        self.register_buffer("packed", packed)
        self.form = tuple(form)
        self.bias = bias

    @classmethod
    def from_dense(cls, layer, pattern):
        """@param layer  a torch.nn.Linear whose weight follows the pattern, on the device that it will run on"""
        packed, form = pack(layer.weight.detach(), pattern)
        return cls(packed, form, layer.bias)

    @property
    def out_features(self):
        return self.form[2]

    @property
    def in_features(self):
        return self.form[3]

    def forward(self, x):
        return linear(x, self.packed, self.form, self.bias)

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, bytes={self.packed.numel()}"

    def get_extra_state(self):
        return {"form": list(self.form)}

    def set_extra_state(self, state):
        self.form = tuple(state["form"])


if not hasattr(torch.ops.lacuna, "linear"):
    load()
