"""Tables travel with the model: save, load (another process, meta device, sharded), and refuse what is incomplete."""

import json
import subprocess
import sys

import pytest
import torch
from grzoo.embeddings import SparseSGD
from grzoo.embeddings.io import INDEX_NAME
from grzoo.models import AutoModelForRetrieval, HSTUForRetrieval, HSTUModel
from safetensors import safe_open
from transformers import AutoModel, PreTrainedModel

HISTORY = torch.tensor([[1, 2, 3, 4, 5]])
TIMES = {"timestamps": HISTORY * 1000}

CHILD = """
import json, sys, torch
from grzoo import AutoModelForRetrieval
model = AutoModelForRetrieval.from_pretrained(sys.argv[1])
history = torch.tensor([[1, 2, 3, 4, 5]])
best = model.recommend(history, timestamps=history * 1000, top_k=4)
assert "deepspeed" not in sys.modules, "inference must not import DeepSpeed"
print(json.dumps([best.item_ids.tolist(), best.scores.tolist()]))
"""


@pytest.fixture
def trained(micro_model, batches):
    """A model after two steps, ids 0..39 among its rows, in evaluation mode."""
    model = micro_model()
    optimizer = model.embeddings.optimizer
    for seed in (0, 1):
        model(**batches.make_batch([5, 9, 3], seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        model.embeddings({"candidate_ids": torch.arange(40)}, insert=True)
    return model.eval()


def rows_of(model):
    return model.embeddings.export_rows("items")


def assert_equal_models(got, want):
    for name, weight in want.state_dict().items():
        assert torch.equal(got.state_dict()[name], weight), name
    for name in ("ids", "rows"):
        assert torch.equal(rows_of(got)[name], rows_of(want)[name]), name


def test_round_trip_with_auto_classes(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    for cls in (AutoModelForRetrieval, HSTUForRetrieval):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is HSTUForRetrieval and not loaded.training
        assert_equal_models(loaded, trained)
    backbone = AutoModel.from_pretrained(tmp_path)
    assert type(backbone) is HSTUModel
    assert_equal_models(backbone, trained.model)
    backbone.save_pretrained(tmp_path / "backbone")
    assert_equal_models(HSTUModel.from_pretrained(tmp_path / "backbone"), trained.model)


def test_no_pickle_is_written(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_same_recommendations_in_a_new_process_without_deepspeed(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    best = trained.recommend(HISTORY, top_k=4, **TIMES)
    child = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    ids, scores = json.loads(child.stdout.splitlines()[-1])
    assert ids == best.item_ids.tolist()
    torch.testing.assert_close(torch.tensor(scores), best.scores, rtol=0, atol=1e-7)


def test_loading_options_reach_the_model(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    loaded, info = AutoModelForRetrieval.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.bfloat16, attn_implementation="naive", embedding_backend="naive"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.dtype == torch.bfloat16 and loaded.config._attn_implementation == "naive"
    assert torch.equal(rows_of(loaded)["rows"], rows_of(trained)["rows"])
    assert loaded.recommend(HISTORY, top_k=4, **TIMES).scores.dtype == torch.float32


def test_rows_are_saved_in_the_precision_that_is_asked_for(trained, tmp_path):
    trained.save_pretrained(tmp_path, row_dtype="bfloat16")
    with safe_open(tmp_path / "embeddings-00001-of-00001.safetensors", "pt") as file:
        assert file.get_tensor("items.rows").dtype == torch.bfloat16
    rows = rows_of(AutoModelForRetrieval.from_pretrained(tmp_path))["rows"]
    assert torch.equal(rows, rows_of(trained)["rows"].bfloat16().float())


def test_dense_weights_and_tables_come_from_one_commit(trained, tmp_path, monkeypatch):
    """Also when somebody pushes in between: what `main` is, is asked once."""
    trained.save_pretrained(tmp_path)
    load, asked = PreTrainedModel.from_pretrained.__func__, []

    def dense(cls, name, **options):
        asked.append(options.pop("revision"))
        return load(cls, tmp_path, **options)

    def tables(name, options):
        asked.append(options["revision"])
        return tmp_path

    monkeypatch.setattr("grzoo.models.base._commit", lambda name, options: "c0ffee")
    monkeypatch.setattr("grzoo.models.base._table_folder", tables)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(dense))
    HSTUForRetrieval.from_pretrained("me/hstu")
    assert asked == ["c0ffee", "c0ffee"]


@pytest.mark.parametrize("trainable", [False, True])
def test_tables_are_read_only_unless_they_are_to_be_trained(trainable, trained, tmp_path):
    trained.save_pretrained(tmp_path)
    model = AutoModelForRetrieval.from_pretrained(tmp_path, trainable=trainable, embedding_backend="naive")
    if not trainable:
        with pytest.raises(ValueError, match="read-only.*trainable=True"):
            SparseSGD(model.embeddings, lr=0.5)
        return
    optimizer = SparseSGD(model.embeddings, lr=0.5)
    model.train().embeddings({"input_ids": torch.tensor([3, 99])})["input_ids"].sum().backward()
    optimizer.step()
    assert model.embeddings.num_rows() == trained.embeddings.num_rows() + 1
    got, want = (each.embeddings({"input_ids": torch.tensor([3])}, insert=False) for each in (model.eval(), trained))
    torch.testing.assert_close(got["input_ids"], want["input_ids"] - 0.5)


def test_built_on_the_meta_device(trained):
    with torch.device("meta"):
        model = HSTUForRetrieval(trained.config)
    assert all(p.is_meta for p in model.parameters()) and model.embeddings.num_rows() == 0
    model.to_empty(device="cpu").load_state_dict(trained.state_dict())
    model.embeddings.import_rows("items", {k: v for k, v in rows_of(trained).items() if k in ("ids", "rows")})
    assert_equal_models(model, trained)


def test_copies_and_casts_leave_rows_alone(trained):
    import copy

    twin = copy.deepcopy(trained).half()
    twin.embeddings.import_rows("items", {"ids": torch.tensor([1]), "rows": torch.zeros(1, 6)})
    assert rows_of(trained)["rows"].dtype == torch.float32
    assert trained.embeddings({"input_ids": torch.tensor([1])})["input_ids"].any()


def test_folder_without_tables_is_refused(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    (tmp_path / INDEX_NAME).unlink()
    with pytest.raises(OSError, match=f"has no {INDEX_NAME}: the tables of the model are missing"):
        AutoModelForRetrieval.from_pretrained(tmp_path)
    with pytest.raises(OSError):
        AutoModelForRetrieval.from_pretrained(tmp_path / "nowhere")


def test_failure_to_write_is_raised(trained, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((OSError, ValueError)):
        trained.save_pretrained(tmp_path / "file")


def test_saved_files_obey_the_umask(micro_model, tmp_path):
    micro_model().save_pretrained(tmp_path)
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.glob("*.safetensors")}
    plain = tmp_path / "plain"
    plain.touch()
    assert len(modes) == 2 and set(modes.values()) == {plain.stat().st_mode & 0o777}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.pt", "model.pkl"])
def test_a_pickle_in_the_folder_is_never_opened(trained, tmp_path, name):
    trained.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(b"\x80\x04.")
    opened, watching = [], True
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if watching and event == "open" else None)
    assert_equal_models(AutoModelForRetrieval.from_pretrained(tmp_path), trained)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError):
        AutoModelForRetrieval.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="grzoo opens none"):
        AutoModelForRetrieval.from_pretrained(tmp_path, use_safetensors=False)
    watching = False
    assert str(tmp_path / "config.json") in opened and not any(path.endswith(name) for path in opened)


@pytest.mark.parametrize("content", [b"", b"short", (2**60).to_bytes(8, "little") + b"{}"])
def test_damaged_dense_weights_are_refused(trained, tmp_path, content):
    trained.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises((OSError, RuntimeError), match="damaged|missing"):
        AutoModelForRetrieval.from_pretrained(tmp_path)


def test_a_save_that_dies_over_an_older_one_leaves_nothing_that_loads(trained, tmp_path, monkeypatch):
    """Otherwise new dense weights would go with old tables."""
    trained.save_pretrained(tmp_path)
    monkeypatch.setattr("grzoo.models.base.save_tables", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trained.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="tables of the model are missing"):
        AutoModelForRetrieval.from_pretrained(tmp_path)
