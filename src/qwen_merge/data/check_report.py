"""The figures of a check, for a reader and as JSON: `qwen-merge data check STAGE.yaml [--json FILE]`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen_merge.data.check import Check, Checked

HEAD = ("set", "rows", "kept", "MB", "pictures", "median size", "tokens", "a row", "longest", "over cutoff")


def lines(check: "Check", recipe: str) -> list[str]:
    """What is printed."""
    config = check.config
    shown = [
        f"{recipe}: template {config.get('template')}, cutoff_len {config.get('cutoff_len')}, "
        f"image_max_pixels {config.get('image_max_pixels')}, tokenizer {config.get('model_name_or_path')}"
    ]
    if check.sets:
        shown += ["", *_aligned([HEAD, *(_row(each) for each in check.sets), _total(check)])]
    if check.counted:
        trained = sum(each.summary.trained for each in check.sets)
        pictures = sum(each.summary.picture_tokens for each in check.sets)
        read = sum(each.summary.full.total for each in check.sets)
        tokens = sum(each.summary.tokens.total for each in check.sets)
        shown += [
            "",
            f"epoch   {_about(check)}{sum(each.tokens for each in check.sets):,} tokens, "
            f"{_percent(trained, tokens)} with loss; {_percent(pictures, read)} are pictures'",
        ]
    if check.steps and check.arguments:
        training, steps = check.arguments.training, check.steps
        shown += [
            f"batch   {training.per_device_train_batch_size} x {training.gradient_accumulation_steps} accumulated x "
            f"{check.world_size} GPUs = {steps.global_batch:,} samples a step",
            f"steps   {_about(check)}{steps.per_epoch:,} an epoch of {steps.samples:,} samples, {steps.total:,} in "
            f"{steps.epochs:g} epochs, which see {steps.total * steps.global_batch:,} samples at most",
        ]
    return [*shown, "", *(f"note: {note}" for note in check.notes)]


def figures(check: "Check") -> dict:
    """Everything as JSON."""
    return {
        "dataset_dir": check.config.get("dataset_dir", "data"),
        "template": check.config.get("template"),
        "cutoff_len": check.config.get("cutoff_len"),
        "world_size": check.world_size,
        "sets": {
            each.files.name: {
                "place": str(each.files.place),
                "rows": each.files.rows,
                "rows_read": each.summary.rows.rows_in,
                "bytes": each.files.bytes,
                "shards": len(each.files.shards),
                "samples": each.samples,
                "tokens": each.tokens if each.summary.tokens.count else None,
                "estimated": each.estimated,
                "read": each.summary.to_json(),
            }
            for each in check.sets
        },
        "steps": vars(check.steps) if check.steps else None,
        "problems": check.problems,
        "notes": check.notes,
    }


def _row(each: "Checked") -> tuple[str, ...]:
    summary = each.summary
    widths, heights = summary.widths.quantile(0.5), summary.heights.quantile(0.5)
    counted = summary.tokens.count > 0
    about = "~" if each.estimated else ""
    return (
        each.files.name,
        f"{each.files.rows:,}",
        f"{about}{each.samples:,}",
        f"{each.files.bytes / 1e6:,.1f}",
        f"{summary.pixels.count:,}",
        f"{widths} x {heights}" if widths else "-",
        f"{about}{each.tokens:,}" if counted else "-",
        f"{summary.tokens.mean:,.0f}" if counted else "-",
        f"{summary.full.most:,}" if counted else "-",
        _percent(summary.over, summary.full.count) if counted else "-",
    )


def _total(check: "Check") -> tuple[str, ...]:
    tokens = sum(each.tokens for each in check.sets)
    samples = sum(each.samples for each in check.sets)
    about = _about(check, "~")
    rows = sum(each.summary.full.count for each in check.sets)
    return (
        "1 set" if len(check.sets) == 1 else f"{len(check.sets)} sets",
        f"{sum(each.files.rows for each in check.sets):,}",
        f"{about}{samples:,}",
        f"{sum(each.files.bytes for each in check.sets) / 1e6:,.1f}",
        f"{sum(each.summary.pixels.count for each in check.sets):,}",
        "",
        f"{about}{tokens:,}" if check.counted else "-",
        f"{tokens / samples:,.0f}" if check.counted and samples else "-",
        "",
        _percent(sum(each.summary.over for each in check.sets), rows) if check.counted else "-",
    )


def _about(check: "Check", mark: str = "about ") -> str:
    return mark if any(each.estimated for each in check.sets) else ""


def _percent(part: int, whole: int) -> str:
    share = 100 * part / whole if whole else 0.0
    return f"{share:.2f} %" if 0 < share < 0.1 or 99.9 < share < 100 else f"{share:.1f} %"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
