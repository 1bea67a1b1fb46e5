"""Releases one package: `python tools/release.py VERB FOLDER ...`, each verb behind the nox session of that name.

version FOLDER [NEW]   print the version, or set it and move the changelog's unreleased lines under it
changelog FOLDER       the changelog has an entry for the version, or unreleased lines
inspect FOLDER DIST    the built archives hold the typing marker, the licence and the version
check FOLDER           the tree is clean, the changelog has the version's entry, the tag is new
tag FOLDER             check, then tag the commit
commands FOLDER        print what publishes it
"""

from __future__ import annotations

import datetime
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

VERSION = re.compile(r"^\d+\.\d+\.\d+((a|b|rc)\d+)?$")
UNRELEASED = "## [Unreleased]"


def stop(message: str) -> None:
    """Ends with the message and exit status 1."""
    sys.exit(message)


def name_and_version(folder: Path) -> tuple[str, str]:
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    return project["name"], project["version"]


def tag_name(folder: Path) -> str:
    return "-v".join(name_and_version(folder))


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def entry(text: str, heading: str) -> str:
    """The lines of a changelog under `heading`, up to the next heading of that level; "" where there is none."""
    found = re.search(rf"^{re.escape(heading)}[^\n]*\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


def released(text: str, version: str, today: datetime.date) -> str:
    """The changelog with its unreleased lines under a heading of their own.

    Raises: SystemExit when there are none.
    """
    lines = entry(text, UNRELEASED)
    if not lines:
        stop(f"CHANGELOG.md: nothing under {UNRELEASED}: say there what a user would notice")
    return text.replace(UNRELEASED, f"{UNRELEASED}\n\n## [{version}] - {today:%Y-%m-%d}", 1)


def set_version(folder: Path, new: str) -> None:
    if not VERSION.match(new):
        stop(f"version={new}: three numbers, then at most a1, b1 or rc1")
    pyproject, changelog = folder / "pyproject.toml", folder / "CHANGELOG.md"
    changelog.write_text(released(changelog.read_text(), new, datetime.datetime.now(tz=datetime.UTC).date()))
    text = re.sub(r'^version = "[^"]*"$', f'version = "{new}"', pyproject.read_text(), count=1, flags=re.MULTILINE)
    pyproject.write_text(text)


def check_changelog(folder: Path) -> None:
    text, (name, version) = (folder / "CHANGELOG.md").read_text(), name_and_version(folder)
    if not entry(text, f"## [{version}]") and not entry(text, UNRELEASED):
        stop(f"{name}: CHANGELOG.md has no lines under [{version}] or [Unreleased]")


def check(folder: Path) -> None:
    """Whether the package can be released from here, with everything that is wrong at once."""
    name, version = name_and_version(folder)
    wrong = []
    if git("status", "--porcelain"):
        wrong.append("the working tree has changes: commit them")
    if not VERSION.match(version):
        wrong.append(f"version={version}: three numbers, then at most a1, b1 or rc1")
    if not entry((folder / "CHANGELOG.md").read_text(), f"## [{version}]"):
        wrong.append(f"CHANGELOG.md has no entry [{version}]: nox -s 'version({name})' -- {version}")
    if git("tag", "--list", tag_name(folder)):
        wrong.append(f"the tag {tag_name(folder)} exists: choose the next version")
    if wrong:
        stop("\n".join(f"{name}: {line}" for line in wrong))


def inspect(folder: Path, dist: Path) -> None:
    """Whether the wheel and the source archive in `dist` are what they should be."""
    name, version = name_and_version(folder)
    module = name.replace("-", "_")
    stem = f"{module}-{version}"
    with zipfile.ZipFile(dist / f"{stem}-py3-none-any.whl") as wheel:
        in_wheel = set(wheel.namelist())
    with tarfile.open(dist / f"{stem}.tar.gz") as archive:
        in_archive = set(archive.getnames())
    wheel_names = {f"{module}/py.typed", f"{module}/__init__.py", f"{stem}.dist-info/licenses/LICENSE"}
    archive_names = {f"{stem}/{part}" for part in ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE")}
    missing = sorted((wheel_names - in_wheel) | (archive_names - in_archive))
    strange = sorted(path for path in in_wheel if not path.startswith((f"{module}/", f"{stem}.dist-info/")))
    if missing or strange:
        stop(f"{name}: missing from the archives: {missing}; does not belong in the wheel: {strange}")
    print(f"{name} {version}: {len(in_wheel)} files in the wheel, {len(in_archive)} in the source archive")


def print_commands(folder: Path) -> None:
    name, _ = name_and_version(folder)
    print(f"\nTo publish {name}:")
    print(f"  nox -s 'tag({name})'")
    print(f"  git push origin {tag_name(folder)}")
    print(f"  python -m twine upload dist/{name}/*")


def main(arguments: list[str]) -> None:
    match arguments:
        case ["version", folder]:
            print(" ".join(name_and_version(Path(folder))))
        case ["version", folder, new]:
            set_version(Path(folder), new)
        case ["changelog", folder]:
            check_changelog(Path(folder))
        case ["inspect", folder, dist]:
            inspect(Path(folder), Path(dist))
        case ["check", folder]:
            check(Path(folder))
        case ["tag", folder]:
            check(Path(folder))
            git("tag", "--annotate", tag_name(Path(folder)), "--message", tag_name(Path(folder)).replace("-v", " "))
            print(f"git push origin {tag_name(Path(folder))}")
        case ["commands", folder]:
            print_commands(Path(folder))
        case _:
            stop(__doc__ or "")


if __name__ == "__main__":
    main(sys.argv[1:])
