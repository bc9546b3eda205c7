"""A small Hugging Face Hub on loopback, for tests: repositories, tokens, uploads, and faults on
demand.

    with Hub() as hub:
        hub.add_repo("dataset", "alice/speech", "folder/of/parquet/files", private=True)
        hub.add_fault(path_contains="resolve", status=503, times=2)
        subprocess.run([sys.executable, ...], env=hub.environment(tmp_path, token="hf_owner_token"))

    python tests/support/hub.py --serve dataset:alice/speech=out/speech model:alice/tiny=out/model

The clients must run in a process of their own: they read HF_ENDPOINT when they are imported. As on
the real Hub, large files live on a second host (`hub.storage_url`), to which `resolve` redirects. A
repository belongs to the user its name starts with. Not here: organisations, pull requests, xet (a
server without it needs HF_HUB_DISABLE_XET=1).
"""

import argparse
import base64
import hashlib
import json
import os
import re
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlencode

# token -> (user, role)
TOKENS = {
    "hf_owner_token": ("alice", "write"),
    "hf_reader_token": ("alice", "read"),
    "hf_other_token": ("bob", "write"),
}
LFS_SUFFIXES = {
    ".arrow",
    ".bin",
    ".flac",
    ".parquet",
    ".pt",
    ".pth",
    ".safetensors",
    ".tar",
    ".wav",
    ".zip",
}
LFS_SIZE_IN_BYTES = 10 * 2**20  # larger files are LFS whatever their name
ACTIONS = ("status", "drop", "hang", "truncate", "trickle", "page", "short")
PAGE = b"<!DOCTYPE html><html><body>Welcome! Please accept our terms of use.</body></html>"

Files = Mapping[str, bytes] | str | Path  # path in the repository -> content, or a folder


@dataclass(frozen=True)
class File:
    """A version of a file. `blob_id` is git's name of what the tree holds: the data, or the pointer
    of an LFS file."""

    data: bytes
    is_lfs: bool
    sha256: str
    blob_id: str


@dataclass(frozen=True)
class Commit:
    id: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, File]

    def summary(self) -> dict:
        return {"id": self.id, "title": self.title, "date": self.date}


@dataclass
class Repo:
    """A repository: `refs` maps full names (refs/heads/main, refs/convert/parquet) to commit
    ids."""

    kind: str
    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    @property
    def path(self) -> str:
        return f"/datasets/{self.id}" if self.kind == "dataset" else f"/{self.id}"

    def find_commit(self, revision: str) -> Commit:
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.commits[self.refs[name]]
        if revision in self.commits:
            return self.commits[revision]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def add_commit(
        self,
        ref: str,
        files: dict[str, File],
        title: str,
        message: str = "",
        author: str | None = None,
    ) -> Commit:
        """Puts a commit with exactly these files on top of a ref, which is made when it is
        missing."""
        parent = self.refs.get(ref)
        content = sorted((path, file.blob_id) for path, file in files.items())
        name = json.dumps([self.kind, self.id, ref, len(self.commits), parent, title, content])
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        commit_id = hashlib.sha1(name.encode()).hexdigest()
        self.commits[commit_id] = Commit(
            commit_id, parent, title, message, author or self.owner, date, files
        )
        self.refs[ref] = commit_id
        return self.commits[commit_id]

    def history(self, revision: str) -> list[Commit]:
        """The commits of a revision, newest first."""
        commits = [self.find_commit(revision)]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits


@dataclass
class Fault:
    """What goes wrong with the next `times` (None: with all) requests of a method whose path
    contains a text, when `after` of them have come through.

    "status" answers with `status`, `headers` and `message`, "page" with 200 and a page of HTML, as
    a proxy does, "drop" hangs up: none of them carries the request out. "hang" does, but only after
    `seconds`, and only if the client still waits. "truncate" (hangs up after half of the body),
    "short" (half of the body, announced as if it were all) and "trickle" (sends the body in 20
    pieces over `seconds`) carry it out.
    The path is quoted and has its query. Large files: "resolve/main/a.bin" is the redirect,
    "?name=a.bin" the content.
    """

    method: str | None = None
    path_contains: str = ""
    action: str = "status"
    status: int = 503
    times: int | None = 1
    after: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    message: str = "injected fault"

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"action must be one of {', '.join(ACTIONS)}, not {self.action!r}")

    def matches(self, request: "Request") -> bool:
        method_matches = self.method is None or self.method == request.method
        return self.times != 0 and method_matches and self.path_contains in request.path

    def meets(self, request: "Request") -> bool:
        """Whether it is this one's turn, which comes nearer with every request that it matches."""
        if self.matches(request) and self.after > 0:
            self.after -= 1
            return False
        return self.matches(request)


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class HubError(Exception):
    """An error as the Hub reports it: the clients choose their exception by X-Error-Code."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        headers = {"X-Error-Message": message, **(headers or {})}
        if code is not None:
            headers["X-Error-Code"] = code
        self.answer = json_answer({"error": message}, status, headers)


@dataclass
class Request:
    """A request as it came in, and what became of it. `path` has the query, `headers` have names in
    lower case."""

    host: str  # "hub" or "storage"
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    status: int | None = None  # of the answer; None: none was given
    fault: str | None = None  # the action of the fault that met it
    user: str | None = None
    role: str | None = None

    @property
    def query(self) -> dict[str, str]:
        return {name: values[-1] for name, values in parse_qs(self.path.partition("?")[2]).items()}

    def asks_for(self, option: str) -> bool:
        return self.query.get(option, "false").lower() in ("true", "1")

    def authenticate(self) -> None:
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise HubError(401, "Invalid credentials in Authorization header")
        self.user, self.role = TOKENS.get(token, (None, None))

    def require_access(self, repo: Repo | None, access: str) -> None:
        """Of the kind "info", "read" (files: not for everybody if they are gated) or "write"."""
        if repo is None or (repo.private and self.user != repo.owner):
            # Who is not logged in gets 401. Nothing tells a private repository from a missing one.
            raise HubError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if access == "read" and repo.gated and self.user != repo.owner:
            raise HubError(
                403 if self.user else 401,
                f"Access to {repo.kind} {repo.id} is restricted.",
                "GatedRepo",
            )
        if access == "write":
            self.require_write_access(repo.owner)

    def require_write_access(self, owner: str) -> None:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        if self.role != "write" or self.user != owner:
            raise HubError(
                403, f"Forbidden: you need a token with write access to the namespace {owner}"
            )


def json_answer(
    payload: object, status: int = 200, headers: dict[str, str] | None = None
) -> Answer:
    return Answer(
        status,
        json.dumps(payload).encode(),
        {"Content-Type": "application/json", **(headers or {})},
    )


def is_large(path: str, size_in_bytes: int) -> bool:
    """Whether the Hub wants this file by LFS."""
    return size_in_bytes > LFS_SIZE_IN_BYTES or (
        size_in_bytes > 0 and Path(path).suffix in LFS_SUFFIXES
    )


def make_file(data: bytes, is_lfs: bool) -> File:
    sha256 = hashlib.sha256(data).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
    content = pointer if is_lfs else data
    return File(
        data, is_lfs, sha256, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    )


def read_files(files: Files) -> dict[str, File]:
    if isinstance(files, str | Path):
        folder = Path(files)
        files = {
            p.relative_to(folder).as_posix(): p.read_bytes()
            for p in sorted(folder.rglob("*"))
            if p.is_file()
        }
    return {path: make_file(data, is_large(path, len(data))) for path, data in files.items()}


def full_ref(revision: str) -> str:
    return revision if revision.startswith("refs/") else f"refs/heads/{revision}"


def slice_body(data: bytes, request: Request, headers: dict[str, str]) -> Answer:
    """The data, or the Range of it that was asked for."""
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if asked is None:
        return Answer(200, data, headers)
    start, end = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
    if start >= end:
        return Answer(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
    return Answer(
        206, data[start:end], {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
    )


# What answers a request. Where the path names a repository, `repo` is it and the access was
# checked.


def answer_whoami(hub: "Hub", request: Request) -> Answer:
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    access_token = {
        "displayName": "test",
        "role": request.role,
        "createdAt": "2024-01-01T00:00:00.000Z",
    }
    auth = {"type": "access_token", "accessToken": access_token}
    return json_answer(
        {"type": "user", "id": request.user, "name": request.user, "orgs": [], "auth": auth}
    )


def create_repo(hub: "Hub", request: Request) -> Answer:
    options = json.loads(request.body)
    owner = options.get("organization") or request.user or ""
    request.require_write_access(owner)
    kind, repo_id = options.get("type") or "model", f"{owner}/{options['name']}"
    is_new = (kind, repo_id) not in hub.repos
    if is_new:
        private = options.get("visibility") == "private" or options.get("private") is True
        hub.add_repo(
            kind, repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private
        )
    answer = {"url": hub.url + hub.repos[kind, repo_id].path, "name": repo_id, "id": repo_id}
    error = {} if is_new else {"error": f"You already created this {kind} repo"}
    return json_answer({**answer, **error}, 200 if is_new else 409)


def validate_yaml(hub: "Hub", request: Request) -> Answer:
    return json_answer({"errors": [], "warnings": []})


def answer_info(hub: "Hub", request: Request, repo: Repo, revision: str = "main") -> Answer:
    commit = repo.find_commit(revision)
    siblings = [{"rfilename": path} for path in sorted(commit.files)]
    info = {
        "_id": repo.id,
        "id": repo.id,
        "author": repo.owner,
        "sha": commit.id,
        "private": repo.private,
    }
    info |= {
        "gated": "manual" if repo.gated else False,
        "disabled": False,
        "tags": [],
        "siblings": siblings,
    }
    return json_answer(
        {**info, "downloads": 0, "likes": 0, "lastModified": commit.date, "createdAt": commit.date}
    )


def list_entries(commit: Commit, expand: bool) -> list[dict]:
    """All files and folders of a commit, sorted by path."""
    entries = {}
    for path, file in commit.files.items():
        entries[path] = {"type": "file", "path": path, "oid": file.blob_id, "size": len(file.data)}
        if file.is_lfs:
            entries[path]["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": 134}
        for folder in list(Path(path).parents)[:-1]:
            oid = hashlib.sha1(f"{commit.id}/{folder}".encode()).hexdigest()
            entries[folder.as_posix()] = {
                "type": "directory",
                "path": folder.as_posix(),
                "oid": oid,
                "size": 0,
            }
    more = {"lastCommit": commit.summary()} if expand else {}
    return [{**entries[path], **more} for path in sorted(entries)]


def answer_tree(hub: "Hub", request: Request, repo: Repo, revision: str, path: str = "") -> Answer:
    prefix = f"{path.strip('/')}/" if path else ""
    entries = list_entries(repo.find_commit(revision), request.asks_for("expand"))
    entries = [entry for entry in entries if entry["path"].startswith(prefix)]
    if prefix and not entries:
        raise HubError(404, f'"{path}" does not exist on "{revision}"', "EntryNotFound")
    if not request.asks_for("recursive"):
        entries = [entry for entry in entries if "/" not in entry["path"][len(prefix) :]]
    start = int(request.query.get("cursor", 0))
    end = start + hub.page_size
    headers = {}
    if end < len(entries):
        query = urlencode({**request.query, "cursor": end})
        headers["Link"] = f'<{hub.url}{request.path.partition("?")[0]}?{query}>; rel="next"'
    return json_answer(entries[start:end], headers=headers)


def answer_paths_info(hub: "Hub", request: Request, repo: Repo, revision: str) -> Answer:
    form = parse_qs(request.body.decode())
    expand = form.get("expand", ["false"])[0].lower() == "true"
    entries = list_entries(repo.find_commit(revision), expand)
    return json_answer([entry for entry in entries if entry["path"] in form.get("paths", [])])


def answer_refs(hub: "Hub", request: Request, repo: Repo) -> Answer:
    kinds = {"branches": "refs/heads/", "converts": "refs/convert/", "tags": "refs/tags/"}
    answer: dict[str, list] = {kind: [] for kind in kinds}
    for ref, commit_id in sorted(repo.refs.items()):
        for kind, prefix in kinds.items():
            if ref.startswith(prefix):
                answer[kind] += [
                    {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": commit_id}
                ]
    return json_answer({**answer, "pullRequests": []})


def answer_commits(hub: "Hub", request: Request, repo: Repo, revision: str) -> Answer:
    history = repo.history(revision)
    return json_answer(
        [{**c.summary(), "message": c.message, "authors": [{"user": c.author}]} for c in history]
    )


def create_branch(hub: "Hub", request: Request, repo: Repo, name: str) -> Answer:
    starting_point = json.loads(request.body or b"{}").get("startingPoint", "main")
    return create_ref(repo, f"refs/heads/{name}", starting_point)


def create_tag(hub: "Hub", request: Request, repo: Repo, revision: str) -> Answer:
    return create_ref(repo, f"refs/tags/{json.loads(request.body)['tag']}", revision)


def create_ref(repo: Repo, ref: str, revision: str) -> Answer:
    if ref in repo.refs:
        raise HubError(409, f"Reference already exists: {ref}")
    repo.refs[ref] = repo.find_commit(revision).id
    return json_answer({})


def answer_preupload(hub: "Hub", request: Request, repo: Repo, revision: str) -> Answer:
    """How each file is to be sent, and what is there now: the client skips a file that has not
    changed."""
    present = repo.find_commit(revision).files
    files = []
    for asked in json.loads(request.body)["files"]:
        path, mode = asked["path"], "lfs" if is_large(asked["path"], asked["size"]) else "regular"
        file = present.get(path)
        oid = None if file is None else file.sha256 if file.is_lfs else file.blob_id
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return json_answer({"files": files})


def answer_lfs_batch(hub: "Hub", request: Request, repo: Repo) -> Answer:
    batch = json.loads(request.body)
    objects = []
    for asked in batch["objects"]:
        answer = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in hub.objects:
            verify = {"href": f"{hub.url}{repo.path}.git/info/lfs/verify"}
            answer["actions"] = {
                "upload": make_upload_action(hub, asked["oid"], asked["size"]),
                "verify": verify,
            }
        objects.append(answer)
    is_multipart = any("header" in entry.get("actions", {}).get("upload", {}) for entry in objects)
    return json_answer({"transfer": "multipart" if is_multipart else "basic", "objects": objects})


def make_upload_action(hub: "Hub", oid: str, size_in_bytes: int) -> dict:
    """Where to PUT an object; if it is large, where to PUT each part, and where to POST the list of
    them."""
    href = f"{hub.storage_url}/objects/{oid}"
    if size_in_bytes <= hub.part_size_in_bytes:
        return {"href": href}
    num_parts = -(-size_in_bytes // hub.part_size_in_bytes)
    parts = {str(number): f"{href}/parts/{number}" for number in range(1, num_parts + 1)}
    return {
        "href": f"{href}/complete",
        "header": {"chunk_size": str(hub.part_size_in_bytes), **parts},
    }


def verify_object(hub: "Hub", request: Request, repo: Repo) -> Answer:
    asked = json.loads(request.body)
    if len(hub.objects.get(asked["oid"], b"")) != asked["size"]:
        raise HubError(404, f"There is no object {asked['oid']} of {asked['size']} bytes")
    return json_answer({})


def answer_commit(hub: "Hub", request: Request, repo: Repo, revision: str) -> Answer:
    head = repo.find_commit(revision)
    if full_ref(revision) not in repo.refs:
        raise HubError(400, f"Not a branch: {revision}")
    lines = [json.loads(line) for line in request.body.splitlines() if line]
    header = lines[0]["value"]
    if header.get("parentCommit", head.id) != head.id:
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for line in lines[1:]:
        apply_change(hub, files, line["key"], line["value"])
    commit = repo.add_commit(
        full_ref(revision), files, header["summary"], header.get("description", ""), request.user
    )
    url = f"{hub.url}{repo.path}/commit/{commit.id}"
    return json_answer({"success": True, "commitOid": commit.id, "commitUrl": url})


def apply_change(hub: "Hub", files: dict[str, File], key: str, value: dict) -> None:
    """Applies one line of a commit to the files."""
    path = value["path"]
    if key == "file":
        files[path] = make_file(base64.b64decode(value["content"]), is_lfs=False)
    elif key == "lfsFile" and value["oid"] in hub.objects:
        files[path] = make_file(hub.objects[value["oid"]], is_lfs=True)
    elif key == "lfsFile":
        raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
    elif key == "deletedFile" and path in files:
        del files[path]
    elif key == "deletedFolder":
        for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
            del files[name]
    else:
        raise HubError(400, f"Cannot apply {key} to {path}")


def resolve(hub: "Hub", request: Request, repo: Repo, revision: str, path: str) -> Answer:
    commit = repo.find_commit(revision)
    if path not in commit.files:
        # The clients remember that this commit does not have the file.
        raise HubError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.id})
    file = commit.files[path]
    headers = {"X-Repo-Commit": commit.id, "ETag": f'"{file.blob_id}"'}
    if not file.is_lfs:
        return slice_body(file.data, request, headers)
    headers |= {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data))}
    headers["Location"] = f"{hub.storage_url}/objects/{file.sha256}?name={quote(path)}"
    return Answer(302, b"", headers)


def get_object(hub: "Hub", request: Request, oid: str) -> Answer:
    if oid not in hub.objects:
        raise HubError(404, "No such object")
    return slice_body(hub.objects[oid], request, {"ETag": f'"{oid}"'})


def put_object(hub: "Hub", request: Request, oid: str) -> Answer:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, "The content does not have the announced sha256")
    hub.objects[oid] = request.body
    return Answer(headers={"ETag": f'"{oid}"'})


def put_part(hub: "Hub", request: Request, oid: str, number: str) -> Answer:
    hub.parts[oid, int(number)] = request.body
    return Answer(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})


def complete_object(hub: "Hub", request: Request, oid: str) -> Answer:
    """Joins the parts, whose ETags the client gives back."""
    parts = json.loads(request.body)["parts"]
    contents = [hub.parts.get((oid, part["partNumber"]), b"") for part in parts]
    etags = [f'"{hashlib.md5(content).hexdigest()}"' for content in contents]
    data = b"".join(contents)
    if etags != [part["etag"] for part in parts] or hashlib.sha256(data).hexdigest() != oid:
        raise HubError(400, "The parts do not make up the announced object")
    hub.objects[oid] = data
    hub.parts = {key: content for key, content in hub.parts.items() if key[0] != oid}
    return json_answer({})


API = r"/api/(?P<kind>model|dataset)s/(?P<repo_id>[^/]+/[^/]+)"
GIT = r"/(?P<kind>datasets/)?(?P<repo_id>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
OBJECT = r"/objects/(?P<oid>[0-9a-f]{64})"

# (host, method, quoted path, the access to the repository that it needs, what answers)
ROUTES: list[tuple[str, str, str, str | None, Callable[..., Answer]]] = [
    ("hub", "GET", "/api/whoami-v2", None, answer_whoami),
    ("hub", "POST", "/api/repos/create", None, create_repo),
    ("hub", "POST", "/api/validate-yaml", None, validate_yaml),
    ("hub", "GET", API, "info", answer_info),
    ("hub", "GET", rf"{API}/revision/{REVISION}", "info", answer_info),
    ("hub", "GET", rf"{API}/tree/{REVISION}(?:/(?P<path>.+))?", "info", answer_tree),
    ("hub", "POST", rf"{API}/paths-info/{REVISION}", "info", answer_paths_info),
    ("hub", "GET", rf"{API}/refs", "info", answer_refs),
    ("hub", "GET", rf"{API}/commits/{REVISION}", "info", answer_commits),
    ("hub", "POST", rf"{API}/branch/(?P<name>[^/]+)", "write", create_branch),
    ("hub", "POST", rf"{API}/tag/{REVISION}", "write", create_tag),
    ("hub", "POST", rf"{API}/preupload/{REVISION}", "write", answer_preupload),
    ("hub", "POST", rf"{API}/commit/{REVISION}", "write", answer_commit),
    ("hub", "POST", rf"{GIT}\.git/info/lfs/objects/batch", "write", answer_lfs_batch),
    ("hub", "POST", rf"{GIT}\.git/info/lfs/verify", "write", verify_object),
    ("hub", "GET", rf"{GIT}/resolve/{REVISION}/(?P<path>.+)", "read", resolve),
    ("storage", "GET", OBJECT, None, get_object),
    ("storage", "PUT", OBJECT, None, put_object),
    ("storage", "PUT", rf"{OBJECT}/parts/(?P<number>\d+)", None, put_part),
    ("storage", "POST", rf"{OBJECT}/complete", None, complete_object),
]


class Handler(BaseHTTPRequestHandler):
    """Reads a request, lets the hub answer it, and spoils the answer if a fault says so."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "HubServer"

    def handle_request(self) -> None:
        hub = self.server.hub
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.server.host, self.command, self.path, headers, self.read_body())
        fault = hub.record(request)
        hub.closing.wait(hub.latency_in_seconds)
        if fault is not None and fault.action == "hang":
            hub.closing.wait(fault.seconds)
        if (fault is not None and fault.action == "drop") or self.is_abandoned():
            self.close_connection = True
            return
        if fault is not None and fault.action == "status":
            answer = json_answer({"error": fault.message}, fault.status, fault.headers)
        elif fault is not None and fault.action == "page":
            answer = Answer(200, PAGE, {"Content-Type": "text/html", **fault.headers})
        else:
            answer = hub.answer(request)
        if fault is not None and fault.action == "short":
            answer.body = answer.body[: len(answer.body) // 2]
        request.status = answer.status
        self.send(answer, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline() or b"0", 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def is_abandoned(self) -> bool:
        """Whether the hub closes or the client has hung up: then the request must not be carried
        out."""
        is_readable = bool(select.select([self.connection], [], [], 0)[0])
        return self.server.hub.closing.is_set() or (
            is_readable and not self.connection.recv(1, socket.MSG_PEEK)
        )

    def send(self, answer: Answer, fault: Fault | None) -> None:
        body, action = b"" if self.command == "HEAD" else answer.body, fault.action if fault else ""
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if action == "truncate":
            body, self.close_connection = body[: len(body) // 2], True
        size = max(1, len(body) // 20) if action == "trickle" else max(1, len(body))
        for start in range(0, len(body), size):
            self.server.hub.closing.wait(fault.seconds / 20 if fault else 0)
            self.wfile.write(body[start : start + size])

    def log_message(self, format: str, *args: object) -> None:
        pass


class HubServer(ThreadingHTTPServer):
    """One of the two hosts of a hub. Its open connections are known, so that closing it hangs up on
    the clients."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: "Hub", host: str, port: int):
        self.hub, self.host = hub, host
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), Handler)
        self.thread = threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        self.thread.start()

    def process_request(self, request: socket.socket, client_address: tuple) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: socket.socket, client_address: tuple) -> None:
        """A client that hangs up is expected; anything else is a bug here."""
        if not isinstance(sys.exc_info()[1], OSError):
            self.hub.crashes.append(traceback.format_exc())

    def close(self) -> None:
        self.shutdown()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()


class Hub:
    """A Hub that serves until it is closed. Leaving the `with` block raises if the server itself
    had a bug."""

    def __init__(
        self,
        latency_in_seconds: float = 0.0,
        part_size_in_bytes: int = 16 * 2**20,
        page_size: int = 1000,
        port: int = 0,
    ):
        self.latency_in_seconds = latency_in_seconds  # of every answer
        self.part_size_in_bytes = part_size_in_bytes  # larger uploads go in parts
        self.page_size = page_size  # entries of a folder listing in one answer
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}  # sha256 -> content of an LFS file
        self.parts: dict[
            tuple[str, int], bytes
        ] = {}  # (sha256, number) -> part of an unfinished upload
        self.requests: list[Request] = []
        self.crashes: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self.servers = [HubServer(self, "hub", port), HubServer(self, "storage", 0)]
        self.url, self.storage_url = (
            f"http://127.0.0.1:{server.server_port}" for server in self.servers
        )

    def __enter__(self) -> "Hub":
        return self

    def __exit__(self, exception_type: type | None, *_: object) -> None:
        self.close()
        if self.crashes and exception_type is None:
            raise RuntimeError("The test hub crashed:\n" + "\n".join(self.crashes))

    def close(self) -> None:
        """Hangs up on every client; requests that wait are not answered."""
        if not self.closing.is_set():
            self.closing.set()
            for server in self.servers:
                server.close()

    def environment(
        self, home: str | Path, token: str | None = None, **more: str
    ) -> dict[str, str]:
        """os.environ for a client of this hub, with its cache in `home` and nothing of the user's
        own settings."""
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING"))
        }
        environment |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        environment |= {
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        return environment | ({"HF_TOKEN": token} if token else {}) | more

    def add_repo(
        self,
        kind: str,
        repo_id: str,
        files: Files,
        private: bool = False,
        gated: bool = False,
        revisions: Mapping[str, Files] | None = None,
    ) -> Repo:
        """Adds a "model" or a "dataset"; `revisions` are further branches or refs, each with files
        of its own."""
        with self.lock:
            repo = self.repos[kind, repo_id] = Repo(kind, repo_id, private, gated)
            for revision, content in {"main": files, **(revisions or {})}.items():
                self.add_commit(kind, repo_id, content, revision, replace=True)
            return repo

    def add_commit(
        self,
        kind: str,
        repo_id: str,
        files: Files,
        revision: str = "main",
        title: str = "Add files",
        replace: bool = False,
    ) -> Commit:
        """Commits files behind the clients' backs. With `replace`, all other files go."""
        with self.lock:
            repo, new = self.repos[kind, repo_id], read_files(files)
            self.objects.update({file.sha256: file.data for file in new.values() if file.is_lfs})
            present = {} if replace else repo.find_commit(revision).files
            return repo.add_commit(full_ref(revision), {**present, **new}, title)

    def files(self, kind: str, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        with self.lock:
            return {
                path: file.data
                for path, file in self.repos[kind, repo_id].find_commit(revision).files.items()
            }

    def commits(self, kind: str, repo_id: str, revision: str = "main") -> list[Commit]:
        """Newest first."""
        with self.lock:
            return self.repos[kind, repo_id].history(revision)

    def add_fault(self, **fields: str | int | float | dict[str, str] | None) -> None:
        """Adds a Fault with these fields. A request meets the first fault that matches and is not
        used up."""
        with self.lock:
            self.faults.append(Fault(**fields))

    def remove_repo(self, kind: str, repo_id: str) -> None:
        """Deletes a repository behind the clients' backs."""
        with self.lock:
            del self.repos[kind, repo_id]

    def remove_faults(self) -> None:
        with self.lock:
            self.faults.clear()

    def record(self, request: Request) -> Fault | None:
        """Notes the request and takes the fault that it meets."""
        with self.lock:
            self.requests.append(request)
            fault = next((fault for fault in self.faults if fault.meets(request)), None)
            if fault is not None:
                request.fault = fault.action
                fault.times = fault.times if fault.times is None else fault.times - 1
            return fault

    def answer(self, request: Request) -> Answer:
        with self.lock:
            try:
                return dispatch(self, request)
            except HubError as error:
                return error.answer
            except Exception:
                self.crashes.append(traceback.format_exc())
                return json_answer({"error": traceback.format_exc()}, 500)


def dispatch(hub: Hub, request: Request) -> Answer:
    """Finds what answers the path, and the repository that the path names."""
    method = "GET" if request.method == "HEAD" else request.method
    for host, route_method, pattern, access, function in ROUTES:
        match = re.fullmatch(pattern, request.path.partition("?")[0])
        if match is None or (host, route_method) != (request.host, method):
            continue
        names = {
            name: unquote(value) for name, value in match.groupdict().items() if value is not None
        }
        if host == "hub":
            request.authenticate()
        if access is None:
            return function(hub, request, **names)
        kind = names.pop("kind", "model").removesuffix("s/")
        repo = hub.repos.get((kind, names.pop("repo_id")))
        request.require_access(repo, access)
        return function(hub, request, repo, **names)
    raise HubError(404, "Sorry, we can't find the page you are looking for.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--serve",
        nargs="*",
        default=[],
        metavar="KIND:ID=FOLDER",
        help="dataset:alice/speech=folder",
    )
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args()
    with Hub(port=args.port) as hub:
        for item in args.serve:
            name, _, folder = item.partition("=")
            kind, _, repo_id = name.partition(":")
            if (
                kind not in ("dataset", "model")
                or repo_id.count("/") != 1
                or not Path(folder).is_dir()
            ):
                parser.error(f"{item!r} is not dataset:USER/NAME=FOLDER or model:USER/NAME=FOLDER")
            hub.add_repo(kind, repo_id, folder)
        print(
            f"HF_ENDPOINT={hub.url} HF_HUB_DISABLE_XET=1  (tokens: {', '.join(TOKENS)})", flush=True
        )
        with suppress(KeyboardInterrupt):
            while True:
                time.sleep(1)


if __name__ == "__main__":
    main()
