"""When to ask a server again, and after how long: the same for the Hub and for other hosts."""

from __future__ import annotations

import email.utils
import random
import sys
import time

STATUSES = (408, 425, 429, 500, 502, 503, 504)
"""Answers that say: not now."""
TRIES = 8
"""Attempts in a row that bring nothing before it is given up: with the pauses between them about two minutes."""
LONGEST_SECONDS = 300.0


def pause(what: str, reason: str, number: int, retry_after: str | None = None) -> None:
    """Sleep after the failed attempt `number` (from 1): twice as long each time, or as long as the server asks."""
    seconds = min(_seconds(retry_after) or 2.0 ** (number - 1) * random.uniform(0.5, 1), LONGEST_SECONDS)
    print(f"{what}: {reason}; trying again in {seconds:.0f} s", file=sys.stderr, flush=True)
    time.sleep(seconds)


def _seconds(retry_after: str | None) -> float:
    """What the header Retry-After says (RFC 9110, 10.2.3): seconds, or a date."""
    if not retry_after:
        return 0.0
    if retry_after.isdigit():
        return float(retry_after)
    try:
        return max(email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0
