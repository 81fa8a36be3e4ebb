"""Hashes that were recorded compare for ever; a file of tensors takes views and shared memory."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffzoo.errors import UserError
from diffzoo.tensors import ADAPTER_BASE, AUTOENCODER, STATE, TEXT_ENCODER, HashForm, cast, state_sha256, write_tensors

MIXED = {
    "b.weight": torch.arange(6.0).reshape(2, 3).half(),
    "a": torch.tensor(-1.5),
    "c": torch.tensor([[1, 2], [3, 4]]).t(),
}


@pytest.mark.parametrize(
    ("form", "start", "recorded"),
    [
        (STATE, b"", "fcb16acf96845611990f9a2a3b6891ac9a222b08ca92c20ec312a9887de15ebd"),
        (ADAPTER_BASE, b"", "e5cc6949e120731977c036aa27252fcf13b06179d63cdad755dfa718d575c5a1"),
        (TEXT_ENCODER, b"", "c8da180e7eba30a30d96e5a9221a1a3676da6908c071cdbd144428178d3c84f6"),
        (AUTOENCODER, b"0.18215", "ef7d2e08f5599a5ebc9995a08ee07b77ac0fb3f48102a15f7d7c8acfa041dfdf"),
    ],
)
def test_hashes_in_files_of_earlier_versions_still_compare_equal(form: HashForm, start: bytes, recorded: str) -> None:
    """Recorded with version 0.1, which had a function for each."""
    assert state_sha256(MIXED, form, start) == recorded
    assert state_sha256(dict(reversed(MIXED.items())), form, start) == recorded


def test_the_hash_sees_names_shapes_and_values() -> None:
    base = {"a": torch.zeros(2, 3)}
    others = [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.ones(2, 3)},
        {"a": torch.zeros(2, 3).half()},
        {"a": torch.zeros(2, 3).bfloat16()},
    ]
    assert len({state_sha256(s) for s in (base, *others)}) == 6
    assert state_sha256({**base, "n.num_batches_tracked": torch.tensor(5)}) == state_sha256(base)


def test_views_and_shared_memory_are_written_whole(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"whole": base, "same": base, "row": base[1], "turned": base.t(), "none": base[:0]}
    first = write_tensors(tmp_path / "new" / "a.safetensors", tensors, {"about": "x"})
    second = write_tensors(tmp_path / "b.safetensors", {k: v.clone() for k, v in tensors.items()}, {"about": "x"})
    assert first.read_bytes() == second.read_bytes()
    read = load_file(first)
    assert all(torch.equal(read[k], v) for k, v in tensors.items())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16])
def test_a_cast_loses_no_range_in_silence(dtype: torch.dtype) -> None:
    """float8_e4m3fn makes 448 of infinity and of all that is larger, so a check after the cast sees nothing."""
    most = torch.finfo(dtype).max
    assert cast("w", torch.tensor([1.0, most]), dtype, "here").tolist() == [1.0, most]
    assert cast("n", torch.tensor([3]), dtype, "here").dtype == torch.int64
    back = cast("w", torch.tensor([1.0]).to(dtype), torch.float32, "here")
    assert (back.dtype, back.item()) == (torch.float32, 1.0)
    for wrong, message in (
        (math.inf, "not finite"),
        (math.nan, "not finite"),
        (1.1 * most, r"w of here reaches .* ends"),
    ):
        with pytest.raises(UserError, match=message):
            cast("w", torch.tensor([1.0, wrong], dtype=torch.float64), dtype, "here")
