"""A user's own encoder, `vision: {source: DIR, code: FILE}`: its code, before it travels with the graft.

What FILE holds is said in `architecture/encoder_qwen_merge_graft.py`; DIR has config.json (hidden_size, patch_size,
image_size), safetensors of the encoder's own names, and the preprocessor_config.json of an image processor of
transformers. The code is run here, as whoever wrote the file asks for.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwen_merge.errors import UserError
from qwen_merge.merger.sources import Source

FILE = "encoder_qwen_merge_graft.py"


@contextmanager
def known(code: str | None, vision: Any) -> Iterator[None]:
    """While the graft's own class is asked for its tensors, it knows the encoder.

    vision: the tower's configuration, or its fields.

    Raises:
        UserError: the file cannot be imported, has no such class, or its pictures come out in another shape.
    """
    if code is None:
        yield
        return
    from qwen_merge.architecture.configuration_qwen_merge_graft import vision_config_of

    encoder = _encoder_of(Path(code))
    _check_shape(encoder, vision_config_of(vision) if isinstance(vision, dict) else vision, code)
    with _in_its_place(encoder):
        yield


@contextmanager
def stood_in_for(source: Source) -> Iterator[None]:
    """The same without its code: in its place is a module that has the source's tensors and computes nothing."""
    import torch
    from torch import nn

    class StandIn(nn.Module):
        def __init__(self, _):
            super().__init__()
            for name, stored in source.read_tensors().items():
                module, (*path, last) = self, name.split(".")
                for part in path:
                    if part not in module._modules:
                        module.add_module(part, nn.Module())
                    module = module.get_submodule(part)
                empty = torch.empty(stored.shape if stored else ())
                module.register_parameter(last, nn.Parameter(empty, requires_grad=False))

    with _in_its_place(StandIn):
        yield


@contextmanager
def _in_its_place(encoder: Any) -> Iterator[None]:
    from qwen_merge.architecture import towers_qwen_merge_graft as towers

    before, towers.Encoder = towers.Encoder, encoder
    try:
        yield
    finally:
        towers.Encoder = before


def _encoder_of(path: Path) -> Any:
    try:
        spec = importlib.util.spec_from_file_location("own_encoder", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.Encoder
    except Exception as error:  # whatever the user's code raises
        raise UserError(f"vision.code: {path} gives no Encoder: {type(error).__name__}: {error}") from None


def _check_shape(encoder: Any, vision: Any, code: str) -> None:
    """One picture without values, through an encoder without weights."""
    import torch

    side = vision.image_size // vision.patch_size
    try:
        with torch.device("meta"), torch.no_grad():
            pixels = torch.zeros(1, vision.num_channels, side * vision.patch_size, side * vision.patch_size)
            output = encoder(vision)(pixel_values=pixels)
        shape = tuple(getattr(output, "last_hidden_state", output).shape)
    except Exception as error:
        raise UserError(f"vision.code: {code} gives nothing for a picture: {type(error).__name__}: {error}") from None
    if len(shape) != 3 or shape[1] < side**2 or shape[2] != vision.hidden_size:
        raise UserError(
            f"vision.code: {code} gives {shape} for a picture of {side} x {side} patches; expected (1, {side**2} or "
            f"more tokens, the hidden_size {vision.hidden_size} of config.json)."
        )
