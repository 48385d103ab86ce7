"""The processes of one beamline, with Kafka or ZeroMQ between them."""

from tests.test_command_line import started
from tests.test_kill import contents, free

REGIONS = 4
DEADLINE = 180


class Plane:
    """Starts processes at `address`, which do not outlive the stack."""

    def __init__(self, address, stack, folder, qmap):
        self.address, self.stack, self.folder, self.qmap = address, stack, folder, qmap

    def start(self, *arguments):
        return self.stack.enter_context(started(*arguments, cwd=self.folder))

    def gateway(self, source, *options):
        return self.start("gateway", "--source", source, "--to", self.address, "--regions", REGIONS, *options)

    def worker(self, *options):
        command = ("worker", "--source", self.address, "--qmap", self.qmap, "--checkpoints", "checkpoints")
        return self.start("-v", *command, "--threads", 1, "--publish-every", "0.2 s", *options)

    def merger(self, *options):
        command = ("merge", "--source", self.address, "--qmap", self.qmap, "--out", "result.h5", "--quiet")
        return self.start(*command, "--runs", 1, "--publish-every", "0.2 s", *options)

    def replay(self, frames, rate):
        """Send frames at a rate to a gateway."""
        address = f"zmq://{free()}"
        self.gateway(address)
        return self.start("replay", frames, "--to", address, "--rate", rate)

    def result(self, merger, within=DEADLINE):
        """Wait for the result file, and return what is in it."""
        out, err = merger.communicate(timeout=within)
        assert merger.returncode == 0, err
        assert out.strip() == "result.h5"
        result = contents(self.folder / "result.h5")
        take_how(result)
        return result


def take_how(result):
    """Take out what only a merger tells: that all regions are there, and came by the stream."""
    for name in ("missing_regions", "repaired_regions"):
        assert result.pop(f"xpcs/ledger/{name}").size == 0
    for name in ("from_file", "plane", "awaits_file"):
        assert result.pop(f"xpcs/ledger/{name}") == 0


def until_said(process, what, times=1):
    """Wait for lines of a process that have certain words."""
    lines = []
    while times:
        line = process.stderr.readline()
        assert line, f"it ended before it said {what!r}: {lines}"
        lines.append(line)
        times -= what in line
