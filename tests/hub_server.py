"""
A Hugging Face Hub on the loopback interface, as much of it as `huggingface_hub` needs to create a repository, upload a
folder to it and download files from it again.

Repositories hold models only, have one branch ("main") and live in memory. Every file's content is kept under its
SHA-256; *.safetensors go through LFS, as on the real Hub. Requests can be made to fail or to wait.
"""

import base64
import hashlib
import json
import os
import re
import secrets
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest


@dataclass
class File:
    sha256: str
    git_oid: str
    size: int
    is_lfs: bool

    @property
    def oid(self) -> str:
        """What the client compares with its own file."""
        return self.sha256 if self.is_lfs else self.git_oid

    def as_json(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "oid": self.git_oid, "size": self.size}
        if self.is_lfs:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
        return entry


@dataclass
class Repo:
    commit: str = field(default_factory=lambda: secrets.token_hex(20))
    files: dict[str, File] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)  # of the commits
    lfs_objects: set[str] = field(default_factory=set)  # committed or not
    private: bool = False


class Refusal(Exception):
    """Answered with an error status and, for 404, the code that tells a missing file from a missing repository."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


@dataclass
class Failure:
    """
    What becomes of the next `times` requests of which `pattern` matches a part of "METHOD /path".

    `kind` is the status of an answer, with `headers`, or "drop" (the connection is closed without an answer),
    "drop the answer" (after the request has been done) or "hold" (until `release`).
    """

    pattern: str
    kind: int | str
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    arrived: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)


class Hub:
    """
    `with Hub() as hub:` serves at `hub.url`; `hub.requests` lists "METHOD /path" of every request so far.

    `tokens` maps valid tokens to "read" or "write"; without it there is no check of tokens. `storage_url` is another
    name of the server under which LFS uploads go to it, if it is to look like a storage apart.
    """

    def __init__(self, user: str = "user", tokens: dict[str, str] | None = None):
        self.user = user
        self.tokens = tokens
        self.repos: dict[str, Repo] = {}
        self.contents: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.failures: list[Failure] = []
        self.is_closing = False
        handler = type("Handler", (HubHandler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.handle_error = lambda *args: None  # clients may be gone before their answer
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.storage_url = self.url

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.is_closing = True
        for failure in self.failures:
            failure.release.set()
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of processes whose `huggingface_hub` takes this for the Hub, with its cache in `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        switched_off = dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY"), "1")
        return {
            **kept,
            **switched_off,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def set_environment(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        """Gives this process, and those that it starts, [`environment`]."""
        environment = self.environment(home)
        for name in set(os.environ) - set(environment):
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    def repo(self, repo_id: str) -> Repo:
        if repo_id not in self.repos:
            raise Refusal(404, "Repository not found", code="RepoNotFound")
        return self.repos[repo_id]

    def fail(self, pattern: str, kind: int | str, times: int = 1, **headers: str) -> Failure:
        """Has the next `times` requests fail in a way of [`Failure`]; `_` in names of `headers` stands for `-`."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.failures.append(Failure(pattern, kind, times, headers))
        return self.failures[-1]

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, request) is not None for request in self.requests)

    def store(self, content: bytes) -> File:
        sha256 = hashlib.sha256(content).hexdigest()
        self.contents[sha256] = content
        git_oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return File(sha256, git_oid, len(content), is_lfs=False)


class HubHandler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.read_body()
        failure = self.next_failure(f"{self.command} {path}")
        if failure is not None and failure.kind == "hold":
            failure.arrived.set()
            failure.release.wait()
            self.is_dropped = self.hub.is_closing
        elif failure is not None and isinstance(failure.kind, int):
            self.reply({"error": "as the test wants it"}, status=failure.kind, headers=failure.headers)
            return
        elif failure is not None:
            self.is_dropped = True
        if self.is_dropped and failure.kind != "drop the answer":
            self.close_connection = True
            return
        for method, pattern, endpoint in ENDPOINTS:
            match = re.fullmatch(pattern, path)
            if method == self.command and match:
                try:
                    self.authorize(is_writing=endpoint in WRITING, **match.groupdict())
                    endpoint(self, body, **match.groupdict())
                except Refusal as error:
                    self.reply({"error": str(error)}, status=error.status, headers=error.headers)
                return
        self.reply({"error": f"no endpoint {self.command} {path}"}, status=404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request
    is_dropped = False

    def next_failure(self, request: str) -> Failure | None:
        for failure in self.hub.failures:
            if failure.times > 0 and re.search(failure.pattern, request):
                failure.times -= 1
                return failure
        return None

    def authorize(self, is_writing: bool, repo_id: str | None = None, **parts: str) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.hub.tokens is None or not (token or is_writing):
            return
        if token not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        is_own = repo_id is None or repo_id.startswith(f"{self.hub.user}/")
        if is_writing and not (is_own and self.hub.tokens[token] == "write"):
            raise Refusal(403, "Forbidden: you must use a write token to write to a repository")

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def reply(self, content: dict | list | bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if self.is_dropped:
            self.close_connection = True
            return
        payload = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.send_header("Content-Type", "application/octet-stream" if content is payload else "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)

    # ------------------------------------------------------------------------------------------------- reading

    def whoami(self, body: bytes) -> None:
        if self.hub.tokens is not None and "Authorization" not in self.headers:
            raise Refusal(401, "Invalid username or password.")
        self.reply({"type": "user", "name": self.hub.user, "orgs": []})

    def info(self, body: bytes, repo_id: str) -> None:
        repo = self.hub.repo(repo_id)
        siblings = [{"rfilename": path} for path in sorted(repo.files)]
        self.reply({"id": repo_id, "sha": repo.commit, "private": repo.private, "tags": [], "siblings": siblings})

    def tree(self, body: bytes, repo_id: str) -> None:
        self.reply([file.as_json(path) for path, file in sorted(self.hub.repo(repo_id).files.items())])

    def resolve(self, body: bytes, repo_id: str, path: str) -> None:
        repo = self.hub.repo(repo_id)
        if path not in repo.files:
            raise Refusal(404, "Entry not found", code="EntryNotFound")
        file = repo.files[path]
        self.reply(self.hub.contents[file.sha256], headers={"X-Repo-Commit": repo.commit, "ETag": f'"{file.oid}"'})

    # ------------------------------------------------------------------------------------------------- writing

    def create(self, body: bytes) -> None:
        request = json.loads(body)
        repo_id = f"{request.get('organization') or self.hub.user}/{request['name']}"
        self.authorize(is_writing=True, repo_id=repo_id)
        status = 409 if repo_id in self.hub.repos else 200
        self.hub.repos.setdefault(
            repo_id, Repo(private="private" in (request.get("visibility"), request.get("private") and "private"))
        )
        self.reply({"url": f"{self.hub.url}/{repo_id}", "name": repo_id}, status=status)

    def validate_yaml(self, body: bytes) -> None:
        self.reply({"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo_id: str) -> None:
        repo = self.hub.repo(repo_id)
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": repo.files[file["path"]].oid if file["path"] in repo.files else None,
            }
            for file in json.loads(body)["files"]
        ]
        self.reply({"files": modes, "commitOid": repo.commit})

    def lfs_batch(self, body: bytes, repo_id: str) -> None:
        objects = []
        for entry in json.loads(body)["objects"]:
            known = {"oid": entry["oid"], "size": entry["size"]}
            href = f"{self.hub.storage_url}/lfs/{repo_id}/{entry['oid']}"
            is_there = entry["oid"] in self.hub.repo(repo_id).lfs_objects
            objects.append(known if is_there else known | {"actions": {"upload": {"href": href, "header": {}}}})
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_upload(self, body: bytes, repo_id: str, oid: str) -> None:
        file = self.hub.store(body)
        if file.sha256 != oid:
            raise Refusal(400, "The content has another hash")
        self.hub.repo(repo_id).lfs_objects.add(oid)
        self.reply({})

    def commit(self, body: bytes, repo_id: str) -> None:
        repo = self.hub.repo(repo_id)
        files, message = dict(repo.files), ""
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = self.hub.store(base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile":
                if value["oid"] not in repo.lfs_objects:
                    raise Refusal(400, "The LFS object has not been uploaded")
                file = self.hub.store(self.hub.contents[value["oid"]])
                files[value["path"]] = File(file.sha256, file.git_oid, file.size, is_lfs=True)
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            else:
                assert operation["key"] == "header", operation["key"]
                message = value["summary"]
        repo.files, repo.commit = files, secrets.token_hex(20)
        repo.messages.append(message)
        url = f"{self.hub.url}/{repo_id}/commit/{repo.commit}"
        self.reply({"success": True, "commitOid": repo.commit, "commitUrl": url})


REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
REVISION = "[^/]+"  # a branch or a commit; there is one of each
ENDPOINTS = [
    ("GET", "/api/whoami-v2", HubHandler.whoami),
    ("GET", f"/api/models/{REPO}(/revision/{REVISION})?", HubHandler.info),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}", HubHandler.tree),
    ("HEAD", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", HubHandler.resolve),
    ("GET", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", HubHandler.resolve),
    ("POST", "/api/repos/create", HubHandler.create),
    ("POST", "/api/validate-yaml", HubHandler.validate_yaml),
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}", HubHandler.preupload),
    ("POST", f"/{REPO}\\.git/info/lfs/objects/batch", HubHandler.lfs_batch),
    ("PUT", f"/lfs/{REPO}/(?P<oid>[0-9a-f]{{64}})", HubHandler.lfs_upload),
    ("POST", f"/api/models/{REPO}/commit/{REVISION}", HubHandler.commit),
]
# The address of an LFS upload needs no token of its own, as on the real Hub.
WRITING = (HubHandler.create, HubHandler.preupload, HubHandler.lfs_batch, HubHandler.commit)
