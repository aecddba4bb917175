"""The compatibility graft: Qwen2.5-VL's tower, a fresh patch merger and an LLM under the stock architecture.

    architecture: qwen2_5_vl

What it is for: tools that load no code of a checkpoint and know no plug-in. `Qwen2_5_VLForConditionalGeneration` loads
it anywhere. What it costs: that class has no q/k norms, so a Qwen3 loses them and its text suffers until training mends
it; `qwen-merge graft` measures by how much (`measure.py`). A Qwen2.5 loses nothing. The biases of q, k and v, which
that class has and Qwen3 lacks, are zeros.
"""

from collections import Counter
from types import SimpleNamespace

from qwen_merge.errors import UserError
from qwen_merge.graft import llms
from qwen_merge.graft import plan as planning
from qwen_merge.graft.recipe import STOCK, Recipe, Tokens, Vision
from qwen_merge.graft.towers import of_the_tower
from qwen_merge.merger import companions as companion_files
from qwen_merge.merger.configuration import RopeOptions, merged_config
from qwen_merge.merger.plan import MergePlan, settle_dtype

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
NORMS = (".self_attn.q_norm.weight", ".self_attn.k_norm.weight")
BIASES = tuple(f".self_attn.{name}_proj.bias" for name in "qkv")
NEW = ("visual.merger.", *BIASES)
# Fields that the stock class does not read: what they say would mislead whoever reads the file.
_NOT_CARRIED = ("auto_map", "head_dim", "attention_bias")


def check(recipe: Recipe, sources: planning.Sources) -> None:
    """Whether the stock architecture can hold this graft.

    Raises:
        UserError: all that it has no place for.
    """
    problems, llm = [], sources.llm_config
    parts = {
        "vision": (sources.tower.kind, ("qwen2_5_vl",)),
        "projector.kind": (recipe.projector["kind"], ("patch_merger",)),
        "llm": (llm["model_type"], ("qwen3", "qwen2")),
        "positions": (recipe.positions, ("mrope",)),
    }
    for name, (seen, wanted) in parts.items():
        if seen not in wanted:
            problems.append(f"{name} is {seen}; this architecture takes {' or '.join(wanted)}")
    if recipe.tokens != Tokens():
        problems.append("tokens: this architecture's processor spells them itself; leave them out")
    if recipe.vision.frozen != Vision("").frozen:
        problems.append("vision.frozen: this architecture has no such field; what trains is the trainer's word")
    hidden, heads = llm.get("hidden_size"), llm.get("num_attention_heads")
    if type(hidden) is not int or type(heads) is not int or heads < 1:
        problems.append(f"llm: hidden_size is {hidden!r} and num_attention_heads {heads!r}; expected whole numbers")
    elif (llm.get("head_dim") or hidden // heads) * heads != hidden:
        problems.append(
            f"llm: its heads are {llm.get('head_dim')} wide; this architecture makes them hidden_size / "
            f"num_attention_heads = {hidden} / {heads} = {hidden / heads:g} wide. Of Qwen3 1.7B, 8B and 14B fit, 0.6B, "
            "4B and 32B do not"
        )
    if problems:
        raise UserError.from_list(
            f"architecture {STOCK} cannot hold this graft (leave the key out for the kit's own, which can):", problems
        )


def draft(recipe: Recipe, sources: planning.Sources) -> tuple[MergePlan, companion_files.Companions]:
    """Plan it; reads configurations and headers only.

    Raises:
        UserError: whatever does not fit.
    """
    check(recipe, sources)
    companions = companion_files.gather(sources.vision, sources.llm, {}, code=())
    dropped: dict[str, Counter[str]] = {"vlm": Counter(), "llm": Counter()}
    merger = {"merger.": "projector.merger."}  # says how wide the tower is
    found = of_the_tower(sources.vision, sources.tower, merger, dropped["vlm"])
    config, notes = _config(recipe, sources, companions.token_ids, found)
    for name in [name for name in found if name.startswith("projector.")]:
        del found[name]
        dropped["vlm"]["the VLM's patch merger"] += 1
    tied, vision = config["tie_word_embeddings"], config["vision_config"]
    side = recipe.projector.get("merge_size", vision["spatial_merge_size"])
    problems = companion_files.patch_problems(companions.files, vision)
    if side != vision["spatial_merge_size"]:
        problems.append(f"projector.merge_size is {side}; the tower's is {vision['spatial_merge_size']}")
    if problems:
        raise UserError.from_list("this graft cannot be made:", problems)
    found.update(llms.of_the_llm(sources.llm, sources.llm_config["model_type"], tied, dropped["llm"], NORMS))
    planning.check_depth(SimpleNamespace(**config), SimpleNamespace(**vision), len(found))
    tensors = planning.joined(found, lambda: _meta_model(config), tied, NEW)
    plan = MergePlan(config, tensors, {role: dict(count) for role, count in dropped.items()}, notes)
    settle_dtype(plan)
    lost = dropped["llm"][llms.LEFT_OUT]
    if lost:
        plan.notes.append(
            f"architecture {STOCK} is for tools that load no other: it loads anywhere, and {lost} tensors of the LLM "
            "are left out (model.layers.*.self_attn.q_norm.weight and k_norm.weight), without which its text is worse "
            "until it was trained again. Without the key `architecture` nothing is lost"
        )
    plan.notes.extend(companions.notes)
    _set_pixels(recipe, companions)
    return plan, companions


def _config(
    recipe: Recipe, sources: planning.Sources, token_ids: dict[str, int], found: llms.Found
) -> tuple[dict, list[str]]:
    from qwen_merge.architecture.configuration_qwen_merge_graft import sections_of

    llm = {**sources.llm_config, "model_type": "qwen3"}  # of the fields that are read a Qwen2.5 has the same
    llm["head_dim"] = llm["hidden_size"] // llm["num_attention_heads"]
    time, height, width = recipe.mrope_section or sections_of(SimpleNamespace(head_dim=llm["head_dim"]), None)
    tower = {
        name.replace("projector.", "visual.", 1): stored for name, (_, _, stored) in found.items() if stored is not None
    }
    merged = merged_config(sources.vision_config, llm, tower, token_ids, RopeOptions((time, height, width)))
    fields = {name: value for name, value in merged.config.items() if name not in _NOT_CARRIED}
    vision = {**fields["vision_config"], "out_hidden_size": fields["hidden_size"]}
    vision.pop("out_hidden_size2")
    ours = {"architectures": [ARCHITECTURE], "model_type": STOCK, "vision_config": vision}
    unread = tuple(f"has no {name}:" for name in _NOT_CARRIED)
    return {**fields, **ours}, [note for note in merged.notes if not any(part in note for part in unread)]


def _meta_model(config: dict):
    """The stock class without weights."""
    import json

    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):  # a copy: transformers writes into the dicts that it is given
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**json.loads(json.dumps(config))))


def _set_pixels(recipe: Recipe, companions: companion_files.Companions) -> None:
    """The recipe's sizes of pictures where it names them; else the VLM's own."""
    import json

    named = {name: value for name in ("min_pixels", "max_pixels") if (value := getattr(recipe.vision, name))}
    if named:
        settings = {**json.loads(companions.files[companion_files.PREPROCESSOR]), **named}
        settings.pop("size", None)  # the newer spelling of the same bounds would win
        companions.files[companion_files.PREPROCESSOR] = companion_files.encode(settings)
