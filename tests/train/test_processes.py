"""Several processes train as one: torchrun, accelerate launch, and two launchers that stand for two machines."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from t2t_ref.train import fit
from t2t_ref.train.__main__ import parse

pytestmark = [
    pytest.mark.xdist_group("processes"),  # they share a run
    pytest.mark.skipif(sys.platform == "win32", reason="torchrun of torch's wheels for Windows lacks libuv"),
]
# No dropout: each process draws its own. SGD: where a gradient is nearly 0, AdamW makes a step of a rounding error.
RECIPE = """digits --img-size 32 --model-options embed_dim=16 depth=1 num_heads=2 token_dim=8 performer_drop_rate=0.0
    --epochs 4 --updates-per-epoch 3 --optimizer sgd --lr 0.1 --ema-decay 0.5 --log-every 1""".split()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


def launch(*command: str) -> subprocess.Popen:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)


def ended(process: subprocess.Popen) -> str:
    """Its output, when it has ended."""
    try:
        text, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, text
    return text


def options(batch_size: int, folder: Path) -> list[str]:
    return ["-m", "t2t_ref.train", *RECIPE, "--cpu", "--batch-size", str(batch_size), "--output", str(folder)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    fit(parse([*RECIPE, "--batch-size", "32"])[1], folder, cpu=True)
    return folder


def assert_equals(folder: Path, one_process: Path, processes: int) -> None:
    ours, theirs = (
        [json.loads(line) for line in (path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        for path in (folder, one_process)
    )
    started = [line for line in ours if line["kind"] in ("run", "resume")][-1]
    assert started["processes"] == processes and started["images_per_update"] == 32
    ours = [line for line in ours if line["kind"] != "resume"]
    assert [line["kind"] for line in ours] == [line["kind"] for line in theirs]  # written by one process alone
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm", "accuracy", "test_loss", "test_accuracy"):
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), rel=1e-3), name
    expected = tiny.weights(one_process)
    for name, tensor in tiny.weights(folder).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_two_machines_with_half_the_batch_go_on_where_one_process_was_cut(one_process, tmp_path):
    """Two launchers that stand for two machines; the second one sees no output folder."""

    def cut(model, update):
        if update == 5:
            raise KeyboardInterrupt

    recipe = parse([*RECIPE, "--batch-size", "32"])[1]
    with pytest.raises(KeyboardInterrupt):  # one process begins, two go on from its state, which one of them reads
        fit(recipe, tmp_path / "first", cpu=True, after_update=cut)
    nodes = [*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1"]
    nodes += ["--master-port", str(free_port())]
    folders = tmp_path / "first", tmp_path / "second"
    machines = [
        launch(*nodes, "--node-rank", str(rank), *options(16, folder), "--resume")
        for rank, folder in enumerate(folders)
    ]
    shown = "".join(ended(machine) for machine in machines)
    assert shown.count("epoch   4 of 4") == 1 and shown.count("going on from") == 1 and "epoch   1 of 4" not in shown
    assert not folders[1].exists()
    assert_equals(folders[0], one_process, processes=2)


def test_accelerate_launch(one_process, tmp_path):
    # --multi_gpu is what makes it start several processes; its own --cpu starts one, and leaves the rest to MPI
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--main_process_port", str(free_port())]
    shown = ended(launch(*launcher, *options(16, tmp_path)))
    assert "32 images each, on 2 x cpu" in shown
    assert_equals(tmp_path, one_process, processes=2)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
