"""A manager of compute nodes as people run it: files, commands, and what they print."""

import json
import subprocess
import sys
import time
import uuid
from pathlib import Path

import yaml

from hpc_bridge.control import NoManager, ask
from tests.kafka import free_ports

DEADLINE = 150
HERE = Path(sys.executable).parent


class Bridge:
    """Of one site and one beamline; `close` leaves no job behind.

    A busy machine takes long for a heartbeat: only where pilots are lost without a word should `lost_after` be short.
    """

    def __init__(
        self, folder, command, *, scheduler="local", through=(), queues=None, site=None, lost_after="40 s", **beamline
    ):
        self.folder, self.state = folder, folder / "state"
        [port] = free_ports(1)
        self.site = {
            "site": "here",
            "scheduler": scheduler,
            "directory": str(folder / "jobs"),
            "submit_through": list(through),
            "prepare": f"export PATH={HERE}:$PATH",
            "heartbeats": {
                "bind": f"tcp://127.0.0.1:{port}",
                "address": f"tcp://127.0.0.1:{port}",
                "every": "0.5 s",
                "lost_after": lost_after,
            },
            "queues": queues or [{"name": "preemptable", "walltime": "10 min", "max_jobs": 8}],
            "ahead": "40 s",
            "drain": "5 s",
            "alone": "2 min",
            "list_every": "1 s",
            "submits_per_minute": 600,
            **(site or {}),
        }
        self.name = f"b{uuid.uuid4().hex[:8]}"  # of others on the same scheduler nothing is known
        self.beamline = {"beamline": self.name, "sites": ["here"], "command": list(map(str, command)), **beamline}
        self.processes = []
        self.may_have_jobs = True

    def up(self, *options):
        """Become the manager; returns once it answers."""
        files = [self.write("beamline.yaml", self.beamline), "--site", self.write("site.yaml", self.site)]
        return self.up_again(*files, *options)

    def up_again(self, *options):
        """Become the manager of what is held."""
        self.may_have_jobs = True
        log = (self.folder / "manager.log").open("ab")
        process = subprocess.Popen(self.words("up", *options), stderr=log, cwd=self.folder)
        log.close()
        self.processes.append(process)
        self.until(lambda: process.poll() is not None or self.status() is not None)
        assert process.poll() is None, self.log()
        return process

    def down(self):
        self.run("down")
        self.may_have_jobs = False

    def status(self):
        """What is told of the beamline; None without a manager."""
        try:
            return ask(self.state, {"do": "status"})["beamlines"].get(self.name)
        except NoManager:
            return None

    def pilots(self, state="serving"):
        return [pilot for pilot in (self.status() or {"pilots": []})["pilots"] if pilot["state"] == state]

    def until_serving(self, n):
        return self.until(lambda: len(pilots := self.pilots()) == n and pilots)

    def until(self, is_so, deadline=DEADLINE):
        end = time.monotonic() + deadline
        while not (found := is_so()):
            assert time.monotonic() < end, f"{self.status()}\n{self.log()}"
            time.sleep(0.1)
        return found

    def log(self):
        return (self.folder / "manager.log").read_text()

    def run(self, *arguments, check=True):
        return subprocess.run(
            self.words(*arguments), capture_output=True, text=True, timeout=DEADLINE, check=check, cwd=self.folder
        )

    def words(self, command, *arguments):
        state = () if command == "check" else ("--state", self.state)
        return [str(word) for word in (sys.executable, "-m", "hpc_bridge", command, *arguments, *state)]

    def write(self, name, document):
        file = self.folder / name
        file.write_text(yaml.safe_dump(document))
        return file

    def close(self):
        if self.may_have_jobs and self.state.exists():
            self.run("down", check=False)
        for process in self.processes:
            process.kill()
            process.wait()


def worker(address, qmap, folder):
    """The command of a real worker."""
    return (
        "xpcs-stream", "-v", "worker", "--source", address, "--qmap", qmap, "--checkpoints", folder / "checkpoints",
        "--threads", 1, "--publish-every", "0.2 s", "--name", "{name}", "--status", "{status}",
    )  # fmt: skip


def stand_in(lag=0.1):
    """A command that only says that it serves."""
    status = json.dumps({"ready": True, "regions": [0, 1], "frames": 1, "lag_s": lag})
    code = f"import pathlib, signal; pathlib.Path(__import__('sys').argv[1]).write_text('{status}'); signal.pause()"
    return (sys.executable, "-c", code, "{status}")


def processes(words):
    """Ids of processes of this machine whose command line has these words."""
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = each.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has just ended
            continue
        if words in line:
            found.append(int(each.parent.name))
    return found
