"""The demo's page: loss curves as PNG and one HTML file that needs nothing beside it.

Pictures and curves are inlined, thoughts are folded, nothing is fetched: the page can be mailed.
"""

import base64
import html
import io
import json
from collections.abc import Iterable
from pathlib import Path

from qwen_merge.demo.answers import GOALS, right
from qwen_merge.demo.language import CHANCE
from qwen_merge.demo.world import png

PAGE = Path(__file__).with_name("page.html")
SMOOTHING = 0.9  # weight of the past in the bold line
WHAT_HAPPENS = {
    "base": "merged, nothing trained: the new layer is random",
    "stage1": "the projector learns from captions; ViT and LLM are frozen",
    "stage2.1": "projector and LLM learn from captions and from reading",
    "stage2.2": "projector and LLM learn from questions with short answers",
    "stage3": "projector and LLM learn from thinking answers",
}


def losses(log: Path) -> list[tuple[int, float]]:
    """(step, loss) of LLaMA-Factory's trainer_log.jsonl. A resumed run repeats steps; the last word counts."""
    points = {}
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        if "loss" in entry:
            points[entry["current_steps"]] = entry["loss"]
    return sorted(points.items())


def smoothed(values: Iterable[float]) -> list[float]:
    result: list[float] = []
    for value in values:
        result.append(value if not result else SMOOTHING * result[-1] + (1 - SMOOTHING) * value)
    return result


def draw_curves(logs: dict[str, Path]) -> bytes:
    """The loss of every stage over its steps, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(logs), 3.0), dpi=110, layout="constrained")
    for index, (name, log) in enumerate(logs.items()):
        steps, values = zip(*losses(log), strict=True)
        axes = figure.add_subplot(1, len(logs), index + 1)
        axes.plot(steps, values, color="#b8c7e0", linewidth=0.8)
        axes.plot(steps, smoothed(values), color="#1f4e9c", linewidth=1.6)
        axes.set_yscale("log")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        if index == 0:
            axes.set_ylabel("training loss", fontsize=8)
        axes.tick_params(labelsize=7, which="both")
        axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def inline(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def result_rows(results: dict[str, dict]) -> str:
    topics = list(CHANCE)
    last = list(results)[-1]

    def cells(values: dict[str, float], goals: bool = False) -> str:
        row = []
        for topic in topics:
            mark = ""
            if goals and topic in GOALS:
                mark = ' class="good"' if values[topic] >= GOALS[topic] else ' class="bad"'
            row.append(f"<td{mark}>{100 * values[topic]:.1f}</td>")
        return "".join(row)

    heads = "".join(f"<th>{topic}</th>" for topic in topics)
    lines = [f"<tr><th>after</th><th>caption loss</th><th>answer loss</th>{heads}</tr>"]
    for name, result in results.items():
        figures = f"<td>{result['caption_loss']:.3f}</td><td>{result['answer_loss']:.3f}</td>"
        label = f"<b>{name}</b> <small>{WHAT_HAPPENS[name]}</small>"
        lines.append(f"<tr><td>{label}</td>{figures}{cells(result['accuracy'], name == last)}</tr>")
    lines.append(f'<tr class="low"><td>chance</td><td></td><td></td>{cells(CHANCE)}</tr>')
    control = cells(results[last]["control"])
    lines.append(f'<tr class="low"><td>{last} with shuffled pictures</td><td></td><td></td>{control}</tr>')
    return "\n".join(lines)


def example_rows(results: dict[str, dict], seed: int) -> str:
    """One row a question: the picture, and what each checkpoint said to it."""
    from qwen_merge.demo.evaluation import Exam

    exam = Exam(seed)
    heads = "".join(f"<th>{name}</th>" for name in results)
    lines = [f"<tr><th>picture</th><th>question</th><th>truth</th>{heads}</tr>"]
    for index, example in enumerate(results["base"]["examples"]):
        question = exam.questions[example["picture"]]
        picture = inline(png(exam.pictures[question.picture]))
        cells = [
            f'<td><img src="{picture}" alt="held-out picture {question.picture}"></td>',
            f"<td>{html.escape(question.text)}</td><td>{html.escape(question.truth)}</td>",
        ]
        for result in results.values():
            said = result["examples"][index]
            mark = "good" if right(question, said["text"]) else "bad"
            thought = ""
            if said["thought"]:
                thought = f"<details><summary>thought</summary>{html.escape(said['thought'])}</details>"
            cells.append(f'<td class="{mark}">{thought}{html.escape(said["answer"]) or "&nbsp;"}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join(lines)


def write_report(
    folder: Path,
    results: dict[str, dict],
    logs: dict[str, Path],
    seconds: dict[str, float],
    missed: list[str],
    seed: int,
) -> None:
    """Write loss.png, results.json and report.html into `folder`."""
    curves = draw_curves(logs)
    (folder / "loss.png").write_bytes(curves)
    (folder / "results.json").write_text(
        json.dumps({"results": results, "chance": CHANCE, "seconds": seconds, "missed": missed}, indent=1) + "\n"
    )
    if missed:
        verdict = '<p class="bad">Missed:</p><ul>' + "".join(f"<li>{html.escape(m)}</li>" for m in missed) + "</ul>"
    else:
        goals = ", ".join(f"{topic} {100 * goal:.0f}%" for topic, goal in GOALS.items())
        verdict = f'<p class="good">Every goal is met: {goals} after stage 3, and chance with shuffled pictures.</p>'
    times = "".join(f"<tr><td>{name}</td><td>{value:.0f} s</td></tr>" for name, value in seconds.items())
    page = PAGE.read_text()
    for name, content in {
        "VERDICT": verdict,
        "RESULTS": result_rows(results),
        "CURVES": f'<img class="curves" src="{inline(curves)}" alt="training loss of the four stages">',
        "EXAMPLES": example_rows(results, seed),
        "TIMES": times,
    }.items():
        page = page.replace(f"<!-- {name} -->", content)
    (folder / "report.html").write_text(page)
