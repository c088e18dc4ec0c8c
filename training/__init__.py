"""Batches to checkpoints to scores to releases: the only room where data meets model.

alignment and sft share one loop (supervised.py); mr_grpo is rollout -> reward -> advantage -> update (mr_grpo.py).
What trains in which stage is one table (stages.py). Each stage ends in a folder that the next one, or a user, can load.
"""
