"""An encoder as a user may have written it, in plain PyTorch, and its checkpoint."""

import importlib.util
from pathlib import Path

import torch
from safetensors.torch import save_file

from checkpoints import write_json
from grafts import PREPROCESSORS, SIZE, draw

CODE = '''
import torch
from torch import nn


class Encoder(nn.Module):
    """A class token and, for each patch, what a convolution and one layer of attention see."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.patches = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.register_buffer("scale", torch.tensor([float(config.scale)]), persistent=False)
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)

    def forward(self, pixel_values):
        tokens = self.patches(pixel_values).flatten(2).transpose(1, 2) * self.scale
        return self.layer(torch.cat((self.first.expand(len(tokens), -1, -1), tokens), dim=1))
'''
CONFIG = {"hidden_size": 24, "patch_size": 14, "image_size": SIZE, "scale": 3}


def load(code: Path, config: dict = CONFIG):
    from types import SimpleNamespace

    spec = importlib.util.spec_from_file_location("users_own", code)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Encoder(SimpleNamespace(**config)).eval()


def make(folder: Path, code: str = CODE, config: dict = CONFIG) -> tuple[Path, Path]:
    """(its checkpoint, the file with its code)."""
    folder.mkdir(parents=True)
    (folder / "my_encoder.py").write_text(code, encoding="utf-8")
    (folder / "weights").mkdir()
    try:
        encoder = load(folder / "my_encoder.py", config)
        draw(encoder, seed=5)
        save_file(encoder.state_dict(), folder / "weights/model.safetensors", metadata={"format": "pt"})
    except (AttributeError, TypeError):  # of a test of wrong code
        save_file({"patches.bias": torch.zeros(2)}, folder / "weights/model.safetensors", metadata={"format": "pt"})
    write_json(folder / "weights/config.json", config)
    write_json(folder / "weights/preprocessor_config.json", PREPROCESSORS["dinov2"])
    return folder / "weights", folder / "my_encoder.py"
