"""A small Hugging Face Hub on loopback: what huggingface_hub 2.4 asks for models, kept in memory.

`python -m hub.server` (in `tests`) prints its address and serves until its standard input closes, so it never outlives
the tests that started it. Standard library only. `GET /log` lists the requests it answered.
"""

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from hub.storage import Commit, File, HubError, Repo, State

TOKENS = {"hf_alice": "alice", "hf_bob": "bob", "hf_your_name": "your-name"}
LFS_SUFFIXES = (".safetensors", ".bin", ".pth", ".png")
ROUTES: list[tuple[str, re.Pattern[str], Callable]] = []
PARTS = {"{repo}": "(?P<repo>[^/]+/[^/]+)", "{rev}": "(?P<rev>[^/]+)", "{path}": "(?P<path>.+)"}


def route(method: str, pattern: str) -> Callable[[Callable], Callable]:
    """Registers a method of the handler for the requests that match."""
    for name, expression in PARTS.items():
        pattern = pattern.replace(name, expression)

    def register(function: Callable) -> Callable:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    """One method per endpoint; a returned object becomes the JSON answer."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    state: State
    storage_url: str

    # --- the connection

    def do_GET(self) -> None:
        self.answer("GET")

    def do_HEAD(self) -> None:
        self.answer("GET")

    def do_POST(self) -> None:
        self.answer("POST")

    def do_PUT(self) -> None:
        self.answer("PUT")

    def do_DELETE(self) -> None:
        self.answer("DELETE")

    def answer(self, method: str) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.read_body()
        if url.path != "/log":
            self.state.log.append(f"{self.command} {url.path}")
        try:
            for expected, pattern, function in ROUTES:
                match = pattern.fullmatch(url.path)
                if match and expected == method:
                    with self.state.lock:
                        answer = function(self, **{key: unquote(value) for key, value in match.groupdict().items()})
                    break
            else:
                raise HubError(501, "NotImplemented", f"this Hub has no {self.command} {url.path}")
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            self.send(error.status, json.dumps({"error": error.message}).encode(), headers)
        else:
            if answer is not None:
                self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the terminal quiet: `GET /log` tells."""

    # --- who asks, and for what

    def user(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        name = TOKENS.get(header.removeprefix("Bearer "))
        if name is None:
            raise HubError(401, message="Invalid credentials in Authorization header")
        return name

    def repo(self, name: str, write: bool = False) -> Repo:
        """A repository that the caller may see; a private one looks like a missing one to everybody else."""
        user, repo = self.user(), self.state.repos.get(name)
        is_owner = user is not None and name.startswith(f"{user}/")
        if repo is None or (repo.private and not is_owner):
            raise HubError(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and not is_owner:
            raise HubError(403 if user else 401, message=f"You don't have the rights to write to {name}")
        return repo

    def json(self) -> dict:
        return json.loads(self.body)

    # --- accounts and repositories

    @route("GET", "/log")
    def get_log(self) -> list[str]:
        return self.state.log

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> dict:
        name = self.user()
        if name is None:
            raise HubError(401, message="Invalid username or password.")
        return {"type": "user", "name": name, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    @route("POST", "/api/repos/create")
    def create_repo(self) -> dict | None:
        request, user = self.json(), self.whoami()["name"]
        name = f"{request.get('organization') or user}/{request['name']}"
        if not name.startswith(f"{user}/"):
            raise HubError(403, message=f"You don't have the rights to create a model under the namespace of {name}")
        address = {"url": f"{self.address()}/{name}", "name": name}
        if name in self.state.repos:
            self.send(409, json.dumps(address).encode(), {"X-Error-Message": "You already created this model repo"})
            return None
        repo = Repo(name, private=request.get("visibility") == "private" or bool(request.get("private")))
        repo.commit("refs/heads/main", "initial commit", None, {".gitattributes": File(b"*.safetensors\n", False)})
        self.state.repos[name] = repo
        return address

    def address(self) -> str:
        return f"http://{self.headers['Host']}"

    @route("GET", "/api/models/{repo}")
    def model_info(self, repo: str) -> dict:
        return self.revision_info(repo, "main")

    @route("GET", "/api/models/{repo}/revision/{rev}")
    def revision_info(self, repo: str, rev: str) -> dict:
        found = self.repo(repo)
        commit = found.resolve(rev)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        return {"id": repo, "sha": commit.sha, "private": found.private, "tags": [], "siblings": siblings}

    # --- reading

    @staticmethod
    def describe(path: str, file: File) -> dict:
        row: dict = {"type": "file", "path": path, "size": len(file.content), "oid": file.blob_id}
        if file.is_lfs:
            row["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 130}
        return row

    @route("GET", "/api/models/{repo}/tree/{rev}")
    def tree(self, repo: str, rev: str) -> list[dict]:
        return [self.describe(path, file) for path, file in sorted(self.repo(repo).resolve(rev).files.items())]

    @route("POST", "/api/models/{repo}/paths-info/{rev}")
    def paths_info(self, repo: str, rev: str) -> list[dict]:
        paths = parse_qs(self.body.decode())["paths"]
        files = self.repo(repo).resolve(rev).files
        return [self.describe(path, files[path]) for path in paths if path in files]

    @route("GET", "/api/models/{repo}/refs")
    def list_refs(self, repo: str) -> dict:
        found = self.repo(repo)
        prefixes = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
        return {"converts": [], **{key: found.listing(prefix) for key, prefix in prefixes.items()}}

    @route("GET", "/api/models/{repo}/commits/{rev}")
    def list_commits(self, repo: str, rev: str) -> list[dict]:
        found = self.repo(repo)
        commit: Commit | None = found.resolve(rev)
        rows = []
        while commit is not None:
            about = {"title": commit.title, "message": "", "date": "2025-01-01T00:00:00.000Z", "authors": []}
            rows.append({"id": commit.sha, **about})
            commit = found.commits[commit.parent] if commit.parent else None
        return rows

    @route("GET", "/{repo}/resolve/{rev}/{path}")
    def download(self, repo: str, rev: str, path: str) -> None:
        commit = self.repo(repo).resolve(rev)
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            body = json.dumps({"error": "Entry not found"}).encode()
            return self.send(404, body, {**headers, "X-Error-Code": "EntryNotFound"})
        file = commit.files[path]
        if not file.is_lfs:
            return self.send_bytes(file.content, {**headers, "ETag": f'"{file.blob_id}"'})
        self.state.large_files[file.sha256] = file.content
        linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        return self.send(302, b"", {**headers, **linked, "Location": f"{self.storage_url}/{file.sha256}"})

    @route("GET", "/{rev}")
    def download_large(self, rev: str) -> None:
        self.send_bytes(self.state.large_files[rev], {"ETag": f'"{rev}"', "Accept-Ranges": "bytes"})

    def send_bytes(self, content: bytes, headers: dict[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            return self.send(200, content, headers)
        start, end = int(match[1]), int(match[2] or len(content) - 1)
        headers = {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"}
        return self.send(206, content[start : end + 1], headers)

    # --- writing

    @route("GET", "/api/models/{repo}/auth-check/write")
    def may_write(self, repo: str) -> dict:
        self.repo(repo, write=True)
        return {}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> dict:
        return {"errors": [], "warnings": []}

    @route("POST", "/api/models/{repo}/preupload/{rev}")
    def preupload(self, repo: str, rev: str) -> dict:
        files = self.repo(repo, write=True).resolve(rev).files
        rows = []
        for request in self.json()["files"]:
            path, is_lfs = request["path"], request["path"].endswith(LFS_SUFFIXES)
            oid = (files[path].sha256 if files[path].is_lfs else files[path].blob_id) if path in files else None
            mode = "lfs" if is_lfs else "regular"
            rows.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": rows}

    @route("POST", "/{repo}.git/info/lfs/objects/batch")
    def lfs_batch(self, repo: str) -> dict:
        self.repo(repo, write=True)
        objects = []
        for request in self.json()["objects"]:
            row = {"oid": request["oid"], "size": request["size"]}
            if request["oid"] not in self.state.large_files:
                upload, verify = f"{self.storage_url}/{request['oid']}", f"{self.address()}/{repo}.git/verify"
                row["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(row)
        return {"transfer": "basic", "objects": objects}

    @route("PUT", "/{rev}")
    def upload_large(self, rev: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != rev:
            raise HubError(400, message="the upload does not have the announced sha256")
        self.state.large_files[rev] = self.body
        self.send(200, b"", {})

    @route("POST", "/{repo}.git/verify")
    def verify_large(self, repo: str) -> dict:
        request = self.json()
        if len(self.state.large_files[request["oid"]]) != request["size"]:
            raise HubError(400, message="the upload does not have the announced size")
        return {}

    @route("POST", "/api/models/{repo}/commit/{rev}")
    def create_commit(self, repo: str, rev: str) -> dict:
        found = self.repo(repo, write=True)
        header, *changes = (json.loads(line) for line in self.body.splitlines())
        parent = found.resolve(rev)
        if header["value"].get("parentCommit", parent.sha) != parent.sha:
            raise HubError(412, message="A commit has happened since. Please refresh and try again.")
        ref, answer = f"refs/heads/{rev}" if f"refs/heads/{rev}" in found.refs else rev, {}
        if self.query.get("create_pr") == ["1"]:
            number = len(found.listing("refs/pr/")) + 1
            ref, answer = f"refs/pr/{number}", {"pullRequestUrl": f"{self.address()}/{repo}/discussions/{number}"}
        commit = found.commit(ref, header["value"]["summary"], parent, self.apply(changes, dict(parent.files)))
        return {"commitUrl": f"{self.address()}/{repo}/commit/{commit.sha}", "commitOid": commit.sha, **answer}

    def apply(self, changes: list[dict], files: dict[str, File]) -> dict[str, File]:
        for change in changes:
            key, value = change["key"], change["value"]
            if key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                files[value["path"]] = File(self.state.large_files[value["oid"]], True)
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
            else:
                raise HubError(501, "NotImplemented", f"this Hub has no {key} in a commit")
        return files

    @route("POST", "/api/models/{repo}/branch/{rev}")
    def create_branch(self, repo: str, rev: str) -> None:
        start = self.json().get("startingPoint", "main") if self.body else "main"
        self.point(self.repo(repo, write=True), f"refs/heads/{rev}", start)

    @route("POST", "/api/models/{repo}/tag/{rev}")
    def create_tag(self, repo: str, rev: str) -> None:
        self.point(self.repo(repo, write=True), f"refs/tags/{self.json()['tag']}", rev)

    def point(self, repo: Repo, ref: str, revision: str) -> None:
        if ref in repo.refs:
            raise HubError(409, message=f"Reference already exists: {ref}")
        repo.refs[ref] = repo.resolve(revision).sha
        self.send(200, b"", {})


def serve(handler: type[Handler], host: str) -> str:
    """Starts to answer on a free port of the loopback interface; gives the address, with the name `host` in it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://{host}:{server.server_port}"


def main() -> None:
    """Serves until standard input closes; large files come from a host of their own, as on the Hub."""
    handler = type("BoundHandler", (Handler,), {"state": State()})
    handler.storage_url = serve(handler, "localhost")
    print(serve(handler, "127.0.0.1"), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
