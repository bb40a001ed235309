"""May this adapter be served here? Path rules, files, shapes and sizes, before anything changes."""

from collections.abc import Iterable

from cluster.config import FleetConfig
from cluster.errors import AdapterRefused
from cluster.store import Store, check_allowed, is_url, local_path
from cluster.values import Version
from replica.adapter import no_room
from replica.adapter_files import inspect
from replica.memory import divide
from replica.shape import ModelShape

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Validation:
    """Blocking: call it on a thread."""

    def __init__(self, config: FleetConfig, shape: ModelShape) -> None:
        self._config = config
        self._shape = shape
        dtype = config.engine.dtype
        self._weight_bytes = _DTYPE_BYTES[shape.dtype if dtype == "auto" else dtype]
        part = shape.divided(config.engine.tensor_parallel)
        self._arena_bytes = divide(config.engine, part, self._weight_bytes).arena_bytes
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
        """Raises AdapterRefused, BadRequest or AdapterFailed, naming what and where."""
        if not trusted:
            check_allowed(path, self._config.adapter_roots)
        engine = self._config.engine
        info = inspect(self.store.fetch(path), self._shape, engine.rank_max)
        image_bytes = self._bytes(info.parameters)
        if image_bytes > self._arena_bytes:
            raise AdapterRefused(
                f"lora_path: {path!r} takes {image_bytes} bytes of adapter memory, "
                f"all there is are {self._arena_bytes}",
                field="lora_path",
            )
        uri = path if is_url(path) else local_path(path)
        return Version(name, info.digest, uri, info.rank, info.parameters, pinned, weight)

    def check_room(self, version: Version, versions: Iterable[Version]) -> None:
        """Raises AdapterRefused when no replica can serve it beside what is pinned."""
        others: dict[str, tuple[int, bool]] = {}
        for other in versions:
            if other.digest != version.digest:
                pinned = other.pinned or others.get(other.digest, (0, False))[1]
                others[other.digest] = self._bytes(other.parameters), pinned
        engine = self._config.engine
        refusal = no_room(
            self._bytes(version.parameters),
            version.pinned,
            others.values(),
            self._arena_bytes,
            engine.slots_max or engine.directory_slots - 1,
        )
        if refusal is not None:
            raise AdapterRefused(f"lora_path: {version.name!r} has {refusal}", field="lora_path")

    def _bytes(self, parameters: int) -> int:
        """Of an image at least; what a rank's part of it takes, the engine says."""
        return parameters * self._weight_bytes // self._config.engine.tensor_parallel
