"""Messages that no detector should send: (name, parts, words that the refusal must have)."""

import json
import struct

import cbor2
from cbor2 import CBORTag

SHAPE = (2, 3)
BSLZ4 = struct.pack(">QI", 12, 8192) + bytes(12)


def v1_header(**changed):
    configuration = {"nimages": 4, "ntrigger": 1, "frame_time": 0.01, "count_time": 0.009} | changed
    return [encode({"htype": "dheader-1.0", "series": 1, "header_detail": "basic"}), encode(configuration)]


def v1_image(blob=bytes(12), *, first=(), data=(), exposure=()):
    described = {"htype": "dimage_d-1.0", "shape": [3, 2], "type": "uint16", "encoding": "<", "size": len(blob)}
    return [
        encode({"htype": "dimage-1.0", "series": 1, "frame": 0, "hash": ""} | dict(first)),
        encode(described | dict(data)),
        blob,
        encode({"htype": "dconfig-1.0", "start_time": 0, "stop_time": 9, "real_time": 9} | dict(exposure)),
    ]


def v2_start(**changed):
    fields = {
        "type": "start",
        "series_id": 1,
        "series_unique_id": "A",
        "channels": ["threshold_1"],
        "number_of_images": 4,
        "frame_time": 0.01,
        "count_time": 0.009,
    }
    return [cbor2.dumps(fields | changed)]


def v2_image(content=bytes(12), *, shape=SHAPE, tag=69, **changed):
    fields = {
        "type": "image",
        "series_id": 1,
        "series_unique_id": "A",
        "image_id": 0,
        "series_date": CBORTag(0, "2026-01-02T03:04:05.678Z"),
        "start_time": [0, 50_000_000],
        "data": {"threshold_1": CBORTag(40, [list(shape), CBORTag(tag, content)])},
    }
    return [cbor2.dumps(fields | changed)]


def compressed(*items):
    return CBORTag(56500, list(items))


def encode(fields):
    return json.dumps(fields).encode()


def truncated(parts):
    """Every way to cut a message short."""
    for last, part in enumerate(parts):
        for length in range(len(part)):
            yield [*parts[:last], part[:length]]


CORPUS = [
    ("no parts", [], "no parts"),
    ("an empty part", [b""], "CBOR"),
    ("text", [b"hello"], "CBOR"),
    ("bytes that are neither", [b"\xff\x00\x01"], "CBOR"),
    ("a break where a map begins", [b"\xbf\xff\xff"], "type"),
    ("CBOR that is a list", [cbor2.dumps([1, 2])], "start, image or end"),
    ("CBOR nested deep", [b"\x81" * 100_000], "nesting"),
    ("CBOR that claims to be huge", [b"\xbb" + b"\x00\x00\xff" + bytes(5)], "CBOR"),
    ("CBOR of two parts", v2_image() * 2, "2 parts"),
    ("a type not known", [cbor2.dumps({"type": "monitor"})], "monitor"),
    ("JSON that is not a map", [b"[1, 2]"], "CBOR"),
    ("JSON that is no JSON", [b"{]"], "JSON"),
    ("JSON nested deep", [b'{"a":' * 100_000], "recursion"),
    ("JSON too long", [b'{"a": "' + b" " * 2**20 + b'"}'], "more than"),
    ("an htype not known", [b'{"htype": "dimage-2.0"}'], "dimage-2.0"),
    ("a series that is a text", [b'{"htype": "dseries_end-1.0", "series": "x"}'], "series = 'x'"),
    ("a V1 header without configuration", v1_header()[:1], "header_detail"),
    ("a V1 frame_time that is NaN", v1_header(frame_time=float("nan")), "frame_time = nan"),
    ("a V1 frame_time longer than a life", v1_header(frame_time=1e300), "frame_time = 1e+300"),
    ("a V1 frame_time of 0", v1_header(frame_time=0.0), "frame_time = 0.0"),
    ("a V1 count_time that is infinite", v1_header(count_time=float("inf")), "count_time = inf"),
    ("no images planned", v1_header(nimages=0), "nimages = 0"),
    ("a V1 configuration that is not a map", [v1_header()[0], b"[]"], "dheader of series-1"),
    (
        "a V1 pixel mask too short",
        [*v1_header(), encode({"htype": "dpixelmask-1.0", "shape": [3, 2], "type": "uint32"}), bytes(23)],
        "24 bytes, not 23",
    ),
    ("a V1 header part not known", [*v1_header(), encode({"htype": "dfoo-1.0"}), b""], "dfoo-1.0"),
    ("a V1 image of 3 parts", v1_image()[:3], "3 parts"),
    ("a V1 image of 6 parts", [*v1_image(), b"", b""], "6 parts"),
    ("a V1 frame number that is negative", v1_image(first={"frame": -1}), "frame = -1"),
    ("a V1 frame number past 2**62", v1_image(first={"frame": 2**62}), "frame = 4611686018427387904"),
    ("a V1 shape that does not fit", v1_image(data={"shape": [3, 3]}), "18 bytes, not 12"),
    ("a V1 shape that is huge", v1_image(data={"shape": [2**40, 2**40]}), "268435456"),
    ("a V1 shape that is negative", v1_image(data={"shape": [-3, -2]}), "-2 x -3"),
    ("a V1 shape of three", v1_image(data={"shape": [3, 2, 1]}), "shape"),
    ("a V1 size that differs", v1_image(data={"size": 11}), "size = 11"),
    ("a V1 type not known", v1_image(data={"type": "float32"}), "float32"),
    ("a V1 encoding not known", v1_image(data={"encoding": "zstd<"}), "zstd<"),
    ("a V1 encoding of big-endian counts", v1_image(data={"encoding": "lz4>"}), "lz4>"),
    ("a V1 encoding of another type", v1_image(BSLZ4, data={"encoding": "bs32-lz4<"}), "bs32-lz4<"),
    ("a V1 time that is no number", v1_image(exposure={"start_time": "now"}), "start_time = 'now'"),
    ("V1 lz4 that is garbage", v1_image(b"\xf0" + bytes(9), data={"encoding": "lz4<"}), "lz4 block"),
    ("V1 lz4 of fewer bytes", v1_image(b"\x10a", data={"encoding": "lz4<"}), "not 12"),
    ("a V2 frame_time that is NaN", v2_start(frame_time=float("nan")), "frame_time = nan"),
    ("a V2 frame_time that is not there", v2_start(frame_time=None), "frame_time = None"),
    ("a V2 run that is empty", v2_start(series_unique_id=""), "series_unique_id = ''"),
    ("a V2 date that is no date", v2_image(series_date=CBORTag(0, "soon")), "CBOR"),
    ("a V2 date before 1970", v2_image(series_date=CBORTag(0, "1066-10-14T09:00:00Z")), "not within"),
    ("a V2 time over nothing", v2_image(start_time=[0, 0]), "start_time.1 = 0"),
    ("a V2 time that is far", v2_image(start_time=[2**64 - 1, 1]), "not within"),
    ("a V2 image_id that is negative", v2_image(image_id=-1), "image_id = -1"),
    ("a V2 image_id that is true", v2_image(image_id=True), "image_id = True"),
    ("a V2 image_id of a thousand digits", v2_image(image_id=10**1000), "image_id"),
    ("a V2 image_id of 5000 digits", v2_image(image_id=10**5000), "image_id = (int too long to show)"),
    ("a V2 image_id past 2**62", v2_image(image_id=2**62), "image_id = 4611686018427387904"),
    ("a V2 run name of two lines, of no channels", v2_image(series_unique_id="a\nb", data={}), "of a b has no channel"),
    ("V2 channels that are numbers", v2_image(data={10**5000: 0}), "valid string"),
    ("V2 data that is not a map", v2_image(data=[]), "data = []"),
    ("V2 data of no channels", v2_image(data={}), "no channel"),
    ("V2 data of no array", v2_image(data={"threshold_1": 1}), "threshold_1"),
    ("a V2 shape that does not fit", v2_image(shape=(3, 3)), "18 bytes, not 12"),
    ("a V2 shape that is huge", v2_image(shape=(2**40, 2**40)), "268435456"),
    ("a V2 shape of 5000 digits", v2_image(shape=(10**5000, 1)), "(int too long to show) x 1 pixels"),
    ("a V2 shape of three", v2_image(shape=(2, 3, 1)), "two dimensions"),
    ("a V2 typed array not known", v2_image(tag=85), "tag 85"),
    ("a V2 codec not known", v2_image(compressed("zip", 2, bytes(12))), "zip"),
    ("a V2 element size of 5000 digits", v2_image(compressed("bslz4", 10**5000, BSLZ4)), "(int too long to show)"),
    ("a V2 element size that differs", v2_image(compressed("bslz4", 4, BSLZ4)), "bslz4"),
    ("V2 bytes that are a text", v2_image("abcdefghijkl"), "bytes"),
    ("V2 bslz4 too short to have a size", v2_image(compressed("bslz4", 2, bytes(11))), "11 bytes"),
    ("V2 bslz4 of another size", v2_image(compressed("bslz4", 2, struct.pack(">QI", 14, 8192))), "14 declared"),
    ("V2 bslz4 of a huge size", v2_image(compressed("bslz4", 2, struct.pack(">QI", 2**40, 8192))), "declared"),
    ("V2 bslz4 of huge blocks", v2_image(compressed("bslz4", 2, struct.pack(">QI", 12, 2**31))), "block of"),
    ("V2 bslz4 that is garbage", v2_image(compressed("bslz4", 2, BSLZ4[:12] + b"\x00")), "bslz4"),
    ("V2 lz4 of another size", v2_image(compressed("lz4", 0, struct.pack(">QI", 2**62, 12))), "declared"),
    ("V2 lz4 that is garbage", v2_image(compressed("lz4", 0, struct.pack(">QII", 12, 12, 5) + bytes(5))), "lz4"),
]
