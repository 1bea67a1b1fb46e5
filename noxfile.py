# /// script
# requires-python = ">=3.11"
# dependencies = ["nox>=2025.2.9", "virtualenv"]
# ///
"""Everything that is done with this repository: `nox -l` lists it, `nox -s train` and `nox -s tests` are what most people need.

Packages are found by their pyproject.toml, and what they need is read from there. Most sessions share one environment, `.nox/all`,
because torch alone is most of a gigabyte; the environments that prove what a package declares see torch, and nothing else, through links.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import nox
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.error_on_external_run = True
nox.options.sessions = ["tests"]

ROOT = Path(__file__).parent
ENVIRONMENTS = ROOT / ".nox"
PROJECTS = {
    nox.project.load_toml(found)["project"]["name"]: found.parent
    for found in sorted([*ROOT.glob("packages/*/pyproject.toml"), *ROOT.glob("examples/*/pyproject.toml")])
}
PACKAGES = [name for name, folder in PROJECTS.items() if folder.parent.name == "packages"]
IMPORT_NAMES = {"pyyaml": "yaml"}
"""Distributions whose module has another name."""
GATES = ["lint", "types", "boundaries", "imports", "docs", "wheels", *(f"isolated({name})" for name in PROJECTS)]

TEST_RUN = (
    *("python", "-m", "pytest", "-m", "not gpu", "--strict-skips"),
    *("--numprocesses", "auto", "--maxprocesses", "4", "--dist", "loadfile"),
)
"""All tests that need no accelerator, a file at a time on each core."""


@dataclass(frozen=True)
class Needs:
    """What an environment must hold: packages of this repository by name, and requirements from an index."""

    local: tuple[str, ...]
    index: tuple[str, ...]


def needs(wanted: Iterable[str]) -> Needs:
    """Follows requirements such as `colossal-launch[hf]` through the pyprojects of this repository."""
    local: dict[str, None] = {}
    index: dict[str, None] = {}
    queue, seen = list(wanted), set()
    while queue:
        text = queue.pop(0)
        requirement = Requirement(text)
        if text in seen:
            continue
        seen.add(text)
        if requirement.name not in PROJECTS:
            index[text] = None
            continue
        local[requirement.name] = None
        project = nox.project.load_toml(PROJECTS[requirement.name] / "pyproject.toml")["project"]
        queue += project.get("dependencies", [])
        for extra in sorted(requirement.extras):
            queue += project["optional-dependencies"][extra]
    return Needs(tuple(sorted(local)), tuple(sorted(index)))


def distributions(requirements: Iterable[str]) -> set[str]:
    return {Requirement(text).name for text in requirements}


def brought_along(site_packages: Path, requirements: Iterable[str]) -> set[str]:
    """The names of what these requirements themselves require, as far as it is installed in `site_packages`."""
    installed = {canonicalize_name(found.name): found for found in metadata.distributions(path=[str(site_packages)])}
    queue, seen = [Requirement(text) for text in requirements], set[str]()
    while queue:
        wanted = queue.pop()
        if str(wanted) in seen:
            continue
        seen.add(str(wanted))
        found = installed.get(canonicalize_name(wanted.name))
        for text in (found.requires or ()) if found is not None else ():
            inner = Requirement(text)
            extras = ("", *wanted.extras)
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                queue.append(inner)
    return {canonicalize_name(name) for name in distributions(seen)}


def group(folder: Path, name: str) -> list[str]:
    """A dependency group of the pyproject in `folder`; empty where it has none of that name."""
    pyproject = nox.project.load_toml(folder / "pyproject.toml")
    return (
        list(nox.project.dependency_groups(pyproject, name)) if name in pyproject.get("dependency-groups", {}) else []
    )


def everything() -> list[str]:
    """All packages with all their extras."""
    found = []
    for name in PACKAGES:
        project = nox.project.load_toml(PROJECTS[name] / "pyproject.toml")["project"]
        extras = ",".join(project.get("optional-dependencies", {}))
        found.append(f"{name}[{extras}]" if extras else name)
    return found


@dataclass(frozen=True)
class Environment:
    """A virtual environment that sessions may share, which nox's own cannot be."""

    session: nox.Session
    path: Path

    @property
    def python(self) -> str:
        return str(self.path / "bin" / "python")

    @property
    def site_packages(self) -> Path:
        return self.path / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"

    def create(self, *options: str, fresh: bool = False) -> None:
        if fresh:
            shutil.rmtree(self.path, ignore_errors=True)
        if not Path(self.python).exists():
            self.session.log(f"creating {self.path.relative_to(ROOT)}")
            arguments = [sys.executable, "-m", "virtualenv", "-q", *options, str(self.path)]
            self.session.run(*arguments, external=True, silent=True)

    def run(self, *command: str, cwd: Path = ROOT) -> None:
        """Runs a program of this environment, the first word of `command`, without the caller's PYTHONPATH."""
        program, *arguments = command
        with self.session.chdir(cwd):
            variables = {
                "PYTHONPATH": "",
                "MYPYPATH": str(cwd / "src"),
                "NO_MKDOCS_2_WARNING": "1",
                "PATH": f"{self.path / 'bin'}{os.pathsep}{os.environ['PATH']}",
            }
            self.session.run(str(self.path / "bin" / program), *arguments, external=True, env=variables)

    def install(self, *arguments: str) -> None:
        self.run("python", "-m", "pip", "install", "-qq", "--constraint", str(ROOT / "constraints.txt"), *arguments)

    def install_once(self, requirements: Iterable[str], editable: Iterable[str]) -> None:
        """Installs, unless exactly this was installed before: the names of the marks are digests of what was asked for."""
        wanted, folders = sorted(requirements), [str(PROJECTS[name]) for name in editable]
        inputs = [*wanted, *folders, (ROOT / "constraints.txt").read_text()]
        inputs += [(Path(folder) / "pyproject.toml").read_text() for folder in folders]
        mark = self.path / f"installed-{hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]}"
        if mark.exists():
            return
        self.session.log(
            f"installing {len(wanted)} requirements into {self.path.relative_to(ROOT)}; the first time takes minutes"
        )
        self.install(*wanted)
        if folders:
            self.install("--no-build-isolation", "--no-deps", *itertools.chain(*(("-e", folder) for folder in folders)))
        mark.touch()


def shared(session: nox.Session, *groups: str) -> Environment:
    """The environment with every package, editable, every extra, and these dependency groups of the repository."""
    environment = Environment(session, ENVIRONMENTS / "all")
    environment.create()
    wanted = everything()
    if "test" in groups:
        wanted += [
            requirement
            for name in PACKAGES
            for kind in ("test", "composition")
            for requirement in group(PROJECTS[name], kind)
        ]
    found = needs(wanted)
    tools = [requirement for name in ("build", *groups) for requirement in group(ROOT, name)]
    environment.install_once({*found.index, *tools}, found.local)
    return environment


def with_torch(session: nox.Session, name: str) -> Environment:
    """A new environment that sees torch, and what torch itself requires, of the shared one; the rest must be installed."""
    links = ENVIRONMENTS / "torch-alone"
    shared(session).run("python", "tools/link_torch.py", str(links))
    environment = Environment(session, ENVIRONMENTS / name)
    environment.create(fresh=True)
    (environment.site_packages / "torch-alone.pth").write_text(f"{links}\n")
    return environment


def build_wheels(session: nox.Session, names: Iterable[str], folder: Path) -> list[str]:
    """Builds the wheels of these projects into an emptied folder and returns their paths."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in names:
        shared(session).run("hatchling", "build", "--target", "wheel", "--directory", str(folder), cwd=PROJECTS[name])
    return sorted(str(wheel) for wheel in folder.glob("*.whl"))


@nox.session(python=False)
def train(session: nox.Session) -> None:
    """Install everything and train a small Llama on the standard library's source with two processes (README, command one)."""
    arguments = session.posargs or ["examples/pretrain_stdlib.yaml", "--processes", "2"]
    shared(session).run("colossal", "train", *arguments)


@nox.session(python=False)
def tests(session: nox.Session) -> None:
    """Run every check there is (README, command two); with arguments, only pytest with these in the shared environment."""
    environment = shared(session, "test")
    if session.posargs:
        environment.run("python", "-m", "pytest", *session.posargs)
        return
    for gate in GATES:
        session.notify(gate, posargs=[])
    paths = [str(path) for name in PACKAGES for path in composition_tests(name)]
    environment.run(*TEST_RUN, "--durations=10", *paths, "docs")


def composition_tests(name: str) -> list[Path]:
    """A project's tests that need more than it declares: all where it has a group `composition`, else the files that ask for a module
    (`pytest.importorskip`). The others run in `isolated` alone: that is the environment that says more.
    """
    if group(PROJECTS[name], "composition"):
        return test_folders(name)
    files = (file for folder in test_folders(name) for file in sorted(folder.rglob("test_*.py")))
    return [file for file in files if "importorskip(" in file.read_text(encoding="utf-8")]


def test_folders(name: str) -> list[Path]:
    """The folders of a project's tests that need no accelerator."""
    folder = PROJECTS[name] / "tests"
    layers = [folder / layer for layer in ("unit", "distributed") if (folder / layer).is_dir()]
    return layers or ([folder] if folder.is_dir() else [])


@nox.session(python=False)
@nox.parametrize("project", list(PROJECTS), ids=list(PROJECTS))
def isolated(session: nox.Session, project: str) -> None:
    """Test one package's wheel in an environment with only what it declares, and what that brings along."""
    environment = with_torch(session, f"isolated-{project}")
    declared = needs([project, *group(PROJECTS[project], "test")])
    wheels = build_wheels(session, declared.local, ENVIRONMENTS / "wheels" / project)
    environment.install(*declared.index)
    environment.install("--no-deps", *wheels)
    ours = needs(everything())
    absent = {*ours.local, *distributions(ours.index)} - {*declared.local, *distributions(declared.index)}
    absent -= brought_along(environment.site_packages, declared.index)
    modules = ",".join(sorted(IMPORT_NAMES.get(name, name.replace("-", "_")) for name in absent))
    paths = [str(path) for path in test_folders(project)]
    environment.run(*TEST_RUN, f"--absent={modules}", *paths)


@nox.session(python=False)
def wheels(session: nox.Session) -> None:
    """Install all wheels into a new environment and use the command outside the repository, without and with the optional parts."""
    built = build_wheels(session, PACKAGES, ENVIRONMENTS / "wheels" / "all")
    environment = with_torch(session, "from-wheels")
    elsewhere = Path(tempfile.mkdtemp(prefix="colossal-wheels-"))
    wheel_of = {Path(wheel).name.split("-")[0].replace("_", "-"): wheel for wheel in built}
    environment.install(*(wheel_of[name] for name in needs(["colossal-launch"]).local))
    for verb in ("--help", "plugins", "doctor"):
        environment.run("colossal", verb, cwd=elsewhere)
    with_extras = {name: wanted[len(name) :] for name, wanted in zip(PACKAGES, everything(), strict=True)}
    environment.install(*(f"{wheel_of[name]}{extras}" for name, extras in with_extras.items()))
    shutil.copy(ROOT / "examples" / "pretrain_stdlib.yaml", elsewhere / "run.yaml")
    (elsewhere / "script.py").write_text("from colossal_launch import launch\n\nprint(launch())\n")
    for line in (
        "plugins",
        "doctor",
        "plan run.yaml --world-size 8 --set batch.micro_size=4",
        "train run.yaml --processes 2 --set train.num_steps=2 --set train.eval_num_batches=1",
        "convert runs/pretrain_stdlib exported",
        "run script.py --processes 2",
        "verify run.yaml --world-size 2",
        "bench comm --processes 2 --max-bytes 65536",
    ):
        environment.run("colossal", *line.split(), cwd=elsewhere)
    shutil.rmtree(elsewhere)


@nox.session(python=False)
def lint(session: nox.Session) -> None:
    """Check style and formatting; `nox -s lint -- --fix` repairs what can be."""
    environment = shared(session, "lint")
    environment.run("ruff", "check", *session.posargs, ".")
    environment.run("ruff", "format", *([] if "--fix" in session.posargs else ["--check"]), ".")


@nox.session(python=False)
def types(session: nox.Session) -> None:
    """Check types strictly, one package at a time, its tests included."""
    environment = shared(session, "test", "types")
    # One cache for all: torch and transformers are read once, not for each package (4 minutes against 1 on two cores).
    files = ("--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache"))
    configuration = (*files, "--strict")
    for name, folder in PROJECTS.items():
        session.log(f"mypy --strict {name}")
        parts = [part for part in ("src", "tests") if any((folder / part).rglob("*.py"))]
        environment.run("mypy", *configuration, *parts, cwd=folder)
    environment.run("mypy", *configuration, "noxfile.py", "conftest.py", "docs", "tools")
    environment.run("mypy", *configuration, ".", cwd=ROOT / "benchmarks")


@nox.session(python=False)
def boundaries(session: nox.Session) -> None:
    """Check who imports whom."""
    environment = shared(session, "boundaries")
    environment.run("lint-imports", "--no-cache")
    environment.run("lint-imports", "--no-cache", "--config", "tools/import_cycles.toml")


@nox.session(python=False)
def imports(session: nox.Session) -> None:
    """Check that importing a package is light: under 50 ms beside torch, and without side effects."""
    names = [name.replace("-", "_") for name in PACKAGES]
    shared(session).run("python", "tools/import_cost.py", "--limit-ms", "50", *names)


@nox.session(python=False)
def docs(session: nox.Session) -> None:
    """Build the documentation strictly into site/; `nox -s docs -- serve` shows it."""
    command = session.posargs or ["build", "--strict", "--quiet"]
    shared(session, "docs").run("mkdocs", *command)


@nox.session(python=False, default=False)
def generate(session: nox.Session) -> None:
    """Write again what is generated: the config reference, the pictures, and the table of what works with what."""
    environment = shared(session, "docs")
    for script in ("tools/config_reference.py", "docs/make_pictures.py", "tools/works_with.py"):
        environment.run("python", script)


@nox.session(python=False, default=False)
def architectures(session: nox.Session) -> None:
    """Train every causal LM of transformers, and other heads, shrunk, beside one process, and write the table (nightly: half an hour).

    Under ZeRO and under tensor parallelism, each model on two processes. Arguments are those of tools/architectures.py:
    `-- --only llama,bert:masked-lm`, `-- --compare tensor`, `-- --jobs 4` (which goes on with what is not exact yet).
    """
    shared(session, "test").run("python", "tools/architectures.py", *(session.posargs or ["--fresh"]))


@nox.session(python=False, default=False)
def gpu(session: nox.Session) -> None:
    """Run the tests that need an accelerator, with the torch that is already installed on this machine."""
    environment = Environment(session, ENVIRONMENTS / "gpu")
    environment.create("--system-site-packages")
    found = needs([*everything(), *(requirement for name in PACKAGES for requirement in group(PROJECTS[name], "test"))])
    missing = [requirement for requirement in found.index if Requirement(requirement).name != "torch"]
    environment.run("python", "-m", "pip", "install", "-qq", *missing, *group(ROOT, "build"))
    folders = itertools.chain(*(("-e", str(PROJECTS[name])) for name in found.local))
    environment.run("python", "-m", "pip", "install", "-qq", "--no-build-isolation", "--no-deps", *folders)
    paths = [str(path) for name in PACKAGES if (path := PROJECTS[name] / "tests" / "gpu").is_dir()]
    environment.run("python", "-m", "pytest", "-m", "gpu", *(session.posargs or paths))


def build_distributions(session: nox.Session, package: str) -> None:
    target = ROOT / "dist" / package
    shutil.rmtree(target, ignore_errors=True)
    shared(session).run("python", "-m", "build", "--no-isolation", "--outdir", str(target), str(PROJECTS[package]))
    release_tool(session, "inspect", package, str(target))


def release_tool(session: nox.Session, verb: str, package: str, *arguments: str) -> None:
    shared(session).run("python", "tools/release.py", verb, str(PROJECTS[package]), *arguments)


@nox.session(python=False, default=False)
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def build(session: nox.Session, package: str) -> None:
    """Build one package's wheel and source archive into dist/, and look into them."""
    build_distributions(session, package)


@nox.session(python=False, default=False)
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def version(session: nox.Session, package: str) -> None:
    """Print one package's version; with an argument, set it and move the changelog's unreleased lines under it."""
    release_tool(session, "version", package, *session.posargs)


@nox.session(python=False, default=False)
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def changelog(session: nox.Session, package: str) -> None:
    """Check that one package's changelog says something of its version, or of what is to come."""
    release_tool(session, "changelog", package)


@nox.session(python=False, default=False)
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def tag(session: nox.Session, package: str) -> None:
    """Check that one package can be released (clean tree, changelog entry, new tag), and tag it here."""
    release_tool(session, "tag", package)


@nox.session(python=False, default=False)
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def release(session: nox.Session, package: str) -> None:
    """Check and build one package, and print the commands that would publish it; nothing leaves this machine."""
    release_tool(session, "check", package)
    build_distributions(session, package)
    release_tool(session, "commands", package)


if __name__ == "__main__":
    nox.main()
