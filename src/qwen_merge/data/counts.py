"""Where every row went: rows in, rows out, and for each reason of dropping a count and the first three examples.

    qwen-merge data convert writes them into the set's manifest

`rows_in == rows_out + dropped` holds for a finished unit and for a finished set; the manifest is refused otherwise.
"""

from dataclasses import dataclass, field

EXAMPLES = 3
EXAMPLE_LENGTH = 200  # characters


@dataclass
class Counts:
    rows_in: int = 0
    rows_out: int = 0
    drops: dict[str, dict] = field(default_factory=dict)  # reason -> {"rows": int, "examples": [str, ...]}

    def drop(self, reason: str, example: str) -> None:
        """Count one row dropped for `reason`; `example` says which (id, place, or text) and is shortened."""
        entry = self.drops.setdefault(reason, {"rows": 0, "examples": []})
        entry["rows"] += 1
        if len(entry["examples"]) < EXAMPLES:
            entry["examples"].append(shortened(example))

    @property
    def dropped(self) -> int:
        return sum(entry["rows"] for entry in self.drops.values())

    def merge(self, other: "Counts") -> None:
        """Add another's counts; its examples fill what room is left, so merging in the units' order is repeatable."""
        self.rows_in += other.rows_in
        self.rows_out += other.rows_out
        for reason, theirs in other.drops.items():
            entry = self.drops.setdefault(reason, {"rows": 0, "examples": []})
            entry["rows"] += theirs["rows"]
            entry["examples"] = (entry["examples"] + theirs["examples"])[:EXAMPLES]

    def to_json(self) -> dict:
        return {"rows_in": self.rows_in, "rows_out": self.rows_out, "drops": dict(sorted(self.drops.items()))}

    @classmethod
    def from_json(cls, data: dict) -> "Counts":
        drops = {
            reason: {"rows": entry["rows"], "examples": list(entry["examples"])}
            for reason, entry in data["drops"].items()
        }
        return cls(data["rows_in"], data["rows_out"], drops)


def shortened(text: str) -> str:
    """At most 200 characters, cut in the middle, so that both the row's place and the end of its text are seen."""
    if len(text) <= EXAMPLE_LENGTH:
        return text
    head = EXAMPLE_LENGTH * 2 // 3
    return f"{text[:head]} … {text[-(EXAMPLE_LENGTH - head - 3) :]}"
