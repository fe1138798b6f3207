"""What the loopback Hub keeps: repositories with their commits, branches, tags and pull requests, and large files."""

import hashlib
import threading
from dataclasses import dataclass, field


class HubError(Exception):
    """An answer that is not 200, with the code that the client turns into its own exception."""

    def __init__(self, status: int, code: str = "", message: str = ""):
        super().__init__(message or code)
        self.status, self.code, self.message = status, code, message or code


@dataclass(frozen=True)
class File:
    """One version of one file."""

    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        """The git object id: of the file, or of the pointer that git keeps for a large file."""
        content = self.content
        if self.is_lfs:
            content = f"version https://git-lfs\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Commit:
    """A whole tree with the title of what led to it."""

    sha: str
    title: str
    parent: str | None
    files: dict[str, File]


@dataclass
class Repo:
    """Commits and the names (branches, tags, pull requests) that point at them."""

    name: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> Commit:
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.commits[self.refs[name]]
        if revision in self.commits:
            return self.commits[revision]
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def commit(self, ref: str, title: str, parent: Commit | None, files: dict[str, File]) -> Commit:
        tree = "\n".join(f"{path} {file.blob_id}" for path, file in sorted(files.items()))
        seed = f"{self.name} {len(self.commits)} {title}\n{tree}"
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), title, parent.sha if parent else None, files)
        self.commits[commit.sha] = commit
        self.refs[ref] = commit.sha
        return commit

    def listing(self, prefix: str) -> list[dict]:
        return [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha}
            for ref, sha in self.refs.items()
            if ref.startswith(prefix)
        ]


class State:
    """Everything the Hub knows."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large_files: dict[str, bytes] = {}
        self.log: list[str] = []
        self.lock = threading.RLock()
