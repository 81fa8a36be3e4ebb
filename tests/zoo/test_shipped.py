"""The weights that ship with the package: the file that was published, sampled alike, without a connection."""

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffzoo
from diffzoo import pipeline
from diffzoo.cli.main import main
from diffzoo.encoders.text import MINILM
from diffzoo.zoo.manifest import find_pretrained
from diffzoo.zoo.verify import verify

NAME = "simple_uvit_xs_32.emoji"
TEXT = "simple_uvit_t2i_xs_64.emoji"
FILE = Path(diffzoo.__file__).parent / "weights" / f"{NAME}.safetensors"
# of red, green and blue over the images of `test_samples_are_reproducible`, recorded once
MEANS = np.array([[235.5, 223.9, 175.7], [239.0, 231.7, 210.3], [161.6, 126.0, 93.9], [172.2, 129.1, 113.2]])


@dataclass
class Recorded:
    """A text encoder that knows a few captions: their tokens `(n, 384)` as lists."""

    tokens: dict[str, list[list[float]]]
    width: int = 384
    max_tokens: int = 24

    def encode(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        text = torch.zeros(len(captions), self.max_tokens, self.width)
        mask = torch.zeros(len(captions), self.max_tokens, dtype=torch.bool)
        for row, caption in enumerate(captions):
            known = torch.tensor(self.tokens[caption])
            text[row, : len(known)], mask[row, : len(known)] = known, True
        return text, mask

    def null(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.encode([""] * count)

    def fingerprint(self) -> str:
        return "recorded"

    def to(self, device: torch.device | str) -> "Recorded":
        return self


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("weights that ship need no connection"))


def test_the_file_is_small_and_the_one_that_was_published() -> None:
    data = FILE.read_bytes()
    assert len(data) < 10_000_000
    assert find_pretrained(NAME).sha256 == hashlib.sha256(data).hexdigest()
    assert find_pretrained(NAME).size == len(data)


def test_the_fingerprint_verifies(capsys: pytest.CaptureFixture[str]) -> None:
    report = verify(NAME)
    assert report.ok
    assert report.pinned
    assert report.largest_error is not None
    assert report.largest_error < 1e-4
    assert report.parameters == 1_649_132
    assert main(["verify", NAME]) == 0
    assert "verdict      OK: this is the original, and its output is as recorded" in capsys.readouterr().out


def test_samples_are_reproducible() -> None:
    samples = pipeline(NAME, "cpu")(["Food & Drink", "Flags"], seeds=[3, 4])
    torch.manual_seed(7)
    again = pipeline(NAME, "cpu")(["Flags", "Food & Drink"], seeds=[4, 3], batch_size=1)
    for i, j in enumerate([3, 2, 1, 0]):
        assert np.abs(samples[i].astype(int) - again[j].astype(int)).max() <= 1  # other batches round otherwise
    assert samples.pixels.reshape(4, -1, 3).mean(1) == pytest.approx(MEANS, abs=1)


def test_without_a_source_the_command_samples_from_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--seeds", "0", "--steps", "1", "--device", "cpu", "--quiet", "--out", str(tmp_path / "g.png")]
    assert main(["sample", *options]) == 0
    assert "8 images, rows: Activities, Animals & Nature" in capsys.readouterr().out
    with Image.open(tmp_path / "g.png") as grid:
        records = json.loads(grid.text["diffzoo"])  # type: ignore[attr-defined]
    assert {r["weights"]["pretrained"] for r in records} == {NAME}
    assert main(["sample", *options, "--classes", "Smileys"]) == 2
    assert "did you mean 'Smileys & Emotion'?" in capsys.readouterr().err
    assert main(["sample", *options, str(tmp_path / "none.ckpt")]) == 2  # a source may still come last
    assert "none.ckpt" in capsys.readouterr().err


def test_the_text_model_is_small_and_the_one_that_was_published() -> None:
    data = FILE.with_name(f"{TEXT}.safetensors").read_bytes()
    assert len(data) < 8_000_000
    assert find_pretrained(TEXT).sha256 == hashlib.sha256(data).hexdigest()
    report = verify(TEXT)
    assert report.ok
    assert report.largest_error is not None
    assert report.largest_error < 1e-4


def test_captions_have_their_say(tmp_path: Path) -> None:
    """Tokens in place of the encoder's, which another package brings: red, green and blue of the images differ by them.

    The tokens of a caption are its embeddings, recorded once and rounded; see `minilm_captions.json`.
    """
    held = json.loads((Path(__file__).parent / "minilm_captions.json").read_text())
    pipe = pipeline(TEXT, "cpu", text_encoder=Recorded(held))
    samples = pipe(["red heart", "blue square"], seeds=[0, 1], steps=10)
    red, _, blue = samples.pixels.reshape(2, 2, -1, 3).mean((1, 2)).T
    assert red[0] > blue[0] + 20
    assert blue[1] > red[1] + 20


def test_without_its_encoder_the_text_model_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.metadata.distribution

    def missing(name: str) -> importlib.metadata.Distribution:
        if name == MINILM:
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr("importlib.metadata.distribution", missing)
    options = ["--captions", "red heart", "--seeds", "0", "--device", "cpu", "--quiet"]
    assert main(["sample", TEXT, *options, "--out", str(tmp_path / "g.png")]) == 2
    assert 'install it with `pip install "diffzoo[text-demo]"`' in capsys.readouterr().err


def test_the_help_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    assert NAME in capsys.readouterr().out


def test_a_model_that_enlarges_nothing_is_refused_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "diffzoo.generation.generator.sample", lambda *args, **options: pytest.fail("sampled before the refusal")
    )
    options = ["--out", str(tmp_path / "g.png"), "--device", "cpu", "--quiet"]
    assert main(["sample", "--upsample", NAME, *options]) == 2
    assert f"{NAME} does not enlarge images" in capsys.readouterr().err
