import math

import numpy as np
import pytest

from stream.errors import ConfigError, RoiMapError
from stream.operators import roimap_file
from stream.operators.qmap import ring_map

SHAPE = (40, 60)

# 4 pi / lambda at 12.398419843320026 keV, where lambda is 1 angstrom
K = 4 * math.pi


def ring(**given):
    defaults = {
        "shape": SHAPE,
        "beam_center_x": 10.0,
        "beam_center_y": 20.0,
        "detector_distance": 2.0,
        "pixel_size": 1e-3,
        "incident_energy": 12.398419843320026,
        "n_static": 12,
        "n_dynamic": 3,
    }
    return ring_map(**defaults | given)


def q_of(row, column):
    x, y = 1e-3 * (column - 10), 1e-3 * (row - 20)
    cos_theta = 2.0 / math.sqrt(x * x + y * y + 4.0)
    return K * math.sqrt((1 - cos_theta) / 2)


def test_a_pixel_at_30_degree_has_the_q_worked_out_by_hand():
    # tan 30 deg = 1/sqrt(3): 1 m to the side at sqrt(3) m; sin 15 deg = (sqrt(6) - sqrt(2)) / 4
    q = math.pi * (math.sqrt(6) - math.sqrt(2))
    geometry = {"shape": (1, 2), "beam_center_x": 0.0, "beam_center_y": 0.0, "pixel_size": 0.01, "n_dynamic": 1}
    maps = ring(
        **geometry, detector_distance=0.01 * math.sqrt(3), n_static=1, q_min=q * (1 - 1e-9), q_max=q * (1 + 1e-9)
    )
    assert maps.static_roi_map.tolist() == [[0, 1]]


def test_q_is_inversely_proportional_to_the_wavelength():
    one = ring()
    other = ring(incident_energy=2 * 12.398419843320026)
    assert one.digest == other.digest
    assert other.static_q == pytest.approx(2 * one.static_q)


def test_rings_are_equally_spaced_over_the_q_on_the_detector():
    maps = ring()
    corner = q_of(0, 59)
    assert maps.static_q == pytest.approx((np.arange(12) + 0.5) * corner / 12)
    assert maps.dynamic_q == pytest.approx((np.arange(3) + 0.5) * corner / 3)
    for row, column in ((20, 10), (0, 0), (39, 59), (0, 59), (20, 40), (7, 33)):
        expected = min(int(q_of(row, column) / corner * 12), 11) + 1
        assert maps.static_roi_map[row, column] == expected
        assert maps.dynamic_roi_map[row, column] == (expected - 1) // 4 + 1


def test_static_rings_are_grouped_into_dynamic_rings():
    assert ring().dynamic_of_static.tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]


def test_pixels_outside_of_the_range_or_masked_are_outside():
    mask = np.ones(SHAPE, bool)
    mask[:, 30] = False
    low, high = q_of(20, 20) * (1 - 1e-9), q_of(20, 40) * (1 + 1e-9)
    maps = ring(q_min=low, q_max=high, mask=mask)
    inside = np.array([[low <= q_of(row, column) <= high for column in range(60)] for row in range(40)])
    assert np.array_equal(maps.static_roi_map > 0, inside & mask)
    assert np.array_equal(maps.arrays()["mask"], mask)
    assert maps.static_roi_map[20, 40] == 12


def test_the_default_range_is_that_of_the_pixels_in_use():
    mask = np.zeros(SHAPE, bool)
    mask[20, 20:31] = True
    maps = ring(mask=mask, n_static=2, n_dynamic=1)
    assert maps.static_roi_map[20, 20:31].tolist() == [1] * 5 + [2] * 6
    assert maps.dynamic_q == pytest.approx([(q_of(20, 20) + q_of(20, 30)) / 2])


def test_sectors_count_from_the_left_against_the_clock_with_rows_downwards():
    # as pySimpleMask, where phi is 90 degree above the beam
    maps = ring(n_static=1, n_dynamic=1, n_phi=4)
    assert maps.dynamic_phi.tolist() == [-135, -45, 45, 135]
    below, above, left, right = 30, 10, 5, 15
    assert maps.dynamic_roi_map[below, left] == 1
    assert maps.dynamic_roi_map[below, right] == 2
    assert maps.dynamic_roi_map[above, right] == 3
    assert maps.dynamic_roi_map[above, left] == 4


def test_bins_without_pixels_are_left_out_and_the_others_know_their_place():
    mask = np.ones(SHAPE, bool)
    mask[:21, 10:] = False
    maps = ring(mask=mask, n_static=4, n_dynamic=2, n_phi=4)
    arrays = maps.arrays()
    assert np.unique(maps.static_roi_map).tolist() == list(range(maps.n_static + 1))
    assert arrays["static_num_pts"].tolist() == [4, 4]
    assert maps.n_static < 16
    sectors = arrays["static_index_mapping"] % 4
    assert 2 not in sectors
    assert maps.dynamic_phi.tolist() == [[-135, -45, 45, 135][index % 4] for index in arrays["dynamic_index_mapping"]]
    static_of_dynamic = arrays["static_index_mapping"] // 8 * 4 + sectors
    assert arrays["dynamic_index_mapping"][maps.dynamic_of_static - 1].tolist() == static_of_dynamic.tolist()


def test_a_made_map_is_written_and_read(tmp_path):
    maps = ring(n_phi=3)
    roimap_file.write(tmp_path / "q.h5", maps)
    again = roimap_file.read(tmp_path / "q.h5")
    assert again.digest == maps.digest
    for name, value in maps.arrays().items():
        np.testing.assert_equal(again.arrays()[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"detector_distance": 0.0}, "detector_distance 0.0 m"),
        ({"detector_distance": math.nan}, "detector_distance nan m"),
        ({"pixel_size": 75.0}, "pixel_size 75.0 m"),
        ({"incident_energy": 11000.0}, "incident_energy 11000.0 keV"),
        ({"beam_center_x": math.inf}, "beam_center_x inf pixel"),
        ({"beam_center_y": -1e9}, "beam_center_y -1000000000.0 pixel"),
        ({"n_static": 10}, "n_static 10, n_dynamic 3"),
        ({"n_dynamic": 0}, "n_dynamic 0"),
        ({"n_phi": 0}, "n_phi 0"),
        ({"n_phi": 1000}, "more bins than the 2400 pixels"),
        ({"shape": (0, 5)}, "0 x 5 pixels"),
        ({"shape": (10**6, 10**6)}, "1000000 x 1000000 pixels"),
        ({"q_min": 0.2, "q_max": 0.1}, "q from 0.2 to 0.1"),
        ({"q_min": -0.1}, "q from -0.1"),
        ({"q_max": math.nan}, "to nan"),
        ({"mask": np.ones((3, 3), bool)}, r"mask is \(3, 3\), the detector is \(40, 60\)"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(given, message):
    with pytest.raises(ConfigError, match=message):
        ring(**given)


def test_a_map_without_pixels_is_refused():
    with pytest.raises(RoiMapError, match="the mask leaves no pixel"):
        ring(mask=np.zeros(SHAPE, bool))
    with pytest.raises(
        RoiMapError, match=r"no pixel in use has q from 5 to 6 1/angstrom; the detector has 0\.0 to 0\.166"
    ):
        ring(q_min=5, q_max=6)
