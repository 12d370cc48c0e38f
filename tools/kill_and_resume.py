#!/usr/bin/env python3
"""Kills prune runs at random moments and resumes them: does each end in the bytes of an undisturbed run?

For every way to prune, one run that nobody disturbs says how long it takes and what the bytes are. Then, --kills times: a fresh
run is killed (SIGKILL) after a random part of that time, so is the run that resumes it, and the third goes on to the end; the
finished folder is held to the first one, every file, byte by byte.

    tools/kill_and_resume.py models/demo-5m --calibration-ids ids.json
    tools/kill_and_resume.py models/demo-5m --calibration-ids ids.json --kills 5 --ways alps swaps
"""
import argparse
import hashlib
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
WAYS = {
    "sparsegpt": ["--method", "sparsegpt"],
    "alps": ["--method", "alps", "--pattern", "2:4"],
    "exact": ["--method", "hessian"],
    "swaps": ["--method", "wanda", "--refine", "swaps"],
    "dsnot": ["--method", "dsnot"],
    "int4": ["--method", "alps", "--quantize", "int4"],
    "gradient": ["--method", "gradient"],
    "regional": ["--score", "regional", "--solve", "sparsegpt"],
}


def digests(folder):
    """Of every file by its name: weights, config.json, checksums."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def remove(out):
    for path in (out, pathlib.Path(f"{out}.journal"), pathlib.Path(f"{out}.partial")):
        shutil.rmtree(path, ignore_errors=True)


def killed_after(command, seconds):
    """Whether the run was still there to be killed. Ends where it failed by itself."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return True
    if process.returncode != 0:
        sys.exit(f"kill_and_resume: {' '.join(command)} ended with {process.returncode}: {errors.decode()}")
    return False


def disturb(command, out, seconds, random_):
    """Kills a run and the one that resumes it, unless they are through before; then resumes to the end. How often it killed."""
    journal = pathlib.Path(f"{out}.journal")
    kills = 0
    for flags in ([], ["--resume"]):
        if not killed_after(command + flags, random_.uniform(0, seconds)):
            return kills
        kills += 1
        if out.exists() and not journal.exists():  # only the goodbye was cut off
            return kills
    killed_after(command + ["--resume"], None)
    return kills


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--calibration-ids", required=True)
    parser.add_argument("--tool", default=str(ROOT / "build/release/lacuna"))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--kills", type=int, default=20, help="kills of every way to prune")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    random_ = random.Random(given.seed)
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        out = pathlib.Path(scratch) / "out"
        for way in given.ways:
            command = [given.tool, "prune", str(given.model), "-o", str(out), "--calibration-ids", given.calibration_ids,
                       "-q", *WAYS[way]]
            start = time.monotonic()
            killed_after(command, None)
            seconds = time.monotonic() - start
            whole = digests(out)
            kills = through = different = 0
            while kills < given.kills:
                remove(out)
                came = disturb(command, out, seconds, random_)
                kills += came
                through += came == 0
                different += digests(out) != whole
            remove(out)
            failed += different
            print(f"{way:10} {seconds:6.2f} s undisturbed; {kills} kills, {through} runs that were faster than their kill; "
                  f"{different} ended in other bytes", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
