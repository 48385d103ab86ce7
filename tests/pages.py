"""Runs what stands in the pages of the documentation: each page in a folder of its own, block by block.

Comments before a block say what a reader already has, or how long it runs:

    <!-- needs: qmap, frames -->       things and services of `SERVICES`, made once per page
    <!-- until: PATTERN -->            it serves for ever: until it says that, and on to the end of the page
    <!-- fails: STATUS -->             it ends with that
    <!-- as in: PAGE -->               it stands there, too, where it is run
    <!-- not run: WHY -->              only its options are looked at; NOT_RUN of test_docs.py has all of these

Ports of 127.0.0.1 are replaced by free ones, the same for the whole page.
"""

import doctest
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import yaml
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser

from hpc_bridge import __main__ as bridge_commands
from hpc_bridge.config import Beamline, Site, checked
from hpc_bridge.transfer_config import Globus
from stream import __main__ as xpcs_commands
from stream.config import Configuration, check
from tests.kafka import free_ports

ROOT = Path(__file__).parents[1]
DEADLINE = 120
COMMENTS = re.compile(r"((?:<!-- (?:needs|until|fails|as in|not run): .* -->\n)+)\s*\Z")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

# Ends when all that it began has ended, and is not ended by what ends that.
SHELL = """set -euo pipefail
trap : TERM
{script}
touch {done}
until wait; do :; done
"""


class Page:
    """A reader who follows a page."""

    def __init__(self, folder, fixture):
        self.folder, self.fixture = folder, fixture
        self.preamble = ""
        """Of blocks of Python."""
        self.environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HPC_BRIDGE_STATE": str(folder / "state"),
            "COLUMNS": "100",
            "TERM": "dumb",
        }
        self.replaced = []
        """Pairs of a regular expression and what stands for it here."""
        self._ports, self._has, self._running, self._n = {}, set(), [], 0
        self.stack = ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        with self.stack, ExitStack() as last_first:  # whatever one of them raises
            for process, log in self._running:
                last_first.callback(self._stop, process, log, is_well=kind is None)

    def port(self, written):
        """The port of this machine that stands for one of the page."""
        while written not in self._ports:
            [port] = free_ports(1)
            if port not in self._ports.values():
                self._ports[written] = port
        return self._ports[written]

    def is_at(self, written, port):
        """Say where a service is that the page has at another port."""
        self._ports[written] = port

    def here(self, text):
        """A text of the page, as it is to be on this machine."""
        for pattern, by in self.replaced:
            text = re.sub(pattern, by, text)
        return re.sub(
            r"(127\.0\.0\.1|0\.0\.0\.0|localhost|\*):(\d{2,5})\b", lambda at: f"{at[1]}:{self.port(int(at[2]))}", text
        )

    def needs(self, names, services):
        for name in names:
            if name not in self._has:
                self._has.add(name)
                services[name](self)

    def run(self, script, *, until=None, fails=0):
        """Run a script of shell; return what it said, once its last command has ended, or said that."""
        self._n += 1
        log, done = self.folder / f".{self._n}.log", self.folder / f".{self._n}.done"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", "-c", SHELL.format(script=self.here(script), done=done)],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._running.append((process, log))

        def said():
            return log.read_text(errors="replace")

        def is_so():
            return done.exists() or (until is not None and re.search(self.here(until), said()))

        deadline = time.monotonic() + DEADLINE
        while not is_so() and process.poll() is None:
            assert time.monotonic() < deadline, f"not within {DEADLINE} s: {script}\n{said()}"
            time.sleep(0.02)
        ended = 0 if is_so() else process.returncode
        assert ended == fails, f"{script}\nended with {ended}, not {fails}: {said()}"
        return said()

    def _stop(self, process, log, *, is_well):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(DEADLINE if is_well else 5)
            except subprocess.TimeoutExpired:
                assert not is_well, f"is not stopped by SIGTERM: {log.read_text(errors='replace')}"
            finally:
                self._kill(process)
        else:
            self._kill(process)

    def _kill(self, process):
        """End also what a shell that has ended left behind."""
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def marks(example):
    """What the comments before a block say."""
    before = COMMENTS.search(example.document.text[: example.region.start])
    lines = before[1].splitlines() if before else []
    return dict(line.removeprefix("<!-- ").removesuffix(" -->").split(": ", 1) for line in lines)


def evaluator(run, services):
    def evaluate(example):
        page, said = example.namespace["page"], marks(example)
        page.needs([name.strip() for name in said.get("needs", "").split(",") if name.strip()], services)
        if "not run" in said:
            assert_known(commands_of(example.parsed))
        elif "as in" in said:
            assert str(example.parsed) in (ROOT / said["as in"]).read_text(), (
                f"not in {said['as in']}: {example.parsed}"
            )
        else:
            run(page, example.parsed, said)

    return evaluate


def shell(page, text, said):
    assert_known(commands_of(text))
    page.run(text, until=said.get("until"), fails=int(said.get("fails", 0)))


def python(page, text, said):
    file = page.folder / f"block{len(list(page.folder.glob('block*.py')))}.py"
    file.write_text(page.here(page.preamble + text))
    page.run(f"python -u {file}", until=said.get("until"))


def console(page, text, said):
    """Commands after a $, and what they say: ... stands for what is different every time.

    That kernels are compiled is only said where it takes long.
    """
    for command, expected in transcript(text):
        assert_known(commands_of(command))
        found = re.sub(r"(?m)^compiling the kernels .*\n", "", page.run(command, until=said.get("until")))
        if not command.rstrip().endswith("&"):
            same = doctest.OutputChecker().check_output(page.here(expected), found, FLAGS)
            assert same, f"$ {command}\nsaid:\n{found}\nrather than:\n{page.here(expected)}"


def transcript(text):
    """Pairs of command and output."""
    pairs, goes_on = [], False
    for line in text.splitlines():
        if line.startswith("$ "):
            pairs.append([line[2:], ""])
        elif goes_on:
            pairs[-1][0] += f"\n{line}"
        else:
            pairs[-1][1] += f"{line}\n"
        goes_on = line.endswith("\\") and (goes_on or line.startswith("$ "))
    return pairs


def configuration(page, text, said):
    """A file, or a part of one of the examples; one that begins with its name is put there."""
    document = yaml.safe_load(page.here(text))
    name, model = max(MODELS.items(), key=lambda each: len(document.keys() & each[1].model_fields.keys()))
    required = {key for key, field in model.model_fields.items() if field.is_required()}
    if not required <= document.keys():
        document = yaml.safe_load((ROOT / "docs" / f"{name}.example.yaml").read_text()) | document
    if model is Configuration:
        check(document)
    else:
        checked(document, model)
    if named := re.match(r"# (\S+\.yaml)\n", text):
        (page.folder / named[1]).write_text(page.here(text))


MODELS = {"run": Configuration, "site": Site, "beamline": Beamline, "globus": Globus}
"""Of files; there is an example of the first three."""


def commands_of(script):
    """The commands of ours in a script, as lists of words."""
    found = []
    for line in re.sub(r"\\\n\s*", " ", script).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command = []
        for word in [*lexer, ";"]:
            if word in BETWEEN or (not command and re.fullmatch(r"\w+=.*", word)):
                found += [command] if command and command[0] in PROGRAMS else []
                command = []
            else:
                command.append(word)
    return found


BETWEEN = {*("&", "&&", "|", "||", ";", "(", ")"), *("until", "while", "if", "do", "then", "!")}
"""Words that stand before a command."""


def _options(command, of=frozenset()):
    names = of | {name for each in command.params for name in (*each.opts, *each.secondary_opts)} | {"--help", "-h"}
    return {"": names} | {name: _options(each, names)[""] for name, each in getattr(command, "commands", {}).items()}


def _known_options():
    from typer.main import get_command

    return {
        "xpcs-stream": _options(get_command(xpcs_commands.app)),
        "hpc-bridge": _options(get_command(bridge_commands.app)),
    }


PROGRAMS = _known_options()
"""Options by program and command."""


def assert_known(commands):
    """All their options are there."""
    for program, *words in commands:
        given = [word for word in words if not word.startswith("-")]
        command = next((word for word in given if word in PROGRAMS[program]), given[0] if given else "")
        assert command in PROGRAMS[program], f"{program} has no command {command}"
        for word in words:
            option = word.partition("=")[0]
            if re.fullmatch(r"--?[a-z][a-z-]*", option):
                assert option in PROGRAMS[program][command], f"{program} {command} has no {option}"


def reader(services):
    """What reads pages: their blocks run with such services."""
    runs = {"sh": shell, "python": python, "console": console, "yaml": configuration}
    return Sybil(
        [CodeBlockParser(language, evaluator(run, services)) for language, run in runs.items()], pattern="*.md"
    )
