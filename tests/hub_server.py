"""A Hugging Face Hub in memory, spoken to over HTTP by the real `huggingface_hub` client (standard library only).

    with FakeHub() as hub:
        hub.add_repo("owner/name", {"config.json": b"{}", "model.safetensors": blob})
        hub.fail("resolve", status=429, times=1)         # the next download is refused
        hub.cut("resolve", after=1000, times=2)          # the next two stop in the middle
        hub.slow("resolve", seconds=0.01)                # every 4 KB takes this long

It serves repositories of models and datasets (large files by the LFS "basic" protocol, through a second host name as
the real one does), gated and private ones, branches and commits; plain files at `/files/NAME` with ranges and ETags;
and Google Drive's two-step download at `/drive?id=ID`. Tests point the client here with the fixture `hub` of
`tests/zoo/conftest.py`; xet must be off.
"""

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
LARGE = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".parquet", ".npz", ".tar")
CUT_BLOCK = 4096


@dataclass
class Entry:
    """A file of a repository."""

    data: bytes
    large: bool

    @property
    def git_hash(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


@dataclass
class Repo:
    """A repository: branches, and commits by their hash."""

    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Entry], message: str) -> str:
        content = "".join(f"{name}{entry.sha256}" for name, entry in sorted(files.items()))
        commit = hashlib.sha1(f"{message}{len(self.commits)}{content}".encode()).hexdigest()
        self.commits[commit], self.branches[branch] = files, commit
        return commit

    def at(self, revision: str) -> str | None:
        revision = urllib.parse.unquote(revision).removeprefix("refs/heads/")
        revision = self.branches.get("main" if revision == "HEAD" else revision, revision)
        return revision if revision in self.commits else None


@dataclass
class Fault:
    """What goes wrong with requests whose path contains `part`."""

    part: str
    times: int
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    after: int = -1
    seconds: float = 0.0
    methods: tuple[str, ...] = ("GET", "HEAD", "POST", "PUT")


class FakeHub:
    """The server; a context manager."""

    def __init__(self) -> None:
        self.tokens = {"hf_test": "tester"}
        self.granted: set[str] = set()  # users who may read gated repositories
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.drive: dict[str, bytes] = {}
        self.pages: dict[str, str] = {}
        self.on_blob: Callable[[int], Any] | None = None  # told how many bytes each download asks for
        self.log: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.validators = True  # whether plain files have an ETag
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # the client follows redirects to the same host while it reads metadata, so large files live at another name
        self.cdn = self.url.replace("127.0.0.1", "localhost")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    # -- content

    def add_repo(
        self, repo: str, files: dict[str, bytes], kind: str = "model", *, private: bool = False, gated: bool = False
    ) -> str:
        """Make a repository, or add a commit to it; returns the commit."""
        made = self.repos.setdefault((kind, repo), Repo(private, gated))
        entries = {name: Entry(data, name.endswith(LARGE)) for name, data in files.items()}
        for entry in entries.values():
            self.blobs[entry.sha256] = entry.data
        head = made.commits.get(made.branches.get("main", ""), {})
        return made.commit("main", {**head, **entries}, "add")

    def content(self, repo: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """The files of a repository."""
        found = self.repos[kind, repo]
        return {name: entry.data for name, entry in found.commits[str(found.at(revision))].items()}

    # -- faults

    def fail(self, part: str, status: int, times: int = 1_000_000, **headers: str) -> None:
        """Answer `status` to requests whose path contains `part`."""
        self.faults.append(Fault(part, times, status, {k.replace("_", "-"): v for k, v in headers.items()}))

    def cut(self, part: str, after: int, times: int = 1_000_000) -> None:
        """Close the connection after `after` bytes of the body."""
        self.faults.append(Fault(part, times, after=after, methods=("GET",)))

    def slow(self, part: str, seconds: float, times: int = 1_000_000) -> None:
        """Wait before every 4 KB of the body."""
        self.faults.append(Fault(part, times, seconds=seconds, methods=("GET",)))

    def requests(self, part: str = "") -> list[tuple[str, str]]:
        """Method and path of the requests whose path contains `part`."""
        return [(method, path) for method, path in self.log if part in path]

    def fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and fault.part in path and method in fault.methods:
                fault.times -= 1
                return fault
        return None


class Handler(BaseHTTPRequestHandler):
    """One request: the first route whose pattern matches answers it."""

    protocol_version = "HTTP/1.1"
    trouble: Fault | None = None

    @property
    def hub(self) -> FakeHub:
        return self.server.hub  # type: ignore[attr-defined, no-any-return]

    def log_message(self, *args: Any) -> None:
        pass

    # -- answers

    def reply(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.write(body)

    def write(self, body: bytes) -> None:
        try:
            self.send(body)
        except BrokenPipeError:  # the client has given up
            self.close_connection = True

    def send(self, body: bytes) -> None:
        trouble = self.trouble
        if trouble is None:
            self.wfile.write(body)
            return
        end = trouble.after if trouble.after >= 0 else len(body)
        for start in range(0, min(end, len(body)), CUT_BLOCK):
            threading.Event().wait(trouble.seconds)  # tests shorten `time.sleep`
            self.wfile.write(body[start : min(start + CUT_BLOCK, end)])
        if end < len(body):
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)

    def json(self, data: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.reply(status, json.dumps(data).encode(), {"Content-Type": "application/json", **(headers or {})})

    def refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        marks = {"X-Error-Code": code, "X-Error-Message": message} if code else {"X-Error-Message": message}
        self.json({"error": message}, status, {**marks, **(headers or {})})

    def blob(self, body: bytes, headers: dict[str, str], ranges: bool = True) -> None:
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        condition = self.headers.get("If-Range")
        if not asked or not ranges or self.command != "GET" or (condition and condition != headers.get("ETag")):
            return self.serve(200, body, headers)
        start, end = int(asked[1]), min(int(asked[2] or len(body) - 1), len(body) - 1)
        if start >= len(body):
            return self.reply(416, b"", {"Content-Range": f"bytes */{len(body)}"})
        return self.serve(206, body[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(body)}"})

    def serve(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        if self.hub.on_blob and self.command == "GET":
            self.hub.on_blob(len(body))
        self.reply(status, body, headers)

    # -- dispatch

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def handle_any(self) -> None:
        self.data = self.body()
        url = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(url.query))
        self.hub.log.append((self.command, self.path))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.user = self.hub.tokens.get(token)
        self.trouble = self.hub.fault(self.command, self.path)
        if self.trouble and self.trouble.status:
            status, headers = self.trouble.status, self.trouble.headers
            self.trouble = None
            return self.refuse(status, "", f"status {status}", headers)
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, urllib.parse.unquote(url.path)):
                return method(self, *found.groups())
        return self.refuse(404, "", f"no route {self.command} {self.path}")

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = handle_any

    # -- accounts and repositories

    def who(self) -> None:
        if not self.user:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        role = {"type": "access_token", "accessToken": {"displayName": "t", "role": "write"}}
        return self.json({"type": "user", "name": self.user, "orgs": [], "auth": role})

    def create(self) -> None:
        if not self.user:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        wanted = json.loads(self.data)
        kind, repo = wanted.get("type", "model"), f"{wanted.get('organization') or self.user}/{wanted['name']}"
        if (kind, repo) in self.hub.repos:
            return self.json({"error": "You already created this repo", "url": f"{self.hub.url}/{repo}"}, 409)
        made = Repo(private=bool(wanted.get("private")) or wanted.get("visibility") == "private")
        made.commit("main", {}, "initial commit")
        self.hub.repos[kind, repo] = made
        return self.json({"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo})

    def validate(self) -> None:
        self.json({"errors": [], "warnings": []})

    def access(self, kind: str, name: str, contents: bool) -> Repo | None:
        """The repository if this user may see it; else the refusal is sent."""
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and self.user != name.split("/")[0]):
            self.refuse(401 if self.user is None else 404, "RepoNotFound", "Repository not found")
        elif repo.gated and contents and self.user not in self.hub.granted:
            self.refuse(401 if self.user is None else 403, "GatedRepo", f"Access to {kind} {name} is restricted.")
        else:
            return repo
        return None

    def api(self, kinds: str, name: str, verb: str | None, revision: str | None, rest: str | None) -> None:
        repo = self.access(KINDS[kinds], name, contents=verb == "tree")
        if repo is None:
            return None
        if verb == "branch":
            return self.branch(repo, str(revision))
        if verb == "refs":
            return self.refs(repo)
        commit = repo.at(revision or "main")
        if commit is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if verb == "preupload":
            return self.preupload()
        if verb == "commit":
            return self.commit(repo, name, str(revision), commit)
        if verb == "tree":
            return self.tree(repo.commits[commit], rest or "", str(revision))
        return self.info(repo, name, commit)

    def branch(self, repo: Repo, branch: str) -> None:
        if branch in repo.branches:
            return self.refuse(409, "", "Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        return self.json({})

    def refs(self, repo: Repo) -> None:
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repo.branches.items()]
        self.json({"branches": branches, "tags": [], "converts": []})

    def info(self, repo: Repo, name: str, commit: str) -> None:
        day = "2026-01-01T00:00:00.000Z"
        files = [{"rfilename": path} for path in sorted(repo.commits[commit])]
        metadata = {"id": name, "modelId": name, "author": name.split("/")[0], "sha": commit, "siblings": files}
        state = {"private": repo.private, "gated": repo.gated, "disabled": False, "lastModified": day, "createdAt": day}
        self.json({"_id": "0", "downloads": 0, "likes": 0, "tags": [], **metadata, **state})

    # -- uploads

    def preupload(self) -> None:
        def mode(file: dict[str, Any]) -> str:
            return "lfs" if file["size"] > 10 * 2**20 or file["path"].endswith(LARGE) else "regular"

        asked = json.loads(self.data)["files"]
        self.json({"files": [{"path": f["path"], "shouldIgnore": False, "uploadMode": mode(f)} for f in asked]})

    def batch(self, kind: str | None, name: str) -> None:
        objects = []
        for wanted in json.loads(self.data)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.blobs:  # without actions the client takes it as already there
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/_lfs/{wanted['oid']}", "header": {}}}
            objects.append(answer)
        self.json({"transfer": "basic", "objects": objects})

    def lfs(self, sha: str) -> None:
        if self.command != "PUT":
            return self.blob(self.hub.blobs[sha], {"ETag": f'"{sha}"'})
        if hashlib.sha256(self.data).hexdigest() != sha:
            return self.refuse(400, "", "sha256 mismatch")
        self.hub.blobs[sha] = self.data
        return self.reply(200, headers={"ETag": sha})

    def commit(self, repo: Repo, name: str, branch: str, parent: str) -> None:
        head, *changes = [json.loads(line) for line in self.data.splitlines() if line.strip()]
        if head["value"].get("parentCommit") not in (None, parent):
            return self.refuse(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[parent])
        for change in changes:
            value = change["value"]
            if change["key"] == "file":
                files[value["path"]] = Entry(base64.b64decode(value["content"]), False)
            elif change["key"] == "lfsFile":
                files[value["path"]] = Entry(self.hub.blobs[value["oid"]], True)
            elif change["key"] == "deletedFile":
                files.pop(value["path"], None)
        made = repo.commit(branch, files, head["value"]["summary"])
        url = f"{self.hub.url}/{name}/commit/{made}"
        return self.json({"success": True, "commitOid": made, "commitUrl": url, "hookOutput": ""})

    # -- downloads

    def tree(self, files: dict[str, Entry], folder: str, revision: str) -> None:
        base = folder.rstrip("/") + "/" if folder.rstrip("/") else ""
        deep = self.query.get("recursive", "").lower() in ("true", "1")
        rows, folders = [], set()
        for path, entry in sorted(files.items()):
            if not path.startswith(base):
                continue
            parts = path[len(base) :].split("/")
            folders |= {base + "/".join(parts[:i]) for i in range(1, len(parts)) if deep or i == 1}
            if len(parts) > 1 and not deep:
                continue
            row: dict[str, Any] = {"type": "file", "path": path, "size": len(entry.data), "oid": entry.git_hash}
            if entry.large:
                row["lfs"] = {"oid": entry.sha256, "size": len(entry.data), "pointerSize": 130}
            rows.append(row)
        if base and not rows and not folders:
            return self.refuse(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        blank = {"type": "directory", "size": 0}
        return self.json(
            [{**blank, "path": f, "oid": hashlib.sha1(f.encode()).hexdigest()} for f in sorted(folders)] + rows
        )

    def resolve(self, kind: str | None, name: str, revision: str, path: str) -> None:
        repo = self.access(KINDS[kind or "models"], name, contents=True)
        if repo is None:
            return None
        commit = repo.at(revision)
        if commit is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        entry = repo.commits[commit].get(path)
        if entry is None:
            return self.refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry.git_hash}"', "Accept-Ranges": "bytes"}
        if not entry.large:
            return self.blob(entry.data, headers)
        linked = {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(len(entry.data))}
        return self.reply(302, b"", {**headers, **linked, "Location": f"{self.hub.cdn}/_lfs/{entry.sha256}"})

    # -- elsewhere

    def plain(self, name: str) -> None:
        data = self.hub.files.get(name)
        if data is None:
            return self.refuse(404, "", "no such file")
        tag = {"ETag": f'"{hashlib.md5(data).hexdigest()}"'} if self.hub.validators else {}
        return self.blob(data, {"Content-Type": "application/octet-stream", **tag})

    def page(self, name: str) -> None:
        self.reply(200, self.hub.pages[name].encode(), {"Content-Type": "text/html"})

    def drive(self) -> None:
        """Google Drive: a page with a form first, the file when its token comes back with the cookie."""
        data = self.hub.drive.get(self.query.get("id", ""))
        if data is None:
            return self.reply(404, b"<html>not found</html>", {"Content-Type": "text/html"})
        if (
            self.query.get("confirm") == "t"
            and self.query.get("uuid")
            and "warning=1" in self.headers.get("Cookie", "")
        ):
            return self.blob(data, {"Content-Type": "application/octet-stream"}, ranges=False)
        fields = {"id": self.query["id"], "export": "download", "confirm": "t", "uuid": "1-2-3"}
        inputs = "".join(f'<input type="hidden" name="{k}" value="{v}">' for k, v in fields.items())
        page = f'<html>too large to scan<form id="f" action="{self.hub.url}/drive" method="get">{inputs}</form></html>'
        return self.reply(200, page.encode(), {"Content-Type": "text/html; charset=utf-8", "Set-Cookie": "warning=1"})


_REPO = r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"/api/whoami-v2", Handler.who),
    (r"/api/repos/create", Handler.create),
    (r"/api/validate-yaml", Handler.validate),
    (r"/(?:(datasets|spaces)/)?([^/]+/[^/]+?)\.git/info/lfs/objects/batch", Handler.batch),
    (r"/_lfs/([0-9a-f]{64})", Handler.lfs),
    (r"/files/(.+)", Handler.plain),
    (r"/pages/(.+)", Handler.page),
    (r"/drive", Handler.drive),
    (
        rf"/api/(models|datasets|spaces)/{_REPO}(?:/(preupload|commit|tree|revision|refs|branch)(?:/([^/]+))?(?:/(.*))?)?",
        Handler.api,
    ),
    (rf"/(?:(datasets|spaces)/)?{_REPO}/(?:resolve|raw)/([^/]+)/(.+)", Handler.resolve),
]
