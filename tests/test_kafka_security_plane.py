"""Gateway, worker and merger told who they are by `--kafka-properties`, at a broker that asks everybody."""

import uuid
from contextlib import ExitStack

import pytest

from tests.kafka import PASSWORD, USER
from tests.plane import take_how
from tests.test_command_line import finished, started
from tests.test_kill import N_FRAMES, assert_identical, contents, frames, qmap, result_of_frames

pytestmark = pytest.mark.timeout(400)

__all__ = ["frames", "qmap"]

DEADLINE = 120
WRONG = "hunter2"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, qmap):
    return result_of_frames(tmp_path_factory.mktemp("undisturbed"), qmap, range(N_FRAMES))


@pytest.fixture
def start(tmp_path, qmap):
    """Start gateway, worker or merge of one beamline in processes of their own, which say more of what happens."""
    beamline = f"beamline-{uuid.uuid4().hex[:8]}"
    options = {
        "gateway": ("--regions", 2),
        "worker": ("--qmap", qmap, "--checkpoints", "checkpoints", "--threads", 1, "--publish-every", "0.2 s"),
        "merge": ("--qmap", qmap, "--out", "result.h5", "--quiet", "--runs", 1),
    }

    def command(name, way, *more):
        properties = dict(way)
        at = properties.pop("bootstrap.servers")
        file = tmp_path / f"{name}.properties"
        file.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
        where = ("--to" if name == "gateway" else "--source", f"kafka://{at}/{beamline}")
        arguments = ("-v", name, *where, *options[name], "--kafka-properties", file, *more)
        return stack.enter_context(started(*arguments, cwd=tmp_path))

    with ExitStack() as stack:
        yield command


@pytest.fixture
def file_of(tmp_path):
    """Write a secret into a file of its own."""

    def write(name, secret):
        path = tmp_path / name
        path.write_text(secret)
        return path

    return write


@pytest.fixture
def ways(secured, monkeypatch, file_of):
    """Every way to come in: a password in a file, one in the environment, and a certificate."""
    monkeypatch.setenv("XPCS_KAFKA_PASSWORD", PASSWORD)
    mtls = {name: value for name, value in secured.mtls.items() if not name.endswith(".pem")}
    return [
        secured.scram | {"sasl.password": f"file:{file_of('password', PASSWORD)}"},
        secured.scram | {"sasl.password": "env:XPCS_KAFKA_PASSWORD"},
        mtls
        | {
            "ssl.certificate.location": file_of("certificate.pem", secured.mtls["ssl.certificate.pem"]),
            "ssl.key.pem": f"file:{file_of('key.pem', secured.mtls['ssl.key.pem'])}",
        },
    ]


@pytest.mark.parametrize("turn", range(3))
def test_whoever_comes_in_by_whichever_way_the_result_is_that_of_one_process_and_no_secret_is_told(
    secured, ways, start, tmp_path, frames, undisturbed, turn
):
    of_gateway, of_worker, of_merger = ways[turn:] + ways[:turn]
    gateway = start("gateway", of_gateway, "--source", frames)
    worker = start("worker", of_worker)
    merger = start("merge", of_merger)
    said = [*finished(gateway), *finished(merger)]
    worker.terminate()
    said += finished(worker)

    result = contents(tmp_path / "result.h5")
    take_how(result)
    assert_identical(result, undisturbed)
    key = secured.mtls["ssl.key.pem"].splitlines()[1]
    for text in said:
        assert PASSWORD not in text
        assert key not in text


def test_a_wrong_password_ends_every_command_with_one_line_that_does_not_tell_it(secured, start, frames, file_of):
    wrong = secured.scram | {"sasl.password": f"file:{file_of('password', WRONG)}"}
    commands = [start("gateway", wrong, "--source", frames), start("worker", wrong), start("merge", wrong)]
    for command in commands:
        out, err = command.communicate(timeout=DEADLINE)
        assert command.returncode == 1, err
        [line] = [line for line in err.splitlines() if line.startswith("xpcs-stream: ")]
        assert f"{USER} cannot log in: " in line
        assert "invalid credentials" in line
        assert "Traceback" not in err
        assert WRONG not in out + err
