"""Search a recipe's settings: many trainings that share one teacher, with Ray Tune, compared in MLflow.

    python jobs/tune.py tune_spaces/quick.yaml recipes/demo.yaml
    python jobs/tune.py tune_spaces/learning_rate.yaml recipes/biomed.yaml --data.root ../shared/data

The same command again continues a search that was stopped.
"""

from xdist.job import main

if __name__ == "__main__":
    main(__doc__, "tune", before={"space": "YAML search space, for example tune_spaces/learning_rate.yaml"})
