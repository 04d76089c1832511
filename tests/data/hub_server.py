"""A stand-in for the hub: one data set, me/set, with the few addresses that `datasets` and its client ask for."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

COMMIT = "a" * 40


def _handler(root: Path, asked: list[str]) -> type[BaseHTTPRequestHandler]:
    def entry(path: Path) -> dict:
        name, is_file = path.relative_to(root).as_posix(), path.is_file()
        oid = hashlib.sha1(name.encode()).hexdigest()
        size = path.stat().st_size if is_file else 0
        return {"type": "file" if is_file else "directory", "path": name, "size": size, "oid": oid}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, code, body=b"", **headers):
            self.send_response(code)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def json(self, value):
            self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

        def missing(self, what):
            self.answer(404, b"{}", X_Error_Code=what, X_Error_Message=what)

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
            self.json([entry(root / path) for path in paths if (root / path).exists()])

        def do_GET(self):
            path = urlsplit(self.path).path
            if "/resolve/" in path:
                return self.file(root / path.split("/resolve/")[1].split("/", 1)[1])
            if not path.startswith("/api/datasets/me/set"):
                return self.missing("RepoNotFound")
            _, _, rest = path.partition("/tree/")
            if rest:
                folder = root / rest.partition("/")[2]
                return self.json([entry(each) for each in sorted(folder.rglob("*"))])
            revision = path.partition("/revision/")[2] or "main"
            if revision not in ("main", COMMIT):
                return self.missing("RevisionNotFound")
            names = [{"rfilename": file.relative_to(root).as_posix()} for file in root.rglob("*") if file.is_file()]
            return self.json({"id": "me/set", "sha": COMMIT, "private": False, "tags": [], "siblings": names})

        do_HEAD = do_GET

        def file(self, file):
            if not file.is_file():
                return self.missing("EntryNotFound")
            asked.append(file.name)
            whole = file.read_bytes()
            told = {"ETag": f'"{hashlib.sha1(whole).hexdigest()}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
            if not (span := self.headers.get("Range")):
                return self.answer(200, whole, **told)
            first, last = span.split("=")[1].split("-")
            part = whole[int(first) : int(last) + 1 if last else None]
            place = f"bytes {first}-{int(first) + len(part) - 1}/{len(whole)}"
            return self.answer(206, part, Content_Range=place, **told)

    return Handler


@contextmanager
def hub(root: Path):
    """(address of the hub, names of the files that were asked of it)."""
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(root, asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
