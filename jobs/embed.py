"""Prepare the corpora and embed each source sentence once with the teacher.

python jobs/embed.py recipes/demo.yaml
"""

from xdist.job import main

if __name__ == "__main__":
    main(__doc__, "embed")
