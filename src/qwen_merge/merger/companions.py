"""The files beside the weights: tokenizer, chat template, preprocessors, generation settings, and the code.

The tokenizer and the generation settings are the LLM's, the preprocessor is the VLM's, the chat template is this kit's
(materials/chat_template.jinja: Qwen3's words with Qwen2.5-VL's picture placeholders). `--materials-path` overrides any
of them by a file of the same name.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qwen_merge.architecture import CODE_FILES
from qwen_merge.errors import UserError
from qwen_merge.merger.sources import Source

MATERIALS = Path(__file__).with_name("materials")
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
PREPROCESSOR = "preprocessor_config.json"
VIDEO_PREPROCESSOR = "video_preprocessor_config.json"
GENERATION = "generation_config.json"
OVERRIDABLE = (*TOKENIZER_FILES, CHAT_TEMPLATE, PREPROCESSOR, VIDEO_PREPROCESSOR, GENERATION)


@dataclass
class Companions:
    """files: name -> content. overridden: names that came from --materials-path. token_ids: the tokenizer's."""

    files: dict[str, bytes]
    overridden: list[str]
    token_ids: dict[str, int]
    notes: list[str] = field(default_factory=list)


def gather(vlm: Source, llm: Source, overrides: Mapping[str, bytes], code: Sequence[Path] = CODE_FILES) -> Companions:
    """Read and adapt all companion files. Writes nothing. overrides: as `read_materials` gives them.

    code: the modules that travel with the checkpoint.

    Raises:
        UserError: no tokenizer or preprocessor where one is expected.
    """
    companions = of_the_llm(llm, overrides)
    _set_preprocessors(companions.files, vlm, overrides)
    for name in sorted(companions.files):
        if name.endswith(".json") and name != "tokenizer.json":  # that was read for its tokens, and may be large
            decode(companions.files[name], name)
    for path in code:
        companions.files[path.name] = path.read_bytes()
    return companions


def of_the_llm(llm: Source, overrides: Mapping[str, bytes]) -> Companions:
    """Tokenizer, chat template and generation settings.

    Raises:
        UserError: no tokenizer where one is expected.
    """
    notes: list[str] = []
    files = {name: llm.path(name).read_bytes() for name in TOKENIZER_FILES if llm.has(name)}
    files.update({name: content for name, content in overrides.items() if name in TOKENIZER_FILES})
    if "tokenizer_config.json" not in files or not ({"tokenizer.json", "vocab.json"} & set(files)):
        raise UserError(
            f"the LLM {llm.name} has no tokenizer (tokenizer_config.json with tokenizer.json, or with vocab.json and "
            "merges.txt). Take a complete checkpoint, or put these files into the --materials-path directory."
        )
    token_ids = added_token_ids(files)
    _set_chat_template(files, overrides)
    if GENERATION in overrides:
        files[GENERATION] = overrides[GENERATION]
    elif llm.has(GENERATION):
        files[GENERATION] = llm.path(GENERATION).read_bytes()
    else:
        config = llm.read_json("config.json")
        known = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
        files[GENERATION] = encode(known)
        notes.append(f"the LLM has no {GENERATION}: wrote one with its token ids only, so generation is greedy")
    return Companions(files, sorted(overrides), token_ids, notes)


def read_materials(materials: Path | None) -> dict[str, bytes]:
    """Name -> content of the files in the --materials-path directory.

    Raises:
        UserError: it is no directory, or holds a file nobody would use.
    """
    if materials is None:
        return {}
    materials = Path(os.path.expanduser(materials))
    if not materials.is_dir():
        raise UserError(f"--materials-path {materials} is not a directory.")
    names = sorted(path.name for path in materials.iterdir() if not path.name.startswith("."))
    unknown = [name for name in names if name not in OVERRIDABLE]
    if unknown:
        raise UserError(
            f"--materials-path {materials} holds {', '.join(unknown)}, which a merge has no use for; expected any of "
            f"{', '.join(OVERRIDABLE)}. Move the others elsewhere."
        )
    if materials.resolve() == MATERIALS.resolve():
        return {}  # the kit's own: what is taken anyway is no override
    return {name: _read_material(materials / name) for name in names}


def _read_material(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        content.decode("utf-8")
    except OSError as error:
        raise UserError(f"--materials-path: {path} cannot be read ({error.strerror}); expected a file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--materials-path: {path} is not UTF-8 text ({error}). Save it as UTF-8.") from None
    return content


def _set_chat_template(files: dict[str, bytes], overrides: Mapping[str, bytes]) -> None:
    """One template, in both places where a library may look."""
    tokenizer_config = decode(files["tokenizer_config.json"], "tokenizer_config.json")
    if CHAT_TEMPLATE in overrides:
        template = overrides[CHAT_TEMPLATE].decode("utf-8")
    elif "tokenizer_config.json" in overrides and isinstance(tokenizer_config.get("chat_template"), str):
        template = tokenizer_config["chat_template"]
    else:
        template = (MATERIALS / CHAT_TEMPLATE).read_text(encoding="utf-8")
    files[CHAT_TEMPLATE] = template.encode()
    tokenizer_config["chat_template"] = template
    tokenizer_config.pop("auto_map", None)
    files["tokenizer_config.json"] = encode(tokenizer_config)


def _set_preprocessors(files: dict[str, bytes], vlm: Source, overrides: Mapping[str, bytes]) -> None:
    """The VLM's, with the names by which transformers 4.52 finds its classes for an architecture it does not know."""
    if PREPROCESSOR in overrides:
        image = decode(overrides[PREPROCESSOR], PREPROCESSOR)
        files[PREPROCESSOR] = overrides[PREPROCESSOR]
    else:
        image = vlm.read_json(PREPROCESSOR)
        image["processor_class"] = "Qwen2_5_VLProcessor"
        image["image_processor_type"] = "Qwen2VLImageProcessor"
        image["video_processor_type"] = "Qwen2VLVideoProcessor"
        files[PREPROCESSOR] = encode(image)
    if VIDEO_PREPROCESSOR in overrides:
        files[VIDEO_PREPROCESSOR] = overrides[VIDEO_PREPROCESSOR]
        return
    video = vlm.read_json(VIDEO_PREPROCESSOR) if vlm.has(VIDEO_PREPROCESSOR) else dict(image)
    video.pop("image_processor_type", None)
    video["processor_class"] = "Qwen2_5_VLProcessor"
    video["video_processor_type"] = "Qwen2VLVideoProcessor"
    files[VIDEO_PREPROCESSOR] = encode(video)


def patch_problems(files: dict[str, bytes], vision_config: dict) -> list[str]:
    """Where a preprocessor cuts pictures otherwise than the vision tower expects."""
    pairs = (
        ("patch_size", "patch_size"),
        ("temporal_patch_size", "temporal_patch_size"),
        ("merge_size", "spatial_merge_size"),
    )
    problems = []
    for name in (PREPROCESSOR, VIDEO_PREPROCESSOR):
        content = decode(files[name], name)
        problems += [
            f"{name}: {mine} is {content[mine]}, the VLM's vision_config has {theirs} {vision_config[theirs]}"
            for mine, theirs in pairs
            if mine in content and content[mine] != vision_config[theirs]
        ]
    return problems


def added_token_ids(files: dict[str, bytes]) -> dict[str, int]:
    """Ids of a tokenizer's added tokens by their text, from whichever of its files tells."""
    found: dict[str, int] = {}
    for name in ("added_tokens.json", "tokenizer_config.json", "tokenizer.json"):
        if name not in files:  # tokenizer.json is what transformers really loads: it has the last word
            continue
        content = decode(files[name], name)
        try:
            if name == "added_tokens.json":
                found.update({text: _number(number) for text, number in content.items()})
            elif name == "tokenizer_config.json":
                decoder = content.get("added_tokens_decoder") or {}
                found.update({entry["content"]: int(number) for number, entry in decoder.items()})
            else:
                found.update({entry["content"]: _number(entry["id"]) for entry in content.get("added_tokens") or ()})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{name}: its added tokens are not as a tokenizer writes them ({error!r}). Copy or download it again."
            ) from None
    return found


def _number(value: object) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no token's number")
    return value


def decode(content: bytes, name: str) -> dict:
    """Raises UserError when a file is no JSON object."""
    try:
        decoded = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not valid JSON ({error}). Copy or download it again.") from None
    if not isinstance(decoded, dict):
        raise UserError(f"{name} holds {type(decoded).__name__}; expected a JSON object. Copy or download it again.")
    return decoded


def encode(content: dict) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
