"""Law 1 for inference: two and three ranks that share the rows answer like one process."""

import pytest
import torch
from grzoo.models import AutoModelForRetrieval
from retrieval_jobs import catalogue_case, expected, sharded_retrieval
from spawn import spawn

K = 40


@pytest.fixture(scope="module")
def model():
    from grzoo.models import HSTUConfig, HSTUForRetrieval

    torch.manual_seed(0)
    config = HSTUConfig(hidden_size=6, attention_head_dim=3, linear_head_dim=4, initializer_range=0.5)
    model = HSTUForRetrieval(config, embedding_backend="naive").eval()
    with torch.no_grad():
        model.embeddings({"candidate_ids": torch.arange(40)}, insert=True)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def results(model, folder):
    model.save_pretrained(folder / "one")
    return spawn(3, sharded_retrieval, str(folder / "one"), str(folder / "two"), K, timeout=180)


@pytest.mark.parametrize("world_size", [2, 3])
def test_catalogue_equals_brute_force(world_size, results):
    case = catalogue_case(3, users=23, items=40, world_size=world_size)
    answers = [result[str(world_size)] for result in results[:world_size]]
    assert sum(answer["local"] for answer in answers) == 40 and all(answer["local"] for answer in answers)
    users = [user for answer in answers for user in answer["users"]]
    assert sorted(users) == list(range(23)) and not answers[-1]["users"]
    for answer in answers:
        for n, user in enumerate(answer["users"]):
            assert (answer["ids"][n], answer["scores"][n], answer["ranks"][n]) == expected(case, user, K)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_mistake_of_one_rank_stops_all(world_size, results):
    refused = [result[str(world_size)]["refused"] for result in results[:world_size]]
    assert "top_k must lie between 1 and the number of candidates, 40; got 1000000" in refused[0]
    assert all("Rank 0 asked for something impossible" in message for message in refused[1:])
    broken = [result[str(world_size)]["broken"] for result in results[:world_size]]
    assert "are not finite, the first is that of item" in broken[0]
    assert all("Rank 0" in message for message in broken[1:])


def test_sharded_model_recommends_and_saves_like_one_process(model, folder, results):
    answers = [result["model"] for result in results[:2]]
    for rank, answer in enumerate(answers):
        history = torch.arange(1, 6).unsqueeze(0) + rank
        best = model.recommend(history, timestamps=history * 1000, top_k=4)
        assert answer["ids"] == best.item_ids.tolist()
        torch.testing.assert_close(torch.tensor(answer["scores"]), best.scores, rtol=0, atol=1e-6)
        assert "sharded over 2 ranks" in answer["refusal"]
    rows = [answer["rows"] for answer in answers]
    assert all(rows) and sum(rows) == model.embeddings.num_rows() == 40
    assert sum(answer["trained"] for answer in answers) == 10  # loaded on two ranks, the tables can be trained
    again = AutoModelForRetrieval.from_pretrained(folder / "two", embedding_backend="naive")
    for name, values in model.embeddings.export_rows("items").items():
        assert torch.equal(again.embeddings.export_rows("items")[name], values), name
