"""Lay a lock over the packages that a base image brings, so that torch and vLLM are not downloaded a second time.

    python layer.py missing LOCK [--own NAME] [--without NAME] [--keep NAME]   > rest.lock
    python layer.py launchers FOLDER
    python layer.py satisfied REQUIREMENTS

`docker/install.sh` runs it with the Python of a virtual environment that sees the base's packages behind its own. It
imports the standard library and `packaging` only, because it runs before anything of the lock is there.
"""

import argparse
import re
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

try:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version
except ImportError:  # a fresh environment has pip alone, which carries a copy
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name
    from pip._vendor.packaging.version import Version


class LayerError(Exception):
    """What the person who builds has to know; ends the program with exit code 2."""


@dataclass(frozen=True)
class Pin:
    """One `name==version` of a lock, with its hashes."""

    requirement: Requirement
    block: str  # its lines as they stand in the lock

    @property
    def name(self) -> str:
        return canonicalize_name(self.requirement.name)

    @property
    def version(self) -> str:
        return next(iter(self.requirement.specifier)).version

    def fits(self, version: str) -> bool:
        """Whether an installed version is the pinned one. As PEP 440 has it, 2.7.0+cu128 is a 2.7.0."""
        return self.requirement.specifier.contains(version, prereleases=True)


@dataclass(frozen=True)
class Plan:
    """What happens with each pin that applies to this Python and platform."""

    install: list[Pin]
    keep: list[Pin]  # the base has this version
    builds: dict[str, str]  # name -> why the base's other version stays


def read_lock(text: str) -> list[Pin]:
    """The pins that apply here.

    Raises:
        LayerError: a line that is no pin with a hash, or two pins of one package that both apply.
    """
    pins: dict[str, Pin] = {}
    for block in re.findall(r"^[^\s#].*\n(?:[ \t]+.*\n)*", text if text.endswith("\n") else text + "\n", re.MULTILINE):
        line = block.split("\n", 1)[0].rstrip("\\ ")
        requirement = None if line.startswith("-") else Requirement(line)
        operators = [specifier.operator for specifier in requirement.specifier] if requirement else []
        if operators != ["=="] or "--hash=" not in block:
            raise LayerError(f"the lock holds {line!r}; expected 'name==version' with at least one --hash")
        if requirement.marker and not requirement.marker.evaluate():
            continue
        pin = Pin(requirement, block)
        if pin.name in pins:
            raise LayerError(f"the lock pins {pin.name} twice for this Python: {pins[pin.name].version}, {pin.version}")
        pins[pin.name] = pin
    return list(pins.values())


def installed(path: list[str] | None = None) -> dict[str, metadata.Distribution]:
    """Each package's distribution that an import would find: the first one on `path`, by default on `sys.path`."""
    found: dict[str, metadata.Distribution] = {}
    for distribution in metadata.distributions(path=sys.path if path is None else path):
        if distribution.metadata["Name"]:
            found.setdefault(canonicalize_name(distribution.metadata["Name"]), distribution)
    return found


def belongs_to_environment(distribution: metadata.Distribution) -> bool:
    return Path(distribution.locate_file("")).resolve().is_relative_to(Path(sys.prefix).resolve())


def make_plan(pins: list[Pin], found: dict[str, metadata.Distribution], own=(), without=()) -> Plan:
    """Divide the pins. A pin is kept where the base has exactly that version, and installed otherwise.

    One exception: a kept package with a local label (torch 2.7.0+cu128) is another build than the lock's (CUDA 12.6)
    and names the CUDA libraries it was built for with `==`. Those stay as the base has them: the lock's would go with
    a torch that is not there.

    Args:
        own: packages that have to lie in the environment itself, because their files are going to be changed.
        without: packages that nothing here needs.

    Raises:
        LayerError: a kept build wants a library that the base has not.
    """
    by_name = {pin.name: pin for pin in pins if pin.name not in without}
    keep = {
        name: pin
        for name, pin in by_name.items()
        if name in found and pin.fits(found[name].version) and (name not in own or belongs_to_environment(found[name]))
    }
    builds: dict[str, str] = {}
    for owner in keep:
        if not Version(found[owner].version).local:
            continue
        for requirement in map(Requirement, found[owner].requires or ()):
            name = canonicalize_name(requirement.name)
            exact = any(specifier.operator == "==" for specifier in requirement.specifier)
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if not exact or not applies or name not in by_name or name in keep:
                continue
            reason = f"{owner} {found[owner].version} needs {requirement.name}{requirement.specifier}"
            if name not in found or not requirement.specifier.contains(found[name].version, prereleases=True):
                seen = found[name].version if name in found else "none"
                raise LayerError(f"{reason}; the base has {seen}, the lock {by_name[name].version}")
            builds[name] = f"{found[name].version} (lock: {by_name[name].version}; {reason})"
    rest = [pin for name, pin in by_name.items() if name not in keep and name not in builds]
    return Plan(install=rest, keep=list(keep.values()), builds=builds)


def write_launchers(folder: Path, found: dict[str, metadata.Distribution]) -> list[str]:
    """Give the environment the commands of the base's packages, and return their names.

    The base's own `vllm` and `torchrun` name the base's Python in their first line, which sees nothing of the
    environment: a training would start without LLaMA-Factory, a server without the plug-in.
    """
    written = []
    for distribution in found.values():
        if belongs_to_environment(distribution):
            continue
        for entry in distribution.entry_points:
            launcher = folder / entry.name
            if entry.group != "console_scripts" or launcher.exists():
                continue
            first = entry.attr.split(".")[0]
            launcher.write_text(
                f"#!{sys.executable}\nimport sys\n\nfrom {entry.module} import {first}\n\n"
                f'if __name__ == "__main__":\n    sys.exit({entry.attr}())\n'
            )
            launcher.chmod(0o755)
            written.append(entry.name)
    return sorted(written)


def unsatisfied(text: str, found: dict[str, metadata.Distribution]) -> list[str]:
    """The lines of a requirements file that what is installed does not meet."""
    wrong = []
    for line in filter(None, (line.split("#")[0].strip() for line in text.splitlines())):
        requirement = Requirement(line)
        distribution = found.get(canonicalize_name(requirement.name))
        if requirement.marker and not requirement.marker.evaluate():
            continue
        if distribution is None or not requirement.specifier.contains(distribution.version, prereleases=True):
            wrong.append(f"{line} (installed: {distribution.version if distribution else 'none'})")
    return wrong


def missing(arguments: argparse.Namespace) -> None:
    pins = read_lock(arguments.lock.read_text(encoding="utf-8"))
    unknown = sorted({*arguments.own, *arguments.without, *arguments.keep} - {pin.name for pin in pins})
    if unknown:
        raise LayerError(f"not in {arguments.lock}: {', '.join(unknown)}")
    found = installed()
    plan = make_plan(pins, found, arguments.own, arguments.without)
    lost = [pin for pin in plan.install if pin.name in arguments.keep]
    if lost:
        listed = ", ".join(
            f"{pin.name} {pin.version} (the base has {found[pin.name].version if pin.name in found else 'none'})"
            for pin in lost
        )
        raise LayerError(f"the base image was to bring {listed}; choose the image and the lock for each other")
    for name, reason in sorted(plan.builds.items()):
        print(f"layer: {name} stays {reason}", file=sys.stderr)
    print(
        f"layer: {len(pins)} pins: {len(plan.keep) + len(plan.builds)} are there, {len(plan.install)} to install",
        file=sys.stderr,
    )
    sys.stdout.write("".join(pin.block for pin in plan.install))


def launchers(arguments: argparse.Namespace) -> None:
    names = write_launchers(arguments.folder, installed())
    print(f"layer: {len(names)} commands of the base in {arguments.folder}: {' '.join(names)}", file=sys.stderr)


def satisfied(arguments: argparse.Namespace) -> None:
    wrong = unsatisfied(arguments.requirements.read_text(encoding="utf-8"), installed())
    if wrong:
        raise LayerError(f"{arguments.requirements} is not met: {'; '.join(wrong)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(required=True)
    step = steps.add_parser("missing", help="print the part of LOCK that is not installed at the locked version")
    step.add_argument("lock", type=Path)
    step.add_argument("--own", action="append", default=[], help="has to lie in the environment, not in the base")
    step.add_argument("--without", action="append", default=[], help="leave out")
    step.add_argument("--keep", action="append", default=[], help="an error where the base does not have it")
    step.set_defaults(run=missing)
    step = steps.add_parser("launchers", help="write the commands of the base's packages")
    step.add_argument("folder", type=Path)
    step.set_defaults(run=launchers)
    step = steps.add_parser("satisfied", help="fail where the installed packages do not meet REQUIREMENTS")
    step.add_argument("requirements", type=Path)
    step.set_defaults(run=satisfied)
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except LayerError as error:
        print(f"layer: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
