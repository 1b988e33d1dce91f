"""K4: several replicas compute and report what one does, also with different numbers of rows and labels, or no rows.

Keras adds up what replicas return from `compute_loss`, and averages it by rows for the log; a mean per replica would
give each label of a replica with few of them too much weight. Other processes run at once, the one replica here.
"""

import json
import os
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest

from idefics_tf.gradient_accumulation import check_accumulation
from tests.tf.distributed_worker import CASES, strategy_of, train
from tests.tolerances import FLOAT32_ACTIVATIONS, relative_error

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
        single = {f"single-0-{case}": train(strategy_of("single"), case) for case in CASES}
        for process in processes:
            printed, _ = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, printed[-4000:]
    finally:
        for process in processes:
            process.kill()
    return single | {file.stem: dict(np.load(file)) for file in folder.iterdir()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["mirrored-0", "workers-0", "workers-1"])
def test_two_replicas_train_as_one(runs, name, case):
    expected, actual = runs[f"single-0-{case}"], runs[f"{name}-{case}"]
    assert (expected["replicas"], actual["replicas"]) == (1, 2)
    for losses in ("loss", "val_loss"):
        assert actual[losses] == pytest.approx(expected[losses], rel=1e-5)
        assert expected[losses][1] < expected[losses][0]
    for weight in expected.keys() - {"loss", "val_loss", "replicas"}:
        assert relative_error(actual[weight], expected[weight], least_scale=0.1) < FLOAT32_ACTIVATIONS, weight


@pytest.mark.parametrize("optimizer", [{"use_ema": True}, "scaled"])
def test_accumulation_that_replicas_cannot_do_is_refused(optimizer):
    inner = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2, **({} if optimizer == "scaled" else optimizer))
    if optimizer == "scaled":
        inner = keras.optimizers.LossScaleOptimizer(inner)
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=2 .* several replicas"):
        check_accumulation(inner)
