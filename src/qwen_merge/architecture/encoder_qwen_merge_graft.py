"""A user's own encoder in a graft: where `graft.yaml` says `vision: {code: FILE}`, FILE stands in this file's place.

It has a class `Encoder`, any `torch.nn.Module`, that is made of the fields of its `config.json` and called with
pictures:

    Encoder(config)                 config.hidden_size, .patch_size, .image_size, and whatever else config.json says
    forward(pixel_values)           (batch, channels, height, width) -> (batch, tokens, hidden_size)

The last tokens are those of the patches, row by row, one for each `patch_size` x `patch_size` pixels; what comes before
them (a class token) is left behind.
"""

from typing import Any

Encoder: Any = None  # in every other graft

__all__ = ["Encoder"]
