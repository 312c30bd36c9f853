"""The order of a slice's chips in the mesh, on slices that are described and not there."""

from types import SimpleNamespace

import numpy as np
import pytest

from gemma_tpu.hardware import torus


def slice_of(x: int, y: int, z: int = 1, cores: int = 1):
    return [
        SimpleNamespace(platform="tpu", coords=(a, b, c), core_on_chip=core)
        for c in range(z) for b in range(y) for a in range(x) for core in range(cores)
    ]  # fmt: skip


def hops(mesh: np.ndarray, axis: int) -> list[int]:
    rings = np.moveaxis(mesh, axis, -1).reshape(-1, mesh.shape[axis])
    return [
        sum(abs(a - b) for a, b in zip(one.coords, other.coords, strict=True))
        for ring in rings for one, other in zip(ring, np.roll(ring, -1), strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize("grid", [(2, 2), (2, 4), (4, 4), (2, 2, 2), (2, 2, 4), (4, 8)], ids=str)
@pytest.mark.parametrize("axis", [1, 3])
def test_one_axis_goes_round_the_whole_slice_wire_by_wire(grid, axis):
    devices = slice_of(*grid)
    shape = [1, 1, 1, 1]
    shape[axis] = len(devices)
    mesh = torus.arrange(devices, shape)
    assert set(hops(mesh, axis)) == {1}
    assert {id(device) for device in mesh.flat} == {id(device) for device in devices}


def test_two_axes_take_the_two_sides_of_the_slice():
    mesh = torus.arrange(slice_of(2, 2), (1, 2, 1, 2))
    assert set(hops(mesh, 1)) == set(hops(mesh, 3)) == {1}
    mesh = torus.arrange(slice_of(2, 4), (1, 4, 1, 2))
    assert set(hops(mesh, 3)) == {1} and sorted(hops(mesh, 1)) == [1] * 6 + [3] * 2  # the way back is open


def test_cores_of_one_chip_stay_together():
    mesh = torus.arrange(slice_of(2, 2, cores=2), (1, 4, 1, 2))
    assert all(pair[0].coords == pair[1].coords for pair in mesh.reshape(4, 2))


def test_one_chip_is_a_mesh_too():
    assert torus.arrange(slice_of(1, 1), (1, 1, 1, 1)).shape == (1, 1, 1, 1)
