"""The teacher's features on disk: the same training, one forward pass for all stages, and refusals."""

from __future__ import annotations

import copy
import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import indistill_fx as ifx
from indistill_fx.data.augment import FlipAndCrop
from indistill_fx.data.loaders import MemoryLoader
from indistill_fx.data.open import open_data
from indistill_fx.stages.compile import joint_teachers
from indistill_fx.target import Target
from indistill_fx.training.distill import distill
from indistill_fx.training.feature_cache import cache_features
from tests.nets import Cnn32, seeded

SETTINGS = {"epochs": 1, "curriculum": ifx.Curriculum(lengths=[1, 1, 1]), "progress": False}


def loader(augment: FlipAndCrop | None = None, brightest: int = 256) -> MemoryLoader:
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(brightest, (40, 3, 32, 32), dtype=torch.uint8, generator=generator)
    figures = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    return MemoryLoader(images, torch.arange(40) % 10, **figures, batch_size=8, shuffle=True, augment=augment)


def pair() -> tuple[nn.Module, nn.Module]:
    return seeded(Cnn32).eval(), seeded(Cnn32, (8, 16, 32), 64, seed=1)


def compiled(teacher: nn.Module, student: nn.Module):
    x = torch.zeros(2, 3, 32, 32)
    traced = ifx.trace(teacher, x, role="teacher"), ifx.trace(student, x, role="student")
    plan = ifx.align(*traced)
    return traced, plan, ifx.compile_stages(*traced, plan)


def test_a_run_with_the_cache_trains_the_same(tmp_path):
    teacher, student = pair()
    twin = copy.deepcopy(student)
    plain = distill(teacher, student, loader(), **SETTINGS)
    cached = distill(teacher, twin, loader(), feature_cache=tmp_path, **SETTINGS)
    assert len(list(tmp_path.glob("*/features.json"))) == 4
    for one, other in zip(plain.stages, cached.stages, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-5)
    for one, other in zip(student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_the_teacher_runs_once_over_the_data_for_all_stages_and_never_again(tmp_path, monkeypatch):
    teacher, student = pair()
    (traced, plan, stages), calls = compiled(teacher, student), []
    joint = [(group, graph) for group, graph in joint_teachers(*traced, plan, stages, Target())]
    assert [len(group) for group, _ in joint] == [4]
    joint[0][1].register_forward_hook(lambda *_: calls.append(1))
    for stage in stages:
        stage.teacher.register_forward_hook(lambda *_: pytest.fail("a stage's own teacher ran"))
    stores = cache_features(stages, loader(), tmp_path, joint=lambda missing: joint)
    assert len(calls) == 5 + 1  # batches, and one for the shapes
    said: list[str] = []
    again = cache_features(stages, loader(), tmp_path, joint=lambda missing: pytest.fail("missing"), say=said.append)
    assert [line.split(" are in ")[0] for line in said] == [f"{s.name}: the teacher's features" for s in stages]
    for one, other in zip(stores, again, strict=True):
        assert all(torch.equal(one.features[tap], other.features[tap]) for tap in one.features)


def test_features_are_those_of_the_stages_own_teacher_whatever_the_order(tmp_path):
    traced, plan, stages = compiled(*pair())
    stores = cache_features(stages, loader(), tmp_path, joint=lambda m: joint_teachers(*traced, plan, m, Target()))
    data = loader().indexed()
    data.set_epoch(3)  # shuffled
    for stage, store in zip(stages, stores, strict=True):
        for batch in data:
            given = store.attach(batch)
            with torch.no_grad():
                own = stage.teacher(batch[0])[0]
                for tap in stage.teacher_taps:
                    torch.testing.assert_close(given["teacher_features"][tap], own[tap], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(stage.without_teacher()(given), stage(batch), rtol=1e-4, atol=0)
        assert not torch.equal(store.features[stage.teacher_taps[0]][0], store.features[stage.teacher_taps[0]][1])


def test_what_the_features_follow_from_is_in_the_key(tmp_path):
    teacher, student = pair()
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        other.conv1.weight.mul_(1.01)
    counts = []
    for net, data, precision in (
        (teacher, loader(), "no"),
        (teacher, loader(), "no"),
        (other, loader(), "no"),
        (teacher, loader(brightest=255), "no"),
        (teacher, loader(), "bf16"),
    ):
        first = compiled(net, student)[2][:1]
        cache_features(first, data, tmp_path, precision=precision)
        counts.append(len(list(tmp_path.glob("*/features.json"))))
    assert counts == [1, 1, 2, 3, 4]


def test_random_pipelines_are_refused_before_anything_is_done(tmp_path):
    teacher, student = pair()
    with pytest.raises(
        ifx.ConfigError, match=r"same in every epoch, but training images are augmented by FlipAndCrop.*--no-augment"
    ):
        distill(teacher, student, loader(FlipAndCrop()), feature_cache=tmp_path / "cache", **SETTINGS)
    foreign = [(torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.long))]
    with pytest.raises(
        ifx.ConfigError, match=r"cannot be known of a loader of your own.*Use data that open_data reads"
    ):
        distill(teacher, student, foreign, feature_cache=tmp_path / "cache", **SETTINGS)
    assert not (tmp_path / "cache").exists()


def test_data_sets_say_whether_they_are_random(tmp_path):
    from PIL import Image

    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (80, 80), (number * 90, 0, 0)).save(tmp_path / split / "a" / f"{number}.png")
    spec = f"imagefolder:{tmp_path}"
    assert open_data(spec).train.randomness == "training images are cropped and mirrored at random"
    plain = open_data(spec, augment=False).train
    assert plain.randomness is None
    before = plain.fingerprint()
    assert open_data(spec, augment=False).train.fingerprint() == before
    assert open_data(spec, augment=False, size=64).train.fingerprint() != before
    Image.new("RGB", (80, 80), (1, 2, 3)).save(tmp_path / "train" / "a" / "0.png")
    assert open_data(spec, augment=False).train.fingerprint() != before
    assert open_data("digits").train.randomness is None


def test_the_size_is_said_first_and_a_full_disk_refused(tmp_path, monkeypatch):
    stages, said = compiled(*pair())[2][:2], []
    cache_features(stages, loader(), tmp_path / "one", say=said.append)
    sizes = [40 * 8 * 15 * 15 * 4, 40 * 16 * 6 * 6 * 4]
    assert said[0].startswith(
        f"Feature cache: pool {sizes[0] / 2**20:.1f} MiB, pool@2 {sizes[1] / 2**20:.1f} MiB; in all"
    )
    files = sorted(file.stat().st_size for file in (tmp_path / "one").glob("*/*.bin"))
    assert files == sorted(sizes)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ifx.ConfigError, match=r"needs 0\.4 MiB for 40 samples .* has 0\.0 MiB free"):
        cache_features(stages, loader(), tmp_path / "two")
    assert not list((tmp_path / "two").glob("*/*"))


def test_an_interrupted_fill_leaves_nothing_that_looks_done(tmp_path):
    stages = compiled(*pair())[2][:1]
    calls = []
    handle = stages[0].teacher.register_forward_hook(lambda *_: calls.append(1) if len(calls) < 3 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cache_features(stages, loader(), tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    handle.remove()
    assert cache_features(stages, loader(), tmp_path)[0].features["pool"].shape == (40, 8, 15, 15)


def damaged(how: str, folder: Path) -> None:
    file, index = next(folder.glob("*.bin")), folder / "features.json"
    content = bytearray(file.read_bytes())
    if how == "one bit":
        content[5] ^= 4
        file.write_bytes(content)
    elif how == "cut short":
        os.truncate(file, len(content) // 2)
    elif how == "emptied":
        os.truncate(file, 0)
    elif how == "gone":
        file.unlink()
    elif how == "index torn":
        index.write_text(index.read_text()[:40])
    else:
        index.write_text(index.read_text().replace("float32", "float16"))


@pytest.mark.parametrize("how", ["one bit", "cut short", "emptied", "gone", "index torn", "index of another type"])
def test_damaged_features_are_named_and_computed_anew(tmp_path, how):
    stages = compiled(*pair())[2]
    before = cache_features(stages, loader(), tmp_path)
    expected = {tap: value.clone() for tap, value in before[0].features.items()}
    folder = before[0].folder
    damaged(how, folder)
    told: list[str] = []
    again = cache_features(compiled(*pair())[2], loader(), tmp_path, say=told.append)
    said = [line for line in told if "are damaged (" in line]
    assert len(said) == 1 and f"in {folder} are damaged" in said[0] and "are recomputed" in said[0]
    assert all(torch.equal(again[0].features[tap], expected[tap]) for tap in expected)


def test_the_space_is_taken_before_the_teacher_runs(tmp_path, monkeypatch):
    """A write into mapped memory for which the disk has no block left would end the process (SIGBUS)."""
    _, _, stages = compiled(*pair())

    def full(*_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(ifx.ConfigError, match=r"cannot be written to .*: Disk quota exceeded\. Choose"):
            cache_features(stages, loader(), tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [".lock"]
    cache_features(stages, loader(), tmp_path)
    for file in tmp_path.glob("*/*.bin"):
        assert file.stat().st_blocks * 512 >= file.stat().st_size > 0


def test_a_cache_that_cannot_be_made_is_refused_and_what_a_killed_process_left_is_removed(tmp_path):
    _, _, stages = compiled(*pair())
    (tmp_path / "file").write_text("")
    with pytest.raises(ifx.ConfigError, match=r"^The folder `.*file` cannot be made"):
        cache_features(stages[:1], loader(), tmp_path / "file")
    part = tmp_path / "cache" / "0123456789abcdef01234567.part"
    part.mkdir(parents=True)
    (part / "0.bin").write_bytes(bytes(4096))
    cache_features(stages[:1], loader(), tmp_path / "cache")
    assert not part.exists()
