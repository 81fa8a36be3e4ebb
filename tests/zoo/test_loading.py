"""A model by name: converted once, mapped ever after, right to the bit, whoever loads it and how often."""

import io
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import FakeHub
from torch import Tensor, nn

from diffzoo import Condition, create_model, load_any
from diffzoo.cache import cache_dir
from diffzoo.errors import UserError
from diffzoo.models import dimr
from diffzoo.models.base import Config, Level, Network
from diffzoo.models.registry import list_models
from diffzoo.sampling import Guidance
from diffzoo.zoo import save_pretrained
from diffzoo.zoo.building import assign, build_meta
from diffzoo.zoo.metadata import Metadata
from diffzoo.zoo.saving import save_weights


def same(a: Network, b: Network) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.fixture
def published(hub: FakeHub, official: dict[str, Tensor], publish: Callable[..., None], unpinned: None) -> FakeHub:
    """`dimr_tiny` on the Hub, in the original layout, without a pinned revision."""
    buffer = io.BytesIO()
    torch.save(official, buffer)
    hub.add_repo("authors/model", {"w.pth": buffer.getvalue()})
    publish(source={"repo": "authors/model", "revision": None, "file": "w.pth"})
    return hub


# -- names


@pytest.mark.parametrize("name", ["dimr_tiny", "dimr_tiny.test"])
def test_a_name_gives_the_original_weights(published: FakeHub, tiny: Network, name: str) -> None:
    model = create_model(name, pretrained=True)
    assert same(model, tiny)
    z, t, cond = torch.randn(2, 4, 16, 16), torch.tensor([-1.0, 2.0]), Condition(label=torch.tensor([3, 10]))
    assert torch.equal(model(z, t, cond), tiny(z, t, cond))
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())


def test_a_tag_alone_means_its_weights(published: FakeHub, tiny: Network) -> None:
    assert same(create_model("dimr_tiny.test"), tiny)


def test_pretrained_false_means_random_weights(published: FakeHub, tiny: Network, tmp_path: Path) -> None:
    """Of the published network, as in timm; nothing is fetched."""
    network = create_model("dimr_tiny.test", pretrained=False)
    assert network.config == tiny.config
    assert not same(network, tiny)
    assert not published.log
    assert create_model("dimr_tiny.test", pretrained=False, num_classes=3).config.num_classes == 3
    with pytest.raises(UserError, match="pretrained=False needs a registered name"):
        create_model(str(tmp_path), pretrained=False)
    with pytest.raises(UserError, match="no weights tagged 'tset'"):
        create_model("dimr_tiny.tset", pretrained=False)


def test_a_name_alone_means_random_weights(published: FakeHub, tiny: Network) -> None:
    assert not same(create_model("dimr_tiny"), tiny)
    assert not published.log


def test_metadata_come_with_the_weights(published: FakeHub) -> None:
    loaded = load_any("dimr_tiny")
    commit = published.repos["model", "authors/model"].branches["main"]
    assert loaded.provenance.revision == commit
    assert loaded.provenance.pretrained == "dimr_tiny.test"
    assert loaded.metadata.licence == "research only"
    assert loaded.class_names[:2] == ("cat", "dog, hound")
    assert loaded.metadata.guidance == Guidance(0.4, "cond")
    assert loaded.metadata.default_sampler.steps == 6


def test_a_recorded_revision_is_used_ever_after(published: FakeHub, official: dict[str, Tensor], tiny: Network) -> None:
    create_model("dimr_tiny", pretrained=True)
    first = published.repos["model", "authors/model"].branches["main"]
    published.add_repo("authors/model", {"w.pth": b"another file"})
    for path in (cache_dir() / "dimr_tiny.test").glob("*.safetensors"):
        path.unlink()
    assert same(create_model("dimr_tiny", pretrained=True), tiny)
    assert load_any("dimr_tiny").provenance.revision == first


def test_the_second_load_asks_nobody_and_opens_no_pickle(published: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    create_model("dimr_tiny", pretrained=True)
    published.log.clear()
    monkeypatch.setattr("torch.load", lambda *args, **options: pytest.fail("opened the original again"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    create_model("dimr_tiny", pretrained=True)
    assert not published.log


def test_offline_and_cold_says_what_to_fetch(published: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"offline .* dimr_tiny\.test \(w\.pth of authors/model\) is not in the cache"):
        create_model("dimr_tiny", pretrained=True)


def test_training_in_place_leaves_the_cache_as_it_is(published: FakeHub, tiny: Network) -> None:
    model = create_model("dimr_tiny", pretrained=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert same(create_model("dimr_tiny", pretrained=True), tiny)


def test_a_registered_name_without_weights_says_so(tiny: Network) -> None:
    with pytest.raises(UserError, match="no published weights for 'dimr_tiny'"):
        create_model("dimr_tiny", pretrained=True)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("dimr_xl_265", "did you mean 'dimr_xl_256'"),
        ("runs/none/last.ckpt", "there is no file or folder"),
        ("local-dir:nowhere", "there is no file or folder nowhere"),
        ("someone/model", "a repository of the Hub is written hf-hub:someone/model"),
    ],
)
def test_a_source_that_is_nothing_is_named(source: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        create_model(source)


def test_an_empty_folder_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected model\.safetensors with config\.json, or a run"):
        create_model(f"local-dir:{tmp_path}")


def test_two_processes_at_once_do_not_disturb_each_other(published: FakeHub, tiny: Network, home: Path) -> None:
    published.slow("_lfs", seconds=0.05)
    context = multiprocessing.get_context("fork")
    outcome = context.Queue()

    def load() -> None:
        outcome.put(same(create_model("dimr_tiny", pretrained=True), tiny))

    processes = [context.Process(target=load, daemon=True) for _ in range(3)]
    for process in processes:
        process.start()
    assert [outcome.get(timeout=60) for _ in processes] == [True, True, True]
    for process in processes:
        process.join()
    assert len([r for r in published.requests("/_lfs/") if r[0] == "GET"]) == 1  # the others waited
    left = [p.name for p in (home / "diffzoo" / "dimr_tiny.test").iterdir()]
    assert {n.rsplit(".", 1)[-1] for n in left} == {"json", "lock", "safetensors"}


def test_a_kill_while_converting_leaves_nothing_half_done(published: FakeHub, tiny: Network, home: Path) -> None:
    context = multiprocessing.get_context("fork")

    def die(*args: Any, **options: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        os._exit(9)

    def load() -> None:
        import safetensors.torch

        safetensors.torch.save_file = die
        create_model("dimr_tiny", pretrained=True)

    process = context.Process(target=load, daemon=True)
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert same(create_model("dimr_tiny", pretrained=True), tiny)


# -- the meta device


@pytest.mark.parametrize("name", [n for n in list_models() if n.endswith(("_64", "_32", "_128"))][:12])
def test_building_on_meta_gives_the_same_shapes_and_no_storage(name: str) -> None:
    from diffzoo.models.registry import entry

    found = entry(name)
    network = build_meta(found.network, found.config)
    assert all(p.is_meta for p in network.parameters())
    assert not any(b.is_meta for b in network.buffers())


class Buffered(Network):
    """A network with a table that is not saved and an initialisation of its own."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.layer = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("table", torch.arange(5.0), persistent=False)
        self.register_buffer("count", torch.zeros(1))
        nn.init.trunc_normal_(self.layer.weight, std=0.02)


def test_buffers_that_are_not_saved_keep_their_values() -> None:
    trained = Buffered(Config())
    with torch.no_grad():
        trained.count.fill_(7)
    network = assign(build_meta(Buffered, Config()), trained.state_dict(), "x")
    assert isinstance(network, Buffered)
    assert torch.equal(network.table, torch.arange(5.0))
    assert float(network.count) == 7
    assert same(network, trained)


def test_half_precision_files_become_the_networks_own_type() -> None:
    trained = Buffered(Config())
    half = {k: v.half() for k, v in trained.state_dict().items()}
    network = assign(build_meta(Buffered, Config()), half, "x")
    assert network.layer.weight.dtype == torch.float32  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.pop("scale"), "1 missing, for example scale"),
        (lambda s: s.update(other=torch.ones(1)), "1 unknown, for example other"),
        (lambda s: s.update(scale=torch.ones(2)), r"scale should have shape \(3,\), got \(2,\)"),
    ],
)
def test_loading_is_strict(change: Callable[[dict[str, Tensor]], Any], sentence: str) -> None:
    state = dict(Buffered(Config()).state_dict())
    change(state)
    with pytest.raises(UserError, match=sentence):
        assign(build_meta(Buffered, Config()), state, "x")


def test_other_threads_build_real_networks_meanwhile() -> None:
    import threading

    built: list[Network] = []

    class Slow(Buffered):
        def __init__(self, config: Config):
            super().__init__(config)
            thread = threading.Thread(target=lambda: built.append(Buffered(config)))
            thread.start()
            thread.join()

    assert all(p.is_meta for p in build_meta(Slow, Config()).parameters())
    assert not any(p.is_meta for p in built[0].parameters())
    assert not any(p.is_meta for p in Buffered(Config()).parameters())


# -- overrides


@pytest.mark.parametrize("policy", ["random", "mean", "copy"])
def test_class_tables_follow_their_policy(published: FakeHub, tiny: Network, policy: Any) -> None:
    names = ["dog, hound", "newt", "cat"]
    model = create_model("dimr_tiny", pretrained=True, num_classes=3, classes=policy, class_names=names)
    old, new = tiny.state_dict(), model.state_dict()
    tables = [k for k in new if new[k].shape != old[k].shape]
    assert len(tables) == 1
    before, after = old[tables[0]], new[tables[0]]
    assert after.shape == (4, before.shape[1])
    assert torch.equal(after[3], before[10])  # the null class stays
    mean = before[:10].mean(0)
    expected = {"mean": [mean, mean, mean], "copy": [before[1], mean, before[0]]}
    if policy == "random":
        assert not any(torch.allclose(row, mean) for row in after[:3])
        assert len({float(row[0]) for row in after[:3]}) == 3
    else:
        assert torch.equal(after[:3], torch.stack(expected[policy]))
    assert all(torch.equal(new[k], old[k]) for k in new if k not in tables)
    assert model.metadata.class_names == tuple(names)
    assert model.config.num_classes == 3
    model(torch.randn(1, 4, 16, 16), torch.zeros(1), Condition(label=torch.tensor([2])))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"norm": "td_ln"}, "norm changes the network that the weights in dimr_tiny.test belong to"),
        ({"num_clases": 3}, "did you mean 'num_classes'"),
        ({"image_size": 8, "classes": "mode"}, "expected classes to be one of random, mean, copy"),
        ({"num_classes": 3}, "should become with classes='random', 'mean' or 'copy'"),
        ({"num_classes": 3, "classes": "copy"}, "3 class_names of the new ones, got 10 and 0"),
        ({"pretrained": False, "classes": "mean"}, "pass pretrained=True too"),
    ],
)
def test_overrides_that_do_not_fit_are_refused(published: FakeHub, overrides: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        create_model("dimr_tiny", **{"pretrained": True, **overrides})


def test_dropout_may_change_in_pretrained_weights(tmp_path: Path) -> None:
    from diffzoo.models import adm

    levels = (Level(16, 64, 1), Level(8, 64, 1))
    network = adm.ADMUNet(adm.ADMConfig(image_size=16, levels=levels))
    save_pretrained(network, tmp_path)
    model = create_model(f"local-dir:{tmp_path}", dropout=0.3)
    assert [level.dropout for level in model.config.levels] == [0.3, 0.3]
    assert same(model, network)
    with pytest.raises(UserError, match="depth_at changes the network"):
        create_model(f"local-dir:{tmp_path}", depth_at={8: 2})


# -- folders


def test_save_and_load_are_exact_and_the_bytes_repeat(tiny: Network, tmp_path: Path) -> None:
    from diffzoo import GaussianProcess

    for name in "abcdefgh":  # safetensors writes several header fields in random order
        save_pretrained(tiny, tmp_path / name, process=GaussianProcess(), class_names=("x",) * 10, licence="mit")
    for file in ("model.safetensors", "config.json"):
        assert len({(tmp_path / name / file).read_bytes() for name in "abcdefgh"}) == 1
    for source in (tmp_path / "a", f"local-dir:{tmp_path / 'a'}", tmp_path / "a" / "model.safetensors"):
        loaded = load_any(source)
        assert same(loaded.network, tiny)
        assert loaded.process == GaussianProcess()
        assert loaded.network.config == dimr.TINY
        assert loaded.metadata.licence == "mit"


@pytest.mark.parametrize(
    ("number", "place", "sentence"),
    [
        (
            28,
            "w",
            r"the disk is full while writing .*/w/model\.safetensors \(.* free\): make room, or choose another disk",
        ),
        (122, "home/diffzoo", "the disk is full while writing .*: make room, or point HF_HOME to another disk"),
        (13, "w", r"cannot write .*/w/model\.safetensors: choose a folder you may write to"),
        (30, "home/diffzoo", "cannot write .*: point HF_HOME to a folder you may write to"),
    ],
)
def test_a_disk_that_takes_nothing_is_said(
    tiny: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, place: str, sentence: str
) -> None:
    from safetensors import SafetensorError

    def fail(*args: Any) -> None:
        raise SafetensorError(f"Error while serializing: I/O error: no (os error {number})")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(UserError, match=f"^{sentence}$"):
        save_pretrained(tiny, tmp_path / place)
    assert not list((tmp_path / place).iterdir())


def test_what_safetensors_says_of_the_system_is_understood(tmp_path: Path) -> None:
    """A real refusal, by a limit on the size of files; nothing is left behind."""
    sentence = re.escape(f"cannot write {tmp_path}/w.safetensors: a file this large is not allowed here")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match=sentence):
            save_weights({"a": torch.zeros(3000)}, Metadata(dimr.DiMR, dimr.TINY), tmp_path / "w.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_the_header_alone_is_enough(tiny: Network, tmp_path: Path) -> None:
    from diffzoo import GaussianProcess

    save_pretrained(tiny, tmp_path, process=GaussianProcess())
    (tmp_path / "config.json").unlink()
    assert load_any(tmp_path / "model.safetensors").process == GaussianProcess()


def test_a_family_that_is_not_installed_is_named(tiny: Network, tmp_path: Path) -> None:
    save_pretrained(tiny, tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"DiMR", b"DiMX"))
    with pytest.raises(UserError, match=r"network: expected a class of Network, got .*DiMX'; did you mean 'DiMR'"):
        load_any(tmp_path)


def test_loading_imports_neither_lightning_nor_the_hub_client(tiny: Network, tmp_path: Path) -> None:
    save_pretrained(tiny, tmp_path)
    script = f"""
        import sys, diffzoo
        diffzoo.create_model("local-dir:{tmp_path}")
        print([m for m in ("lightning", "datasets", "transformers", "huggingface_hub", "timm") if m in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
