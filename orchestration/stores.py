"""The databases under outputs/, made once and under a lock before anything parallel starts."""

import os
from pathlib import Path

from runtime.environment import set_environment
from runtime.files import write_atomic
from runtime.mlflow_store import locked, open_store

DAGSTER_YAML = """\
# Dagster's home. Made by `deepgen init`; edit it freely, it is not written again.
telemetry: {enabled: false}
nux: {enabled: false}
concurrency:
  pools: {default_limit: 1, granularity: op}   # one training at a time on this machine, one build of shards
  runs: {max_concurrent_runs: 4}
run_monitoring:
  enabled: true                                # a killed run is marked failed, and its place in a pool is freed
  free_slots_after_run_end_seconds: 60
  poll_interval_seconds: 30
run_retries: {enabled: false}                  # a stage resumes from its checkpoint when someone, or a schedule, runs it again
"""


def dagster_home(root: Path) -> Path:
    return root.resolve() / "outputs" / "dagster"


def init_stores(root: Path, experiment: str = "deepgen") -> None:
    """Create Dagster's home and MLflow's store where they are missing, and point this process at them.

    Two processes that open a fresh Dagster home together can leave it broken for good, so the first opening is done here, alone.
    """
    set_environment()
    home = dagster_home(root)
    os.environ["DAGSTER_HOME"] = str(home)
    ready = home / ".ready"
    if not ready.is_file():
        with locked(home / ".lock"):
            if not ready.is_file():
                _create_dagster(home)
                write_atomic(ready, "")
    open_store(root, experiment)


def _create_dagster(home: Path) -> None:
    import dagster as dg

    if not (home / "dagster.yaml").is_file():
        write_atomic(home / "dagster.yaml", DAGSTER_YAML)
    with dg.DagsterInstance.from_config(str(home)) as instance:  # opening makes the tables
        instance.get_runs(limit=1)
        instance.event_log_storage.get_pool_limits()
        if instance.schedule_storage is not None:
            instance.schedule_storage.all_instigator_state()
