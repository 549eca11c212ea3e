"""What every entry script does: parse, configure, call one function, give an exit code."""

import os
import sys
from collections.abc import Callable
from typing import Any

from xdist import recipes
from xdist.config import Recipe
from xdist.errors import Refused

Names = dict[str, str] | None  # of switches or arguments, with their help


def run(description: str | None, work: Callable[..., None], flags: Names = None, before: Names = None) -> int:
    """Run `work(recipe, **flags, **before)`. Exit code 0, 2 for what the user can mend (told in one message), 130 for Ctrl-C."""
    try:
        recipe, args = recipes.parse(sys.argv[1:], description or "", flags, before)
        options = [name.replace("-", "_") for name in [*(flags or {}), *(before or {})]]
        work(recipe, **{name: getattr(args, name) for name in options})
    except Refused as error:
        print(f"\nxdist: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("\nxdist: stopped; the same command continues this run", file=sys.stderr, flush=True)
        return 130
    return 0


def main(description: str | None, stage: str, flags: Names = None, before: Names = None) -> None:
    """Entry of jobs/<stage>.py: imports the stages only when they run, so that --help answers at once."""

    def work(recipe: Recipe, **options: Any) -> None:
        from xdist import pipeline

        getattr(pipeline, stage)(recipe, **options)

    code = run(description, work, flags, before)
    sys.stdout.flush()
    os._exit(code) if code == 130 else sys.exit(code)
