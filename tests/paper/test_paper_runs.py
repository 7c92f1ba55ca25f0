"""Runs: what decides their figures, and that no interruption does."""

from __future__ import annotations

import argparse
import dataclasses
import time

import pytest
import torch

pytest.importorskip("lightning")

from benchmarks.paper import results, sweep
from benchmarks.paper.config import BATCHED, Config, Execution, add_options, from_options
from benchmarks.paper.train import prepare, run
from tests.paper.runs import options, start

OUTCOME = ("key", "config", "alpha", "s_alpha", "figures", "loss", "diverged_at", "counts")


def outcome(record):
    return {name: record[name] for name in OUTCOME}


def parsed(arguments):
    parser = argparse.ArgumentParser()
    add_options(parser, Config)
    add_options(parser, Execution)
    found = parser.parse_args([*arguments, "--quiet"])
    return from_options(Config, found), from_options(Execution, found)


def here(data, runs, **changes):
    torch.set_num_threads(1)
    return run(*parsed(options(data, runs, **changes)))


def test_a_run_killed_in_its_middle_ends_as_one_that_was_not(data, tmp_path):
    changes = {"alpha": "three", "steps": 24, "channels": 64}
    expected = here(data, tmp_path / "whole", **changes)
    killed = tmp_path / "killed"
    process = start("train", options(data, killed, **changes))
    while not list(killed.glob("*.ckpt")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (killed / "results.jsonl").exists()

    assert outcome(here(data, killed, **changes)) == outcome(expected)
    assert expected["alpha"] != [1, 1, 1]
    assert expected["loss"][-1] < expected["loss"][0]
    assert list(killed.glob("*.ckpt")) == []


@pytest.mark.parametrize("changes", [{"detector": "fasterrcnn"}, {"alpha": "attention"}])
def test_a_run_interrupted_at_every_checkpoint_ends_as_one_that_was_not(data, tmp_path, changes):
    changes = {"steps": 6, "checkpoint-every": 2, **changes}
    expected = here(data, tmp_path / "whole", **changes)
    arguments = parsed(options(data, tmp_path / "interrupted", **changes))
    records = [run(*arguments, deadline=0) for _ in range(3)]
    assert records[:2] == [None] * 2
    assert outcome(records[2]) == outcome(expected)


def test_seeds_decide_weights_and_batches_and_factors_do_not(data, tmp_path):
    """With no learning at all, the loss of the first step shows both."""
    losses = {}
    for alpha, seed in (("1", 0), ("0,0,0", 0), ("1", 1)):
        config, execution = parsed(options(data, tmp_path, alpha=alpha, seed=seed, steps=1))
        experiment, _ = prepare(config, execution)
        weights = {
            name: value
            for name, value in experiment.detector.state_dict().items()
            if not name.endswith("fpn.alpha")
        }
        losses[alpha, seed] = weights, experiment.batches(experiment.batches.split.open(), 5)
    (weights, batch), (other, same), (third, another) = losses.values()
    assert all(torch.equal(weights[name], other[name]) for name in weights)
    assert torch.equal(batch[0], same[0])
    assert not all(torch.equal(weights[name], third[name]) for name in weights)
    assert not torch.equal(batch[0], another[0])


def losses_and_gradients(experiment, batched):
    detector = experiment.detector.train()
    trained = [p for p in detector.parameters() if p.requires_grad]
    batch = experiment.batches(experiment.batches.split.open(), 1)
    losses = experiment.losses(*batch, batched=batched)
    return losses, torch.autograd.grad(sum(losses.values()), trained)


@pytest.mark.parametrize("detector", BATCHED)
@pytest.mark.parametrize("changes", [{}, {"crop": 0, "size": "120 170"}], ids=["crops", "padded"])
def test_losses_of_a_batch_are_those_of_its_images(data, tmp_path, detector, changes):
    config, execution = parsed(options(data, tmp_path, detector=detector, channels=16, **changes))
    experiment, _ = prepare(config, execution)
    expected, gradients = losses_and_gradients(experiment, batched=False)
    assert min(loss.item() for loss in expected.values()) > 0
    found, others = losses_and_gradients(experiment, batched=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for gradient, other in zip(gradients, others, strict=True):
        close = {"rtol": 1e-3, "atol": 1e-5 * float(gradient.abs().max()) + 1e-9}
        torch.testing.assert_close(other, gradient, **close)


@pytest.mark.parametrize("backbone", ["efficientnet_lite0", "resnet18"])
def test_depthwise_convolutions_stay_in_float32_on_a_cpu(data, tmp_path, backbone):
    if backbone == "efficientnet_lite0":
        pytest.importorskip("efficientnet_lite_pytorch")
    changes = {"backbone": backbone, "weights": "none", "precision": "bf16-mixed"}
    config, execution = parsed(options(data, tmp_path, **changes))
    backbone_with_fpn = prepare(config, execution)[0].detector.backbone
    found = {}
    for name in ("body", "fpn"):
        part = backbone_with_fpn.get_submodule(name)
        part.register_forward_hook(lambda _, __, out, name=name: found.update({name: out["0"]}))
    with torch.autocast("cpu", torch.bfloat16):
        backbone_with_fpn(torch.rand(1, 3, 64, 64))
    depthwise = backbone == "efficientnet_lite0"
    assert found["body"].dtype == (torch.float32 if depthwise else torch.bfloat16)
    assert found["fpn"].dtype == torch.bfloat16


def test_a_compiled_network_trains_the_same(data, tmp_path, monkeypatch):
    asked = []

    def compile_without_inductor(function, **how):
        asked.append(how)
        return compiler(function, backend="aot_eager", dynamic=how["dynamic"])

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", compile_without_inductor)
    config, execution = parsed(options(data, tmp_path, compile="reduce-overhead"))
    compiled = losses_and_gradients(prepare(config, execution)[0], batched=True)
    plain = losses_and_gradients(
        prepare(config, dataclasses.replace(execution, compile=""))[0], batched=True
    )
    assert asked == [{"mode": "reduce-overhead", "dynamic": False}]
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)


def test_the_first_function_is_that_of_the_start(data, tmp_path):
    """Whatever the factors are: they then only decide how weights learn."""

    def first(**changes):
        config, execution = parsed(options(data, tmp_path, **changes))
        detector = prepare(config, execution)[0].detector.double().eval()
        image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
        return detector.backbone.fpn.alpha, detector.backbone(image.double())

    for other in (".3,.5,.7", "s-alpha"):
        factors, features = first(alpha=".2,1,2", start=other)
        _, expected = first(alpha=other)
        torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)
        assert factors.tolist() == pytest.approx([0.2, 1, 2])
    with pytest.raises(ValueError, match="--start one"):
        here(data, tmp_path, start="one")


def test_finished_runs_are_not_repeated(data, tmp_path):
    first = here(data, tmp_path, steps=2, alpha="0.5")
    assert here(data, tmp_path, steps=2, alpha=".50") == first
    elsewhere = {"results": tmp_path / "other.jsonl", "done": tmp_path / "results.jsonl"}
    assert here(data, tmp_path, steps=2, alpha=".5", **elsewhere) == first
    assert len(results.read([tmp_path / "results.jsonl"])) == 1


def test_s_alpha_is_estimated_at_the_size_of_training(data, tmp_path):
    found = [
        here(data, tmp_path, steps=1, alpha="s-alpha", size=size)["s_alpha"]["samples"]["counts"]
        for size in ("128 192", "256 384")
    ]
    finest = [counts[0] / sum(counts) for counts in found]
    assert finest[0] > finest[1]


def test_a_diverged_run_is_recorded_as_such(data, tmp_path):
    record = here(data, tmp_path, steps=8, lr=1e12, warmup=0)
    assert record["diverged_at"] is not None
    assert record["figures"]["AP50_tiny"] == 0


def test_tiles_and_whole_images_are_judged_against_the_same_objects(data, tmp_path):
    records = [here(data, tmp_path, steps=1, tile=tile) for tile in ("96 96", "192 128")]
    whole = here(data, tmp_path, steps=1)
    assert records[0]["counts"] == whole["counts"]
    assert records[1]["figures"].keys() == whole["figures"].keys()


def test_a_wish_that_cannot_be_met_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="--crop 60"):
        here(data, tmp_path, crop=60)
    with pytest.raises(FileNotFoundError, match="val-json"):
        here(data, tmp_path, **{"val-json": tmp_path / "none.json"})


def test_records_survive_a_writer_that_was_killed(tmp_path):
    path = tmp_path / "results.jsonl"
    results.append(path, {"key": "a"})
    with path.open("ab") as file:
        file.write(b'{"key": "b", "fig')
    results.append(path, {"key": "c"})
    results.append(path, {"key": "a", "again": True})
    assert results.read([path, tmp_path / "missing"]) == [{"key": "a"}, {"key": "c"}]


def test_a_sweep_runs_pairs_of_a_seed_before_the_next_seed(data, tmp_path):
    planned = sweep.plan(sweep.parse(["fig1", "table1", "--seeds", "2", *options(data, tmp_path)]))
    assert [config.seed for config in planned] == [0] * 9 + [1] * 9
    assert [config.alpha for config in planned[:2]] == ["1", "s-alpha"]


def test_a_sweep_does_what_is_left_and_stops_in_time(data, tmp_path, capsys):
    words = ["fig1", "--seeds", "1", "--grid", ".3", "--quiet", *options(data, tmp_path, steps=3)]
    planned, execution = sweep.plan(sweep.parse(words)), parsed(options(data, tmp_path))[1]
    assert sweep.sweep(planned, execution, jobs=1, deadline=0.0) == 0
    assert "0 runs done now, 0 before, 3 left, 0 failed" in capsys.readouterr().err
    run(planned[0], execution)
    broken = dataclasses.replace(planned[1], backbone="efficientnet_lite0", weights="missing")
    assert sweep.sweep([*planned, broken], execution, jobs=1, deadline=float("inf")) == 1
    assert "2 runs done now, 1 before, 0 left, 1 failed" in capsys.readouterr().err
    found = results.read([tmp_path / "results.jsonl"])
    assert [record["config"]["alpha"] for record in found] == ["1", "s-alpha", "0.3"]
