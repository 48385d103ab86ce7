"""The documentation and the README: every command, every line of Python and every YAML file in them is run."""

import re
import shlex
import subprocess
import sys

import pytest
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

from tests.pages import PROGRAMS, ROOT, Page, assert_known, marks, reader
from tests.pages_services import SERVICES

pytestmark = pytest.mark.timeout(600)

DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    *sorted(page for page in DOCS.glob("**/*.md") if not {"_build", "_generated"} & {*page.relative_to(DOCS).parts}),
]
READER = reader(SERVICES)

NOT_RUN = {
    "README.md: the tests are in the middle of one of them",
    "docs/how-to/benchmarks.md: tests/test_bench.py runs them, made small",
    "docs/how-to/files-instead.md: it needs an account at Globus",
    "docs/how-to/kafka-broker.md: tests/test_broker.py runs it",
    "docs/how-to/kafka-broker.md: there is no docker here",
    "docs/how-to/logs.md: there is no journald here",
    "docs/how-to/monitor.md: there is no Prometheus here; tests/test_metrics.py reads these files",
    "docs/how-to/simulate.md: tests/test_examples.py runs it",
    "docs/how-to/switch.md: tests/test_bench.py runs it, made small",
    "docs/how-to/until-precise.md: tests/test_adaptive.py runs it",
    "docs/how-to/until-precise.md: tests/test_precision.py and tests/test_until_precise.py run what it is made of",
    "docs/tutorial/first-g2.md: the tests have it installed",
}
"""Blocks of which only the options are looked at, and why."""

SHOWN = {"text", "ini", "{toctree}", "{include}", "{eval-rst}", "{glossary}", "{math}"}
"""Languages of blocks that are nothing to be run."""


def name_of(page):
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def fonts(tmp_path_factory):
    """Where matplotlib keeps its list of fonts: one that it found before may name files that are gone."""
    return tmp_path_factory.mktemp("fonts")


@pytest.fixture
def follow(tmp_path, request, fonts):
    """Do what stands on a page."""

    def follow(path):
        document = READER.parse(path)
        with Page(tmp_path, request.getfixturevalue) as page:
            page.environment["MPLCONFIGDIR"] = str(fonts)
            document.namespace["page"] = page
            for example in document.examples():
                example.evaluate()

    return follow


WITH_BLOCKS = [page for page in PAGES if list(READER.parse(page).examples())]


@pytest.mark.parametrize("path", WITH_BLOCKS, ids=name_of)
def test_what_stands_on_a_page_does_what_it_says(path, follow):
    follow(path)


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ("```sh\nxpcs-stream qmap --shap 4x4\n```", "xpcs-stream qmap has no --shap"),
        ("<!-- not run: for the test -->\n```sh\nhpc-bridge up --deatch\n```", "hpc-bridge up has no --deatch"),
        ("```sh\nxpcs-stream shwo a.h5\n```", "xpcs-stream has no command shwo"),
        ("```sh\nxpcs-stream show absent.h5\n```", "absent.h5: no such file"),
        ("```console\n$ echo '4.2(3)'\n4.2(4)\n```", "rather than"),
        ("```python\nraise SystemExit(3)\n```", "ended with 3"),
        ("```yaml\nsource: {address: a.h5}\nqmap: b.h5\nsink: [console]\n```", "unknown key"),
        ("```yaml\nbeamline: b\nsites: [s]\ncommand: ['true']\nmax_nodes: none\n```", "max_nodes"),
        ("<!-- until: never said -->\n```sh\necho said\nexit 1\n```", "ended with 1"),
    ],
)
def test_a_mistake_on_a_page_is_found(block, says, tmp_path, follow):
    (tmp_path / "page.md").write_text(f"# A page\n\n{block}\n")
    with pytest.raises(Exception, match=re.escape(says)):
        follow(tmp_path / "page.md")


ASKED = re.compile(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)=["'](?:https?:)?//[^>]*>""")


def test_the_pages_are_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "-q", "-d", tmp_path / "doctrees"]
    done = subprocess.run([*command, DOCS, tmp_path / "html"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "html/reference/command-line.html").read_text()
    for command in ("qmap", "gateway", "submit"):
        assert re.search(rf"<h3>.*{command}", page), command
    assert "<math" in (tmp_path / "html/explanation/multi-tau.html").read_text()
    asked = [found for html in (tmp_path / "html").glob("**/*.html") for found in ASKED.findall(html.read_text())]
    assert not asked, "pages ask another machine for it"


def test_what_is_not_run_is_listed_here():
    found = {
        f"{name_of(page)}: {why}"
        for page in PAGES
        for example in READER.parse(page).examples()
        if (why := marks(example).get("not run"))
    }
    assert found == NOT_RUN


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_is_of_a_language_that_is_known(page):
    of = FencedCodeBlockLexer("[^\n]*", {"language": "language", "source": "source"})
    languages = {region.lexemes["language"].split()[0] for region in of(READER.parse(page))}
    assert languages <= SHOWN | {"sh", "console", "python", "yaml"}
    # A comment that is written otherwise would do nothing.
    for comment in re.findall(r"<!--.*?-->", page.read_text(), re.DOTALL):
        assert re.fullmatch(r"<!-- (needs|until|fails|as in|not run): .* -->", comment), comment
    assert "[](" not in page.read_text(), "such a link has no text where Markdown is shown as it is"
    for needed in re.findall(r"<!-- needs: (.*) -->", page.read_text()):
        assert {name.strip() for name in needed.split(",")} <= SERVICES.keys()


EVERY_OPTION = {option for commands in PROGRAMS.values() for options in commands.values() for option in options}
OF_OTHERS = {"--plot", "--json", "--check", "--read", "--config-settings"}
"""Of python -m bench and tiled."""


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_option_in_the_text_is_one_of_ours(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for code in re.findall(r"`([^`\n]+)`", text):
        words = code.split()
        if words[0] in PROGRAMS and len(words) > 1 and "..." not in code and words[1] in PROGRAMS[words[0]]:
            assert_known([shlex.split(code)])
        for word in words:
            if re.fullmatch(r"--[a-z][a-z-]+", word):
                assert word in EVERY_OPTION | OF_OTHERS, code


def test_messages_to_look_for_are_those_of_the_program():
    source = "".join(
        re.sub(r"\"\s*\n\s*f?\"", "", file.read_text())
        for package in ("stream", "hpc_bridge")
        for file in (ROOT / package).glob("**/*.py")
    )
    said = re.sub(r"\{[^{}]*\}|%[-+.\d]*[a-z]", "\0", source)
    headings = re.findall(r"(?m)^### `(.*)`$", (DOCS / "how-to/troubleshooting.md").read_text())
    assert len(headings) > 20
    for heading in headings:
        for part in heading.removeprefix("hpc-bridge: ").split("..."):
            assert part.strip(" :,") in said, heading


def test_links_of_the_readme_lead_to_files():
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).is_file(), target
