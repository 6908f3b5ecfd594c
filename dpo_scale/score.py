"""`accelerate launch ... -m dpo_scale.score RECIPE [section.field=value ...]`"""

from dpo_scale.launched import run_stage

if __name__ == "__main__":
    run_stage("score")
