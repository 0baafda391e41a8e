"""What is in a folder, to compare it with another folder or with its state at another time."""

from pathlib import Path


def read_contents(folder: Path) -> dict[str, bytes]:
    """Return {path below `folder`: content} of all files."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
