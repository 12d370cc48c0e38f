#!/usr/bin/env python3
"""Whole models against llama.cpp on this CPU: the same shape, one run, turn by turn.

Memory of a shared machine may be half as fast a minute later, so nobody is timed alone: every process loads once and stays,
and in a round each model runs once, every other round in reverse. What counts is the ratio within a round, the median over
the rounds. llama.cpp gets its weights from the same dense folder (`lacuna synth` or a real Llama), as bf16 and quantised by
its own quantiser; its tokens are fed without sampling, ours are chosen greedily.

    python3 -m venv rivals
    CMAKE_ARGS=-DGGML_NATIVE=ON rivals/bin/pip install --no-binary llama-cpp-python llama-cpp-python gguf
    build/release/lacuna synth --like tinyllama-1.1b -o models/tinyllama
    rivals/bin/python tools/rivals_cpu_end_to_end.py models/tinyllama --like tinyllama-1.1b \\
        --ours dense unstructured@0.5 --theirs bf16 --expect 'decode unstructured@0.5 bf16 1.45'
    rivals/bin/python tools/rivals_cpu_end_to_end.py models/smollm2 --ours models/smollm2 models/smollm2-50 --theirs bf16

Prints a table, then one JSON line for every model and every ratio. The exit code is 1 if an expectation was missed.
"""
import argparse
import ctypes
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
CODES = {"q4_0": 2, "q8_0": 7, "q4_K_M": 15}  # llama_ftype
PLAIN = "/plain"


def code_of(label):
    """Of one of their labels, CODE or CODE/plain."""
    return label.removesuffix(PLAIN)


# --- a dense Llama folder as GGUF ----------------------------------------------------------------------------------------

def safetensors_of(folder):
    """Name -> (dtype, shape, bytes) of every tensor."""
    import numpy as np
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = np.memmap(file, np.uint8, "r")
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        for name, entry in json.loads(data[8:start].tobytes()).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                tensors[name] = entry["dtype"], entry["shape"], data[start + first:start + last]
    return tensors


def as_bf16(dtype, shape, data):
    """Bits of bf16, uint16 of this shape; rounded to nearest even from wider types."""
    import numpy as np
    if dtype == "BF16":
        return data.view(np.uint16).reshape(shape)
    wide = data.view({"F16": np.float16, "F32": np.float32}[dtype]).astype(np.float32).view(np.uint32)
    return ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16).reshape(shape)


def turned(bits, heads):
    """Rows of q or k in the order of llama.cpp's rotation: pairs lie side by side there, halves here."""
    rows, columns = bits.shape
    return bits.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(folder, out):
    import gguf
    import numpy as np
    config = json.loads((folder / "config.json").read_text())
    if config["architectures"] != ["LlamaForCausalLM"]:
        sys.exit(f"rivals: {folder} is no Llama (got {config['architectures']}).")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    theta = config.get("rope_parameters", {}).get("rope_theta") or config.get("rope_theta", 10000.0)
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for layer in range(config["num_hidden_layers"]):
        names.update({f"model.layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in parts.items()})
    tensors = safetensors_of(folder)
    for ours, theirs in names.items():
        if ours == "lm_head" and ours + ".weight" not in tensors:
            continue  # tied
        bits = as_bf16(*tensors[ours + ".weight"])
        if bits.ndim == 1:
            writer.add_tensor(theirs + ".weight", (bits.astype(np.uint32) << 16).view(np.float32))
            continue
        if ours.endswith(("q_proj", "k_proj")):
            bits = turned(bits, heads if ours.endswith("q_proj") else kv_heads)
        writer.add_tensor(theirs + ".weight", np.ascontiguousarray(bits).view(np.uint8),
                          raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_of(folder, code):
    """The GGUF file of a folder in one of llama.cpp's types, made when it isn't there."""
    out = folder / f"rival-{code}.gguf"
    if out.exists():
        return out
    partial = out.with_suffix(".gguf.partial")
    if code == "bf16":
        write_gguf(folder, partial)
    else:
        import llama_cpp
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype, parameters.nthread = CODES[code], os.cpu_count()
        failed = llama_cpp.llama_model_quantize(str(gguf_of(folder, "bf16")).encode(), str(partial).encode(),
                                                ctypes.byref(parameters))
        if failed:
            sys.exit(f"rivals: llama.cpp could not quantise {folder} to {code}.")
    partial.rename(out)
    return out


# --- llama.cpp as a process that takes turns -------------------------------------------------------------------------------

class Llama:
    """One model in llama.cpp."""

    def __init__(self, file, plain, options):
        import llama_cpp
        self.api, self.options = llama_cpp, options
        how = llama_cpp.llama_model_default_params()
        how.use_extra_bufts = not plain
        how.use_mmap = not options.large_pages
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), how)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = options.prompt + options.tokens + 16
        parameters.n_batch = parameters.n_ubatch = 512
        parameters.n_threads = parameters.n_threads_batch = options.threads
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        if not self.model or not self.context:
            sys.exit(f"rivals: llama.cpp could not load {file}.")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.ids = [(i * 7919 + 13) % self.vocab for i in range(options.prompt + options.tokens)]

    def feed(self, ids):
        tokens = (self.api.llama_token * len(ids))(*ids)
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(ids))) != 0:
            sys.exit("rivals: llama_decode failed.")
        self.api.llama_get_logits_ith(self.context, -1)

    def turn(self):
        prompt, tokens = self.options.prompt, self.options.tokens
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        start = time.perf_counter()
        for first in range(0, prompt, 512):
            self.feed(self.ids[first:min(first + 512, prompt)])
        read = time.perf_counter()
        for token in self.ids[prompt:]:
            self.feed([token])
        end = time.perf_counter()
        return {"ttft_ms": 1e3 * (read - start), "tpot_ms": 1e3 * (end - read) / tokens}


def work(options):
    """Models by number from standard input, what each turn took to standard output: `lacuna bench model --turns`."""
    import llama_cpp
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    models = [Llama(gguf_of(options.folder, code_of(label)), label.endswith(PLAIN), options) for label in options.theirs]
    for model in models:
        model.turn()
    print(json.dumps({"ready": options.theirs,
                      "system": llama_cpp.llama_print_system_info().decode()}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"model": int(line), **models[int(line)].turn()}), flush=True)


# --- the race ---------------------------------------------------------------------------------------------------------------

class Racers:
    """A process that holds some models."""

    def __init__(self, command, labels, **variables):
        self.labels, self.samples = labels, {label: {"ttft_ms": [], "tpot_ms": []} for label in labels}
        # Everyone waits as it would by itself: our tool sets what it wants, and llama.cpp has its own default.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
        self.process = subprocess.Popen([str(c) for c in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env=environment | variables)
        self.greeting = self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"rivals: {self.process.args[0]} ended with exit code {self.process.wait()}.")
        return json.loads(line)

    def turn(self, index):
        self.process.stdin.write(f"{index}\n")
        self.process.stdin.flush()
        answer = self.answer()
        for key, samples in self.samples[self.labels[index]].items():
            samples.append(answer[key])

    def forget_round(self):
        for kinds in self.samples.values():
            for samples in kinds.values():
                samples.pop()

    def ticks(self):
        """CPU time so far, user and system."""
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def close(self):
        self.process.stdin.close()
        rest = self.process.stdout.read()
        self.process.wait()
        return json.loads(rest) if rest else None


def summary(samples):
    ordered = sorted(samples)
    return {"median": statistics.median(ordered), "p10": ordered[len(ordered) // 10], "p90": ordered[-1 - len(ordered) // 10]}


def machine_ticks():
    """What the machine's processors did so far: ticks of all, and ticks idle."""
    fields = [int(field) for field in pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(fields), fields[3] + fields[4]


class Others:
    """Share of the processors that went to others (stolen time too) since the last question."""

    def __init__(self, racers):
        self.racers, self.before = racers, None
        self.share()

    def share(self):
        now = (*machine_ticks(), sum(one.ticks() for one in self.racers))
        before, self.before = self.before or now, now
        total, idle, own = (b - a for a, b in zip(before, now))
        return (total - idle - own) / total if total else 0.0


def run_rounds(racers, options):
    """Rounds that count, and the others: those in which someone else took part of the machine."""
    turns = [(one, index) for one in racers for index in range(len(one.labels))]
    # Neighbours are of different processes: one of ours, one of theirs, ...
    turns.sort(key=lambda turn: turn[1])
    start, rounds, dropped, others = time.monotonic(), 0, 0, Others(racers)
    while rounds < options.rounds and (rounds + dropped < 3 or time.monotonic() - start < options.seconds):
        for one, index in turns if (rounds + dropped) % 2 == 0 else reversed(turns):
            one.turn(index)
        if others.share() > options.others:
            dropped += 1
            for one in racers:
                one.forget_round()
        else:
            rounds += 1
    if rounds == 0:
        sys.exit(f"rivals: others were at work in every round ({dropped}). Measure on a quiet machine.")
    return rounds, dropped


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=pathlib.Path, help="dense Llama folder that llama.cpp's files are made from")
    parser.add_argument("--like", help="ours are variants of this shape (`bench model --like`) instead of folders")
    parser.add_argument("--ours", nargs="+", default=[], help="variants or folders")
    parser.add_argument("--theirs", nargs="+", default=[], metavar="CODE[/plain]",
                        choices=[code + how for code in ("bf16", *CODES) for how in ("", PLAIN)],
                        help="bf16, q8_0, q4_0 or q4_K_M; plain: no repacked or AMX weights")
    parser.add_argument("--expect", nargs="+", default=[], metavar="'decode|prefill OURS THEIRS RATIO'",
                        help="OURS is RATIO times as fast as THEIRS: the faster of CODE and CODE/plain, `best` of all theirs, or one of ours")
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=15, help="at most")
    parser.add_argument("--seconds", type=float, default=120, help="no round begins later (but three are run)")
    parser.add_argument("--others", type=float, default=0.05,
                        help="share of the processors from which on a round in which others took it doesn't count")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--lacuna", default=ROOT / "build/release/lacuna")
    parser.add_argument("--large-pages", action="store_true",
                        help="llama.cpp's weights in large pages, as ours are: read instead of mapped, by a malloc that asks for them")
    parser.add_argument("--prepare", action="store_true", help="make llama.cpp's files and stop")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is None:
        parser.error("FOLDER is missing.")
    if options.work:
        return work(options)
    files = [gguf_of(options.folder, code_of(label)) for label in options.theirs]
    if options.prepare:
        return None

    same = ["--prompt", options.prompt, "--tokens", options.tokens, "--threads", options.threads]
    racers = []
    if options.ours:
        if options.like:
            models = ["--like", options.like, "--compare", *options.ours]
        else:
            models = [options.ours[0], *(["--compare", options.ours[1]] if len(options.ours) > 1 else [])]
        racers.append(Racers([options.lacuna, "bench", "model", *models, *same, "--dtype", options.dtype, "--device", "cpu",
                              "--turns", "--json", "-q"], options.ours))
    if files:
        large = options.large_pages
        racers.append(Racers([sys.executable, __file__, "--work", options.folder, *same, *["--large-pages"] * large,
                              "--theirs", *options.theirs],
                             options.theirs, **({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if large else {})))
    rounds, dropped = run_rounds(racers, options)
    systems = [one.greeting.get("system") for one in racers]
    reports = [one.close() for one in racers]
    samples = {label: one.samples[label] for one in racers for label in one.labels}
    report = next((r for r in reports if r), {})
    where = {"machine": report.get("machine"), "threads": options.threads, "commit": report.get("commit"),
             "llama.cpp": next((s for s in systems if s), None), "large_pages": options.large_pages,
             "prompt": options.prompt, "tokens": options.tokens, "rounds": rounds, "dropped_rounds": dropped,
             "shape": options.like or str(options.folder)}
    weights = {label: model["weight_bytes"] for label, model in zip(options.ours, report.get("models", []))}
    weights |= {label: file.stat().st_size for label, file in zip(options.theirs, files)}

    print(f"{where['machine']}, {options.threads} threads, {where['shape']}, prompt {options.prompt}, "
          f"{options.tokens} tokens, {rounds} rounds ({dropped} disturbed ones don't count)"
          + (", llama.cpp in large pages" if options.large_pages else ""))
    print(f"{'model':34} {'prompt tok/s':>12} {'tok/s':>8} {'ms/tok':>8} {'p10':>8} {'p90':>8} {'MB':>7}")
    lines = []
    for label, took in samples.items():
        first, later = summary(took["ttft_ms"]), summary(took["tpot_ms"])
        lines.append({**where, "model": label, "ttft_ms": first, "tpot_ms": later, "bytes": weights.get(label)})
        print(f"{label:34} {1e3 * options.prompt / first['median']:12.1f} {1e3 / later['median']:8.1f} "
              f"{later['median']:8.2f} {later['p10']:8.2f} {later['p90']:8.2f} {weights.get(label, 0) / 1e6:7.0f}")
    missed = False
    for expectation in options.expect:
        phase, ours, theirs, least = expectation.split()
        key = "tpot_ms" if phase == "decode" else "ttft_ms"
        rivals = [label for label in samples
                  if theirs in (label, code_of(label)) or (theirs == "best" and label in options.theirs)]
        theirs = min(rivals, key=lambda label: statistics.median(samples[label][key]))
        ratio = summary([t / o for t, o in zip(samples[theirs][key], samples[ours][key])])
        missed |= ratio["median"] < float(least)
        lines.append({**where, "phase": phase, "ours": ours, "theirs": theirs, "ratio": ratio, "expected": float(least)})
        print(f"{phase} {ours} / {theirs}: {ratio['median']:.2f}x ({ratio['p10']:.2f} to {ratio['p90']:.2f}), expected "
              f"{float(least):.2f}x: {'met' if ratio['median'] >= float(least) else 'MISSED'}")
    for line in lines:
        print(json.dumps(line))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
