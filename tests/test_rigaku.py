"""Event files of Rigaku detectors, written here word by word."""

import threading
from itertools import islice

import h5py
import numpy as np
import pytest

from stream import inspection
from stream.errors import ConfigError, SourceError
from stream.ingest import rigaku
from stream.ingest.rigaku import RigakuSource
from stream.messages import Events, FrameBatch, RunStart, RunStop
from tests.conftest import events_of

rng = np.random.default_rng(3)


def frames_with(n, photons, shape=(512, 1024)):
    """Frames of a few counts in random pixels; every third is empty, the first and the last are not."""
    frames = np.zeros((n, *shape), np.uint16)
    for i in range(n):
        if i % 3 != 1 or i == n - 1:
            frames[i].flat[rng.choice(frames[i].size, photons, replace=False)] = rng.integers(1, 4095, photons)
    return frames


def words_of(frames, offset=0):
    frame, row, column = np.nonzero(frames)
    return frame << 40 | (row * 1024 + column + offset) << 16 | frames[frame, row, column].astype(np.int64)


@pytest.fixture
def write(tmp_path):
    def written(words, name="A001.bin"):
        (tmp_path / name).write_bytes(np.asarray(words, "<u8").tobytes())
        return tmp_path / name

    return written


def read(path, **options):
    with RigakuSource(path, **{"frame_time": 2e-5} | options) as source:
        return list(source)


def dense(messages):
    return np.concatenate([message.frames.dense() for message in messages if isinstance(message, FrameBatch)])


FRAMES = frames_with(14, 40)
WORDS = words_of(FRAMES)


@pytest.mark.parametrize("batch", [1, 3, 14, 1000])
def test_a_file_is_a_run_of_all_its_frames_also_of_the_empty_ones(write, batch):
    start, *batches, stop = read(write(WORDS), batch=batch)
    assert (start.run, start.shape, start.dtype, start.frame_time) == ("A001", (512, 1024), "<u2", 2e-5)
    assert (start.saturation_value, start.metadata["n_frames"]) == (4094, 14)
    assert stop == RunStop(run="A001", n_frames=14, exit_status="success")
    assert [b.first for b in batches] == list(range(0, 14, batch))
    assert [b.timestamp_ns - batches[0].timestamp_ns for b in batches] == [b.first * 20_000 for b in batches]
    assert all(isinstance(b.frames, Events) for b in batches)
    np.testing.assert_array_equal(dense(batches), FRAMES)


def test_bits_without_a_meaning_are_not_looked_at(write):
    unused = np.uint64(0b111 << 37 | 0b1111 << 12)
    np.testing.assert_array_equal(dense(read(write(WORDS.astype("<u8") | unused))), FRAMES)


def test_pixels_of_a_frame_may_come_in_any_order(write):
    shuffled = WORDS[np.lexsort([rng.random(len(WORDS)), WORDS >> 40])]
    np.testing.assert_array_equal(dense(read(write(shuffled), batch=5)), FRAMES)


def test_pixels_that_count_from_the_second_module_on_are_those_of_a_module(write):
    np.testing.assert_array_equal(dense(read(write(words_of(FRAMES, offset=2**20)))), FRAMES)


def test_six_modules_stand_on_their_places(write):
    """As `Rigaku3MDataset` of boost_corr puts them together; modules end with different frames."""
    whole = np.zeros((9, 1676, 2100), np.uint16)
    for place, number in enumerate((5, 0, 4, 1, 3, 2)):
        frames = frames_with(4 + number, 30)
        row, column = place // 2 * (512 + 70), place % 2 * (1024 + 52)
        whole[: len(frames), row : row + 512, column : column + 1024] = frames
        write(words_of(frames, offset=2**20 * (number % 2)), f"A001.bin.00{number}")
    start, *batches, stop = read(write([], "x").with_name("A001.bin.000"), batch=2)
    assert (start.run, start.shape, stop.n_frames) == ("A001", (1676, 2100), 9)
    np.testing.assert_array_equal(dense(batches), whole)


def test_a_module_whose_file_is_missing_is_named(write):
    path = write(WORDS, "A001.bin.000")
    with pytest.raises(SourceError, match=r"A001\.bin\.005: no such file"):
        RigakuSource(path)


def test_frames_that_are_bright_come_in_smaller_batches(write, monkeypatch):
    monkeypatch.setattr(rigaku, "MAX_EVENTS", 100)
    batches = [message for message in read(write(WORDS)) if isinstance(message, FrameBatch)]
    assert max(len(batch.frames.pixels) for batch in batches) <= 100
    np.testing.assert_array_equal(dense(batches), FRAMES)


@pytest.mark.parametrize("n", range(6))
def test_from_a_position_it_goes_on_as_if_nothing_had_happened(write, n):
    path = write(WORDS)
    with RigakuSource(path, frame_time=2e-5, batch=4) as first, RigakuSource(path, frame_time=2e-5, batch=4) as second:
        whole = read(path, batch=4)
        taken = list(islice(first, n))
        second.seek(first.position())
        rest = list(second)
    assert [type(m) for m in taken + rest] == [type(m) for m in whole]
    np.testing.assert_array_equal(dense([*taken, *rest]), FRAMES)


def test_a_position_of_another_source_is_refused(write):
    source = RigakuSource(write(WORDS), frame_time=2e-5)
    with pytest.raises(SourceError, match="position of another source"):
        source.seek({"other:frame": 3})
    with pytest.raises(SourceError, match="position 16 is outside a file of 14 frames"):
        source.seek({"A001:frame": 16})


def test_what_a_metadata_file_beside_it_says_is_told(write, tmp_path):
    with h5py.File(tmp_path / "A001_metadata.hdf", "w") as file:
        detector = file.create_group("entry/instrument/detector_1")
        detector["frame_time"], detector["count_time"], detector["detector_distance"] = 2e-5, 1.9e-5, 5.0
    start = read(write(WORDS), frame_time=None)[0]
    assert isinstance(start, RunStart)
    assert (start.frame_time, start.count_time, start.metadata["detector_distance"]) == (2e-5, 1.9e-5, 5.0)
    assert start.saturation_value == 4094


def test_a_frame_time_that_nobody_tells_is_asked_for(write):
    with pytest.raises(ConfigError, match=r"A001\.bin does not tell the frame time: give --frame-time"):
        RigakuSource(write(WORDS))


@pytest.mark.parametrize("n_bytes", [0, 3, 8 * 5 + 7])
def test_a_file_that_ends_within_a_word_or_is_empty_is_refused(tmp_path, n_bytes):
    (tmp_path / "A001.bin").write_bytes(WORDS.astype("<u8").tobytes()[:n_bytes])
    with pytest.raises(SourceError, match=f"A001.bin: its {n_bytes} bytes are no whole number of events"):
        RigakuSource(tmp_path / "A001.bin", frame_time=1e-3)


@pytest.mark.parametrize("batch", [1, 4, 1000])
@pytest.mark.parametrize(
    ("event", "word", "says"),
    [
        (100, 2 << 40 | 7 << 16 | 1, "event (100 of frame 2|80 of frame 3) "),
        (100, 11 << 40 | 7 << 16 | 1, "event 10[01] of frame "),
        (
            100,
            int(WORDS[100]) >> 40 << 40 | 524288 << 16 | 1,
            "event 100 is at pixel 524288 of a module of .512, 1024.",
        ),
        (100, int(WORDS[100]) & ~0xFFF, "event 100 .0x0.* has no counts"),
        (100, int(WORDS[101]), "event .* at pixel (.*) follows pixel .* in the same frame"),
    ],
    ids=["earlier frame", "later frame", "pixel outside", "no counts", "twice"],
)
def test_an_event_that_cannot_be_is_named(write, batch, event, word, says):
    words = WORDS.copy()
    words[event] = word
    with pytest.raises(SourceError, match=says):
        read(write(words), batch=batch)


def test_no_event_of_a_file_in_disorder_is_left_out_in_silence(write):
    for _ in range(50):
        words = rng.permutation(WORDS)
        with pytest.raises(SourceError, match=r"A001\.bin: event \d+ of frame"):
            read(write(words), batch=int(rng.integers(1, 20)))


def test_what_is_in_it_is_told_frame_by_frame(write):
    """A pixel whose counter is full in every frame is masked."""
    frames = FRAMES.copy()
    frames[:, 3, 5] = 4095
    facts = inspection.of_frames(RigakuSource(write(words_of(frames)), frame_time=2e-5), threading.Event(), 10**6)
    good = frames.copy()
    good[:, 3, 5] = 0
    assert (facts["frames looked at"], facts["lost"], facts["masked pixels"]) == (14, 0, "1")
    assert facts["mean counts"] == f"{good.sum() / (512 * 1024 - 1) / 14:.4g} per pixel and frame"


def test_events_of_the_tests_are_the_frames():
    np.testing.assert_array_equal(events_of(FRAMES).dense(), FRAMES)
