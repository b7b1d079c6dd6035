"""``python -m ride_plugin`` prints what the library counts, and its errors say what to do."""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ride_plugin import RIDEWrapper, cost_report, plan
from ride_plugin._command_line import main
from ride_plugin.longtail import analyze, shot_report
from ride_plugin.routing import routing_report
from tests.backbones import plain_convnet

CONVNET = "tests.backbones:plain_convnet"


def any_size() -> nn.Module:
    convolutions = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1)
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.late, self.head = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.late(self.words(ids)).relu().mean(1))


class Outputs(nn.Module):
    """Two heads, whose logits are returned in different ways, or one more dimension."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.early, self.late, self.one, self.two = (nn.Linear(6, size) for size in (6, 6, 5, 7))

    def forward(self, x: torch.Tensor) -> Any:
        x = self.late(self.early(x).relu()).relu()
        if self.how == "nested":
            return x, (self.one(x), self.two(x))
        if self.how == "dict":
            return {"one": self.one(x), "two": self.two(x)}
        return self.one(x)[:, None] if self.how == "slices" else (self.one(x), self.two(x))


def outputs_tuple() -> nn.Module:
    return Outputs("tuple")


def outputs_dict() -> nn.Module:
    return Outputs("dict")


def outputs_nested() -> nn.Module:
    return Outputs("nested")


def outputs_slices() -> nn.Module:
    return Outputs("slices")


def features() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.early, self.head = nn.Linear(3, 6), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("broken")


def values_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_plan_prints_the_plan(capsys):
    found = plan(plain_convnet(), num_experts=(3,), expert_widths=(0.75,))
    values = values_of(capsys, "plan", CONVNET, "--num-experts", "3", "--expert-width", "0.75")
    (row,) = values["rows"]
    assert row["flops_ratio"] == found.rows[0].ratio
    assert row["trunk_share"] == found.rows[0].report.trunk_flops / found.rows[0].report.flops
    assert main(["plan", CONVNET, "--num-experts", "3", "--expert-width", "0.75"]) == 0
    assert str(found) in capsys.readouterr().out


def test_inspect_tells_what_is_shared_and_what_is_forked(capsys):
    model = RIDEWrapper(plain_convnet(), 2, expert_width=0.5)
    report = cost_report(model)
    values = values_of(capsys, "inspect", CONVNET, "--num-experts", "2", "--expert-width", "0.5")
    assert values["fork_at"] == model.fork_at
    assert "resolution levels" in values["reason"]
    assert (values["parameters"], values["flops"]) == (report.parameters, report.flops)
    for side, size in (
        ("shared", report.trunk_parameters),
        ("forked", report.expert_parameters[0]),
    ):
        assert size == sum(m["parameters"] for m in values["modules"] if m["side"] == side)


def test_the_size_of_an_input_can_be_given(capsys):
    sizes = [
        values_of(capsys, "inspect", f"{__name__}:any_size", "--input", given)["flops"]
        for given in ("3,16,16", "3,32,32")
    ]
    assert 3.5 < sizes[1] / sizes[0] < 4.5


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_sizes_that_were_counted_are_told_and_whether_they_were_guessed(capsys, command):
    counted = "FLOPs are those of a row of sizes [3, {0}, {0}]{1}\n"
    arguments = (command, f"{__name__}:any_size", "--num-experts", "2")
    assert main(arguments) == 0
    guessed = counted.format(32, ", which are guessed: `--input` gives others")
    assert capsys.readouterr().out.endswith(guessed)
    assert main([*arguments, "--input", "3,16,16"]) == 0
    assert capsys.readouterr().out.endswith(counted.format(16, ""))
    values = values_of(capsys, *arguments, "--input", "3,16,16")
    assert values["input_sizes"] == [[3, 16, 16]]


@pytest.fixture
def arrays():
    generator = np.random.default_rng(0)
    return {
        "expert_logits": generator.normal(size=(40, 3, 4)).astype("float32"),
        "target": generator.integers(4, size=40),
        "class_counts": np.array([300, 150, 60, 5]),
        "num_experts_used": generator.integers(1, 4, size=40),
    }


def shares_of(arrays, **cuts):
    used, target, counts = (
        torch.from_numpy(arrays[name]) for name in ("num_experts_used", "target", "class_counts")
    )
    return routing_report(used, target, counts, num_experts=3, **cuts)


def test_report_is_the_librarys_own(capsys, tmp_path, arrays):
    np.savez(tmp_path / "routed.npz", **arrays)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    expected = analyze(**tensors)
    shares = shares_of(arrays)
    assert main(["report", str(tmp_path / "routed.npz"), "--csv", str(tmp_path / "out.csv")]) == 0
    assert capsys.readouterr().out == f"{expected}\n\n{shares}\n"
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 1 + 4
    values = values_of(capsys, "report", str(tmp_path / "routed.npz"))
    assert values["accuracy"]["overall"] == expected.report.overall
    assert values["calibration_error"]["few"] == expected.calibration_error.few


@pytest.mark.parametrize("name", ["logits", "predictions"])
def test_report_takes_one_models_logits_or_predicted_classes(capsys, tmp_path, arrays, name):
    logits = arrays["expert_logits"].mean(axis=1)
    arrays = {"target": arrays["target"], "class_counts": arrays["class_counts"]}
    np.savez(
        tmp_path / "p.npz", **arrays, **{name: logits if name == "logits" else logits.argmax(1)}
    )
    values = values_of(capsys, "report", str(tmp_path / "p.npz"), "--many", "200", "--few", "100")
    tensors = [torch.from_numpy(array) for array in (logits, *arrays.values())]
    expected = shot_report(*tensors, many=200, few=100)
    assert values["accuracy"]["few"] == expected.few
    assert ("calibration_error" in values) == (name == "logits")


@pytest.mark.parametrize("name", ["logits", "predictions"])
def test_report_shows_how_many_experts_a_routed_model_used(capsys, tmp_path, arrays, name):
    logits = arrays.pop("expert_logits").mean(axis=1)
    file = tmp_path / "p.npz"
    np.savez(file, **arrays, **{name: logits if name == "logits" else logits.argmax(1)})
    shares = shares_of(arrays, many=200, few=100)
    cuts = ("--many", "200", "--few", "100")
    values = values_of(capsys, "report", str(file), *cuts)
    assert values["experts_used"]["overall"] == list(shares.overall)
    assert values["experts_used"]["few"] == list(shares.few)
    assert main(["report", str(file), *cuts]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith(f"\n\n{shares}\n")
    assert "expert 0" not in printed
    assert printed.count("experts used") == str(shares).count("experts used")
    assert "top-1" in printed
    assert ("calibration error" in printed) == (name == "logits")
    alone = {key: value for key, value in arrays.items() if key != "num_experts_used"}
    np.savez(file, **alone, **{name: logits if name == "logits" else logits.argmax(1)})
    assert main(["report", str(file), *cuts]) == 0
    assert capsys.readouterr().out == printed.removesuffix(f"\n{shares}\n")


@pytest.mark.parametrize("used", [np.full(40, 0), np.full(40, 1.5), np.full(39, 1), np.full(40, 4)])
def test_numbers_of_experts_that_cannot_be_are_refused(capsys, tmp_path, arrays, used):
    np.savez(tmp_path / "p.npz", **arrays | {"num_experts_used": used})
    assert main(["report", str(tmp_path / "p.npz")]) == 2
    assert "num_experts_used" in capsys.readouterr().err
    if used[0] != 4:
        arrays["logits"] = arrays.pop("expert_logits")[:, 0]
        np.savez(tmp_path / "p.npz", **arrays | {"num_experts_used": used})
        assert main(["report", str(tmp_path / "p.npz")]) == 2
        assert "num_experts_used" in capsys.readouterr().err


@pytest.mark.parametrize("more", ["logits", "predictions"])
def test_predictions_of_two_kinds_are_refused(capsys, tmp_path, arrays, more):
    np.savez(tmp_path / "p.npz", **arrays, **{more: arrays["target"]})
    assert main(["report", str(tmp_path / "p.npz")]) == 2
    assert "and one of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "tests.backbones"], "Expected MODULE:FACTORY"),
        (["inspect", "tests/backbones.py:plain_convnet"], "as `import` names it"),
        (["inspect", "tests.nowhere:net"], "No module named 'tests.nowhere'"),
        (["inspect", "tests.backbones:Lambda"], "takes no arguments"),
        (["inspect", "builtins:dict"], "to return a torch.nn.Module, but got dict"),
        (["inspect", CONVNET, "--input", "3,x"], "such as 3,224,224, but got '3,x'"),
        (["inspect", CONVNET, "--fork-at", "layer9"], "argument --fork-at"),
        (["plan", CONVNET, "--num-experts", "0"], "argument --num-experts"),
        (["plan", CONVNET, "--expert-width", "2"], "argument --expert-width to be"),
        (["plan", CONVNET, "--budget", "0"], "argument --budget"),
        (["inspect", CONVNET, "--input", "7,8,8"], "does not run on --input"),
        (["inspect", "tests.test_command_line:Words", "--input", "16"], "Leave it out for a"),
        (["inspect", "tests.test_command_line:Broken"], "accepts. The most plausible attempt"),
        (["inspect", "tests.test_command_line:Broken"], "Pass --input: a batch"),
        (["inspect", "tests.test_command_line:Broken"], "is wrapped in a script"),
        (["report", "nowhere.npz"], "No such file"),
        (
            ["report", "README.md"],
            "Cannot read README.md as an .npz file of numbers (it is not an archive)",
        ),
    ],
)
def test_errors_say_what_to_do(capsys, arguments, said):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err


HERE = "tests.test_command_line"


@pytest.mark.parametrize("command", ["plan", "inspect"])
@pytest.mark.parametrize(
    ("factory", "options", "num_classes"),
    [
        ("outputs_tuple", ["--logits", "1"], 7),
        ("outputs_tuple", ["--logits", "-2"], 5),
        ("outputs_dict", ["--logits", "two"], 7),
        ("features", ["--num-classes", "8"], 8),
        ("any_size", ["--num-classes", "9"], 9),
    ],
)
def test_the_logits_can_be_told(capsys, command, factory, options, num_classes):
    sizes = "3,8,8" if factory == "any_size" else "6"
    values = values_of(capsys, command, f"{HERE}:{factory}", "--input", sizes, *options)
    if command == "inspect":
        assert values["num_classes"] == num_classes
    else:
        assert values["rows"]


@pytest.mark.parametrize("command", ["plan", "inspect"])
@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("outputs_tuple", "Pass --logits: an index"),
        ("outputs_nested", "--logits takes an index or a name; a function goes into a script"),
        ("outputs_slices", "(What is written in Python here goes into a script"),
        ("features", "pass `--num-classes 8`"),
        ("features", "(What is written in Python here goes into a script"),
    ],
)
def test_errors_advise_what_the_command_has(capsys, command, factory, said):
    assert main([command, f"{HERE}:{factory}", "--input", "6"]) == 2
    assert said in capsys.readouterr().err


def test_widths_that_are_not_possible_advise_what_the_command_has(capsys):
    arguments = ["plan", f"{HERE}:outputs_tuple", "--input", "6", "--logits", "0"]
    assert main([*arguments, "--expert-width", "1", "0.95"]) == 0
    said = capsys.readouterr().out
    assert "or another --fork-at, or `--expert-width 1.0`" in said
    assert "`fork_at" not in said


@pytest.mark.parametrize(
    ("name", "array", "said"),
    [
        ("logits", np.zeros((6, 9)), r"`logits` to be [6, 4], as `target`"),
        ("logits", np.full((6, 4), np.nan), "`logits` to hold no NaN"),
        ("predictions", np.arange(6), "`predictions` to hold class indices from 0 to 3"),
    ],
)
def test_errors_name_the_array_of_the_file(capsys, tmp_path, name, array, said):
    held = {"target": np.arange(6) % 4, "class_counts": [300, 150, 60, 5], name: array}
    np.savez(tmp_path / "p.npz", **held)
    assert main(["report", str(tmp_path / "p.npz")]) == 2
    assert said in capsys.readouterr().err


def test_a_file_without_the_arrays_is_refused(capsys, tmp_path, arrays):
    np.savez(tmp_path / "p.npz", target=arrays["target"])
    assert main(["report", str(tmp_path / "p.npz")]) == 2
    assert "holds ['target']" in capsys.readouterr().err


def test_damaged_files_are_refused(capsys, tmp_path, arrays):
    path = tmp_path / "p.npz"
    np.savez(path, **arrays, predictions=arrays["target"])
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[200] ^= 0xFF
    for data in (b"", whole[:10], whole[: len(whole) // 2], whole[:-10], bytes(flipped)):
        path.write_bytes(data)
        assert main(["report", str(path)]) == 2
        assert "Cannot read" in capsys.readouterr().err


def test_logits_of_another_shape_are_named(capsys, tmp_path, arrays):
    del arrays["expert_logits"]
    for logits in (np.array(3.0), np.zeros((3, 1, 2)), np.zeros((3, 2), dtype=int)):
        np.savez(tmp_path / "p.npz", **arrays, logits=logits)
        assert main(["report", str(tmp_path / "p.npz")]) == 2
        assert "`logits` to be a floating-point tensor [N, C]" in capsys.readouterr().err


def test_pickled_objects_are_not_loaded(capsys, tmp_path):
    np.savez(tmp_path / "p.npz", target=np.array([object()], dtype=object))
    assert main(["report", str(tmp_path / "p.npz")]) == 2
    assert "allow_pickle=False" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path, arrays):
    """As in ``python -m ride_plugin report ... | head``."""
    np.savez(tmp_path / "p.npz", **arrays)
    command = [sys.executable, "-m", "ride_plugin", "report", str(tmp_path / "p.npz"), "--json"]
    root = Path(__file__).resolve().parents[1]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=root, **pipes) as process:
        process.stdout.close()
        said = process.stderr.read().splitlines()
        # torch with an accelerator logs that a package is missing, which is not ours to say.
        assert [line for line in said if "triton not found" not in line] == []
        assert process.wait() == 0


@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_help_tells_the_defaults(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith(f"usage: python -m ride_plugin {command} MODULE:FACTORY [options]")
    defaults = inspect.signature(plan if command == "plan" else RIDEWrapper).parameters
    names = {"plan": ("num_experts", "expert_widths"), "inspect": ("num_experts", "expert_width")}
    for name in names[command]:
        value = defaults[name].default
        values = value if isinstance(value, tuple) else (value,)
        assert f"default: {' '.join(f'{one:g}' for one in values)}" in said
    budget = defaults["max_flops_ratio"].default if command == "plan" else None
    assert budget is None or f"default: {budget}" in said


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "ride_plugin", "--help"]
    root = Path(__file__).resolve().parents[1]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert "inspect" in result.stdout
