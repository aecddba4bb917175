"""What is known of the checkpoints that a tower can come from, as data: where its tensors lie, and what is left behind.

A name that no row covers is an error for whoever plans the graft (`plan.py`).
"""

from collections import Counter
from dataclasses import dataclass

from qwen_merge.architecture.kinds_qwen_merge_graft import OF_THE_SOURCE
from qwen_merge.errors import UserError
from qwen_merge.graft.llms import Found
from qwen_merge.merger.sources import Source


@dataclass(frozen=True)
class Tower:
    """One family.

    sources: `model_type` of the checkpoints that hold it. kind: the tower's own. spellings: prefixes of its tensors,
    and what stands in their place behind `visual.`. merger: prefix of a patch merger, behind the spelling. deepstack:
    prefix of those of DeepStack. drops: prefixes that are left behind, and why. any_size: whether it was trained with
    pictures of all sizes.
    """

    kind: str
    sources: tuple[str, ...]
    spellings: tuple[tuple[str, str], ...]
    drops: tuple[tuple[str, str], ...] = ()
    merger: str | None = None
    deepstack: str | None = None
    any_size: bool = False


_OWN_TEXT = "the VLM's own text model"
_TEXT_TOWER = "the text tower"
_QWEN = {
    "spellings": (("model.visual.", ""), ("visual.", "")),
    "drops": (("model.", _OWN_TEXT), ("lm_head.", _OWN_TEXT)),
    "merger": "merger.",
    "any_size": True,
}
_TWO_TOWERS = (("text_model.", _TEXT_TOWER), ("text_projection.", _TEXT_TOWER), ("logit_", _TEXT_TOWER))

TOWERS = (
    Tower("qwen2_5_vl", ("qwen2_5_vl",), **_QWEN),  # type: ignore[arg-type]
    Tower("qwen2_vl", ("qwen2_vl",), **_QWEN),  # type: ignore[arg-type]
    Tower("qwen3_vl", ("qwen3_vl",), **_QWEN, deepstack="deepstack_merger_list."),  # type: ignore[arg-type]
    Tower(
        "clip_vision_model",
        ("clip", "clip_vision_model"),
        (("vision_model.", "vision_model."),),
        (
            *_TWO_TOWERS,
            ("visual_projection.", "the projection to one vector"),
            ("vision_model.embeddings.position_ids", "numbers that count up"),
        ),
    ),
    *(
        Tower(
            f"{name}_vision_model",
            (name, f"{name}_vision_model"),
            (("vision_model.", "vision_model."),),
            (*_TWO_TOWERS, ("vision_model.head.", "the head that pools to one vector")),
            any_size=any_size,
        )
        for name, any_size in (("siglip", False), ("siglip2", True))
    ),
    *(
        Tower(
            kind,
            (kind,),
            (("dinov2.", ""), ("dinov2_with_registers.", ""), ("", "")),
            (("classifier.", "the classifier"),),
        )
        for kind in ("dinov2", "dinov2_with_registers")
    ),
)


OWN = Tower("custom", (), (("", "encoder."),))  # a user's own encoder (`own_encoder.py`)


def tower_for(model_type: object) -> Tower | None:
    return next((tower for tower in TOWERS if model_type in tower.sources), None)


def mergers_of(tower: Tower, config) -> dict[str, str]:
    """Which of the source's patch mergers are taken over, and what they are called: prefix there -> prefix here.

    Those of DeepStack where the projector goes on with the source's own, and the LLM is as wide as what they give.
    """
    projector = config.projector_config
    if projector["kind"] not in OF_THE_SOURCE:
        return {}
    assert tower.merger is not None
    taken = {tower.merger: f"projector.first.{tower.merger}" if config.deepstack else f"projector.{tower.merger}"}
    if config.deepstack and tower.deepstack and projector["out_hidden_size"] == config.hidden_size:
        taken[tower.deepstack] = "projector.deepstack."
    return taken


def deepstack_note(tower: Tower, config, mergers: dict[str, str]) -> str:
    """What is to be said of DeepStack."""
    if not config.deepstack:
        return "DeepStack is off (vision.deepstack): the LLM gets the tower's result alone"
    origin = "copied" if tower.deepstack in mergers else "initialised"
    levels = config.vision_config.deepstack_visual_indexes
    return (
        f"DeepStack is on: what the tower has after its layers {', '.join(map(str, levels))} is added to the LLM's "
        f"first {len(levels)} layers; its patch mergers are {origin}"
    )


def of_the_tower(source: Source, tower: Tower, mergers: dict[str, str], dropped: Counter[str]) -> Found:
    """Its tensors. mergers: which of the patch mergers are taken over: prefix there -> prefix on the disk.

    Raises:
        UserError: one tensor under two names.
    """
    found = Found()

    def is_wanted(name: str) -> bool:
        return any(name.startswith(spelling) for spelling, _ in tower.spellings)

    for name, stored in source.read_tensors(is_wanted).items():
        spelling, stem = next((pair for pair in tower.spellings if name.startswith(pair[0])), (None, ""))
        drop = next((reason for prefix, reason in tower.drops if name.startswith(prefix)), None)
        if spelling is None or (drop and not (tower.merger and spelling)):
            dropped[drop or "not the tower's"] += 1
            continue
        target = stem + name[len(spelling) :]
        merger = next((m for m in (tower.merger, tower.deepstack) if m and target.startswith(m)), "")
        if merger and merger not in mergers:
            dropped["DeepStack's patch mergers" if merger == tower.deepstack else "the VLM's patch merger"] += 1
            continue
        own_name = mergers.get(merger, "visual.") + target.removeprefix(merger)
        if own_name in found:
            raise UserError(f"the tower's checkpoint has {target} twice, once as {name}. Copy or download it again.")
        found[own_name] = ("vlm", name, stored)
    return found
