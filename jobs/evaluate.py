"""Measure a trained run anew on its recipe's tasks, and write its report.

python jobs/evaluate.py recipes/demo.yaml
"""

from xdist.job import main

if __name__ == "__main__":
    main(__doc__, "evaluate")
