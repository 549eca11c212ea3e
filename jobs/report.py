"""Write report.html, report.json, plots and the model card of a finished run again.

python jobs/report.py recipes/demo.yaml
"""

from xdist.job import main

if __name__ == "__main__":
    main(__doc__, "write_report")
