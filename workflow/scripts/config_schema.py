"""The JSON schema of the configuration, for editors: made from `vlm.config.Config`, never written by hand.

python workflow/scripts/config_schema.py            # write it again
python workflow/scripts/config_schema.py --check    # fail when it is stale
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from vlm.config import Config

SCHEMA = Path(__file__).resolve().parents[1] / "schemas" / "config.schema.json"


def render() -> str:
    """The schema as text, byte for byte as it is kept."""
    return json.dumps(Config.model_json_schema(), indent=2) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the JSON schema of the configuration.")
    parser.add_argument("--check", action="store_true", help="only say whether the kept schema is current")
    if not parser.parse_args(argv).check:
        SCHEMA.write_text(render())
        return 0
    if SCHEMA.is_file() and SCHEMA.read_text() == render():
        return 0
    print(f"{SCHEMA} is stale; run: python workflow/scripts/config_schema.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
