"""A stand-in for the Hub's HTTP interface, as far as pushing and loading need it, for huggingface_hub's own client."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

TOKEN = "hf_standin"


class Hub:
    """Repositories by id, each a dict of files by name; what goes wrong is set from outside.

    Attributes:
        forbidden: whether the token may not write; broken: part of a path at which connections end without an answer;
        requests: methods and paths, in order.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.forbidden, self.broken = False, ""
        self.requests: list[str] = []
        self.url = ""

    def sha(self, repo: str) -> str:
        return hashlib.sha1(repr(sorted(self.repos[repo].items())).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def reply(self, status: int, content=None, headers=None) -> None:
        body = content if isinstance(content, bytes) else json.dumps({} if content is None else content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | (headers or {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, what: str) -> None:
        self.reply(404, {"error": what}, {"X-Error-Code": what, "X-Error-Message": what})

    def handle_request(self) -> None:
        path = unquote(urlparse(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.broken and self.hub.broken in path:
            self.close_connection = True
            self.connection.close()
            return
        if path == "/api/whoami-v2":
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            self.reply(200, {"name": "you", "type": "user"}) if known else self.reply(401, {"error": "Invalid token"})
        elif path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            given = json.loads(body)
            repo = f"{given.get('organization') or 'you'}/{given['name']}"
            if self.hub.forbidden:
                self.reply(403, {"error": "Forbidden"})
            elif repo in self.hub.repos:
                self.reply(409, {"error": "exists", "url": f"{self.hub.url}/{repo}"})
            else:
                self.hub.repos[repo] = {".gitattributes": b""}
                self.reply(200, {"url": f"{self.hub.url}/{repo}", "id": repo, "name": repo})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(preupload|commit|tree|revision)/[^/]+)?", path):
            repo, action = found.groups()
            self.api(repo, action, body) if repo in self.hub.repos else self.missing("RepoNotFound")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self.file(*found.groups())
        else:
            self.reply(404, {"error": f"no such page: {path}"})

    def api(self, repo: str, action: str | None, body: bytes) -> None:
        files = self.hub.repos[repo]
        if action == "preupload":
            asked = json.loads(body)["files"]
            made = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in asked]
            self.reply(200, {"files": made})
        elif action == "commit":
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            sha = self.hub.sha(repo)
            url = f"{self.hub.url}/{repo}/commit/{sha}"
            self.reply(200, {"success": True, "commitOid": sha, "commitUrl": url})
        elif action == "tree":
            self.reply(200, [{"type": "file", "path": k, "size": len(v), "oid": "0"} for k, v in files.items()])
        else:
            self.reply(200, {"id": repo, "sha": self.hub.sha(repo), "siblings": [{"rfilename": k} for k in files]})

    def file(self, repo: str, name: str) -> None:
        if repo not in self.hub.repos:
            self.missing("RepoNotFound")
        elif name not in self.hub.repos[repo]:
            self.reply(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.hub.sha(repo)})
        else:
            content = self.hub.repos[repo][name]
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            self.reply(200, content, {"ETag": etag, "X-Repo-Commit": self.hub.sha(repo)})

    do_GET = do_POST = do_HEAD = handle_request


@contextmanager
def running():
    """The stand-in, on a free port."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
