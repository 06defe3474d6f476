"""BLIP-2's first stage in two processes: together they compute what one computes for all pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mllm_fast.models.blip2_stage1 import Blip2Stage1
from mllm_fast.models.contrast import hard_negatives
from mllm_fast.models.gathering import gathered, processes
from tests.families.instruments import assert_same, recording
from tests.families.qformers import DIM, IMAGE
from tests.models.processes import run_processes
from tests.models.stage1_models import PATCHES, batch, stage1

PAIRS, OWN = 4, 2
# For each text a wrong image and for each image a wrong text, counted through both processes.
NEGATIVES = {
    "of others": (torch.tensor([2, 3, 0, 0]), torch.tensor([3, 0, 1, 1])),
    # The first process reads images and texts of its own alone.
    "of one": (torch.tensor([1, 0, 0, 1]), torch.tensor([1, 0, 1, 0])),
    "of none": (torch.tensor([1, 0, 3, 2]), torch.tensor([1, 0, 3, 2])),
}
TOWER = ("frozen", "trained")


def pairs() -> dict[str, Tensor]:
    """Four pairs; texts of 6, 2, 3 and 4 tokens, so that the processes pad to different lengths."""
    parts = [batch(seed) for seed in (0, 1)]
    given = {name: torch.cat([part[name] for part in parts])[:PAIRS] for name in parts[0]}
    given["attention_mask"] = (torch.arange(6) < torch.tensor([[6], [2], [3], [4]])).long()
    return given


def share(rank: int) -> dict[str, Tensor]:
    """The pairs of a process, padded no further than they need."""
    given = {name: x[OWN * rank : OWN * (rank + 1)] for name, x in pairs().items()}
    length = int(given["attention_mask"].sum(1).max())
    return given | {name: given[name][:, :length] for name in ("input_ids", "attention_mask")}


def step(model: Any, given: dict[str, Tensor], stage: Blip2Stage1, **more: Any) -> dict[str, Tensor]:
    stage.zero_grad(set_to_none=True)
    losses = model(**given, **more)
    losses["loss"].backward()
    found = {name: value.detach().clone() for name, value in losses.items()}
    return found | {f"d {name}": p.grad.clone() for name, p in stage.named_parameters() if p.grad is not None}


def built(tower: str) -> Blip2Stage1:
    model = stage1()[0].double().train()
    model.retrieval.vision_model.requires_grad_(tower == "trained")
    return model


def both(rank: int) -> dict[str, Any]:
    """All that is computed in a process."""
    found: dict[str, Any] = {}
    for tower in TOWER:
        model = built(tower)
        parallel = DistributedDataParallel(model)
        for name, negatives in NEGATIVES.items():
            own = tuple(x[OWN * rank : OWN * (rank + 1)] for x in negatives)
            found[f"{tower}, {name}"] = step(parallel, share(rank), model, negatives=own)
    model = built("frozen")
    torch.manual_seed(rank)
    found["drawn"] = step(model, share(rank), model)
    given = share(rank)
    features = model.encode_images(given.pop("pixel_values"))
    own = tuple(x[OWN * rank : OWN * (rank + 1)] for x in NEGATIVES["of others"])
    with recording() as record:
        model(**given, features=features, negatives=own)
    found["image rows"] = [g.m for g in record.gemms if g.k == IMAGE and g.n % (2 * DIM) == 0]
    alone = tuple(x[:OWN] for x in NEGATIVES["of none"])
    found["alone"] = step(model, share(rank), model, negatives=alone, across_processes=False)
    uneven = {name: x[: 1 + rank] for name, x in share(rank).items()}
    try:
        model(**uneven)
    except ValueError as error:
        found["uneven"] = str(error)
    x = torch.full((1, 2), float(rank + 1), requires_grad=True)
    (gathered(x).sum(1) * torch.tensor([1.0, 10.0]) * (rank + 1)).sum().backward()
    found["gathered"] = [gathered(x.detach()), x.grad]
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes(both, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("tower", TOWER)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_losses_and_averaged_gradients_equal_one_process(two: list[dict[str, Any]], tower: str, negatives: str) -> None:
    model = built(tower)
    whole = step(model, pairs(), model, negatives=NEGATIVES[negatives])
    first, second = (found[f"{tower}, {negatives}"] for found in two)
    losses = ("loss", "itc", "itm", "itg")
    assert_same({name: (first[name] + second[name]) / 2 for name in losses}, {name: whole[name] for name in losses})
    gradients = {name: value for name, value in whole.items() if name not in losses}
    assert len(gradients) > 50
    for found in (first, second):
        assert_same({name: value for name, value in found.items() if name not in losses}, gradients)


def test_each_image_that_a_process_reads_is_projected_once(two: list[dict[str, Any]]) -> None:
    # The first process reads two images of the second, which reads one of the first, twice.
    assert [found["image rows"] for found in two] == [[2 * PATCHES, 2 * PATCHES], [2 * PATCHES, PATCHES]]


def test_negatives_are_drawn_from_all_processes_but_never_the_pair_itself(two: list[dict[str, Any]]) -> None:
    assert all(torch.stack(list(found["drawn"].values())[:4]).isfinite().all() for found in two)
    alike = torch.tensor([[0.0, 0.0, 9.0, 0.0], [0.0, 0.0, 0.0, 9.0]])  # pairs 2 and 3 with all texts
    drawn = [hard_negatives((alike, alike.roll(1, 1)), 2) for _ in range(200)]
    image, text = (torch.stack(part) for part in zip(*drawn, strict=True))
    for rows, own in ((image, 2), (text, 2)):
        assert (rows != torch.tensor([own, own + 1])).all()
    assert set(text[:, 0].tolist()) == {0, 1, 3}
    assert (image[:, 0] == 3).float().mean() > 0.9


def test_a_process_may_keep_to_itself(two: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(two):
        model = built("frozen")
        negatives = tuple(x[:OWN] for x in NEGATIVES["of none"])
        assert_same(found["alone"], step(model, share(rank), model, negatives=negatives))


def test_uneven_processes_are_told(two: list[dict[str, Any]]) -> None:
    assert all("the processes have [1, 2] pairs in this step" in found["uneven"] for found in two)


def test_gathered_rows_sum_their_gradients(two: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(two):
        rows, gradient = found["gathered"]
        assert rows.tolist() == [[1.0, 1.0], [2.0, 2.0]]
        assert gradient.tolist() == [[3.0, 3.0] if rank == 0 else [30.0, 30.0]]
    x = torch.randn(2, 3)
    assert processes() == (0, 1)
    assert gathered(x) is x
