"""Images that cannot be decoded: how many a run tolerates, and how they are reported."""

import warnings
from collections.abc import Mapping

import torch.distributed

from diffzoo.errors import UserError

__all__ = ["BadImage", "check_bad", "note_bad", "share_bad"]


class BadImage(Exception):
    """An image that cannot be decoded."""


def check_bad(bad: Mapping[int, str], max_bad: int, name: str) -> None:
    """Stop when more images are bad than the settings allow.

    Args:
        bad: reasons by row.
        max_bad: how many there may be.
        name: of the source.

    Raises:
        UserError: there are more.
    """
    if len(bad) > max_bad:
        raise UserError(
            f"{len(bad)} images of {name} cannot be decoded, more than max_bad = {max_bad} allows; "
            f"the last is {list(bad.values())[-1]}"
        )


def note_bad(known: dict[int, str], new: Mapping[int, str], max_bad: int, name: str, verb: str) -> None:
    """Add bad images to those that are known, warn of each once, and stop when there are too many.

    Args:
        known: reasons by row, changed in place.
        new: those of a batch.
        max_bad: how many there may be in all.
        name: of the source.
        verb: what was done with them, for the warning.

    Raises:
        UserError: there are too many.
    """
    for row, reason in new.items():
        if row not in known:
            known[row] = reason
            warnings.warn(f"{verb} a bad image ({len(known)} so far): {reason}")
    check_bad(known, max_bad, name)


def share_bad(known: dict[int, str], world: int) -> None:
    """Share the bad images that each rank met, so that the limit and checkpoints count all of them.

    Args:
        known: reasons by row, changed in place.
        world: how many ranks there are.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        shares: list[dict[int, str]] = [{} for _ in range(world)]
        torch.distributed.all_gather_object(shares, known)
        for share in shares:
            known.update(share)
