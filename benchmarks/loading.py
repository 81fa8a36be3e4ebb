"""What it costs to load published weights: initialise-then-load against a warm `create_model(pretrained=True)`.

    python benchmarks/loading.py [NAME]          default: dimr_xl_256, 505 M parameters, a 2.0 GB file

Writes random weights of the model's size to a temporary cache, as a conversion would, and loads them in two ways, each
in a process of its own, in turn and `--repeats` times; prints the medians and their ratio. "Initialise" builds the
network with random weights, reads a pickle and copies it into place: what research code does.

Time excludes imports and ends when the network is returned. Ours then maps the file and has read almost none of it:
the first forward pass reads the rest. `--touch` reads one value of every page of the weights inside the time, in both
ways, and so compares networks that are equally ready to compute.

Memory is the growth of the process's peak resident set over what it was after the imports, in units of the file. Every
page is touched before it is measured, with and without `--touch`: a memory-mapped page counts only once it is read.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SETUP = """
import json, resource, sys, time
import torch
import yaml
torch.set_num_threads(2)
import diffzoo
from diffzoo.zoo import find_pretrained
from diffzoo.zoo.building import build_meta
from diffzoo.zoo.entries import converted_path
import safetensors.torch
name, folder, touch = sys.argv[1], sys.argv[2], sys.argv[3] == "touch"
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
entry(name)
before, start = peak(), time.perf_counter()
"""
INITIALISE = """
network = entry(name).network(entry(name).config)
network.load_state_dict(torch.load(f"{folder}/weights.pth", map_location="cpu", weights_only=True))
"""
WARM = """
network = diffzoo.create_model(name, pretrained=True)
"""
REPORT = """
loaded = time.perf_counter() - start
sum(float(p.detach().view(-1)[::1024].sum()) for p in network.parameters())  # 1024 float32 values are a page
touched = time.perf_counter() - start
first = next(iter(network.state_dict().values())).flatten()[:4].tolist()
print(json.dumps({"seconds": touched if touch else loaded, "peak": peak() - before, "first": first}))
"""
WRITE = """
import os, pathlib, sys, json
import torch
from diffzoo.zoo import find_pretrained
from diffzoo.zoo.building import build_meta
from diffzoo.zoo.entries import converted_path
from safetensors.torch import save_file
name, folder = sys.argv[1], sys.argv[2]
item = find_pretrained(name)
shapes = build_meta(item.metadata.network, item.config).state_dict()
generator = torch.Generator().manual_seed(0)
state = {k: torch.randn(v.shape, generator=generator).mul_(0.02) for k, v in shapes.items()}
path = converted_path(item)
path.parent.mkdir(parents=True)
save_file(state, path, {"original": json.dumps({"sha256": "0" * 64})})
torch.save(state, f"{folder}/weights.pth")
print(path.stat().st_size)
"""


def run(script: str, *args: str, home: Path) -> str:
    """Run a script in a process of its own; what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", script, *args],
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", default="dimr_xl_256")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--touch", action="store_true", help="read every page, in both ways, inside the time too")
    args = parser.parse_args()
    touch = "touch" if args.touch else "load"
    with tempfile.TemporaryDirectory(prefix="diffzoo-loading-") as name:
        folder = Path(name)
        size = int(run(WRITE, args.name, name, home=folder))
        found: dict[str, list[dict]] = {"initialise, then load": [], "warm create_model": []}
        for _ in range(args.repeats):
            for way, body in zip(found, (INITIALISE, WARM), strict=True):
                found[way].append(json.loads(run(SETUP + body + REPORT, args.name, name, touch, home=folder)))
    assert len({tuple(r["first"]) for rows in found.values() for r in rows}) == 1, "the two ways differ"
    print(f"{args.name}, a file of {size / 1e9:.2f} GB, median of {args.repeats}")
    seconds = {way: statistics.median(r["seconds"] for r in rows) for way, rows in found.items()}
    peak = {way: statistics.median(r["peak"] for r in rows) / size for way, rows in found.items()}
    for way in found:
        print(f"  {way:<24} {seconds[way]:7.2f} s   peak memory {peak[way]:.2f} x the file")
    first, second = seconds.values()
    print(f"  time: {second / first:.3f} of initialise-then-load")


if __name__ == "__main__":
    main()
