"""Files of a folder or of a repository of the hub, and their errors in one line that says what to do."""

from __future__ import annotations

import contextlib
import json
import os
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_fast.extras import require

__all__ = ["Files", "checkpoint_errors", "hub_errors"]


@dataclass(frozen=True)
class Files:
    """The files of a folder, or of a repository of the hub, which are downloaded when they are not in its cache.

    Attributes:
        location: the folder, or the repository (owner/name).
        revision: branch, tag or commit of the repository; None is its main branch.
        local_files_only: never ask the hub, and take what is in its cache.
    """

    location: str
    revision: str | None = None
    local_files_only: bool = False

    @property
    def is_folder(self) -> bool:
        """Whether these are the files of a folder."""
        return os.path.isdir(self.location)

    @property
    def hub_options(self) -> dict[str, Any]:
        """Arguments by which diffusers and huggingface_hub read these files."""
        return {"revision": self.revision, "local_files_only": self.local_files_only}

    def get(self, name: str) -> Path:
        """Return the path of a file.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: the hub cannot be asked.
        """
        if self.is_folder:
            path = Path(self.location, name)
            if not path.is_file():
                raise FileNotFoundError(f"there is no {name}")
            return path
        require("load", "huggingface_hub")
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self.location, name, **self.hub_options))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            raise FileNotFoundError(f"there is no {name}") from error

    def find(self, name: str) -> Path | None:
        """Return the path of a file, or None where there is none.

        Raises:
            OSError: the hub cannot be asked.
        """
        try:
            return self.get(name)
        except FileNotFoundError:
            return None

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the object in a JSON file, or an empty one where there is no such file.

        Raises:
            ValueError: the file is not JSON, or holds something else than an object.
            OSError: the hub cannot be asked.
        """
        path = self.find(name)
        if path is None:
            return {}
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"{name} must hold a JSON object, got {type(content).__name__}")
        return content


@contextlib.contextmanager
def checkpoint_errors(location: str) -> Iterator[None]:
    """Turn the errors of damaged files, or of files that do not fit each other, into one line.

    Raises:
        ValueError: such an error was raised inside.
    """
    try:
        yield
    except (OSError, ImportError, MemoryError):  # not of the files, or said by `hub_errors`
        raise
    except Exception as error:  # libraries raise classes of their own
        text = f"{error} is missing" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise ValueError(incomplete(location, text)) from error


@contextlib.contextmanager
def hub_errors(name: str, location: str) -> Iterator[None]:
    """Turn the errors of the hub, of a folder, or of a missing package into one line that says what to do.

    Args:
        name: the model, as the caller named it.
        location: its folder or repository.

    Raises:
        ValueError: there is no such repository, or a file is missing.
        RuntimeError: the repository is gated, the hub cannot be reached, or a package cannot be imported.
    """
    try:
        yield
    except OSError as error:
        raise explain_hub_error(name, location, error) from error
    except ImportError as error:
        raise RuntimeError(
            f"load: {name} needs a package that cannot be imported: {str(error).splitlines()[0]}"
        ) from error


def explain_hub_error(name: str, location: str, error: OSError) -> Exception:
    """Return the error that says what to do about an error of the hub or of a folder."""
    if os.path.isdir(location):
        return ValueError(incomplete(location, str(error)))
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    # libraries raise their own errors over those of the hub
    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)

    def caused_by(*types: type[BaseException]) -> bool:
        return any(isinstance(cause, types) for cause in chain)

    if caused_by(GatedRepoError):
        return RuntimeError(
            f"load: {name} is gated; accept its terms at https://huggingface.co/{location} and run `hf auth login`"
        )
    if caused_by(RepositoryNotFoundError):
        return ValueError(
            f"load: model must be a known name, a folder or a repository of the hub, got {location!r}, which the hub "
            "does not have or does not show you (`hf auth login`)"
        )
    if caused_by(LocalEntryNotFoundError, ConnectionError):
        return RuntimeError(
            f"load: {name} is not on this machine, and the hub cannot be reached or must not be asked "
            "(HF_HUB_OFFLINE, local_files_only); name a local folder, or load it once with a network connection"
        )
    return ValueError(incomplete(location, str(error)))


def incomplete(location: str, reason: str) -> str:
    """Return the text of the error for files that are missing, damaged, or do not fit each other."""
    reason = textwrap.shorten(reason, 300, placeholder=" ...")
    return f"load: model must be complete and its files must fit each other, got {location!r}: {reason}"
