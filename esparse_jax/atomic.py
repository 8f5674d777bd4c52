"""Files written in one go. Above all rooms, like `native`."""

import tempfile
import uuid
from os import PathLike
from pathlib import Path


def check_place(path: str | PathLike[str]) -> None:
    """Whether something of that name, and the folders it lies in, can be made: asked by making a
    folder in the nearest one that is there, and removing it. Ask before hours of work, not after.

    Raises:
        NotADirectoryError: A part of the path is a file.
        OSError: Nothing can be made there.
    """
    path = Path(path).resolve()
    above = next(folder for folder in path.parents if folder.exists())
    if not above.is_dir():
        raise NotADirectoryError(
            f"{path} cannot be written: {above} is a file. Name another place."
        )
    try:
        with tempfile.TemporaryDirectory(prefix=".esparse.", dir=above):
            pass
    except OSError as error:
        raise OSError(
            f"{path} cannot be written: {above} takes nothing new ({error.strerror}). Name another "
            f"place."
        ) from error


def write_text(path: str | PathLike[str], text: str) -> None:
    """Writes a file and the folders it lies in. Whoever reads it sees all of the old or the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
