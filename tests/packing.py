"""Samples with pictures, videos and text, alone and in one row, for tests on CPUs and GPUs."""

import torch

# Pictures and videos of each sample, (frames, height, width) in patches; and how many words it has.
SAMPLES = (
    ([(1, 4, 6)], [], 7),
    ([], [], 11),
    ([(1, 2, 2), (1, 10, 4)], [], 5),
    ([], [(2, 4, 4)], 9),
    ([(1, 6, 6)], [(3, 2, 4)], 3),
    ([], [], 1),
)


def alone(model, seed: int, pictures: list, videos: list, words: int) -> dict[str, torch.Tensor]:
    """One sample as a trainer's collator gives it, a label on each word."""
    config, dice = model.config, torch.Generator().manual_seed(seed)
    ids: list[int] = []
    for grids, token in ((pictures, config.image_token_id), (videos, config.video_token_id)):
        for frames, height, width in grids:
            ids += [config.vision_start_token_id, *[token] * (frames * height * width // 4)]
    text = torch.randint(0, 300, (words,), generator=dice).tolist()
    batch = {"input_ids": torch.tensor([ids + text]), "labels": torch.tensor([[-100] * len(ids) + text])}
    batch["labels"][0, 0] = -100  # nothing stands before it
    for name, grids in (("image_grid_thw", pictures), ("video_grid_thw", videos)):
        if grids:
            batch[name] = torch.tensor(grids)
            pixels = "pixel_values" if name == "image_grid_thw" else "pixel_values_videos"
            batch[pixels] = torch.randn(int(batch[name].prod(1).sum()), 3 * 2 * 14 * 14, generator=dice)
    positions, _ = model.model.get_rope_index(
        batch["input_ids"], batch.get("image_grid_thw"), batch.get("video_grid_thw"), None
    )
    return {**batch, "position_ids": positions}


def packed(samples: list[dict]) -> dict:
    lengths = [sample["input_ids"].shape[1] for sample in samples]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    batch = {name: torch.cat([s[name] for s in samples], -1) for name in ("input_ids", "labels", "position_ids")}
    for name in ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw"):
        batch[name] = torch.cat([sample[name] for sample in samples if name in sample])
    return {**batch, **{f"cu_seq_lens_{x}": ends for x in "qk"}, **{f"max_length_{x}": max(lengths) for x in "qk"}}


def known(model, row: dict) -> dict:
    """What this kit's collator says of a row beside the batch itself."""
    ids, labels = row["input_ids"][0], row["labels"][0]
    tokens = (model.config.image_token_id, model.config.video_token_id)
    return {
        "samples": row["cu_seq_lens_q"].diff().tolist(),
        "grids": [*row["image_grid_thw"].tolist(), *row["video_grid_thw"].tolist()],
        "features": torch.cat([(ids == token).nonzero().squeeze(1) for token in tokens]),
        "labelled": (labels[1:] != -100).nonzero().squeeze(1),
    }


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def distance(one: dict, other: dict) -> float:
    """The largest difference of a gradient, in units of that gradient."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).norm() / other[name].norm().clamp(min=1e-3)) for name in one)


def trajectory(model, steps: int = 50) -> torch.Tensor:
    """The losses of a training on five rows of samples in turns, (steps,)."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    samples = [[alone(model, 100 * row + i, *sample) for i, sample in enumerate(SAMPLES)] for row in range(5)]
    rows = [{n: x.to(model.device) if torch.is_tensor(x) else x for n, x in packed(row).items()} for row in samples]
    found = []
    for step in range(steps):
        row = rows[step % len(rows)]
        loss = model(**row, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found)


def apart(losses: torch.Tensor, others: torch.Tensor) -> float:
    """The mean difference of two trajectories."""
    return float((losses - others).abs().mean())
