"""The book of names → versions, in memory. `lorafleet replica` needs nothing else."""

import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Mapping

from cluster.errors import BadRequest, ModelNotFound
from cluster.values import Version

NAME_LENGTH_MAX = 256
# Scripts with letters that look like Latin ones, and those that do to most readers.
_LIKE_LATIN = frozenset({"ARMENIAN", "CHEROKEE", "COPTIC", "CYRILLIC", "GREEK", "LISU"})
# Printable to Python, but drawn as nothing.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
_TWINS = str.maketrans(
    "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0458\u0455\u04bb\u0501\u051b\u051d"
    "\u043a\u043c\u0442\u03b1\u03b5\u03b9\u03ba\u03bd\u03bf\u03c1\u03c4\u03c5\u03c7",
    "aeopcyxijshdqwkmtaeikvoptux",
)


def check_name(name: str, base_name: str) -> None:
    """Raises BadRequest naming `lora_name`. Slashes are allowed, as in Hugging Face ids."""
    if not name or name != name.strip():
        raise BadRequest(
            f"lora_name: {name!r} is empty, or begins or ends with a space", field="lora_name"
        )
    if len(name) > NAME_LENGTH_MAX:
        raise BadRequest(
            f"lora_name: has {len(name)} characters, the maximum is {NAME_LENGTH_MAX}",
            field="lora_name",
        )
    if not name.isprintable() or _INVISIBLE.search(name):
        raise BadRequest(
            f"lora_name: {name!a} contains control or invisible characters", field="lora_name"
        )
    looks, base_looks = _looks(name), _looks(base_name)
    if looks == base_looks:
        like = "is" if name == base_name else "reads like"
        raise BadRequest(f"lora_name: {name!r} {like} the base model's name", field="lora_name")
    if looks.startswith(f"{base_looks}:"):
        raise BadRequest(
            f"lora_name: {name!r} reads like BASE:ADAPTER, which names an adapter of the base "
            "model's",
            field="lora_name",
        )
    mixed = _scripts(name)
    if "LATIN" in mixed and mixed & _LIKE_LATIN:
        raise BadRequest(
            f"lora_name: {name!r} mixes letters that look alike ({', '.join(sorted(mixed))})",
            field="lora_name",
        )


def is_name(name: str, base_name: str) -> bool:
    """True if an adapter may have it."""
    try:
        check_name(name, base_name)
    except BadRequest:
        return False
    return True


def _looks(name: str) -> str:
    """Equal for names that differ in case, width or twin letters only."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return folded.translate(_TWINS)


def _scripts(name: str) -> set[str]:
    """The first word of each letter's Unicode name: its script, for those compared here."""
    return {unicodedata.name(c, "?").split()[0] for c in name if c.isalpha()}


def taken(name: str) -> BadRequest:
    return BadRequest(
        f"lora_name: {name!r} is already loaded; set load_inplace to replace it "
        "(--replace on the command line)",
        field="lora_name",
    )


def not_found(name: str) -> ModelNotFound:
    return ModelNotFound(f"the model {name!r} does not exist", field="model")


def merged(versions: Mapping[str, Version]) -> Version:
    """The version of one digest, for the engine. versions: name → version, all of that digest.

    It is pinned if one of them is, and takes their largest weight.
    """
    first = versions[min(versions)]
    if len(versions) == 1:
        return first
    return dataclasses.replace(
        first,
        pinned=any(version.pinned for version in versions.values()),
        weight=max(version.weight for version in versions.values()),
    )


class Book:
    """The version that each name points at. sequence: number of changes so far.

    Several names may point at one digest. One thread changes it, any thread may read it: each read
    is one operation on a dict. A change costs the same, however many names are known; only names of
    one digest are looked at together.
    """

    def __init__(self, base_name: str, versions: Iterable[Version] = (), sequence: int = 0) -> None:
        self.base_name = base_name
        self.sequence = sequence
        self._versions: dict[str, Version] = {}
        self._by_digest: dict[str, dict[str, Version]] = {}
        for version in versions:
            self._put(version)

    def get(self, name: str) -> Version | None:
        return self._versions.get(name)

    def __len__(self) -> int:
        return len(self._versions)

    def by_name(self) -> list[Version]:
        versions = self._versions.copy()
        return [versions[name] for name in sorted(versions)]

    def names_of(self, digest: str) -> Mapping[str, Version]:
        """The names that point at the digest, each with its version."""
        return self._by_digest.get(digest, {})

    def of_digest(self, digest: str) -> Version | None:
        """The version that the engine needs for the names that point at the digest."""
        versions = self._by_digest.get(digest)
        return merged(versions) if versions else None

    def check_add(self, version: Version, *, load_inplace: bool) -> None:
        """Raises BadRequest naming `lora_name` if `add` would."""
        check_name(version.name, self.base_name)
        before = self._versions.get(version.name)
        alike = before is not None and dataclasses.replace(before, uri=version.uri) == version
        if before is not None and not alike and not load_inplace:
            raise taken(version.name)

    def add(self, version: Version, *, load_inplace: bool = False) -> bool:
        """False if the name already points at this version. Raises BadRequest naming `lora_name` if
        it has another content, pin or weight; another directory of the same files is no reason.
        """
        self.check_add(version, load_inplace=load_inplace)
        if self._versions.get(version.name) == version:
            return False
        self._put(version)
        self.sequence += 1
        return True

    def remove(self, name: str) -> Version:
        """Raises ModelNotFound."""
        if name not in self._versions:
            raise not_found(name)
        version = self._drop(name)
        assert version is not None
        self.sequence += 1
        return version

    def change(self, changes: Mapping[str, Version | None], sequence: int) -> set[str]:
        """Applies what another process changed. changes: name → version, None if removed.

        Returns the digests whose versions may have changed. A version that has the base model's
        name is left out: the fleet may have served another base model before.
        """
        self.sequence = sequence
        digests: set[str] = set()
        for name, version in changes.items():
            before = self._versions.get(name)
            if version == before or name == self.base_name:
                continue
            digests |= {each.digest for each in (before, version) if each is not None}
            if version is not None:
                self._put(version)
            else:
                self._drop(name)
        return digests

    def _put(self, version: Version) -> None:
        before = self._versions.get(version.name)
        self._versions[version.name] = version
        if before is not None and before.digest != version.digest:
            self._unlink(before)
        self._by_digest.setdefault(version.digest, {})[version.name] = version

    def _drop(self, name: str) -> Version | None:
        version = self._versions.pop(name, None)
        if version is not None:
            self._unlink(version)
        return version

    def _unlink(self, version: Version) -> None:
        versions = self._by_digest[version.digest]
        del versions[version.name]
        if not versions:
            del self._by_digest[version.digest]
