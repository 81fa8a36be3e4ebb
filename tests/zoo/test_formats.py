"""The files that people hold: whatever the wrapping, the same tensors come out, and no file runs code."""

import argparse
import collections
import copy
import datetime
import functools
import json
import os
import pickle
import subprocess
import sys
import types
import typing
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import FakeHub
from safetensors.torch import save_file
from torch import Tensor, nn

import diffzoo
from diffzoo import GaussianProcess, create_model, load_any
from diffzoo.errors import UserError
from diffzoo.formats import read_any, read_pickle
from diffzoo.models import dimr
from diffzoo.models.base import Network
from diffzoo.process import Eps
from diffzoo.record import to_plain
from diffzoo.zoo import save_pretrained
from diffzoo.zoo.finding import find_weights

Tensors = dict[str, Tensor]
PROCESS = GaussianProcess(prediction=Eps())


def shifted(state: Tensors, by: float) -> Tensors:
    return {k: v + by for k, v in state.items()}


def prefixed(state: Tensors, prefix: str) -> Tensors:
    return {prefix + k: v for k, v in state.items()}


def equal(network: Network, state: Tensors) -> bool:
    mine = network.state_dict()
    return mine.keys() == state.keys() and all(torch.equal(mine[k], state[k]) for k in state)


# -- our own Lightning checkpoints


def our_checkpoint(network: Network, averages: dict[str, Tensors]) -> dict[str, Any]:
    model = {"name": "dimr_tiny", "family": type(network).__name__, "config": to_plain(network.config)}
    names = [f"class {i}" for i in range(10)]
    return {
        "pytorch-lightning_version": "2.6.0",
        "global_step": 12,
        "state_dict": prefixed(network.state_dict(), "network."),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
        "diffzoo": {
            "version": diffzoo.__version__,
            "model": model,
            "process": to_plain(PROCESS),
            "class_names": names,
            "averages": averages,
        },
    }


@pytest.fixture
def run(tiny: Network, tmp_path: Path) -> Path:
    """A run directory; the EMAs are the weights plus 1 and plus 2."""
    folder = tmp_path / "runs" / "x"
    (folder / "checkpoints").mkdir(parents=True)
    state = tiny.state_dict()
    trained = {k: v for k, v in state.items() if "patch" not in k}  # a frozen layer has no EMA
    averages = {"ema_0.999": shifted(trained, 1), "power_0.050": shifted(trained, 2)}
    torch.save(our_checkpoint(tiny, averages), folder / "checkpoints" / "last.ckpt")
    return folder


@pytest.mark.parametrize("place", ["", "checkpoints/last.ckpt"])
@pytest.mark.parametrize(("prefer", "by"), [("average", 1), ("power_0.050", 2), ("raw", 0)])
def test_a_run_gives_the_weights_that_are_asked_for(
    run: Path, tiny: Network, place: str, prefer: str, by: float
) -> None:
    loaded = load_any(run / place, weights=prefer)
    expected = {k: v if "patch" in k else v + by for k, v in tiny.state_dict().items()}
    assert equal(loaded.network, expected)
    assert loaded.process == PROCESS
    assert loaded.class_names[3] == "class 3"
    assert loaded.provenance.global_step == 12
    assert not loaded.network.training


def test_an_ema_that_is_not_there_names_those_that_are(run: Path) -> None:
    with pytest.raises(UserError, match=r"holds no EMA 'ema_0\.9'; did you mean 'ema_0\.999'"):
        load_any(run, weights="ema_0.9")


def test_a_bare_snapshot_takes_its_metadata_from_the_run(run: Path, tiny: Network) -> None:
    snapshot = run / "averages" / "step_10_power_0.050.safetensors"
    snapshot.parent.mkdir()
    save_file(shifted(tiny.state_dict(), 3), snapshot, {"std": "0.05"})
    loaded = load_any(snapshot)
    assert equal(loaded.network, shifted(tiny.state_dict(), 3))
    assert loaded.process == PROCESS


# -- other people's


def lit_ema(state: Tensors) -> Tensors:
    """CompVis: EMAs inside the state dict, their names without dots."""
    squeezed = {"model_ema." + k.replace(".", ""): v + 1 for k, v in state.items()}
    return {**prefixed(state, "model."), **squeezed, "model_ema.decay": torch.tensor(0.99)}


ONE = torch.tensor(1)
FOREIGN: dict[str, tuple[Callable[[Tensors], Any], bool]] = {  # (layout, whether the EMA is state + 1)
    "bare": (lambda s: s, False),
    "data parallel": (lambda s: prefixed(s, "module."), False),
    "compiled": (lambda s: prefixed(s, "_orig_mod."), False),
    "both, below an attribute": (lambda s: prefixed(s, "module._orig_mod.net."), False),
    "compiled blocks": (lambda s: {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in s.items()}, False),
    "lightning": (lambda s: {"state_dict": {**prefixed(s, "model."), "loss.weight": torch.ones(2)}, "epoch": 3}, False),
    "lightning averaging": (
        lambda s: {"state_dict": prefixed(shifted(s, 1), "net."), "current_model_state": prefixed(s, "net.")},
        True,
    ),
    "model and ema": (lambda s: {"model": s, "ema": shifted(s, 1), "opt": {"state": {}}}, True),
    "timm": (lambda s: {"state_dict": s, "state_dict_ema": prefixed(shifted(s, 1), "module.")}, True),
    "ema_pytorch": (
        lambda s: {**prefixed(s, "online_model."), **prefixed(shifted(s, 1), "ema_model."), "step": torch.tensor(3)},
        True,
    ),
    "lit ema": (lambda s: {"state_dict": lit_ema(s)}, True),
    "JiT": (lambda s: {"model": s, "model_ema1": shifted(s, 1), "model_ema2": shifted(s, 2)}, True),
    "BasicSR": (lambda s: {"params": s, "params_ema": shifted(s, 1)}, True),
    "by decay": (lambda s: {"model": s, "ema_0.9999": shifted(s, 1)}, True),
    "StyleGAN": (lambda s: {"generator": s, "g_ema": shifted(s, 1)}, True),
    "capitals": (lambda s: {"net": s, "netEMA": shifted(s, 1)}, True),
    "AveragedModel": (lambda s: {"model": s, "swa": {**prefixed(shifted(s, 1), "module."), "n_averaged": ONE}}, True),
    "score_sde": (lambda s: {"model": s, "ema": {"decay": 0.99, "shadow_params": list(shifted(s, 1).values())}}, True),
    "a list of EMAs": (lambda s: {"model": s, "emas": [shifted(s, 1), shifted(s, 2)]}, True),
    "by number": (lambda s: {"model": s, "ema": {0.999: shifted(s, 1)}}, True),
    "NeMo": (
        lambda s: {"state_dict": prefixed(s, "net."), "optimizer_states": [{"ema": tuple(shifted(s, 1).values())}]},
        True,
    ),
    "counters below a prefix": (
        lambda s: {**prefixed(s, "net."), **prefixed(shifted(s, 1), "net_ema."), "net_ema.decay": ONE},
        True,
    ),
    "a list of models": (lambda s: {"models": [s]}, False),
    "moments": (lambda s: {"model": s, "exp_avg": shifted(s, 1), "optimizer_state": {"exp_avg": shifted(s, 1)}}, False),
    "an object": (lambda s: {"model": s, "ema": argparse.Namespace(decay=0.9, shadow=shifted(s, 1))}, True),
}


@pytest.mark.parametrize("layout", FOREIGN)
@pytest.mark.parametrize("prefer", ["ema", "raw"])
def test_foreign_layouts_give_the_same_tensors(tiny: Network, tmp_path: Path, layout: str, prefer: str) -> None:
    make, averaged = FOREIGN[layout]
    torch.save(make(tiny.state_dict()), tmp_path / "w.ckpt")
    found, _ = find_weights(read_pickle(tmp_path / "w.ckpt"), tiny.state_dict(), "w.ckpt", prefer)
    by = 1.0 if averaged and prefer == "ema" else 0.0
    expected = shifted(tiny.state_dict(), by)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.filterwarnings("default")
def test_users_of_ema_pytorch_are_told_what_its_decay_means(tiny: Network, tmp_path: Path) -> None:
    from ema_pytorch import EMA

    ema = EMA(tiny)
    ema.update()
    for data, place in ((ema.state_dict(), "ema_model"), ({"state": {"ema": ema.state_dict()}}, "state.ema.ema_model")):
        with pytest.warns(UserWarning, match=r"in w is ema-pytorch's.* every 10th"):
            assert find_weights(data, tiny.state_dict(), "w")[1] == place
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_weights(ema.state_dict(), tiny.state_dict(), "w", "raw")
        find_weights({"model": tiny.state_dict(), "ema_model": tiny.state_dict()}, tiny.state_dict(), "w")


@pytest.mark.parametrize(
    ("make", "weights", "sentence"),
    [
        (lambda s: {"ema": s}, "raw", "w holds no raw weights, only the EMA 'ema'"),
        (lambda s: {"a": s, "b": shifted(s, 1)}, "ema", "holds two complete sets of these weights, 'a' and 'b'"),
        (lambda s: {"model": s, "ema_0.99": s}, "ema_0.9", "holds no EMA 'ema_0.9'; did you mean 'ema_0.99'"),
        (
            lambda s: {"state_dict": prefixed({**s, "classes.weight": torch.ones(2)}, "net.")},
            "ema",
            "1 of its tensors are not the network's, for example net.classes.weight",
        ),
        (
            lambda s: {"model": s, "ema": dict([*shifted(s, 1).items()][1:])},
            "ema",
            "w holds an EMA, 'ema', which is no complete set of these weights: weights='raw' takes the raw ones",
        ),
        (
            lambda s: {f"{k}.lora_A.weight": v for k, v in s.items()},
            "ema",
            r"holds low-rank adapters, for example .*lora_A\.weight: merge them",
        ),
    ],
)
def test_what_cannot_be_told_apart_is_not_chosen(tiny: Network, make: Any, weights: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        find_weights(make(tiny.state_dict()), tiny.state_dict(), "w", weights)


def test_quantised_weights_are_refused(tiny: Network, tmp_path: Path) -> None:
    torch.save({k: (10 * v).to(torch.int8) for k, v in tiny.state_dict().items()}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"should hold real numbers, got torch\.int8: quantised weights are not read"):
        create_model("dimr_tiny", pretrained=tmp_path / "w.pt")


def test_a_set_is_named_by_its_place(tiny: Network) -> None:
    state = tiny.state_dict()
    found, place = find_weights({"a": state, "b": shifted(state, 1)}, state, "w", "b")
    assert place == "raw b"
    assert all(torch.equal(found[k], v + 1) for k, v in state.items())


def test_a_bare_file_takes_the_overrides_it_was_trained_with(tiny: Network, tmp_path: Path) -> None:
    mine = create_model("dimr_tiny", num_classes=3)
    torch.save(mine.state_dict(), tmp_path / "w.pt")
    for policy in ({}, {"classes": "random"}):
        again = create_model("dimr_tiny", pretrained=tmp_path / "w.pt", num_classes=3, **policy)
        assert equal(again, mine.state_dict())
    with pytest.raises(UserError, match="should have shape"):
        create_model("dimr_tiny", pretrained=tmp_path / "w.pt", num_classes=4)


@pytest.mark.parametrize("suffix", [".ckpt", ".pth", ".safetensors"])
def test_a_file_without_metadata_needs_a_name(tiny: Network, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(prefixed(tiny.state_dict(), "module."), path)
    with pytest.raises(UserError, match=r"does not say which network .* create_model\(NAME, pretrained="):
        create_model(str(path))
    assert equal(create_model("dimr_tiny", pretrained=path), tiny.state_dict())
    with pytest.raises(UserError, match="do not say which noise process"):
        create_model("dimr_tiny", pretrained=path).metadata.known_process()


def test_the_original_layout_is_recognised(
    tiny: Network, official: Tensors, publish: Callable[..., None], tmp_path: Path
) -> None:
    publish(source={"url": "http://127.0.0.1:1/w"})
    torch.save(official, tmp_path / "w.pth")
    assert equal(create_model("dimr_tiny", pretrained=tmp_path / "w.pth"), tiny.state_dict())


def test_weights_of_another_network_are_named(tiny: Network, tmp_path: Path) -> None:
    state = tiny.state_dict()
    name = next(iter(state))
    renamed = {("other" if k == name else k): v for k, v in state.items()}
    torch.save(renamed, tmp_path / "w.pth")
    with pytest.raises(UserError, match=f"1 of the network's {len(state)} tensors are not in it, for example {name}"):
        create_model("dimr_tiny", pretrained=tmp_path / "w.pth")
    torch.save({**state, name: state[name][:1]}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=f"{name} should have shape"):
        create_model("dimr_tiny", pretrained=tmp_path / "w.pth")


# -- sharded


@pytest.fixture
def sharded(tiny: Network, tmp_path: Path) -> Path:
    from huggingface_hub import save_torch_state_dict

    folder = tmp_path / "sharded"
    save_pretrained(tiny, folder, process=PROCESS)
    (folder / "model.safetensors").unlink()
    save_torch_state_dict(tiny.state_dict(), folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def test_sharded_safetensors_are_read(sharded: Path, tiny: Network) -> None:
    assert equal(load_any(sharded).network, tiny.state_dict())
    assert equal(load_any(sharded / "model.safetensors.index.json").network, tiny.state_dict())


def test_a_shard_alone_is_named(sharded: Path) -> None:
    with pytest.raises(UserError, match=r"it is one of several shards, which their index"):
        create_model("dimr_tiny", pretrained=min(sharded.glob("model-*.safetensors")))


def test_a_missing_shard_is_named(sharded: Path) -> None:
    first = min(sharded.glob("model-*.safetensors"))
    first.unlink()
    with pytest.raises(UserError, match=f"needs the shard {first.name}, which is missing"):
        load_any(sharded)


@pytest.mark.parametrize("name", ["../x.safetensors", "ABSOLUTE", "model.safetensors.index.json", "w.bin", 3, None])
def test_an_index_names_plain_files_only(sharded: Path, tmp_path: Path, name: Any) -> None:
    """Copies of the shards lie where the bad names point, so that they could be loaded."""
    index = sharded / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    first = min(sharded.glob("model-*.safetensors"))
    for copied in (tmp_path / "x.safetensors", sharded / "w.bin"):
        copied.write_bytes(first.read_bytes())
    name = str(tmp_path / "x.safetensors") if name == "ABSOLUTE" else name
    data["weight_map"] = {k: name if v == first.name else v for k, v in data["weight_map"].items()}
    index.write_text(json.dumps(data))
    with pytest.raises(
        UserError, match=r"index\.json names the shard .*: expected the plain name of a \.safetensors file"
    ):
        load_any(sharded)


def test_shards_that_torch_wrote_are_read(sharded: Path, tiny: Network) -> None:
    index = sharded / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    for name in set(data["weight_map"].values()):
        torch.save(read_any(sharded / name), sharded / name.replace(".safetensors", ".bin"))
    data["weight_map"] = {k: v.replace(".safetensors", ".bin") for k, v in data["weight_map"].items()}
    (sharded / "pytorch_model.bin.index.json").write_text(json.dumps(data))
    mine = create_model("dimr_tiny", pretrained=sharded / "pytorch_model.bin.index.json")
    assert equal(mine, tiny.state_dict())


@pytest.mark.parametrize("content", ['{"weight_map": ["a.safetensors"]}', "[]", "3", "{}", '{"weight_map": {}}'])
def test_what_is_no_index_is_said(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(
        UserError, match=r"is not the index of a sharded checkpoint: expected a mapping under 'weight_map'"
    ):
        load_any(sharded)


@pytest.mark.parametrize(
    ("file", "content", "library"),
    [
        ("model_index.json", {"_class_name": "DiTPipeline", "_diffusers_version": "0.3"}, "diffusers"),
        ("config.json", {"_class_name": "UNet2DModel"}, "diffusers"),
        ("config.json", {"architecture": "vit", "pretrained_cfg": {}}, "timm"),
        ("config.json", {"architectures": ["Bert"]}, "transformers"),
        ("config.json", {"model_type": "bert"}, "transformers"),
    ],
)
def test_a_folder_of_another_library_is_named(tmp_path: Path, file: str, content: Any, library: str) -> None:
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"is of a model of {library}, which diffzoo does not read"):
        load_any(tmp_path)


def test_a_folder_of_other_files_of_weights_names_one(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "0050000.pt").touch()
    with pytest.raises(UserError, match=r"no weights in .* such as .*/checkpoints/0050000\.pt, give one"):
        load_any(tmp_path)


# -- hostile and broken files


class Bomb:
    """Unpickling runs a shell command that makes a file."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.proof}",)


def test_a_malicious_pickle_runs_nothing(tiny: Network, tmp_path: Path) -> None:
    proof, path = tmp_path / "proof", tmp_path / "evil.ckpt"
    torch.save({"state_dict": tiny.state_dict(), "callbacks": Bomb(proof)}, path)
    with pytest.raises(UserError, match=r"wants to run \w+\.system .* it was refused and nothing was run"):
        create_model("dimr_tiny", pretrained=path)
    assert not proof.exists()
    torch.load(path, weights_only=False)  # the bomb is real
    assert proof.exists()


def test_a_malicious_download_runs_nothing(
    hub: FakeHub, publish: Callable[..., None], tmp_path: Path, unpinned: None
) -> None:
    proof = tmp_path / "proof"
    hub.files["w.pth"] = pickle.dumps({"x": Bomb(proof)}, protocol=2)
    publish(source={"url": f"{hub.url}/files/w.pth"})
    with pytest.raises(UserError):
        create_model("dimr_tiny", pretrained=True)
    assert not proof.exists()


@pytest.mark.parametrize("keep", [0.5, 0.0])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_is_said_to_be_damaged(tiny: Network, tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"w{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(tiny.state_dict(), path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(UserError, match="damaged or incomplete" if keep else "is empty"):
        create_model("dimr_tiny", pretrained=path)


def scripted(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "x")


def saved(data: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(data, path)


def text(content: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(content)


FOREIGN_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "process": (saved({"a": subprocess.Popen}), "wants to run subprocess.Popen while it is opened; it was refused"),
    "eval": (saved({"a": eval}), "wants to run eval while it is opened; it was refused"),
    "script": (scripted, "is a TorchScript archive, which holds a program: save the weights alone"),
    "text": (text("hello\nworld"), "is a text file that begins 'hello', not a file of weights"),
    "page": (text("<!DOCTYPE html>é" * 99), "is a web page: download the file itself"),
    "LFS": (text("version https://git-lfs.github.com/spec/v1\n"), "is a pointer of Git LFS, not the file itself"),
    "GGUF": (lambda p: p.write_bytes(b"GGUF\3\0\0\0" * 99), "is a GGUF file"),
    "HDF5": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" * 99), "is an HDF5 file"),
    "Flax": (lambda p: p.write_bytes(b"\x82\xa6params" * 99), r"is damaged or incomplete"),
    "picture": (lambda p: p.write_bytes(b"\xff\xd8\xff\xe0" * 99), r"is damaged or incomplete"),
    "ZIP": (zipped, "is a ZIP archive that torch.save did not write"),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", FOREIGN_FILES)
def test_foreign_files_have_a_sentence_each(kind: str, suffix: str, tmp_path: Path) -> None:
    """Torch's own warnings would be errors here."""
    write, sentence = FOREIGN_FILES[kind]
    path = tmp_path / f"w{suffix}"
    write(path)
    if suffix == ".safetensors" and kind in ("process", "eval"):
        sentence = r"is a PyTorch file: give it a name that ends in \.pt"
    with pytest.raises(UserError, match=rf"w{suffix} {sentence}") as error:
        read_any(path)
    assert "\n" not in str(error.value)


def test_a_safetensors_file_under_another_name_is_said(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"is a safetensors file: give it a name that ends in \.safetensors"):
        read_any(tmp_path / "w.pt")


# -- what else is in training checkpoints


class Settings:
    """Code of the one who trained: it is not there when the file is read."""

    def __init__(self) -> None:
        self.width, self.path = 3, Path("runs") / "x"


WRITERS: dict[str, Callable[[Any, Path], Any]] = {
    "archive": torch.save,
    "before archives": lambda d, p: torch.save(d, p, _use_new_zipfile_serialization=False),
    "protocol 4": lambda d, p: torch.save(d, p, pickle_protocol=4),
    "plain pickle": lambda d, p: p.write_bytes(pickle.dumps(d)),
}


@pytest.mark.parametrize("write", WRITERS)
def test_arguments_and_plain_objects_are_kept_and_no_class_is_loaded(
    write: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    data = {
        "args": argparse.Namespace(lr=1e-4, out=Path("a/b"), sizes=[1, 2]),
        "best": np.float64(3),
        "history": np.zeros(3),
        "when": datetime.datetime(2026, 1, 1),
        "counts": collections.defaultdict(int, {"cat": 2}),
        "settings": Settings(),
        "seen": {1, 2},
        "make": functools.partial(torch.optim.AdamW, lr=1e-4),
        "kinds": (typing.Any, typing.Literal[1], range(3)),  # OmegaConf stores annotations
        "half": torch.ones(2).bfloat16(),
        "scale": nn.Parameter(torch.ones(3)),
        "size": torch.Size([1, 2]),
        "network": net,
    }
    WRITERS[write](data, tmp_path / "w.pt")
    monkeypatch.setattr(Settings, "__setstate__", lambda *args: pytest.fail("the class was loaded"), raising=False)
    found = read_pickle(tmp_path / "w.pt")
    assert found["args"] == {"lr": 1e-4, "out": "a/b", "sizes": [1, 2]}
    assert found["settings"] == {"width": 3, "path": "runs/x"}
    assert found["counts"]["cat"] == 2
    assert isinstance(found["make"], dict)
    assert len(found["kinds"]) == 3
    assert (found["seen"], found["size"]) == ({1, 2}, torch.Size([1, 2]))
    assert torch.equal(found["half"], data["half"])
    assert type(found["scale"]) is Tensor
    wanted = net.state_dict()
    assert list(found["network"]) == list(wanted)  # a whole module is its state dict
    assert all(torch.equal(v, wanted[k]) for k, v in found["network"].items())


def test_no_class_or_function_of_this_process_can_be_filled(tmp_path: Path) -> None:
    class Fill:
        def __reduce__(self) -> Any:
            return collections.OrderedDict, (), (None, {"update": 3})

    evil = pickle.dumps(Fill(), protocol=2).replace(b")R", b"", 1)  # the class itself in place of an object
    assert b"OrderedDict" in evil
    (tmp_path / "w.pt").write_bytes(evil)
    with pytest.raises(UserError, match="wants to run the state of type"):
        read_pickle(tmp_path / "w.pt")


# -- NVIDIA's files: pickles that carry the source code of their classes


def persistent(network: nn.Module, source: str) -> nn.Module:
    """The module such that its pickle names a function that would run `source`, in the form of `torch_utils`."""

    def reduce(self: nn.Module, protocol: Any) -> Any:
        meta = sys.modules["dnnlib.util"].EasyDict(type="class", version=6, module_src=source, class_name="Net")
        meta.state = dict(self.__dict__, _init_kwargs={"img_resolution": 64})
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)

    for module in network.modules():
        module.__class__ = type(module.__class__.__name__, (module.__class__,), {"__reduce_ex__": reduce})
    return network


def test_a_pickle_with_source_code_gives_tensors_and_runs_nothing(
    tiny: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proof = tmp_path / "proof"
    source = f"open({str(proof)!r}, 'w').close()"
    easy = type("EasyDict", (dict,), {"__module__": "dnnlib.util", "__setattr__": dict.__setitem__})

    def run(meta: dict[str, Any]) -> Any:
        exec(meta["module_src"])

    run.__module__, run.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
    run.__name__ = "_reconstruct_persistent_obj"
    with pytest.MonkeyPatch.context() as patch:
        for name, members in (("dnnlib.util", {"EasyDict": easy}), ("torch_utils.persistence", {run.__name__: run})):
            module = types.ModuleType(name)
            vars(module).update(members)
            patch.setitem(sys.modules, name.split(".")[0], types.ModuleType(name.split(".")[0]))
            patch.setitem(sys.modules, name, module)
        network = persistent(copy.deepcopy(tiny), source)
        blob = pickle.dumps({"ema": network, "encoder": None, "dataset_kwargs": {"path": "x"}})
        pickle.loads(blob)  # the source is run by Python's own reader
    assert proof.exists()
    proof.unlink()
    path = tmp_path / "network-snapshot.pkl"
    path.write_bytes(blob)
    data = read_pickle(path)
    assert not proof.exists()
    assert data["dataset_kwargs"] == {"path": "x"}
    assert equal(create_model("dimr_tiny", pretrained=path), tiny.state_dict())
    _, place = find_weights(data, tiny.state_dict(), "w")
    assert place == "ema"


def test_an_old_pickle_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"w": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"damaged|wants to run|an object|is empty"):  # half a name is another
            read_pickle(path)
    for at in range(0, len(data), 3):  # and with a byte that is another
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        with suppress(UserError):
            read_pickle(path)


def test_old_pickles_that_cannot_be_mapped_are_read(tiny: Network, tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save(tiny.state_dict(), path, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    assert equal(create_model("dimr_tiny", pretrained=path), tiny.state_dict())


def test_a_training_module_of_lightning_round_trips(tiny: Network, tmp_path: Path) -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = copy.deepcopy(tiny)
            self.teacher = nn.Linear(3, 3)

    torch.save({"state_dict": Module().state_dict()}, tmp_path / "w.ckpt")
    assert equal(create_model("dimr_tiny", pretrained=tmp_path / "w.ckpt"), tiny.state_dict())
    assert create_model("dimr_tiny", pretrained=tmp_path / "w.ckpt").config == dimr.TINY
