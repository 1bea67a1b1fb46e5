"""Damage is named and an older checkpoint is used; a save that fails or dies leaves the earlier ones as they were."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from colossal_core.checkpoint import find_latest, load, read_full, read_manifest, save
from colossal_core.checkpoint import folders as folders_module
from colossal_core.checkpoint import write as write_module
from colossal_core.collectives import Collectives, SingleProcess
from colossal_core.errors import CheckpointError
from colossal_core.mesh import MeshLayout

RunRanks = Callable[[MeshLayout, Callable[[Collectives], Any]], list[Any]]
FOUR = MeshLayout((1, 1, 4, 1, 1))


@pytest.fixture
def alone() -> SingleProcess:
    return SingleProcess(torch.device("cpu"))


@pytest.fixture
def save_steps(tmp_path: Path, state_of: Any, lay: Any, run_ranks: RunRanks) -> Callable[..., None]:
    """Saves steps, one after the other, on four ranks."""

    def save_all(*steps: int, keep: int = 3) -> None:
        for step in steps:
            run_ranks(FOUR, partial(save_one, step, keep))

    def save_one(step: int, keep: int, ranks: Collectives) -> None:
        save(tmp_path, step, lay(state_of(step), ranks), {}, ranks, keep=keep)

    return save_all


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def truncate(file: Path, num_bytes: int) -> None:
    file.write_bytes(file.read_bytes()[:-num_bytes])


def message_of(function: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        function()
    return str(caught.value)


def remove_two(path: Path) -> None:
    for rank in (1, 3):
        (path / f"rank-0000{rank}.safetensors").unlink()


def put_a_link(path: Path) -> None:
    target = (path / "rank-00001.safetensors").rename(path / "elsewhere")
    (path / "rank-00001.safetensors").symlink_to(target)


class Fault(NamedTuple):
    damage: Callable[[Path], object]
    message: str


FAULTS = {
    "truncated": Fault(
        lambda path: truncate(path / "rank-00001.safetensors", 3),
        "checkpoint step-00000200: rank-00001.safetensors is truncated (261 of 264 bytes)",
    ),
    "longer": Fault(
        lambda path: (path / "rank-00001.safetensors").write_bytes(bytes(300)),
        "checkpoint step-00000200: rank-00001.safetensors is too long (300 of 264 bytes)",
    ),
    "flipped": Fault(
        lambda path: flip(path / "rank-00001.safetensors", 263),
        "checkpoint step-00000200: rank-00001.safetensors: chunk adamw.exp_avg of weight[1:2, 0:6] is damaged "
        "(checksum FOUND, expected WRITTEN)",
    ),
    "header": Fault(
        lambda path: flip(path / "rank-00002.safetensors", 40),
        "checkpoint step-00000200: rank-00002.safetensors: the header is damaged (checksum FOUND, expected WRITTEN)",
    ),
    "manifest": Fault(
        lambda path: flip(path / "manifest.json", 300),
        "checkpoint step-00000200: manifest.json is damaged (checksum FOUND, expected WRITTEN)",
    ),
    "manifest cut": Fault(
        lambda path: truncate(path / "manifest.json", 1),
        "checkpoint step-00000200: manifest.json is truncated or is not a manifest",
    ),
    "no manifest": Fault(lambda path: (path / "manifest.json").unlink(), "step 200 incomplete (no manifest.json)"),
    "missing": Fault(
        remove_two,
        "step 200 incomplete (2 of 4 files)",
    ),
    "link": Fault(
        put_a_link,
        "step 200 incomplete (3 of 4 files)",
    ),
    "other step": Fault(
        lambda path: shutil.copy(path.parent / "step-00000100" / "manifest.json", path),
        "checkpoint step-00000200: manifest.json is that of step 100",
    ),
}


def without_checksums(text: str) -> str:
    return re.sub("checksum [0-9a-f]{8}, expected [0-9a-f]{8}", "checksum FOUND, expected WRITTEN", text)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, save_steps: Callable[..., None], run_ranks: RunRanks, fault: str, world_size: int
) -> None:
    save_steps(100, 200)
    damaged = tmp_path / "step-00000200"
    assert (damaged / "rank-00001.safetensors").stat().st_size == 264
    FAULTS[fault].damage(damaged)
    found = run_ranks(MeshLayout((1, 1, world_size, 1, 1)), lambda ranks: find_latest(tmp_path, ranks))
    for item in found:
        assert item.path == tmp_path / "step-00000100"
        assert item.step == 100
        assert tuple(map(without_checksums, item.skipped)) == (f"{FAULTS[fault].message}: using step 100",)


def test_any_flipped_bit_is_found(tmp_path: Path, state_of: Any, lay: Any, alone: SingleProcess) -> None:
    save(tmp_path, 1, lay(state_of(1), alone), {"seed": 1}, alone, keep=1)
    path = tmp_path / "step-00000001"
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        for position in range(len(good)):
            file.write_bytes(good[:position] + bytes([good[position] ^ 1 << position % 8]) + good[position + 1 :])
            with pytest.raises(CheckpointError):
                find_latest(tmp_path, alone)
        file.write_bytes(good)
    assert find_latest(tmp_path, alone) is not None


def test_no_checkpoint_is_usable(tmp_path: Path, save_steps: Callable[..., None], run_ranks: RunRanks) -> None:
    assert run_ranks(FOUR, lambda ranks: find_latest(tmp_path / "absent", ranks)) == [None] * 4
    assert run_ranks(FOUR, lambda ranks: find_latest(tmp_path, ranks)) == [None] * 4
    save_steps(100, 200)
    for step in (100, 200):
        (tmp_path / f"step-{step:08d}" / "manifest.json").unlink()
    messages = run_ranks(FOUR, lambda ranks: message_of(lambda: find_latest(tmp_path, ranks)))
    assert set(messages) == {
        f"no checkpoint was taken from {tmp_path}: none can be used; move them away to start anew:\n"
        "  step 200 incomplete (no manifest.json)\n"
        "  step 100 incomplete (no manifest.json)"
    }


def test_a_damaged_chunk_stops_every_rank_that_loads(
    tmp_path: Path, save_steps: Callable[..., None], state_of: Any, lay: Any, run_ranks: RunRanks
) -> None:
    save_steps(200)
    path = tmp_path / "step-00000200"
    flip(path / "rank-00001.safetensors", 263)
    messages = run_ranks(FOUR, lambda ranks: message_of(lambda: load(path, lay(state_of(1), ranks, blank=True), ranks)))
    assert len(set(messages)) == 1
    assert without_checksums(messages[0]) == (
        f"checkpoint {path} was not loaded: rank 1: checkpoint step-00000200: rank-00001.safetensors: "
        "chunk adamw.exp_avg of weight[1:2, 0:6] is damaged (checksum FOUND, expected WRITTEN)"
    )


def test_all_that_does_not_fit_is_listed(
    tmp_path: Path, save_steps: Callable[..., None], items: Any, state_of: Any, lay: Any, run_ranks: RunRanks
) -> None:
    save_steps(1)
    path = tmp_path / "step-00000001"
    first = state_of(1)[0]
    kind = type(first)
    wanted = [
        kind("parameter", "weight", first.full.double().reshape(6, 4), "flat"),
        kind("parameter", "bias", torch.zeros(4), "flat"),
    ]

    def attempt(ranks: Collectives) -> str:
        # The second rank also asks for what the others do not, as the stages of a pipeline do.
        extra = [kind("ema", "weight", torch.zeros(4), "flat")] if ranks.rank == 1 else []
        return message_of(lambda: load(path, lay([*wanted, *extra], ranks), ranks))

    assert set(run_ranks(FOUR, attempt)) == {
        f"checkpoint {path} was not loaded: 5 tensors do not fit:\n"
        "  parameter of weight: shape [4, 6] in the checkpoint, [6, 4] in this run\n"
        "  parameter of weight: dtype float32 in the checkpoint, float64 in this run, and conversion was not allowed\n"
        "  parameter of bias: not in the checkpoint\n"
        "  ema of weight: not in the checkpoint\n"
        "  adamw.exp_avg of weight: in the checkpoint, but not in this run"
    }


def test_not_strict_leaves_alone_what_one_side_has(
    tmp_path: Path, state_of: Any, lay: Any, alone: SingleProcess
) -> None:
    first, second = state_of(1)
    path = save(tmp_path, 1, lay([first], alone), {}, alone, keep=1)
    found = lay([second], alone, blank=True)
    load(path, found, alone, strict=False)
    assert bool((found[0].local == 77).all())


def test_only_the_newest_are_kept_and_damaged_ones_do_not_count(
    tmp_path: Path, save_steps: Callable[..., None]
) -> None:
    save_steps(1, 2, 3)
    (tmp_path / "step-00000003" / "rank-00000.safetensors").unlink()
    (tmp_path / "step-00000001.backup").mkdir()
    save_steps(4, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000001.backup", "step-00000002", "step-00000003", "step-00000004"
    ]  # fmt: skip
    save_steps(5, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001.backup", "step-00000005"]


def test_what_was_just_saved_is_kept_even_when_newer_ones_are_there(
    tmp_path: Path, save_steps: Callable[..., None]
) -> None:
    save_steps(1, 3)
    save_steps(2, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_the_same_step_is_saved_twice(tmp_path: Path, state_of: Any, lay: Any, alone: SingleProcess) -> None:
    for value in (1, 2):
        save(tmp_path, 5, lay(state_of(value), alone), {"value": value}, alone, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    assert read_manifest(tmp_path / "step-00000005").metadata == {"value": 2}
    assert read_full(tmp_path / "step-00000005", "parameter", "weight")[0, 0] == 2000


class Killed(BaseException):
    """Stands for the end of the process: nothing in the library may catch it and tidy up."""


def die_at(monkeypatch: pytest.MonkeyPatch, count: int) -> list[str]:
    """The process dies at its count-th sync, rename or removal, before (even) or after (odd) doing it; returns the calls made."""
    calls: list[str] = []

    def wrapped(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) * 2 == count:
                raise Killed
            result = original(*args, **options)
            if len(calls) * 2 + 1 == count:
                raise Killed
            return result

        return call

    for module, name in ((os, "fsync"), (os, "rename"), (shutil, "rmtree"), (os, "unlink"), (os, "rmdir")):
        monkeypatch.setattr(module, name, wrapped(name, getattr(module, name)))
    return calls


@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step"])
def test_dying_between_any_two_writes_loses_nothing(
    tmp_path: Path, state_of: Any, lay: Any, alone: SingleProcess, again: bool
) -> None:
    count, deaths = 2, 0
    while True:
        directory = tmp_path / str(count)
        save(directory, 1, lay(state_of(0), alone), {"value": 0}, alone, keep=1)
        save(directory, 2, lay(state_of(1), alone), {"value": 1}, alone, keep=1)
        died = False
        with pytest.MonkeyPatch.context() as monkeypatch:
            die_at(monkeypatch, count)
            try:
                save(directory, 2 if again else 3, lay(state_of(2), alone), {"value": 2}, alone, keep=1)
            except Killed:
                died = True
        found = find_latest(directory, alone)
        assert found is not None
        assert not found.skipped
        value = found.manifest.metadata["value"]
        assert value in ((1, 2) if died else (2,))
        assert torch.equal(read_full(found.path, "parameter", "weight"), state_of(value)[0].full)
        path = save(directory, 3, lay(state_of(3), alone), {}, alone, keep=1)
        assert [entry for entry in directory.iterdir() if entry.name != path.name] == []
        if not died:
            break
        count, deaths = count + 1, deaths + 1
    assert deaths >= 12


def test_one_rank_without_space_stops_all_and_the_last_checkpoint_stays(
    tmp_path: Path,
    save_steps: Callable[..., None],
    state_of: Any,
    lay: Any,
    run_ranks: RunRanks,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_steps(1)
    original = write_module._write_file

    def full_disk(file: Path, *others: Any) -> Any:
        if file.name == "rank-00003.safetensors":
            raise OSError(28, "No space left on device", str(file))
        return original(file, *others)

    monkeypatch.setattr(write_module, "_write_file", full_disk)
    messages = run_ranks(
        FOUR, lambda ranks: message_of(lambda: save(tmp_path, 2, lay(state_of(2), ranks), {}, ranks, keep=1))
    )
    assert set(messages) == {
        f"checkpoint of step 2 was not saved in {tmp_path}: rank 3: [Errno 28] No space left on device: "
        f"'{tmp_path}/step-00000002.tmp/rank-00003.safetensors'; training can go on, earlier checkpoints are kept"
    }
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    monkeypatch.undo()
    save_steps(2, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_space_is_looked_at_before_writing(
    tmp_path: Path, state_of: Any, lay: Any, run_ranks: RunRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=200)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    messages = run_ranks(
        FOUR, lambda ranks: message_of(lambda: save(tmp_path, 2, lay(state_of(2), ranks), {}, ranks, keep=1))
    )
    assert set(messages) == {
        f"checkpoint of step 2 was not saved in {tmp_path}: no space left: need 211 bytes (1.1 times the data), have 200 bytes: "
        "free some space or set checkpoint.directory to another disk; training can go on, earlier checkpoints are kept"
    }
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_directory_is_named(tmp_path: Path, state_of: Any, lay: Any, alone: SingleProcess) -> None:
    file = tmp_path / "file"
    file.touch()
    message = message_of(lambda: save(file, 1, lay(state_of(1), alone), {}, alone, keep=1))
    assert message == (
        f"checkpoint of step 1 was not saved in {file}: [Errno 17] File exists: '{file}'; "
        "training can go on, earlier checkpoints are kept"
    )


def test_ranks_at_different_steps_are_told(tmp_path: Path, state_of: Any, lay: Any, run_ranks: RunRanks) -> None:
    def attempt(ranks: Collectives) -> str:
        return message_of(lambda: save(tmp_path, ranks.rank // 2, lay(state_of(1), ranks), {}, ranks, keep=1))

    expected = f"checkpoint was not saved in {tmp_path}: ranks are at different steps [0, 1]"
    assert set(run_ranks(FOUR, attempt)) == {expected}


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"a": {"b": [1, torch.tensor(1)]}}, "metadata.a.b[1]: a Tensor is not a JSON value"),
        ({"a": {1: 2}}, "metadata.a: the key 1 is not a string, so JSON cannot hold it"),
    ],
    ids=["tensor", "key"],
)
def test_metadata_that_json_cannot_hold_is_refused(
    tmp_path: Path, state_of: Any, lay: Any, alone: SingleProcess, metadata: dict[str, object], reason: str
) -> None:
    message = message_of(lambda: save(tmp_path, 1, lay(state_of(1), alone), metadata, alone, keep=1))
    assert message == (
        f"checkpoint of step 1 was not saved in {tmp_path}: {reason}; training can go on, earlier checkpoints are kept"
    )
    assert list(tmp_path.iterdir()) == []


def test_elements_that_no_rank_owns_are_noticed(tmp_path: Path, state_of: Any, lay: Any, run_ranks: RunRanks) -> None:
    def attempt(ranks: Collectives) -> str:
        tensors = lay(state_of(1), ranks) if ranks.rank != 2 else []
        return message_of(lambda: save(tmp_path, 1, tensors, {}, ranks, keep=1))

    assert set(run_ranks(FOUR, attempt)) == {
        f"checkpoint of step 1 was not saved in {tmp_path}: rank 0: manifest.json is not valid: tensors[0] parameter of weight: "
        "the chunks hold 18 of 24 elements; training can go on, earlier checkpoints are kept"
    }


def test_tensors_that_cannot_be_saved_are_named(tmp_path: Path, state_of: Any, lay: Any, alone: SingleProcess) -> None:
    first = state_of(1)[0]
    complex_item = type(first)("parameter", "weight", first.full.to(torch.complex64), "flat")
    ending = "; training can go on, earlier checkpoints are kept"
    message = message_of(lambda: save(tmp_path, 1, lay([complex_item], alone), {}, alone, keep=1))
    assert message == (
        f"checkpoint of step 1 was not saved in {tmp_path}: parameter of weight: dtype complex64 is not one of float64, float32, "
        "float16, bfloat16, float8_e4m3fn, float8_e5m2, int64, int32, int16, int8, uint64, uint32, uint16, uint8, bool"
        + ending
    )
    message = message_of(lambda: save(tmp_path, 1, lay([first, first], alone), {}, alone, keep=1))
    assert message == f"checkpoint of step 1 was not saved in {tmp_path}: parameter of weight is given twice{ending}"


def test_a_tensor_that_is_not_there_is_not_read(tmp_path: Path, state_of: Any, lay: Any, alone: SingleProcess) -> None:
    path = save(tmp_path, 1, lay(state_of(1), alone), {}, alone, keep=1)
    assert message_of(lambda: read_full(path, "ema", "weight")) == (
        "checkpoint step-00000001: ema of weight is not there; kinds that are: parameter, adamw.exp_avg"
    )


def test_a_failed_removal_does_not_call_the_new_checkpoint_lost(
    tmp_path: Path, state_of: Any, lay: Any, alone: SingleProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, lay(state_of(1), alone), {}, alone, keep=1)

    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(folders_module, "_remove", refuse)
    message = message_of(lambda: save(tmp_path, 2, lay(state_of(2), alone), {}, alone, keep=1))
    assert message == (
        f"checkpoint of step 2 was saved in {tmp_path}, but older ones were not removed: "
        f"[Errno 13] Permission denied: '{tmp_path}/step-00000001'"
    )
    found = find_latest(tmp_path, alone)
    assert found is not None
    assert found.step == 2
