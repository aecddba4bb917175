"""Videos through a graft's processor: the patches, placeholders and numbers that the towers' own VLMs have."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2VLImageProcessor

import grafts
from grafts import pictures
from qwen_merge.architecture import register
from qwen_merge.architecture.projectors_qwen_merge_graft import in_units

register()

PROMPT = "<|vision_start|><|video_pad|><|vision_end|>And <|vision_start|><|image_pad|><|vision_end|>?"
TOWERS = [kind for kind in grafts.TOWERS if kind.startswith("qwen")]


def video(frames: int) -> list:
    return pictures(*[(128, 64)] * frames)


@pytest.mark.parametrize("tower", TOWERS)
@torch.no_grad()
def test_videos_and_pictures(graft, sources, tower):
    folder = graft(tower, "mlp", "qwen3", "mrope")
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    inputs = processor(
        text=[PROMPT + PROMPT], images=pictures((90, 60), (64, 64)), videos=[video(5), video(2)], return_tensors="pt"
    )
    grids = [tuple(grid) for grid in inputs["video_grid_thw"].tolist()]
    assert [grid[0] for grid in grids] == [3, 1]  # two frames a patch; the fifth stands twice
    for kind, name in (("image", "image_grid_thw"), ("video", "video_grid_thw")):
        found = (inputs["input_ids"] == getattr(model.config, f"{kind}_token_id")).sum()
        assert found == sum(model.config.tokens(grid) for grid in inputs[name].tolist())
    assert inputs["second_per_grid_ts"].tolist() == [1.0, 1.0]
    own = Qwen2VLImageProcessor.from_pretrained(sources / tower, min_pixels=56 * 56, max_pixels=512 * 512)
    pixels = own(images=None, videos=[video(5), video(2)], return_tensors="pt")
    assert torch.equal(pixels["video_grid_thw"], inputs["video_grid_thw"])
    assert torch.allclose(in_units(inputs["pixel_values_videos"], grids, 2), pixels["pixel_values_videos"], atol=1e-6)

    logits = model(**inputs).logits
    turned = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"].flip(0)}
    assert (model(**turned).logits - logits)[:, -1].abs().max() > 1e-6
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    whole = dict(inputs, input_ids=answer, attention_mask=torch.ones_like(answer))
    assert torch.equal(model(**whole).logits[0, -5:-1].argmax(-1), answer[0, -4:])


def test_a_video_alone_in_lists_and_as_an_array(graft):
    processor = AutoProcessor.from_pretrained(graft("qwen2_5_vl", "mlp", "qwen3", "mrope"))
    frames = video(4)
    array = np.stack([np.array(frame) for frame in frames])
    seen = [
        processor(videos=given)["pixel_values_videos"] for given in (frames, [frames], [[frames]], array, [[array]])
    ]
    assert all(np.array_equal(seen[0], other) for other in seen[1:])
    assert not np.array_equal(seen[0], processor(videos=frames[::-1])["pixel_values_videos"])  # the control


@pytest.mark.parametrize(("tower", "counts_seconds"), [("qwen2_5_vl", True), ("qwen2_vl", False)])
def test_seconds_are_counted_behind_qwen2_5_vls_tower(graft, sources, tower, counts_seconds):
    folder = graft(tower, "mlp", "qwen3", "mrope")
    model, processor = AutoModelForImageTextToText.from_pretrained(folder).model, AutoProcessor.from_pretrained(folder)
    own = AutoModelForImageTextToText.from_pretrained(sources / tower).model
    names = ("input_ids", "image_grid_thw", "video_grid_thw")
    times = []
    for fps in (1, 2):
        inputs = processor(text=[PROMPT], images=pictures((90, 60)), videos=[video(6)], fps=fps, return_tensors="pt")
        seconds = inputs["second_per_grid_ts"]
        positions, _ = model.get_rope_index(**{name: inputs[name] for name in names}, second_per_grid_ts=seconds)
        extra = {"second_per_grid_ts": seconds} if counts_seconds else {}
        assert torch.equal(positions, own.get_rope_index(**{name: inputs[name] for name in names}, **extra)[0])
        times.append(positions)
    assert torch.equal(*times) != counts_seconds


@pytest.mark.skipif(not grafts.HAS_QWEN3_VL, reason="Qwen3-VL needs transformers 4.57")
@torch.no_grad()
def test_a_qwen3_vl_sees_videos_as_itself(graft, sources):
    """Times before frames, as Qwen3-VL's own processor writes them, and its own logits."""
    from transformers import AutoTokenizer, Qwen3VLProcessor, Qwen3VLVideoProcessor

    folder = graft("qwen3_vl", "own", "qwen3_vl", "mrope")
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(text=[PROMPT], images=pictures((96, 64)), videos=[video(5)], fps=4, return_tensors="pt")
    settings = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    theirs = Qwen3VLProcessor(
        Qwen2VLImageProcessor.from_pretrained(sources / "qwen3_vl"),
        AutoTokenizer.from_pretrained(sources / "qwen3_vl"),
        Qwen3VLVideoProcessor(**settings, do_resize=False, do_sample_frames=False),
    )
    metadata = {"fps": 4, "total_num_frames": 5, "frames_indices": list(range(5))}
    expected = theirs(
        text=[PROMPT], images=pictures((96, 64)), videos=[video(5)], video_metadata=[metadata], return_tensors="pt"
    )
    assert processor.decode(inputs["input_ids"][0]).startswith("<0.1 seconds><|vision_start|><|video_pad|>")
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    model, own = (AutoModelForImageTextToText.from_pretrained(where).eval() for where in (folder, sources / "qwen3_vl"))
    logits = own(**{name: value for name, value in expected.items() if name != "mm_token_type_ids"}).logits
    assert torch.allclose(model(**inputs).logits, logits, atol=1e-4)
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].flip(0)  # the control
    assert not torch.allclose(model(**inputs).logits, logits, atol=1e-4)


@pytest.mark.parametrize(
    ("tower", "values", "message"),
    [
        ("siglip", {"videos": [[0]]}, "takes pictures and no videos: give a video's frames as images"),
        ("qwen2_5_vl", {"videos": [video(2), video(2)]}, r"the text has 1 <\|video_pad\|> and there are 2 videos"),
        ("qwen2_5_vl", {}, r"the text has 1 <\|video_pad\|> and there are 0 videos"),
        ("qwen2_5_vl", {"audio": [0]}, "no audio"),
    ],
)
def test_what_cannot_be_seen_is_refused(graft, tower, values, message):
    processor = AutoProcessor.from_pretrained(graft(tower, "mlp", "qwen3", "mrope"))
    with pytest.raises(ValueError, match=message):
        processor(text=[PROMPT], images=pictures((90, 60)), **values)
