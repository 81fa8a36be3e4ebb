"""The client of the Hugging Face Hub, and one table of sentences about what goes wrong on a network."""

import contextlib
import http.client
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from diffzoo.cache import cache_dir, explain_disk, hub_cache_dir
from diffzoo.errors import UserError

__all__ = [
    "LOG_IN",
    "HubPlace",
    "NoSuchFileError",
    "cached_revision",
    "check_repo",
    "explain_hub",
    "hub_answers",
    "hub_endpoint",
    "hub_file",
    "hub_place",
    "hub_state",
    "is_offline",
    "network_error",
    "offline_error",
]

LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
# by the name of an exception's class, the most special first in its own order of classes, or by HTTP status;
# {who} is "HOST, asked for WHAT,"
SENTENCES: dict[str | int, str] = {
    "GatedRepoError": f"{{repo}} is gated: accept its conditions at {{page}}, then {LOG_IN}",
    "RevisionNotFoundError": "{repo} has no such revision, needed for {what}: check the branch, tag or commit",
    "RepositoryNotFoundError": f"the Hub has no repository {{repo}}, or it is private: check the name, or {LOG_IN}",
    "EntryNotFoundError": "the Hub repository {repo} has no such file: {what}",
    "HFValidationError": "expected a repository 'owner/name', got {repo!r}",
    "offline": "offline (HF_HUB_OFFLINE=1) and {what} is not in the cache at {cache}: run the same command once with "
    "a connection, or copy the cache here",
    "unreachable": "{host} cannot be reached and {what} is not in the cache: check the connection, then try again",
    "cut": "the download of {what} was cut short: try again, it goes on where it stopped",
    401: f"{{who}} answered 401: the token is missing or wrong: {LOG_IN}",
    403: "{who} answered 403: your token does not have the right to do this",
    404: "{who} answered 404: there is nothing at this address any more",
    409: "{who} answered 409: something of this name exists already",
    429: "{who} answered 429: too many requests from your address: wait a few minutes, or log in for a higher limit",
    500: "{who} answered {status}: the server has a fault of its own: try again later",
}
NO_LOGIN = (
    "{who} answered {status}: the file is no longer public, or its quota of downloads is exceeded: try again "
    "tomorrow, or see in a browser whether {page} still gives it"
)
# at hosts where nobody logs in
ELSEWHERE: dict[str | int, str] = {
    **SENTENCES,
    401: NO_LOGIN,
    403: NO_LOGIN,
    429: "{who} answered 429: too many requests from your address: wait a few minutes, then try again",
}


class NoSuchFileError(UserError):
    """A repository of the Hub has no file of that name."""


def is_offline() -> bool:
    """Whether the user asked for no network: `HF_HUB_OFFLINE=1`."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def hub_answers(endpoint: str = "") -> str:
    """Why the Hub, or another endpoint, cannot be reached, in words; "" if it answers, whatever it says."""
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint or hub_endpoint(), method="HEAD"), timeout=10):
            return ""
    except urllib.error.HTTPError:
        return ""
    except OSError as error:
        return str(getattr(error, "reason", error))


def hub_state() -> str:
    """Whether the Hub can be used, in words."""
    if is_offline():
        return f"{hub_endpoint()}: offline mode is set (HF_HUB_OFFLINE)"
    reason = hub_answers()
    if reason:
        return f"{hub_endpoint()} cannot be reached ({reason}): what is in the caches works"
    return f"{hub_endpoint()} answers"


def hub_endpoint() -> str:
    """The Hub's address: `HF_ENDPOINT`, or the public one."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


# -- what goes wrong


def offline_error(what: str) -> UserError:
    """What to tell someone who is offline and lacks `what`."""
    return UserError(SENTENCES["offline"].format(what=what, cache=cache_dir().parent))


def network_error(error: BaseException, what: str, repo: str = "", url: str = "") -> UserError | None:
    """One sentence for what a client of the Hub or of another host raised; None if the network is not to blame.

    Args:
        error: what was raised.
        what: is fetched or sent.
        repo: repository on the Hub.
        url: the address, where it is not the Hub's.
    """
    kind = _kind(error)
    if kind is None:
        return None
    if kind == "offline" or (kind == "unreachable" and is_offline()):
        return offline_error(what)
    host = url.split("/")[2] if url else hub_endpoint()
    who = f"{host if url else 'the Hub'}, asked for {what},"
    page = url or f"{hub_endpoint()}/{repo}"
    table = ELSEWHERE if url else SENTENCES
    plain = "{who} answered {status}"
    sentence = table.get(kind) or (table[500] if isinstance(kind, int) and kind >= 500 else plain)
    raised = NoSuchFileError if kind == "EntryNotFoundError" else UserError
    return raised(sentence.format(repo=repo, what=what, who=who, page=page, host=host, status=kind))


def _kind(error: BaseException) -> str | int | None:
    """Which sentence an exception deserves."""
    names = [c.__name__ for c in type(error).__mro__]
    if "OfflineModeIsEnabled" in names:
        return "offline"
    if "LocalEntryNotFoundError" in names:  # the client's word for a network that gave nothing
        return (_kind(error.__cause__) if error.__cause__ else None) or "unreachable"
    known = next((name for name in names if name in SENTENCES), None)
    if known is not None:
        return known
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None) if response is not None else getattr(error, "code", None)
    if isinstance(status, int) and status >= 400:
        return status
    if "Consistency check failed" in str(error):
        return "cut"
    if isinstance(error, urllib.error.URLError) or type(error).__module__.partition(".")[0] in ("httpx", "httpcore"):
        return "unreachable"
    if isinstance(error, http.client.HTTPException):
        return "cut"
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        return _kind(error.__cause__)  # the client wraps what stops an upload of a large file
    return "unreachable" if isinstance(error, ConnectionError | TimeoutError) else None


@contextlib.contextmanager
def explain_hub(repo: str, what: str = "") -> Iterator[None]:
    """Turn what the Hub's client raises into one sentence each."""
    try:
        with explain_disk(hub_cache_dir()):
            yield
    except UserError:
        raise
    except Exception as error:
        said = network_error(error, what or f"the Hub repository {repo}", repo)
        if said is None:
            raise
        raise said from error


# -- places


class HubPlace(NamedTuple):
    """A repository of the Hub, and a file in it where one is named."""

    repo: str
    revision: str | None = None
    file: str | None = None


def hub_place(source: str) -> HubPlace | None:
    """The place on the Hub that a source names; None for sources of other kinds.

    Args:
        source: "hf-hub:owner/name@revision", also with "hf_hub:" before; "hf://owner/name@revision/file"; or the
            address of a repository's page, of its folder or of a file in it, as a browser shows it. The file of a
            folder is its `config.json`.
    """
    hosts = rf"{re.escape(hub_endpoint())}|(?:https?://)?(?:www\.)?(?:huggingface|hf)\.co"
    forms = (
        r"hf[-_]hub:/*([^@]*?)/*(?:@(.*?)/*)?",
        r"hf://([^/@]+/[^/@]+)(?:@(refs/\w+/[^/]+|[^/]+))?(?:/(.+?))?/*",
        rf"(?:{hosts})/([\w.-]+/[\w.-]+)(?:/(?:tree|blob|resolve|raw)/([^/?#]+)(?:/([^?#]+?))?)?/*(?:[?#].*)?",
    )
    found = next(filter(None, (re.fullmatch(form, source.strip()) for form in forms)), None)
    if found is None:
        return None
    repo, revision, file = (part and urllib.parse.unquote(part) for part in (*found.groups(), None)[:3])
    if file and ("/tree/" in source or "." not in file.rpartition("/")[2]):
        file += "/config.json"
    return HubPlace(str(repo), revision or None, file)


# -- files


def check_repo(repo: str) -> None:
    """Raise a `UserError` unless `repo` can be the name of a repository."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(SENTENCES["HFValidationError"].format(repo=repo))


def cached_revision(repo: str, file: str = "config.json") -> str | None:
    """The commit of a repository's main branch that is in the cache already, with `file` in it.

    It follows every download by any program, so it can change from one call to the next; what must not change is
    recorded elsewhere (`diffzoo.pins`). None if there is none yet, or offline, where the client takes what it has.
    """
    if is_offline():
        return None
    ref = hub_cache_dir() / f"models--{repo.replace('/', '--')}" / "refs" / "main"
    if not ref.is_file():
        return None
    commit = ref.read_text().strip()
    return commit if (ref.parent.parent / "snapshots" / commit / file).is_file() else None


def hub_file(repo: str, file: str, revision: str | None, what: str = "") -> tuple[Path, str]:
    """A file of a Hub repository: its path in the cache and the commit it belongs to.

    Raises:
        UserError: one sentence each for gated, missing, rate-limited, unreachable, offline, full disk.
    """
    from huggingface_hub import hf_hub_download

    what = what or f"{file} of the Hub repository {repo}"
    with explain_hub(repo, what):
        path = hf_hub_download(
            repo,
            file,
            revision=revision,
            cache_dir=hub_cache_dir(),
            endpoint=hub_endpoint(),
            local_files_only=is_offline(),
            library_name="diffzoo",
        )
    # .../snapshots/<commit>/<file>
    parts = Path(path).parts
    return Path(path), parts[len(parts) - parts[::-1].index("snapshots")]
