"""Who may do what: keys that use models, keys that change the fleet, and requests without a key."""

import hmac
import ipaddress
import secrets
from dataclasses import dataclass, field
from hashlib import blake2b
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from cluster.errors import Forbidden, Unauthorized
from replica.api import asgi

_TAG_BYTES = 8
_OPERATOR, _ADMIN = "operator", "admin_keys"
JSON, FORM = "application/json", "multipart/form-data"


@dataclass(frozen=True, slots=True)
class Rules:
    """api_keys use models; admin_keys may do everything. Without any, nobody needs a key, and then
    changes are for those who send them to a loopback name or to one of `hosts`.

    operator_key: of the user that the process belongs to, whether there are keys or not. Its
    adapters may come from any path. changes: False refuses the paths of all others, and without
    keys all their changes. open_metrics: /metrics needs no key. shared_prefixes: keys share cached
    prefixes, so `cached_tokens` tells one what another asked.
    """

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    admin_keys: tuple[str, ...] = field(default=(), repr=False)
    operator_key: str | None = field(default=None, repr=False)
    hosts: tuple[str, ...] = ()
    changes: bool = True
    open_metrics: bool = False
    shared_prefixes: bool = False

    @property
    def keys(self) -> bool:
        return bool(self.api_keys or self.admin_keys)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request. name: of its key; None where nobody needs one. salt: of its cached
    prefixes. label: the key's place in the configuration, for logs.
    """

    admin: bool = True
    operator: bool = False
    name: str | None = None
    salt: str | None = None
    label: str | None = None


class Access:
    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        # So that neither salts nor tags say anything of a key, not even one that is guessed.
        self._secret = secrets.token_bytes(32)
        named = {_OPERATOR: rules.operator_key} if rules.operator_key else {}
        named |= {f"{_ADMIN}[{i}]": key for i, key in enumerate(rules.admin_keys)}
        named |= {f"api_keys[{i}]": key for i, key in enumerate(rules.api_keys)}
        self._keys = [(label, key.encode()) for label, key in named.items()]

    def caller(self, headers: Headers) -> Caller:
        """Raises Unauthorized."""
        rules = self._rules
        value = headers.get("authorization", "")
        scheme, _, key = value.partition(" ")
        given = key.encode("latin-1") if scheme.lower() == "bearer" else b""
        # Every key is compared, so that the time taken tells nothing of which was close.
        same = [label for label, known in self._keys if hmac.compare_digest(given, known)]
        label = same[0] if same else None
        operator = label == _OPERATOR
        if not rules.keys:
            return Caller(operator=operator, label=label)
        if label is None:
            raise Unauthorized(
                "no API key: send Authorization: Bearer KEY" if not value else "wrong API key"
            )
        name = blake2b(given, key=self._secret, digest_size=16).hexdigest()
        admin = operator or label.startswith(_ADMIN)
        return Caller(admin, operator, name, None if rules.shared_prefixes else name, label)

    def check_admin(self, caller: Caller) -> None:
        """Raises Forbidden."""
        if not caller.admin:
            known = "" if self._rules.admin_keys else "; none is configured (admin_keys)"
            raise Forbidden(f"this needs an admin key{known}")

    def check_metrics(self, headers: Headers) -> None:
        if self._rules.keys and not self._rules.open_metrics:
            self.check_admin(self.caller(headers))

    def check_change(
        self, caller: Caller, headers: Headers, kinds: tuple[str, ...] = (JSON,), *, path: bool
    ) -> str:
        """The content type, one of `kinds`. path: the change names one, unless it is a form.

        Raises Forbidden or UnsupportedMediaType. A web page can send neither JSON to another
        origin without being allowed to, nor its own name as a loopback one, nor a form to another
        origin without `Origin`.
        """
        self.check_admin(caller)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in kinds:
            raise asgi.UnsupportedMediaType(
                f"content-type: must be {' or '.join(kinds)} (got {kind or 'none'})",
                field="content-type",
            )
        if caller.operator:
            return kind
        by_key = self._rules.keys and (kind == FORM or not path)
        if not self._rules.changes and not by_key:
            raise Forbidden(
                "adapters cannot be changed: no adapter root is configured (--adapter-root)"
            )
        origin = headers.get("origin")
        foreign = origin and (kind == FORM or urlsplit(origin).netloc != headers.get("host"))
        if not self._rules.keys and foreign:
            raise Forbidden(
                f"origin: without keys, web pages of others change nothing (got {origin!r})",
                field="origin",
            )
        host = _name(headers.get("host", ""))
        if not self._rules.keys and not _loopback(host) and host not in self._rules.hosts:
            raise Forbidden(
                f"host: without keys, changes are for loopback names and allowed_hosts "
                f"(got {host!r})",
                field="host",
            )
        return kind

    def tagged(self, response_id: str, caller: Caller) -> str:
        """A response's id, which its caller's key `owns`."""
        return response_id if caller.name is None else response_id + self._tag(response_id, caller)

    def owns(self, caller: Caller, response_id: str) -> bool:
        if caller.admin:
            return True
        untagged, tag = response_id[: -2 * _TAG_BYTES], response_id[-2 * _TAG_BYTES :]
        return hmac.compare_digest(tag.encode(), self._tag(untagged, caller).encode())

    def _tag(self, response_id: str, caller: Caller) -> str:
        content = f"{response_id} {caller.name}".encode()
        return blake2b(content, key=self._secret, digest_size=_TAG_BYTES).hexdigest()


def _name(host: str) -> str:
    """A Host header without its port."""
    name, colon, port = host.rpartition(":")
    if not colon or not port.isdigit():
        name = host
    return name.strip("[]").rstrip(".").lower()


def _loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
