"""`accelerate launch ... -m dpo_scale.evaluate RECIPE [section.field=value ...]`"""

from dpo_scale.launched import run_stage

if __name__ == "__main__":
    run_stage("evaluate")
