"""What `qwen-merge bench train` says of its runs: rates, parts, a table of several files, two pictures.

    qwen-merge bench scaling figures/*.json --markdown scaling.md --png scaling.png   # what `--json` wrote before

A run's ranks take every step together, so a step takes as long as the slowest of them says.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from qwen_merge.bench.train_flops import PEAK
from qwen_merge.errors import UserError


def label(recipe: str, cards: int) -> str:
    return recipe if cards == 1 else f"{recipe}, {cards} cards"


def measured(content: dict) -> list[dict]:
    """The runs that did not run out of memory."""
    return [run for run in content["runs"] if "ranks" in run]


def summary(run: dict) -> dict[str, Any]:
    """Rates of all ranks together, and shares of the time of a step.

    communication: of the traced steps, what collectives took with nothing beside them, the mean of the ranks.
    balance: the mean of what the ranks had to compute, over the most that one had.
    """
    ranks = run["ranks"]
    steps = [max(times) for times in zip(*(rank["step_seconds"] for rank in ranks), strict=True)]
    tokens = [sum(counts) for counts in zip(*(rank["step_tokens"] for rank in ranks), strict=True)]
    seconds = sum(steps)
    counts = {name: sum(rank["counts"][name] for rank in ranks) for name in ranks[0]["counts"]}
    peak = next((flops * len(ranks) for name, flops in PEAK.items() if name in ranks[0]["device"]), None)
    matrices, attention = (sum(rank[f"{name}_flops"] for rank in ranks) for name in ("matrix", "attention"))
    rates = {
        "tokens_per_second": statistics.median(count / time for count, time in zip(tokens, steps, strict=True)),
        "samples_per_second": counts["samples"] / seconds,
        "padding": 1 - counts["tokens"] / counts["places"],
        "utilisation": matrices / seconds / peak if peak else None,
        "with_attention": (matrices + attention) / seconds / peak if peak else None,
        "parts": {name: time / seconds for name, time in ranks[0]["parts"].items()},
        "seconds_a_step": seconds / len(steps),
        "peak_gib": max(rank["peak_bytes"] for rank in ranks) / 2**30,
    }
    profiles = [rank["profile"] for rank in ranks if rank["profile"]]
    if profiles:
        work = [profile["work"] for profile in profiles]
        rates["communication"] = statistics.mean(profile["exposed"] / profile["seconds"] for profile in profiles)
        rates["balance"] = statistics.mean(work) / max(work)
    return rates


def show(run: dict) -> None:
    name = label(run["recipe"], run["cards"])
    if "ranks" not in run:
        print(f"{name:22} out of memory", *run["out_of_memory"], sep="\n    ")
        return
    rates, first = summary(run), run["ranks"][0]
    if rates["utilisation"] is None:
        utilisation = "utilisation unknown (no peak for this device)"
    else:
        utilisation = f"{rates['utilisation']:.1%} of peak ({rates['with_attention']:.1%} with attention)"
    print(
        f"{name:22} {rates['tokens_per_second']:9,.0f} real tokens/s  {rates['samples_per_second']:7.1f} samples/s  "
        f"{utilisation}  padding {rates['padding']:.1%}  {rates['seconds_a_step']:.3f} s a step  "
        f"{rates['peak_gib']:.1f} GiB  {first['checkpointed_layers']} of {first['layers']} layers checkpointed   "
        f"{first['device']}, torch {first['torch']}, {first['attention']}, {run['deepspeed'] or 'no DeepSpeed'}"
    )
    shares = dict(rates["parts"])
    shares |= {key: rates[key] for key in ("communication", "balance") if key in rates}
    print(" " * 23 + "  ".join(f"{key} {share:.1%}" for key, share in shares.items()))
    of_first = " of the first rank" if run["cards"] > 1 else ""
    print(f"{'':23}FLOP of weights{of_first} = {first['formula']}", flush=True)


def draw(content: dict, path: Path) -> None:
    """A bar for each run, its parts stacked: milliseconds of a card for a thousand real tokens."""
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    figure, axes = pyplot.subplots(figsize=(7, 1.6 + 0.5 * len(measured(content))), layout="constrained")
    for row, run in enumerate(measured(content)):
        rates, left = summary(run), 0.0
        scale = 1e6 * run["cards"] / rates["tokens_per_second"]
        for number, (name, share) in enumerate(rates["parts"].items()):
            legend = name if row == 0 else None
            axes.barh(label(run["recipe"], run["cards"]), share * scale, left=left, color=f"C{number}", label=legend)
            left += share * scale
    axes.set_xlabel(f"ms of a card for 1,000 real tokens ({content['size']}, stage {content['stage']})")
    axes.invert_yaxis()
    axes.legend(ncols=3, fontsize="small")
    figure.savefig(path, dpi=130)


def compare(options: argparse.Namespace) -> int:
    """`qwen-merge bench scaling`: the runs of several files as one table, and their rates over the number of cards."""
    series: dict[tuple[str, ...], dict[int, dict]] = {}
    for file in options.files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            for run in content["runs"]:
                zero = "no DeepSpeed" if run["deepspeed"] is None else f"ZeRO-{run['deepspeed'].split('ds_z')[1][0]}"
                key = (content["size"], content["stage"], run["recipe"], zero)
                series.setdefault(key, {})[run["cards"]] = run
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{file} is not what `qwen-merge bench train --json FILE` writes: {error!r}") from error
    table = table_of(series)
    print(table)
    if options.markdown:
        options.markdown.write_text(table + "\n", encoding="utf-8")
    if options.png:
        draw_scaling(series, options.png)
    return 0


def table_of(series: dict[tuple[str, ...], dict[int, dict]]) -> str:
    """Markdown, a line for each run. Of linear: the rate of a card over that of one card in the same series."""
    lines = [
        "| Model | Stage | Recipe | Cards | Real tokens/s a card | Of linear | Of peak: weights, with attention "
        "| Communication | Balance | Layers checkpointed | Memory a card |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (size, stage, recipe, zero), runs in sorted(series.items()):
        alone = summary(runs[1])["tokens_per_second"] if "ranks" in runs.get(1, {}) else None
        for cards, run in sorted(runs.items()):
            head = f"| {size} | {stage} | {recipe}, {zero} | {cards} |"
            if "ranks" not in run:
                lines.append(f"{head} out of memory |" + " |" * 6)
                continue
            rates, first = summary(run), run["ranks"][0]
            card = rates["tokens_per_second"] / cards
            linear = f"{card / alone:.1%}" if alone and cards > 1 else ""
            peak = f"{rates['utilisation']:.1%}, {rates['with_attention']:.1%}" if rates["utilisation"] else ""
            several = cards > 1 and "balance" in rates
            communication, balance = (
                (f"{rates['communication']:.1%}", f"{rates['balance']:.3f}") if several else ("", "")
            )
            lines.append(
                f"{head} {card:,.0f} | {linear} | {peak} | {communication} | {balance} "
                f"| {first['checkpointed_layers']} of {first['layers']} | {rates['peak_gib']:.0f} GiB |"
            )
    return "\n".join(lines)


def draw_scaling(series: dict[tuple[str, ...], dict[int, dict]], path: Path) -> None:
    """Real tokens a second over the number of cards, and the straight line from one card on."""
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    most = 1
    for number, ((size, stage, recipe, zero), runs) in enumerate(sorted(series.items())):
        rates = {cards: summary(run)["tokens_per_second"] for cards, run in sorted(runs.items()) if "ranks" in run}
        if not rates:
            continue
        name = f"{size}, stage {stage}, {recipe}, {zero}"
        axes.plot(list(rates), list(rates.values()), "o-", color=f"C{number}", label=name)
        first = min(rates)
        if len(rates) > 1:
            line = [rates[first] / first * cards for cards in rates]
            axes.plot(list(rates), line, ":", color=f"C{number}")
        most = max(most, *rates)
    axes.set(xlabel="cards", ylabel="real tokens/s", xticks=range(1, most + 1), ylim=(0, None))
    axes.legend(fontsize="small", title="dotted: linear")
    figure.savefig(path, dpi=130)
