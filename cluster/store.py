"""Adapter files: paths are used in place, URLs (s3://, hf:// …) are stored on disk by digest."""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cluster.errors import AdapterFailed, AdapterRefused, BadRequest

FILES = ("adapter_config.json", "adapter_model.safetensors")


def is_url(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def local_path(uri: str) -> str:
    """The absolute path of a path or a file:// URL. `..` stays in it, because only the kernel can
    resolve it behind a symlink."""
    if uri.startswith("file://"):
        uri = unquote(urlsplit(uri).path)
    return os.path.join(os.getcwd(), uri).rstrip(os.sep) or os.sep


def check_allowed(uri: str, roots: Sequence[str]) -> None:
    """Raises BadRequest naming `lora_path` unless the adapter's files are under one of the roots.

    Symlinks and `..` are resolved first, in roots, directory and files. The message is the same
    whether or not a path outside exists. A URL needs a root that is a URL and a prefix of it.
    """
    if any(_lies_under(uri, root) for root in roots):
        return
    allowed = ", ".join(roots) or "none is configured"
    raise BadRequest(
        f"lora_path: {uri!r} is outside the allowed adapter roots ({allowed})", field="lora_path"
    )


def _lies_under(uri: str, root: str) -> bool:
    if "\0" in uri:
        return False
    if is_url(uri) or is_url(root):
        plain = "::" not in uri and ".." not in uri.split("/")
        return plain and (uri + "/").startswith(root.rstrip("/") + "/")
    top = os.path.realpath(local_path(root))
    path = local_path(uri)
    candidates = [path, *(os.path.join(path, name) for name in FILES)]
    return all(_contains(top, os.path.realpath(candidate)) for candidate in candidates)


def _contains(top: str, path: str) -> bool:
    return path == top or path.startswith(top.rstrip(os.sep) + os.sep)


class Store:
    """Blocking: call it on a thread. digest_of: checks the files in a directory and returns their
    digest.
    """

    def __init__(self, directory: str, digest_of: Callable[[str], str]) -> None:
        self._directory = Path(directory).absolute()
        self._digest_of = digest_of

    def fetch(self, uri: str, digest: str | None = None) -> str:
        """Returns the local directory of the files.

        A path is returned unchecked, because reading the image checks its digest. A URL is
        downloaded to a temporary directory, checked, and renamed, so a directory named by a digest
        is always complete. Raises AdapterRefused, or AdapterFailed if the digest differs.
        """
        if not is_url(uri):
            return local_path(uri)
        if digest is not None and (self._directory / digest).is_dir():
            return str(self._directory / digest)
        self._directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._directory, prefix=".incoming-") as incoming:
            new = Path(incoming) / "adapter"
            new.mkdir()
            _download(uri, new)
            found = self._digest_of(str(new))
            if digest is not None and found != digest:
                raise AdapterFailed(f"{uri}: its files changed (digest {found}, not {digest})")
            return self._keep(new, found)

    def _keep(self, new: Path, digest: str) -> str:
        target = self._directory / digest
        try:
            new.rename(target)
        except OSError:
            # Another replica on this machine was first. Same digest, same files.
            if not target.is_dir():
                raise
            shutil.rmtree(new)
        return str(target)


def _download(uri: str, target: Path) -> None:
    import fsspec  # most fleets use paths and need not import it

    try:
        files, top = fsspec.core.url_to_fs(uri)
        for name in FILES:
            files.get_file(f"{top.rstrip('/')}/{name}", str(target / name))
    except FileNotFoundError as error:
        raise AdapterRefused(f"{uri}: not found ({error})", field="lora_path") from error
    except (ImportError, ValueError) as error:
        raise AdapterRefused(f"{uri}: cannot be read ({error})", field="lora_path") from error
    except Exception as error:  # each filesystem raises its own exceptions
        raise AdapterFailed(f"{uri}: download failed ({error})") from error
