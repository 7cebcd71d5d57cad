"""`engram train`: the same settings give the same run on one worker and on two."""

import json

import pytest
from safetensors.torch import load_file
from torchrun import command, start

from engram_lm.cli import main
from engram_lm.train.journal import read_metrics

SHORT = ("--tokens=768", "--set=train.lr=0.002", "--set=train.checkpoint_every=3")  # 6 steps


@pytest.fixture(scope="module")
def alone(prepared, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    arguments = command(out, prepared, *SHORT)
    assert main(arguments[arguments.index("engram_lm") + 1 :]) == 0
    return out


@pytest.mark.parametrize("backbone", ["ddp", "fully_shard"])
def test_two_workers_take_the_steps_of_one(alone, prepared, tmp_path, backbone):
    process = start(tmp_path, prepared, *SHORT, f"--set=train.backbone={backbone}")
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    one, two = read_metrics(alone), read_metrics(tmp_path)
    assert json.loads(said.splitlines()[-1])["step"] == len(one) == len(two) == 6
    for before, after in zip(one, two, strict=True):
        # Float32 sums in another order; Muon of parts of a matrix differs by 3e-5 a step, and a
        # token near the border between two experts may then go to the other.
        tolerance = 1e-6 if after["step"] == 1 else 2e-3
        assert after["loss"] == pytest.approx(before["loss"], rel=tolerance)
        assert after["rows_touched/table_1"] == before["rows_touched/table_1"]
    assert two[-1]["validation_bpb"] == pytest.approx(one[-1]["validation_bpb"], rel=2e-3)
    assert two[-1]["exchanged_bytes"] > 0 and "exchanged_bytes" not in one[-1]
    files = [sorted(path.name for path in (out / "model").iterdir()) for out in (alone, tmp_path)]
    assert files[0] == files[1]
    shapes = [
        {name: tensor.shape for name, tensor in load_file(out / "model/model.safetensors").items()}
        for out in (alone, tmp_path)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.long
@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (4, 2)])
def test_a_run_goes_on_with_another_number_of_workers(tmp_path, sizes):
    import signal

    from torchrun import wait_for_steps

    longer = ("--tokens=768000", *SHORT[1:])
    process = start(tmp_path, None, *longer, workers=sizes[0])
    wait_for_steps(tmp_path, 3, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    stopped = read_metrics(tmp_path)[-1]["step"]
    process = start(tmp_path, None, *longer, workers=sizes[1])
    wait_for_steps(tmp_path, stopped + 3, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert f"going on from step {stopped} (" in errors
    steps = read_metrics(tmp_path)
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    starts = json.loads((tmp_path / "config.json").read_text())["starts"]
    assert [start["workers"] for start in starts] == list(sizes)
