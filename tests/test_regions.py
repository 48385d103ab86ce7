import threading

import numpy as np
import pytest

from stream import wire
from stream.errors import ConfigError
from stream.messages import FrameBatch, RunStart, RunStop
from stream.plane import send
from stream.regions import Regions
from tests.conftest import events_of, make_start
from tests.sources import ListSink, ListSource

SHAPE = (7, 5)


def batch(frames):
    return FrameBatch(run="run-1", first=3, frames=frames, timestamp_ns=17)


def test_regions_are_bands_of_rows_that_cover_the_detector():
    starts = list(Regions(3).cut(make_start(SHAPE, metadata={"sample": "gold"})))
    assert [each.region for each in starts] == [0, 1, 2]
    assert [each.shape for each in starts] == [(2, 5), (2, 5), (3, 5)]
    assert [each.origin for each in starts] == [(0, 0), (2, 0), (4, 0)]
    assert all(each.detector_shape == SHAPE for each in starts)
    assert all(each.metadata == {"sample": "gold", "regions": 3} for each in starts)


def test_regions_of_a_region_lie_on_the_whole_detector():
    part = make_start(SHAPE, origin=(100, 20), detector_shape=(200, 200))
    assert [each.origin for each in Regions(2).cut(part)] == [(100, 20), (103, 20)]
    assert all(each.detector_shape == (200, 200) for each in Regions(2).cut(part))


@pytest.mark.parametrize("kind", [np.asarray, events_of])
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_frames_of_all_regions_make_the_whole_frames(kind, n):
    frames = np.random.default_rng(0).integers(0, 3, (4, *SHAPE)).astype("<u2")
    parts = list(Regions(n).cut(batch(kind(frames))))
    sent = [wire.decode(wire.encode(part)) for part in parts]
    assert [(part.region, part.first, part.timestamp_ns) for part in sent] == [(i, 3, 17) for i in range(n)]
    dense = [part.frames if kind is np.asarray else part.frames.dense() for part in sent]
    np.testing.assert_array_equal(np.concatenate(dense, axis=1), frames)


def test_the_end_of_a_run_goes_to_every_region():
    stop = RunStop(run="run-1", n_frames=9, exit_status="abort")
    assert [(each.region, each.n_frames, each.exit_status) for each in Regions(2).cut(stop)] == [
        (0, 9, "abort"),
        (1, 9, "abort"),
    ]


def test_frames_that_cannot_be_cut_do_not_end_a_gateway(caplog):
    frames = np.ones((2, *SHAPE), "<u2")
    odd = FrameBatch(run="run-0", first=0, frames=frames[:, :1], timestamp_ns=0)
    sink = ListSink()
    ledger = send(ListSource([make_start(SHAPE), odd, batch(frames)]), [sink], Regions(2), threading.Event())
    assert [type(each) for each in sink.outputs] == [RunStart] * 2 + [FrameBatch] * 2
    assert sink.flushed == len(sink.outputs)
    assert "stray: FrameBatch of run run-0: 1 rows cannot be cut into 2 regions" in caplog.text
    assert ledger.received == 2


def test_more_regions_than_rows_are_refused():
    with pytest.raises(ConfigError, match="7 rows cannot be cut into 8 regions"):
        list(Regions(8).cut(make_start(SHAPE)))
