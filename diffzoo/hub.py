"""The Hugging Face Hub and its cache on disk: where they are, and what goes wrong there as one sentence each.

The client reads its environment variables when it is imported; here they are read at each call, so that a program
may set them later.
"""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from diffzoo.errors import UserError

__all__ = [
    "cache_dir",
    "cached_revision",
    "check_repo",
    "explain_disk",
    "explain_hub",
    "free_space_for",
    "gigabytes",
    "hub_cache_dir",
    "hub_endpoint",
    "hub_file",
    "is_offline",
    "lock",
    "offline_sentence",
    "status_sentence",
]


def _hf_home() -> Path:
    home = os.environ.get("HF_HOME")
    if home:
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "huggingface"


def cache_dir() -> Path:
    """The folder of converted weights and pins: `$HF_HOME/diffzoo`, or in `$HF_HUB_CACHE` where that alone is set."""
    # a user who moved only the client's cache moved it to the disk that has the room
    home = hub_cache_dir() if os.environ.get("HF_HUB_CACHE") and not os.environ.get("HF_HOME") else _hf_home()
    return home / "diffzoo"


def hub_cache_dir() -> Path:
    """The Hub client's own cache."""
    path = os.environ.get("HF_HUB_CACHE")
    return Path(path).expanduser() if path else _hf_home() / "hub"


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock beside `path`; other processes wait."""
    from huggingface_hub.utils import WeakFileLock

    with explain_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(path.with_name(path.name + ".lock")):
        yield


def cached_revision(repo: str, file: str = "config.json") -> str | None:
    """The commit of a repository's main branch that is in the cache already, with `file` in it.

    It follows every download by any program, so it can change from one call to the next; what must not change is
    recorded elsewhere (`diffzoo.encoders.pins`). None if there is none yet, or offline, where the client takes what it
    has.
    """
    if is_offline():
        return None
    ref = hub_cache_dir() / f"models--{repo.replace('/', '--')}" / "refs" / "main"
    if not ref.is_file():
        return None
    commit = ref.read_text().strip()
    return commit if (ref.parent.parent / "snapshots" / commit / file).is_file() else None


def is_offline() -> bool:
    """Whether the user asked for no network: `HF_HUB_OFFLINE=1`."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def gigabytes(size: float) -> str:
    """A number of bytes for people: "2.02 GB"."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


@contextlib.contextmanager
def explain_disk(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a sentence that names it."""
    try:
        yield
    except Exception as error:
        number = _os_error(error)
        if number in (errno.ENOSPC, errno.EDQUOT):
            free = f"{gigabytes(shutil.disk_usage(_existing(path)).free)} free"
            raise UserError(
                f"the disk is full while writing {path} ({free}): make room, or {_move(path, 'another disk')}"
            ) from error
        if number == errno.EFBIG:
            raise UserError(f"cannot write {path}: a file this large is not allowed here: {_move(path)}") from error
        if number in (errno.EACCES, errno.EROFS):
            raise UserError(f"cannot write {path}: {_move(path)}") from error
        raise


def _os_error(error: Exception) -> int | None:
    """The number of the system's error; safetensors has it in its text only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(found.group(1)) if found else None


def _move(path: Path, where: str = "a folder you may write to") -> str:
    """What to do about a place that cannot take a file: only the cache is moved by a variable."""
    ours = [folder.absolute() for folder in (cache_dir(), hub_cache_dir())]
    if not any(folder in (path.absolute(), *path.absolute().parents) for folder in ours):
        return f"choose {where}"
    alone = os.environ.get("HF_HUB_CACHE") and not os.environ.get("HF_HOME")
    return f"point {'HF_HUB_CACHE' if alone else 'HF_HOME'} to {where}"


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.parents) if p.exists())


def free_space_for(size: int | None, path: Path) -> None:
    """Refuse before a download starts when `size` bytes cannot fit beside `path`."""
    free = shutil.disk_usage(_existing(path)).free
    if size is not None and size > free:
        raise UserError(
            f"the disk is too full for {path.name}: it needs {gigabytes(size)} and {gigabytes(free)} are free at "
            f"{path.parent}: make room, or {_move(path, 'another disk')}"
        )


def check_repo(repo: str) -> None:
    """Raise a `UserError` unless `repo` can be the name of a repository."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"expected a repository 'owner/name', got {repo!r}")


def hub_endpoint() -> str:
    """The Hub's address: `HF_ENDPOINT`, or the public one."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


@contextlib.contextmanager
def explain_hub(repo: str, what: str = "") -> Iterator[None]:
    """Turn what the Hub's client raises into one sentence each."""
    import huggingface_hub.errors as hub

    what = what or f"the Hub repository {repo}"
    page = f"{hub_endpoint()}/{repo}"
    try:
        with explain_disk(hub_cache_dir()):
            yield
    except hub.GatedRepoError as error:  # a subclass of RepositoryNotFoundError
        raise UserError(
            f"{repo} is gated: accept its conditions at {page}, then log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise UserError(f"{repo} has no such revision, needed for {what}: check the branch, tag or commit") from error
    except hub.RepositoryNotFoundError as error:
        raise UserError(
            f"the Hub has no repository {repo}, or it is private: check the name, or log in with `hf auth login`"
        ) from error
    except hub.LocalEntryNotFoundError as error:  # before its parent EntryNotFoundError
        raise _unreachable(what, error.__cause__) from error
    except hub.EntryNotFoundError as error:
        raise UserError(f"the Hub repository {repo} has no such file: {what}") from error
    except hub.OfflineModeIsEnabled as error:
        raise UserError(offline_sentence(what)) from error
    except hub.HfHubHTTPError as error:
        raise UserError(status_sentence(error.response.status_code, f"the Hub, asked for {what},")) from error
    except hub.HFValidationError as error:
        raise UserError(f"expected a repository 'owner/name', got {repo!r}: {error}") from error
    except UserError:
        raise
    except RuntimeError as error:  # the client wraps what stops an upload of a large file
        if isinstance(error.__cause__, hub.HfHubHTTPError | OSError):
            with explain_hub(repo, what):
                raise error.__cause__ from error
        raise
    except OSError as error:
        if _is_network(error):
            raise _unreachable(what, error) from error
        raise
    except Exception as error:
        if not type(error).__module__.startswith("httpx"):
            raise
        raise _unreachable(what, error) from error


def _is_network(error: BaseException) -> bool:
    return isinstance(error, ConnectionError | TimeoutError) or "Consistency check failed" in str(error)


def _unreachable(what: str, cause: BaseException | None) -> UserError:
    response = getattr(cause, "response", None)
    if response is not None and getattr(response, "status_code", 200) >= 400:
        return UserError(status_sentence(response.status_code, f"the Hub, asked for {what},"))
    if is_offline():
        return UserError(offline_sentence(what))
    if cause is not None and "Consistency check failed" in str(cause):
        return UserError(f"the download of {what} was cut short: try again, it goes on where it stopped")
    return UserError(
        f"{hub_endpoint()} cannot be reached and {what} is not in the cache: check the connection, then try again"
    )


def offline_sentence(what: str) -> str:
    """What to tell someone who is offline and lacks `what`."""
    return (
        f"offline (HF_HUB_OFFLINE=1) and {what} is not in the cache at {cache_dir().parent}: run the same "
        "command once with a connection, or copy the cache here"
    )


def status_sentence(status: int, who: str) -> str:
    """What an HTTP status of 400 or more means for the user; `who` is the grammatical subject."""
    if status == 401:
        return f"{who} answered 401: the token is missing or wrong: log in with `hf auth login` or set HF_TOKEN"
    if status == 403:
        return f"{who} answered 403: your token does not have the right to do this"
    if status == 404:
        return f"{who} answered 404: there is nothing at this address any more"
    if status == 409:
        return f"{who} answered 409: something of this name exists already"
    if status == 429:
        return (
            f"{who} answered 429: too many requests from your address: wait a few minutes, or log in for a higher limit"
        )
    if status >= 500:
        return f"{who} answered {status}: the server has a fault of its own: try again later"
    return f"{who} answered {status}"


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
