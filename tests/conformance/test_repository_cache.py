"""Cached clones in real containers: what a session cloned is not sent to later ones again, who cannot tell the difference."""

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from sqlalchemy import text

from managed_agents.blobstore.store import BlobRef
from managed_agents.harness.clone_cache import CloneCache
from managed_agents.harness.clone_script import Kept
from managed_agents.resources.sessions import bindings, clones, repositories
from tests.support.git_server import GitHost, git, git_host
from tests.support.repositories import bash, errors, repository_stack, resource, shown
from tests.support.stack import MODEL, TOOLSET, Stack, message
from tests.support.waiting import until
from tests.support.watch import Watch

pytestmark = [pytest.mark.anyio, pytest.mark.docker]

TOKEN = "ghp_TheTokenOfTheTest"
OTHER = "ghp_AnotherThatMayReadIt"
LARGE = 200_000
"""More than all that is sent beside the large file."""
GATE = "until [ -e /workspace/go ]; do sleep 0.02; done"
# Everything of a clone but the name of its pack and the times in its logs.
LOOK = r"""
    cd /workspace/%s
    git for-each-ref; git config -l; git rev-list --all | sort; git status -sb; git symbolic-ref refs/remotes/origin/HEAD
    git fsck --full --strict 2>&1; git cat-file --batch-all-objects --batch-check; cat .git/HEAD .git/packed-refs
    find .git -type f | sed 's/pack-[0-9a-f]*/pack/' | sort; cut -f 2 .git/logs/HEAD; ls -A /tmp
"""


@pytest.fixture(scope="module")
def host() -> Iterator[GitHost]:
    with git_host() as made:
        yield made


@pytest.fixture(scope="module")
async def hands(anyio_backend: object, host: GitHost, postgres_url: str, template: str) -> AsyncIterator[Stack]:
    async with repository_stack(host, postgres_url, template) as running:
        yield running


def repository(host: GitHost, name: str, **fields: Any) -> Path:
    """A repository whose history is worth keeping."""
    return host.repository(name, files={"README.md": f"{name}\n", "large": os.urandom(LARGE).hex()}, **fields)


async def rows(hands: Stack, name: str) -> list[Any]:
    async with hands.db.autocommit() as tx:
        query = text("SELECT workspace_id, url, token_fingerprint, sha256, size_bytes FROM repository_clones WHERE url = :url")
        found = await tx.execute(query, {"url": f"https://github.com/{name}"})
        return list(found.all())


async def sent(host: GitHost, name: str, hands: Stack, commands: list[str], **fields: Any) -> tuple[int, Watch]:
    """A session with this repository and others; how much of it its host has sent."""
    before = host.sent.get(name, 0)
    resources = fields.pop("resources", None) or [resource(name, authorization_token=TOKEN)]
    session = await hands.session(
        [*(bash(command) for command in commands), "done"], tools=TOOLSET, resources=resources, **fields
    )
    watch = await hands.turn(session)
    return host.sent[name] - before, watch


async def keep(hands: Stack, names: list[str], token: str = TOKEN) -> Any:
    """Have a session clone repositories, and wait until what it cloned is kept; what is there already is used, and replaced."""
    known = {name: await rows(hands, name) for name in names}
    wanted: list[Any] = [resource(name, authorization_token=token) for name in names]
    session = await hands.session([bash(GATE), "done"], tools=TOOLSET, resources=wanted)
    async with hands.watching(session) as watch:
        await hands.say(session, "go")

        async def kept() -> bool:
            return all([await rows(hands, name) != known[name] for name in names])

        await until(kept, seconds=60)
        async with hands.db.autocommit() as tx:
            binding = await bindings.current(tx, session.id)
        assert binding is not None
        sandbox = await hands.backend.attach(binding.sandbox_id)
        await sandbox.put("/workspace/go", b"", "agent")
        await sandbox.aclose()
        await watch.idle()
    assert errors(watch) == []
    return session


@pytest.mark.requirement("SES-099")
async def test_a_cached_clone_cannot_be_told_from_another(hands: Stack, host: GitHost) -> None:
    name = "acme/often"
    bare = repository(host, name, tokens={TOKEN, OTHER})
    for branch in ("gone", "rewritten"):
        git("update-ref", f"refs/heads/{branch}", git("commit-tree", "main^{tree}", "-m", branch, at=bare), at=bare)
    git("tag", "-a", "-m", "one", "v1", "main", at=bare)
    await keep(hands, [name])
    for value in (TOKEN, OTHER):
        assert value not in str(await rows(hands, name))
    # What a host's branches do meanwhile.
    git("update-ref", "-d", "refs/heads/gone", at=bare)
    git("update-ref", "refs/heads/rewritten", git("commit-tree", "main^{tree}", "-m", "other", at=bare), at=bare)
    git("update-ref", "refs/heads/main", git("commit-tree", "main^{tree}", "-p", "main", "-m", "next", at=bare), at=bare)
    git("tag", "-f", "v1", "main", at=bare)
    git("branch", "trunk", "feature", at=bare)
    git("symbolic-ref", "HEAD", "refs/heads/trunk", at=bare)
    look = [LOOK % "often"]
    bytes_cached, cached = await sent(host, name, hands, look)
    bytes_plain, plain = await sent(host, name, hands, look, resources=[resource(name, authorization_token=OTHER)])
    assert (errors(cached), errors(plain)) == ([], [])
    assert shown(cached) == shown(plain)
    assert "remote.origin.url=https://github.com/acme/often" in shown(cached)[0].splitlines()
    assert "## trunk...origin/trunk" in shown(cached)[0].splitlines()
    assert bytes_cached < LARGE / 10
    # Nobody gets what another token fetched.
    assert bytes_plain > LARGE


@pytest.mark.requirement("SES-099")
async def test_several_repositories_and_another_workspace(hands: Stack, host: GitHost) -> None:
    names = ["acme/left", "acme/right"]
    for name in names:
        repository(host, name, tokens={TOKEN})
    await keep(hands, names)
    # What has grown much is kept anew.
    grown, before = host.root / "work" / names[0], host.sent[names[0]]
    git("checkout", "-q", "main", at=grown)
    (grown / "more").write_text(os.urandom(LARGE).hex())
    git("add", "more", at=grown)
    git("commit", "-qm", "more", at=grown)
    git("push", "-q", "origin", "main", at=grown)
    await keep(hands, names[:1])
    assert LARGE < host.sent[names[0]] - before < 1.5 * LARGE
    wanted = [resource(name, authorization_token=TOKEN) for name in names]
    wanted.append(
        resource(
            names[0], authorization_token=TOKEN, mount_path="/home/agent/again", checkout={"type": "branch", "name": "feature"}
        )
    )
    before = dict(host.sent)
    _, watch = await sent(
        host, names[0], hands, ["cat left/README.md right/README.md; git -C ~/again log --format=%s -1"], resources=wanted
    )
    assert shown(watch) == ["acme/left\nacme/right\non the branch\n"]
    assert all(host.sent[name] - before[name] < LARGE / 10 for name in names)
    # The same token in another workspace.
    stranger, theirs = hands.stranger.beta, hands.replies.add([bash("true"), "done"])
    agent = await stranger.agents.create(name="theirs", model=MODEL, system=theirs, tools=TOOLSET)  # pyright: ignore[reportArgumentType]
    environment = await stranger.environments.create(name="theirs", config={"type": "cloud"})
    first: Any = wanted[0]
    session = await stranger.sessions.create(agent=agent.id, environment_id=environment.id, resources=[first])
    before = dict(host.sent)
    await stranger.sessions.events.send(session.id, events=[message("go")])
    await until(lambda: host.sent[names[0]] - before[names[0]] > LARGE, seconds=60)


@pytest.mark.requirement("SES-100")
async def test_a_revoked_token_gets_nothing_and_a_bundle_that_is_damaged_or_gone_costs_a_transfer(
    hands: Stack, host: GitHost
) -> None:
    name = "acme/damaged"
    repository(host, name, tokens={TOKEN})
    await keep(hands, [name])
    host.tokens[name] = {OTHER}
    nothing, watch = await sent(host, name, hands, ["ls -A /workspace /tmp"])
    assert nothing == 0
    assert [error.type for error in errors(watch)] == ["repository_authentication_error"]
    assert shown(watch) == ["/tmp:\n\n/workspace:\n"]
    host.tokens[name] = {TOKEN}
    (row,) = await rows(hands, name)
    (stored,) = (hands.settings.data_dir / "blobs").glob(f"*/{row.sha256}")
    whole = bytearray(stored.read_bytes())
    whole[len(whole) // 2] ^= 1
    stored.write_bytes(whole)
    all_of_it, watch = await sent(host, name, hands, ["cat damaged/README.md; git -C damaged fsck 2>&1; ls -A /tmp"])
    assert (errors(watch), shown(watch)) == ([], [f"{name}\n"])
    assert all_of_it > LARGE
    # It may have been kept anew before the session's end; now the store has lost it.
    async with hands.db.transaction() as tx:
        key = clones.CloneKey(row.workspace_id, row.url, row.token_fingerprint)
        await clones.record(tx, key, BlobRef("0" * 64, row.size_bytes), bytes_max=10**9)
    all_of_it, watch = await sent(host, name, hands, ["cat damaged/README.md"])
    assert (errors(watch), shown(watch)) == ([], [f"{name}\n"])
    assert all_of_it > LARGE


async def _chunk(content: bytes) -> AsyncIterator[bytes]:
    yield content


@pytest.mark.requirement("SES-100")
async def test_what_a_session_did_to_its_clone_is_not_kept_and_a_poisoned_bundle_adds_nothing(
    hands: Stack, host: GitHost, tmp_path: Path
) -> None:
    name = "acme/poisoned"
    bare = repository(host, name, tokens={TOKEN})
    session = await keep(hands, [name])
    (row,) = await rows(hands, name)
    key = clones.CloneKey(row.workspace_id, row.url, row.token_fingerprint)
    async with hands.db.autocommit() as tx:
        (mounted,) = await repositories.of_session(tx, session.id)
        binding = await bindings.current(tx, session.id)
        await clones.drop(tx, key, BlobRef(row.sha256, row.size_bytes))
        assert clones.key_of(row.workspace_id, mounted) == key
        assert not await clones.pristine(tx, session.id)
    assert binding is not None
    sandbox = await hands.backend.attach(binding.sandbox_id)
    cache = CloneCache(hands.db, hands.blobs, 10**9, anyio.CapacityLimiter(1))
    # As it was when the cloning call ended, and with a branch that commands have moved.
    packs = await sandbox.listing(f"{mounted.path}/.git/objects/pack", digests=False)
    (pack,) = (entry.path for entry in packs if entry.path.endswith(".pack"))
    await cache.keep(sandbox, mounted, key, Kept(pack, row.sha256))
    assert [found.sha256 for found in await rows(hands, name)] == [row.sha256]
    async with hands.db.autocommit() as tx:
        await clones.drop(tx, key, BlobRef(row.sha256, row.size_bytes))
    packed = b"".join([chunk async for chunk in sandbox.take(f"{mounted.path}/.git", "packed-refs")])
    moved = packed.replace(host.head(name).encode(), host.head(name, "feature").encode())
    assert moved != packed
    await sandbox.put(f"{mounted.path}/.git/packed-refs", moved, "agent")
    await cache.keep(sandbox, mounted, key, Kept(pack, row.sha256))
    assert await rows(hands, name) == []
    await sandbox.aclose()
    # And if it were in the store all the same: a commit of the poisoner's as the head of every branch.
    git("clone", "-q", str(bare), str(tmp_path / "evil"), at=tmp_path)
    evil = git("commit-tree", "-p", "HEAD", "-m", "evil", "HEAD^{tree}", at=tmp_path / "evil")
    for branch in ("main", "feature"):
        git("update-ref", f"refs/remotes/origin/{branch}", evil, at=tmp_path / "evil")
    git("bundle", "create", "-q", "../evil.bundle", "--remotes", at=tmp_path / "evil")
    poison = await hands.blobs.put(_chunk((tmp_path / "evil.bundle").read_bytes()), 10**9)
    async with hands.db.transaction() as tx:
        await clones.record(tx, key, poison, bytes_max=10**9)
    look = f"cd poisoned; git log --format=%s --topo-order --all; git cat-file -t {evil} 2>&1 | tail -1; git fsck 2>&1"
    some, watch = await sent(host, name, hands, [look])
    assert errors(watch) == []
    assert shown(watch)[0] == "on the branch\nfirst\nfatal: git cat-file: could not get object info\n"
    assert some < LARGE / 10
