"""Clean, group and shard the corpora of a recipe; print what was kept and rejected.

python jobs/prepare.py recipes/demo.yaml
"""

from xdist.job import main

if __name__ == "__main__":
    main(__doc__, "prepare")
