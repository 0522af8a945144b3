"""What became of the rows of a file or split, and what of it is likely not meant."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LEAST_TRAINED_SHARE = 0.01  # below this a warning
REASONS = 20  # counted apart
OTHER_REASONS = "for other reasons"


@dataclass
class DataCounts:
    """What became of the rows of one file or split."""

    read: int = 0
    used: int = 0  # rows with a trained token
    cut: int = 0  # rows that are used, but cut at the right to data.sequence_length
    left_out: dict[str, int] = field(default_factory=dict)  # rows that are not used, by reason
    tokens: int = 0
    trained_tokens: int = 0
    empty_answers: int = 0
    unread_columns: list[str] = field(default_factory=list)  # columns with content that the format does not read
    not_rendered: list[str] = field(default_factory=list)  # what the chat template leaves out, a sentence each

    @property
    def trained_share(self) -> float:
        """Trained tokens as a share of all."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0

    @property
    def rows(self) -> dict[str, Any]:
        """``rows`` of summary.json."""
        return {"read": self.read, "used": self.used, "cut": self.cut, "left_out": self.left_out}

    def leave_out(self, reason: str) -> None:
        """Count a row that is not used."""
        if reason not in self.left_out and len(self.left_out) >= REASONS:
            reason = OTHER_REASONS
        self.left_out[reason] = self.left_out.get(reason, 0) + 1

    def describe(self) -> str:
        """Return in words what became of the rows."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        left_out = f", {sum(self.left_out.values())} left out ({reasons})" if reasons else ""
        return f"{self.read} read, {self.used} used, {self.cut} of them cut{left_out}"

    def warnings(self) -> list[str]:
        """Return what is likely not meant, a sentence each."""
        found = []
        if self.left_out or self.cut:
            found.append(f"rows: {self.describe()}")
        if self.unread_columns:
            found.append(f"nothing reads column{'s' * (len(self.unread_columns) > 1)} {', '.join(self.unread_columns)}")
        found += self.not_rendered
        if self.empty_answers:
            found.append(f"empty answers: {self.empty_answers}, of which only the end is trained")
        if self.trained_share < LEAST_TRAINED_SHARE:
            found.append(f"only {self.trained_share:.2%} of the tokens are trained ({self.trained_tokens})")
        return found
