"""Files written in one go. Above all rooms, like `native`."""

import uuid
from os import PathLike
from pathlib import Path


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
