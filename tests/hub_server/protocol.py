"""The endpoints of huggingface.co that pushing and loading models takes, as the real `huggingface_hub` calls them."""

import base64
import json
import re
from collections.abc import Callable
from urllib.parse import parse_qs, unquote

import yaml

from hub_server.repositories import File, Repository
from hub_server.transport import Refusal, Transport

__all__ = ["Protocol"]


class Protocol(Transport):
    """One method an endpoint; `ROUTES` says which paths lead to which."""

    def route(self, body: bytes) -> None:
        """Call the endpoint of the request."""
        self.hub = self.site.hub
        for methods, pattern, endpoint in ROUTES:
            match = re.fullmatch(pattern, self.url.path)
            if match and self.command in methods:
                return endpoint(
                    self, body, **{key: unquote(value or "main") for key, value in match.groupdict().items()}
                )
        raise Refusal(404, f"There is no {self.command} {self.url.path} here")

    # --- who asks, and for what

    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def signed_in(self) -> str:
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        return user

    def repository(self, name: str, write: bool = False) -> Repository:
        """A repository, if the one who asks may see it, or write to it. What may not be seen does not exist."""
        user, repository = self.user(), self.hub.repositories.get(name)
        owner = name.split("/")[0]
        if repository is None or (repository.private and user != owner):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and self.signed_in() != owner:
            raise Refusal(403, "You don't have the required permissions to write to this repository")
        return repository

    def revision(self, name: str, revision: str) -> tuple[str, dict[str, File]]:
        """The id and the files of a commit."""
        repository = self.repository(name)
        oid = repository.resolve(revision)
        if oid is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, repository.commits[oid]

    # --- the API

    def whoami(self, body: bytes) -> None:
        user = self.signed_in()
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        self.answer({"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": token})

    def create(self, body: bytes) -> None:
        user, asked = self.signed_in(), json.loads(body)
        owner = asked.get("organization") or user
        name = f"{owner}/{asked['name']}"
        if owner != user:
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        url = {"url": f"{self.site.url}/{name}", "name": name}
        if name in self.hub.repositories:
            return self.answer(url | {"error": "You already created this model repo"}, 409)
        private = asked.get("visibility") == "private" or asked.get("private", False)
        self.hub.repositories[name] = Repository(private)
        self.answer(url)

    def branch(self, body: bytes, name: str, branch: str) -> None:
        repository = self.repository(name, write=True)
        if branch.startswith("refs/"):
            raise Refusal(400, f"Invalid reference for a branch: {branch}")
        if branch in repository.branches:
            raise Refusal(409, "Reference already exists")
        start, _ = self.revision(name, json.loads(body or b"{}").get("startingPoint", "main"))
        repository.branches[branch] = start
        self.answer({})

    def refs(self, body: bytes, name: str) -> None:
        branches = self.repository(name).branches.items()
        rows = [{"name": key, "ref": f"refs/heads/{key}", "targetCommit": oid} for key, oid in branches]
        self.answer({"branches": rows, "converts": [], "tags": []})

    def validate_yaml(self, body: bytes) -> None:
        """The metadata of a model card, which the Hub refuses or warns about."""
        front = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        try:
            found = [] if front and yaml.safe_load(front[1]) else [{"message": "empty or missing yaml metadata"}]
            self.answer({"errors": [], "warnings": found})
        except yaml.YAMLError as error:
            self.answer({"errors": [{"message": str(error)}], "warnings": []}, status=400)

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        self.repository(name, write=True)
        _, files = self.revision(name, revision)
        rows = []
        for asked in json.loads(body)["files"]:
            path = asked["path"]
            row = {"path": path, "uploadMode": self.hub.mode(path, asked["size"]), "shouldIgnore": False}
            rows.append(row | ({"oid": files[path].etag} if path in files else {}))
        self.answer({"files": rows})

    def batch(self, body: bytes, name: str) -> None:
        """Objects that the storage has already need no upload: this is how an upload is resumed."""
        self.repository(name, write=True)
        rows = []
        for asked in json.loads(body)["objects"]:
            row = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.storage:
                upload = {"href": f"{self.site.storage_url}/storage/{asked['oid']}"}
                row["actions"] = {"upload": upload, "verify": {"href": f"{self.site.url}/api/complete/{name}"}}
            rows.append(row)
        self.answer({"transfer": "basic", "objects": rows})

    def verify(self, body: bytes, name: str) -> None:
        self.repository(name, write=True)
        asked = json.loads(body)
        if len(self.hub.storage.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, "The object was not uploaded")
        self.answer({})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        repository = self.repository(name, write=True)
        if revision not in repository.branches:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        added, deleted, title = {}, [], ""
        for item in map(json.loads, body.splitlines()):
            key, value = item["key"], item["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                added[value["path"]] = File(base64.b64decode(value["content"]), large=False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.storage:
                    raise Refusal(400, f"The object {value['oid']} was not uploaded")
                added[value["path"]] = File(self.hub.storage[value["oid"]], large=True)
            elif key == "deletedFile":
                deleted.append(value["path"])
            else:
                raise Refusal(400, f"Unknown item {key}")
        answer = {"success": True}
        if "create_pr=1" in self.url.query:
            number = 1 + sum(branch.startswith("refs/pr/") for branch in repository.branches)
            answer["pullRequestUrl"] = f"{self.site.url}/{name}/discussions/{number}"
            start, revision = repository.branches[revision], f"refs/pr/{number}"
            repository.branches[revision] = start
        oid = repository.commit(revision, added, deleted, title)
        self.answer(answer | {"commitOid": oid, "commitUrl": f"{self.site.url}/{name}/commit/{oid}"})

    def info(self, body: bytes, name: str, revision: str) -> None:
        oid, files = self.revision(name, revision)
        siblings = [{"rfilename": path} for path in files]
        private = self.repository(name).private
        tags = {"tags": [], "library_name": "transformers", "pipeline_tag": "image-classification"}
        self.answer({"_id": oid, "id": name, "sha": oid, "private": private, "siblings": siblings} | tags)

    def tree(self, body: bytes, name: str, revision: str) -> None:
        _, files = self.revision(name, revision)
        self.answer([file.description(path) for path, file in files.items()])

    def paths(self, body: bytes, name: str, revision: str) -> None:
        _, files = self.revision(name, revision)
        asked = parse_qs(body.decode()).get("paths", [])
        self.answer([file.description(path) for path, file in files.items() if path in asked])

    # --- files

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        """A file of git itself, or where the storage has it; with what the client caches it by."""
        oid, files = self.revision(name, revision)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": oid})
        file = files[path]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{file.etag}"'}
        if not file.large:
            return self.send(200, file.data, headers | {"Content-Type": "text/plain"})
        linked = {"X-Linked-Size": str(len(file.data)), "X-Linked-Etag": f'"{file.etag}"'}
        self.send(302, b"", headers | linked | {"Location": f"{self.site.storage_url}/storage/{file.sha256}"})

    def storage(self, body: bytes, oid: str) -> None:
        """Another host: who knows the address may read and write, and a token has no business here."""
        if self.headers.get("Authorization"):
            raise Refusal(400, "A token was sent to the storage")
        if self.command == "PUT":
            if File(body, large=True).sha256 != oid:
                raise Refusal(400, "The bytes are not those of the announced sha256")
            self.hub.storage[oid] = body
            return self.send(200, b"", {})
        self.send(200, self.hub.storage[oid], {"Content-Type": "application/octet-stream"})


NAME = r"(?P<name>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES: list[tuple[set[str], str, Callable[..., None]]] = [
    ({"GET"}, r"/api/whoami-v2", Protocol.whoami),
    ({"POST"}, r"/api/repos/create", Protocol.create),
    ({"POST"}, r"/api/validate-yaml", Protocol.validate_yaml),
    ({"POST"}, rf"/api/complete/{NAME}", Protocol.verify),
    ({"POST"}, rf"/api/models/{NAME}/branch/(?P<branch>[^/]+)", Protocol.branch),
    ({"GET"}, rf"/api/models/{NAME}/refs", Protocol.refs),
    ({"POST"}, rf"/api/models/{NAME}/preupload/{REVISION}", Protocol.preupload),
    ({"POST"}, rf"/api/models/{NAME}/commit/{REVISION}", Protocol.commit),
    ({"POST"}, rf"/api/models/{NAME}/paths-info/{REVISION}", Protocol.paths),
    ({"GET"}, rf"/api/models/{NAME}/tree/{REVISION}", Protocol.tree),
    ({"GET"}, rf"/api/models/{NAME}(/revision/{REVISION})?", Protocol.info),
    ({"POST"}, rf"/{NAME}\.git/info/lfs/objects/batch", Protocol.batch),
    ({"GET", "HEAD"}, rf"/{NAME}/resolve/{REVISION}/(?P<path>.+)", Protocol.resolve),
    ({"GET", "PUT"}, r"/storage/(?P<oid>[0-9a-f]{64})", Protocol.storage),
]
