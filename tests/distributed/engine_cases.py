"""Cases of the engine on its ranks: overflow, bad steps, evaluation, DeepSpeed's own loop, checkpoints."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_jobs import (
    Layout,
    Recipe,
    Result,
    build_engine,
    build_model,
    build_steps,
    deepspeed_config,
    finish,
    rows_of,
    step_at,
    train,
)
from grzoo.data.collator import GlobalStep
from grzoo.models import HSTUForRetrieval
from torch import Tensor

SCHEDULED = {
    "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + 0.2 * n)),
    "sparse_lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
}
OPTIMIZERS = {
    "adamw": Recipe(),
    "sgd": Recipe(
        dense=("SGD", {"lr": 0.02, "momentum": 0.9}), sparse=("SGD", {"lr": 0.1, "momentum": 0.5}), negatives="shared"
    ),
    "adagrad": Recipe(dense=("Adagrad", {"lr": 0.01}), sparse=("RowwiseAdagrad", {"lr": 0.05}), clipping=0.5),
    "plain_sgd": Recipe(dense=("SGD", {"lr": 0.02}), sparse=("SGD", {"lr": 0.1})),
    "full_adagrad": Recipe(sparse=("Adagrad", {"lr": 0.05, "initial_accumulator_value": 0.1})),
    "adam": Recipe(dense=("Adam", {"lr": 2e-3}), sparse=("Adam", {"lr": 5e-3, "step_mode": "global"})),
}


class Explosive(HSTUForRetrieval):
    """A model whose loss, on demand, has gradients that are not finite, on one side only. Its value does not change."""

    side = ""

    def forward(self, *args: Any, embeddings: Any = None, **kwargs: Any) -> Any:
        output = super().forward(*args, embeddings=embeddings, **kwargs)
        sparse, dense = embeddings["input_ids"], self.model.position_embedding(torch.tensor([0]))
        for side, value in (("sparse", sparse), ("dense", dense)):  # ZeRO 3 wants the same calls on all ranks
            constant = float(self.side != side)
            output.loss = output.loss + ((value.float() * 0).sum() + constant).sqrt() - constant
        return output


def explosive_model(recipe: Recipe) -> Explosive:
    torch.manual_seed(recipe.seed)
    return Explosive(build_model(recipe).config)


def weights(engine: Any) -> dict[str, Tensor]:
    return finish(engine, Result()).dense


def same(a: dict[Any, Tensor], b: dict[Any, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def check_overflow(rank: int, world_size: int, stage: int, dtype: str) -> None:
    """Law: a step is applied to both sides or to neither, whichever side and rank has the bad gradient."""
    layout, recipe = Layout(world_size, stage, 2, dtype), Recipe()
    model = explosive_model(recipe)
    engine = build_engine(recipe, layout, model=model, **SCHEDULED)
    loader = build_steps(recipe, layout, rank)
    initial = [*engine.get_lr(), *sparse_rates(engine)]
    assert engine.train_batch(step_at(loader, 0)).applied
    advanced = [rate * factor for rate, factor in zip(initial, (1 / 1.2, 0.9), strict=True)]
    assert [*engine.get_lr(), *sparse_rates(engine)] == pytest.approx(advanced)
    for number, side in enumerate(("sparse", "dense")):
        step = step_at(loader, 1)
        engine.collection.prepare([model.embedding_ids(mb) for mb in step.micro_batches], insert=True)  # new rows now
        before, rows, rates = weights(engine), rows_of(engine.collection), (engine.get_lr(), sparse_rates(engine))
        model.side = side if rank == world_size - 1 else ""
        output = engine.train_batch(step)
        assert not output.applied and not engine.was_step_applied(), side
        assert engine.skipped_steps == number + 1
        assert same(weights(engine), before) and same(rows_of(engine.collection), rows), side
        assert (engine.get_lr(), sparse_rates(engine)) == rates, "a schedule moved on a skipped step"
    model.side = ""
    before, rows = weights(engine), rows_of(engine.collection)
    output = engine.train_batch(step_at(loader, 1))
    assert output.applied, "the NaN of a skipped step must not survive it"
    assert not same(weights(engine), before) and not same(rows_of(engine.collection), rows)
    assert engine.global_steps == 4
    engine.destroy()


def check_overflow_leaves_no_trace(rank: int, world_size: int) -> None:
    """A skipped step and the same step without it: the trajectory after it is the same, bit for bit."""
    layout, recipe = Layout(world_size, 2, 2), Recipe()
    trajectories = []
    for explode in (True, False):
        model = explosive_model(recipe)
        engine = build_engine(recipe, layout, model=model)
        loader = build_steps(recipe, layout, rank)
        train(engine, loader, 0, 2)
        if explode:
            model.side = "sparse" if rank == 0 else ""
            assert not engine.train_batch(step_at(loader, 2)).applied
            model.side = ""
        trajectories.append(finish(engine, train(engine, loader, 2, 5)))
        engine.destroy()
    assert trajectories[0].losses == trajectories[1].losses
    assert same(trajectories[0].dense, trajectories[1].dense) and same(trajectories[0].rows, trajectories[1].rows)


def sparse_rates(engine: Any) -> list[float]:
    return [group["lr"] for group in engine.sparse_optimizer.param_groups]


def check_bad_steps(rank: int, world_size: int) -> None:
    """Every rank raises, none hangs, and the engine still works."""
    layout, recipe = Layout(world_size, 2, 2), Recipe()
    engine = build_engine(recipe, layout)
    loader = build_steps(recipe, layout, rank)
    last = rank == world_size - 1
    good = step_at(loader, 0)
    micro = good.micro_batches
    bad_ids = [{**micro[0], "input_ids": micro[0]["input_ids"].float()}, micro[1]]
    without_labels = [{name: value for name, value in mb.items() if name != "input_ids"} for mb in micro]
    for change, message in (
        ({"micro_batches": micro[:1]}, "micro-batches"),
        ({"micro_batches": []}, "no micro-batches"),
        ({"micro_batches": bad_ids}, "int64"),
        ({"micro_batches": without_labels}, "input_ids"),
        ({"num_items_in_batch": good.num_items_in_batch + 1}, "num_items_in_batch"),
        ({"num_items_in_batch": 0}, "nothing to train"),
    ):
        step = GlobalStep(**{**vars(good), **(change if last else {})})
        with pytest.raises((ValueError, RuntimeError, KeyError), match=message):
            engine.train_batch(step)
    assert engine.train_batch(good).applied
    engine.destroy()


def check_evaluation(rank: int, world_size: int) -> None:
    """Evaluation changes nothing, and gives the loss that training of the same model without dropout would."""
    layout, recipe = Layout(world_size, 3, 2), Recipe()
    engine = build_engine(recipe, layout)
    loader = build_steps(recipe, layout, rank)
    train(engine, loader, 0, 2)
    before, rows = weights(engine), rows_of(engine.collection)
    loss = engine.eval_batch(step_at(loader, 2))
    assert loss == engine.eval_batch(step_at(loader, 2)) > 0 and engine.training
    assert same(weights(engine), before) and same(rows_of(engine.collection), rows)
    unseen = step_at(loader, 2)
    for mb in unseen.micro_batches:
        mb["input_ids"] = mb["input_ids"] + 10**15
    engine.eval_batch(unseen)
    assert same(rows_of(engine.collection), rows), "evaluation inserted rows"
    assert engine.train_batch(step_at(loader, 2)).applied
    engine.destroy()


def check_own_loop(rank: int, world_size: int) -> None:
    """DeepSpeed's loop (forward, backward, step) trains both sides like train_batch does."""
    layout, recipe = Layout(world_size, 2, 2), Recipe()
    results = []
    for own in (False, True):
        engine = build_engine(recipe, layout)
        loader = build_steps(recipe, layout, rank)
        if own:
            engine.train()
            for number in range(4):
                step = step_at(loader, number)
                for k, micro_batch in enumerate(step.micro_batches):
                    engine.set_gradient_accumulation_boundary(k == 1)
                    loss = engine(**micro_batch, num_items_in_batch=step.num_items_in_batch).loss
                    engine.backward(loss * world_size)
                    engine.step()
                assert engine.was_step_applied()
        else:
            train(engine, loader, 0, 4)
        results.append((weights(engine), rows_of(engine.collection)))
        assert engine.global_steps == 4
        engine.destroy()
    for ours, theirs in zip(results[0], results[1], strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=2e-6)


def check_raw_deepspeed(rank: int, world_size: int) -> None:
    """A model with tables under plain DeepSpeed raises instead of leaving the tables untrained."""
    import deepspeed
    from grzoo.embeddings.engine.runtime import avoid_compilation

    avoid_compilation()
    layout, recipe = Layout(world_size, 1), Recipe()
    model = build_model(recipe)
    config = deepspeed_config(recipe, layout) | {"train_micro_batch_size_per_gpu": 1}
    config["optimizer"]["params"]["torch_adam"] = True
    engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())
    engine.train()
    with pytest.raises(ValueError, match="sparse optimizer"):
        engine(**step_at(build_steps(recipe, layout, rank), 0).micro_batches[0])
    engine.eval()
    engine(**step_at(build_steps(recipe, layout, rank), 0).micro_batches[0])
    engine.destroy()


def check_resume(rank: int, world_size: int, folder: Path, stage: int, dtype: str, optimizer: str) -> None:
    """Resume == never stopped: 3 + 3 steps against 3, save, new engine, load, 3, bit for bit."""
    recipe, layout = OPTIMIZERS[optimizer], Layout(world_size, stage, 2, dtype)
    schedules = SCHEDULED if optimizer != "adagrad" else {"sparse_lr_scheduler": SCHEDULED["sparse_lr_scheduler"]}
    loader = build_steps(recipe, layout, rank)
    engine = build_engine(recipe, layout, **schedules)
    result = train(engine, loader, 0, 3)
    path = engine.save_checkpoint(folder / f"{optimizer}-{stage}-{dtype}", client_state={"data": {"cursor": 36}})
    assert path.name == "checkpoint-3" and not list(path.parent.glob("*.incomplete"))
    finish(engine, train(engine, loader, 3, 6, result))
    engine.destroy()

    engine = build_engine(recipe, layout, **schedules)
    engine.train_batch(step_at(loader, 9))  # whatever it has learnt by now must go
    found, client_state = engine.load_checkpoint(path.parent)
    assert found == path and client_state == {"data": {"cursor": 36}} and engine.global_steps == 3
    resumed = finish(engine, train(engine, loader, 3, 6))
    assert resumed.losses == result.losses[3:], (stage, dtype, optimizer)
    assert same(resumed.dense, result.dense) and same(resumed.rows, result.rows)
    engine.destroy()
    if rank == 0:
        (path.parent / "losses.json").write_text(json.dumps(result.losses))


def check_frozen_and_buffers(rank: int, world_size: int, folder: Path, stage: int) -> None:
    """Parameters that are not trained, and buffers, are in a checkpoint too."""
    recipe, layout = Recipe(), Layout(world_size, stage, 1)

    def build(value: float) -> Any:
        model = build_model(recipe)
        model.model.position_embedding.weight.requires_grad_(False).fill_(value)
        model.register_buffer("tally", torch.tensor([value, value]))
        return build_engine(recipe, layout, model=model)

    loader = build_steps(recipe, layout, rank)
    engine = build(0.5)
    train(engine, loader, 0, 1)
    engine.save_checkpoint(folder)
    expected = train(engine, loader, 1, 2).losses
    engine.destroy()
    engine = build(0.25)
    engine.load_checkpoint(folder)
    assert engine.module.tally.tolist() == [0.5, 0.5]
    assert train(engine, loader, 1, 2).losses == expected
    engine.destroy()


def check_lost_schedule(rank: int, world_size: int) -> None:
    """DeepSpeed replaces an Adagrad, so that a schedule of it would do nothing: refused."""
    with pytest.raises(ValueError, match="LambdaLR would not reach"):
        build_engine(OPTIMIZERS["adagrad"], Layout(world_size, 1), lr_scheduler=SCHEDULED["lr_scheduler"])


def check_elastic(rank: int, world_size: int, folder: Path, stage: int) -> list[float]:
    """A checkpoint of two ranks at one stage, loaded here: differences of the next losses from those of two ranks."""
    recipe, layout = Recipe(), Layout(world_size, stage, 1)
    saved = folder / "adamw-2-fp32"
    engine = build_engine(recipe, layout, **SCHEDULED)
    engine.load_checkpoint(saved)
    losses = train(engine, build_steps(recipe, layout, rank), 3, 6).losses
    engine.destroy()
    expected = json.loads((saved / "losses.json").read_text())[3:]
    return [abs(a - b) for a, b in zip(losses, expected, strict=True)]


def check_damage(rank: int, world_size: int, folder: Path) -> None:
    """Incomplete and damaged checkpoints are refused by every rank with a message; an older good one is taken."""
    import torch.distributed as dist

    recipe, layout = Recipe(), Layout(world_size, 1, 1)
    engine = build_engine(recipe, layout)
    loader = build_steps(recipe, layout, rank)
    train(engine, loader, 0, 1)
    engine.save_checkpoint(folder)
    train(engine, loader, 1, 2)
    newest = engine.save_checkpoint(folder)
    again = engine.save_checkpoint(folder)  # replaces the complete one of the same name
    assert again == newest and sorted(p.name for p in folder.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    pristine = weights(engine)

    def damage(name: str, change: Any) -> None:
        dist.barrier()
        if rank == 0:
            change(newest / name)
        dist.barrier()

    contents = {p.name: p.read_bytes() for p in newest.iterdir()}
    shard = next(name for name in contents if name.startswith("embeddings-") and name.endswith("safetensors"))
    for name, change, message in (
        ("COMPLETE.json", lambda p: p.unlink(), "never finished"),
        (shard, lambda p: p.write_bytes(contents[shard][:-1]), "bytes instead of"),
        (shard, lambda p: p.write_bytes(contents[shard][:-1] + bytes([contents[shard][-1] ^ 4])), "checksum"),
        ("state.json", lambda p: p.unlink(), "missing"),
        ("dense-00002-of-00002.safetensors", lambda p: p.write_bytes(contents[shard]), "not part of it"),
    ):
        damage(name, change)
        with pytest.raises(ValueError, match=message):
            engine.load_checkpoint(folder, "checkpoint-2")
        assert same(weights(engine), pristine), "a refused checkpoint changed the engine"
        assert engine.load_checkpoint(folder)[0] == folder / "checkpoint-1"
        damage(name, lambda p: p.write_bytes(contents[p.name]) if p.name in contents else p.unlink())
        assert engine.load_checkpoint(folder)[0] == newest
    engine.destroy()

    other = build_engine(OPTIMIZERS["sgd"], layout)
    with pytest.raises(ValueError, match="optimizer.*AdamW.*SGD"):
        other.load_checkpoint(folder)
    other.destroy()
    with_schedule = build_engine(recipe, layout, **SCHEDULED)
    with pytest.raises(ValueError, match="lr_scheduler: .* none, this engine has LambdaLR"):
        with_schedule.load_checkpoint(folder)
    with_schedule.destroy()
    wider = build_engine(recipe, layout, model=HSTUForRetrieval(wider_config(recipe)))
    with pytest.raises(ValueError, match="another model|has shape"):
        wider.load_checkpoint(folder)
    with pytest.raises(ValueError, match="not JSON"):
        wider.save_checkpoint(folder, "checkpoint-9", client_state={"when": object()})
    with pytest.raises(ValueError, match="no complete checkpoint"):
        wider.load_checkpoint(folder / "nowhere")
    if rank == 0:
        (folder / "checkpoint-9.incomplete").mkdir()
        (folder / "checkpoint-9.incomplete" / "leftover").write_text("of a killed save")
    dist.barrier()
    wider.save_checkpoint(folder, "checkpoint-9")
    assert not (folder / "checkpoint-9" / "leftover").exists()
    wider.destroy()


def wider_config(recipe: Recipe) -> Any:
    config = build_model(recipe).config
    config.num_hidden_layers = 3
    return config


def check_failed_save(rank: int, world_size: int, folder: Path) -> None:
    """A save that fails on one rank raises on all, leaves nothing of itself, and the older checkpoint still loads."""
    import grzoo.embeddings.engine.checkpoint as checkpoint
    import grzoo.embeddings.engine.dense_io as dense_io
    import grzoo.embeddings.saving as saving
    import torch.distributed as dist

    recipe, layout = Recipe(), Layout(world_size, 2, 1)
    engine = build_engine(recipe, layout)
    train(engine, build_steps(recipe, layout, rank), 0, 1)
    engine.save_checkpoint(folder)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for module, name, fails_on in (
        (dense_io, "save_tensors", 0),
        (saving, "TensorFileWriter", 0),
        (saving.TensorFileWriter, "reserve", 0),
        (saving.ShardedRows, "read", world_size - 1),
        (checkpoint.folders, "publish", 0),
    ):
        original = getattr(module, name)
        if rank == fails_on:
            setattr(module, name, full)
        with pytest.raises((OSError, RuntimeError), match="No space left"):
            engine.save_checkpoint(folder, "checkpoint-2")
        setattr(module, name, original)
        dist.barrier()  # rank 0 has tidied up
        assert [p.name for p in folder.iterdir()] == ["checkpoint-1"]
    assert engine.load_checkpoint(folder)[0].name == "checkpoint-1"
    engine.destroy()
    if rank == 0:
        shutil.rmtree(folder)
