"""A small model Hub on loopback, for tests that push and pull without a network.

It speaks the part of the Hub's HTTP interface that `huggingface_hub` uses for model repositories: create,
preupload, git-LFS batch and PUT, commit (NDJSON), branches, model info, tree, resolve (HEAD and GET), whoami. Datasets
are read only: `HubServer.add_dataset` makes one, and its repository is called `datasets/<owner>/<name>`.
Everything is held in memory; each branch has one linear history. Tokens are checked: writing needs a token of
the namespace's owner, and private repositories answer strangers as if they did not exist, as on the Hub.

`huggingface_hub` reads its endpoint and token from the environment when it is imported, so clients are
separate processes started with `HubServer.environment`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

__all__ = ["Commit", "HubServer", "Repo", "StoredFile", "run_hub_server"]

# Names that the Hub stores through git-LFS whatever their size.
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")


@dataclass(frozen=True)
class StoredFile:
    """One file of one commit."""

    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        """Git's blob id of a regular file, the sha256 of an LFS file: what the Hub reports for each."""
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass(frozen=True)
class Commit:
    """A commit: the whole tree after it, and what it said."""

    oid: str
    message: str
    files: dict[str, StoredFile]


@dataclass
class Repo:
    """A repository; `branches` maps a name to its commits, oldest first."""

    repo_id: str
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def commit(self, branch: str, message: str, files: dict[str, StoredFile]) -> Commit:
        """Append a commit whose tree is `files`."""
        history = self.branches[branch]
        parent = history[-1].oid if history else ""
        seed = json.dumps([self.repo_id, branch, parent, message, sorted((p, f.oid) for p, f in files.items())])
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), message, files)
        history.append(commit)
        return commit

    def find(self, revision: str) -> Commit | None:
        """The commit that a branch name or a commit id names."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for history in self.branches.values() for c in history if c.oid == revision), None)


class HubServer:
    """The state of the Hub and its address.

    Attributes:
        url: endpoint, for `HF_ENDPOINT`.
        tokens: access token -> user name. A user may write below the namespace of that name.
        repos: repository id -> `Repo`.
        requests: "METHOD path" of every request served, in order.
        failing: part of the paths that are answered with an error of the server; none while it is empty.
    """

    def __init__(self, url: str, tokens: dict[str, str]) -> None:
        self.url = url
        self.tokens = tokens
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.failing = ""
        self.lock = threading.Lock()

    def environment(self, home: str | Path, token: str | None = None) -> dict[str, str]:
        """Environment variables of a client process: this Hub, its own empty cache, and `token` if any."""
        home = Path(home)
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_MODULES_CACHE": str(home / "modules"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        # An empty value counts as "no token" for huggingface_hub and hides the developer's own.
        variables["HF_TOKEN"] = variables["HUGGING_FACE_HUB_TOKEN"] = token or ""
        return variables

    def add_dataset(self, repo_id: str, files: dict[str, bytes], revision: str = "main") -> None:
        """A public dataset; another `revision` is added beside `main`."""
        repo = self.repos.setdefault(f"datasets/{repo_id}", Repo(f"datasets/{repo_id}", False, {"main": []}))
        if not repo.branches["main"]:
            repo.commit("main", "initial commit", {})
        repo.branches.setdefault(revision, [])
        repo.commit(revision, "add files", {path: StoredFile(content, False) for path, content in files.items()})

    def head(self, repo_id: str, revision: str = "main") -> Commit:
        """The newest commit of a branch, for assertions."""
        commit = self.repos[repo_id].find(revision)
        assert commit is not None, f"{repo_id} has no revision {revision!r}"
        return commit

    def text(self, repo_id: str, path: str, revision: str = "main") -> str:
        """A text file of the newest commit, for assertions."""
        return self.head(repo_id, revision).files[path].content.decode()


class _HubError(Exception):
    """An answer that is an error: status, the Hub's error code (or "") and a message."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers


class _Handler(BaseHTTPRequestHandler):
    """Routes requests to the state in `self.hub`."""

    protocol_version = "HTTP/1.1"  # keep-alive and chunked uploads
    hub: HubServer

    # -- plumbing

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are kept in `HubServer.requests` rather than printed."""

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        body = self._read_body()
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {self.path}")
            try:
                if self.hub.failing and self.hub.failing in self.path:
                    raise _HubError(500, "", "Internal Server Error")
                status, content, headers = self._route(parts, body)
            except _HubError as error:
                status, headers = error.status, {"X-Error-Message": error.message, **error.headers}
                if error.code:
                    headers["X-Error-Code"] = error.code
                content = json.dumps({"error": error.message}).encode()
        self.send_response(status)
        headers.setdefault("Content-Type", "application/json")
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    # -- access

    def _user(self) -> str | None:
        """Name of the caller, None without a token; an unknown token is an error wherever it is used."""
        header = self.headers.get("Authorization")
        if not header:
            return None
        token = header.removeprefix("Bearer ")
        if token not in self.hub.tokens:
            raise _HubError(401, "", "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def _repo(self, repo_id: str, *, write: bool = False) -> Repo:
        user, owner = self._user(), repo_id.split("/")[0]
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and user != owner):
            raise _HubError(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and user is None:
            raise _HubError(401, "", "Invalid username or password.")
        if write and user != owner:
            raise _HubError(403, "", f"You don't have write access to {repo_id}")
        return repo

    def _commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.find(revision)
        if commit is None:
            raise _HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # -- routes

    def _route(self, parts: list[str], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        reading = self.command in ("GET", "HEAD")
        match parts:
            case ["api", "whoami-v2"]:
                return self._json(self._whoami())
            case ["api", "validate-yaml"]:
                return self._validate_yaml(json.loads(body)["content"])
            case ["api", "repos", "create"]:
                return self._create(json.loads(body))
            case ["api", "models", owner, name]:
                repo = self._repo(f"{owner}/{name}")
                return self._json(self._info(repo, self._commit(repo, "main")))
            case ["api", "models", owner, name, "revision", revision]:
                repo = self._repo(f"{owner}/{name}")
                return self._json(self._info(repo, self._commit(repo, revision)))
            case ["api", "models", owner, name, "tree", revision, *path]:
                return self._tree(self._repo(f"{owner}/{name}"), revision, "/".join(path))
            case ["api", "models", owner, name, "branch", branch]:
                return self._branch(self._repo(f"{owner}/{name}", write=True), branch, json.loads(body or b"{}"))
            case ["api", "models", owner, name, "preupload", revision]:
                repo = self._repo(f"{owner}/{name}", write=True)
                return self._preupload(self._commit(repo, revision), json.loads(body))
            case ["api", "models", owner, name, "commit", revision]:
                return self._receive_commit(self._repo(f"{owner}/{name}", write=True), revision, body)
            case ["api", "datasets", owner, name, *rest]:
                return self._dataset(self._repo(f"datasets/{owner}/{name}"), rest, body)
            case ["datasets", owner, name, "resolve", revision, *path] if reading and path:
                return self._resolve(self._repo(f"datasets/{owner}/{name}"), revision, "/".join(path))
            case [owner, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                self._repo(f"{owner}/{name.removesuffix('.git')}", write=True)
                return self._lfs_batch(json.loads(body))
            case ["lfs-store", oid] if self.command == "PUT":
                return self._lfs_put(oid, body)
            case [owner, name, "resolve", revision, *path] if reading and path:
                return self._resolve(self._repo(f"{owner}/{name}"), revision, "/".join(path))
        raise _HubError(404, "", f"This Hub does not serve {self.command} {self.path}")

    def _dataset(self, repo: Repo, rest: list[str], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        match rest:
            case [] | ["revision", _]:
                return self._json(self._info(repo, self._commit(repo, rest[1] if rest else "main")))
            case ["tree", revision, *path]:
                return self._tree(repo, revision, "/".join(path))
            case ["paths-info", revision]:
                files = self._commit(repo, revision).files
                asked = parse_qs(body.decode())["paths"]
                return self._json([self._entry(path, files[path]) for path in asked if path in files])
        raise _HubError(404, "EntryNotFound", f"This Hub does not serve {self.command} {self.path}")

    @staticmethod
    def _json(value: Any, status: int = 200, **headers: str) -> tuple[int, bytes, dict[str, str]]:
        return status, json.dumps(value).encode(), dict(headers)

    def _whoami(self) -> dict[str, Any]:
        user = self._user()
        if user is None:
            raise _HubError(401, "", "Invalid username or password.")
        return {"type": "user", "name": user, "fullname": user, "orgs": [], "auth": {"type": "access_token"}}

    def _validate_yaml(self, content: str) -> tuple[int, bytes, dict[str, str]]:
        header = content.split("---\n", 2)
        try:
            metadata = yaml.safe_load(header[1]) if content.startswith("---\n") and len(header) == 3 else {}
        except yaml.YAMLError as error:
            return self._json({"errors": [{"message": str(error)}], "warnings": []}, status=400)
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return self._json({"errors": [], "warnings": warnings})

    def _create(self, request: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        user = self._user()
        if user is None:
            raise _HubError(401, "", "Invalid username or password.")
        if request.get("type", "model") != "model":
            raise _HubError(400, "", f"This Hub holds models only, not {request['type']!r}")
        owner = request.get("organization") or user
        if owner != user:
            raise _HubError(403, "", f"You don't have the rights to create a model under the namespace {owner!r}")
        repo_id = f"{owner}/{request['name']}"
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repos:
            # huggingface_hub reads `url` from this answer too when `exist_ok=True`.
            return self._json({"error": "You already created this model repo", "url": url}, status=409)
        private = request.get("visibility") == "private" or bool(request.get("private"))
        repo = self.hub.repos[repo_id] = Repo(repo_id, private, {"main": []})
        repo.commit("main", "initial commit", {})
        return self._json({"url": url, "name": repo_id, "id": repo_id})

    @staticmethod
    def _info(repo: Repo, commit: Commit) -> dict[str, Any]:
        return {
            "_id": hashlib.sha1(repo.repo_id.encode()).hexdigest()[:24],
            "id": repo.repo_id.removeprefix("datasets/"),
            "modelId": repo.repo_id,
            "author": repo.repo_id.split("/")[0],
            "sha": commit.oid,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }

    def _tree(self, repo: Repo, revision: str, folder: str) -> tuple[int, bytes, dict[str, str]]:
        commit = self._commit(repo, revision)
        prefix = f"{folder}/" if folder else ""
        inside = {path: file for path, file in sorted(commit.files.items()) if path.startswith(prefix)}
        if folder and not inside:
            raise _HubError(404, "EntryNotFound", f"{folder} does not exist", **{"X-Repo-Commit": commit.oid})
        recursive = "recursive=true" in urlsplit(self.path).query.lower()
        entries: dict[str, dict[str, Any]] = {}
        for path, file in inside.items():
            head, *rest = path.removeprefix(prefix).split("/")
            if rest and not recursive:
                name = prefix + head
                entries[name] = {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
                continue
            entries[path] = self._entry(path, file)
        return self._json(list(entries.values()))

    @staticmethod
    def _entry(path: str, file: StoredFile) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
        if file.is_lfs:
            entry["oid"] = hashlib.sha1(file.oid.encode()).hexdigest()
            entry["lfs"] = {"oid": file.oid, "size": len(file.content), "pointerSize": 134}
        return entry

    def _branch(self, repo: Repo, branch: str, request: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        if branch in repo.branches:
            raise _HubError(409, "", f"Reference already exists: refs/heads/{branch}")
        start = self._commit(repo, request.get("startingPoint", "main"))
        repo.branches[branch] = [start]
        return self._json({})

    def _preupload(self, commit: Commit, request: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        answers = []
        for entry in request["files"]:
            path = entry["path"]
            is_lfs = path.endswith(LFS_SUFFIXES) or entry["size"] > 10_000_000
            answer = {"path": path, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False}
            if path in commit.files:
                answer["oid"] = commit.files[path].oid
            answers.append(answer)
        return self._json({"files": answers})

    def _lfs_batch(self, request: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        objects = []
        for entry in request["objects"]:
            item = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.hub.lfs:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs-store/{entry['oid']}"}}
            objects.append(item)
        return self._json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, oid: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _HubError(400, "", f"The content sent does not have the sha256 {oid}")
        self.hub.lfs[oid] = body
        return self._json({})

    def _receive_commit(self, repo: Repo, branch: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        if branch not in repo.branches:
            raise _HubError(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        files = dict(repo.branches[branch][-1].files)
        message = ""
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = StoredFile(base64.b64decode(value["content"]), is_lfs=False)
                case "lfsFile":
                    if value["oid"] not in self.hub.lfs:
                        raise _HubError(400, "", f"LFS object {value['oid']} of {value['path']} was not uploaded")
                    files[value["path"]] = StoredFile(self.hub.lfs[value["oid"]], is_lfs=True)
                case "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise _HubError(404, "EntryNotFound", f"No file {value['path']!r} to delete")
                case "deletedFolder":
                    prefix = value["path"].rstrip("/") + "/"
                    files = {path: file for path, file in files.items() if not path.startswith(prefix)}
                case other:
                    raise _HubError(400, "", f"Unknown commit operation {other!r}")
        commit = repo.commit(branch, message, files)
        url = f"{self.hub.url}/{repo.repo_id}/commit/{commit.oid}"
        return self._json({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    def _resolve(self, repo: Repo, revision: str, path: str) -> tuple[int, bytes, dict[str, str]]:
        commit = self._commit(repo, revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            raise _HubError(404, "EntryNotFound", f"{path} does not exist on {revision!r}", **headers)
        file = commit.files[path]
        headers["ETag"] = f'"{file.oid}"'
        if file.is_lfs:
            headers["X-Linked-ETag"], headers["X-Linked-Size"] = headers["ETag"], str(len(file.content))
        wanted = self.headers.get("Range", "")
        if not wanted.startswith("bytes="):
            return 200, file.content, {"Content-Type": "application/octet-stream", **headers}
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        stop = min(int(last) + 1, len(file.content)) if last else len(file.content)
        headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(file.content)}"
        return 206, file.content[int(first) : stop], {"Content-Type": "application/octet-stream", **headers}


@contextmanager
def run_hub_server(tokens: dict[str, str] | None = None) -> Iterator[HubServer]:
    """Serve a Hub on a free loopback port until the block ends.

    Args:
        tokens: access token -> user name; one user "tester" with the token "hf_tester" when None.
    """
    hub = HubServer("", {"hf_tester": "tester"} if tokens is None else tokens)
    handler = type("BoundHandler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
