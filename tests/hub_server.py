"""A stand-in for the hub: folders of a disk, served as the hub's client asks for them."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

FILE = re.compile(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
API = re.compile(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")


@contextmanager
def serve(root: Path) -> Iterator[str]:
    """Serve `root`/OWNER__NAME/REVISION, slashes of a revision as underscores, at the URL given."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(root))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def commit_of(folder: Path) -> str:
    return hashlib.sha1(folder.name.encode()).hexdigest()


def entry(path: Path, folder: Path) -> dict:
    name = str(path.relative_to(folder))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0", "size": 0}
    oid = hashlib.sha1(path.read_bytes()).hexdigest()
    return {"type": "file", "path": name, "oid": oid, "size": path.stat().st_size}


def handler_of(root: Path) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def folder(self, repo: str, revision: str) -> Path | None:
            place = root / repo.replace("/", "__")
            wanted = unquote(revision).replace("/", "_")
            revisions = place.iterdir() if place.is_dir() else ()
            return next((p for p in revisions if wanted in (p.name, commit_of(p))), None)

        def missing(self, repo: str) -> None:
            known = (root / repo.replace("/", "__")).is_dir()
            self.answer(404, X_Error_Code="RevisionNotFound" if known else "RepoNotFound")

        def do_GET(self) -> None:
            url = urlparse(self.path)
            if match := FILE.fullmatch(url.path):
                self.file(*match.groups())
            elif match := API.fullmatch(url.path):
                self.api(*match.groups(), recursive="recursive=true" in url.query.lower())
            else:
                self.answer(404)

        do_HEAD = do_POST = do_GET  # noqa: N815

        def file(self, repo: str, revision: str, name: str) -> None:
            folder = self.folder(repo, revision)
            if folder is None:
                return self.missing(repo)
            path = folder / unquote(name)
            if not path.is_file():
                commit = commit_of(folder)
                return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            body = path.read_bytes()
            headers = {
                "ETag": f'"{entry(path, folder)["oid"]}"',
                "X_Repo_Commit": commit_of(folder),
            }
            wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if wanted is None or self.command == "HEAD":
                return self.answer(200, body, **headers)
            first, last = int(wanted[1]), min(int(wanted[2] or len(body)), len(body) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(body)}"
            self.answer(206, body[first : last + 1], **headers)

        def api(
            self, repo: str, kind: str | None, revision: str | None, name: str | None,
            *, recursive: bool,
        ) -> None:  # fmt: skip
            folder = self.folder(repo, revision or "main")
            if folder is None:
                return self.missing(repo)
            if kind == "tree":
                below = folder / unquote(name or "")
                if not below.is_dir():
                    return self.answer(404, X_Error_Code="EntryNotFound")
                paths = sorted(below.rglob("*") if recursive else below.iterdir())
            elif kind == "paths-info":
                sent = self.rfile.read(int(self.headers["Content-Length"])).decode()
                names: dict = json.loads(sent) if sent[:1] == "{" else parse_qs(sent)
                wanted = names["paths"] if isinstance(names["paths"], list) else [names["paths"]]
                paths = [folder / one for one in wanted if (folder / one).exists()]
            else:
                files = [{"rfilename": str(p.relative_to(folder))} for p in folder.rglob("*.*")]
                found = {"id": repo, "sha": commit_of(folder), "siblings": files}
                return self.answer(200, json.dumps(found).encode())
            self.answer(200, json.dumps([entry(path, folder) for path in paths]).encode())

    return Handler
