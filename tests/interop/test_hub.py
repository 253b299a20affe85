import contextlib
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest

from fvq_jax.interop.hub import Repository, download, repository
from fvq_jax.interop.tokenizer_checkpoint import write_checkpoint
from fvq_jax.runtime.errors import InputError
from tests.helpers.random_tokenizer import random_tokenizer

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
PROGRAM = """
import sys
from fvq_jax.inference.location import locate
from fvq_jax.runtime.errors import InputError

for name in sys.stdin:
    try:
        print(locate(name.strip(), "tokenizer")[0], flush=True)
    except InputError as error:
        print("refused:", error, flush=True)
"""


def hub(files):
    """Answers the few requests that `snapshot_download` makes; `files` is {(repository, branch): {name: bytes}}."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, status, content=b"", **headers):
            self.send_response(status)
            for name, value in {"Content-Length": len(content), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_GET(self):
            self.server.asked.append(f"{self.command} {self.path}")
            path = self.path.partition("?")[0].strip("/").split("/")
            if path[:2] == ["api", "models"]:
                return self.api("/".join(path[2:4]), path[4:])
            name, (_, revision, *file) = "/".join(path[:2]), path[2:]
            content = self.of(name, revision).get("/".join(file))
            if content is None:
                return self.answer(404, X_Error_Code="EntryNotFound")
            return self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=revision)

        do_HEAD = do_GET  # noqa: N815

        def api(self, name, rest):
            if not any(repository == name for repository, _ in files):
                return self.answer(404, X_Error_Code="RepoNotFound")
            kind, revision = (rest or ["revision", "main"])[:2]
            if (name, self.branch(revision)) not in files:
                return self.answer(404, X_Error_Code="RevisionNotFound")
            if kind == "revision":
                return self.json(
                    {"id": name, "sha": COMMITS[self.branch(revision)], "siblings": self.listed(name, revision)}
                )
            tree = [
                {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for file, content in self.of(name, revision).items()
            ]
            return self.json(tree)

        def listed(self, name, revision):
            return [{"rfilename": file} for file in self.of(name, revision)]

        def branch(self, revision):
            return next((branch for branch, commit in COMMITS.items() if revision in (branch, commit)), None)

        def of(self, name, revision):
            return files.get((name, self.branch(revision)), {})

        def json(self, value):
            self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    return Handler


@contextlib.contextmanager
def serving(files):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), hub(files))
    server.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def asking(cache, endpoint):
    """What `locate` says of a name, in a process of its own: the library reads its environment when it is imported."""
    unset = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "http_proxy", "https_proxy", "all_proxy")
    environment = {name: value for name, value in os.environ.items() if name not in (*unset, *map(str.upper, unset))}
    environment |= {"HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, cwd=cache, **pipes) as process:

        def ask(name):
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
            return process.stdout.readline().strip()

        yield ask
        process.stdin.close()


def test_a_repository_is_downloaded_and_kept(tmp_path):
    saved = random_tokenizer(ch_mult=(1,))
    write_checkpoint(tmp_path / "model.safetensors", "llamagen", saved.net, saved.params)
    weights = (tmp_path / "model.safetensors").read_bytes()
    others = {"config.json": b"{}", "README.md": b"text", "picture.png": b"1", "unet/model.safetensors": b"2"}
    files = {
        ("org/name", "main"): {**others, "model.safetensors": weights},
        ("org/name", "v1"): {**others, "model.safetensors": b"old"},
        ("org/two", "main"): {"a.pt": b"1", "b.ckpt": b"2"},
    }
    cache = tmp_path / "cache"
    cache.mkdir()
    with contextlib.ExitStack() as stack:
        with serving(files) as server:
            ask = stack.enter_context(asking(cache, f"http://127.0.0.1:{server.server_address[1]}"))
            new, old = ask("org/name"), ask("org/name@v1")
            two, none, revision = ask("org/two"), ask("org/none"), ask("org/name@v9")
            asked = [line for line in server.asked if "/resolve/" in line]
        kept, lost = ask("org/name"), ask("org/other")  # without the server
    with open(new, "rb") as file:
        assert file.read() == weights
    with open(old, "rb") as file:
        assert file.read() == b"old"
    assert sorted(os.listdir(os.path.dirname(new))) == ["config.json", "model.safetensors"]
    assert not [line for line in asked if "README" in line or "png" in line or "unet" in line]
    assert two.startswith("refused: ")
    assert two.endswith("holds several files of weights: give the path of one of a.pt, b.ckpt")
    start = "refused: there is no tokenizer at org/"
    assert none == (
        f"{start}none: the path does not exist, and Hugging Face has no repository org/none, or a private one: "
        "log in if it is yours"
    )
    assert revision.endswith("and the repository org/name of Hugging Face has no revision v9")
    assert kept == new
    assert lost.startswith(f"{start}other: the path does not exist, and cannot download the repository org/other of ")


def test_a_library_that_may_ask_nobody_says_so():
    """tests/conftest.py sets HF_HUB_OFFLINE."""
    with pytest.raises(
        InputError, match=r"^cannot download the repository org/name of Hugging Face: [^\n]*HF_HUB_OFFLINE"
    ):
        download(Repository("org/name", None))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", Repository("org/name", None)),
        ("Org-1/na.me_2", Repository("Org-1/na.me_2", None)),
        ("org/name@v1.0", Repository("org/name", "v1.0")),
        ("org/name@refs/pr/3", Repository("org/name", "refs/pr/3")),
        *((text, None) for text in ("name", "/org/name", "./org/name", "../name", "a/b/c", "org/", "/", "", "~/x")),
        *((text, None) for text in ("org/x.pt", "org/x.safetensors", "org/x.bin", "org/na me", "org/name@", "org\\x")),
    ],
)
def test_what_names_a_repository(text, expected):
    assert repository(text) == expected


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"pip install 'fvq_jax\[hub\]'$"):
        download(Repository("org/name", None))
