"""Links torch, and what torch itself requires, into a folder: `python tools/link_torch.py FOLDER`.

An environment that has the folder on its path has torch without installing it again, and nothing else of the environment that runs this.
"""

from __future__ import annotations

import shutil
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def closure(name: str) -> dict[str, metadata.Distribution]:
    """The installed distribution `name` and everything that it requires here, by canonical name."""
    found: dict[str, metadata.Distribution] = {}
    queue = [name]
    while queue:
        key = canonicalize_name(queue.pop())
        if key in found:
            continue
        found[key] = metadata.distribution(key)
        for text in found[key].requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                queue.append(requirement.name)
    return found


def link(distribution: metadata.Distribution, folder: Path) -> None:
    """Links every file or folder that the distribution has directly in site-packages; its programs are left out."""
    root = Path(str(distribution.locate_file("")))
    names = {path.parts[0] for path in distribution.files or () if path.parts[0] not in ("..", "__pycache__")}
    for name in sorted(names):
        target = folder / name
        if not target.is_symlink():
            target.symlink_to(root / name)


def main() -> None:
    folder = Path(sys.argv[1])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for distribution in closure("torch").values():
        link(distribution, folder)


if __name__ == "__main__":
    main()
