"""The public sets as data: where each comes from, what its rows look like, and its name in dataset_info.json.

The distilled ones, which are made of the others and of a teacher's answers, are named here too, to be listed.

    qwen-merge data sets        prints them

A set can be named by its own name, by its configuration on the hub, or by a group: recap, synthdog, onevision.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from qwen_merge.errors import UserError

RECAP_MAXIMUM = 2_000_000  # rows a set, as published
SYNTHDOG_PIXELS = 50_000_000  # larger pages are dropped, as published
OPENABLE_PIXELS = 178_956_970  # above this PIL, and so LLaMA-Factory, refuses to open a picture

# The configurations of lmms-lab/LLaVA-OneVision-Data that hold pictures: the sets of stage 2.2, in its order.
ONEVISION = """
CLEVR-Math(MathV360K); FigureQA(MathV360K); GEOS(MathV360K); GeoQA+(MathV360K); Geometry3K(MathV360K);
IconQA(MathV360K); MapQA(MathV360K); MathV360K_TQA; MathV360K_VQA-AS; MathV360K_VQA-RAD; PMC-VQA(MathV360K);
Super-CLEVR(MathV360K); TabMWP(MathV360K); UniGeo(MathV360K); VisualWebInstruct(filtered); VizWiz(MathV360K);
ai2d(cauldron,llava_format); ai2d(gpt4v); ai2d(internvl); allava_instruct_laion4v; allava_instruct_vflan4v;
aokvqa(cauldron,llava_format); chart2text(cauldron); chartqa(cauldron,llava_format); chrome_writting;
clevr(cauldron,llava_format); diagram_image_to_text(cauldron); dvqa(cauldron,llava_format);
figureqa(cauldron,llava_format); geo170k(align); geo170k(qa); geo3k; geomverse(cauldron);
hateful_memes(cauldron,llava_format); hitab(cauldron,llava_format); hme100k; iam(cauldron);
iconqa(cauldron,llava_format); iiit5k; image_textualization(filtered); infographic(gpt4v); infographic_vqa;
infographic_vqa_llava_format; intergps(cauldron,llava_format); k12_printing; llava_wild_4v_12k_filtered;
llava_wild_4v_39k_filtered; llavar_gpt4_20k; lrv_chart; lrv_normal(filtered); mapqa(cauldron,llava_format);
mavis_math_metagen; mavis_math_rule_geo; multihiertt(cauldron); orand_car_a; raven(cauldron); rendered_text(cauldron);
robut_sqa(cauldron); robut_wikisql(cauldron); robut_wtq(cauldron,llava_format); scienceqa(cauldron,llava_format);
scienceqa(nona_context); screen2words(cauldron); sharegpt4o; sharegpt4v(coco); sharegpt4v(knowledge);
sharegpt4v(llava); sharegpt4v(sam); sroie; st_vqa(cauldron,llava_format); tabmwp(cauldron);
tallyqa(cauldron,llava_format); textcaps; textocr(gpt4v); tqa(cauldron,llava_format); ureader_cap; ureader_ie;
vision_flan(filtered); vistext(cauldron); visual7w(cauldron,llava_format); visualmrc(cauldron);
vqarad(cauldron,llava_format); vsr(cauldron,llava_format); websight(cauldron)
"""
# The other five of the 89: text only, so the rule "exactly one picture" leaves nothing of them.
ONEVISION_TEXT = """
Evol-Instruct-GPT4-Turbo; magpie_pro(l3_80b_mt); magpie_pro(l3_80b_st); magpie_pro(qwen2_72b_st); mathqa
"""


@dataclass(frozen=True)
class PublicSet:
    """One set. `kind`: "conversations" or "synthdog"; `maximum`: rows, None for all; `max_pixels`: of a picture."""

    name: str  # in dataset_info.json
    file_name: str  # the folder, there
    hub: str
    config: str | None
    kind: str
    group: str
    maximum: int | None = None
    max_pixels: int = OPENABLE_PIXELS
    instruction: str = ""  # SynthDoG's user turn
    split: str = "train"


def dataset_name(config: str) -> str:
    """A OneVision configuration's name in dataset_info.json."""
    return re.sub(r"[(), -]", "_", config).rstrip("_")


def configurations(text: str) -> list[str]:
    return [config.strip() for config in text.replace("\n", " ").split(";")]


def _recap(part: str) -> PublicSet:
    name = f"LLaVA_ReCap_{part}"
    hub = f"lmms-lab/LLaVA-ReCap-{part}"
    return PublicSet(name, name, hub, None, "conversations", "recap", RECAP_MAXIMUM)


def _synthdog(language: str, instruction: str) -> PublicSet:
    name = f"synthdog_{language}"
    hub = f"naver-clova-ix/synthdog-{language}"
    return PublicSet(name, name, hub, None, "synthdog", "synthdog", max_pixels=SYNTHDOG_PIXELS, instruction=instruction)


def _onevision(config: str) -> PublicSet:
    name = dataset_name(config)
    hub = "lmms-lab/LLaVA-OneVision-Data"
    return PublicSet(name, f"llavaonevision_converted/{name}", hub, config, "conversations", "onevision")


SETS = {
    entry.name: entry
    for entry in (
        _recap("558K"),
        _recap("CC3M"),
        _recap("CC12M"),
        _synthdog("en", "Read out all the text in this picture."),
        _synthdog("zh", "请读出这张图片中的所有文字。"),
        *map(_onevision, configurations(ONEVISION)),
        *map(_onevision, configurations(ONEVISION_TEXT)),
    )
}
GROUPS = ("recap", "synthdog", "onevision")
# What is distilled: the name, which is its folder's, and the command that makes it.
DISTILLED = {"text2image": "qwen-merge data text2image", "image_thinking": "qwen-merge data image-thinking"}


def find_sets(names: list[str]) -> list[PublicSet]:
    """The sets of these names, hub configurations, hub ids or groups, each once, in order.

    Raises:
        UserError: names that are none of them, all at once.
    """
    found: dict[str, PublicSet] = {}
    unknown = []
    for name in names:
        wanted = name.rstrip("/")
        matches = [
            entry
            for entry in SETS.values()
            if wanted in (entry.name, entry.config, entry.group) or (entry.config is None and wanted == entry.hub)
        ]
        found.update((entry.name, entry) for entry in matches)
        if not matches:
            unknown.append(f"{name!r}{_suggestion(name)}")
    if unknown:
        raise UserError.from_list(
            f"these are no sets; expected a name that `qwen-merge data sets` prints, or a group ({', '.join(GROUPS)}):",
            unknown,
        )
    return list(found.values())


def _suggestion(name: str) -> str:
    import difflib

    if name in DISTILLED:
        return f" (`{DISTILLED[name]}` makes it)"

    close = difflib.get_close_matches(name.lower(), [known.lower() for known in SETS], 1, 0.7)
    return f" (do you mean {next(known for known in SETS if known.lower() == close[0])}?)" if close else ""


def input_folder(given: Path, entry: PublicSet, several: bool) -> Path:
    """Where one set's files are under --input: <input>/<configuration or name> if there, else the input itself.

    Raises:
        UserError: this one has no folder of its own, and several sets are asked for, or other sets' folders are there.
    """
    candidates = _folders(entry)
    for name in candidates:
        if (given / name).is_dir():
            return given / name
    expected = f"expected one named {' or '.join(map(repr, candidates))}"
    if several:
        raise UserError(
            f"--input {given} has no folder for {entry.name}; {expected}. Convert one set at a time to name its files."
        )
    if given.is_dir():
        known = {name for other in SETS.values() for name in (*_folders(other), other.hub.split("/")[1])}
        others = sorted(folder.name for folder in given.iterdir() if folder.name in known and folder.is_dir())
        if others:
            raise UserError(
                f"--input {given} has no folder for {entry.name}, but those of other sets ({', '.join(others[:3])}"
                f"{' and more' if len(others) > 3 else ''}), whose rows are not wanted; {expected}. Or name this set's "
                "own folder or files."
            )
    return given


def _folders(entry: PublicSet) -> list[str]:
    """How a set's folder in a copy may be called."""
    return list(dict.fromkeys([entry.config or entry.hub.split("/")[1], entry.name]))


def describe(output: Path) -> str:
    """A line for each set: name, what lies in `output`, group, source, maximum."""
    lines = []
    for entry in SETS.values():
        source = f"{entry.hub}{f', {entry.config}' if entry.config else ''}"
        maximum = f"at most {entry.maximum:,} rows" if entry.maximum else ""
        lines.append((entry.name, _state(output / entry.file_name), entry.group, source, maximum))
    for name, command in DISTILLED.items():
        lines.append((name, _state(output / name), "distilled", f"made by `{command}`", ""))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, (*widths, 0), strict=True)).rstrip() for line in lines
    )


def _state(folder: Path) -> str:
    """What there is of a set: its rows, or how far it is."""
    from qwen_merge.data.manifest import Manifest

    manifest = folder.with_name(f"{folder.name}.manifest.json")
    if manifest.is_file():
        try:
            return f"{Manifest.read(manifest).counts.rows_out:,} rows"
        except UserError:
            return f"{manifest.name} is broken"
    begun = (folder.with_name(f".{folder.name}.working"), folder.with_name(f"{folder.name}.answers"))
    return "half done" if any(path.is_dir() for path in begun) else "-"
