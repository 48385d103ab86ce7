from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from stream.config import Address, Configuration, address, check, load
from stream.errors import ConfigError
from stream.units import quantity

EXAMPLE = Path(__file__).parents[1] / "docs" / "run.example.yaml"
SMALLEST = {"source": {"address": "zmq://127.0.0.1:5555"}, "qmap": "qmap.h5"}


@pytest.fixture
def refused(tmp_path):
    """Return the problems of a configuration file, one a line, without its name."""

    def problems(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError) as error:
            load(path)
        return [line.removeprefix(f"{path}:") for line in str(error.value).splitlines()]

    return problems


def test_the_example_file_loads():
    example = load(EXAMPLE)
    assert example.source.address == "zmq+dectris://127.0.0.1:31001"
    assert example.operators.multitau.delays_per_level == 4
    assert example.sinks == ("console", "results/{run}.h5", "zmq://127.0.0.1:5556")
    assert example.checkpoint.every == 30.0


def test_the_example_file_names_every_key():
    def keys(model):
        for name, info in model.model_fields.items():
            yield name
            inner = [
                t for t in (info.annotation, *getattr(info.annotation, "__args__", ())) if hasattr(t, "model_fields")
            ]
            for section in inner:
                yield from keys(section)

    text = EXAMPLE.read_text()
    assert [name for name in keys(Configuration) if f"{name}:" not in text] == []


def test_the_defaults_are_those_of_the_example_file():
    bare = check(SMALLEST)
    example = load(EXAMPLE)
    assert bare.operators == example.operators
    assert bare.publish_every == example.publish_every
    assert check(SMALLEST | {"checkpoint": {"path": "x"}}).checkpoint.every == example.checkpoint.every


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"checkpoint": {"path": "c", "every": "1 min"}, "publish_every": "123.456789012 ms", "threads": 3},
        {"source": {"address": "f.h5", "frame_time": "0.1 us", "batch": 7}, "sinks": ["{run}.h5"]},
        {"operators": {"multitau": {"error": "pixel"}, "scattering": False}},
        {"operators": {"twotime": {}}},
        {"operators": {"twotime": {"frames": 100, "bins": [4, 1], "normalisation": "static", "memory_gib": 0.5}}},
        {"source": {"address": "x.bin", "frame_time": "20 us", "batch": 512, "metadata": "y.hdf"}},
    ],
)
def test_the_text_of_a_configuration_says_the_same_again(tmp_path, more):
    configuration = check(SMALLEST | more)
    (tmp_path / "again.yaml").write_text(configuration.text())
    assert load(tmp_path / "again.yaml") == configuration


def test_an_unknown_key_is_refused_with_its_line_and_the_nearest_known_one(refused):
    assert 'source.adress: unknown key; did you mean "address"?' in refused("qmap: q.h5\nsource:\n  adress: x\n")[1]
    assert refused("source: {address: f.h5}\nqmap: q.h5\nqmapp: 1\n") == ['3: qmapp: unknown key; did you mean "qmap"?']
    text = "source: {address: f.h5}\nqmap: q.h5\noperators:\n  multitau:\n    levls: 3\n"
    assert refused(text) == ['5: operators.multitau.levls: unknown key; did you mean "levels"?']


def test_what_is_missing_is_named_with_the_line_of_its_section(refused):
    assert refused("qmap: q.h5\ncheckpoint:\n  every: 1 s\nsource: {address: f.h5}\n") == [
        "2: checkpoint.path: is missing"
    ]
    assert refused("") == ["1: source: is missing", "1: qmap: is missing"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('threads: "4"', 'threads: "4" should be a valid integer'),
        ("threads: 0", "threads: 0 should be greater than or equal to 1"),
        ("threads: yes", "threads: true should be a valid integer"),
        ("publish_every: 5 kg", 'publish_every: "5 kg" is not a time; write e.g. "5 s"'),
        ("publish_every: 5", 'publish_every: "5" has no unit; a time is written e.g. "5 s"'),
        ("publish_every: 0 s", 'publish_every: "0 s" is not above 0'),
        ("operators: {multitau: {error: both}}", "operators.multitau.error: \"both\" should be 'static' or 'pixel'"),
        (
            "operators: {twotime: {frames: 1}}",
            "operators.twotime.frames: 1 should be greater than or equal to 2",
        ),
        ("operators: {multitau: {levels: 29}}", "operators.multitau.levels: 29 should be less than or equal to 28"),
        (
            "operators: [multitau]",
            'operators: ["multitau"] should be a section with keys',
        ),
        ("sinks: console", 'sinks: "console" should be a list'),
        ("sinks: ['{scan}.h5']", 'sinks[0]: "{scan}.h5": {scan} stands for nothing; only {run} does'),
        ("sinks: []", "sinks: at least one is needed"),
        ("sinks: [console, zmq+dectris://a:1]", 'sinks[1]: "zmq+dectris://a:1" cannot be used here'),
        ("sinks: [consol]", 'sinks[0]: "consol": an address is'),
    ],
)
def test_a_wrong_value_is_refused_with_its_line(refused, line, problem):
    found = refused(f"source: {{address: f.h5}}\nqmap: q.h5\n\n{line}\n")
    assert len(found) == 1
    assert found[0].startswith("4: " + problem)


def test_every_problem_is_told_at_once(refused):
    found = refused("source:\n  address: tcp://x\n  batch: 0\nthreads: many\npublish: 1 s\n")
    assert sorted(line.partition(": ")[0] for line in found) == ["1", "2", "3", "4", "5"]


def test_an_option_that_its_source_does_not_have_is_refused(refused):
    assert refused("qmap: q.h5\nsource:\n  address: frames.h5\n  channel: threshold_1\n") == [
        '4: source.channel: not an option of "frames.h5"'
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("qmap: a\nqmap: b\n", "2: qmap: stands here for the second time"),
        ("source:\n  address: f.h5\n  batch: 1\n  batch: 2\n", "4: batch: stands here for the second time"),
        ("qmap: [a\n", "2: expected ',' or ']'"),
        ("qmap: !!python/object/apply:os.system [ls]\n", "1: could not determine a constructor"),
        ("a: 1\n---\nb: 2\n", "2: but found another document"),
        ("- qmap\n", '1: ["qmap"] should be a section with keys'),
        ("qmap: \x07\n", " "),
    ],
)
def test_what_is_no_configuration_is_refused(refused, text, problem):
    assert refused(text)[0].startswith(problem)


@pytest.mark.parametrize("port", [0, 65536, 99999])
def test_a_port_that_cannot_be_is_named(port):
    with pytest.raises(ConfigError, match=f"port {port} is not 1 to 65535"):
        address(f"zmq://h:{port}")


def test_a_file_of_frames_is_no_configuration(tmp_path):
    path = tmp_path / "small.h5"
    path.write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(ConfigError, match=r"small\.h5 is not a YAML file; frames are given with --source"):
        load(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.yaml: no such file"):
        load(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("text", "transport", "target"),
    [
        ("zmq+dectris://10.0.0.1:31001", "dectris", "tcp://10.0.0.1:31001"),
        ("zmq://beamline.example.org:5555", "zmq", "tcp://beamline.example.org:5555"),
        ("zmq://*:5555", "zmq", "tcp://*:5555"),
        ("zmq://[::1]:5555", "zmq", "tcp://[::1]:5555"),
        ("file:/data/x.h5", "hdf5", "/data/x.h5"),
        ("file:///data/x.h5", "hdf5", "/data/x.h5"),
        ("file:x.nxs", "hdf5", "x.nxs"),
        ("a b/x_master.hdf5", "hdf5", "a b/x_master.hdf5"),
        ("x.hdf", "hdf5", "x.hdf"),
        ("x.cbors", "recording", "x.cbors"),
        ("x.cbors.xz", "recording", "x.cbors.xz"),
        ("x.bin", "rigaku", "x.bin"),
        ("file:/data/x.bin.000", "rigaku", "/data/x.bin.000"),
        ("zmq://127.0.0.1:5555/8idi", "hub", "tcp://127.0.0.1:5555/8idi"),
        ("zmq+bluesky://127.0.0.1:5577", "proxy", "tcp://127.0.0.1:5577"),
        ("tiled+http://127.0.0.1:8000", "tiled", "http://127.0.0.1:8000"),
        ("tiled+https://tiled.x.org/api/v1/metadata/8idi", "tiled", "https://tiled.x.org/api/v1/metadata/8idi"),
    ],
)
def test_an_address_is_a_transport_and_a_target(text, transport, target):
    assert address(text) == Address(transport, target)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x.tif",
        "tcp://h:1",
        "zmq://h",
        "zmq://h:0",
        "zmq://h:99999",
        "zmq://h:x",
        "zmq://:5",
        "zmq://h:5/path/more",
        "zmq://h:99999/8idi",
        "zmq://u@h:5",
        "tiled://h:8000",
    ],
)
def test_what_is_no_address_is_refused_by_name(text):
    with pytest.raises(ConfigError, match=f'^"{text}"'):
        address(text)


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("500 ms", "s", 0.5),
        ("30s", "s", 30.0),
        ("2 h", "s", 7200.0),
        ("1e2 µs", "s", 1e-4),
        ("75 um", "m", 7.5e-5),
        ("11000 eV", "keV", 11.0),
        ("0.05 1/nm", "1/angstrom", 0.005),
        ("0.05/nm", "1/angstrom", 0.005),
        ("51/nm", "1/angstrom", 5.1),
        ("4 Å^-1", "1/angstrom", 4.0),
        ("1 kHz", "1/s", 1000.0),
        ("1 um^2/s", "angstrom^2/s", 1e8),
        ("-2 mm", "m", -0.002),
    ],
)
def test_a_quantity_is_read_in_its_unit(text, unit, value):
    assert quantity(text, unit) == pytest.approx(value, rel=1e-14)


@pytest.mark.parametrize(
    "text",
    [
        "5 kg",
        "5 s^2",
        "s",
        "five s",
        "",
        "5 s 3",
        "5 foo",
        "5 s; 3",
        "1e400 s",
        "9**9 s",
        "1 s**9**9**9**9",
        None,
        True,
    ],
)
def test_what_is_no_time_is_refused_by_name(text):
    with pytest.raises(ConfigError, match="is not"):
        quantity(text, "s")


@given(st.floats(min_value=1e-12, max_value=1e12))
def test_seconds_written_out_are_the_same_seconds(seconds):
    assert quantity(f"{seconds!r} s", "s") == seconds


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_nothing_but_a_config_error_comes_of_any_yaml(tmp_path_factory, document):
    path = tmp_path_factory.mktemp("any") / "run.yaml"
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(ConfigError):
        load(path)
