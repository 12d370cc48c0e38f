"""torch.ops.lacuna against torch's own products, and torch's check of custom operators (opcheck).

    LACUNA_TORCH_LIBRARY=build/release/liblacuna_torch.so python tests/python/ops_test.py [cpu | cuda]

Ends with 77 where torch can't be imported: its CUDA libraries are no part of ./dev setup.
"""

import pathlib
import sys
import unittest

try:
    import torch
except ImportError as error:
    print(f"skipped: torch can't be imported ({error}).")
    sys.exit(77)

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "python"))
import lacuna  # noqa: E402

DEVICE = "cpu"
PATTERNS = ["unstructured", "2:4", "block:16x32"]


def types():
    return [torch.float32, torch.bfloat16, torch.float16] if DEVICE == "cpu" else [torch.bfloat16, torch.float16]


def weight(rows, columns, pattern, dtype):
    """Random and pruned; on a GPU in a shape that our kernels take."""
    torch.manual_seed(rows * 1000 + columns)
    w = torch.randn(rows, columns)
    if pattern == "2:4":
        order = w.abs().view(rows, -1, 4).argsort(-1).argsort(-1)
        w = w * (order >= 2).view(rows, columns)
    elif pattern == "unstructured":
        w = w * (torch.rand(rows, columns) < 0.4)
    else:
        kept = torch.rand(-(-rows // 16), -(-columns // 32)) < 0.25
        w = w * kept.repeat_interleave(16, 0).repeat_interleave(32, 1)[:rows, :columns]
    return w.to(dtype).to(DEVICE)


class Ops(unittest.TestCase):
    def test_unpack_gives_the_weight_again(self):
        for pattern in PATTERNS:
            for dtype in types():
                w = weight(130, 256, pattern, dtype)
                packed, form = lacuna.pack(w, pattern)
                self.assertEqual(packed.device.type, DEVICE)
                self.assertTrue(torch.equal(lacuna.unpack(packed, form), w), pattern)

    def test_packed_is_smaller(self):
        for pattern in PATTERNS:
            w = weight(1024, 4096, pattern, torch.bfloat16)  # room for what each multiprocessor rounds up
            self.assertLess(lacuna.pack(w, pattern)[0].numel(), w.numel() * w.element_size(), pattern)

    def test_linear_is_the_product(self):
        for pattern in PATTERNS:
            for dtype in types():
                w = weight(130, 256, pattern, dtype)
                packed, form = lacuna.pack(w, pattern)
                bias = torch.randn(130, dtype=dtype, device=DEVICE)
                for shape in [(256,), (1, 256), (2, 3, 256), (16, 256), (33, 256), (90, 256), (0, 256)]:
                    x = torch.randn(shape, dtype=dtype, device=DEVICE)
                    for b in [None, bias]:
                        y = lacuna.linear(x, packed, form, b)
                        exact = torch.nn.functional.linear(
                            x.double(), w.double(), None if b is None else b.double())
                        self.assertEqual(y.shape, exact.shape)
                        self.assertEqual(y.dtype, dtype)
                        if y.numel() == 0:
                            continue
                        step = torch.finfo(dtype).eps
                        scale = torch.nn.functional.linear(x.double().abs(), w.double().abs()) + 4
                        self.assertLessEqual(((y.double() - exact).abs() / scale).max().item(), 2 * step, pattern)

    def test_x_may_have_any_strides(self):
        w = weight(64, 128, "2:4", types()[-1])
        packed, form = lacuna.pack(w, "2:4")
        x = torch.randn(128, 5, dtype=w.dtype, device=DEVICE)
        self.assertTrue(torch.equal(lacuna.linear(x.t(), packed, form),
                                    lacuna.linear(x.t().contiguous(), packed, form)))

    def test_opcheck(self):
        for pattern in PATTERNS:
            for dtype in types():
                w = weight(64, 128, pattern, dtype)
                packed, form = lacuna.pack(w, pattern)
                form = list(form)
                torch.library.opcheck(torch.ops.lacuna.unpack, (packed, form))
                for tokens in [1, 40]:
                    for grad in [False, True]:
                        x = torch.randn(tokens, 128, dtype=dtype, device=DEVICE, requires_grad=grad)
                        bias = torch.randn(64, dtype=dtype, device=DEVICE, requires_grad=grad)
                        torch.library.opcheck(torch.ops.lacuna.linear, (x, packed, form, bias))
                        torch.library.opcheck(torch.ops.lacuna.linear, (x, packed, form))

    def test_gradients_reach_x_and_bias(self):
        dtype = types()[0]
        for pattern in PATTERNS:
            w = weight(64, 128, pattern, dtype)
            packed, form = lacuna.pack(w, pattern)
            x = torch.randn(3, 128, dtype=dtype, device=DEVICE, requires_grad=True)
            bias = torch.randn(64, dtype=dtype, device=DEVICE, requires_grad=True)
            (lacuna.linear(x, packed, form, bias) * 3).sum().backward()
            got = x.grad, bias.grad
            x.grad = bias.grad = None
            (torch.nn.functional.linear(x, w, bias) * 3).sum().backward()
            for ours, theirs in zip(got, (x.grad, bias.grad)):
                torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)

    def test_compile_sees_one_graph(self):
        dtype = types()[-1]
        for pattern in PATTERNS:
            layer = torch.nn.Linear(128, 64, dtype=dtype, device=DEVICE)
            layer.weight.data = weight(64, 128, pattern, dtype)
            sparse = lacuna.Linear.from_dense(layer, pattern)

            def step(x):
                return torch.relu(sparse(x)) + 1

            torch._dynamo.reset()
            backend = "inductor" if DEVICE == "cuda" else "aot_eager"  # inductor asks for a C++ compiler on a CPU
            compiled = torch.compile(step, fullgraph=True, backend=backend)
            for tokens in [1, 3, 40]:
                x = torch.randn(tokens, 128, dtype=dtype, device=DEVICE)
                torch.testing.assert_close(compiled(x), step(x))

    def test_a_layer_is_saved_and_loaded(self):
        layer = torch.nn.Linear(128, 64, dtype=types()[-1], device=DEVICE)
        layer.weight.data = weight(64, 128, "2:4", types()[-1])
        sparse = lacuna.Linear.from_dense(layer, "2:4")
        other = lacuna.Linear(torch.zeros_like(sparse.packed), sparse.form,
                              torch.nn.Parameter(torch.zeros_like(layer.bias)))
        other.load_state_dict(sparse.state_dict())
        x = torch.randn(2, 128, dtype=layer.weight.dtype, device=DEVICE)
        self.assertTrue(torch.equal(other(x), sparse(x)))
        self.assertEqual((other.in_features, other.out_features), (128, 64))

    def test_what_is_wrong_is_said(self):
        w = weight(64, 128, "2:4", types()[-1])
        packed, form = lacuna.pack(w, "2:4")
        x = torch.randn(2, 128, dtype=w.dtype, device=DEVICE)
        for call, text in [
            (lambda: lacuna.pack(torch.ones_like(w), "2:4"), "2:4"),
            (lambda: lacuna.pack(w, "2:3:4"), "pattern"),
            (lambda: lacuna.pack(w, "dense"), "dense"),
            (lambda: lacuna.pack(w[0], "2:4"), "matrix"),
            (lambda: lacuna.pack(w.to(torch.int32), "2:4"), "float32, bfloat16 or float16"),
            (lambda: lacuna.linear(x[:, :64], packed, form), "need 128"),
            (lambda: lacuna.linear(x, packed, form, x[0]), "bias"),
            (lambda: lacuna.linear(x.double(), packed, form), "float32, bfloat16 or float16"),
            (lambda: lacuna.linear(x, packed, form[:5]), "form"),
            (lambda: lacuna.linear(x, packed, (99,) + form[1:]), "form"),
            (lambda: lacuna.linear(x, packed[:100], form), "packed"),
            (lambda: lacuna.unpack(packed.float(), form), "packed"),
        ]:
            with self.assertRaisesRegex(RuntimeError, text):
                call()


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in ("cpu", "cuda"):
        DEVICE = sys.argv.pop(1)
    unittest.main()
