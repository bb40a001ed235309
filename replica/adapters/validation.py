"""Checks that an adapter can be served: path rules, files, shapes and sizes."""

import contextlib
import functools
import threading
from collections.abc import Iterable, Iterator

from cluster.adapter_paths import CONFIG_FILE, check_allowed, is_url, local_path
from cluster.config import FleetConfig
from cluster.downloads import Peers, no_peers
from cluster.errors import AdapterRefused
from cluster.store import Store
from cluster.values import AddedToken, Version
from replica.adapters.adapter_config import other_base, short
from replica.adapters.adapter_files import AdapterInfo, inspect, read_adapter
from replica.adapters.chat_files import (
    BaseText,
    read_added_tokens,
    read_template,
    remarks,
    tidy_chat,
    why_no_chat,
)
from replica.adapters.foreign_files import foreign, rewrite_foreign
from replica.adapters.found_files import check_present
from replica.model.memory import DTYPE_BYTES, divide
from replica.model.shape import Shape
from replica.scheduling.adapter import no_room


class Validation:
    """config: with the dtype and sizes that the engine chose. store: of this node. peers: of the
    store. text: the base model's; None: what adapters say of chats is left out.
    """

    def __init__(
        self,
        config: FleetConfig,
        shape: Shape,
        peers: Peers = no_peers,
        text: BaseText | None = None,
    ) -> None:
        self._config = config
        self._shape = shape
        self._text = text
        self._weight_bytes = DTYPE_BYTES[config.engine.dtype]
        self._part = shape.divided(config.engine.tensor_parallel)
        self._part_parameters: dict[str, int] = {}  # by digest
        self._arena_bytes = divide(config.engine, self._part, self._weight_bytes).arena_bytes
        self.store: Store[AdapterInfo] = Store(
            f"{config.directory}/adapters",
            self._inspect,
            config.adapter_disk,
            peers,
            functools.partial(self._inspect, with_tokens=False),
        )

    def _inspect(self, path: str, *, with_tokens: bool = True) -> AdapterInfo:
        """path: of copies, which are rewritten if they have another form than PEFT's. with_tokens:
        False: added tokens are left out.
        """
        engine, vocabulary = self._config.engine, self._shape.vocabulary
        if foreign(path, vocabulary):
            rewrite_foreign(path, engine.model, vocabulary)
        chat = tidy_chat(path, self._text, self._shape, with_tokens=with_tokens)
        info = inspect(path, self._shape, engine.rank_max, engine.dtype, chat)
        if info.dora and engine.tensor_parallel > 1:
            raise AdapterRefused(
                f"{path}: DoRA is not supported with tensor_parallel", field="lora_path"
            )
        return info

    @property
    def reads_for_room(self) -> bool:
        """False if `bytes_of` and `check_room` never read files."""
        return self._config.engine.tensor_parallel > 1

    @contextlib.contextmanager
    def adding(self) -> Iterator["Adding"]:
        """The store holds the files of the versions that are added in the block, until its end."""
        adding = Adding(self)
        try:
            yield adding
        finally:
            adding.end()

    def held_version(
        self, name: str, path: str, pinned: bool, weight: float, trusted: bool
    ) -> Version:
        """Holds the files, unless it raises. Blocking: see `Adding.version`."""
        if not trusted:
            check_allowed(path, self._config.adapter_roots)
        uri = path if is_url(path) else local_path(path)
        if not is_url(path):
            check_present(uri)
        info = self.store.add(uri)
        try:
            reason = self._why_not(info)
        except BaseException:
            self.store.release(info.digest)
            raise
        if reason is not None:
            self.store.release(info.digest)
            raise AdapterRefused(f"lora_path: {path!r} {reason}", field="lora_path")
        found = info.digest, uri, info.rank, info.parameters
        chat = info.chat.template, info.chat.eos_token, info.chat.added_tokens
        return Version(name, *found, pinned, weight, info.invocation, *chat)

    def _why_not(self, info: AdapterInfo) -> str | None:
        """Why a version whose files are in the store cannot be served."""
        image_bytes, engine = self._bytes(info.digest, info.parameters), self._config.engine
        if image_bytes > self._arena_bytes:
            return (
                f"takes {image_bytes} bytes of adapter memory in {engine.dtype}, the total is "
                f"{self._arena_bytes} "
                f"({'adapter_memory' if engine.device_memory is None else 'device_memory'})"
            )
        return why_no_chat(info.chat, self.store.path(info.digest), self._text)

    def chat_template(self, digest: str) -> str:
        """The own one of a version that is held. Blocking. Raises AdapterFailed."""
        return read_template(self.store.path(digest))

    def added_tokens(self, digest: str) -> list[AddedToken]:
        """Those of a version that is held and has some. Blocking. Raises AdapterFailed."""
        return read_added_tokens(self.store.path(digest))

    def remarks(self, version: Version) -> list[str]:
        """What its directory has that is not used, and another base model. Of a URL, nothing is
        known.
        """
        if is_url(version.uri) or self._text is None:
            return []
        found = remarks(version.uri, self._text, self._shape.vocab)
        engine = self._config.engine
        base = other_base(f"{version.uri}/{CONFIG_FILE}", (engine.base_name, engine.model))
        if base is not None:
            found.append(f"Its config names another base model, {short(base)}; its shapes fit.")
        return found

    def check_room(self, version: Version, others: Iterable[tuple[int, bool]]) -> None:
        """Raises AdapterRefused if it does not fit beside the pinned adapters. May read files.

        others: (bytes, pinned) of the other images.
        """
        engine = self._config.engine
        refusal = no_room(
            self.bytes_of(version),
            version.pinned,
            others,
            self._arena_bytes,
            engine.slots_max or engine.directory_slots - 1,
        )
        if refusal is not None:
            raise AdapterRefused(f"lora_path: {version.name!r} has {refusal}", field="lora_path")

    def bytes_of(self, version: Version) -> int:
        """Bytes of its image on one rank. May read its files."""
        return self._bytes(version.digest, version.parameters)

    def _bytes(self, digest: str, parameters: int) -> int:
        """Bytes of one rank's image. That is more than its share, because each rank has one matrix
        of a pair whole. A lower bound if the files cannot be read.
        """
        ranks = self._config.engine.tensor_parallel
        if ranks == 1:
            return parameters * self._weight_bytes
        if digest not in self._part_parameters:
            with contextlib.suppress(AdapterRefused):
                files = read_adapter(self.store.path(digest), self._shape)
                self._part_parameters[digest] = files.parameters_of(self._part)
        return self._part_parameters.get(digest, parameters // ranks) * self._weight_bytes


class Adding:
    """Versions that are being added. Made by `Validation.adding`."""

    def __init__(self, validation: Validation) -> None:
        self._validation = validation
        self._lock = threading.Lock()
        self._held: list[str] | None = []  # None: it has ended
        self.remarks: dict[str, list[str]] = {}  # by name: what is not used

    def version(
        self,
        name: str,
        path: str,
        *,
        pinned: bool = False,
        weight: float = 1.0,
        trusted: bool = False,
    ) -> Version:
        """A version for the catalog. Blocking: call it on a thread.

        trusted: the path may lie outside the allowed roots.
        Raises AdapterRefused, BadRequest or AdapterFailed with the path and the reason.
        """
        version = self._validation.held_version(name, path, pinned, weight, trusted)
        self.remarks[name] = self._validation.remarks(version)
        with self._lock:
            if self._held is not None:
                self._held.append(version.digest)
                return version
        self._validation.store.release(version.digest)  # whoever asked was cancelled meanwhile
        return version

    def end(self) -> None:
        with self._lock:
            held, self._held = self._held or [], None
        for digest in held:
            self._validation.store.release(digest)
