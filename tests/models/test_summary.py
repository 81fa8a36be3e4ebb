"""Models in numbers, and the two verbs that print them."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from diffzoo import create_model, get_pretrained_cfg, is_model, list_models, register_model, save_pretrained
from diffzoo.cli.main import main
from diffzoo.errors import UserError
from diffzoo.models import Network, build, entry
from diffzoo.models.simple_unet import TINY, SimpleUNet, SimpleUNetConfig
from diffzoo.models.summary import Summary, describe, multiply_adds, zoo_table
from diffzoo.recipe.parse import parse_overrides
from diffzoo.zoo.manifest import list_pretrained

SMALL = "simple_uvit_xs_32"


def test_multiply_adds_counted_by_hand() -> None:
    """A U-Net of one level without attention: four 3x3 convolutions per block and position, and linear layers."""
    level = TINY.levels[0]
    config = SimpleUNetConfig(image_size=16, emb_channels=16, levels=(level,))
    with torch.device("meta"):
        network = SimpleUNet(config)
    blocks, c, positions, e = 1 + 2 + 2, 8, 16 * 16, 16  # down, up, middle
    by_hand = blocks * (2 * 9 * c * c * positions + e * 2 * c) + 2 * 9 * 3 * c * positions + 2 * e * e
    assert multiply_adds(network) == by_hand


def test_describe_gives_the_metadata() -> None:
    s = describe("simple_unet_s_32", num_classes=10, dropout=0.2, dropout_from_resolution=8, depth_at={16: 5})
    assert (s.name, s.family, s.image_size, s.channels, s.classes) == ("simple_unet_s_32", "SimpleUNet", 32, 3, 10)
    assert [row["resolution"] for row in s.levels] == [32, 16, 8]
    assert [row["depth"] for row in s.levels] == [2, 5, 2]
    assert [row["dropout"] for row in s.levels] == [0.0, 0.0, 0.2]
    assert s.parameters > describe("simple_unet_s_32").parameters
    json.dumps(s.to_dict())


def test_text_is_for_people() -> None:
    text = str(describe("simple_uvit_t2i_256"))
    assert "captions of width 4096" in text
    assert "parameters     2.937 G" in text
    assert "not published" in text
    assert text.splitlines()[-1].split() == ["16", "2048", "36", "yes", "4", "0.2"]


def test_family_with_its_own_rows_or_none() -> None:
    from diffzoo.models.base import Config
    from diffzoo.models.summary import _levels

    @dataclass(frozen=True)
    class Rows(Config):
        def summary_rows(self) -> list[dict[str, int]]:
            return [{"patch": 2}]

    assert _levels(Rows()) == [{"patch": 2}]
    assert _levels(Config()) == []


def test_every_family_can_be_described() -> None:
    for name in ("adm_64_to_256", "uvit_bao_t2i_s_256", "dimr_m_64"):
        summary = describe(name)
        assert isinstance(summary, Summary)
        assert summary.multiply_adds > summary.parameters > 0


def test_zoo_table_is_the_summaries() -> None:
    lines = zoo_table("simple_unet_s_*").splitlines()
    assert lines[0] == "| model | input | parameters | multiply-adds |"
    assert lines[2].startswith("| `simple_unet_s_32` | 3×32² | 20.76 M | ")
    assert len(lines) == 2 + 2


# -- command line


def test_list_prints_what_the_registry_has(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list_models()
    assert main(["list", "simpler_*", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert list(shown) == list_models("simpler_*")
    assert shown["simpler_uvit_64"] == {"input": [3, 64, 64], "classes": 1000, "weights": []}
    assert main(["list", "*emoji*", "adm_6*"]) == 0
    assert "simple_uvit_xs_32      3 x 32 x 32; weights: emoji\n" in (shown := capsys.readouterr().out)
    assert "adm_64" in shown
    assert main(["list", "--pretrained", "dit_xl*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "family", "px", "space", "FID", "licence"]
    assert lines[1].split()[:5] == ["dit_xl_256.in1k", "DiT", "256", "latent", "2.27"]
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["list", "--pretrained"]) == 0
    assert {len(line) <= 80 for line in capsys.readouterr().out.splitlines()} == {True}
    assert main(["list", "--kind", "classifier"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list_models(kind="classifier")


def test_list_of_nothing_is_an_error_that_helps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "simple_uvit_265"]) == 2
    assert "did you mean 'simple_uvit_256'" in capsys.readouterr().err


def test_describe_prints_text_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", SMALL, "num_classes=10", "depth_at={8: 2}", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [w["name"] for w in shown.pop("weights")] == list_pretrained(SMALL)
    assert shown == describe(SMALL, num_classes=10, depth_at={8: 2}).to_dict()
    assert main(["describe", SMALL]) == 0
    text, _, weights = capsys.readouterr().out.partition("\n\nweights ")
    assert text + "\n" == f"{describe(SMALL)}\n"
    assert weights.startswith(f"{SMALL}.emoji: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([SMALL, "num_clases=3"], "did you mean 'num_classes'"),
        ([SMALL, "depth_at={7: 3}"], r"no level of 7 px; this network has \[16, 8\]"),
        ([SMALL, "image_size=31"], "does not divide by 2"),
        ([SMALL, "input_transform=dtw-1"], "expected 'none', 'patch-p'"),
        (["simple_uvit_xs_23"], "did you mean 'simple_uvit_xs_32'"),
        ([SMALL, "depth_at"], "expected key=value"),
        ([SMALL, "depth_at={8: "], "cannot read the value"),
    ],
)
def test_bad_input_is_a_sentence(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=message):
        describe(words[0], **parse_overrides(words[1:]))
    assert main(["describe", *words]) == 2
    assert capsys.readouterr().err.startswith("diffzoo: ")


def test_a_file_is_described_with_its_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pretrained(build(SMALL, num_classes=2), tmp_path, class_names=("cat", "dog"), licence="mit")
    assert main(["describe", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "3 x 32 x 32, 2 classes" in shown
    assert "0 cat, 1 dog" in shown


def test_names_as_timm_has_them(own_registry: None) -> None:
    @register_model
    def tiny_of_ones_own_32() -> Network:
        """A network of one's own."""
        return build(SMALL, num_classes=3)

    assert is_model("tiny_of_ones_own_32")
    assert entry("tiny_of_ones_own_32").note == "A network of one's own."
    assert create_model("tiny_of_ones_own_32", dropout=0.1).config.num_classes == 3
    with pytest.raises(UserError, match="already registered"):
        register_model(tiny_of_ones_own_32)
    assert is_model("simple_uvit_xs_32.emoji")
    assert not is_model("tiny_of_ones_own_33")
    both = list_models(["*xs_32*", "adm_64*"], pretrained=True, exclude_filters="*_to_*")
    assert both == ["adm_64.in1k", "simple_uvit_xs_32.emoji"]
    assert list_pretrained("*xs_32*") == ["simple_uvit_xs_32.emoji"]
    assert get_pretrained_cfg("adm_64").name == "adm_64.in1k"
    for theirs, ours in (("in_chans", "in_channels"), ("img_size", "image_size"), ("drop_rate", "dropout")):
        with pytest.raises(UserError, match=f"here it is called '{ours}'"):
            create_model(SMALL, **{theirs: 1})


def test_weights_are_described_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "simple_uvit_xs_32.emoji", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    network = create_model("simple_uvit_xs_32.emoji", pretrained=True)
    assert (shown["classes"], shown["parameters"]) == (network.config.num_classes, network.num_parameters())
