"""The caller of a request: a tenant, what its key allows, and what the request has used so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from adapters_store import KEY_SCOPES, Change, KeyScope, Quotas
from server.errors import RequestError

_UNLIMITED = Quotas()


@dataclass
class Bill:
    """What a request is charged for at its end."""

    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Without arguments: whoever calls a server that asks for no keys."""

    tenant: str = ""
    key_id: str = ""
    scopes: tuple[KeyScope, ...] = ("admin",)
    quotas: Quotas = _UNLIMITED
    request_id: str = ""
    bill: Bill = field(default_factory=Bill)

    @property
    def change(self) -> Change:
        """Who the histories say has changed something."""
        return Change(self.key_id, self.request_id)

    def allows(self, scope: KeyScope) -> bool:
        """Whether one of the key's scopes is `scope` or contains it."""
        return any(KEY_SCOPES.index(given) >= KEY_SCOPES.index(scope) for given in self.scopes)

    def require(self, scope: KeyScope) -> None:
        """Raises `RequestError` `forbidden` unless the key has the scope."""
        if not self.allows(scope):
            message = f"this call needs the scope '{scope}'; the API key {self.key_id} has {', '.join(self.scopes)}"
            raise RequestError("forbidden", message)

    def require_operator(self) -> None:
        """Raises `RequestError` `forbidden` unless the key is an admin's of the default tenant: what concerns the
        whole server tells of every tenant."""
        self.require("admin")
        if self.tenant:
            message = f"this concerns the whole server; the API key {self.key_id} is of the tenant '{self.tenant}'"
            raise RequestError("forbidden", message)
