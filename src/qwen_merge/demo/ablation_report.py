"""What an ablation found: results.json, table.md and plot.png, from what its trials left.

A figure is the mean over the seeds, with the lowest and the highest in brackets where there are several. What a graft
was refused for stands in the place of its figures.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen_merge.demo.language import CHANCE
from qwen_merge.demo.variants import ABLATIONS, UNTRAINED, Plan, result_file

Run = dict[str, Any]
COLOURS = {"colour": "#c44e52", "shape": "#1f4e9c", "number": "#6d9e5b"}
# (heading, what of a run, how it is written, whether it differs from seed to seed)
COLUMNS: tuple[tuple[str, Callable[[Run], float], str, bool], ...] = (
    ("tokens a picture", lambda run: run["tokens"], "{:.0f}", False),
    ("projector's parameters", lambda run: run["projector_parameters"], "{:,.0f}", False),
    ("trained in stage 2", lambda run: run["trained_parameters"], "{:,.0f}", False),
    ("answer loss", lambda run: run["answer_loss"], "{:.3f}", True),
    ("caption loss", lambda run: run["caption_loss"], "{:.3f}", True),
    ("CPU seconds of training", lambda run: run["cpu_seconds"], "{:.0f}", True),
)


def gathered(plan: Plan, folder: Path) -> dict[str, Any]:
    """All results of a plan. A variant that was refused has `refused` and no runs."""
    variants = []
    for variant in plan.variants:
        runs = [json.loads(result_file(folder, variant, seed).read_text()) for seed in plan.seeds]
        refused = next((run["refused"] for run in runs if "refused" in run), None)
        row = {**asdict(variant), "runs": [] if refused else runs}
        variants.append(row | ({"refused": refused} if refused else {}))
    return {
        "ablation": plan.ablation,
        "question": ABLATIONS[plan.ablation][0],
        "budget": asdict(plan.budget),
        "seeds": list(plan.seeds),
        "chance": {topic: CHANCE[topic] for topic in plan.budget.asked},
        "variants": variants,
    }


def figure(values: list[float], form: str, spread: bool = True) -> str:
    """The mean, and the lowest and the highest of several."""
    mean = form.format(sum(values) / len(values))
    low, high = form.format(min(values)), form.format(max(values))
    return f"{mean} ({low} to {high})" if spread and low != high else mean


def percent(runs: list[Run], kind: str, topic: str) -> str:
    return figure([100 * run[kind][topic] for run in runs], "{:.1f}")


def table(content: dict[str, Any]) -> str:
    """Markdown: a row for each variant, then what can be had without learning or without looking."""
    topics = list(content["budget"]["asked"])
    heads = [content["ablation"], *(f"{topic}, % right" for topic in topics), *(head for head, *_ in COLUMNS)]
    rows = [heads, ["---", *["--:"] * (len(heads) - 1)]]
    for variant in content["variants"]:
        runs = variant["runs"]
        if not runs:
            reason = " ".join(variant["refused"].split())
            rows.append([variant["name"], f"refused: {reason}", *[""] * (len(heads) - 2)])
            continue
        shown = [figure([value(run) for run in runs], form, spread) for _, value, form, spread in COLUMNS]
        rows.append([variant["name"], *(percent(runs, "accuracy", topic) for topic in topics), *shown])
    blank = [""] * len(COLUMNS)
    rows.append(["chance", *(f"{100 * content['chance'][topic]:.1f}" for topic in topics), *blank])
    highest = [
        max((run["control"][topic] for variant in content["variants"] for run in variant["runs"]), default=0)
        for topic in topics
    ]
    rows.append(["another question's picture, best of all", *(f"{100 * value:.1f}" for value in highest), *blank])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def in_short(run: Run) -> str:
    if "refused" in run:
        return f"refused: {' '.join(run['refused'].split())}"
    shares = ", ".join(f"{topic} {100 * share:.1f} %" for topic, share in run["accuracy"].items())
    return f"{shares} right, {run['seconds']:.0f} s"


def described(content: dict[str, Any]) -> str:
    """The budget in a sentence."""
    budget, seeds = content["budget"], content["seeds"]
    (first, second), (captions, questions) = budget["steps"], budget["rows"]
    several = f"mean of {len(seeds)} seeds (lowest to highest)" if len(seeds) > 1 else "one seed, so no spread is known"
    return (
        f"{content['question']}: {first} steps of 32 on {captions} captions, then {second} steps of 32 on {questions} "
        f"questions; {several}; {', '.join(f'{count} on {topic}' for topic, count in budget['asked'].items())} "
        "held-out questions"
    )


def draw(content: dict[str, Any]) -> bytes:
    """Bars of right answers and dots of the loss, variant beside variant; lines from the lowest to the highest seed."""
    import io

    from matplotlib.figure import Figure

    topics = list(content["budget"]["asked"])
    variants = [variant for variant in content["variants"] if variant["runs"]]
    canvas = Figure(figsize=(2.6 + 1.25 * len(variants), 5.2), dpi=90, layout="constrained")
    right, loss = canvas.subplots(2, 1, sharex=True, height_ratios=(2, 1))

    def with_spread(values: list[list[float]], offset: float = 0) -> dict[str, Any]:
        means = [sum(row) / len(row) for row in values]
        below = [mean - min(row) for mean, row in zip(means, values, strict=True)]
        above = [max(row) - mean for mean, row in zip(means, values, strict=True)]
        return {"x": [place + offset for place in range(len(values))], "y": means, "yerr": (below, above)}

    width = 0.8 / len(topics)
    for index, topic in enumerate(topics):
        offset, colour = (index - (len(topics) - 1) / 2) * width, COLOURS.get(topic)
        shares = [[100 * run["accuracy"][topic] for run in variant["runs"]] for variant in variants]
        seen = with_spread(shares, offset)
        right.bar(seen["x"], seen["y"], width * 0.95, color=colour, label=topic)
        right.errorbar(**seen, fmt="none", ecolor="black", elinewidth=1, capsize=2)
        right.axhline(100 * content["chance"][topic], color=colour, linewidth=0.8, linestyle=":")
    losses = [[run["answer_loss"] for run in variant["runs"]] for variant in variants]
    loss.errorbar(**with_spread(losses), fmt="o", color="#555555", elinewidth=1, capsize=3)
    right.set_ylabel("% right (dotted: chance)", fontsize=8)
    right.set_ylim(0, 104)
    right.legend(fontsize=7, ncols=len(topics), loc="lower center", bbox_to_anchor=(0.5, 1))
    loss.set_ylabel("loss on answers", fontsize=8)
    loss.set_yscale("log")
    loss.set_xticks(range(len(variants)), [label(variant) for variant in variants], fontsize=7)
    for axes in (right, loss):
        axes.tick_params(labelsize=7, which="both")
        axes.grid(axis="y", alpha=0.3)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png")
    return buffer.getvalue()


def label(variant: dict[str, Any]) -> str:
    name = variant["name"].replace("+", "\n+").replace("-tower", "\ntower")
    return f"{name}\n{variant['runs'][0]['tokens']} tokens" if variant["name"] != UNTRAINED else name


def write(folder: Path, content: dict[str, Any]) -> None:
    """results.json, table.md and plot.png into `folder`."""
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "table.md").write_text(f"{described(content)}.\n\n{table(content)}\n")
    (folder / "plot.png").write_bytes(draw(content))
