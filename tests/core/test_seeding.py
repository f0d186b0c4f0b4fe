"""Draws as pure functions: their distribution, independence of the batch, and vmap."""

from __future__ import annotations

import pytest
import torch

from metarun.core import seeding

CPU = torch.device("cpu")
KEYS = seeding.task_keys(0, "train", 0, 8, CPU)
PINNED_KEYS = [8103316341646165157, 6482759468947945616]
PINNED_CHOICE = [[4, 5, 2, 9], [1, 0, 8, 4]]


def test_keys_and_draws_are_pinned_so_that_no_release_changes_the_episodes() -> None:
    assert seeding.key(0, "train") == seeding.key(0, "train") != seeding.key("0", "train")
    assert KEYS[:2].tolist() == PINNED_KEYS
    assert seeding.choose(KEYS[:2], 3, 10, 4).tolist() == PINNED_CHOICE


def test_a_task_has_the_same_key_in_whatever_batch_it_is_drawn() -> None:
    apart = [seeding.task_keys(0, "train", i, 1, CPU) for i in range(8)]
    assert torch.equal(KEYS, torch.cat(apart))
    assert not torch.equal(KEYS, seeding.task_keys(1, "train", 0, 8, CPU))
    assert not torch.equal(KEYS, seeding.task_keys(0, "val", 0, 8, CPU))


def test_draws_of_a_key_do_not_depend_on_the_other_keys() -> None:
    assert torch.equal(seeding.uniform(KEYS, 1, (5,))[3], seeding.uniform(KEYS[3], 1, (5,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_draws_fill_their_range_evenly(dtype: torch.dtype) -> None:
    draws = seeding.uniform(KEYS[0], 0, (200_000,), low=-1.0, high=3.0, dtype=dtype)
    assert draws.dtype == dtype
    assert draws.min() >= -1.0
    assert draws.max() < 3.0
    counts = torch.histc(draws.double(), 20, -1.0, 3.0)
    # Chi-squared with 19 degrees of freedom: beyond 50 in one of 7,000 samples.
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 50


def test_normal_draws_have_the_moments_of_the_normal_distribution() -> None:
    draws = seeding.normal(KEYS[0], 0, (200_000,), dtype=torch.float64)
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert float((draws**power).mean()) == pytest.approx(moment, abs=5 * (spread / 2e5) ** 0.5)


def test_choices_are_distinct_and_every_thing_is_chosen_equally_often() -> None:
    keys = seeding.task_keys(0, "train", 0, 20_000, CPU)
    chosen = seeding.choose(keys, 0, 10, 3)
    assert all(len(set(row)) == 3 for row in chosen[:200].tolist())
    counts = torch.bincount(chosen.flatten(), minlength=10).double()
    assert ((counts - 6_000) ** 2 / 6_000).sum() < 35


def test_slots_and_neighboring_keys_are_uncorrelated() -> None:
    draws = seeding.uniform(seeding.task_keys(0, "train", 0, 50_000, CPU), 0, dtype=torch.float64)
    other = seeding.uniform(seeding.task_keys(0, "train", 0, 50_000, CPU), 1, dtype=torch.float64)
    for pair in (torch.stack([draws, other]), torch.stack([draws[1:], draws[:-1]])):
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 5 / 50_000**0.5


def test_integers_stay_below_their_bound() -> None:
    draws = seeding.integers(KEYS, 0, 4, (1000,))
    assert sorted(draws.unique().tolist()) == [0, 1, 2, 3]


def test_draws_work_under_vmap() -> None:
    batched = torch.vmap(lambda key: seeding.uniform(key, 2, (3, 2)))(KEYS)
    assert torch.equal(batched, seeding.uniform(KEYS, 2, (3, 2)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_bits() -> None:
    gpu = torch.device("cuda")
    there = seeding.task_keys(0, "train", 0, 8, gpu)
    assert torch.equal(there.cpu(), KEYS)
    assert torch.equal(seeding.uniform(there, 1, (9,)).cpu(), seeding.uniform(KEYS, 1, (9,)))


def test_torch_is_seeded_as_by_itself_and_without_a_stack_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    number = seeding.key("update", 0, 7)
    torch.manual_seed(number)
    theirs = torch.randn(5), torch.randint(9, (5,))

    def slow(*_: object, **__: object) -> list[str]:
        raise AssertionError("a stack trace was requested")

    monkeypatch.setattr("traceback.format_stack", slow)
    seeding.seed_torch(number)
    assert torch.equal(torch.randn(5), theirs[0])
    assert torch.equal(torch.randint(9, (5,)), theirs[1])
