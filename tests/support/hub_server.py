# SPDX-License-Identifier: Apache-2.0
"""A small server that speaks the Hub's HTTP protocol on the loopback interface, for the real `huggingface_hub` client.

It keeps repositories with commits and branches in memory, takes small files inside commits and large ones through the
LFS batch protocol, and serves large ones from a second address, as the Hub does with its content delivery network.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LFS_SUFFIXES = (".bin", ".safetensors", ".model")
LFS_THRESHOLD = 64 * 1024


@dataclass
class Commit:
    oid: str
    files: dict[str, bytes]
    message: str = ""
    description: str = ""


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes], message: str = "", description: str = "") -> Commit:
        oid = hashlib.sha1(f"{branch} {len(self.commits)} {message} {sorted(files)}".encode()).hexdigest()
        commit = Commit(oid, files, message, description)
        self.commits[oid] = self.branches[branch] = commit
        return commit

    def find(self, revision: str) -> Commit | None:
        return self.branches.get(revision) or self.commits.get(revision)


def is_lfs(path: str, size: int) -> bool:
    return size > LFS_THRESHOLD or (path.endswith(LFS_SUFFIXES) and size > 0)


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubServer:
    """Start with `with HubServer() as hub:`.

    Attributes:
        endpoint: URL for `HF_ENDPOINT`.
        repositories: by id.
        users: user name by valid token.
        requests: (method, path) of every request, in order.
        leaks: requests to the second address that carried an access token.
        cut: number of bytes, by file name, after which the next downloads of that file lose their connection. Each
            download takes the first number of the list; when it is empty, downloads are whole.
        down: answer everything with status 503.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.users: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}
        self.verified: set[str] = set()
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[str] = []
        self.leaks: list[str] = []
        self.cut: dict[str, list[int]] = {}
        self.down = False
        self.lock = threading.Lock()
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, cdn)) for cdn in (False, True)]
        self.endpoint, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def __enter__(self) -> HubServer:
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def create(self, repo_id: str, files: dict[str, bytes], *, private: bool = False) -> Repository:
        """Puts a repository with one commit on `main` there, without the client."""
        repository = self.repositories[repo_id] = Repository(private)
        repository.commit("main", files, "initial commit")
        return repository

    def counts(self) -> Counter:
        """How often each method was asked for, by the kind of request."""
        return Counter(
            (method, "commit" if "/commit/" in path else "resolve" if "/resolve/" in path else "other")
            for method, path in self.requests
        )

    def downloaded(self) -> set[str]:
        """Names of the files that were downloaded, not only asked about."""
        return {
            path.rpartition("/")[2]
            for method, path in self.requests
            if method == "GET" and ("/resolve/" in path or path.startswith("/objects/"))
        }


class _Refusal(Exception):
    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.code, self.message = status, code, message


def _handler(hub: HubServer, cdn: bool) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def handle_request(self) -> None:
            url = urlsplit(self.path)
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
            with hub.lock:
                hub.requests.append((self.command, url.path))
                if self.headers.get("Range"):
                    hub.ranges.append(self.headers["Range"])
                if cdn and self.headers.get("Authorization"):
                    hub.leaks.append(url.path)
            try:
                if hub.down:
                    raise _Refusal(503, message="the Hub is down")
                routes = CDN_ROUTES if cdn else ROUTES
                for methods, pattern, action in routes:
                    match = re.fullmatch(pattern, url.path)
                    if match and self.command in methods.split():
                        names = {name: unquote(value) for name, value in match.groupdict().items() if value}
                        return action(self, hub, **names)
                raise _Refusal(404, message=f"no such address: {self.command} {url.path}")
            except _Refusal as refusal:
                headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
                self.answer({"error": refusal.message}, refusal.status, {k: v for k, v in headers.items() if v})

        do_GET = do_HEAD = do_POST = do_PUT = handle_request

        def answer(self, content: Any = b"", status: int = 200, headers: dict[str, str] | None = None) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def user(self) -> str | None:
            scheme, _, token = self.headers.get("Authorization", "").partition(" ")
            if not scheme:
                return None
            if token not in hub.users:
                raise _Refusal(401, message="Invalid credentials in Authorization header")
            return hub.users[token]

        def repository(self, repo: str, write: bool = False) -> Repository:
            user = self.user()
            repository = hub.repositories.get(repo)
            owned = user is not None and repo.startswith(user + "/")
            if repository is None or (repository.private and not owned):
                raise _Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
            if write and not owned:
                raise _Refusal(403 if user else 401, message="You don't have the rights to write to this repository")
            return repository

        def commit(self, repo: str, revision: str) -> Commit:
            commit = self.repository(repo).find(revision)
            if commit is None:
                raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return commit

        def send_file(self, data: bytes, name: str, headers: dict[str, str]) -> None:
            start, status, total = 0, 200, len(data)
            requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if requested:
                start = int(requested[1])
                end = int(requested[2] or total - 1)
                data, status = data[start : end + 1], 206
                headers = {**headers, "Content-Range": f"bytes {start}-{end}/{total}"}
            with hub.lock:
                cuts = hub.cut.get(name)
                cut = cuts.pop(0) if cuts and self.command == "GET" else None
            if cut is None:
                return self.answer(data, status, headers)
            self.send_response(status)
            for header, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(data[:cut])
            self.close_connection = True

    return Handler


# Repositories --------------------------------------------------------------------------------------------------------


def _create_repo(request: Any, hub: HubServer) -> None:
    user = request.user()
    if user is None:
        raise _Refusal(401, message="Invalid username or password.")
    body = json.loads(request.body)
    repo_id = f"{body.get('organization') or user}/{body['name']}"
    if not repo_id.startswith(user + "/"):
        raise _Refusal(403, message=f"You don't have the rights to create a model under {body['organization']}")
    answer = {"url": f"{hub.endpoint}/{repo_id}", "name": repo_id}
    if repo_id in hub.repositories:
        return request.answer({"error": "You already created this model repo", **answer}, 409)
    private = body.get("private") or body.get("visibility") == "private"
    hub.create(repo_id, {".gitattributes": b"*.bin filter=lfs\n"}, private=bool(private))
    request.answer(answer)


def _validate_yaml(request: Any, hub: HubServer) -> None:
    content = json.loads(request.body)["content"]
    metadata = re.match(r"---\n(.*?)\n---", content, re.S)
    valid = metadata and isinstance(yaml.safe_load(metadata[1]), dict)
    request.answer({"errors": [] if valid else [{"message": "no metadata"}], "warnings": []})


def _model_info(request: Any, hub: HubServer, repo: str, revision: str = "main") -> None:
    commit = request.commit(repo, revision)
    siblings = [{"rfilename": path} for path in sorted(commit.files)]
    private = hub.repositories[repo].private
    request.answer(
        {"_id": repo, "id": repo, "modelId": repo, "sha": commit.oid, "private": private, "tags": []}
        | {"siblings": siblings, "downloads": 0, "likes": 0, "disabled": False, "gated": False}
    )


def _tree(request: Any, hub: HubServer, repo: str, revision: str, path: str = "") -> None:
    files = request.commit(repo, revision).files
    prefix = path + "/" if path else ""
    inside = {name: data for name, data in files.items() if name.startswith(prefix)}
    if path and not inside:
        raise _Refusal(404, "EntryNotFound", f"{path} does not exist on {revision}")
    entries, folders = [], set()
    recursive = request.query.get("recursive", "").lower() in ("true", "1")
    for name, data in sorted(inside.items()):
        folder = name[len(prefix) :].rpartition("/")[0]
        if folder:
            folders.add(prefix + (folder if recursive else folder.split("/")[0]))
        if folder and not recursive:
            continue
        entry = {"type": "file", "path": name, "size": len(data), "oid": git_oid(data)}
        if is_lfs(name, len(data)):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        entries.append(entry)
    request.answer([{"type": "directory", "path": f, "size": 0, "oid": "0" * 40} for f in sorted(folders)] + entries)


def _refs(request: Any, hub: HubServer, repo: str) -> None:
    branches = [
        {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit.oid}
        for name, commit in request.repository(repo).branches.items()
        if not name.startswith("refs/")
    ]
    request.answer({"branches": branches, "converts": [], "tags": []})


def _create_branch(request: Any, hub: HubServer, repo: str, branch: str) -> None:
    repository = request.repository(repo, write=True)
    if branch in repository.branches:
        raise _Refusal(409, message=f"Reference already exists: {branch}")
    start = json.loads(request.body or b"{}").get("startingPoint") or "main"
    repository.branches[branch] = request.commit(repo, start)
    request.answer({})


# Upload --------------------------------------------------------------------------------------------------------------


def _preupload(request: Any, hub: HubServer, repo: str, revision: str) -> None:
    request.repository(repo, write=True)
    existing = request.commit(repo, revision).files
    answers = []
    for file in json.loads(request.body)["files"]:
        mode = "lfs" if is_lfs(file["path"], file["size"]) else "regular"
        data = existing.get(file["path"])
        oid = None if data is None else hashlib.sha256(data).hexdigest() if mode == "lfs" else git_oid(data)
        answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    request.answer({"files": answers})


def _lfs_batch(request: Any, hub: HubServer, repo: str) -> None:
    request.repository(repo, write=True)
    objects = []
    for item in json.loads(request.body)["objects"]:
        answer = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] not in hub.objects:
            answer["actions"] = {
                "upload": {"href": f"{hub.cdn}/objects/{item['oid']}", "header": {}},
                "verify": {"href": f"{hub.endpoint}/{repo}.git/info/lfs/objects/verify", "header": {}},
            }
        objects.append(answer)
    request.answer({"transfer": "basic", "objects": objects})


def _lfs_verify(request: Any, hub: HubServer, repo: str) -> None:
    request.repository(repo, write=True)
    item = json.loads(request.body)
    if len(hub.objects.get(item["oid"], b"")) != item["size"]:
        raise _Refusal(404, message="object not uploaded")
    hub.verified.add(item["oid"])
    request.answer({})


def _put_object(request: Any, hub: HubServer, oid: str) -> None:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise _Refusal(400, message="content does not match its checksum")
    hub.objects[oid] = request.body
    request.answer()


def _commit(request: Any, hub: HubServer, repo: str, revision: str) -> None:
    repository = request.repository(repo, write=True)
    files = dict(request.commit(repo, revision).files)
    header: dict[str, str] = {}
    for line in request.body.splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "header":
            header = value
        elif item["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif item["key"] == "lfsFile":
            if value["oid"] not in hub.verified:
                raise _Refusal(400, message=f"{value['path']} was not uploaded")
            files[value["path"]] = hub.objects[value["oid"]]
        elif item["key"] == "deletedFile":
            del files[value["path"]]
        else:
            raise _Refusal(400, message=f"unknown operation {item['key']}")
    answer = {"success": True}
    if request.query.get("create_pr"):
        number = 1 + sum(name.startswith("refs/pr/") for name in repository.branches)
        revision = f"refs/pr/{number}"
        answer["pullRequestUrl"] = f"{hub.endpoint}/{repo}/discussions/{number}"
    with hub.lock:
        commit = repository.commit(revision, files, header["summary"], header.get("description", ""))
    request.answer({**answer, "commitUrl": f"{hub.endpoint}/{repo}/commit/{commit.oid}", "commitOid": commit.oid})


# Download ------------------------------------------------------------------------------------------------------------


def _resolve(request: Any, hub: HubServer, repo: str, revision: str, path: str) -> None:
    commit = request.commit(repo, revision)
    headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
    if path not in commit.files:
        error = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
        return request.answer({"error": "Entry not found"}, 404, {**headers, **error})
    data = commit.files[path]
    if not is_lfs(path, len(data)):
        return request.send_file(data, path, {**headers, "ETag": f'"{git_oid(data)}"'})
    oid = hashlib.sha256(data).hexdigest()
    hub.objects[oid] = data
    headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{oid}"', "ETag": f'"{oid}"'}
    request.answer(b"", 302, {**headers, "Location": f"{hub.cdn}/objects/{oid}/{path}"})


def _get_object(request: Any, hub: HubServer, oid: str, name: str) -> None:
    request.send_file(hub.objects[oid], name.rpartition("/")[2], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_MODEL = rf"/api/models/{_REPO}"
_REVISION = r"(?P<revision>[^/]+)"
# (methods, path, action); more particular paths first
ROUTES = (
    ("POST", r"/api/repos/create", _create_repo),
    ("POST", r"/api/validate-yaml", _validate_yaml),
    ("GET", rf"{_MODEL}/refs", _refs),
    ("POST", rf"{_MODEL}/branch/(?P<branch>[^/]+)", _create_branch),
    ("POST", rf"{_MODEL}/preupload/{_REVISION}", _preupload),
    ("POST", rf"{_MODEL}/commit/{_REVISION}", _commit),
    ("GET", rf"{_MODEL}/tree/{_REVISION}(?:/(?P<path>.+))?", _tree),
    ("GET", rf"{_MODEL}/revision/{_REVISION}", _model_info),
    ("GET", _MODEL, _model_info),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _lfs_batch),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/verify", _lfs_verify),
    ("GET HEAD", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _resolve),
)
CDN_ROUTES = (
    ("PUT", r"/objects/(?P<oid>[0-9a-f]+)", _put_object),
    ("GET HEAD", r"/objects/(?P<oid>[0-9a-f]+)/(?P<name>.+)", _get_object),
)
