"""The demo's table: how many of a task's unseen examples come out right by each way of asking."""

from dataclasses import dataclass

from demo.skills import Example, is_right

WAYS = ("base alone", "base + text prompt", "adapter")
BAR = 0.9


@dataclass(frozen=True)
class TaskScores:
    """Shares of right outputs of one task, by way of asking."""

    task: str
    method: str
    shares: dict[str, float]

    @property
    def reached(self) -> bool:
        """Whether the adapter is at the bar and the base alone is not."""
        return self.shares["adapter"] >= BAR > self.shares["base alone"]


def share_right(skill: str, examples: list[Example], outputs: list[str]) -> float:
    """Share of right outputs."""
    right = sum(is_right(skill, example, output) for example, output in zip(examples, outputs, strict=True))
    return right / len(examples)


def as_table(scores: list[TaskScores]) -> str:
    """The scores as a Markdown table."""
    lines = [f"| task | method | {' | '.join(WAYS)} |", f"|---|---|{'--:|' * len(WAYS)}"]
    for row in scores:
        cells = " | ".join(f"{row.shares[way]:.1%}" for way in WAYS)
        lines.append(f"| {row.task} | {row.method} | {cells} |")
    return "\n".join(lines)
