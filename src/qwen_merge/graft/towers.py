"""What is known of the checkpoints that a tower can come from, as data: where its tensors lie, and what is left behind.

A name that no row covers is an error for whoever plans the graft (`plan.py`).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tower:
    """One family.

    sources: `model_type` of the checkpoints that hold it. kind: the tower's own. spellings: prefixes of its tensors,
    and what stands in their place behind `visual.`. merger: prefix of a patch merger, behind the spelling. drops:
    prefixes that are left behind, and why.
    """

    kind: str
    sources: tuple[str, ...]
    spellings: tuple[tuple[str, str], ...]
    drops: tuple[tuple[str, str], ...] = ()
    merger: str | None = None

    @property
    def is_native(self) -> bool:
        return self.merger is not None


_OWN_TEXT = "the VLM's own text model"
_TEXT_TOWER = "the text tower"
_QWEN = {
    "spellings": (("model.visual.", ""), ("visual.", "")),
    "drops": (("model.", _OWN_TEXT), ("lm_head.", _OWN_TEXT)),
    "merger": "merger.",
}
_TWO_TOWERS = (("text_model.", _TEXT_TOWER), ("text_projection.", _TEXT_TOWER), ("logit_", _TEXT_TOWER))

TOWERS = (
    Tower("qwen2_5_vl", ("qwen2_5_vl",), **_QWEN),  # type: ignore[arg-type]
    Tower("qwen2_vl", ("qwen2_vl",), **_QWEN),  # type: ignore[arg-type]
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
    Tower(
        "siglip_vision_model",
        ("siglip", "siglip_vision_model"),
        (("vision_model.", "vision_model."),),
        (*_TWO_TOWERS, ("vision_model.head.", "the head that pools to one vector")),
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


def tower_for(model_type: object) -> Tower | None:
    return next((tower for tower in TOWERS if model_type in tower.sources), None)
