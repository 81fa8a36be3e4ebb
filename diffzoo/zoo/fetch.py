"""From a manifest entry to a local file whose hash is right.

Hub files go through `huggingface_hub` and its cache. Other addresses are read with the standard library: an
interrupted download goes on where it stopped if the server says that the file is still the same, and starts again if
not; what has the wrong length or hash is deleted.
"""

import http.client
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any

from diffzoo.cache import cache_dir, explain_disk, free_space_for, lock
from diffzoo.errors import UserError
from diffzoo.files import sha256
from diffzoo.hub import hub_file, is_offline, network_error, offline_error
from diffzoo.pins import read_record, record_first, weights_record
from diffzoo.zoo.manifest import Pretrained

__all__ = ["HashMismatchError", "download", "fetch"]

PACKAGE = Path(__file__).resolve().parent.parent
DRIVE = "https://drive.usercontent.google.com/download"
ATTEMPTS = 5
TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 20


# -- other addresses


class HashMismatchError(UserError):
    """A file is not the one that the manifest, or an earlier download, knows."""


class _CutShort(http.client.HTTPException):
    """The connection ended before the file did."""


def download(url: str, path: Path, what: str = "", size: int | None = None, attempts: int = ATTEMPTS) -> Path:
    """Download `url` to `path`, going on from `path.incomplete` where that is safe.

    Args:
        url: http or https.
        path: where the whole file goes, by renaming.
        what: its name in messages.
        size: expected bytes, if known.
        attempts: tries, with growing pauses, on cut connections, 429 and 5xx.

    Raises:
        UserError: one sentence each for offline, missing, refused, rate-limited, unreachable, full disk, wrong length.
    """
    what = what or url
    if is_offline():
        raise offline_error(what)
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
    free_space_for(size, path)
    for attempt in range(attempts):
        last = attempt == attempts - 1
        try:
            with explain_disk(path):
                return _download_once(opener, url, path, what)
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            refused = error if isinstance(error, urllib.error.HTTPError) else None
            if refused is not None:
                refused.close()  # it holds the connection
            if last or (refused is not None and refused.code != 429 and refused.code < 500):
                raise network_error(error, what, url=url) or error from error
            _pause(attempt, refused.headers.get("Retry-After") if refused is not None else None)
    raise AssertionError("unreachable")


def _pause(attempt: int, retry_after: str | None = None) -> None:
    seconds = float(retry_after) if retry_after and retry_after.isdigit() else float(2**attempt)
    time.sleep(min(seconds, 60.0))


def _download_once(opener: urllib.request.OpenerDirector, url: str, path: Path, what: str) -> Path:
    part, tag = path.with_name(path.name + ".incomplete"), path.with_name(path.name + ".etag")
    path.parent.mkdir(parents=True, exist_ok=True)
    request = urllib.request.Request(url, headers={"User-Agent": "diffzoo"})
    known = tag.read_text() if tag.exists() else ""
    if part.exists() and known:
        # If-Range: the server sends the rest only if the file is still the one we began with
        request.add_header("Range", f"bytes={part.stat().st_size}-")
        request.add_header("If-Range", known)
    try:
        response = opener.open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing left to send, or another file: begin anew
            part.unlink(missing_ok=True)
            raise _CutShort from error
        raise
    with response:
        response = _confirmed(opener, response, what)
        offset = part.stat().st_size if response.status == 206 and part.exists() else 0
        length = response.headers.get("Content-Length")
        total = offset + int(length) if length else None
        free_space_for(int(length) if length else None, path)
        tag.write_text(response.headers.get("ETag") or "")
        try:
            _copy(response, part, offset)
        except (ConnectionError, TimeoutError) as error:
            raise _CutShort from error
    if total is not None and part.stat().st_size != total:
        raise _CutShort(f"{part.stat().st_size} of {total} bytes")
    part.replace(path)
    tag.unlink(missing_ok=True)
    return path


def _copy(response: Any, part: Path, offset: int) -> None:
    from tqdm import tqdm

    length = response.headers.get("Content-Length")
    bar = tqdm(total=int(length) if length else None, unit="B", unit_scale=True, desc=part.stem, disable=None)
    with part.open("r+b" if offset else "wb") as file, bar:
        file.seek(offset)
        while block := response.read(CHUNK):
            file.write(block)
            bar.update(len(block))


def _confirmed(opener: urllib.request.OpenerDirector, response: Any, what: str) -> Any:
    """The file behind Google Drive's page "too large to scan for viruses", which has a form with a token."""
    kind = response.headers.get("Content-Type", "")
    if not kind.startswith("text/html"):
        return response
    page = response.read(1 << 20).decode("utf-8", "replace")
    form = re.search(r"<form[^>]*action=\"([^\"]+)\"", page)
    fields = dict(re.findall(r"<input[^>]*name=\"([^\"]+)\"[^>]*value=\"([^\"]*)\"", page))
    if not form or "confirm" not in fields:
        if "quota" in page.lower():
            raise UserError(f"Google Drive has reached its daily limit of downloads for {what}: try again tomorrow")
        raise UserError(f"expected a file at the address of {what}, got a web page: the file may no longer be public")
    address = urllib.parse.urljoin(response.url, form.group(1).replace("&amp;", "&"))
    confirmed = opener.open(f"{address}?{urllib.parse.urlencode(fields)}", timeout=TIMEOUT)
    if confirmed.headers.get("Content-Type", "").startswith("text/html"):
        raise UserError(f"Google Drive refused to hand out {what}: try again tomorrow, or fetch it in a browser")
    return confirmed


# -- entries


def fetch(entry: Pretrained) -> tuple[Path, dict[str, Any]]:
    """The original file of a manifest entry, its size and hash checked.

    Returns:
        The path, and {sha256, size, revision} of the file.

    Raises:
        UserError: if it cannot be had, or is not the file that the manifest or an earlier download knows.
    """
    record = weights_record(entry.name)
    known = read_record(record)
    path, revision = _SOURCES[entry.source.kind](entry, known)
    metadata = {"sha256": sha256(path), "size": path.stat().st_size, "revision": revision}
    expected = {"sha256": entry.sha256 or known.get("sha256"), "size": entry.size or known.get("size")}
    for key, value in expected.items():
        if value is not None and metadata[key] != value:
            _discard(entry, path)
            knows = "the manifest" if getattr(entry, key) else "an earlier download"
            raise HashMismatchError(
                f"{entry.source} is not the file that {knows} knows: expected {key} {value}, got {metadata[key]}; "
                "it was deleted and nothing was loaded from it"
            )
    if not known and entry.source.kind != "package":
        if entry.sha256 is None:
            warnings.warn(
                f"{entry.name} is unpinned ({entry.unpinned}): recorded on first download as sha256 "
                f"{metadata['sha256']}, compared ever after",
                stacklevel=2,
            )
        record_first(record, {**metadata, "source": str(entry.source)})
    return path, metadata


def _discard(entry: Pretrained, path: Path) -> None:
    if entry.source.kind == "package":
        return
    path.resolve().unlink(missing_ok=True)  # the blob behind the Hub cache's link
    path.unlink(missing_ok=True)


def _from_hub(entry: Pretrained, known: dict[str, Any]) -> tuple[Path, str | None]:
    source = entry.source
    revision = source.revision or known.get("revision")
    return hub_file(str(source.repo), str(source.file), revision, f"{entry.name} ({source.file} of {source.repo})")


def _from_url(entry: Pretrained, known: dict[str, Any]) -> tuple[Path, None]:
    return _cached(entry, str(entry.source.url))


def _from_drive(entry: Pretrained, known: dict[str, Any]) -> tuple[Path, None]:
    query = urllib.parse.urlencode({"id": entry.source.drive, "export": "download"})
    return _cached(entry, f"{os.environ.get('DIFFZOO_DRIVE_ENDPOINT', DRIVE)}?{query}")


def _cached(entry: Pretrained, url: str) -> tuple[Path, None]:
    path = cache_dir() / entry.name / "original" / entry.source.filename
    if not path.exists():
        with lock(path):
            if not path.exists():
                download(url, path, f"{entry.name} ({entry.source})", entry.size)
    return path, None


def _from_package(entry: Pretrained, known: dict[str, Any]) -> tuple[Path, None]:
    path = PACKAGE / str(entry.source.package)
    if not path.is_file():
        raise UserError(f"{path} is missing from the installation: install diffzoo again")
    return path, None


_SOURCES: dict[str, Callable[[Pretrained, dict[str, Any]], tuple[Path, str | None]]] = {
    "repo": _from_hub,
    "url": _from_url,
    "drive": _from_drive,
    "package": _from_package,
}
