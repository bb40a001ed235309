"""The book of names → versions, in memory. `lorafleet replica` needs nothing else."""

import dataclasses
from collections.abc import Iterable

from cluster.errors import BadRequest, ModelNotFound
from cluster.values import Version

NAME_LENGTH_MAX = 256


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
    if not name.isprintable():
        raise BadRequest(f"lora_name: {name!r} contains control characters", field="lora_name")
    if name == base_name:
        raise BadRequest(f"lora_name: {name!r} is the base model's name", field="lora_name")


def taken(name: str) -> BadRequest:
    return BadRequest(
        f"lora_name: {name!r} is already loaded; set load_inplace to replace it",
        field="lora_name",
    )


def not_found(name: str) -> ModelNotFound:
    return ModelNotFound(f"the model {name!r} does not exist", field="model")


def by_digest(versions: Iterable[Version]) -> dict[str, Version]:
    """One version per digest, for the engine. Several names may point at a digest: it is pinned if
    one of them is, and takes their largest weight.
    """
    found: dict[str, Version] = {}
    for version in versions:
        other = found.get(version.digest, version)
        found[version.digest] = dataclasses.replace(
            other,
            pinned=other.pinned or version.pinned,
            weight=max(other.weight, version.weight),
        )
    return found


class Book:
    """The version that each name points at. sequence: number of changes so far.

    A change replaces the whole dict, so a reader on another thread sees the state before or after
    it. Several names may point at one digest.
    """

    def __init__(self, base_name: str, versions: Iterable[Version] = (), sequence: int = 0) -> None:
        self.base_name = base_name
        self.sequence = sequence
        self._versions = {version.name: version for version in versions}

    def get(self, name: str) -> Version | None:
        return self._versions.get(name)

    def by_name(self) -> list[Version]:
        versions = self._versions
        return [versions[name] for name in sorted(versions)]

    def digests(self) -> frozenset[str]:
        return frozenset(version.digest for version in self._versions.values())

    def check_add(self, name: str, *, load_inplace: bool) -> None:
        """Raises BadRequest naming `lora_name` if `add` would."""
        check_name(name, self.base_name)
        if name in self._versions and not load_inplace:
            raise taken(name)

    def add(self, version: Version, *, load_inplace: bool = False) -> bool:
        """False if the name already points at this version."""
        self.check_add(version.name, load_inplace=load_inplace)
        if self._versions.get(version.name) == version:
            return False
        self._put(version)
        return True

    def remove(self, name: str) -> Version:
        """Raises ModelNotFound."""
        if name not in self._versions:
            raise not_found(name)
        version = self._versions[name]
        self._drop(name)
        return version

    def apply(self, sequence: int, name: str, version: Version | None) -> bool:
        """Applies a change that another process made. Returns False if it missed one before it.

        It ignores changes that the book has already: a snapshot may be ahead of the messages.
        """
        if sequence <= self.sequence:
            return True
        if sequence != self.sequence + 1:
            return False
        if version is not None:
            self._put(version)
        elif name in self._versions:
            self._drop(name)
        else:
            self.sequence = sequence
        return True

    def replace(self, versions: Iterable[Version], sequence: int) -> None:
        """Takes over a snapshot. A version that has the base model's name is left out: the fleet
        may have served another base model before.
        """
        self._versions = {v.name: v for v in versions if v.name != self.base_name}
        self.sequence = sequence

    def _put(self, version: Version) -> None:
        self._versions = {**self._versions, version.name: version}
        self.sequence += 1

    def _drop(self, name: str) -> None:
        self._versions = {n: v for n, v in self._versions.items() if n != name}
        self.sequence += 1
