"""
A Hugging Face Hub on the loopback interface, as much of it as `huggingface_hub` needs to create a repository, upload a
folder to it and download files from it again.

Repositories hold models only, have one branch ("main") and live in memory. Every file's content is kept under its
SHA-256; *.safetensors go through LFS, as on the real Hub.
"""

import base64
import hashlib
import json
import re
import secrets
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class File:
    sha256: str
    git_oid: str
    size: int
    is_lfs: bool

    def as_json(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "oid": self.git_oid, "size": self.size}
        if self.is_lfs:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
        return entry


@dataclass
class Repo:
    commit: str = field(default_factory=lambda: secrets.token_hex(20))
    files: dict[str, File] = field(default_factory=dict)


class NotFound(Exception):
    """Answered with 404 and the code by which the client tells a missing file from a missing repository."""

    def __init__(self, code: str):
        super().__init__(code)
        self.code = code


class Hub:
    """`with Hub() as hub:` serves at `hub.url`; `hub.requests` lists "METHOD /path" of every request so far."""

    def __init__(self, user: str = "user"):
        self.user = user
        self.repos: dict[str, Repo] = {}
        self.contents: dict[str, bytes] = {}
        self.requests: list[str] = []
        handler = type("Handler", (HubHandler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()

    def repo(self, repo_id: str) -> Repo:
        if repo_id not in self.repos:
            raise NotFound("RepoNotFound")
        return self.repos[repo_id]

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
        for method, pattern, endpoint in ENDPOINTS:
            match = re.fullmatch(pattern, path)
            if method == self.command and match:
                try:
                    endpoint(self, body, **match.groupdict())
                except NotFound as error:
                    self.reply({"error": error.code}, status=404, headers={"X-Error-Code": error.code})
                return
        self.reply({"error": f"no endpoint {self.command} {path}"}, status=404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

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

    def info(self, body: bytes, repo_id: str) -> None:
        repo = self.hub.repo(repo_id)
        siblings = [{"rfilename": path} for path in sorted(repo.files)]
        self.reply({"id": repo_id, "sha": repo.commit, "private": False, "tags": [], "siblings": siblings})

    def tree(self, body: bytes, repo_id: str) -> None:
        self.reply([file.as_json(path) for path, file in sorted(self.hub.repo(repo_id).files.items())])

    def resolve(self, body: bytes, repo_id: str, path: str) -> None:
        repo = self.hub.repo(repo_id)
        if path not in repo.files:
            raise NotFound("EntryNotFound")
        file = repo.files[path]
        etag = file.sha256 if file.is_lfs else file.git_oid
        self.reply(self.hub.contents[file.sha256], headers={"X-Repo-Commit": repo.commit, "ETag": f'"{etag}"'})

    # ------------------------------------------------------------------------------------------------- writing

    def create(self, body: bytes) -> None:
        request = json.loads(body)
        repo_id = f"{request.get('organization') or self.hub.user}/{request['name']}"
        status = 409 if repo_id in self.hub.repos else 200
        self.hub.repos.setdefault(repo_id, Repo())
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
                "oid": repo.files[file["path"]].git_oid if file["path"] in repo.files else None,
            }
            for file in json.loads(body)["files"]
        ]
        self.reply({"files": modes, "commitOid": repo.commit})

    def lfs_batch(self, body: bytes, repo_id: str) -> None:
        objects = [
            {
                "oid": entry["oid"],
                "size": entry["size"],
                "actions": {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}", "header": {}}},
            }
            for entry in json.loads(body)["objects"]
        ]
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_upload(self, body: bytes, oid: str) -> None:
        file = self.hub.store(body)
        self.reply({}, status=200 if file.sha256 == oid else 400)

    def commit(self, body: bytes, repo_id: str) -> None:
        repo = self.hub.repo(repo_id)
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                repo.files[value["path"]] = self.hub.store(base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile":
                file = self.hub.store(self.hub.contents[value["oid"]])  # a KeyError if it was never uploaded
                repo.files[value["path"]] = File(file.sha256, file.git_oid, file.size, is_lfs=True)
            else:
                assert operation["key"] == "header", operation["key"]
        repo.commit = secrets.token_hex(20)
        url = f"{self.hub.url}/{repo_id}/commit/{repo.commit}"
        self.reply({"success": True, "commitOid": repo.commit, "commitUrl": url})


REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
REVISION = "[^/]+"  # a branch or a commit; there is one of each
ENDPOINTS = [
    ("GET", f"/api/models/{REPO}(/revision/{REVISION})?", HubHandler.info),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}", HubHandler.tree),
    ("HEAD", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", HubHandler.resolve),
    ("GET", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", HubHandler.resolve),
    ("POST", "/api/repos/create", HubHandler.create),
    ("POST", "/api/validate-yaml", HubHandler.validate_yaml),
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}", HubHandler.preupload),
    ("POST", f"/{REPO}\\.git/info/lfs/objects/batch", HubHandler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", HubHandler.lfs_upload),
    ("POST", f"/api/models/{REPO}/commit/{REVISION}", HubHandler.commit),
]
