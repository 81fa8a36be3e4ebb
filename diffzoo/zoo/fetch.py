"""From a manifest entry to a local file whose hash is right.

Hub files go through `huggingface_hub` and its cache. Other addresses are read with the standard library: an
interrupted download goes on where it stopped if the server says that the file is still the same, and starts again if
not. A file of the wrong length or hash is deleted.
"""

import http.client
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from dataclasses import dataclass
from http.client import HTTPResponse
from http.cookiejar import CookieJar
from pathlib import Path

from diffzoo.cache import cache_dir, explain_disk, free_space_for, lock
from diffzoo.errors import UserError
from diffzoo.files import sha256
from diffzoo.hub import hub_file, is_offline, network_error, offline_error
from diffzoo.pins import Record, read_record, record_first, weights_record
from diffzoo.progress import progress_bar
from diffzoo.zoo.manifest import Pretrained, Source

__all__ = ["HashMismatchError", "Original", "download", "fetch"]

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
    attempt = 0
    while True:
        try:
            with explain_disk(path):
                return _download_once(opener, url, path, what)
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            refused = error if isinstance(error, urllib.error.HTTPError) else None
            if refused is not None:
                refused.close()  # it holds the connection
            if attempt + 1 == attempts or (refused is not None and refused.code != 429 and refused.code < 500):
                raise network_error(error, what, url=url) or error from error
            _pause(attempt, refused.headers.get("Retry-After") if refused is not None else None)
            attempt += 1


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


def _copy(response: HTTPResponse, part: Path, offset: int) -> None:
    length = response.headers.get("Content-Length")
    bar = progress_bar(int(length) if length else None, unit="B", unit_scale=True, desc=part.stem)
    with part.open("r+b" if offset else "wb") as file, bar:
        file.seek(offset)
        while block := response.read(CHUNK):
            file.write(block)
            bar.update(len(block))


def _confirmed(opener: urllib.request.OpenerDirector, response: HTTPResponse, what: str) -> HTTPResponse:
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


@dataclass(frozen=True)
class Original:
    """A file as its publisher gives it.

    Args:
        path: of the file.
        source: where it comes from, with its converter.
        sha256, size: of the file.
        revision: commit of the Hub repository.
    """

    path: Path
    source: Source
    sha256: str
    size: int
    revision: str | None = None

    @property
    def provenance(self) -> dict[str, str | int | None]:
        """What `Provenance` says of it."""
        return {"source": str(self.source), "sha256": self.sha256, "size": self.size, "revision": self.revision}


def fetch(entry: Pretrained) -> Original:
    """The original file of a manifest entry from the first of its sources that answers, its size and hash checked.

    Raises:
        HashMismatchError: if a source's file is not the one that the manifest or an earlier download knows.
        UserError: if no source can be had, saying why of the first and naming the others.
    """
    failed: list[UserError] = []
    for source in entry.sources:
        try:
            return _fetch_from(entry, source)
        except HashMismatchError:
            raise
        except UserError as error:
            failed.append(error)
    if not entry.mirrors:
        raise failed[0]
    raise UserError(f"{failed[0]}; nor can it be had from {' or '.join(map(str, entry.mirrors))}") from failed[-1]


def _fetch_from(entry: Pretrained, source: Source) -> Original:
    is_mirror = source != entry.sources[0]
    record = weights_record(entry.name, str(source) if is_mirror else "")
    known = read_record(record)
    path, revision = _place(entry, source, known)
    original = Original(path, source, sha256(path), path.stat().st_size, revision)
    for key in ("sha256", "size"):
        stated, found = getattr(source, key), getattr(original, key)
        expected = stated or known.get(key)
        if expected is not None and found != expected:
            if source.kind != "package":
                path.resolve().unlink(missing_ok=True)  # the blob behind the Hub cache's link
                path.unlink(missing_ok=True)
            knows = "the manifest" if stated else "an earlier download"
            raise HashMismatchError(
                f"{source} is not the file that {knows} knows: expected {key} {expected}, got {found}; "
                "it was deleted and nothing was loaded from it"
            )
    if source.kind != "package" and "sha256" not in known:
        if source.sha256 is None:
            which = f"the mirror {source}" if is_mirror else f"unpinned ({entry.unpinned})"
            warnings.warn(
                f"{entry.name} is {which}: recorded on first download as sha256 {original.sha256}, compared ever after",
                stacklevel=3,
            )
        record_first(record, original.provenance)
    return original


def _place(entry: Pretrained, source: Source, known: Record) -> tuple[Path, str | None]:
    """The file of a source on this disk, fetched where it is not there yet, and the commit it belongs to on the Hub."""
    if source.repo:
        revision = source.revision or known.get("revision")
        return hub_file(source.repo, str(source.file), revision, f"{entry.name} ({source.file} of {source.repo})")
    if source.package:
        path = PACKAGE / source.package
        if not path.is_file():
            raise UserError(f"{path} is missing from the installation: install diffzoo again")
        return path, None
    query = urllib.parse.urlencode({"id": source.drive, "export": "download"})
    url = source.url or f"{os.environ.get('DIFFZOO_DRIVE_ENDPOINT', DRIVE)}?{query}"
    path = cache_dir() / entry.name / "original" / source.filename
    if not path.exists():
        with lock(path):
            if not path.exists():
                download(url, path, f"{entry.name} ({source})", source.size)
    return path, None
