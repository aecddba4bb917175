"""`graft.yaml`: what is joined to what. Read and checked as a whole, before a source is opened.

    vision:    {source: google/siglip2-so400m-patch16-384}
    projector: {kind: mlp, merge_size: 2}
    llm:       {source: Qwen/Qwen3-4B}
    positions: mrope
    output:    my-vlm-base

Every key but `source`, `kind` and `output` has a default; an unknown one is an error.
"""

import math
import os
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

import yaml

from qwen_merge.architecture import kinds_qwen_merge_graft as kinds
from qwen_merge.errors import UserError

PIXELS = (56 * 56, 512 * 512)  # as training's image_max_pixels
POSITIONS = (*kinds.POSITIONS, "mrope-2d")
STOCK = "qwen2_5_vl"
_SPELLING = re.compile(r"""[^\s"'{}\\]+""")  # it stands in a template's strings
_TYPES = {bool: "true or false", int: "a whole number", str: "a text", type(None): "null"}
_TURNS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")  # of Qwen's conversations
ARCHITECTURES = ("qwen_merge_graft", STOCK)


@dataclass(frozen=True)
class Vision:
    """The tower.

    layer: whose output is taken (-1: the tower's result). frozen: it does not train unless a trainer says so.
    resolution: "native" any size, "fixed" the tower's own, "interpolated" any size for a tower with one.
    min_pixels, max_pixels: of a picture of any size (default: `PIXELS`).
    code: the file of a user's own encoder, whose weights are the source's (`own_encoder.py`); in a file it is named
    from the folder of that file on.
    deepstack: whether Qwen3-VL's tower adds what it saw on the way to the LLM's first layers; null: with projector own.
    """

    source: str
    revision: str | None = None
    layer: int = -1
    frozen: bool = True
    resolution: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    deepstack: bool | None = None
    code: str | None = None


@dataclass(frozen=True)
class LLM:
    source: str
    revision: str | None = None


@dataclass(frozen=True)
class Tokens:
    """How the tokenizer spells what stands for pictures; what it lacks is added to it."""

    image: str = "<|image_pad|>"
    video: str = "<|video_pad|>"
    vision_start: str = "<|vision_start|>"
    vision_end: str = "<|vision_end|>"


@dataclass(frozen=True)
class Recipe:
    """A whole file. projector: `kind` and its settings. architecture: the result's `model_type` (`stock.py`)."""

    vision: Vision
    projector: dict[str, Any]
    llm: LLM
    output: Path
    positions: str = "mrope"
    mrope_section: tuple[int, int, int] | None = None
    tokens: Tokens = field(default_factory=Tokens)
    seed: int = 42
    max_shard_size: str = "5GB"
    architecture: str = ARCHITECTURES[0]


def pixels(vision: Vision) -> tuple[int, int]:
    """The fewest and the most of a picture of any size."""
    least, most = PIXELS
    return (
        least if vision.min_pixels is None else vision.min_pixels,
        most if vision.max_pixels is None else vision.max_pixels,
    )


def read(path: Path) -> Recipe:
    """The recipe in a file.

    Raises:
        UserError: all that is wrong with it, in one message.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (
        OSError,
        ValueError,
        RecursionError,
        yaml.YAMLError,
    ) as error:  # ValueError: a date that is none
        raise UserError(f"{path} cannot be read as YAML: {error}") from None
    problems: list[str] = []
    recipe = _recipe(content, path, problems)
    if recipe is None:
        raise UserError.from_list(f"{path} is no graft that can be made:", problems)
    return recipe


def _recipe(content: Any, path: Path, problems: list[str]) -> Recipe | None:
    if not isinstance(content, dict):
        problems.append(f"it holds {type(content).__name__}; expected vision, projector, llm and output")
        return None
    known = [item.name for item in fields(Recipe)]
    problems += [f"unknown key {name!r}; expected any of {', '.join(known)}" for name in content if name not in known]
    vision = _part(Vision, content.get("vision"), "vision", problems)
    llm = _part(LLM, content.get("llm"), "llm", problems)
    tokens = _part(Tokens, content.get("tokens", {}), "tokens", problems)
    projector = _projector(content.get("projector"), problems)
    output = content.get("output")
    if not isinstance(output, str) or not output or "\0" in output:
        seen = f"is {output!r}" if "output" in content else "is missing"
        problems.append(f"output {seen}; expected the path of a new directory")
    positions, section = content.get("positions", "mrope"), content.get("mrope_section")
    architecture = content.get("architecture", ARCHITECTURES[0])
    if architecture not in ARCHITECTURES:
        problems.append(f"architecture is {architecture!r}; expected one of {', '.join(ARCHITECTURES)}")
    if positions not in POSITIONS:
        problems.append(f"positions is {positions!r}; expected one of {', '.join(POSITIONS)}")
    if section is not None:
        numbers = isinstance(section, list) and len(section) == 3 and all(type(n) is int and n >= 0 for n in section)
        if not numbers or positions != "mrope":
            problems.append(f"mrope_section is {section!r}; expected time, height and width, with positions: mrope")
    seed, size = content.get("seed", 42), content.get("max_shard_size", "5GB")
    if type(seed) is not int or not 0 <= seed < 2**64:
        problems.append(f"seed is {seed!r}; expected a number from 0 to 2**64 - 1")
    if vision is not None:
        problems += _vision_problems(vision)
    if tokens is not None:
        problems += _token_problems(tokens)
    if problems or vision is None or llm is None or tokens is None:
        return None
    section = tuple(section) if section is not None else None
    if vision.code is not None:
        vision = replace(vision, code=str(path.parent / os.path.expanduser(vision.code)))
    output = Path(os.path.expanduser(str(output)))
    return Recipe(vision, projector, llm, output, positions, section, tokens, seed, str(size), architecture)


def _vision_problems(vision: Vision) -> list[str]:
    problems, (least, most) = [], pixels(vision)
    if vision.resolution not in (None, "native", "fixed", "interpolated"):
        problems.append(f"vision.resolution is {vision.resolution!r}; expected native, fixed or interpolated")
    if not 0 < least <= most:
        problems.append(f"vision.min_pixels is {least} and max_pixels {most}; expected 0 < min_pixels <= max_pixels")
    return problems


def _token_problems(tokens: Tokens) -> list[str]:
    problems = [
        f"tokens.{name} is {spelling!r}; expected a token of its own such as {vars(Tokens())[name]!r}, without blanks, "
        "quotes, braces and backslashes, and not one that begins or ends a turn"
        for name, spelling in vars(tokens).items()
        if not _SPELLING.fullmatch(spelling) or spelling in _TURNS
    ]
    if len(set(vars(tokens).values())) < len(vars(tokens)):
        problems.append(f"tokens are {', '.join(vars(tokens).values())}; expected four different ones")
    return problems


def _part(kind: type, content: Any, name: str, problems: list[str]) -> Any:
    """A section as its dataclass, without what is wrong with it: the rest is checked all the same. None: no section."""
    if not isinstance(content, dict):
        seen = "is missing" if content is None else f"is {content!r}"
        problems.append(f"{name} {seen}; expected a section with {', '.join(f.name for f in fields(kind))}")
        return None
    known, sound = {item.name: item for item in fields(kind)}, {}
    for key, value in content.items():
        if key not in known:
            problems.append(f"unknown key {name}.{key}; expected any of {', '.join(known)}")
            continue
        declared: Any = known[key].type
        allowed = tuple(part for part in (get_args(declared) or (declared,)))
        if type(value) not in allowed:
            wanted = " or ".join(_TYPES[part] for part in allowed)
            problems.append(f"{name}.{key} is {value!r}; expected {wanted}")
            continue
        sound[key] = value
    if "source" in known and "source" not in content:
        problems.append(f"{name}.source is missing; expected a directory or a hub id")
    if "source" in known:
        sound.setdefault("source", "")
    return kind(**sound)


def _projector(content: Any, problems: list[str]) -> dict[str, Any]:
    if not isinstance(content, dict):
        seen = "is missing" if content is None else f"is {content!r}"
        problems.append(f"projector {seen}; expected a section with kind, one of {', '.join(kinds.PROJECTORS)}")
        return {}
    kind = content.get("kind")
    if isinstance(kind, str) and kind in kinds.PROJECTORS:
        settings, whose = kinds.PROJECTORS[kind], f" for kind {kind}"
    else:  # what no kind knows is wrong all the same
        seen = f"is {kind!r}" if "kind" in content else "is missing"
        problems.append(f"projector.kind {seen}; expected one of {', '.join(kinds.PROJECTORS)}")
        settings, whose = {name: least for each in kinds.PROJECTORS.values() for name, least in each.items()}, ""
    for key, value in content.items():
        if key == "kind":
            continue
        if key not in settings:
            expected = f"any of {', '.join(settings)}" if settings else "none"
            problems.append(f"unknown key projector.{key}{whose}; expected {expected}")
        elif type(value) is not int or value < settings[key]:
            problems.append(f"projector.{key} is {value!r}; expected a whole number from {settings[key]} on")
    queries = content.get("queries", kinds.QUERIES)
    if kind == "resampler" and type(queries) is int and queries > 0 and math.isqrt(queries) ** 2 != queries:
        problems.append(f"projector.queries is {queries}; expected a square number, whose root lies on each side")
    return dict(content)
