"""Documents are what bluesky_kafka and bluesky's ZeroMQ make of them, and nothing hostile in them does any harm."""

import pickle
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import bluesky_kafka  # noqa: F401 - replaces functions of msgpack for everybody, as it will in a user's process
import msgpack
import msgpack_numpy
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from stream import documents
from stream.documents import frame, pack, read, unframe, unpack
from stream.errors import DecodeError

EVENT = {
    "uid": "e1",
    "time": 1.5,
    "seq_num": 1,
    "descriptor": "d1",
    "filled": {},
    "data": {"g2": np.array([[1.5, np.nan], [1.25, 1.0]]), "frames": np.int64(7), "name": np.array(["é", "ab"])},
    "timestamps": {"g2": 1.5, "frames": 1.5, "name": 1.5},
}

dtypes = st.one_of(
    npst.boolean_dtypes(),
    npst.integer_dtypes(endianness="?"),
    npst.floating_dtypes(endianness="?"),
    npst.complex_number_dtypes(endianness="?"),
    npst.byte_string_dtypes(min_len=1),
    npst.unicode_string_dtypes(min_len=1),
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.complex_numbers()
    | st.text()
    | st.binary()
    | npst.arrays(dtypes, npst.array_shapes(min_dims=0, min_side=0)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
maps = st.dictionaries(st.text(), values, max_size=4)
names = st.sampled_from(sorted(documents.NAMES))


def assert_same(read_back, given_before):
    if isinstance(given_before, np.ndarray):
        assert (read_back.dtype, read_back.shape) == (given_before.dtype, given_before.shape)
        assert read_back.tobytes() == given_before.tobytes()
    elif isinstance(given_before, dict):
        assert list(read_back) == list(given_before)
        for key, value in given_before.items():
            assert_same(read_back[key], value)
    elif isinstance(given_before, list):
        assert len(read_back) == len(given_before)
        for one, other in zip(read_back, given_before, strict=True):
            assert_same(one, other)
    else:
        assert type(read_back) is type(given_before)
        assert read_back == given_before or read_back != read_back


@given(names, maps)
def test_what_is_packed_is_read_back(name, document):
    came_name, came = unpack(pack(name, document))
    assert came_name == name
    assert_same(came, document)


@given(names, maps)
def test_bluesky_kafka_reads_what_is_packed(name, document):
    came_name, came = msgpack.loads(pack(name, document))
    assert came_name == name
    assert_same(came, document)


@given(names, maps)
def test_what_bluesky_kafka_packs_is_read(name, document):
    came_name, came = unpack(msgpack.dumps([name, document]))
    assert came_name == name
    assert_same(came, document)


@given(names, maps, st.binary(max_size=5).filter(lambda prefix: b" " not in prefix))
def test_a_message_of_zeromq_is_read_back(name, document, prefix):
    came_prefix, came_name, came = unframe(frame(name, document, prefix))
    assert (came_prefix, came_name) == (prefix, name)
    assert_same(came, document)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_document_or_a_decode_error(data):
    for reader in (unpack, unframe, read):
        with suppress(DecodeError):
            reader(data)


@given(names, maps, st.data())
def test_a_document_that_was_cut_or_spoiled_is_a_document_or_a_decode_error(name, document, data):
    packed = bytearray(pack(name, document))
    at = data.draw(st.integers(0, len(packed) - 1))
    spoiled = packed[:at] if data.draw(st.booleans()) else packed
    if spoiled is packed:
        packed[at] = data.draw(st.integers(0, 255))
    with suppress(DecodeError):
        repr(unpack(bytes(spoiled)))


def test_arrays_and_numpy_numbers_become_what_they_were():
    _, event = unpack(pack("event", EVENT))
    np.testing.assert_array_equal(event["data"]["g2"], EVENT["data"]["g2"])
    assert event["data"]["frames"].dtype == np.int64
    assert event["data"]["name"].tolist() == ["é", "ab"]


@pytest.mark.parametrize("text", [np.str_(""), np.bytes_(b""), np.str_("a")])
def test_texts_of_numpy_become_plain_ones(text):
    assert unpack(pack("event", {"a": text})) == ("event", {"a": text.item()})


def test_tuples_become_lists_and_python_numbers_stay_what_they_are():
    assert unpack(pack("start", {"shape": (1, 2.0, True)})) == ("start", {"shape": [1, 2.0, True]})


class Touch:
    """Makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def packed_with(value):
    return msgpack_numpy.packb(["event", {"data": {"g2": value}}])


def test_nothing_is_unpickled(tmp_path):
    hostile = np.array([Touch(tmp_path / "touched")], object)
    data = packed_with(hostile)
    with pytest.raises(DecodeError, match=r"event\.data\.g2 is an array of .*which is not a number or a text"):
        unpack(data)
    with pytest.raises(DecodeError):
        unframe(b" event " + msgpack_numpy.packb({"data": hostile}))
    with pytest.raises(DecodeError):
        read(pickle.dumps(hostile))
    assert not (tmp_path / "touched").exists()
    msgpack.loads(data)  # what bluesky_kafka does with it
    assert (tmp_path / "touched").exists()


def array():
    return {b"nd": True, b"type": "<f8", b"kind": b"", b"shape": [2], b"data": b"\0" * 16}


def nested(depth):
    return [] if depth == 0 else [nested(depth - 1)]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.zeros(2, "i4,f4"), "is an array of"),
        (array() | {b"type": "|O"}, r"an array of '\|O', which is not a number"),
        (array() | {b"type": "<f3"}, "an array of <f3, which does not exist"),
        (array() | {b"type": ["<f8"]}, "is not a number or a text"),
        (array() | {b"type": "<U0", b"data": b""}, "shape"),
        (array() | {b"shape": [3]}, r"shape \[3\] in 16 bytes, not 24"),
        (array() | {b"shape": [2**61, 8]}, "in 16 bytes"),
        (array() | {b"shape": [0, 2**61], b"data": b""}, "in 0 bytes"),
        (array() | {b"shape": [-2]}, r"the shape \[-2\]"),
        (array() | {b"shape": [True, 2]}, r"the shape \[True, 2\]"),
        (array() | {b"shape": None}, "the shape None"),
        (array() | {b"shape": [1] * 65}, "the shape"),
        (array() | {b"data": "text"}, "not 16"),
        (array() | {b"type": "<U1", b"shape": [1], b"data": b"\xff" * 4}, "the character 0xffffffff"),
        (array() | {b"nd": False}, "in 16 bytes, not 8"),
        ({b"complex": True, b"data": "1+"}, "'1[+]' is not a complex number"),
        ({b"other": 1}, "the key b'other', not a string"),
        (msgpack.ExtType(5, b"abc"), "is not a number, string, list, map or array"),
        (msgpack.Timestamp(1), "is not a number, string, list, map or array"),
        (nested(40), "nested deeper than 32"),
        ([None] * (documents.MAX_LENGTH + 1), "65537 exceeds max_array_len"),
    ],
)
def test_what_is_no_plain_value_is_refused_by_name(value, words):
    with pytest.raises(DecodeError, match=words):
        unpack(packed_with(value))


def test_a_list_that_only_claims_to_be_long_is_refused():
    with pytest.raises(DecodeError, match="max_array_len"):
        unpack(b"\x92\xa5start\xdd\xff\xff\xff\xff")


def test_nesting_beyond_what_messagepack_reads_is_refused():
    with pytest.raises(DecodeError, match="MessagePack"):
        unpack(b"\x91" * 100_000)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (["begin", {}], "no document called 'begin'"),
        ([b"start", {}], "no document called b'start'"),
        (["start", []], "start is not a map"),
        (["start"], "a list of its name and itself"),
        ({"start": {}}, "a list of its name and itself"),
        (["start", {1: 2}], "MessagePack: int is not allowed for map key"),
    ],
)
def test_what_is_no_document_is_refused(document, words):
    with pytest.raises(DecodeError, match=words):
        unpack(msgpack_numpy.packb(document))


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (b"", "a prefix, a name and a document"),
        (b" start", "a prefix, a name and a document"),
        (b" begin \x80", "no document called 'begin'"),
        (b" \xff \x80", "no document called"),
        (b" start \x90", "start is not a map"),
        (b" start ", "not MessagePack"),
    ],
)
def test_what_is_no_message_of_zeromq_is_refused(message, words):
    with pytest.raises(DecodeError, match=words):
        unframe(message)


def test_a_document_longer_than_the_bound_is_refused_at_both_ends():
    with pytest.raises(ValueError, match="is longer than 16777216"):
        pack("event", {"image": np.zeros(documents.MAX_BYTES, "u1")})
    with pytest.raises(DecodeError, match="is longer than 16777216"):
        unpack(b"\0" * (documents.MAX_BYTES + 1))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Path("/x"), r"start\.md\.key = PosixPath\('/x'\) is not"),
        ({1: 2}, r"start\.md\.key has the key 1, not a string"),
        (2**64, r"start\.md\.key = 18446744073709551616 is not a number of 64 bits"),
        ({1, 2}, r"start\.md\.key = \{1, 2\} is not"),
        (nested(40), "nested deeper than 32"),
        (np.array([None]), r"start\.md\.key is an array of object"),
        (np.zeros(1, "i4,i4"), "is an array of"),
        (np.datetime64("2026-01-01"), r"is an array of datetime64"),
        ([0] * (documents.MAX_LENGTH + 1), "65537 entries, more than 65536; write an array"),
    ],
)
def test_what_could_not_be_read_is_not_written(value, words):
    with pytest.raises(ValueError, match=words):
        pack("start", {"md": {"key": value}})


def test_only_documents_of_bluesky_are_written():
    with pytest.raises(ValueError, match="no document called 'begin'"):
        pack("begin", {})
    with pytest.raises(ValueError, match="has a space"):
        frame("start", {}, b"a b")


def test_reading_is_the_same_before_and_after_bluesky_kafka_is_imported():
    code = """
import sys
from stream.documents import unpack
data = bytes.fromhex(sys.argv[1])
before = unpack(data)
assert "msgpack_numpy" not in sys.modules
import bluesky_kafka
assert repr(unpack(data)) == repr(before)
"""
    subprocess.run([sys.executable, "-c", code, pack("event", EVENT).hex()], check=True, timeout=60)
