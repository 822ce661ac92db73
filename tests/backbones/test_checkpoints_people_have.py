"""Official files as people keep them: wrapped, averaged, with other values beside the weights; and hostile ones."""

from __future__ import annotations

import argparse
import collections
import datetime
import os
import pathlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ebm_prior.backbones.nvae.adapter import NVAE
from ebm_prior.backbones.safe_loading import load_file
from ebm_prior.backbones.state_dicts import bare, completed, weights_of
from tiny_nvae import tiny, tiny_args, trained_tiny, weights, write
from torch import Tensor
from workshop import Workshop

from ebm_prior.errors import AssumptionWarning, CheckpointError, ConfigurationError, few
from ebm_prior.storage.checkpoint import load_backbone
from ebm_prior.storage.weights import check_state, fingerprint

HERE = Path("checkpoint.pt")


def wrapped(prefix: str) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in weights(trained_tiny()).items()}


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "vae.", "module.module.", "_orig_mod.module.", "model.module._orig_mod."],
)
def test_what_wrappers_put_before_all_names_goes(tmp_path: Path, prefix: str) -> None:
    with pytest.warns(AssumptionWarning, match="without the wrappers'"):
        loaded = NVAE.load_official(write(tmp_path, state=wrapped(prefix)))
    assert fingerprint(loaded) == fingerprint(trained_tiny())


def test_names_of_a_part_that_was_compiled() -> None:
    state = {"encoder._orig_mod.0.weight": torch.ones(1), "decoder.weight": torch.ones(1)}
    with pytest.warns(AssumptionWarning, match="_orig_mod"):
        assert list(bare(state, HERE)) == ["encoder.0.weight", "decoder.weight"]
    with pytest.raises(CheckpointError, match="each tensor once"):
        bare({"a._orig_mod.b": torch.ones(1), "a.b": torch.ones(1), "c.b": torch.ones(1)}, HERE)


@pytest.mark.parametrize("entry", ["ema", "ema_state_dict", "model_ema"])
@pytest.mark.parametrize("form", ["whole", "parameters", "shadow", "AveragedModel"])
def test_averaged_weights_are_a_choice(tmp_path: Path, entry: str, form: str) -> None:
    model = trained_tiny()
    parameters = {name.removeprefix("network.") for name, _ in model.named_parameters()}
    average = {
        key: t + (key in parameters) for key, t in weights(model).items() if form != "parameters" or key in parameters
    }
    kept: Any = {"decay": 0.999, "shadow": average} if form == "shadow" else average
    if form == "AveragedModel":
        kept = {"n_averaged": torch.tensor(3), **{f"module.{key}": t for key, t in average.items()}}
    path = write(tmp_path, **{entry: kept})
    with pytest.warns(
        AssumptionWarning, match=rf"plain and averaged weights \({entry}\): the plain ones .* weights=ema"
    ):
        plain = load_backbone("nvae", path)
    assert (
        fingerprint(plain)
        == fingerprint(model)
        == fingerprint(load_backbone("nvae", path, options={"weights": "plain"}))
    )
    averaged = load_backbone("nvae", path, options={"weights": "ema"})
    ours = dict(model.network.named_parameters())
    assert all(torch.equal(p, ours[key] + 1) for key, p in averaged.network.named_parameters())  # type: ignore[attr-defined]
    for wrong, said in (({"weights": "best"}, "expected one of plain, ema"), ({"wights": "ema"}, "wights: NVAE reads")):
        with pytest.raises(ConfigurationError, match=said):
            load_backbone("nvae", path, options=wrong)


def test_an_average_that_is_not_there_and_one_that_is_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="holds no averaged weights"):
        NVAE.load_official(write(tmp_path), weights="ema")
    with pytest.warns(AssumptionWarning, match="averaged weights alone"):
        assert (
            weights_of({"ema": {"a": torch.ones(1), "b": torch.ones(2)}}, write(tmp_path), "the weights")["b"].sum()
            == 2
        )


BESIDE: dict[str, Any] = {
    "numpy float": np.float64(1.5),
    "numpy half": np.float16(1.5),
    "numpy int": np.int32(-3),
    "numpy bool": np.bool_(True),
    "big-endian": np.array([7], dtype=">i4")[0],
    "array": np.arange(6.0).reshape(2, 3),
    "objects": np.array([1, "a", None], dtype=object),
    "texts": np.array(["a", "bc"]),
    "random state": np.random.RandomState(0).get_state(),
    "path": pathlib.PurePosixPath("/runs/a"),
    "own path": Path("runs") / "b",
    "windows path": pathlib.PureWindowsPath("C:/runs"),
    "defaultdict": collections.defaultdict(list, {"loss": [1.0]}),
    "nested defaultdict": collections.defaultdict(dict, {"a": collections.defaultdict(float, {"b": 1.0})}),
    "OrderedDict": collections.OrderedDict(a=1),
    "Counter": collections.Counter("aab"),
    "deque": collections.deque([1, 2], maxlen=5),
    "containers": [(1, {2}), {"a": b"bytes", 3: 1 + 2j}],
    "Namespace": argparse.Namespace(a=argparse.Namespace(b=1)),
    "date": datetime.datetime(2024, 1, 1),
    "delta": datetime.timedelta(hours=3),
}


@pytest.mark.parametrize("value", BESIDE)
def test_values_that_can_run_nothing_may_stand_beside_the_weights(tmp_path: Path, value: str) -> None:
    path = write(tmp_path, args=tiny_args(extra=BESIDE[value]), best_fid=BESIDE[value])
    assert fingerprint(NVAE.load_official(path)) == fingerprint(trained_tiny())


def test_numbers_of_numpy_and_paths_are_read(tmp_path: Path) -> None:
    values = {
        key: BESIDE[key] for key in ("numpy float", "numpy half", "numpy int", "numpy bool", "big-endian", "path")
    }
    torch.save(values, tmp_path / "file.pt")
    read = load_file(tmp_path / "file.pt", "values")
    assert list(read.values()) == [1.5, 1.5, -3, True, 7, "/runs/a"]
    assert [type(value) for value in read.values()] == [float, float, int, bool, int, str]
    path = write(tmp_path, args=tiny_args(num_channels_enc=np.int64(3), use_se=np.bool_(True)))
    assert NVAE.load_official(path).architecture == tiny().architecture


def test_arguments_as_a_dict_the_folder_and_missing_counts(tmp_path: Path) -> None:
    state = {key: t for key, t in weights(trained_tiny()).items() if not key.endswith("num_batches_tracked")}
    assert len(state) < len(weights(trained_tiny()))
    path = write(tmp_path, args=vars(tiny_args()), state=state)
    from_folder = load_backbone("nvae", path.parent)
    counts = [t for key, t in from_folder.state_dict().items() if key.endswith("num_batches_tracked")]
    assert counts
    assert all(t.dtype == torch.int64 and t == 0 for t in counts)
    expected = trained_tiny().state_dict()
    assert all(torch.equal(t, expected[k]) for k, t in from_folder.state_dict().items() if not k.endswith("tracked"))
    assert completed({}, {"a.weight": torch.ones(1)}) == {}


def test_no_message_lists_more_than_ten_names(tmp_path: Path) -> None:
    assert few(range(12)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
    assert few(["x" * 1000]) == "x" * 200 + "…"
    expected = {f"layer{i}": torch.ones(1) for i in range(4000)}
    found = {f"other{i}": torch.ones(1) for i in range(4000)}
    with pytest.raises(
        CheckpointError, match=r"missing: layer0 \(1,\), .* and 3995 more; unexpected: other0"
    ) as caught:
        check_state(found, expected, HERE)
    assert len(str(caught.value)) < 1000
    state = {f"{key}.{i}": t for i, (key, t) in enumerate(weights(trained_tiny()).items())}
    with pytest.raises(CheckpointError) as caught:
        NVAE.load_official(write(tmp_path, state=state))
    assert len(str(caught.value)) < 1500


class Calls:
    """Unpickling this calls a function, or gives an instance a state."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


def hostile(marker: Path) -> dict[str, tuple[Any, str]]:
    code = f"open({str(marker)!r}, 'w')"
    return {
        "os.system": (Calls(os.system, (f"touch {marker}",)), "posix.system"),
        "eval": (Calls(eval, (code,)), "eval"),
        "exec": (Calls(exec, (code,)), "exec"),
        "getattr": (Calls(getattr, (Path(marker), "touch")), "getattr"),
        "import": (Calls(__import__, ("os",)), "__import__"),
        "touch": (Calls(Path.touch, (marker,)), "getattr|touch"),
        "in an array": (np.array([Calls(os.mkdir, (str(marker),))], dtype=object), "posix.mkdir"),
        "in a path": (Calls(Path, (Calls(os.mkdir, (str(marker),)),)), "posix.mkdir"),
        "in a defaultdict": (Calls(collections.defaultdict, (os.mkdir, {})), "posix.mkdir"),
        "in a Namespace": (argparse.Namespace(a=Calls(os.mkdir, (str(marker),))), "posix.mkdir"),
        "as a factory": (Calls(collections.defaultdict, (list,), Calls(os.mkdir, (str(marker),))), "posix.mkdir"),
        "numpy's loader": (Calls(np.load, ("x.npy", None, True)), "numpy.load"),
        "numpy's file": (Calls(np.fromfile, (str(marker),)), "fromfile"),
        "another class": (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    }


@pytest.mark.parametrize("case", hostile(HERE))
@pytest.mark.parametrize("declared_safe", [False, True])
def test_no_value_runs_code(tmp_path: Path, case: str, declared_safe: bool) -> None:
    value, name = hostile(tmp_path / "marker")[case]
    path = write(tmp_path, best_fid=value)
    functions: list[Callable[..., Any]] = [os.system, os.mkdir, eval, exec, np.load, Path.touch, torch.nn.Linear]
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(functions if declared_safe else [])
    try:
        declared = torch.serialization.get_safe_globals()
        with pytest.raises(CheckpointError, match=rf"the name \S*({name})\S*, refused because .* save the file again"):
            NVAE.load_official(path)
        assert set(torch.serialization.get_safe_globals()) == set(declared)  # the process's own list is as it was
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
    assert not (tmp_path / "marker").exists()


SNEAKY: dict[str, Callable[[], Any]] = {
    "meta": lambda: torch.ones(3, device="meta"),
    "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "repeated": lambda: torch.ones(1).expand(10**10),
    "list": lambda: [1.0, 2.0, 3.0],
}


@pytest.mark.parametrize("case", SNEAKY)
def test_tensors_that_are_no_weights_are_refused(tmp_path: Path, case: str) -> None:
    with pytest.raises(CheckpointError, match=r"dense tensors|one another's copies|of another type"):
        NVAE.load_official(write(tmp_path, state={**weights(trained_tiny()), "stem.bias": SNEAKY[case]()}))


def test_a_compressed_bomb_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "checkpoint.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(50_000_000))
    with pytest.raises(CheckpointError, match="damaged file"):
        NVAE.load_official(tmp_path)


def test_convert_takes_the_average_and_says_what_it_takes(workshop: Workshop, tmp_path: Path) -> None:
    average = {key: t + 1 if t.is_floating_point() else t for key, t in weights(trained_tiny()).items()}
    path = write(tmp_path, ema=average)
    words = ("convert", "--backbone", "nvae", "--ckpt", path, "--out")
    remarks = workshop.run(*words, tmp_path / "plain.safetensors").stderr
    assert (
        "note: checkpoint.pt holds plain and averaged weights (ema): the plain ones (state_dict) were taken" in remarks
    )
    assert "note" not in workshop.run(*words, tmp_path / "ema.safetensors", "--set", "weights=ema").stderr
    plain, ema = (load_backbone(None, tmp_path / f"{name}.safetensors") for name in ("plain", "ema"))
    assert fingerprint(plain) == fingerprint(trained_tiny()) != fingerprint(ema)
