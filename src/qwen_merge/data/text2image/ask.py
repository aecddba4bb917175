"""Ask a teacher: each question in thinking mode, and every other one, drawn by its hash, also without thinking.

    qwen-merge data text2image ask --endpoint http://localhost:8000/v1 --endpoint http://localhost:8001/v1

Answers are appended to <output>/text2image.answers/answers.jsonl as they come. A restart asks only for what is missing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_merge.data.counts import Counts
from qwen_merge.data.teacher.answers import AnswerFile, Request, Summary
from qwen_merge.data.teacher.judge import NO_THINK
from qwen_merge.data.teacher.steps import Servers, decontaminate_option, evaluation_index, run_step
from qwen_merge.data.teacher.texts import seed_of, share_of
from qwen_merge.data.text2image import PLAIN, SET, THINKING
from qwen_merge.data.text2image.questions import Question, origins, read_questions

# Qwen3's own recommendations for the two modes; the temperatures are the recipe's too.
SAMPLING: dict[str, dict[str, Any]] = {
    THINKING: {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
    PLAIN: {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
}
COMMAND = "qwen-merge data text2image ask"


@dataclass
class AskOptions:
    """`plain_share`: how many of the questions are also asked without thinking; `share`: how many are asked at all."""

    output: Path
    sources: list[str] = field(default_factory=list)
    inputs: list[Path] = field(default_factory=list)
    limit: int | None = None
    share: float = 1.0
    plain_share: float = 0.5
    seed: int = 0
    decontaminate: list[Path] = field(default_factory=list)


def answers_folder(output: Path) -> Path:
    return Path(output) / f"{SET}.answers"


def answers_file(output: Path) -> AnswerFile:
    return AnswerFile(answers_folder(output), "answers")


def modes(question_id: str, plain_share: float, seed: int) -> tuple[str, ...]:
    """How a question is asked. Drawn from its hash: a restart draws the same."""
    return (THINKING, PLAIN) if share_of(seed, f"plain {question_id}") < plain_share else (THINKING,)


def request_of(question: Question, mode: str, servers: Servers, seed: int) -> Request:
    key = f"{question.id}-{mode}"
    text = question.text + (NO_THINK if mode == PLAIN else "")
    body = {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": servers.max_tokens,
        **SAMPLING[mode],
        "seed": seed_of(seed, key),
        **servers.extra_body,
    }
    kept = {"mode": mode, "source": question.source, "question": question.text, "reference": question.reference}
    return Request(key, body, kept)


def ask(options: AskOptions, servers: Servers, overwrite: bool = False) -> Summary | None:
    """Run the step; None when it was finished before.

    Raises:
        UserError: see origins() and run_step().
    """
    file = answers_file(options.output)
    found = origins(options.sources, options.inputs, {} if overwrite else _commits(file))
    index = evaluation_index(options.decontaminate)
    counts = Counts()

    def requests() -> Iterator[Request]:
        for question in read_questions(found, counts, options.limit, options.share, options.seed, index):
            counts.rows_out += 1
            for mode in modes(question.id, options.plain_share, options.seed):
                yield request_of(question, mode, servers, options.seed)

    recorded = {
        "input": [origin.recorded() for origin in found],
        "limit": options.limit,
        "share": options.share,
        "plain_share": options.plain_share,
        "seed": options.seed,
        "sampling": SAMPLING,
        "decontaminate": decontaminate_option(options.decontaminate),
    }
    return run_step(
        file,
        recorded,
        servers,
        requests,
        overwrite=overwrite,
        totals=lambda: {"questions": counts.to_json()},
    )


def _commits(file: AnswerFile) -> dict[str, str]:
    """The commits that the hub's sets were begun at: a restart goes on with those."""
    if not file.options_path.exists():
        return {}
    return {entry[0]: entry[1] for entry in file.options().get("input", []) if len(entry) == 2}
