"""The stand-in for the hub, with repositories that a client makes and uploads to."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PATH = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main")


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Hub:
    """What the hub holds.

    Attributes:
        token: the token that it takes.
        repositories: id -> repository.
        large: SHA-256 -> content, of files that are uploaded beside the commit.
        refused: "commit" or "large", which then answers 403.
        sent: number of large files that were uploaded.
        url: its address.
    """

    token: str = "hf_" + "t" * 34
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    refused: str = ""
    sent: int = 0
    url: str = ""


@contextmanager
def serve_uploads() -> Iterator[Hub]:
    """Serve an empty hub."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def answer(self, status: int, value: object = None, **headers: str) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            for name, one in headers.items():
                self.send_header(name.replace("_", "-"), one)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def read(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def known(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {hub.token}"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if not self.known():
                return self.answer(401, {"error": "Invalid credentials"})
            if path == "/api/whoami-v2":
                return self.answer(200, {"name": "owner", "type": "user", "orgs": []})
            name = path.removeprefix("/api/models/")
            found = hub.repositories.get(name)
            if found is None:
                return self.answer(404, {"error": "no"}, X_Error_Code="RepoNotFound")
            files = [{"rfilename": one} for one in found.files]
            about = {"id": name, "sha": "0" * 40, "private": found.private, "siblings": files}
            self.answer(200, about)

        def do_POST(self) -> None:
            content, path = self.read(), self.path.partition("?")[0]
            if path == "/api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            if not self.known():
                return self.answer(401, {"error": "Invalid credentials"})
            if path == "/api/repos/create":
                return self.made(json.loads(content))
            if path.endswith(".git/info/lfs/objects/batch"):
                return self.answer(200, batch(hub, json.loads(content)["objects"]))
            match = PATH.fullmatch(path)
            assert match is not None, path
            repository = hub.repositories[match[1]]
            if match[2] == "preupload":
                files = [mode(repository, one) for one in json.loads(content)["files"]]
                return self.answer(200, {"files": files})
            if hub.refused == "commit":
                return self.answer(403, {"error": "no"})
            for line in content.splitlines():
                keep(hub, repository, json.loads(line))
            self.answer(200, {"commitOid": "1" * 40, "commitUrl": f"{hub.url}/{match[1]}/commit/1"})

        def made(self, about: dict) -> None:
            name = f"{about['organization']}/{about['name']}"
            private = about.get("visibility") == "private" or about.get("private") is True
            status = 409 if name in hub.repositories else 200
            hub.repositories.setdefault(name, Repository(private))
            self.answer(status, {"url": f"{hub.url}/{name}"})

        def do_PUT(self) -> None:
            content = self.read()
            if hub.refused == "large":
                return self.answer(403, {"error": "no"})
            hub.large[hashlib.sha256(content).hexdigest()] = content
            hub.sent += 1
            self.answer(200)

    return Handler


def batch(hub: Hub, objects: list[dict]) -> dict:
    """Return where large files go; those that are here have no place to go to."""
    found = []
    for one in objects:
        place = {"upload": {"href": f"{hub.url}/large/{one['oid']}"}}
        found.append(one | ({} if one["oid"] in hub.large else {"actions": place}))
    return {"transfer": "basic", "objects": found}


def mode(repository: Repository, one: dict) -> dict:
    large = one["path"].endswith(".safetensors")
    there = repository.files.get(one["path"])
    oid = None
    if there is not None:
        oid = hashlib.sha256(there).hexdigest() if large else git_hash(there)
    return {
        "path": one["path"],
        "uploadMode": "lfs" if large else "regular",
        "shouldIgnore": False,
        "oid": oid,
    }


def keep(hub: Hub, repository: Repository, line: dict) -> None:
    about = line["value"]
    if line["key"] == "file":
        repository.files[about["path"]] = base64.b64decode(about["content"])
    elif line["key"] == "lfsFile":
        repository.files[about["path"]] = hub.large[about["oid"]]
