import h5py
import numpy as np
import pytest

from stream.errors import RoiMapError
from stream.operators import roimap_file
from stream.operators.roimap import RoiMap

STATIC = np.array([[0, 1, 1, 2], [0, 3, 2, 4]])
DYNAMIC = np.array([[0, 1, 1, 1], [0, 2, 1, 2]])


def map_file(path, group, **datasets):
    with h5py.File(path, "w") as file:
        for name, value in datasets.items():
            if value is not None:
                file[f"{group}/{name}"] = value
    return path


def pysimplemask_file(path, group="qmap", **changed):
    """Two rings of q times two sectors of phi, of which the dynamic grid has filled three; types as pySimpleMask's."""
    given = {
        "static_roi_map": STATIC.astype(np.uint8),
        "dynamic_roi_map": np.array([[0, 1, 1, 2], [0, 3, 2, 3]], np.uint8),
        "static_index_mapping": np.array([0, 1, 2, 3], np.uint8),
        "dynamic_index_mapping": np.array([0, 1, 3], np.uint8),
        "static_num_pts": np.array([2, 2]),
        "dynamic_num_pts": np.array([2, 2]),
        "static_v_list_dim0": np.array([0.01, 0.03]),
        "dynamic_v_list_dim0": np.array([0.01, 0.03]),
        "static_v_list_dim1": np.array([-90.0, 90.0]),
        "dynamic_v_list_dim1": np.array([-90.0, 90.0]),
        "mask": STATIC > 0,
        "blemish": np.ones((2, 4), bool),
        "map_names": ["q", "phi"],
        "map_units": ["Å⁻¹", "deg"],
        "beam_center_x": 1.5,
        "beam_center_y": -2.0,
        "detector_distance": 5.0,
        "pixel_size": 75e-6,
        "energy": 11.0,
        "source_file": "/data/x.h5",
    }
    map_file(path, group, **given | changed)
    with h5py.File(path, "a") as file:
        file[group].attrs.update({"hash": "abc", "version": "0.4.5"})
    return path


def assert_same(one, other):
    one, other = one.arrays(), other.arrays()
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_equal(one[name], other[name], err_msg=name)


def refused(path, message):
    with pytest.raises(RoiMapError, match=message) as caught:
        roimap_file.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("group", ["qmap", "xpcs/qmap"])
def test_a_pysimplemask_file_is_read_as_it_is(tmp_path, group):
    read = roimap_file.read(pysimplemask_file(tmp_path / "q.h5", group))
    assert read.static_roi_map.tolist() == STATIC.tolist()
    assert read.static_roi_map.dtype == read.dynamic_roi_map.dtype == np.int32
    assert (read.n_static, read.n_dynamic, read.shape) == (4, 3, (2, 4))
    assert read.dynamic_of_static.tolist() == [1, 2, 3, 3]
    assert read.static_q.tolist() == [0.01, 0.01, 0.03, 0.03]
    assert read.dynamic_q.tolist() == [0.01, 0.01, 0.03]
    assert read.dynamic_phi.tolist() == [-90, 90, 90]
    assert read.qmap["energy"] == 11.0
    assert read.qmap["map_units"] == ["Å⁻¹", "deg"]
    assert read.qmap["source_file"] == "/data/x.h5"
    assert read.qmap["attributes"]["hash"] == "abc"


def test_what_is_written_is_what_is_read(tmp_path):
    read = roimap_file.read(pysimplemask_file(tmp_path / "q.h5"))
    roimap_file.write(tmp_path / "again.h5", read)
    again = roimap_file.read(tmp_path / "again.h5")
    assert again.digest == read.digest
    assert_same(again, read)


def test_a_written_file_is_laid_out_as_pysimplemask_does(tmp_path):
    roimap_file.write(tmp_path / "q.h5", roimap_file.read(pysimplemask_file(tmp_path / "given.h5")))
    with h5py.File(tmp_path / "q.h5") as file, h5py.File(tmp_path / "given.h5") as given:
        assert file["qmap"].keys() == given["qmap"].keys()
        for name, dataset in given["qmap"].items():
            assert file["qmap"][name].dtype == dataset.dtype, name
            np.testing.assert_equal(file["qmap"][name][()], dataset[()])
        assert dict(file["qmap/static_v_list_dim1"].attrs) == {"name": "phi", "unit": "deg", "size": 2}
        assert file["qmap"].attrs["version"] == "0.4.5"


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = pysimplemask_file(tmp_path / "q.h5")
    roimap_file.write(path, RoiMap(static_roi_map=STATIC, dynamic_roi_map=DYNAMIC))
    assert roimap_file.read(path).n_dynamic == 2
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(RoiMapError, match="nowhere"):
        roimap_file.write(tmp_path / "nowhere" / "q.h5", RoiMap(static_roi_map=STATIC, dynamic_roi_map=DYNAMIC))


def test_a_write_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "q.h5").mkdir()
    with pytest.raises(RoiMapError, match="cannot be written"):
        roimap_file.write(tmp_path / "q.h5", RoiMap(static_roi_map=STATIC, dynamic_roi_map=DYNAMIC))
    assert [path.name for path in tmp_path.iterdir()] == ["q.h5"]


def test_nxxpcs_masks_are_read(tmp_path):
    path = map_file(
        tmp_path / "result.nxs",
        "entry/instrument/masks",
        dynamic_roi_map=DYNAMIC,
        static_roi_map=STATIC.astype(float),
        dynamic_q_list=[0.01, 0.03],
        dynamic_phi_list=[-45.0, 45.0],
        static_q_list=[0.01, 0.02, 0.03, 0.04],
    )
    read = roimap_file.read(path)
    assert read.dynamic_q.tolist() == [0.01, 0.03]
    assert read.dynamic_phi.tolist() == [-45, 45]
    assert read.static_q.tolist() == [0.01, 0.02, 0.03, 0.04]
    assert read.dynamic_of_static.tolist() == [1, 1, 2, 2]


def test_older_aps_files_are_read(tmp_path):
    path = map_file(
        tmp_path / "old.hdf", "xpcs", dqmap=DYNAMIC, sqmap=STATIC, dqlist=[[0.01, 0.03]], dphilist=[[0.0, 0.0]]
    )
    read = roimap_file.read(path)
    assert read.dynamic_q.tolist() == [0.01, 0.03]
    assert np.isnan(read.static_q).all()


def test_a_result_of_aps_8_id_i_is_read(shared_data):
    read = roimap_file.read(shared_data / "aps8idi_aerogel_result.nxs")
    assert read.shape == (516, 1556)
    assert read.n_static == read.n_dynamic == 27
    assert np.array_equal(read.static_roi_map, read.dynamic_roi_map)
    assert np.count_nonzero(read.dynamic_roi_map == 27) == 74122
    assert read.dynamic_q[[0, 26]] == pytest.approx([0.00199916, 0.05896644], rel=1e-5)
    assert np.isnan(read.dynamic_phi).all()


def test_static_bins_are_the_dynamic_bins_if_there_is_no_static_map(tmp_path):
    read = roimap_file.read(pysimplemask_file(tmp_path / "q.h5", static_roi_map=None))
    assert np.array_equal(read.static_roi_map, read.dynamic_roi_map)
    assert read.dynamic_of_static.tolist() == [1, 2, 3]
    assert read.static_q.tolist() == read.dynamic_q.tolist()


def test_masked_pixels_are_outside_and_their_bin_keeps_its_number(tmp_path):
    mask = STATIC > 0
    mask[1, 1] = False
    read = roimap_file.read(pysimplemask_file(tmp_path / "q.h5", mask=mask.astype(np.uint8)))
    assert read.static_roi_map.tolist() == [[0, 1, 1, 2], [0, 0, 2, 4]]
    assert read.n_static == 4
    assert read.dynamic_of_static.tolist() == [1, 2, 0, 3]


def test_maps_alone_are_enough_and_what_is_unknown_is_nan():
    maps = RoiMap(static_roi_map=STATIC, dynamic_roi_map=DYNAMIC)
    assert (maps.n_static, maps.n_dynamic) == (4, 2)
    assert np.isnan(maps.dynamic_q).all()
    arrays = maps.arrays()
    assert np.array_equal(arrays["mask"], STATIC > 0)
    assert arrays["static_num_pts"].tolist() == [4, 1]
    assert arrays["dynamic_index_mapping"].tolist() == [0, 1]
    assert arrays["attributes"]["hash"] == maps.digest
    for name in ("beam_center_x", "beam_center_y", "detector_distance", "pixel_size", "energy"):
        assert np.isnan(arrays[name])


def test_the_digest_tells_maps_apart():
    maps = [
        (STATIC, DYNAMIC),
        (STATIC, np.minimum(DYNAMIC, 1)),
        (STATIC.T, DYNAMIC.T),
        (STATIC.reshape(4, 2), DYNAMIC.reshape(4, 2)),
    ]
    digests = {RoiMap(static_roi_map=static, dynamic_roi_map=dynamic).digest for static, dynamic in maps}
    assert len(digests) == 4
    assert RoiMap(static_roi_map=STATIC.astype("u1"), dynamic_roi_map=DYNAMIC.astype(">i8")).digest in digests


def test_pixels_come_bin_after_bin():
    maps = RoiMap(static_roi_map=STATIC, dynamic_roi_map=DYNAMIC, qmap={"static_index_mapping": np.arange(5)})
    pixels, offsets = maps.pixels_by_static_bin()
    assert pixels.tolist() == [1, 2, 3, 6, 5, 7]
    assert offsets.tolist() == [0, 2, 4, 5, 6, 6]


def test_a_part_keeps_the_numbers_and_the_number_of_bins(tmp_path):
    whole = roimap_file.read(pysimplemask_file(tmp_path / "q.h5"))
    part = whole.crop((1, 1), (1, 3))
    assert part.static_roi_map.tolist() == [[3, 2, 4]]
    assert (part.n_static, part.n_dynamic) == (whole.n_static, whole.n_dynamic)
    assert part.dynamic_of_static.tolist() == [0, 2, 3, 3]
    assert part.dynamic_q.tolist() == whole.dynamic_q.tolist()
    assert part.qmap["mask"].shape == part.qmap["blemish"].shape == (1, 3)
    assert (part.qmap["beam_center_x"], part.qmap["beam_center_y"]) == (0.5, -3.0)
    assert whole.qmap["beam_center_x"] == 1.5


def test_the_whole_as_a_part_is_the_same(tmp_path):
    whole = roimap_file.read(pysimplemask_file(tmp_path / "q.h5"))
    assert_same(whole.crop((0, 0), whole.shape), whole)


@pytest.mark.parametrize(("origin", "shape"), [((-1, 0), (1, 1)), ((0, 2), (2, 3)), ((2, 0), (1, 1)), ((0, 0), (0, 4))])
def test_a_part_outside_is_refused(origin, shape):
    with pytest.raises(RoiMapError, match="outside of a roi map"):
        RoiMap(static_roi_map=STATIC, dynamic_roi_map=DYNAMIC).crop(origin, shape)


def test_nothing_can_be_written_into_the_maps():
    given = STATIC.astype(np.int32)
    maps = RoiMap(static_roi_map=given, dynamic_roi_map=DYNAMIC)
    given[0, 1] = 9
    assert maps.static_roi_map[0, 1] == 1
    with pytest.raises(ValueError, match="read-only"):
        maps.static_roi_map[0, 1] = 9


def changed(roi_map, bin_):
    roi_map = roi_map.astype(type(bin_))
    roi_map[1, 2] = bin_
    return roi_map


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"static_roi_map": STATIC.ravel()}, r"static_roi_map has the shape \(8,\)"),
        ({"static_roi_map": STATIC[:, :3], "mask": None}, r"static_roi_map is \(2, 3\), dynamic_roi_map is \(2, 4\)"),
        ({"static_roi_map": changed(STATIC, -1)}, "static_roi_map has -1 at row 1, column 2"),
        ({"dynamic_roi_map": changed(DYNAMIC, 1.5)}, "dynamic_roi_map has 1.5 at row 1, column 2"),
        ({"dynamic_roi_map": changed(DYNAMIC, np.nan)}, "dynamic_roi_map has nan at row 1, column 2"),
        ({"dynamic_roi_map": changed(DYNAMIC, 2**40)}, "dynamic_roi_map has 1099511627776 at row 1, column 2"),
        ({"dynamic_roi_map": np.full((2, 4), b"x")}, "dynamic_roi_map is .* not numbers"),
        ({"static_roi_map": changed(STATIC, 0)}, "row 1, column 2 lies in static bin 0 and dynamic bin 2"),
        ({"static_roi_map": changed(STATIC, 1)}, r"static bin 1 lies in the dynamic bins \[1, 2\]"),
        ({"static_index_mapping": np.arange(3)}, "static_roi_map has bin 4, but static_index_mapping only 3 bins"),
        ({"dynamic_index_mapping": np.array([0, 1, 4])}, "dynamic_index_mapping has 4, but the grid is 2 x 2"),
        ({"dynamic_num_pts": np.array([3, 2])}, r"dynamic_num_pts is \[3, 2\], but dynamic_v_list_dim0 has 2"),
        ({"static_v_list_dim0": ["a", "b"]}, "static_v_list_dim0 is .* not numbers"),
        ({"mask": np.ones((2, 3))}, r"mask is \(2, 3\), static_roi_map is \(2, 4\)"),
        ({"beam_center_x": "left"}, "beam_center_x is 'left', not"),
        ({"pixel_size": [1.0, 2.0]}, "pixel_size has 2 values, not one"),
        ({"energy": np.zeros(1, [("a", "i4")])}, "/qmap/energy holds .*, neither numbers nor text"),
    ],
)
def test_an_unusable_map_is_refused_by_file_dataset_and_value(tmp_path, wrong, message):
    refused(pysimplemask_file(tmp_path / "q.h5", **wrong), message)


def test_a_q_and_phi_list_of_different_length_are_refused(tmp_path):
    given = {"dynamic_roi_map": DYNAMIC, "dynamic_q_list": [0.01, 0.03], "dynamic_phi_list": [1.0, 2.0, 3.0]}
    refused(map_file(tmp_path / "n.nxs", "entry/instrument/masks", **given), "2 values of q, but 3 of phi")


def test_an_enormous_map_is_refused_before_it_is_read(tmp_path):
    with h5py.File(tmp_path / "big.h5", "w") as file:
        file.create_dataset("qmap/dynamic_roi_map", (1 << 20, 1 << 20), "u1", chunks=(1024, 1024))
    refused(tmp_path / "big.h5", "/qmap/dynamic_roi_map has 1099511627776 elements")


def test_a_file_without_maps_is_refused(tmp_path):
    refused(map_file(tmp_path / "x.h5", "entry", data=np.zeros(3)), "no dynamic_roi_map")


def test_a_file_that_is_not_hdf5_is_refused(tmp_path):
    (tmp_path / "q.h5").write_text("q")
    refused(tmp_path / "q.h5", "cannot be read")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    refused(tmp_path / "q.h5", "cannot be read")


def test_a_truncated_file_is_refused(tmp_path):
    path = pysimplemask_file(tmp_path / "q.h5")
    path.write_bytes(path.read_bytes()[:3000])
    refused(path, "cannot be read")


@pytest.mark.parametrize("name", ["mask", "qmap/mask", "xpcs/qmap/mask"])
def test_a_mask_is_read_where_0_is_bad(tmp_path, name):
    mask = np.array([[0, 1], [2, 0]])
    with h5py.File(tmp_path / "mask.h5", "w") as file:
        file[name] = mask
    np.save(tmp_path / "mask.npy", mask)
    for path in (tmp_path / "mask.h5", tmp_path / "mask.npy"):
        assert roimap_file.read_mask(path).tolist() == [[False, True], [True, False]]


def test_a_detectors_pixel_mask_is_read_where_0_is_good(tmp_path):
    with h5py.File(tmp_path / "master.h5", "w") as file:
        file["entry/instrument/detector/detectorSpecific/pixel_mask"] = [[0, 1], [8, 0]]
    assert roimap_file.read_mask(tmp_path / "master.h5").tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize("name", ["nothing.h5", "nothing.npy", "text.npy", "empty.h5"])
def test_a_file_without_a_mask_is_named(tmp_path, name):
    (tmp_path / "text.npy").write_text("mask")
    h5py.File(tmp_path / "empty.h5", "w").close()
    with pytest.raises(RoiMapError, match=name):
        roimap_file.read_mask(tmp_path / name)
