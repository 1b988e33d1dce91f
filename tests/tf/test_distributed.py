"""Several replicas compute what one computes, also when they hold different numbers of label tokens.

Keras adds up what replicas return from `compute_loss`; a mean per replica would be reported as twice the loss, and
would give each label of a replica with few of them too much weight. Other processes run at once, the one replica here.
"""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.tf.distributed_worker import train
from tests.tolerances import FLOAT32_GRADIENTS, relative_error

SECONDS = 1000


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


def start(kind, folder, **environment):
    command = [sys.executable, "-m", "tests.tf.distributed_worker", kind, str(folder)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment}
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request):
    """Results by file name."""
    folder = tmp_path_factory.mktemp("runs")
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(2)]}
    processes = [start("mirrored", folder)]
    for index in range(2):
        config = {"cluster": cluster, "task": {"type": "worker", "index": index}}
        processes.append(start("workers", folder, TF_CONFIG=json.dumps(config)))
    try:
        replicas, losses, weights = train("single")
        for process in processes:
            printed, _ = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, printed[-4000:]
    finally:
        for process in processes:
            process.kill()
    single = {"replicas": replicas, "losses": losses, **weights}
    return {"single": single, **{file.stem: dict(np.load(file)) for file in folder.iterdir()}}


@pytest.mark.parametrize("name", ["mirrored-0", "workers-0", "workers-1"])
def test_two_replicas_train_as_one(runs, name):
    expected, actual = runs["single"], runs[name]
    assert (expected["replicas"], actual["replicas"]) == (1, 2)
    assert actual["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert expected["losses"][1] < expected["losses"][0]
    for name in expected.keys() - {"losses", "replicas"}:
        assert relative_error(actual[name], expected[name], least_scale=0.1) < FLOAT32_GRADIENTS, name
