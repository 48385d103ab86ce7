"""What the picture of a result file shows."""

import io
from dataclasses import replace

import h5py
import numpy as np
import pytest

from stream.errors import ConfigError
from stream.figure import draw
from tests.test_sinks_hdf5 import RUNS, aborted, make_outputs, make_qmap, rates, with_twotime, write_run

TRUTH = {"contrast": 0.2, "rate": rates(make_qmap()).tolist(), "weights": [1.0], "factors": [1.0]}


def drawn(tmp_path, outputs=None, **metadata):
    qmap = make_qmap()
    return draw(write_run(tmp_path / "result.h5", qmap, outputs or list(make_outputs(qmap, **metadata))))


def panels(figure):
    return [axes for axes in figure.get_axes() if axes.get_title().startswith("q = ")]


def titled(figure, start):
    (axes,) = [axes for axes in figure.get_axes() if axes.get_title().startswith(start)]
    return axes


def simulated(axes):
    return [line for line in axes.get_lines() if str(line.get_label()).startswith("simulated")]


def points(axes):
    """The measured points of a panel: those of many pairs, then those of few."""
    return [bars.lines[0].get_xydata() for bars in axes.containers]


@pytest.mark.parametrize(("make_map", "outputs"), RUNS)
def test_every_result_file_can_be_drawn_as_an_image(tmp_path, make_map, outputs):
    qmap = make_map()
    png = io.BytesIO()
    draw(write_run(tmp_path / "result.h5", qmap, outputs(qmap))).savefig(png, dpi=40)
    assert png.getvalue().startswith(b"\x89PNG")


def test_every_bin_has_a_panel_named_by_its_q_and_unit(tmp_path):
    titles = [axes.get_title() for axes in panels(drawn(tmp_path))]
    assert titles == [f"q = {q:.4g} Å⁻¹" for q in make_qmap()["dynamic_v_list_dim0"]]


def test_bins_of_two_dimensions_are_named_by_both(tmp_path):
    qmap = make_qmap() | {"dynamic_v_list_dim0": np.array([0.01, 0.02]), "dynamic_v_list_dim1": np.array([-45.0, 45.0])}
    qmap["dynamic_num_pts"] = np.array([2, 2])
    figure = draw(write_run(tmp_path / "result.h5", qmap, aborted(make_qmap())))
    titles = [axes.get_title() for axes in panels(figure)]
    assert titles == [f"q = {q} Å⁻¹, phi = {phi}°" for q in ("0.01", "0.02") for phi in ("-45", "45")]


def test_bins_of_a_map_that_does_not_say_where_they_lie_are_numbered(tmp_path):
    qmap = make_qmap() | {"static_v_list_dim0": np.full(8, np.nan), "dynamic_v_list_dim0": np.full(4, np.nan)}
    figure = draw(write_run(tmp_path / "result.h5", qmap, make_outputs(make_qmap())))
    assert [axes.get_title() for axes in figure.get_axes()][:4] == ["bin 1", "bin 2", "bin 3", "bin 4"]
    assert titled(figure, "scattering").get_lines()[-1].get_xdata().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_panel_shows_g2_against_tau_in_seconds_on_a_logarithmic_axis(tmp_path):
    axes = panels(drawn(tmp_path))[2]
    with h5py.File(tmp_path / "result.h5") as file:
        table = np.stack([file["xpcs/multitau/tau"], file["xpcs/multitau/normalized_g2"][:, 2]], axis=1)
    assert axes.get_xscale() == "log"
    np.testing.assert_array_equal(np.concatenate(points(axes)), table)


def test_every_trusted_point_is_within_view(tmp_path):
    qmap = make_qmap()
    start, multitau, *rest = make_outputs(qmap)
    multitau.arrays["g2"][:] = 1.0
    multitau.arrays["g2"][0, 3] = 1.4
    figure = drawn(tmp_path, [start, multitau, *rest])
    low, high = panels(figure)[3].get_ylim()
    assert low < 1.0 < 1.4 < high


def test_delays_of_few_pairs_are_pale(tmp_path):
    many, few = panels(drawn(tmp_path, list(make_outputs(make_qmap(), n_frames=36))))[0].containers
    assert few.lines[0].get_alpha() < many.lines[0].get_alpha()
    assert (many.lines[0].get_xdata() <= 4e-3).all()
    assert (few.lines[0].get_xdata() > 4e-3).all()


def test_what_was_simulated_is_drawn_over_what_was_measured(tmp_path):
    for index, axes in enumerate(panels(drawn(tmp_path, truth=TRUTH))):
        (line,) = simulated(axes)
        tau, g2 = line.get_data()
        np.testing.assert_allclose(g2, 1 + 0.2 * np.exp(-2 * TRUTH["rate"][index] * tau))


def test_a_stretched_truth_is_the_square_of_its_sum_of_exponentials(tmp_path):
    truth = TRUTH | {"weights": [0.25, 0.75], "factors": [0.5, 2.0], "stretch": 0.8}
    (line,) = simulated(panels(drawn(tmp_path, truth=truth))[1])
    tau, g2 = line.get_data()
    g1 = sum(p * np.exp(-TRUTH["rate"][1] * f * tau) for p, f in ((0.25, 0.5), (0.75, 2.0)))
    np.testing.assert_allclose(g2, 1 + 0.2 * g1**2)
    assert line.get_label() == "simulated, stretch 0.8"


@pytest.mark.parametrize(
    "truth", ["yes", {}, TRUTH | {"rate": [1.0]}, TRUTH | {"weights": [1.0, 2.0]}, TRUTH | {"contrast": "a"}]
)
def test_a_truth_that_makes_no_sense_is_said_and_not_drawn(tmp_path, caplog, truth):
    assert not any(simulated(axes) for axes in panels(drawn(tmp_path, truth=truth)))
    assert "truth is not drawn" in caplog.text


def test_a_measured_run_has_no_simulated_curve(tmp_path):
    assert not any(simulated(axes) for axes in panels(drawn(tmp_path)))


def test_the_header_names_run_frames_and_losses(tmp_path):
    header = [text.get_text() for figure in drawn(tmp_path).subfigs for text in figure.texts]
    assert header[0] == "run-1"
    assert header[1].startswith("4,000 frames × 1 ms   ·   3 lost   ·   1 duplicate")


def test_an_aborted_run_says_so(tmp_path):
    header = [text.get_text() for figure in drawn(tmp_path, aborted(make_qmap())).subfigs for text in figure.texts]
    assert "exit status: abort" in header[1]


def test_the_image_shows_mean_counts_and_hides_what_was_not_measured(tmp_path):
    image, outline = titled(drawn(tmp_path), "mean counts per pixel and frame, bins").get_images()
    with h5py.File(tmp_path / "result.h5") as file:
        np.testing.assert_array_equal(image.get_array().filled(np.nan), file["entry/data/frame_average"])
    assert image.get_array().mask[:, 30:33].all()
    assert np.asarray(outline.get_array())[..., 3].any()


def test_a_large_image_is_drawn_as_means_over_blocks_that_leave_out_masked_pixels(tmp_path):
    qmap = make_qmap()
    qmap |= {
        name: np.kron(qmap[name], np.ones((30, 30), "u1")) for name in ("mask", "dynamic_roi_map", "static_roi_map")
    }
    start, multitau, scattering, *rest = make_outputs(make_qmap())
    image = np.kron(scattering.arrays["image"], np.ones((30, 30)))
    image[::2] = np.nan
    scattered = replace(scattering, arrays={**scattering.arrays, "image": image})
    outputs = [replace(start, shape=image.shape), multitau, scattered, *rest]
    figure = draw(write_run(tmp_path / "result.h5", qmap, outputs))
    shown = titled(figure, "mean counts per pixel and frame, bins").get_images()[0]
    means = np.kron(scattering.arrays["image"], np.ones((10, 10)))
    np.testing.assert_allclose(shown.get_array().filled(np.nan), means)
    assert list(shown.get_extent()) == [-0.5, 1919.5, 1439.5, -0.5]


def test_scattering_is_drawn_whole_and_in_segments(tmp_path):
    *segments, whole = titled(drawn(tmp_path), "scattering").get_lines()
    assert len(segments) == 5
    with h5py.File(tmp_path / "result.h5") as file:
        np.testing.assert_allclose(whole.get_ydata(), file["xpcs/temporal_mean/scattering_1d"][0])
    np.testing.assert_allclose(whole.get_xdata(), make_qmap()["static_v_list_dim0"])


def test_intensity_is_drawn_against_time_and_lost_frames_are_marked(tmp_path):
    axes = titled(drawn(tmp_path), "mean counts per pixel and frame; lost")
    time, counts = axes.get_lines()[0].get_data()
    np.testing.assert_allclose(time, np.arange(0, 4, 0.01))
    np.testing.assert_allclose(counts, np.linspace(0.2, 0.1, 400))
    (lost,) = axes.collections[0].get_paths()
    np.testing.assert_allclose(lost.get_extents().intervalx, [0.1, 0.103])


def test_of_very_many_bins_an_even_choice_is_drawn(tmp_path):
    qmap = make_qmap(n_dynamic=100, static_per_dynamic=1)
    figure = draw(write_run(tmp_path / "result.h5", qmap, aborted(qmap)))
    titles = [axes.get_title() for axes in panels(figure)]
    assert len(titles) == 40
    assert titles[0] == f"q = {qmap['dynamic_v_list_dim0'][0]:.4g} Å⁻¹"
    assert titles[-1] == f"q = {qmap['dynamic_v_list_dim0'][-1]:.4g} Å⁻¹"


def test_a_run_name_is_never_taken_for_mathematics(tmp_path):
    draw(write_run(tmp_path / "result.h5", outputs=make_outputs(make_qmap(), run="$\\frac{$"))).savefig(
        io.BytesIO(), dpi=30
    )


def test_of_another_program_the_curves_are_drawn(shared_data):
    figure = draw(shared_data / "aps8idi_aerogel_result.nxs")
    drawn = panels(figure)
    assert len(drawn) == len(figure.get_axes()) == 27
    with h5py.File(shared_data / "aps8idi_aerogel_result.nxs") as file:
        np.testing.assert_array_equal(points(drawn[5])[0][:, 1], file["entry/XPCS/data/g2"][:, 5])


def test_a_fit_that_converged_goes_through_its_points(tmp_path):
    for axes in panels(drawn(tmp_path)):
        (line,) = [line for line in axes.get_lines() if line.get_label() == "fit"]
        tau, g2 = np.concatenate(points(axes)).T
        np.testing.assert_array_equal(line.get_xdata(), tau)
        np.testing.assert_allclose(line.get_ydata(), g2, atol=5e-3)


def test_every_two_time_correlation_has_a_panel_with_times_in_seconds(tmp_path):
    qmap = make_qmap()
    figure = drawn(tmp_path, with_twotime(qmap))
    two_times = [axes for axes in figure.get_axes() if axes.get_title().startswith("two-time: ")]
    q = qmap["dynamic_v_list_dim0"]
    assert [axes.get_title() for axes in two_times] == [f"two-time: q = {each:.4g} Å⁻¹" for each in q]
    (image,) = two_times[1].get_images()
    assert list(image.get_extent()) == pytest.approx([0, 0.04, 0, 0.04])
    c2 = image.get_array().filled(np.nan)
    with h5py.File(tmp_path / "result.h5") as file:
        upper = np.triu(file["xpcs/twotime/correlation_map/c2_00002"], 1)
    above = np.triu_indices(10, 1)
    np.testing.assert_array_equal(c2[above], upper[above])
    np.testing.assert_array_equal(c2, c2.T)
    assert np.isnan(c2[2]).all(), "its frames are lost"
    assert np.isnan(np.diag(c2)).all(), "shot noise"


def test_a_file_that_is_not_hdf5_or_not_there_is_refused_by_its_path(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("not HDF5")
    for path in (text, tmp_path / "nothing.h5"):
        with pytest.raises(ConfigError, match=path.name):
            draw(path)
