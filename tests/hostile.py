"""Messages on our wire that no honest sender makes: (name, parts, what the DecodeError says)."""

import struct

import msgpack
import numpy as np
from crc32c import crc32c

PAYLOAD = np.arange(24, dtype="<u2").tobytes()
START = {
    "s": "start",
    "v": 1,
    "run": "9f3c",
    "region": 0,
    "shape": [3, 4],
    "origin": [0, 0],
    "dtype": "<u2",
    "saturation_value": 65534,
    "frame_time": 0.001,
    "count_time": 0.001,
    "metadata": {"sample": "latex"},
}
FRAMES = {
    "s": "frames",
    "v": 1,
    "run": "9f3c",
    "region": 0,
    "first": 0,
    "n": 2,
    "shape": [3, 4],
    "dtype": "<u2",
    "codec": "raw",
    "nbytes": 48,
    "crc32c": crc32c(PAYLOAD),
    "timestamp_ns": 1_750_000_000_000_000_000,
}
STOP = {"s": "stop", "v": 1, "run": "9f3c", "region": 0, "n_frames": 2, "exit_status": "success"}
ENTRY = {"name": "g2", "dtype": "<u2", "shape": [24], "nbytes": 48, "crc32c": crc32c(PAYLOAD)}
RESULT = {
    "s": "result",
    "v": 1,
    "run": "9f3c",
    "region": 0,
    "operator": "multitau",
    "n_frames": 2,
    "final": False,
    "arrays": [ENTRY],
}


def start(**changes):
    return [b"start/0", msgpack.packb(START | changes), b""]


def frames(payload=PAYLOAD, **changes):
    return [b"frames/0", msgpack.packb(FRAMES | changes), payload]


def stop(**changes):
    return [b"stop/0", msgpack.packb(STOP | changes), b""]


def result(**changes):
    return [b"result/multitau/0", msgpack.packb(RESULT | changes), PAYLOAD]


def array(**changes):
    return result(arrays=[ENTRY | changes])


def chunk(codec, declared, block, packed=b""):
    payload = struct.pack(">QI", declared, block) + packed
    return frames(payload, codec=codec, nbytes=len(payload), crc32c=crc32c(payload))


def events(offsets=(0, 2, 5), pixels=(3, 11, 0, 1, 7), counts=(1, 2, 65535, 1, 9), **changes):
    """Events of 2 frames of 3 x 4 pixels."""
    arrays = (np.array(offsets, "<i8"), np.array(pixels, "<u4"), np.array(counts, "<u2"))
    payload = b"".join(array.tobytes() for array in arrays)
    return frames(payload, **{"codec": "events", "nbytes": len(payload), "crc32c": crc32c(payload)} | changes)


CHUNK = bytes.fromhex("0000000000000018 00002000 0000000d 43aaccf0000100500000000000 0800 0900 0a00 0b00")
"""The counts 0 to 11 as bitshuffle and LZ4: 8 of them in a block, 4 as they are."""


def chunks(*given, **changes):
    """Chunks of 2 frames of 3 x 4 pixels."""
    given = given or (CHUNK, CHUNK)
    payload = b"".join(given)
    described = {
        "codec": "bslz4-frames",
        "skip": 0,
        "lengths": [len(chunk) for chunk in given],
        "nbytes": len(payload),
        "crc32c": crc32c(payload),
    }
    return frames(payload, **described | changes)


def framed(size, block):
    """A chunk that says so."""
    return struct.pack(">QI", size, block) + CHUNK[12:]


def without(header, name):
    return {key: value for key, value in header.items() if key != name}


def nested(depth):
    value = 0
    for _ in range(depth):
        value = [value]
    return value


ALIVE = [start(), frames(), stop(), result(), events(), chunks()]
"""What the corpus is made from; these are well-formed."""

CORPUS = [
    ("no parts", [], "not 0"),
    ("two parts", frames()[:2], "not 2"),
    ("four parts", [*frames(), b""], "not 4"),
    ("empty parts", [b"", b"", b""], "MessagePack"),
    ("header is text", [b"", b'{"s": "frames"}', b""], "MessagePack"),
    ("header is a list", [b"", msgpack.packb([1, 2]), b""], "[1, 2]"),
    ("header has a tail", [b"", msgpack.packb(STOP) + b"\x00", b""], "MessagePack"),
    ("header is too long", [b"", msgpack.packb(START | {"metadata": {"a": "x" * 2**20}}), b""], "1048"),
    ("header with integer keys", [b"", msgpack.packb({1: 2}), b""], "MessagePack"),
    ("header is not UTF-8", [b"", b"\x81\xa1s\xa2\xff\xff", b""], "MessagePack"),
    ("header is a timestamp", [b"", b"\xd6\xff\x00\x00\x00\x01", b""], "Timestamp"),
    ("header of extension types", [b"", b"\x81\xa1s\xc7\x04\x2aaaaa", b""], "ExtType"),
    ("list that claims 2**32 entries", [b"", b"\xdd\xff\xff\xff\xff", b""], "4294967295"),
    ("map that claims 2**32 entries", [b"", b"\xdf\xff\xff\xff\xff", b""], "4294967295"),
    ("text that claims 2**32 bytes", [b"", b"\xdb\xff\xff\xff\xff", b""], "MessagePack"),
    ("nested lists that claim 2**20 entries each", [b"", b"\xdd\x00\x10\x00\x00" * 1000, b""], "1048576"),
    ("nested lists that claim 4096 entries each", [b"", b"\xdc\x10\x00" * 1000, b""], "MessagePack"),
    ("nested 100000 deep", [b"", b"\x91" * 100_000, b""], "MessagePack"),
    ("metadata nested 500 deep", start(metadata={"a": nested(500)}), "nested deeper than 16"),
    ("no schema", [b"", msgpack.packb(without(STOP, "s")), b""], "None"),
    ("unknown schema", stop(s="pickle"), "'pickle'"),
    ("schema is a list", stop(s=["stop"]), "['stop']"),
    ("no version", [b"", msgpack.packb(without(STOP, "v")), b""], "None"),
    ("unknown version", frames(v=7), "v = 7"),
    ("version is true", frames(v=True), "v = True"),
    ("run is missing", [b"", msgpack.packb(without(STOP, "run")), b""], "run is missing"),
    ("run is empty", stop(run=""), "run = ''"),
    ("run is too long", stop(run="x" * 257), "run = 'xxx"),
    ("run is a number", stop(run=7), "run = 7"),
    ("region is negative", stop(region=-1), "region = -1"),
    ("start with a payload", [*start()[:2], b"x"], "payload of 1 bytes"),
    ("stop with a payload", [*stop()[:2], b"x"], "payload of 1 bytes"),
    ("frame of no rows", start(shape=[0, 4]), "shape.0 = 0"),
    ("frame of three dimensions", start(shape=[1, 2, 3]), "shape = [1, 2, 3]"),
    ("frame larger than the bound", start(shape=[2**20, 2**20]), "[1048576, 1048576]"),
    ("frame shape as text", start(shape=["3", "4"]), "shape.0 = '3'"),
    ("origin is negative", start(origin=[-1, 0]), "origin.0 = -1"),
    ("counts of float", start(dtype="<f4"), "dtype = '<f4'"),
    ("big-endian counts", start(dtype=">u2"), "dtype = '>u2'"),
    ("saturation value is negative", start(saturation_value=-1), "saturation_value = -1"),
    ("frame_time is nan", start(frame_time=float("nan")), "frame_time = nan"),
    ("frame_time is infinite", start(frame_time=float("inf")), "frame_time = inf"),
    ("frame_time is longer than a life", start(frame_time=1e300), "frame_time = 1e+300"),
    ("frame_time is zero", start(frame_time=0.0), "frame_time = 0.0"),
    ("count_time is negative", start(count_time=-1.0), "count_time = -1.0"),
    ("count_time is longer than frame_time", start(count_time=0.002), "count_time = 0.002"),
    ("metadata is a list", start(metadata=[]), "metadata = []"),
    ("metadata of bytes", start(metadata={"a": b"x"}), "metadata.a = b'x'"),
    ("metadata with a bytes key", start(metadata={b"a": 1}), "b'a'"),
    ("metadata with a bytes key further in", start(metadata={"x": {b"a": 1}}), "metadata.x has the key b'a'"),
    ("metadata with a timestamp", start(metadata={"a": msgpack.Timestamp(1)}), "metadata.a = Timestamp"),
    *(
        (f"{name} is nan", start(metadata={name: float("nan")}), f"metadata.{name} = nan")
        for name in (
            "n_frames",
            "incident_energy",
            "detector_distance",
            "beam_center_x",
            "beam_center_y",
            "x_pixel_size",
            "y_pixel_size",
        )
    ),
    *(
        (f"{planned} frames planned", start(metadata={"n_frames": planned}), f"metadata.n_frames = {planned!r}")
        for planned in (-1, 2**62 + 1, 1e3, "all", None)
    ),
    ("detector_distance as text", start(metadata={"detector_distance": "1 m"}), "detector_distance = '1 m'"),
    ("first is negative", frames(first=-1), "first = -1"),
    ("first is past 2**63", frames(first=2**63), "first = 9223372036854775808"),
    ("first is past 2**62", frames(first=2**62 + 1), "first = 4611686018427387905"),
    ("last is past 2**62", frames(first=2**62 - 1), "first = 4611686018427387903 and n = 2 count past"),
    ("first is a float", frames(first=1.0), "first = 1.0"),
    ("no frames", frames(b"", n=0, nbytes=0, crc32c=0), "n = 0"),
    ("more frames than the payload", frames(n=3), "[3, 3, 4] of <u2 are 72 bytes"),
    ("fewer frames than the payload", frames(n=1), "[1, 3, 4] of <u2 are 24 bytes"),
    ("wider dtype than the payload", frames(dtype="<u4"), "of <u4 are 96 bytes"),
    ("batch larger than the bound", frames(n=2**30), "n = 1073741824"),
    ("object frames", frames(dtype="|O"), "dtype = '|O'"),
    ("array name with a line end", array(name="g2\n", shape=[25]), "'g2\\n': shape [25]"),
    ("metadata key with a line end", start(metadata={"a\n": b"x"}), "metadata.a\\n = b'x'"),
    ("payload too short", frames(PAYLOAD[:-1]), "47 bytes"),
    ("payload too long", frames(PAYLOAD + b"x"), "49 bytes"),
    ("wrong nbytes", frames(nbytes=50), "nbytes = 50"),
    ("wrong checksum", frames(crc32c=FRAMES["crc32c"] ^ 1), "crc32c is 0x"),
    ("flipped bit", frames(b"\x01" + PAYLOAD[1:]), "crc32c is 0x"),
    ("checksum is negative", frames(crc32c=-1), "crc32c = -1"),
    ("timestamp is negative", frames(timestamp_ns=-1), "timestamp_ns = -1"),
    ("zstd", frames(codec="zstd"), "codec = 'zstd'"),
    ("codec is a list", frames(codec=["raw"]), "codec = ['raw']"),
    *(
        bad
        for codec in ("bslz4", "lz4")
        for bad in (
            (f"{codec} without its own header", frames(b"", codec=codec, nbytes=0, crc32c=0), f"{codec} of 0 bytes"),
            (f"{codec} of another size", chunk(codec, 50, 8192), f"{codec} of 50 bytes"),
            (f"{codec} that claims 2**64 bytes", chunk(codec, 2**64 - 1, 8192), f"{codec} of 18446744073709551615"),
            (f"{codec} in blocks of 4 GiB", chunk(codec, 48, 2**32 - 1), "in blocks of 4294967295"),
            (f"{codec} of nothing", chunk(codec, 48, 8192), f"{codec}: "),
            (f"{codec} of garbage", chunk(codec, 48, 8192, b"\xff" * 40), f"{codec}: "),
        )
    ),
    (
        "lz4 of 1 GiB from nothing",
        frames(
            (bomb := struct.pack(">QI", 2**30, 2**28)),
            codec="lz4",
            n=2**9,
            shape=[2**10, 2**10],
            nbytes=12,
            crc32c=crc32c(bomb),
        ),
        "cannot be packed into 12",
    ),
    ("events of more frames", events(n=3), "54 bytes are not the events of 3 frames of <u2"),
    ("events of 2**31 frames", events(n=2**31 - 1), "54 bytes are not the events of 2147483647 frames"),
    ("events of wider counts", events(dtype="<u4"), "54 bytes are not the events of 2 frames of <u4"),
    ("events of frames larger than the bound", events(shape=[2**20, 2**20]), "[1048576, 1048576]"),
    ("events that do not begin at 0", events(offsets=(1, 2, 5)), "offsets go from 1 to 5"),
    ("events that end too early", events(offsets=(0, 2, 4)), "offsets go from 0 to 4, not from 0 to the 5"),
    ("events that end too late", events(offsets=(0, 2, 2**60)), "offsets go from 0 to 1152921504606846976"),
    ("events of negative number", events(offsets=(0, -1, 5)), "offsets fall from 0 to -1 at frame 0"),
    ("events outside of all", events(offsets=(0, 7, 5)), "offsets fall from 7 to 5 at frame 1"),
    ("an event outside of its frame", events(pixels=(3, 12, 0, 1, 7)), "event 1 is at pixel 12 of frames of 12 pixels"),
    ("a pixel twice", events(pixels=(3, 11, 1, 1, 7)), "event 3 at pixel 1 follows pixel 1"),
    ("pixels out of order", events(pixels=(3, 11, 7, 1, 0)), "event 3 at pixel 1 follows pixel 7"),
    ("last pixels out of order", events(pixels=(3, 11, 0, 7, 1)), "event 4 at pixel 1 follows pixel 7"),
    ("pixels out of order in the first frame", events(pixels=(11, 3, 0, 1, 7)), "event 1 at pixel 3 follows pixel 11"),
    (
        "pixels out of order beside frames without events",
        events(n=4, offsets=(0, 0, 5, 5, 5)),
        "event 2 at pixel 0 follows pixel 11",
    ),
    ("an event of no counts", events(counts=(1, 2, 3, 0, 9)), "event 3 has no counts"),
    ("damaged events", events(crc32c=7), "crc32c is 0x"),
    ("chunks of fewer lengths", chunks(lengths=[74]), "lengths are 1 of 74 bytes, not n = 2 of nbytes = 74"),
    ("chunks of shorter lengths", chunks(lengths=[37, 36]), "lengths are 2 of 73 bytes, not n = 2 of nbytes = 74"),
    ("chunks of no lengths", chunks(lengths=[]), "lengths are 0 of 0 bytes"),
    ("chunks of negative lengths", chunks(lengths=[-1, 75]), "lengths.0 = -1"),
    ("chunks of 4097 lengths", chunks(lengths=[0] * 4097), "4097 exceeds max_array_len"),
    ("chunks of lengths that are text", chunks(lengths=["37", 37]), "lengths.0 = '37'"),
    ("chunks of other lengths", chunks(lengths=[38, 36]), "chunks with 2 kinds of header"),
    ("chunks of nothing", chunks(b"", b""), "the shortest of 0 bytes"),
    ("chunks of less than a header", chunks(CHUNK[:11], CHUNK[:11]), "the shortest of 11 bytes"),
    ("chunks without skip", chunks(skip=None), "skip is missing"),
    ("chunks of negative skip", chunks(skip=-1), "skip = -1"),
    ("chunks that skip more than a block", chunks(skip=4096), "skip = 4096 counts in blocks of 8192 bytes"),
    ("chunks that skip what is needed", chunks(skip=1), "chunks of 24 bytes, where counts end at 26"),
    ("chunks of more frames", chunks(n=3), "lengths are 2 of 74 bytes, not n = 3"),
    ("chunks of larger frames", chunks(shape=[3, 5]), "chunks of 24 bytes, where counts end at 30"),
    ("chunks of frames larger than the bound", chunks(shape=[2**20, 2**20]), "[1048576, 1048576]"),
    ("chunks of different sizes", chunks(CHUNK, framed(26, 8192)), "chunks with 2 kinds of header"),
    ("chunks of half a count", chunks(*2 * [framed(25, 8192)]), "chunks of 25 bytes"),
    ("chunks of 2**64 bytes", chunks(*2 * [framed(2**64 - 1, 8192)]), "chunks of 18446744073709551615 bytes"),
    ("chunks of a block too many", chunks(*2 * [framed(8194, 8192)]), "chunks of 8194 bytes, where counts end at 24"),
    ("chunks of blocks too large", chunks(*2 * [framed(24, 2**20 + 16)]), "in blocks of 1048592 bytes"),
    ("chunks of no blocks", chunks(*2 * [framed(24, 0)]), "in blocks of 0 bytes"),
    ("chunks of odd blocks", chunks(*2 * [framed(24, 8200)]), "in blocks of 8200 bytes"),
    (
        "chunks of 256 MiB from nothing",
        chunks(*2 * [framed(2**28, 8192)], shape=[2**13, 2**14]),
        "chunks of 268435456 bytes cannot be packed into 37",
    ),
    ("damaged chunks", chunks(crc32c=7), "crc32c is 0x"),
    ("exit_status unknown", stop(exit_status="crashed"), "exit_status = 'crashed'"),
    ("n_frames is negative", stop(n_frames=-1), "n_frames = -1"),
    ("n_frames is past 2**62", stop(n_frames=2**62 + 1), "n_frames = 4611686018427387905"),
    ("operator is empty", result(operator=""), "operator = ''"),
    ("operator with a slash", result(operator="a/b"), "operator = 'a/b'"),
    ("final is a number", result(final=1), "final = 1"),
    ("table is a map", result(arrays={}), "arrays = {}"),
    ("table of numbers", result(arrays=[1]), "0 = 1"),
    ("table without entries", result(arrays=[]), "the table has 0 bytes, the payload 48"),
    ("table too long", result(arrays=[ENTRY] * 5000), "5000"),
    ("array twice", [*result(arrays=[ENTRY, ENTRY])[:2], PAYLOAD * 2], "'g2' comes twice"),
    ("array of objects", array(dtype="|O"), "dtype = '|O'"),
    ("array of records", array(dtype=[["a", "<u2"]]), "dtype = [["),
    ("array of text", array(dtype="<U12", shape=[1]), "dtype = '<U12'"),
    ("array without a name", array(name=""), "name = ''"),
    ("array of negative shape", array(shape=[-24]), "shape.0 = -24"),
    ("array of unknown length", array(shape=[-1]), "shape.0 = -1"),
    ("array of another shape", array(shape=[25]), "'g2': shape [25] of <u2 is not nbytes = 48"),
    ("array larger than the payload", array(shape=[2**40], nbytes=2**41), "the table has 2199023255552 bytes"),
    ("array of 33 dimensions", array(shape=[24] + [1] * 32), "shape = ["),
    ("empty array larger than memory", array(shape=[0, 2**40, 2**40], nbytes=0), "is no array's"),
    ("array with a wrong checksum", array(crc32c=0), "'g2': crc32c is 0x"),
    *(
        (f"{parts[0].decode()}: header cut to {length} bytes", [parts[0], parts[1][:length], parts[2]], "MessagePack")
        for parts in ALIVE
        for length in range(len(parts[1]))
    ),
    *(
        (f"{parts[0].decode()}: payload cut to {length} bytes", [*parts[:2], parts[2][:length]], f"{length}")
        for parts in ALIVE
        for length in range(len(parts[2]))
    ),
]
