"""Collectives on the links of a slice: groups as XLA writes them, and seconds by hand."""

import pytest
from hlo_helper import GIGA, place

from gemma_tpu.compiled.links import Grid, Transfer, replica_groups, wraps

RING = ((0, 1), (1, 3), (3, 2), (2, 0))  # around the square of a 2x2 slice


def seconds(grid: Grid, transfer: Transfer) -> float:
    return max(grid.loads(transfer).values(), default=0.0)


def gather(size: float, *groups: tuple[int, ...]) -> Transfer:
    return Transfer("all-gather", size, groups=groups)


@pytest.mark.parametrize(
    "attributes, groups",
    [
        ("replica_groups={{0,1},{2,3}}, dimensions={0}", ((0, 1), (2, 3))),
        ("replica_groups={}, dimensions={0}", ((0, 1, 2, 3),)),
        ("replica_groups=[2,2]<=[4], dimensions={0}", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={0}", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}, x=1", ((0, 2), (1, 3))),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, x=1", ((0, 1), (2, 3))),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1','axis_0'}, x=1", ((0, 2, 1, 3),)),
        ("replica_groups=mesh['axis_0'=4] {'axis_0':(1)2}, x=1", ((0, 2), (1, 3))),
        ("replica_groups=mesh['axis_0'=4] {'axis_0':(2)2}, x=1", ((0, 1), (2, 3))),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0','axis_1':(1)2}, x=1", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a'}, x=1", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([4]) {'a'}, x=1", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,1,3,2) {'a'}, x=1", None),
        ("replica_groups=@groups, x=1", None),
    ],
)
def test_replica_groups_are_read_in_every_way_of_writing_them(attributes, groups):
    assert replica_groups(attributes, 4) == groups


def test_a_square_receives_over_two_links_and_a_pair_over_one():
    square = Grid(place("2x2"))
    assert seconds(square, gather(20 * GIGA, (0, 1, 2, 3))) == pytest.approx(1.0)  # 20 GB over 2 links of 10 GB/s
    assert seconds(square, gather(20 * GIGA, (0, 1), (2, 3))) == pytest.approx(2.0)


def test_an_open_line_has_one_link_at_its_end_and_a_closed_one_two():
    line = gather(10 * GIGA, (0, 1, 2, 3))
    assert seconds(Grid(place("4x1")), line) == pytest.approx(1.0)
    assert seconds(Grid(place("4x1"), wrap=(True, False)), line) == pytest.approx(0.5)


def test_chips_that_are_no_neighbours_share_the_links_between():
    apart = gather(10 * GIGA, (0, 2), (1, 3))  # on a line: both groups cross the middle link
    assert seconds(Grid(place("4x1")), apart) == pytest.approx(2.0)


def test_the_device_order_of_the_dump_decides_who_are_neighbours():
    pairs = gather(10 * GIGA, (0, 2), (1, 3))
    assert seconds(Grid(place("4x1"), order=(0, 2, 1, 3)), pairs) == pytest.approx(1.0)


def test_rings_in_both_directions_use_different_links():
    grid = Grid(place("2x2"))
    ahead = grid.loads(Transfer("collective-permute", 10 * GIGA, pairs=RING))
    back = grid.loads(Transfer("collective-permute", 10 * GIGA, pairs=tuple((b, a) for a, b in RING)))
    assert set(ahead.values()) == {1.0} == set(back.values()) and not set(ahead) & set(back)


def test_an_all_to_all_goes_to_the_far_corner_over_two_links():
    # each chip sends 10 GB to each other one: a link carries its neighbour's and what crosses to a far corner
    found = Grid(place("2x2")).loads(Transfer("all-to-all", 30 * GIGA, groups=((0, 1, 2, 3),)))
    assert len(found) == 8 and set(found.values()) == {2.0}


def test_devices_of_one_chip_exchange_six_times_as_fast():
    grid = Grid(place("2x1", devices=2))
    assert seconds(grid, gather(6 * GIGA, (0, 1), (2, 3))) == pytest.approx(0.1)
    assert seconds(grid, gather(6 * GIGA, (0, 1, 2, 3))) == pytest.approx(0.6)
    assert seconds(grid, Transfer("collective-permute", 6 * GIGA, pairs=((0, 1), (2, 3)))) == pytest.approx(0.1)


def test_only_whole_tori_close():
    assert wraps((2, 2, 1)) == wraps((2, 2, 4)) == (False,) * 3 and wraps((4, 4, 8)) == (True,) * 3
    assert wraps((8, 16)) == (False, True) and wraps((4, 8)) == (False, False)


def test_looking_at_distinct_links_only_changes_no_time():
    grid = Grid(place("4x4"))
    transfers = [
        gather(10 * GIGA, tuple(range(16))),
        gather(3 * GIGA, *(tuple(range(at, at + 4)) for at in range(0, 16, 4))),
        Transfer("collective-permute", 2 * GIGA, pairs=((0, 1), (5, 10))),
        Transfer("all-to-all", GIGA, groups=(tuple(range(16)),)),
    ]
    before = [(seconds(grid, one), len(grid.loads(one))) for one in transfers]
    grid.keep_distinct(transfers)
    after = [(seconds(grid, one), len(grid.loads(one))) for one in transfers]
    assert [time for time, _ in after] == [time for time, _ in before]
    assert sum(count for _, count in after) < sum(count for _, count in before) / 2
