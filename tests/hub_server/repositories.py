"""The repositories of the Hub of the tests: commits, branches, files in git or in the large file storage, in memory."""

import hashlib
from dataclasses import dataclass, field
from fnmatch import fnmatch

__all__ = ["File", "Hub", "Repository", "git_id"]

# As in the .gitattributes that the Hub puts into a new repository.
LARGE = ("*.safetensors", "*.bin", "*.pt", "*.onnx", "*.png", "*.jpg")


def git_id(kind: str, data: bytes) -> str:
    """The name that git gives to an object: sha1 of its kind, its size and its bytes."""
    return hashlib.sha1(b"%s %d\0" % (kind.encode(), len(data)) + data).hexdigest()


@dataclass(frozen=True)
class File:
    """A file of a commit. git holds the bytes, or a pointer to the large file storage."""

    data: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def blob(self) -> bytes:
        """What git stores."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return pointer.encode() if self.large else self.data

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else git_id("blob", self.data)

    def description(self, path: str) -> dict:
        """An entry of the endpoints `tree` and `paths-info`."""
        entry = {"type": "file", "path": path, "size": len(self.data), "oid": git_id("blob", self.blob)}
        if self.large:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.blob)}
        return entry


@dataclass
class Repository:
    """Commits by their ids, and the branches that point to them."""

    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LARGE)
        self.commit("main", {".gitattributes": File(attributes.encode(), large=False)}, [], "initial commit")

    def commit(self, branch: str, added: dict[str, File], deleted: list[str], title: str) -> str:
        """Put a commit on a branch, and return its id, which depends on its files, its parent and its title."""
        parent = self.branches.get(branch, "")
        files = {path: file for path, file in self.commits.get(parent, {}).items() if path not in deleted} | added
        listing = "".join(f"{git_id('blob', file.blob)} {path}\n" for path, file in sorted(files.items()))
        oid = git_id("commit", f"parent {parent}\n\n{title}\n{listing}".encode())
        self.commits[oid] = files
        self.branches[branch] = oid
        self.titles.append(title)
        return oid

    def resolve(self, revision: str) -> str | None:
        """The id of the commit that a branch, or an id, means."""
        oid = self.branches.get(revision, revision)
        return oid if oid in self.commits else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Paths and bytes of a revision."""
        return {path: file.data for path, file in self.commits[self.resolve(revision)].items()}


@dataclass
class Hub:
    """Users by their tokens, repositories by their names, and the large file storage by sha256."""

    users: dict[str, str] = field(default_factory=lambda: {"hf_me": "me", "hf_other": "other"})
    repositories: dict[str, Repository] = field(default_factory=dict)
    storage: dict[str, bytes] = field(default_factory=dict)

    @staticmethod
    def mode(path: str, size: int) -> str:
        """How a file is uploaded."""
        return "lfs" if size > 10_000_000 or any(fnmatch(path, pattern) for pattern in LARGE) else "regular"
