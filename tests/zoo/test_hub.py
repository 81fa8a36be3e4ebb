"""The real Hub client against a Hub in memory: what goes up comes down, and every refusal has its sentence."""

import copy
import hashlib
import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import yaml
from hub_server import FakeHub
from safetensors import safe_open

from diffzoo import GaussianProcess, create_model, load_any, pull, push_to_hub
from diffzoo.cli.main import main
from diffzoo.errors import UserError
from diffzoo.evaluation import EvalProtocol, Result, SamplePlan
from diffzoo.evaluation.measure import Value
from diffzoo.hub import hub_file, hub_place
from diffzoo.models.base import Network
from diffzoo.process import Eps
from diffzoo.record import to_plain
from diffzoo.sampling import Guidance
from diffzoo.zoo import save_pretrained
from diffzoo.zoo.publish import FORM, push_network

# the client's own use of its HTTP library
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

PROCESS = GaussianProcess(prediction=Eps())
RECIPE = "model:\n  network: dimr_tiny\ndata:\n  class_path: ImageFolder\n  init_args: {folder: cats}\n"


@pytest.fixture
def run(tiny: Network, tmp_path: Path) -> Path:
    """A finished run: a checkpoint with an EMA, a recipe, images, an evaluation."""
    from diffzoo.images import save_image

    folder = tmp_path / "run"
    for name in ("checkpoints", "samples", "eval/demo"):
        (folder / name).mkdir(parents=True)
    average = {k: v + 1 for k, v in tiny.state_dict().items()}
    metadata = {
        "version": "0.1.0",
        "model": {"name": "dimr_tiny", "family": "DiMR", "config": to_plain(tiny.config)},
        "process": to_plain(PROCESS),
        "class_names": [f"cat {i}" for i in range(10)],
        "averages": {"ema_0.999": average},
    }
    state = {f"network.{k}": v for k, v in tiny.state_dict().items()}
    torch.save({"state_dict": state, "diffzoo": metadata, "global_step": 7}, folder / "checkpoints" / "last.ckpt")
    (folder / "config.yaml").write_text(RECIPE)
    save_image(torch.zeros(3, 8, 8, dtype=torch.uint8), folder / "samples" / "step_7.png")
    protocol = EvalProtocol("demo", "diffzoo-demo-8", 140, ("fid",))
    plan = SamplePlan("x", guidance=Guidance(2.0))
    Result(plan, protocol, {"fid": Value(12.3456, 0.25, "jackknife")}).save(folder / "eval" / "demo" / "demo_140.json")
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


# -- up and down


@pytest.mark.parametrize("source", ["", "checkpoints/last.ckpt"])
def test_a_run_goes_up_and_comes_down_exactly(hub: FakeHub, run: Path, tiny: Network, source: str) -> None:
    url = push_to_hub(run / source, "tester/cats", licence="cc-by-4.0")
    assert url.startswith(f"{hub.url}/tester/cats/commit/")
    assert sorted(hub.content("tester/cats")) == sorted(FORM)
    loaded = load_any("hf-hub:tester/cats")
    mine = loaded.network.state_dict()
    assert all(torch.equal(mine[k], v + 1) for k, v in tiny.state_dict().items())  # the EMA
    assert loaded.process == PROCESS
    assert loaded.class_names[4] == "cat 4"
    assert loaded.metadata.licence == "cc-by-4.0"
    assert loaded.provenance.global_step == 7
    assert loaded.provenance.repo == "tester/cats"
    assert torch.equal(create_model("hf-hub:tester/cats").state_dict()[next(iter(mine))], next(iter(mine.values())))


def test_pull_push_pull_is_byte_identical(hub: FakeHub, run: Path, tmp_path: Path) -> None:
    push_to_hub(run, "tester/cats", licence="cc-by-4.0")
    first = pull("tester/cats", tmp_path / "first")
    push_to_hub(first, "tester/copy")
    second = pull("hf-hub:tester/copy", tmp_path / "second")
    assert digests(first) == digests(second)
    assert sorted(digests(first)) == sorted(FORM)
    assert bytes_of(first) == hub.content("tester/cats")


def test_pushing_the_same_again_changes_nothing(hub: FakeHub, run: Path) -> None:
    push_to_hub(run, "tester/cats", licence="mit")
    before = hub.content("tester/cats")
    push_to_hub(run, "tester/cats", licence="mit")
    assert hub.content("tester/cats") == before


def test_metadata_are_in_the_header_too(hub: FakeHub, run: Path, tmp_path: Path) -> None:
    push_to_hub(run, "tester/cats", licence="mit")
    folder = pull("tester/cats", tmp_path / "cats")
    with safe_open(folder / "model.safetensors", "pt") as file:
        header = json.loads(file.metadata()["diffzoo"])
    assert header == json.loads((folder / "config.json").read_text())
    assert {"network", "config", "process", "provenance", "version", "class_names"} <= header.keys()
    assert str(run) not in (folder / "config.json").read_text()  # no paths of the machine it was trained on


def test_the_card_says_what_a_reader_needs(hub: FakeHub, run: Path, tmp_path: Path) -> None:
    push_to_hub(run, "tester/cats", licence="cc-by-4.0")
    card = (pull("tester/cats", tmp_path / "cats") / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "cc-by-4.0"
    assert front["library_name"] == "diffzoo"
    assert front["pipeline_tag"] == "unconditional-image-generation"
    assert 'diffzoo.pipeline("hf-hub:tester/cats")' in card
    assert re.search(r"\| fid \| 12\.346 ± 0\.25 \| demo \(`\w{16}`\), 140 images against diffzoo-demo-8", card)
    assert card.count("| fid |") == 1
    assert "Trained from" not in card  # nothing is known of that
    assert '| DDIM, 50 steps, guidance {"formula": "uncond", "scale": 2.0} |' in card
    assert "class_path: ImageFolder" in card
    assert "![Images sampled from this model](samples.png)" in card
    assert (tmp_path / "cats" / "recipe.yaml").read_text() == RECIPE


def test_results_from_elsewhere_go_onto_the_card(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "eval" / "demo" / "demo_140.json").rename(tmp_path / "elsewhere.json")
    arguments = ["push", str(run), "tester/cats", "--licence", "mit", "--dry-run"]
    digests = []
    for more in ([], ["--evaluation", str(tmp_path / "elsewhere.json")]):
        assert main([*arguments, *more]) == 0
        digests.append(next(line for line in capsys.readouterr().out.splitlines() if "README.md" in line))
    assert digests[0] != digests[1]
    for content in ("{}", "no JSON"):
        (tmp_path / "other.json").write_text(content)
        assert main([*arguments, "--evaluation", str(tmp_path / "other.json")]) == 2
        assert "other.json is no result of `diffzoo eval`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("licence", "front"),
    [
        ("MIT", {"license": "mit"}),
        ("CC BY-NC 4.0", {"license": "cc-by-nc-4.0"}),
        ("other: Our Own 1.0", {"license": "other", "license_name": "Our Own 1.0"}),
    ],
)
def test_licences_are_written_as_the_hub_knows_them(
    hub: FakeHub, run: Path, licence: str, front: dict[str, str]
) -> None:
    push_to_hub(run, "tester/cats", licence=licence)
    card = hub.content("tester/cats")["README.md"].decode()
    written = yaml.safe_load(card.split("---")[1])
    assert {k: v for k, v in written.items() if k.startswith("license")} == front


def test_a_network_in_memory_publishes_itself(hub: FakeHub, tiny: Network) -> None:
    with pytest.raises(UserError, match="needs a licence before it is published"):
        push_network(tiny, "tester/net", process=PROCESS)
    push_network(tiny, "tester/net", licence="mit", process=PROCESS, class_names=tuple("abcdefghij"), private=True)
    assert hub.repos["model", "tester/net"].private
    loaded = load_any("hf-hub:tester/net")
    assert loaded.class_names == tuple("abcdefghij")
    mine = loaded.network.state_dict()
    assert all(torch.equal(mine[k], v) for k, v in tiny.state_dict().items())


# -- options


@pytest.mark.parametrize(
    ("licence", "message"),
    [
        (None, "needs a licence .* there is no default"),
        ("cc-by-4", "did you mean 'cc-by-4.0'"),
        ("Our Own 1.0", '"other: Our Own 1.0"'),
        ("other:", "has a name"),
    ],
)
def test_a_licence_is_one_that_the_hub_knows(hub: FakeHub, run: Path, licence: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        push_to_hub(run, "tester/cats", licence=licence)
    assert not hub.log


def test_a_licence_cannot_be_contradicted(hub: FakeHub, run: Path, tmp_path: Path) -> None:
    push_to_hub(run, "tester/cats", licence="mit")
    folder = pull("tester/cats", tmp_path / "cats")
    with pytest.raises(UserError, match=r"states the licence mit, not cc0-1\.0"):
        push_to_hub(folder, "tester/other", licence="cc0-1.0")


def test_weights_that_are_not_finite_are_not_published(hub: FakeHub, tiny: Network) -> None:
    broken = copy.deepcopy(tiny)
    next(broken.parameters()).data.view(-1)[3] = torch.nan
    with pytest.raises(UserError, match=r"are not finite \(in .*\), so they sample nothing: not published"):
        push_network(broken, "tester/cats", licence="mit")
    assert not hub.log


def test_a_dry_run_shows_exactly_what_would_go_up(hub: FakeHub, run: Path) -> None:
    plan = push_to_hub(run, "tester/cats", licence="mit", private=True, revision="v2", dry_run=True)
    assert not hub.log
    assert f"to {hub.url}/tester/cats (private, v2), licence mit:" in plan
    push_to_hub(run, "tester/cats", licence="mit")
    for name, data in hub.content("tester/cats").items():
        assert f"  {name} " in plan
        assert hashlib.sha256(data).hexdigest() in plan
    assert "EMA ema_0.999, step " in plan.splitlines()[1]
    assert len(plan.splitlines()) == 2 + len(FORM)


def test_a_revision_is_a_branch_and_main_stays(hub: FakeHub, run: Path, tiny: Network) -> None:
    push_to_hub(run, "tester/cats", licence="mit")
    before = hub.content("tester/cats")
    push_to_hub(run, "tester/cats", licence="mit", revision="raw", weights="raw")
    assert hub.content("tester/cats") == before
    raw = load_any("hf-hub:tester/cats@raw").network.state_dict()
    assert all(torch.equal(raw[k], v) for k, v in tiny.state_dict().items())
    push_to_hub(run, "tester/cats", licence="mit", revision="raw")  # the branch exists now


def test_a_pull_does_not_overwrite_other_files(hub: FakeHub, run: Path, tmp_path: Path) -> None:
    push_to_hub(run, "tester/cats", licence="mit")
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(UserError, match="exists and differs: choose an empty folder"):
        pull("tester/cats", tmp_path)
    assert (tmp_path / "config.json").read_text() == "mine"


def test_a_sharded_repository_is_loaded(hub: FakeHub, tiny: Network, tmp_path: Path) -> None:
    hub.add_repo("a/sharded", bytes_of(sharded(tiny, tmp_path / "sharded")))
    mine = load_any("hf-hub:a/sharded").network.state_dict()
    assert all(torch.equal(mine[k], v) for k, v in tiny.state_dict().items())


def test_the_command_line_pushes_and_pulls(
    hub: FakeHub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(run), "tester/cats"]) == 2
    assert "give --licence" in capsys.readouterr().err
    assert main(["push", str(run), "tester/cats", "--licence", "mit", "--dry-run"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert not hub.log
    assert main(["push", str(run), "tester/cats", "--licence", "mit", "--private"]) == 0
    assert "/tester/cats/commit/" in capsys.readouterr().out
    assert main(["pull", "tester/cats", str(tmp_path / "cats")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "cats")
    assert bytes_of(tmp_path / "cats") == hub.content("tester/cats")


def sharded(tiny: Network, folder: Path, **metadata: Any) -> Path:
    save_pretrained(tiny, folder, process=PROCESS, **metadata)
    (folder / "model.safetensors").unlink()
    huggingface_hub.save_torch_state_dict(tiny.state_dict(), folder, max_shard_size="60KB")
    return folder


def test_shards_are_pulled_and_pushed_as_they_are(hub: FakeHub, tiny: Network, tmp_path: Path) -> None:
    folder = sharded(tiny, tmp_path / "sharded", licence="mit")
    (folder / "README.md").write_text("# ours")
    files = bytes_of(folder)
    assert len(files) > 4
    hub.add_repo("a/sharded", {**files, "optimizer.bin": b"x", "model-9-of-9.safetensors": b"stray"})
    first = pull("a/sharded", tmp_path / "first")
    assert bytes_of(first) == files
    (first / "notes.txt").write_text("stray")
    push_to_hub(first, "tester/copy")
    assert hub.content("tester/copy") == files
    assert bytes_of(pull("tester/copy", tmp_path / "second")) == files


def test_what_else_lies_in_the_cache_stays_there(hub: FakeHub, tiny: Network, tmp_path: Path) -> None:
    save_pretrained(tiny, tmp_path / "one", process=PROCESS, licence="mit")
    (tmp_path / "one" / "README.md").write_text("# ours")
    files = bytes_of(tmp_path / "one")
    hub.add_repo("a/one", {**files, "other.safetensors": b"x", "notes.txt": b"y"})
    hub_file("a/one", "other.safetensors", None)  # the snapshot's folder in the cache holds it, too
    assert bytes_of(pull("a/one", tmp_path / "out")) == files
    push_to_hub(pull("a/one"), "tester/copy")
    assert hub.content("tester/copy") == files


def test_shards_without_a_card_are_not_published(hub: FakeHub, tiny: Network, tmp_path: Path) -> None:
    folder = sharded(tiny, tmp_path / "sharded")
    with pytest.raises(UserError, match=r"in shards, which are published as they are: it needs a README\.md"):
        push_to_hub(folder, "tester/copy", licence="mit")
    next(folder.glob("model-*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"needs the shard model-.*, which is missing"):
        push_to_hub(folder, "tester/copy", licence="mit")
    assert not hub.log


@pytest.mark.parametrize(
    "source",
    [
        "hf-hub:a/one",
        "hf_hub:a/one@main",
        "hf://a/one",
        "URL/a/one",
        "URL/a/one/tree/main",
        "URL/a/one/blob/main/model.safetensors",
        "URL/a/one/resolve/main/deep/ema.safetensors?download=true",
        "URL/a/one#usage",
        "hf-hub:a/one/",
        "hf://a/one@main/deep/ema.safetensors",
    ],
)
def test_places_of_the_hub_as_people_paste_them(hub: FakeHub, tiny: Network, tmp_path: Path, source: str) -> None:
    save_pretrained(tiny, tmp_path, process=PROCESS)
    files = bytes_of(tmp_path)
    hub.add_repo("a/one", {**files, "deep/ema.safetensors": files["model.safetensors"]})
    mine = create_model(source.replace("URL", hub.url)).state_dict()
    assert all(torch.equal(mine[k], v) for k, v in tiny.state_dict().items())


@pytest.mark.parametrize(
    "source", ["URL/a/two/tree/main/deep", "URL/a/two/blob/main/deep/model.safetensors", "hf://a/two/deep"]
)
def test_a_folder_of_a_repository_gives_its_own_weights(
    hub: FakeHub, tiny: Network, tmp_path: Path, source: str
) -> None:
    """Other weights lie in the main folder."""
    save_pretrained(tiny, tmp_path, process=PROCESS)
    other = {f"deep/{name}": data for name, data in bytes_of(tmp_path).items()}
    save_pretrained(create_model("dimr_tiny"), tmp_path, process=PROCESS)
    hub.add_repo("a/two", {**bytes_of(tmp_path), **other})
    mine = create_model(source.replace("URL", hub.url)).state_dict()
    assert all(torch.equal(mine[k], v) for k, v in tiny.state_dict().items())
    with pytest.raises(UserError, match="expected a repository, got the place deep/"):
        pull(source.replace("URL", hub.url))


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("https://huggingface.co/a/b/resolve/v1/x/w.pt", ("a/b", "v1", "x/w.pt")),
        ("https://hf.co/a/b", ("a/b", None, None)),
        ("huggingface.co/a/b/raw/refs%2Fpr%2F1/config.json", ("a/b", "refs/pr/1", "config.json")),
        ("hf-hub:a/b@refs/pr/1", ("a/b", "refs/pr/1", None)),
        ("hf://a/b@refs/pr/1/x/w.pt", ("a/b", "refs/pr/1", "x/w.pt")),
        ("https://example.org/a/b", None),
        ("a/b", None),
    ],
)
def test_public_addresses_are_understood_with_another_endpoint_too(source: str, place: Any) -> None:
    assert hub_place(source) == place


def test_a_repository_without_a_config_says_how_its_file_is_given(hub: FakeHub) -> None:
    hub.add_repo("a/other", {"w.pt": b""})
    with pytest.raises(UserError, match=r"a/other has no config\.json, so it is no model of diffzoo: give the address"):
        load_any("hf-hub:a/other")


@pytest.mark.parametrize("repo", ["hf-hub:tester/cats", "URL/tester/cats"])
def test_a_push_takes_the_address_of_a_page(hub: FakeHub, run: Path, repo: str) -> None:
    plan = push_to_hub(run, repo.replace("URL", hub.url), licence="mit", dry_run=True)
    assert plan.startswith(f"to {hub.url}/tester/cats (")


def test_a_folder_with_a_file_that_is_something_else_is_not_published(
    hub: FakeHub, tiny: Network, tmp_path: Path
) -> None:
    save_pretrained(tiny, tmp_path, process=PROCESS, licence="mit")
    (tmp_path / "README.md").write_text("# ours")
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(UserError, match="is a pointer of Git LFS"):
        push_to_hub(tmp_path, "tester/x")
    assert not hub.log


# -- refusals


def test_private_is_never_public(hub: FakeHub, run: Path) -> None:
    push_to_hub(run, "tester/cats", licence="mit", private=True)
    push_to_hub(run, "tester/cats", licence="mit", private=True)  # again, into what is private
    assert hub.repos["model", "tester/cats"].private
    hub.add_repo("tester/open", {"README.md": b"x"})
    with pytest.raises(UserError, match="tester/open exists and is public, so nothing was uploaded"):
        push_to_hub(run, "tester/open", licence="mit", private=True, revision="v2")
    assert hub.content("tester/open") == {"README.md": b"x"}
    assert list(hub.repos["model", "tester/open"].branches) == ["main"]


def test_published_weights_keep_their_licence(
    hub: FakeHub, tiny: Network, publish: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffzoo.zoo.fetch.PACKAGE", tmp_path)
    save_pretrained(tiny, tmp_path)
    source, sha = {"package": "model.safetensors"}, digests(tmp_path)["model.safetensors"]
    publish(source=source, converter="diffzoo", sha256=sha, weights_licence="MIT")
    for name in ("dimr_tiny", "dimr_tiny.test"):
        with pytest.raises(
            UserError, match=r"dimr_tiny\.test states the licence MIT, not cc0-1\.0: leave the licence out"
        ):
            push_to_hub(name, "tester/x", licence="cc0-1.0")
    network = create_model("dimr_tiny.test")
    with pytest.raises(UserError, match=r"states the licence MIT, not cc0-1\.0"):
        push_network(network, "tester/x", licence="cc0-1.0")
    assert not hub.log
    push_to_hub("dimr_tiny", "tester/x", licence="mit")
    push_to_hub("dimr_tiny", "tester/y")
    for repo in ("tester/x", "tester/y"):
        assert json.loads(hub.content(repo)["config.json"])["licence"] == "MIT"
    with pytest.raises(UserError, match=r"hf-hub:tester/x states the licence MIT, not apache-2\.0"):
        push_to_hub("hf-hub:tester/x", "tester/z", licence="apache-2.0")
    assert ("model", "tester/z") not in hub.repos


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dataset": "cats"}, "--dataset"),
        ({"evaluations": ["x.json"]}, "--evaluation"),
        ({"weights": "raw", "dataset": "cats"}, "--dataset and --weights"),
    ],
)
def test_options_that_would_change_nothing_are_refused(
    hub: FakeHub, tiny: Network, tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    save_pretrained(tiny, tmp_path / "a", licence="mit")
    (tmp_path / "a" / "README.md").write_text("# ours")
    with pytest.raises(UserError, match=f"published as it is, with its README.md, so {named} would change nothing"):
        push_to_hub(tmp_path / "a", "tester/x", **options)


def test_a_network_in_memory_has_nothing_to_prefer(tiny: Network) -> None:
    with pytest.raises(UserError, match="a network in memory holds one set"):
        push_network(tiny, "tester/x", licence="mit", weights="raw")


@pytest.mark.parametrize("name", ["a/b/c", "", "a b/c", "cats", "a/b--c"])
def test_names_that_are_no_repository_are_said(hub: FakeHub, run: Path, name: str) -> None:
    for read in (load_any, create_model, pull):
        with pytest.raises(UserError, match=f"expected a repository 'owner/name', got '{name}'"):
            read(f"hf-hub:{name}")
    with pytest.raises(UserError, match="expected a repository 'owner/name'"):
        push_to_hub(run, name, licence="mit")
    assert not hub.log


def ready(hub: FakeHub, **options: Any) -> None:
    hub.add_repo("a/b", {"config.json": b"{}", "w.safetensors": bytes(50_000)}, **options)


def gated(hub: FakeHub, patch: pytest.MonkeyPatch) -> None:
    ready(hub, gated=True)


def gated_without_token(hub: FakeHub, patch: pytest.MonkeyPatch) -> None:
    ready(hub, gated=True)
    patch.delenv("HF_TOKEN")


def missing(hub: FakeHub, patch: pytest.MonkeyPatch) -> None:
    pass


def private(hub: FakeHub, patch: pytest.MonkeyPatch) -> None:
    ready(hub, private=True)


def no_file(hub: FakeHub, patch: pytest.MonkeyPatch) -> None:
    hub.add_repo("a/b", {"config.json": b"{}"})


def limited(hub: FakeHub, patch: pytest.MonkeyPatch) -> None:
    ready(hub)
    hub.fail("resolve", 429)


def broken(hub: FakeHub, patch: pytest.MonkeyPatch) -> None:
    ready(hub)
    hub.fail("resolve", 501)


def unreachable(hub: FakeHub, patch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        patch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")


def offline(hub: FakeHub, patch: pytest.MonkeyPatch) -> None:
    ready(hub)
    patch.setenv("HF_HUB_OFFLINE", "1")


def full_disk(hub: FakeHub, patch: pytest.MonkeyPatch) -> None:
    import errno

    ready(hub)

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr("huggingface_hub.file_download.http_get", full)


@pytest.mark.parametrize(
    ("trouble", "sentence"),
    [
        (gated, r"a/b is gated: accept its conditions at http.*/a/b, then log in"),
        (gated_without_token, r"a/b is gated: accept its conditions"),
        (missing, r"the Hub has no repository a/b, or it is private"),
        (private, r"the Hub has no repository a/b, or it is private"),
        (no_file, r"the Hub repository a/b has no such file: w\.safetensors"),
        (limited, r"answered 429: too many requests from your address"),
        (broken, r"answered 501: the server has a fault of its own"),
        (unreachable, r"http://127.* cannot be reached and w\.safetensors .* is not in the cache"),
        (offline, r"offline \(HF_HUB_OFFLINE=1\) and w\.safetensors .* is not in the cache"),
        (full_disk, r"the disk is full while writing .*hub"),
    ],
)
def test_every_refusal_has_its_sentence(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, trouble: Callable[..., None], sentence: str
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits 23 s before it gives up
    trouble(hub, monkeypatch)
    with pytest.raises(UserError, match=sentence) as error:
        hub_file("a/b", "w.safetensors", None)
    assert "\n" not in str(error.value)


def test_a_missing_revision_is_said(hub: FakeHub) -> None:
    ready(hub)
    with pytest.raises(UserError, match="a/b has no such revision"):
        load_any("hf-hub:a/b@nowhere")


def test_a_granted_user_may_read_a_gated_repository(hub: FakeHub) -> None:
    ready(hub, gated=True)
    hub.granted.add("tester")
    assert hub_file("a/b", "w.safetensors", None)[0].read_bytes() == bytes(50_000)


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (lambda hub, patch: patch.setenv("HF_TOKEN", "hf_wrong"), "answered 401: the token is missing or wrong"),
        (lambda hub, patch: hub.fail("repos/create", 403), "answered 403: your token does not have the right"),
        (lambda hub, patch: hub.fail("repos/create", 429), "answered 429"),
        (lambda hub, patch: hub.fail("/commit/", 500), "answered 500: the server has a fault"),
        (lambda hub, patch: hub.fail("/_lfs/", 403), "answered 403: your token does not have the right"),
        (lambda hub, patch: patch.setenv("HF_HUB_OFFLINE", "1"), r"offline \(HF_HUB_OFFLINE=1\)"),
    ],
)
def test_a_refused_push_has_its_sentence(
    hub: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch, prepare: Callable[..., Any], sentence: str
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    prepare(hub, monkeypatch)
    with pytest.raises(UserError, match=sentence):
        push_to_hub(run, "tester/cats", licence="mit")


def test_what_is_missing_or_damaged_in_a_repository_is_named(hub: FakeHub, tiny: Network, tmp_path: Path) -> None:
    hub.add_repo("a/broken", {"config.json": b"{", "model.safetensors": b"x"})
    for read in (pull, lambda name: load_any(f"hf-hub:{name}")):
        with pytest.raises(UserError, match=r"a/broken/config\.json is not valid JSON"):
            read("a/broken")
    save_pretrained(tiny, tmp_path)
    hub.add_repo("a/bare", {"config.json": (tmp_path / "config.json").read_bytes()})
    with pytest.raises(UserError, match=r"a/bare has no such file: model\.safetensors of"):
        load_any("hf-hub:a/bare")
    with pytest.raises(UserError, match=r"a/bare is not a model of diffzoo: it has no model\.safetensors$"):
        pull("a/bare")


def test_a_repository_that_is_not_ours_is_refused(hub: FakeHub) -> None:
    hub.add_repo("a/other", {"config.json": b'{"architectures": ["Bert"]}', "model.safetensors": b"x"})
    with pytest.raises(UserError, match=r"a/other/config\.json is of a model of transformers"):
        pull("a/other")
    hub.add_repo("a/empty", {"README.md": b"x"})
    with pytest.raises(UserError, match=r"is not a model of diffzoo: it has no config\.json"):
        pull("a/empty")


def test_networks_with_metadata_can_be_copied(hub: FakeHub, tiny: Network, tmp_path: Path) -> None:
    save_pretrained(tiny, tmp_path, process=PROCESS)
    loaded = create_model(f"local-dir:{tmp_path}")
    assert copy.deepcopy(loaded).metadata == loaded.metadata
