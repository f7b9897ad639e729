"""Scoped names: one name space for the tasks and users of all tenants.

The default tenant, "", has its ids as they are; another tenant's are `tenant/id`. Ids contain no "/", so a scoped name
is read in one way only. What follows the id (`id@3`) stays with it.
"""

from __future__ import annotations


def scoped(tenant: str, name: str) -> str:
    """The scoped name of a tenant's task or user."""
    return f"{tenant}/{name}" if tenant else name


def tenant_of(scoped_name: str) -> str:
    """The tenant that a scoped name belongs to; "" is the default one."""
    return scoped_name.rpartition("/")[0]


def id_of(scoped_name: str) -> str:
    """The id by which its own tenant knows it."""
    return scoped_name.rpartition("/")[2]
