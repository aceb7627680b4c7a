"""Read back what trackers have stored, with their own libraries: TensorBoard, W&B's offline files, MLflow, trackio."""

import json
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

BLOCK = 32 << 10  # bytes of a block of W&B's transaction log, which has the format of LevelDB's

Points = dict[str, list[tuple[int, float]]]  # steps and values by metric, in the order in which they are stored


class Stored(NamedTuple):
    """A tracked run as its store has it."""

    points: Points
    config: str  # as text
    files: list[str]
    exit_code: int | None = None


def tensorboard_run(folder: Path) -> Stored:
    """Return what TensorBoard's reader shows of a log folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    reader.Reload()
    points = {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    texts = [
        event.tensor_proto.string_val[0].decode() for tag in reader.Tags()["tensors"] for event in reader.Tensors(tag)
    ]
    return Stored(points, "\n".join(texts), [])


def wandb_records(file: Path) -> Iterator[Any]:
    """Yield the records of a `.wandb` file, as W&B's messages."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def wandb_run(file: Path) -> Stored:
    """Return what a `.wandb` file has."""
    points: Points = {}
    config, files, code = [], [], None
    for record in wandb_records(file):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            values = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
            }
            for key, value in values.items():
                if not key.startswith("_"):
                    points.setdefault(key, []).append((values["_step"], value))
        elif kind in ("config", "run"):
            of_run = record.run.config if kind == "run" else record.config
            config += [f"{item.key or '/'.join(item.nested_key)}: {item.value_json}" for item in of_run.update]
        elif kind == "artifact":
            files += [entry.path for entry in record.artifact.manifest.contents]
        elif kind == "exit":
            code = record.exit.exit_code
    return Stored(points, "\n".join(config), sorted(files), code)


def wandb_bytes(file: Path) -> bytes:
    """Return the records of a `.wandb` file that are sent as they are: those of artifacts have local paths too."""
    return b"".join(
        record.SerializeToString() for record in wandb_records(file) if record.WhichOneof("record_type") != "artifact"
    )


def mlflow_runs(server: str, experiment: str) -> list[Any]:
    """Return the runs of an experiment of a server."""
    from mlflow import MlflowClient

    client = MlflowClient(server)
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id])) if found else []


def mlflow_run(server: str, run: Any) -> Stored:
    """Return what a server has of a run."""
    from mlflow import MlflowClient

    client = MlflowClient(server)
    points = {
        key: [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key)]
        for key in run.data.metrics
    }
    files = [file.path for file in client.list_artifacts(run.info.run_id)]
    return Stored(points, json.dumps(run.data.params | run.data.tags), files)


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """Run an MLflow server on a free port of this machine, with a database in `folder`; yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "files")),
    ]
    with (
        open(folder / "server.log", "wb") as log,
        subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True) as process,
    ):
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_for(f"{address}/health", process)
            yield address
        finally:
            process.terminate()


def _wait_for(address: str, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            assert process.poll() is None, "the server has ended"
            time.sleep(0.1)
        else:
            return
    raise TimeoutError(address)


def trackio_run(folder: Path, project: str) -> Stored:
    """Return what trackio's store in `folder` has of the only run of a project, read in a process with that store."""
    program = (
        "import json, sys\n"
        "from trackio.sqlite_storage import SQLiteStorage as store\n"
        "(name,) = {record['name'] for record in store.get_run_records(sys.argv[1])}\n"
        "print(json.dumps([store.get_logs(sys.argv[1], name), store.get_run_config(sys.argv[1], name)]))\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", program, project],
        env={"TRACKIO_DIR": str(folder), "HOME": str(folder), "PATH": ""},
        check=True,
        capture_output=True,
    ).stdout
    logs, config = json.loads(output.splitlines()[-1])
    points: Points = {}
    for log in logs:
        for key, value in log.items():
            if "/" in key:
                points.setdefault(key, []).append((log["step"], value))
    return Stored(points, json.dumps(config), [])
