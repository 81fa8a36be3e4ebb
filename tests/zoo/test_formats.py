"""The files that people hold: whatever the wrapping, the same tensors come out, and no file runs code."""

import argparse
import copy
import json
import os
import pickle
import subprocess
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
from diffzoo.models import dimr
from diffzoo.models.base import Network
from diffzoo.process import Eps
from diffzoo.record import to_plain
from diffzoo.zoo import save_pretrained
from diffzoo.zoo.formats import find_weights, read_pickle

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
    """A run directory; the averages are the weights plus 1 and plus 2."""
    folder = tmp_path / "runs" / "x"
    (folder / "checkpoints").mkdir(parents=True)
    state = tiny.state_dict()
    trained = {k: v for k, v in state.items() if "patch" not in k}  # a frozen layer has no average
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


def test_an_average_that_is_not_there_names_those_that_are(run: Path) -> None:
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
    """CompVis: averages inside the state dict, their names without dots."""
    squeezed = {"model_ema." + k.replace(".", ""): v + 1 for k, v in state.items()}
    return {**prefixed(state, "model."), **squeezed, "model_ema.decay": torch.tensor(0.99)}


FOREIGN: dict[str, tuple[Callable[[Tensors], Any], bool]] = {  # (layout, whether the average is state + 1)
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
    torch.save({**state, "extra": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="1 of its tensors are not the network's, for example extra"):
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


@pytest.mark.parametrize("content", ['{"weight_map": ["a.safetensors"]}', "[]", "3", "{}", '{"weight_map": {}}'])
def test_what_is_no_index_is_said(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(
        UserError, match=r"is not the index of a sharded checkpoint: expected a mapping under 'weight_map'"
    ):
        load_any(sharded)


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
    with pytest.raises(UserError, match="damaged or incomplete"):
        create_model("dimr_tiny", pretrained=path)


def saved(data: Any, path: Path, **options: Any) -> None:
    torch.save(data, path, **options)


def scripted(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "x")


FOREIGN_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "numpy scalar": (
        lambda p: saved({"a": np.float64(3)}, p),
        "holds an object of type numpy scalar: a file of weights",
    ),
    "numpy array": (lambda p: saved({"a": np.zeros(3)}, p), "holds an object of type numpy.ndarray: "),
    "arguments": (lambda p: saved({"a": argparse.Namespace(x=1)}, p), "holds an object of type argparse.Namespace: "),
    "path": (lambda p: saved({"a": p}, p), r"holds an object of type pathlib.*Path: "),
    "module": (lambda p: saved(nn.Linear(2, 2), p), "holds an object of type torch.nn.modules.linear.Linear: "),
    "process": (lambda p: saved({"a": subprocess.Popen}, p), r"wants to run \w+.Popen while it is opened: "),
    "eval": (lambda p: saved({"a": eval}, p), "wants to run eval while it is opened: "),
    "script": (scripted, "is a TorchScript archive, which holds a program: save the weights alone"),
    "protocol 4": (lambda p: p.write_bytes(pickle.dumps({"a": 1}, protocol=4)), "is a pickle of protocol 4, and only"),
    "protocol 4, zipped": (
        lambda p: saved({"a": "x" * 9}, p, pickle_protocol=4),
        "is a pickle of protocol 4, and only",
    ),
    "pickle": (
        lambda p: p.write_bytes(pickle.dumps({"a": 1}, protocol=2)),
        "is a pickle that torch.save did not write",
    ),
    "text": (lambda p: p.write_text("hello\nworld"), "is a text file that begins 'hello', not a file of weights"),
    "page": (lambda p: p.write_text("<!DOCTYPE html>é" * 99), "is a text file that begins '<!DOCTYPE"),
    "LFS": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "is a pointer of Git LFS"),
    "safetensors": (lambda p: save_file({"a": torch.zeros(1)}, p), "is a safetensors file: give it a name that ends"),
    "ZIP": (zipped, "is a ZIP archive that torch.save did not write"),
}


@pytest.mark.parametrize("kind", FOREIGN_FILES)
def test_foreign_files_have_a_sentence_each(kind: str, tmp_path: Path) -> None:
    """Torch's own warnings would be errors here."""
    write, sentence = FOREIGN_FILES[kind]
    write(tmp_path / "w.pt")
    with pytest.raises(UserError, match=rf"w\.pt {sentence}") as error:
        read_pickle(tmp_path / "w.pt")
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)


def test_an_old_pickle_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"w": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"damaged|wants to run|an object"):  # half a name is another
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
