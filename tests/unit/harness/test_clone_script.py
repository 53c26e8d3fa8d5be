"""What a cloning script says is read from its own last lines, whatever a git host has it print before."""

import os
import subprocess
from pathlib import Path

import pytest

from managed_agents.harness import clone_script
from managed_agents.harness.clone_script import Kept
from managed_agents.resources.sessions.repositories import Repository, State
from managed_agents.sandbox.backend import Outcome

HERE = Repository("sesrsc_1", "https://github.com/acme/a", "/workspace/a")
PACK = f"pack-{'a' * 40}.pack"
KEPT = f"from: host\nkept: {PACK} {'b' * 64}\n"


def read(said: str) -> clone_script.Cloned:
    return clone_script.read(HERE, Outcome([{"type": "text", "text": said}], is_error=False))


def test_a_clone_that_is_to_be_kept_and_one_that_is_not() -> None:
    assert read(f"\n{KEPT}repository: done\n") == clone_script.Cloned(State(), Kept(PACK, "b" * 64))
    assert read("\nfrom: bundle\nkept:\nrepository: done\n") == clone_script.Cloned(State())
    assert read("\nfrom: host-after-bundle\nkept:\nrepository: done\n").spoiled
    # Where the host refuses as well, the bundle may be fine.
    refused = read("fatal: Authentication failed\nfrom: host-after-bundle\nkept:\nrepository: clone\n")
    assert refused.state.error == "repository_authentication_error"
    assert not refused.spoiled


@pytest.mark.parametrize("forged", [f"{KEPT}repository: done", f"repository: done\n{KEPT}", KEPT])
def test_a_host_cannot_forge_the_last_lines(forged: str) -> None:
    said = read(f"remote: hello\n{forged}\nfrom: host\nkept:\nrepository: checkout\n")
    assert said.state.error == "repository_checkout_error"
    assert said.kept is None


def test_one_that_was_ended_has_no_last_lines() -> None:
    said = read("Cloning\nThe command timed out.")
    assert said.state.error == "repository_clone_error"
    assert said.state.message.endswith("could not be cloned. Cloning The command timed out.")
    assert said.kept is None
    assert said.unfinished
    assert not read("\nfrom: host\nkept:\nrepository: clone\n").unfinished


def test_a_clone_that_was_cut_off_is_made_again_beside_nothing_of_the_first(tmp_path: Path) -> None:
    origin, clone = tmp_path / "origin", tmp_path / "clone"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(origin)]
    subprocess.run(["git", "init", "-q", str(origin)], check=True, timeout=30)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True, timeout=30)
    id_ = f"sesrsc_{tmp_path.name}{os.getpid()}"
    one = Repository(id_, str(origin), str(clone))
    left = [Path(f"/tmp/{id_}.bundle"), Path(f"/tmp/{id_}.abcdefgh"), clone / "half" / "of it"]
    for path in left:
        path.mkdir(parents=True)
    command = clone_script.clone(one, bundle=str(left[0]), known_bytes=0, keeps=False, again=True)
    said = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=60).stdout
    assert read(said).state == State()
    assert (clone / ".git").is_dir()
    assert not [path for path in left if path.exists()]
    assert not list(Path("/tmp").glob(f"{id_}.*"))


def test_names_cannot_leave_their_quotes() -> None:
    evil = Repository("sesrsc_1", "https://github.com/acme/a", "/workspace/it's; reboot", branch="$(reboot)")
    script = clone_script.clone(evil, bundle="/tmp/x", known_bytes=5, keeps=True)
    assert "dir='/workspace/it'\"'\"'s; reboot' branch='$(reboot)' sha='' bundle=/tmp/x known=5" in script
