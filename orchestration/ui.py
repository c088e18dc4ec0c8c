"""`deepgen ui`: Dagster and MLflow on this clone's files, on the loopback address only, stopped together."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from orchestration.child import ends_with_parent
from orchestration.stores import dagster_home, init_stores
from runtime.mlflow_store import open_store
from runtime.params import load_params

HOST = "127.0.0.1"
DAGSTER_PORT, MLFLOW_PORT = 3000, 5000
MLFLOW_VIEW = "workflowType=machine_learning"  # its pages for training; left to itself it opens those for prompts and traces
MLFLOW_ADDRESS = "DEEPGEN_MLFLOW_ADDRESS"  # environment of what the UI starts: where MLflow is shown, for links
STOP_SECONDS = 15
MLFLOW_GUARDS = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_ENABLE_AI_GATEWAY": "false",
    "MLFLOW_ALLOW_HTTP_REDIRECTS": "false",
}


class PortBusy(Exception):
    """Something listens on the port already."""


def serve(root: Path, dagster_port: int, mlflow_port: int) -> int:
    """Start the servers, say where they are, and wait for Ctrl-C or for one of them to end."""
    for port, option in ((dagster_port, "--dagster-port"), (mlflow_port, "--mlflow-port")):
        _refuse_busy(port, option)
    experiment = load_params(root / "params.yaml").registry.experiment
    init_stores(root, experiment)
    store = open_store(root, experiment)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # SIGINT too: a shell starts its background jobs with it ignored
        signal.signal(number, signal.default_int_handler)
    os.environ[MLFLOW_ADDRESS] = f"http://{HOST}:{mlflow_port}"
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands(root, store, dagster_port, mlflow_port).items():
            processes[name] = _start(root, name, command)
        return _wait(processes, dagster_port, mlflow_port, store)
    except KeyboardInterrupt:
        print("\nstopping", flush=True)
        return 0
    finally:
        stop_all(processes)


def commands(root: Path, store: str, dagster_port: int, mlflow_port: int) -> dict[str, list[str]]:
    """What is started. A tracking server of your own (MLFLOW_TRACKING_URI) is left to you."""
    module = ["-m", "orchestration.definitions", "--working-directory", str(root)]
    scripts = Path(sys.executable).parent
    wanted = {
        "dagster-webserver": [str(scripts / "dagster-webserver"), "--host", HOST, "--port", str(dagster_port), *module],
        "dagster-daemon": [str(scripts / "dagster-daemon"), "run", *module],
    }
    if store.startswith("sqlite:"):
        own = f"localhost:{mlflow_port},{HOST}:{mlflow_port}"
        flags = ["--host", HOST, "--port", str(mlflow_port), "--workers", "1", "--allowed-hosts", own]
        flags += ["--cors-allowed-origins", f"http://localhost:{mlflow_port}", "--backend-store-uri", store]
        flags += ["--artifacts-destination", str(root / "outputs" / "mlflow" / "artifacts")]
        wanted["mlflow"] = [sys.executable, "-m", "mlflow", "server", *flags]
    return wanted


def mlflow_page(path: str) -> str:
    """Where a browser finds a page of MLflow: at the tracking server, if there is one, else where `deepgen ui` shows it."""
    remote = os.environ.get("MLFLOW_TRACKING_URI", "")
    here = os.environ.get(MLFLOW_ADDRESS, f"http://{HOST}:{MLFLOW_PORT}")
    return f"{(remote if remote.startswith('http') else here).rstrip('/')}/#/{path}?{MLFLOW_VIEW}"


def _start(root: Path, name: str, command: list[str]) -> "subprocess.Popen[bytes]":
    """In a process group of its own, to be stopped with all its children, and told by the kernel if this process dies."""
    with open(dagster_home(root) / f"{name}.log", "ab") as log:
        return subprocess.Popen(
            command,
            cwd=root,
            env=os.environ | MLFLOW_GUARDS,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=ends_with_parent(),
        )


def _wait(processes: dict[str, "subprocess.Popen[bytes]"], dagster_port: int, mlflow_port: int, store: str) -> int:
    print("starting, about 10 s", flush=True)
    places = {"Dagster": dagster_port} | ({"MLflow": mlflow_port} if "mlflow" in processes else {})
    waiting = dict(places)
    pages = {"Dagster": f"http://{HOST}:{dagster_port}", "MLflow": mlflow_page("experiments")}
    while True:
        for name, process in processes.items():
            if process.poll() is not None:
                print(f"{name} ended with code {process.returncode}; its log is outputs/dagster/{name}.log", file=sys.stderr, flush=True)
                return 1
        for title, port in list(waiting.items()):
            if listening(port):
                print(f"  {title:<8} {pages[title]}", flush=True)
                del waiting[title]
                if not waiting:
                    print(("" if "mlflow" in processes else f"  MLflow   {store}\n") + "Ctrl-C stops them.", flush=True)
        time.sleep(0.5)


def stop_all(processes: dict[str, "subprocess.Popen[bytes]"]) -> None:
    """SIGTERM to each group, and SIGKILL to what is left of it. A stage that runs saves by itself when its run dies."""
    for process in processes.values():
        _signal_group(process, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes.values():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(0.1, deadline - time.monotonic()))
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _signal_group(process: "subprocess.Popen[bytes]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((HOST, port)) == 0


def _refuse_busy(port: int, option: str) -> None:
    if listening(port):
        raise PortBusy(f"port {port} on {HOST} is in use, perhaps by another `deepgen ui`: stop that, or choose another with {option}.")
