"""The tiny world as data sets: the names that the recipes ask for, in the record format that they read.

Parquet with `messages` (a list of {role, content}) and `images` (a list of Hugging Face `Image`: bytes inside the
file), one folder a set, and a `dataset_info.json` whose entries are the kit's own. So a recipe needs another
`dataset_dir` and nothing else.

    python -m qwen_merge.demo.records DIR
"""

import json
import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from qwen_merge.demo.language import (
    CAPTION_REQUESTS,
    NO_THINKING,
    OCR_REQUEST,
    TOPICS,
    as_examined,
    caption,
    exchange,
)
from qwen_merge.demo.world import KINDS, SHOWN_MOST, Scene, Stream, png
from qwen_merge.errors import UserError

IMAGE = "<image>\n"  # LLaMA-Factory's placeholder; the first user turn opens with it
ROWS = {
    "LLaVA_ReCap_558K": 3000,
    "LLaVA_ReCap_CC12M": 3000,
    "LLaVA_ReCap_CC3M": 2000,
    "synthdog_zh": 1000,
    "synthdog_en": 1000,
    "text2image": 1200,
    "image_thinking": 4800,
}
ROWS_OF_EACH_ONEVISION_SET = 120
EXAMINED = (0.2, 0.15)  # of the questions: how many with options, how many with a request to be short

Messages = list[dict[str, str]]


def turns(*contents: str) -> Messages:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def captioned(scene: Scene, pick: random.Random) -> Messages:
    return turns(IMAGE + pick.choice(CAPTION_REQUESTS), caption(scene))


def read_aloud(language: str) -> Callable[[Scene, random.Random], Messages]:
    return lambda scene, _: turns(IMAGE + OCR_REQUEST[language], scene.text)


def questioned(scene: Scene, pick: random.Random) -> Messages:
    """One short question, or one after the other about the same picture; now and then a request for a caption."""
    if pick.random() < 0.1:
        return captioned(scene, pick)
    topics = list(TOPICS[scene.kind])
    pick.shuffle(topics)
    if pick.random() < 0.75:
        topics = topics[:1]
    contents = []
    for topic in topics:
        spoken = as_examined(exchange(scene, topic, pick), pick, *EXAMINED)
        contents += [spoken.question, spoken.answer]
    contents[0] = IMAGE + contents[0]
    return turns(*contents)


def thought_over(scene: Scene, pick: random.Random) -> Messages:
    """A question with a thinking answer; every fifth is told not to think and gets the bare answer."""
    spoken = as_examined(exchange(scene, pick.choice(TOPICS[scene.kind]), pick), pick, *EXAMINED)
    if pick.random() < 0.2:
        return turns(IMAGE + spoken.question + NO_THINKING, spoken.answer)
    return turns(IMAGE + spoken.question, spoken.thinking_answer)


def question_in_picture(scene: Scene, pick: random.Random) -> Messages:
    """As text2image: the question stands in the picture, thinking or, half of the time, not."""
    spoken = exchange(scene, "sum", pick)
    if pick.random() < 0.5:
        return turns(IMAGE + spoken.question + NO_THINKING, spoken.answer)
    return turns(IMAGE + spoken.question, spoken.thinking_answer)


def content_of(name: str) -> tuple[tuple[str, ...], Callable[[Scene, random.Random], Messages]]:
    """The kinds of scenes of a data set and how they are spoken of."""
    if name.startswith("LLaVA_ReCap"):
        return KINDS + SHOWN_MOST, captioned
    if name.startswith("synthdog"):
        return ("number", "word", "sum"), read_aloud(name.removeprefix("synthdog_"))
    if name == "text2image":
        return ("sum",), question_in_picture
    # What a sum amounts to is asked in stage 3 only.
    kinds = tuple(kind for kind in KINDS + SHOWN_MOST if kind != "sum")
    return kinds, thought_over if name == "image_thinking" else questioned


def rows_of(name: str, count: int, seed: int = 0) -> list[dict]:
    """`count` records of the data set `name`; its pictures come from a stream of its own."""
    kinds, speak = content_of(name)
    stream = Stream(name, seed)
    rows = []
    for _ in range(count):
        scene = stream.scene(stream.random.choice(kinds))
        image = {"bytes": png(stream.drawing(scene)), "path": None}
        rows.append({"messages": speak(scene, stream.random), "images": [image]})
    return rows


def write(
    folder: Path,
    dataset_info: Path,
    names: list[str],
    seed: int = 0,
    counts: Mapping[str, int] = MappingProxyType(ROWS),
) -> int:
    """Write the sets `names` and a dataset_info.json to `folder`; returns the number of rows.

    counts: rows of a set; those that are not in it have `ROWS_OF_EACH_ONEVISION_SET`.

    Raises:
        UserError: a recipe names a set that the kit's dataset_info.json lacks.
    """
    from datasets import Dataset, Features, Image, Value, disable_progress_bars

    disable_progress_bars()
    known = json.loads(dataset_info.read_text())
    if unknown := [f"{name}: not in {dataset_info}" for name in names if name not in known]:
        raise UserError.from_list("the recipes name data sets that are not described:", unknown)
    features = Features(
        {"messages": [{"role": Value("string"), "content": Value("string")}], "images": [Image(decode=False)]}
    )
    total = 0
    for name in names:
        rows = rows_of(name, counts.get(name, ROWS_OF_EACH_ONEVISION_SET), seed)
        target = folder / known[name]["file_name"]
        target.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows, features=features).to_parquet(target / "part-00000.parquet")
        total += len(rows)
    described = {name: known[name] for name in names}
    (folder / "dataset_info.json").write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n")
    return total


def names_in(recipes: list[Path]) -> list[str]:
    """The data sets that the recipes name, each once."""
    import yaml

    names: dict[str, None] = {}
    for recipe in recipes:
        names.update({name.strip(): None for name in yaml.safe_load(recipe.read_text())["dataset"].split(",")})
    return list(names)


def main(argv: list[str]) -> int:
    from qwen_merge.demo.stages import DATASET_INFO, STAGES, root

    if len(argv) not in (1, 2):
        raise UserError("usage: python -m qwen_merge.demo.records DIR [SEED]")
    names = names_in([root() / stage.recipe for stage in STAGES])
    seed = int(argv[1]) if len(argv) == 2 else 0
    rows = write(Path(argv[0]), root() / DATASET_INFO, names, seed)
    print(f"{rows} records in {len(names)} data sets")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
