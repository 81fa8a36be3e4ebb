"""The report of a run: what is in it, that it is whole in itself, and that a run being written is no obstacle."""

from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from diffzoo.cli.main import main
from diffzoo.report import IMAGE_BYTES, read_run

HEADER = "step,train/loss_logsnr_min_-5,train/loss_logsnr_-5_max,train/loss,val/loss,speed/images_seen\n"


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "my_run"
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed_everything: 3\nmodel: {network: tiny, network_args: {num_classes: 2}}\n")
    rows = [f"{step},{2 / step},{1 / step},{1.5 / step},,{8 * step}\n" for step in (10, 20, 30)]
    (folder / "metrics.csv").write_text(HEADER + "".join(rows) + "30,,,,0.04,\n40,0.01,0.0")  # cut by a kill
    for name in ("step_00000010", "step_00000020", "final"):
        Image.effect_noise((64, 64), 50).save(folder / "samples" / f"{name}.png")
    return folder


def _read(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def test_a_row_that_is_being_written_is_left_out(run: Path) -> None:
    columns = read_run(run).columns
    assert [step for step, _ in columns["train/loss"]] == [10, 20, 30]
    assert columns["val/loss"] == [(30, 0.04)]


def test_the_page_is_whole_in_itself(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    page = _read(run / "report.html")
    sources = [attributes.get("src") for tag, attributes in page.tags if tag in ("img", "script", "link")]
    assert len([s for s in sources if s and s.startswith("data:image/png")]) == 3
    assert not [s for s in sources if s and not s.startswith("data:")]
    shown = [attributes["title"] for tag, attributes in page.tags if tag == "img" and "hidden" not in attributes]
    assert shown == ["final"]  # the last one first seen
    assert [tag for tag, _ in page.tags].count("svg") == 2  # loss, and loss by noise level
    assert "0.04" in page.text
    assert (run / "report.html").stat().st_size < 6_000_000


def test_two_runs_show_what_differs_alone(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text((run / "config.yaml").read_text().replace("num_classes: 2", "num_classes: 5"))
    (other / "metrics.csv").write_text(HEADER + "10,1,1,1,,80\n")
    assert main(["report", str(run), str(other), "--out", str(tmp_path / "both.html")]) == 0
    text = _read(tmp_path / "both.html").text
    difference = text[text.index("What differs:") : text.index("All settings")]
    assert "num_classes" in difference
    assert "seed_everything" not in difference


def test_many_grids_stay_below_the_limit(run: Path) -> None:
    for step in range(40, 100):
        Image.effect_noise((640, 640), 50).save(run / "samples" / f"step_{step:08}.png")
    assert sum(p.stat().st_size for p in (run / "samples").iterdir()) > 2 * IMAGE_BYTES
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").stat().st_size < 6_000_000
    assert 'title="final"' in (run / "report.html").read_text()


def test_one_large_grid_stays_below_the_limit(run: Path) -> None:
    Image.effect_noise((3000, 3000), 50).save(run / "samples" / "final.png")
    assert (run / "samples" / "final.png").stat().st_size > IMAGE_BYTES
    assert main(["report", str(run)]) == 0
    page = _read(run / "report.html")
    assert [a["title"] for tag, a in page.tags if tag == "img" and "webp" in str(a["src"])[:20]] == ["final"]
    assert (run / "report.html").stat().st_size < 6_000_000


@pytest.mark.parametrize(
    ("missing", "sentence"), [("config.yaml", "not the directory of a run"), ("metrics.csv", "logged nothing yet")]
)
def test_what_is_no_run_is_one_sentence(
    run: Path, missing: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / missing).unlink()
    assert main(["report", str(run)]) == 2
    assert sentence in capsys.readouterr().err


def test_starts_are_marked_and_their_environments_stand_side_by_side(run: Path) -> None:
    lines = [
        '{"step": 0, "time": "then", "torch": "2.6"}',
        '{"step": 20, "time": "later", "torch": "2.7"}',
        '{"step": 3',
    ]
    (run / "starts.jsonl").write_text("\n".join(lines))
    assert read_run(run).resumed == [20]
    assert main(["report", str(run)]) == 0
    text = _read(run / "report.html").text
    assert "step 20, later" in text
    assert "2.62.7" in text.replace("\n", "")
