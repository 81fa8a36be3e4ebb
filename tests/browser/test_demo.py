"""The demo page in a real browser: sample, stop, edit, compare, copy and run, bad input; nothing leaves the machine."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("default")]
SHIPPED = "simple_uvit_xs_32.emoji"
WAIT = 60_000  # milliseconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def second(folder: Path) -> Path:
    """Another model: the same weights in a file."""
    from diffzoo.zoo.export import export

    return Path(export(SHIPPED, folder / "other.safetensors", dtype="fp16").path)


@pytest.fixture(scope="module")
def url(second: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "diffzoo", "demo", SHIPPED, str(second), "--device", "cpu"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield server.stdout.readline().split()[0]
    finally:
        server.terminate()
        server.wait(10)


@dataclass
class Visit:
    page: "Page"  # type: ignore[name-defined]
    asked: list[str]  # addresses that the browser asked for

    def fill(self, label: str, text: str) -> None:
        field = self.page.get_by_label(label, exact=True).first
        field.fill(text)
        field.blur()

    def upload(self, path: Path) -> None:
        """An image to begin with."""
        self.page.get_by_label("from an image").check()
        hint = self.page.get_by_text("Upload an image")
        hint.wait_for(timeout=WAIT)
        editor = self.page.locator(".block", has=self.page.get_by_text("image; paint what to change"))
        for _ in range(WAIT // 5000):  # an editor that is still loading drops what it is given
            if hint.is_hidden():
                return
            editor.locator("input[type=file]").first.set_input_files(path)
            self.page.wait_for_timeout(5000)
        hint.wait_for(state="hidden", timeout=WAIT)

    def sample(self) -> None:
        self.page.get_by_role("button", name="Sample", exact=True).click()

    def images(self) -> int:
        self.page.get_by_role("button", name="Download images and command").first.wait_for(timeout=WAIT)
        self.page.locator(".grid-container img").last.wait_for(timeout=WAIT)
        return self.page.locator(".grid-container img").count()

    def text(self, label: str, number: int = 0) -> str:
        """What stands in a field of code."""
        block = self.page.locator(".block", has=self.page.get_by_text(label, exact=True)).locator(".cm-content")
        lines = block.nth(number).locator(".cm-line")
        lines.filter(has_text=re.compile(r"\S")).first.wait_for(timeout=WAIT)  # the editor fills after the images
        return "\n".join(lines.all_inner_texts())

    def download(self, folder: Path) -> None:
        """Images, and what their command needs."""
        with self.page.expect_download() as download:
            self.page.get_by_role("button", name="Download images and command").first.click()
        shutil.unpack_archive(download.value.path(), folder, "zip")

    def run(self, folder: Path) -> None:
        """The command that the page shows."""
        words = shlex.split(self.text("as command"))
        subprocess.run([sys.executable, "-m", *words], cwd=folder, check=True, env={**os.environ})


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("chromium-browser")
    assert program, "the tests in a browser need chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: "Browser", url: str) -> Iterator[Visit]:  # type: ignore[name-defined]
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    page.get_by_text("Licence of the weights: MIT").wait_for(timeout=WAIT)
    yield Visit(page, asked)
    page.close()
    elsewhere = [a for a in asked if not a.startswith((url, "data:", "blob:"))]
    assert elsewhere == []


def test_a_visitor_samples_and_the_copied_lines_give_the_same_images(visit: Visit, folder: Path) -> None:
    visit.fill("seeds, such as 0-7 or 3,20", "2,5")
    visit.fill("steps", "6")
    visit.sample()
    assert visit.images() == 2
    visit.download(folder / "page")
    code = visit.text("as Python")
    assert "--seeds 2,5" in visit.text("as command")
    visit.run(folder)
    (folder / "python").mkdir()
    subprocess.run([sys.executable, "-c", code], cwd=folder / "python", check=True)
    names = sorted(p.name for p in (folder / "page").glob("*.png"))
    assert len(names) == 2
    for name in names:
        first, *others = (np.asarray(Image.open(folder / p / name)) for p in ("page", "samples", "python/samples"))
        assert all(np.array_equal(first, other) for other in others)
    visit.page.locator(".grid-container img").nth(1).click()
    visit.page.get_by_text("metadata", exact=True).wait_for()
    assert '"seed": 5' in visit.text("metadata")


def test_stop_stops(visit: Visit) -> None:
    visit.fill("seeds, such as 0-7 or 3,20", "0-31")
    visit.fill("steps", "500")
    visit.sample()
    visit.page.locator(".live img").wait_for(timeout=WAIT)  # x_hat on the way
    visit.page.get_by_role("button", name="Stop").click()
    visit.page.locator(".stopped").wait_for(timeout=WAIT)
    visit.fill("seeds, such as 0-7 or 3,20", "1")
    visit.fill("steps", "2")
    visit.sample()
    assert visit.images() == 1  # the device is free again


def test_two_settings_stand_side_by_side(visit: Visit) -> None:
    visit.fill("seeds, such as 0-7 or 3,20", "0-2")
    visit.fill("steps", "2")
    visit.page.get_by_label("a second setting beside it, same seeds").check()
    visit.fill("steps (second)", "4")
    visit.sample()
    assert visit.images() == 6
    assert ["--steps 2" in visit.text("as command"), "--steps 4" in visit.text("as command", 1)] == [True, True]


def test_another_model_and_an_uploaded_image(visit: Visit, folder: Path, second: Path) -> None:
    Image.new("RGB", (40, 32), (200, 30, 30)).save(folder / "red.png")
    visit.page.get_by_label("model").click()
    visit.page.get_by_role("option", name=str(second)).click()
    visit.upload(folder / "red.png")
    visit.fill("seeds, such as 0-7 or 3,20", "0")
    visit.fill("steps", "4")
    visit.sample()
    assert visit.images() == 1
    command = visit.text("as command")
    assert f"sample {second}" in command
    assert "--init image.png" in command


def test_what_is_painted_is_the_mask_of_the_command(visit: Visit, folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 256, 3), np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    visit.upload(folder / "noise.png")
    canvas = visit.page.locator("canvas").first.bounding_box()
    x, y = (canvas[a] + canvas[side] / 2 for a, side in (("x", "width"), ("y", "height")))
    visit.page.mouse.move(x, y)
    visit.page.mouse.down()
    visit.page.mouse.move(x + 40, y, steps=5)
    visit.page.mouse.up()
    visit.fill("seeds, such as 0-7 or 3,20", "1")
    visit.fill("steps", "2")
    visit.sample()
    assert visit.images() == 1
    visit.download(folder / "painted")
    assert np.array_equal(np.asarray(Image.open(folder / "painted" / "image.png")), noise)
    mask = np.asarray(Image.open(folder / "painted" / "mask.png"))
    assert mask.shape == (200, 256)
    assert set(np.unique(mask)) == {0, 255}
    assert 0.01 < (mask > 0).mean() < 0.3
    visit.run(folder / "painted")
    name = next((folder / "painted" / "samples").iterdir()).name
    ours, theirs = (np.asarray(Image.open(folder / "painted" / path)) for path in (name, f"samples/{name}"))
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("seeds", "steps", "sentence"),
    [
        ("0-100", "2", "you ask for 101 images: this page makes 1 to 64 of this size at a time"),
        ("0", "2.5", "steps: expected a whole number, got '2.5'"),
        ("many", "2", "expected seeds such as 0-7 or 0-15,20, got 'many'"),
    ],
)
def test_bad_input_is_a_sentence_in_the_page(visit: Visit, seeds: str, steps: str, sentence: str) -> None:
    visit.fill("seeds, such as 0-7 or 3,20", seeds)
    visit.fill("steps", steps)
    visit.sample()
    visit.page.get_by_text(sentence).wait_for(timeout=WAIT)


def test_paths_that_a_page_sends_are_not_read(url: str) -> None:
    secret = Path(__file__).resolve()
    for address in (f"{url}gradio_api/file={secret}", f"{url}gradio_api/file=pyproject.toml"):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(address)
        assert error.value.code in (403, 404)
    config = json.load(urllib.request.urlopen(f"{url}config"))
    sample = next(d for d in config["dependencies"] if d["api_name"] == "sample")
    inputs = [c for i in sample["inputs"] for c in config["components"] if c["id"] == i]
    sent = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    given = {"begin": "from an image", "or a mask, white where to change": sent}
    values = [given.get(c["props"].get("label"), c["props"].get("value")) for c in inputs]
    body = json.dumps({"data": values, "fn_index": sample["id"], "session_hash": "reader"}).encode()
    join = urllib.request.Request(f"{url}gradio_api/queue/join", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(join).read()
    events = urllib.request.urlopen(f"{url}gradio_api/queue/data?session_hash=reader", timeout=30).read().decode()
    assert '"success":false' in events
    assert "could not read the image" not in events  # nobody tried
