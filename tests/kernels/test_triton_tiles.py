"""How the work is divided: the table, the split, what was tuned."""

from types import SimpleNamespace

import pytest
import torch

from awq_core.kernels.triton import tiles
from awq_core.kernels.triton.tiles import DEFAULTS, INTERPRETER, Tile, choose, device_class, split_for


@pytest.fixture(autouse=True)
def forget():
    choose.cache_clear()
    yield
    choose.cache_clear()


def test_every_device_class_has_all_it_needs():
    assert set(DEFAULTS) == set(tiles.CROSSOVER)
    for table in DEFAULTS.values():
        assert list(table) == sorted(table) and set(table) <= set(tiles.BUCKETS)
        assert all(rows in (64, 128) and warps in (2, 4, 8) and stages for rows, warps, stages in table.values())


@pytest.mark.parametrize(
    ("tokens", "bucket"), [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (33, 64), (64, 64), (65, 64), (255, 64)]
)
def test_the_smallest_bucket_that_holds_the_tokens(tokens, bucket):
    assert choose("sm_90", 132, torch.float16, 4096, 4096, 128, tokens).tokens == bucket


def test_few_outputs_are_split_and_many_are_not():
    narrow = choose("sm_90", 132, torch.float16, 4096, 4096, 128, 1)
    wide = choose("sm_90", 132, torch.float16, 152064, 4096, 128, 1)
    assert narrow.split == 8 and wide.split == 1


@pytest.mark.parametrize("blocks", [1, 3, 4, 7, 8, 32, 112])
@pytest.mark.parametrize("programs", [1, 10, 500, 10_000])
def test_a_split_keeps_its_limits(programs, blocks):
    split = split_for(programs, blocks, 8, 100)
    assert split in (1, 2, 4, 8, 16)
    assert split == 1 or blocks >= 4 * split
    assert split == 1 or programs * split // 2 < 400
    enough = programs * split >= 400 or blocks < 8 * split or split == 16
    assert enough


def test_what_was_tuned_comes_first(monkeypatch):
    best = Tile(64, 8, 3, 2, 6)
    monkeypatch.setitem(tiles.TUNED, ("sm_90", torch.bfloat16, 4096, 4096, 128, 8), best)
    assert choose("sm_90", 132, torch.bfloat16, 4096, 4096, 128, 3) == best
    assert choose("sm_90", 132, torch.float16, 4096, 4096, 128, 3) != best
    assert choose("sm_90", 132, torch.bfloat16, 4096, 4096, 128, 9) != best


def test_small_groups_take_fewer_rows_where_registers_are_short():
    rows = {group: choose("sm_90", 132, torch.float16, 4096, 4096, group, 64).rows for group in (0, 32, 64, 128)}
    assert rows == {0: 128, 32: 64, 64: 64, 128: 128}
    assert choose("sm_90", 132, torch.float16, 4096, 4096, 32, 8).rows == 128


def test_a_tile_for_an_odd_number_of_rows():
    assert Tile(128, 8, 2, 4, 4).halved() == Tile(64, 8, 2, 4, 4)


@pytest.mark.parametrize(
    ("capability", "hip", "name"),
    [
        ((8, 0), None, "sm_80"),
        ((8, 6), None, "sm_89"),
        ((8, 9), None, "sm_89"),
        ((9, 0), None, "sm_90"),
        ((10, 3), None, "sm_100"),
        ((12, 0), None, "sm_89"),
        ((9, 4), "gfx942:sramecc+:xnack-", "cdna"),
        ((11, 0), "gfx1100", "rdna"),
    ],
)
def test_the_class_of_a_gpu(monkeypatch, capability, hip, name):
    major, minor = capability
    fields = {"major": major, "minor": minor, "multi_processor_count": 77, "gcnArchName": hip}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**fields))
    monkeypatch.setattr(torch.version, "hip", hip and "7.0")
    assert device_class.__wrapped__(torch.device("cuda", 0)) == (name, 77)


def test_the_cpu_is_the_interpreter():
    assert device_class.__wrapped__(torch.device("cpu"))[0] == INTERPRETER
