"""What the egress gateway needs to know of repositories: which requests are a session's, and the token of one of them."""

import base64
from collections.abc import Sequence
from urllib.parse import urlsplit

from pydantic import SecretStr
from sqlalchemy.exc import SQLAlchemyError

from managed_agents.db.engine import Database
from managed_agents.egress.policy import Binding, PolicyUnknown
from managed_agents.egress.substitution import SecretUnknown, Substitution
from managed_agents.encryption.sealing import SealBroken, Sealing
from managed_agents.resources.sessions import repositories

SOURCE = "repositories"
USER = "x-access-token"  # what the host takes for "the password is a token"
# Of git's smart protocol and of its large files; no page of the host beside them gets the token.
_ENDPOINTS = ("info/refs", "git-upload-pack", "git-receive-pack", "info/lfs")


class RepositoryTokens:
    """`Source` of the tokens of sessions' repositories."""

    def __init__(self, db: Database, sealing: Sealing) -> None:
        self._db, self._sealing = db, sealing

    async def bindings(self, session_id: str) -> Sequence[Binding]:
        """As `Source.bindings`. Repositories can be reached whatever the environment's networking, with a token or without."""
        try:
            async with self._db.autocommit() as tx:
                found = await repositories.of_session(tx, session_id)
        except (SQLAlchemyError, OSError) as error:
            raise PolicyUnknown(str(error)) from error
        return [_binding(one) for one in found]

    async def substitution(self, session_id: str, binding: Binding) -> Substitution | None:
        """As `Source.substitution`."""
        try:
            async with self._db.autocommit() as tx:
                token = await repositories.token(tx, session_id, binding.id, sealing=self._sealing)
        except (SealBroken, SQLAlchemyError, OSError) as error:
            raise SecretUnknown("The repository's token cannot be read. Please retry.") from error
        if token is None:
            return None
        pair = f"{USER}:{token.get_secret_value()}".encode()
        return Substitution({"authorization": SecretStr(f"Basic {base64.b64encode(pair).decode()}")})


def _binding(repository: repositories.Repository) -> Binding:
    url = urlsplit(repository.url)
    paths = tuple(f"{url.path}{ending}/{endpoint}" for ending in ("", ".git") for endpoint in _ENDPOINTS)
    return Binding(SOURCE, repository.id, (url.hostname or "",), paths, opens=True)
