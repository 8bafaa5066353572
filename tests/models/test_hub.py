"""Pushing and pulling: tables go to the hub with the weights and come back from the same commit."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

CHILD = """
import json, os, sys, torch
import pyarrow as pa
from grzoo.data import DatasetSchema, FeatureSpec, GenRecProcessor
from grzoo.data.catalogue import Catalogue
from grzoo.models import AutoModelForRetrieval, HSTUConfig, HSTUForRetrieval

def rows(model):
    return model.embeddings.export_rows("items")["rows"]

model = HSTUForRetrieval(HSTUConfig(hidden_size=4), embedding_backend="naive")
model.embeddings.import_rows("items", {"ids": torch.arange(5), "rows": torch.ones(5, 4)})
items = {"item_id": list(range(5)), "id": list(range(5)), "count": [1] * 5, "title": [f"Film {i}" for i in range(5)]}
schema = DatasetSchema(name="x", features=(FeatureSpec(name="item_id", dtype="int64"),), id_mapping="identity")
GenRecProcessor(Catalogue(pa.table(items), "identity"), schema).save_pretrained(sys.argv[1])
model.save_pretrained(sys.argv[1], push_to_hub=True, repo_id="me/hstu")
first = AutoModelForRetrieval.from_pretrained("me/hstu", embedding_backend="naive")
assert torch.equal(rows(first), torch.ones(5, 4))
model.embeddings.import_rows("items", {"ids": torch.arange(5), "rows": torch.full((5, 4), 2.0)})
with torch.no_grad():
    model.model.position_embedding.weight.fill_(7)
model.push_to_hub("me/hstu")
second = AutoModelForRetrieval.from_pretrained("me/hstu", embedding_backend="naive")
assert torch.equal(rows(second), torch.full((5, 4), 2.0)) and (second.model.position_embedding.weight == 7).all()
old = AutoModelForRetrieval.from_pretrained("me/hstu", revision=os.environ["FIRST_COMMIT"], embedding_backend="naive")
assert torch.equal(rows(old), torch.ones(5, 4)) and not (old.model.position_embedding.weight == 7).any()
model.embeddings.import_rows("items", {"ids": torch.arange(5), "rows": torch.randn(5, 4)})
model.push_to_hub("me/hstu")
AutoModelForRetrieval.from_pretrained("me/hstu")
history = torch.tensor([[1, 2, 3]])
best = model.eval().recommend(history, timestamps=history * 1000, top_k=2)
titles = GenRecProcessor.from_pretrained("me/hstu").titles(best.item_ids)
assert sorted(titles[0]) == sorted(f"Film {i}" for i in best.item_ids[0].tolist())
print(json.dumps([best.item_ids.tolist(), best.scores.tolist(), titles]))
"""

OFFLINE = """
import json, torch
from grzoo.data import GenRecProcessor
from grzoo.models import AutoModelForRetrieval

model = AutoModelForRetrieval.from_pretrained("me/hstu")
history = torch.tensor([[1, 2, 3]])
best = model.recommend(history, timestamps=history * 1000, top_k=2)
titles = GenRecProcessor.from_pretrained("me/hstu").titles(best.item_ids)
print(json.dumps([best.item_ids.tolist(), best.scores.tolist(), titles]))
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as pushing and pulling a model needs; one repository, numbered commits."""

    commits: list[dict[str, bytes]] = [{}]
    blobs: dict[str, bytes] = {}
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, body=b"", status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_PUT(self):
        self.blobs[self.path.rsplit("/", 1)[-1]] = self.body()
        self.answer()

    def do_POST(self):
        url, host, body = urlsplit(self.path).path, f"http://{self.headers['Host']}", self.body()
        if url == "/api/repos/create":
            self.answer({"url": f"{host}/me/hstu", "name": "me/hstu", "id": "me/hstu"})
        elif url == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in url:
            files = json.loads(body)["files"]
            kind = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith("safetensors") else "regular"}
                for f in files
            ]
            self.answer({"files": [f | {"shouldIgnore": False} for f in kind]})
        elif url.endswith("/info/lfs/objects/batch"):
            oids = [(o["oid"], o["size"]) for o in json.loads(body)["objects"]]
            action = {oid: {"upload": {"href": f"{host}/blob/{oid}"}} for oid, _ in oids}
            self.answer(
                {"transfer": "basic", "objects": [{"oid": o, "size": n, "actions": action[o]} for o, n in oids]}
            )
        elif "/commit/" in url:
            files = dict(self.commits[-1])
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.blobs[value["oid"]]
            self.commits.append(files)
            sha = commit_hash(len(self.commits) - 1)
            self.answer({"commitUrl": f"{host}/me/hstu/commit/{sha}", "commitOid": sha})
        else:
            self.answer({"error": url}, 404)

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        number = len(self.commits) - 1
        if parts[:2] == ["api", "models"]:
            revision = parts[parts.index("revision") + 1] if "revision" in parts else "main"
            number = number if revision == "main" else int(revision[:8], 16)
            files = [{"rfilename": name} for name in self.commits[number]]
            self.answer({"id": "me/hstu", "sha": commit_hash(number), "siblings": files, "private": False, "tags": []})
            return
        revision, name = parts[3], "/".join(parts[4:])
        number = number if revision == "main" else int(revision[:8], 16)
        content = self.commits[number].get(name)
        commit = {"X_Repo_Commit": commit_hash(number)}
        if content is None:
            self.answer({"error": "no such file"}, 404, X_Error_Code="EntryNotFound", **commit)
        else:
            self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', **commit)

    do_HEAD = do_GET


def commit_hash(number: int) -> str:
    return f"{number:08x}" + "0" * 32


def test_push_and_pull_carry_tables_of_one_commit(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_TOKEN": "hf_fake",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "FIRST_COMMIT": commit_hash(1),
        "NO_PROXY": "127.0.0.1",
    }
    try:
        (tmp_path / "export").mkdir()
        (tmp_path / "export" / "README.md").write_text("a card, as any other file of the folder")
        trained = run(CHILD, environment, str(tmp_path / "export"))
        assert {"config.json", "model.safetensors", "embeddings.safetensors.index.json"} <= set(Hub.commits[1])
        assert any(name.startswith("embeddings-") for name in Hub.commits[1])
        assert set(os.listdir(tmp_path / "export")) <= set(Hub.commits[1])  # everything: card and processor too
    finally:
        server.shutdown()
    offline = run(OFFLINE, environment | {"HF_HUB_OFFLINE": "1"})  # after the pull, without the hub
    assert offline == trained


def run(script, environment, *arguments):
    """The last line that a script prints, as JSON."""
    child = subprocess.run([sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True)
    if child.returncode:
        pytest.fail(child.stderr)
    return json.loads(child.stdout.splitlines()[-1])
