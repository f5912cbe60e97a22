"""Which samples could not be used, and when there are too many of them."""

from __future__ import annotations

from collections.abc import Mapping


class Rejection:
    """Counts the samples that cannot be used; one that returns every epoch counts once.

    Args:
        totals: samples of each data set.
        max_share: `data.max_rejected_share`.
    """

    def __init__(self, totals: Mapping[str, float], max_share: float) -> None:
        self._allowed = {name: max_share * total for name, total in totals.items()}
        self.max_share = max_share
        self.reasons: dict[str, str] = {}
        """`<data set>/<key>` -> why."""

    @property
    def allowed(self) -> float:
        """Samples of all data sets together that may be rejected."""
        return sum(self._allowed.values())

    def add(self, reasons: Mapping[str, str]) -> None:
        """Note samples that cannot be used.

        Raises:
            ValueError: these are more than the allowed share of a data set.
        """
        if not reasons:
            return
        self.reasons |= reasons
        for name, allowed in self._allowed.items():
            own = [reason for key, reason in self.reasons.items() if key.startswith(f"{name}/")]
            if len(own) > allowed:
                raise ValueError(
                    f"{len(own)} samples of data set {name} cannot be used, more than data.max_rejected_share = "
                    f"{self.max_share:.2%} of it. The first: {own[0]}"
                )
