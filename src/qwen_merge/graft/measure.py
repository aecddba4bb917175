"""What a graft costs its LLM: both read one text, and their next-token predictions are compared.

    qwen-merge graft graft.yaml --measure novel.txt

A graft of the kit's own architecture computes what the LLM does (loss and divergence 0); one under the stock
architecture does not (`stock.py`). The models are loaded one after the other, in their own dtype, so it takes the
memory of the larger one; on a GPU if there is one.
"""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_merge.errors import UserError
from qwen_merge.graft.llms import class_of
from qwen_merge.merger.sources import Source

WINDOW = 512  # tokens that are read at once
MOST = 1024  # tokens of a text that are taken; the LLM's predictions for all of them are kept
# Prose, arithmetic, a program and Chinese, none of it from a data set.
TEXT = """\
A bridge does not stand because its stones are strong. It stands because each stone, as it tries to fall, is pushed \
by its neighbours, and pushes them in turn. Take one away and the whole arch comes down; put it back and nothing \
moves for a thousand years. The builders knew this long before anybody could calculate it. They set up a frame of \
wood, laid the stones upon it from both sides, drove in the last one at the top, and only then took the frame away.

The capital of France is Paris, the capital of Japan is Tokyo, and the capital of Kenya is Nairobi. Water boils at \
100 degrees Celsius at sea level. A week has seven days, so three weeks have twenty-one days. If a train leaves at \
9:15 and the journey takes two hours and thirty minutes, it arrives at 11:45. 12 * 12 = 144, 144 / 6 = 24, 24 + 18 = \
42.

def average(values):
    \"\"\"The mean of a list of numbers.\"\"\"
    if not values:
        raise ValueError("no values")
    total = 0
    for value in values:
        total += value
    return total / len(values)

Question: Why is the sky blue?
Answer: Sunlight is a mixture of all colours. The air scatters blue light much more than red light, so blue light \
reaches our eyes from every part of the sky.

春天来了，河边的柳树发芽了。孩子们在草地上放风筝，老人们坐在长椅上晒太阳。水是由氢和氧组成的，在零度结冰，在一百度沸腾。
"""


@dataclass(frozen=True)
class Measured:
    """tokens: how many were predicted. llm, graft: mean cross-entropy, nats a token. divergence: mean KL(LLM || graft),
    nats a token."""

    tokens: int
    llm: float
    graft: float
    divergence: float

    def __str__(self) -> str:
        return (
            f"text of {self.tokens} tokens: loss {self.graft:.4f} nats a token, the LLM's {self.llm:.4f} "
            f"({self.graft - self.llm:+.4f}); KL divergence from the LLM {self.divergence:.4f}"
        )


def read_text(path: Path | None) -> str:
    """The file's text, or the built-in one.

    Raises:
        UserError: it cannot be read.
    """
    if path is None:
        return TEXT
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--measure {path} cannot be read as UTF-8 text: {error}") from None


def measure(graft: Path, llm: Source, text: str = TEXT) -> Measured:
    """Compare a graft with the LLM that it was made of, on a text's first `MOST` tokens.

    Raises:
        UserError: a text of fewer than two tokens, or an LLM that this transformers cannot load by itself.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    from qwen_merge.architecture import register
    from qwen_merge.merger.verify_forward import local_directory, quiet

    register()
    numbers = AutoTokenizer.from_pretrained(graft)(text, add_special_tokens=False)["input_ids"][: MOST + 1]
    if len(numbers) < 2:
        raise UserError(f"--measure: the text has {len(numbers)} tokens; expected at least 2, better {MOST}.")
    windows = [torch.tensor(numbers[at : at + WINDOW + 1])[None] for at in range(0, len(numbers) - 1, WINDOW)]
    with quiet():
        own = _predictions(class_of(llm), local_directory(llm), windows)
        # Of the LLM's words: rows for new tokens it has none to compare with.
        grafted = _predictions(AutoModelForImageTextToText, graft, windows, own.shape[1])
    targets = torch.cat([window[0, 1:] for window in windows])
    llm_loss, graft_loss = (-values.gather(1, targets[:, None]).mean().item() for values in (own, grafted))
    divergence = torch.nn.functional.kl_div(grafted, own, reduction="batchmean", log_target=True).item()
    return Measured(len(targets), llm_loss, graft_loss, divergence)


def _predictions(kind: Any, directory: Path, windows: list, words: int | None = None) -> Any:
    """Logarithms of the next token's probabilities, (tokens of all windows, vocabulary), float32, on the CPU.

    words: so many of the vocabulary; None: all.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = kind.from_pretrained(directory, torch_dtype="auto", attn_implementation="sdpa").eval().to(device)
    with torch.no_grad():
        parts = [
            model(input_ids=window[:, :-1].to(device)).logits[0, :, :words].float().log_softmax(-1).cpu()
            for window in windows
        ]
    del model
    gc.collect()
    return torch.cat(parts)
