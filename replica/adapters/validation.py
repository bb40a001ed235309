"""Checks that an adapter can be served: path rules, files, shapes and sizes."""

import contextlib
from collections.abc import Iterable

from cluster.config import FleetConfig
from cluster.errors import AdapterRefused
from cluster.store import Store, check_allowed, is_url, local_path
from cluster.values import Version
from replica.adapters.adapter_files import inspect, read_adapter
from replica.model.memory import DTYPE_BYTES, divide
from replica.model.shape import ModelShape
from replica.scheduling.adapter import no_room


class Validation:
    """Blocking: call it on a thread. config: with the dtype and sizes that the engine chose."""

    def __init__(self, config: FleetConfig, shape: ModelShape) -> None:
        self._config = config
        self._shape = shape
        self._weight_bytes = DTYPE_BYTES[config.engine.dtype]
        self._part = shape.divided(config.engine.tensor_parallel)
        self._part_parameters: dict[str, int] = {}  # by digest
        self._arena_bytes = divide(config.engine, self._part, self._weight_bytes).arena_bytes
        rank_max = config.engine.rank_max
        self.store = Store(
            f"{config.directory}/adapters", lambda path: inspect(path, shape, rank_max).digest
        )

    def version(
        self,
        name: str,
        path: str,
        *,
        pinned: bool = False,
        weight: float = 1.0,
        trusted: bool = False,
    ) -> Version:
        """Raises AdapterRefused, BadRequest or AdapterFailed with the path and the reason."""
        if not trusted:
            check_allowed(path, self._config.adapter_roots)
        engine = self._config.engine
        fetched = self.store.fetch(path)
        info = inspect(fetched, self._shape, engine.rank_max)
        image_bytes = self._bytes(info.digest, info.parameters, fetched)
        if image_bytes > self._arena_bytes:
            raise AdapterRefused(
                f"lora_path: {path!r} takes {image_bytes} bytes of adapter memory in "
                f"{engine.dtype}, the total is {self._arena_bytes} "
                f"({'adapter_memory' if engine.device_memory is None else 'device_memory'})",
                field="lora_path",
            )
        uri = path if is_url(path) else local_path(path)
        return Version(name, info.digest, uri, info.rank, info.parameters, pinned, weight)

    def check_room(self, version: Version, versions: Iterable[Version]) -> None:
        """Raises AdapterRefused if it does not fit beside the pinned adapters. May read files."""
        others: dict[str, tuple[int, bool]] = {}
        for other in versions:
            if other.digest != version.digest:
                pinned = other.pinned or others.get(other.digest, (0, False))[1]
                others[other.digest] = self._bytes_of(other), pinned
        engine = self._config.engine
        refusal = no_room(
            self._bytes_of(version),
            version.pinned,
            others.values(),
            self._arena_bytes,
            engine.slots_max or engine.directory_slots - 1,
        )
        if refusal is not None:
            raise AdapterRefused(f"lora_path: {version.name!r} has {refusal}", field="lora_path")

    def _bytes_of(self, version: Version) -> int:
        path = None if is_url(version.uri) else local_path(version.uri)
        return self._bytes(version.digest, version.parameters, path)

    def _bytes(self, digest: str, parameters: int, path: str | None) -> int:
        """Bytes of one rank's image. That is more than its share, because each rank has one matrix
        of a pair whole. A lower bound if the files cannot be read.
        """
        ranks = self._config.engine.tensor_parallel
        if ranks == 1:
            return parameters * self._weight_bytes
        if digest not in self._part_parameters and path is not None:
            with contextlib.suppress(AdapterRefused):
                files = read_adapter(path, self._shape)
                if files.parameters == parameters:  # else another version has replaced the files
                    self._part_parameters[digest] = files.parameters_of(self._part)
        return self._part_parameters.get(digest, parameters // ranks) * self._weight_bytes
