"""Licences of weights: the identifiers that the Hub knows, and licences with a name of their own."""

import re

from diffzoo.errors import UserError, did_you_mean

__all__ = ["licence_id", "named_licence"]

IDENTIFIERS = """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m
    bigscience-bloom-rail-1.0 bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0
    c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0
    cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m
    deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2
    fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc lgpl
    lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa
    odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 pddl postgresql unknown unlicense wtfpl zlib
"""
KNOWN = frozenset(IDENTIFIERS.split())


def licence_id(name: str) -> str | None:
    """The Hub's identifier of a licence, such as "cc-by-4.0" of "CC BY 4.0"; None if it has none."""
    plain = re.sub(r"[\s_]+", "-", name.strip().casefold())
    return plain if plain in KNOWN else None


def named_licence(given: str | None) -> str | None:
    """A licence as a user states it: an identifier of the Hub, or `other: NAME` for one with a name of its own.

    Raises:
        UserError: for anything else; names the nearest identifier.
    """
    if given is None:
        return None
    other, _, name = given.partition(":")
    if other.strip().casefold() == "other":
        if not name.strip():
            raise UserError('a licence that the Hub does not know has a name: --licence "other: NAME"')
        return name.strip()
    if licence_id(given) is None:
        near = did_you_mean(given, KNOWN)
        raise UserError(
            f"the Hub knows no licence {given!r}{near}{'' if near else ';'} a licence with a name "
            f'of its own is written "other: {given}"'
        )
    return licence_id(given)
