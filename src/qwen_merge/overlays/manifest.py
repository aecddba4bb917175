"""What an overlay says of itself: `overlay.yaml`, read and checked, and where the upstream it is for lies."""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from qwen_merge.errors import UserError

OVERLAYS = Path(__file__).parent
UPSTREAMS = ("transformers", "llamafactory", "vllm", "vlmevalkit")
PACKAGES = {"vlmevalkit": "vlmeval"}  # where the package is not called as the upstream is


@dataclass(frozen=True)
class Touched:
    """One upstream file: the diff's name, and the sha256 of the file without and with it."""

    patch: str
    before: str
    after: str


@dataclass(frozen=True)
class Release:
    """One state of the upstream that the overlay fits."""

    version: str
    commit: str
    source: str
    files: dict[str, Touched]
    told_by: str = ""  # what version_pattern finds, where that is not the version itself


@dataclass(frozen=True)
class Overlay:
    """The overlay of one upstream. Paths are relative to the upstream's package folder."""

    upstream: str
    folder: Path
    version_file: str
    version_pattern: str
    releases: tuple[Release, ...]
    new_files: dict[str, Path]
    hunks: dict[str, list[dict[str, str]]]

    def patch_text(self, name: str) -> str:
        return (self.folder / name).read_text(encoding="utf-8")

    def release_of(self, package: Path) -> Release:
        """The release that `package` is.

        Raises:
            UserError: another version.
        """
        file = package / self.version_file
        match = (
            re.search(self.version_pattern, file.read_text(encoding="utf-8", errors="replace"))
            if file.is_file()
            else None
        )
        seen = match[1] if match else f"unknown (no version in {file})"
        for release in self.releases:
            if (release.told_by or release.version) == seen:
                return release
        expected = " or ".join(f"{release.version} ({release.source})" for release in self.releases)
        raise UserError(
            f"{self.upstream} in {package} is version {seen}; this overlay is for {expected}.\n"
            "Install that version (./scripts/env.sh makes an environment with it) or name another --root."
        )


def load(upstream: str) -> Overlay:
    """Read the overlay of one of `UPSTREAMS`."""
    folder = OVERLAYS / upstream
    data = yaml.safe_load((folder / "overlay.yaml").read_text(encoding="utf-8"))
    return Overlay(
        upstream=upstream,
        folder=folder,
        version_file=data["version_file"],
        version_pattern=data["version_pattern"],
        releases=tuple(
            Release(
                version=release["version"],
                commit=release["commit"],
                source=release["source"],
                files={path: Touched(**touched) for path, touched in release["files"].items()},
                told_by=release.get("told_by", ""),
            )
            for release in data["releases"]
        ),
        new_files={target: (folder / source).resolve() for target, source in data["new_files"].items()},
        hunks=data["hunks"],
    )


def find_package(upstream: str, root: Path | None) -> Path:
    """The upstream's package folder, without importing it.

    Args:
        root: a checkout, a site-packages folder or the package folder itself; None means this environment's.

    Raises:
        UserError: it is not there.
    """
    name = PACKAGES.get(upstream, upstream)
    if root is None:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"{upstream} is not installed in this environment.\n"
                "Run ./scripts/env.sh, or name a checkout or a site-packages folder with --root."
            )
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    root = root.expanduser().resolve()
    for candidate in (root / "src" / name, root / name, root):
        if candidate.name == name and (candidate / "__init__.py").is_file():
            return candidate.resolve()
    raise UserError(
        f"no package {name} in {root}: looked for {root}/src/{name}, {root}/{name} and {root} itself.\n"
        "--root takes a checkout, a site-packages folder or the package's own folder."
    )
