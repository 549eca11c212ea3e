"""Distil an English teacher into a multilingual student: prepare, embed, train, evaluate, report.

    python jobs/distill.py recipes/demo.yaml
    python jobs/distill.py recipes/demo.yaml --plan
    python jobs/distill.py recipes/demo.yaml --run.name slow --train.lr 1e-4
    python jobs/distill.py recipes/biomed.yaml --data.root ../shared/data

The same command again continues a run that was stopped, at whatever stage.
"""

from xdist.job import main

if __name__ == "__main__":
    main(__doc__, "distill", {"plan": "print what will be done and how long it takes, and stop"})
