"""Images that cannot be decoded: how many a run tolerates, and how they are reported."""

import warnings
from collections.abc import Mapping

import torch.distributed

from diffzoo.errors import UserError

__all__ = ["BadImage", "check_bad", "note_bad", "share_bad"]


class BadImage(Exception):
    """An image that cannot be decoded."""


def check_bad(bad: Mapping[int, str], max_bad: int, name: str) -> None:
    """Raise a `UserError` where more images of the source `name` are bad than `max_bad`; `bad` has reasons by row."""
    if len(bad) > max_bad:
        raise UserError(
            f"{len(bad)} images of {name} cannot be decoded, more than max_bad = {max_bad} allows; "
            f"the last is {list(bad.values())[-1]}"
        )


def note_bad(known: dict[int, str], new: Mapping[int, str], max_bad: int, name: str, verb: str) -> None:
    """Add the bad images of a batch to the known ones, warn of each once with what was done, and check their number."""
    for row, reason in new.items():
        if row not in known:
            known[row] = reason
            warnings.warn(f"{verb} a bad image ({len(known)} so far): {reason}")
    check_bad(known, max_bad, name)


def share_bad(known: dict[int, str], world: int) -> None:
    """Add the bad images that other ranks met, so that the limit and checkpoints count those of all `world` ranks."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        shares: list[dict[int, str]] = [{} for _ in range(world)]
        torch.distributed.all_gather_object(shares, known)
        for share in shares:
            known.update(share)
