"""GET /internal/adapters/DIGEST/FILE: the files of a version, for other replicas alone."""

import os
from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from cluster.adapter_paths import CONFIG_FILE, TENSORS_FILE, TOKENIZER_FILE
from replica.api import asgi

Files = Callable[[str, str], str | None]
"""(key, digest) → the directory of its files; None without it, or for a wrong key."""


def no_files(key: str, digest: str) -> None:
    return None


class PeerFiles:
    def __init__(self, files: Files) -> None:
        self._files = files

    async def file(self, http: Request) -> Response:
        """What has no such file, and who has no key for it, see a path that does not exist."""
        digest, name = http.path_params["digest"], http.path_params["name"]
        key = http.headers.get("authorization", "").removeprefix("Bearer ")
        path = self._path(key, digest, name)
        if path is None:
            raise asgi.NoSuchRoute(f"no route GET {http.scope['path']}")
        return FileResponse(path, media_type="application/octet-stream")

    def _path(self, key: str, digest: str, name: str) -> str | None:
        if name not in (CONFIG_FILE, TENSORS_FILE, TOKENIZER_FILE):
            return None
        directory = self._files(key, digest)
        path = f"{directory}/{name}"
        return path if directory is not None and os.path.isfile(path) else None
