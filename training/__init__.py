"""Batches to checkpoints to scores to releases: the only room where data meets model.

All stages share one loop (loop.py); what a step is, alignment and sft say in supervised.py, mr_grpo in mr_grpo.py.
What trains in which stage is one table (stages.py). Each stage ends in a folder that the next one, or a user, can load.
"""
