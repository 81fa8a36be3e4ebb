"""The guidance that weights were published with is what pipeline, command line, evaluation and verify use."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import FakeHub
from PIL import Image
from torch import Tensor

from diffzoo import Condition, load_any, pipeline
from diffzoo.cli.main import main
from diffzoo.generation.plan import default_plan
from diffzoo.images import to_uint8
from diffzoo.process.gaussian import Estimate
from diffzoo.record import from_plain
from diffzoo.sampling import Denoiser, Guidance, PowerCosine, sample

COND, UNCOND = "cond + s * (cond - uncond)", "uncond + s * (cond - uncond)"
DECAY = {"formula": UNCOND, "scale": 3.0, "decay": {"class": "PowerCosine", "power": 2.0}}
KNOWN = Guidance(3.0, "uncond", decay=PowerCosine(2.0))


@pytest.fixture
def served(
    hub: FakeHub, official: dict[str, Tensor], publish: Callable[..., None], unpinned: None
) -> Callable[..., None]:
    buffer = io.BytesIO()
    loud = {k: 6 * v for k, v in official.items()}  # so that classes show
    torch.save(loud, buffer)
    hub.files["w.pth"] = buffer.getvalue()
    # with random weights, estimates of a v-prediction stay of the data's size, so that no pixel is cut off
    process = {"prediction": "V", "noise_conditioning": {"class": "TimeConditioning", "scale": 8.0, "offset": -4.0}}
    source = {"url": f"{hub.url}/files/w.pth"}
    return lambda **fields: publish(source=source, process=process, **fields)


class Stated:
    """Guidance as DiMR states it: uncond + w(t) (cond - uncond), w = 1 + (s - 1)(1 - cos(pi (1 - t)^p)) / 2."""

    def __init__(self, denoise: Denoiser, scale: float, power: float):
        self.denoise, self.process = denoise, denoise.process
        self.scale, self.power = scale, power

    def null_condition(self, cond: Condition | None) -> Condition | None:
        return None

    def __call__(self, z: Tensor, t: Tensor, cond: Condition | None = None) -> Estimate:
        w = 1 + (self.scale - 1) * (1 - math.cos(math.pi * (1 - float(t)) ** self.power)) / 2
        good, bad = self.denoise(z, t, cond), self.denoise(z, t, self.denoise.null_condition(cond))
        return Estimate(bad.x + w * (good.x - bad.x), bad.eps + w * (good.eps - bad.eps))


def test_the_decay_of_the_manifest_is_sampled_with(served: Callable[..., None], tmp_path: Path) -> None:
    served(guidance=DECAY)
    loaded = load_any("dimr_tiny")
    assert loaded.metadata.guidance == KNOWN
    pipe = pipeline("dimr_tiny", "cpu")
    got = pipe([3, 5], seeds=[4])
    config = pipe.network.config
    shape = (config.in_channels, config.image_size, config.image_size)
    stated = Stated(Denoiser(pipe.network, pipe.process), 3.0, 2.0)
    want = sample(stated, pipe.metadata.default_sampler, shape, [4, 4], Condition(label=torch.tensor([3, 5])))  # type: ignore[arg-type]
    difference = got.pixels.astype(int) - to_uint8(want).permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(difference).max() <= 1
    assert from_plain(Guidance, got.records[0]["guidance"]) == KNOWN
    assert not np.array_equal(got.pixels, pipe([3, 5], seeds=[4], guidance={"decay": None}).pixels)

    plan = default_plan("dimr_tiny", loaded.metadata)
    assert plan.guidance == KNOWN
    guided = pipe.generator.guided(plan.guidance)
    t = torch.tensor(0.25, dtype=torch.float64)
    assert float(guided.weight(t, None)) == pytest.approx(1 + 2 * (1 - math.cos(math.pi * 0.75**2)) / 2)

    options = ["sample", "dimr_tiny", "--classes", "3", "5", "--seeds", "4", "--device", "cpu", "--quiet"]
    assert main([*options, "--dir", str(tmp_path / "a"), "--out", str(tmp_path / "a.png")]) == 0
    samples = np.stack([np.asarray(Image.open(p)) for p in sorted((tmp_path / "a").glob("*.png"))])
    assert {p.tobytes() for p in samples} == {p.tobytes() for p in got.pixels}


def test_verify_says_how_the_weights_sample(served: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    served(guidance=DECAY)
    assert main(["verify", "dimr_tiny.test", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert from_plain(Guidance, report["sampled_with"]["guidance"]) == KNOWN
    assert main(["verify", "dimr_tiny"]) == 0
    line = next(text for text in capsys.readouterr().out.splitlines() if text.startswith("  guidance "))
    assert from_plain(Guidance, json.loads(line.split(maxsplit=1)[1])) == KNOWN


def test_decay_and_interval_on_the_command_line(served: Callable[..., None], tmp_path: Path) -> None:
    served(guidance={"formula": COND, "scale": 2.0})
    pipe = pipeline("dimr_tiny", "cpu")
    options = ["sample", "dimr_tiny", "--classes", "3", "--seeds", "4", "--device", "cpu", "--quiet"]
    for flags, guidance in (
        (["--guidance-decay", "2"], {"decay": {"power": 2.0}}),
        (
            ["--guidance", "5", "--guidance-interval", "0.2", "0.6"],
            {"scale": 5.0, "interval": {"low": 0.2, "high": 0.6}},
        ),
        ([], None),
    ):
        assert main([*options, *flags, "--dir", str(tmp_path / str(flags)), "--out", str(tmp_path / "x.png")]) == 0
        with Image.open(tmp_path / str(flags) / "thing_1_seed4.png") as image:
            want: Any = pipe([3], seeds=[4], guidance=guidance)
            assert np.array_equal(np.asarray(image), want.pixels[0])
            record = json.loads(image.text["diffzoo"])  # type: ignore[attr-defined]
        assert from_plain(Guidance, record["guidance"]) == from_plain(
            Guidance, {"formula": COND, "scale": 2.0, **(guidance or {})}
        )
