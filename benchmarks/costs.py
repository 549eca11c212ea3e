"""What larger corpora cost, from the rates that a plan measured on the machine that works (`jobs/distill.py RECIPE --plan`).

    python -m benchmarks.costs runs/demo/plan.json --prepare 50000 --price 0.10

A machine is what the plan was made on, `--prepare` the pairs per second that it prepares (benchmark streaming), `--price` what it
costs an hour. Assumed: work is shared out without loss, texts are as long and have as many translations as those of the plan,
training shows each text as often as an epoch of the plan does, and nothing is in the store yet.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.results import number

SIZES = (1_000_000, 100_000_000, 1_000_000_000)
HEAD = ["source sentences", "pairs", "prepare", "embed", "train", "machine hours", "price", "vectors and shards"]


def estimate(plan: dict[str, Any], sentences: int, prepare_rate: float) -> dict[str, float]:
    """Pairs, hours of one machine for each stage, and bytes, for a corpus like the plan's of so many source sentences."""
    times = sentences / plan["sentences"]
    tokens = sum(
        count * sum(length * number for length, number in enumerate(lengths)) / max(1, sum(lengths))
        for lang, count in plan["seen"].items()
        if (lengths := plan["token_lengths"].get(lang))
    )
    vectors = plan["shard_bytes"] + plan["store_bytes"] * plan["sentences"] / max(1, plan["sentences"] - plan["cached"])
    return {
        "pairs": times * plan["pairs"],
        "prepare": times * plan["pairs"] / prepare_rate / 3600,
        "embed": sentences / plan["teacher_sentences_per_second"] / 3600,
        "train": times * tokens / plan["student_tokens_per_second"] / 3600,
        "bytes": times * vectors,
    }


def table(plan: dict[str, Any], prepare_rate: float, price: float) -> str:
    """Markdown, a line for each size; hours of one machine, so those of n machines are an nth."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    for sentences in SIZES:
        found = estimate(plan, sentences, prepare_rate)
        hours = [found[stage] for stage in ("prepare", "embed", "train")]
        cells = [f"{sentences:,}", f"{found['pairs']:,.0f}", *(f"{number(each)} h" for each in [*hours, sum(hours)])]
        lines.append("| " + " | ".join([*cells, f"${price * sum(hours):,.2f}", f"{number(found['bytes'] / 1e9)} GB"]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table of a plan."""
    parser = argparse.ArgumentParser(prog="benchmarks.costs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="plan.json of a run")
    parser.add_argument("--prepare", type=float, required=True, metavar="PAIRS/S", help="pairs per second that a machine prepares")
    parser.add_argument("--price", type=float, required=True, metavar="DOLLARS", help="price of a machine hour")
    arguments = parser.parse_args()
    plan = json.loads(arguments.plan.read_text("utf-8"))
    print(
        f"{plan['arithmetic']}: {plan['teacher_sentences_per_second']:,.0f} sentences/s, {plan['student_tokens_per_second']:,.0f} tokens/s"
    )
    print(table(plan, arguments.prepare, arguments.price))


if __name__ == "__main__":
    main()
