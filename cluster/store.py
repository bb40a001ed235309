"""Adapter files: plain paths used in place, URLs (s3://, hf:// …) kept on local disk by digest."""

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
    """The absolute path of a plain path or a file:// URL. Not normalized: where `..` leads from
    behind a symlink is for the kernel to say."""
    if uri.startswith("file://"):
        uri = unquote(urlsplit(uri).path)
    return os.path.join(os.getcwd(), uri).rstrip(os.sep) or os.sep


def check_allowed(uri: str, roots: Sequence[str]) -> None:
    """Raises BadRequest naming `lora_path` unless the files lie under one of the roots.

    Symlinks and `..` are followed first, in the roots too, and the files in the directory must not
    lead out of the roots either. What lies outside is refused in the same words whether it exists
    or not. A URL must continue a root that is itself a URL.
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
    places = [path, *(os.path.join(path, name) for name in FILES)]
    return all(_contains(top, os.path.realpath(place)) for place in places)


def _contains(top: str, path: str) -> bool:
    return path == top or path.startswith(top.rstrip(os.sep) + os.sep)


class Store:
    """Blocking: call it on a thread. digest_of: checks the files in a directory and names them."""

    def __init__(self, directory: str, digest_of: Callable[[str], str]) -> None:
        self._directory = Path(directory).absolute()
        self._digest_of = digest_of

    def fetch(self, uri: str, digest: str | None = None) -> str:
        """The local directory of the files.

        A plain path is given back as it is: its digest is checked when the image is read. A URL
        is downloaded beside its final place, checked, and renamed there, so that a directory
        named by a digest is always whole. Raises AdapterRefused, or AdapterFailed when what is
        there now is not the digest asked for.
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
        place = self._directory / digest
        try:
            new.rename(place)
        except OSError:
            # Another replica on this machine was first; the digest says it is the same.
            if not place.is_dir():
                raise
            shutil.rmtree(new)
        return str(place)


def _download(uri: str, target: Path) -> None:
    import fsspec  # late: most fleets use plain paths

    try:
        files, top = fsspec.core.url_to_fs(uri)
        for name in FILES:
            files.get_file(f"{top.rstrip('/')}/{name}", str(target / name))
    except FileNotFoundError as error:
        raise AdapterRefused(f"{uri}: not found ({error})", field="lora_path") from error
    except (ImportError, ValueError) as error:
        raise AdapterRefused(f"{uri}: cannot be read here ({error})", field="lora_path") from error
    except Exception as error:  # each filesystem raises its own kinds
        raise AdapterFailed(f"{uri}: download failed ({error})") from error
