"""What the images are made of, held against the reference; what makes an image a new one; what reaches commands."""

import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from managed_agents.sandbox import full_image, image, layout
from managed_agents.sandbox.image_reference import COLUMNS, Row, load, table

DIRECTORY = image.dockerfile_directory()
ROWS = load(DIRECTORY / "reference.toml")
INSTALL = (DIRECTORY / "full" / "install.sh").read_text()
PARTS = set(re.findall(r"^(\w+)\(\) \{", INSTALL, re.MULTILINE))
# Of the reference, in its order.
PROPERTIES = [
    "OS",
    "Python",
    "Node.js",
    "Go",
    "Rust",
    "Java",
    "Ruby",
    "PHP",
    "C/C++",
    "Databases",
    "CLI",
    "Documents",
    "Browser",
    "Paths",
]
# What Debian's essential packages and the image of a Python bring.
OF_THE_BASE = {"bash", "coreutils", "diffutils", "findutils", "grep", "gzip", "sed", "tar"}
OF_PYTHON = {"python-is-python3", "python3", "python3-packaging", "python3-pip", "python3-pytest", "python3-venv"}

# Directories of every image.
MADE = {"workspace"}


def dockerfile(name: str) -> str:
    """Without comments, a command a line."""
    lines = [line for line in (DIRECTORY / name).read_text().splitlines() if not line.lstrip().startswith("#")]
    return "\n".join(lines).replace("\\\n", " ")


def apt_packages(name: str) -> set[str]:
    installs = re.findall(r"apt-get install -y --no-install-recommends ([^&\n]+)", dockerfile(name))
    return {word for words in installs for word in words.split()}


def debian_packages() -> set[str]:
    return {name for names in full_image.choices(DIRECTORY) for name in names}


def parts_used() -> set[str]:
    used = re.findall(r"sh /\S+/install\.sh ([\w ]+)", dockerfile("Dockerfile.full"))
    return {part for parts in used for part in parts.split()}


def names(rows: list[Row]) -> list[str]:
    return [f"{row.property}: {row.name}" for row in rows]


def test_the_reference_has_every_property_once() -> None:
    assert list(dict.fromkeys(row.property for row in ROWS)) == [*PROPERTIES, "In use"]
    assert len(set(names(ROWS))) == len(ROWS)


def test_every_row_has_an_installer_in_the_full_dockerfile() -> None:
    known = apt_packages("Dockerfile.full") | parts_used() | set(re.findall(r"[\w:.]+", dockerfile("Dockerfile.full")))
    assert names([row for row in ROWS if row.registry is None or row.registry.by not in known | {"ubuntu:24.04"}]) == []
    assert "ARG BASE=ubuntu:24.04\n" in dockerfile("Dockerfile.full")


def test_every_row_has_an_installer_in_the_distribution_or_a_reason() -> None:
    known = debian_packages() | set(full_image.PARTS) | MADE
    for row in ROWS:
        assert row.distribution is not None, row.name
        assert (row.distribution.by in known) != bool(row.distribution.lacks), row.name


def test_every_row_of_the_slim_image_is_in_both_of_its_lists() -> None:
    known = apt_packages("Dockerfile") | OF_THE_BASE | OF_PYTHON | MADE
    slim = [row for row in ROWS if row.slim is not None and row.slim.lacks is None]
    assert names([row for row in slim if row.slim.by not in known or row.slim.by not in {*image.PACKAGES, *MADE}]) == []


def test_what_is_not_as_wanted_is_said_and_checked() -> None:
    for row in ROWS:
        for column in COLUMNS:
            entry = row.entry(column)
            if entry is not None and entry.shows is not None:
                assert entry.differs is not None, f"{row.name}: the documentation would not say that {column} differs"
            if (pattern := row.pattern(column)) is not None:
                re.compile(pattern)
    assert "| Java | javac | 21 | 21 | 17 | no |" in table(ROWS)


def test_the_lists_of_slim_are_alike() -> None:
    assert set(image.PACKAGES) - OF_PYTHON - OF_THE_BASE == apt_packages("Dockerfile") - {"npm"}


def test_the_lists_of_full_are_alike() -> None:
    other = {"cargo", "cargo-web", "rustc", "rustc-web", "gradle", "chromium", "default-jdk-headless", "apt-utils", "coreutils"}
    ubuntu = {"rustup", "ruby-build", "libgmp-dev", "bsdextrautils"}
    assert debian_packages() - other == apt_packages("Dockerfile.full") - ubuntu


def test_what_the_dockerfile_copies_and_runs_is_there() -> None:
    for line in re.findall(r"^COPY (?!--from)(.+)$", dockerfile("Dockerfile.full"), re.MULTILINE):
        for source in line.split()[:-1]:
            assert (DIRECTORY / source).is_file()
    assert parts_used() <= PARTS
    assert set(full_image.PARTS) <= PARTS
    subprocess.run(["sh", "-n", DIRECTORY / "full" / "install.sh"], check=True, timeout=30)
    for name, value in full_image.ENVIRONMENT.items():
        assert f"{name}={value}" in dockerfile("Dockerfile.full")
    assert f"i=64000; while [ $i -lt {layout.UIDS + 64000} ]" in dockerfile("Dockerfile.full")


def test_every_file_that_decides_the_full_image_is_in_its_key(tmp_path: Path) -> None:
    copy = shutil.copytree(DIRECTORY, tmp_path / "sandbox")
    key = full_image.content_key(copy)
    assert key == full_image.content_key(DIRECTORY) == image.content_key("full") != image.content_key("slim")
    for path in full_image.lists(copy):
        before = path.read_text()
        path.write_text(before + "# more\n")
        assert full_image.content_key(copy) != key, path.name
        path.write_text(before)
    for path in (copy / "reference.toml", copy / "Dockerfile"):  # what checks an image, and the other variant
        path.write_text(path.read_text() + "# more\n")
    assert full_image.content_key(copy) == key
    assert image.content_key() == image.content_key("slim")


def test_settings_of_indexes_are_passed_on_and_nothing_else() -> None:
    passed = ["PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "NPM_CONFIG_REGISTRY", "npm_config_registry", "HTTPS_PROXY", "no_proxy"]
    kept = ["PIP_CERT", "PIP_TARGET", "PIP_NO_INDEX", "NPM_CONFIG_PREFIX", "PATH", "HOME", "ANTHROPIC_API_KEY"]
    assert [name for name in [*passed, *kept] if full_image._PASSED_ON.fullmatch(name)] == passed


@pytest.mark.requirement("ENV-084")
def test_what_an_image_sets_reaches_commands_below_what_the_sandbox_sets() -> None:
    set_by_image = ["PATH=/opt/tool/bin:/usr/bin", "TOOL_HOME=/opt/tool", "HOME=/root", "GIVEN=image", "ODD"]
    made = layout.environment("/home/agent", {"GIVEN": "spec"}, set_by_image)
    assert (made["TOOL_HOME"], made["HOME"], made["GIVEN"]) == ("/opt/tool", "/home/agent", "spec")
    searched = made["PATH"].split(":")
    assert searched[0] == "/home/agent/.local/bin"
    assert searched.index("/home/agent/.gem/bin") < searched.index("/opt/tool/bin") < searched.index("/usr/bin")
    assert len(set(searched)) == len(searched)
    assert "ODD" not in made
    plain = layout.environment("/home/agent", {})
    assert set(plain["PATH"].split(":")[5:]) == set(searched[5:]) - {"/opt/tool/bin"}


def test_a_second_build_waits_and_goes_on_after_the_first(tmp_path: Path) -> None:
    said: list[str] = []
    with full_image._alone(tmp_path, said.append):
        assert said == []
        waiting, entered = threading.Event(), threading.Event()

        def second() -> None:
            with full_image._alone(tmp_path, lambda line: (said.append(line), waiting.set())[0]):
                entered.set()

        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(30)
        assert not entered.is_set()
    assert entered.wait(30)
    thread.join()
    assert said == ["another build is under way: waiting for it"]
