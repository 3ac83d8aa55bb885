"""Drawn scenes: valid instance maps, equal for equal seeds, and a folder that evaluation reads."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from typer.testing import CliRunner

from trace_fast import cli
from trace_fast.evaluation.data import CROWD, open_dataset
from trace_fast.io.claims import claim_folder
from trace_fast.training import scenes
from trace_fast.training.scenes import IGNORED, ScenesConfig, draw_scene, list_scenes, read_scene, write_scenes
from trace_fast.training.scenes.camera import EFFECTS
from trace_fast.training.scenes.fields import make_colors
from trace_fast.training.scenes.outlines import OUTLINES, make_outline, rasterize
from trace_fast.training.scenes.scene import LEAST_AREA
from trace_fast.training.scenes.shading import Light, Surface, inflate, shade
from trace_fast.training.scenes.textures import TEXTURES, _tile, make_texture

SIZE = (72, 104)


def make_scene(number, size=SIZE, photos=None):
    return draw_scene(np.random.default_rng([4, number]), size, photos)


def read_folder(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def many():
    return [make_scene(number) for number in range(40)]


class TestScene:
    def test_ignored_value_is_that_of_evaluation(self):
        assert IGNORED == CROWD

    def test_arrays(self, many):
        for scene in many:
            assert scene.image.shape == (*SIZE, 3) and scene.image.dtype == np.uint8
            assert scene.instances.shape == SIZE and scene.instances.dtype == np.uint16

    def test_instances_are_numbered_and_visible(self, many):
        for scene in many:
            numbers = np.unique(scene.instances[scene.instances != IGNORED])
            objects = numbers[numbers > 0]
            assert objects.tolist() == list(range(1, len(objects) + 1))
            for number in objects:
                labels, _ = ndimage.label(scene.instances == number)
                assert np.bincount(labels.ravel())[1:].min() >= LEAST_AREA // 2

    def test_counts_vary(self, many):
        counts = [len(np.unique(scene.instances[scene.instances != IGNORED])) for scene in many]
        assert min(counts) <= 2 and max(counts) > 8

    def test_ignored_bands_leave_objects_alone(self, many):
        assert any((scene.instances == IGNORED).any() for scene in many)
        for scene in many:
            objects = (scene.instances > 0) & (scene.instances != IGNORED)
            assert not (ndimage.binary_dilation(objects) & (scene.instances == IGNORED)).any()

    def test_image_changes_at_edges(self, many):
        at_edges, elsewhere = [], []
        for scene in many:
            gray = scene.image.mean(-1)
            steps = np.abs(np.diff(gray, axis=1))
            objects = np.where(scene.instances == IGNORED, 0, scene.instances)
            edges = objects[:, 1:] != objects[:, :-1]
            at_edges.append(steps[edges])
            elsewhere.append(steps[~edges])
        assert np.concatenate(at_edges).mean() > 1.5 * np.concatenate(elsewhere).mean()

    def test_seeds(self):
        assert make_scene(3).jpeg == make_scene(3).jpeg
        assert make_scene(3).jpeg != make_scene(5).jpeg

    def test_photos_give_the_colors(self):
        red = np.zeros((3, 128, 128, 3), np.uint8)
        red[..., 0] = np.random.default_rng(0).integers(60, 255, (3, 128, 128))
        pixels = np.stack([make_scene(number, photos=red).image.mean((0, 1)) for number in range(12)])
        assert (pixels[:, 0] > pixels[:, 1]).mean() > 0.8

    def test_small_sides_are_refused(self):
        with pytest.raises(ValueError, match="draw_scene: width must be at least 32, got 31"):
            make_scene(0, (64, 31))


class TestFolder:
    def test_a_resumed_run_gives_the_same_files(self, tmp_path):
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        write_scenes(ScenesConfig(output=whole, count=5, size=48))
        write_scenes(ScenesConfig(output=parts, count=3, size=48))
        (parts / "images" / "000001.jpg").unlink()
        write_scenes(ScenesConfig(output=parts, count=5, size=48))
        assert read_folder(whole) == read_folder(parts)
        assert len(list_scenes(whole)) == 5

    @pytest.mark.slow
    def test_workers_change_nothing(self, tmp_path):
        for workers in (0, 2):
            write_scenes(ScenesConfig(output=tmp_path / f"{workers}", count=20, size=40, workers=workers))
        assert read_folder(tmp_path / "0") == read_folder(tmp_path / "2")

    def test_parts_draw_the_same_files(self, tmp_path, monkeypatch):
        write_scenes(ScenesConfig(output=tmp_path / "whole", count=5, size=40))
        parts = ScenesConfig(output=tmp_path / "parts", count=5, size=40)
        write_scenes(replace(parts, part="1/2"))
        assert [scene.image.stem for scene in list_scenes(parts.output)] == ["000001", "000003"]
        with claim_folder(parts.output, "scenes", 1):  # another part is at work
            monkeypatch.setenv("WORLD_SIZE", "2")
            monkeypatch.setenv("RANK", "0")
            write_scenes(parts)
        assert read_folder(tmp_path / "whole") == read_folder(parts.output)

    def test_a_part_that_does_not_exist(self, tmp_path):
        with pytest.raises(ValueError, match=r"^scenes: part must be from 0/N to one below N/N, got '2/2'"):
            ScenesConfig(output=tmp_path, part="2/2")

    def test_other_options_are_refused(self, tmp_path):
        write_scenes(ScenesConfig(output=tmp_path, count=1, size=40))
        with pytest.raises(ValueError, match="output must be empty or hold scenes of the same options, got seed 0"):
            write_scenes(ScenesConfig(output=tmp_path, count=1, size=40, seed=1))

    def test_a_version_is_part_of_the_options(self, tmp_path, monkeypatch):
        write_scenes(ScenesConfig(output=tmp_path, count=1, size=40))
        monkeypatch.setattr(scenes.dataset, "VERSION", 999)
        with pytest.raises(ValueError, match="instead of 999"):
            write_scenes(ScenesConfig(output=tmp_path, count=1, size=40))

    def test_other_files_are_refused(self, tmp_path):
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "000000.jpg").touch()
        with pytest.raises(ValueError, match="output must be empty or hold scenes, got files without"):
            write_scenes(ScenesConfig(output=tmp_path, count=1, size=40))

    def test_photos(self, tmp_path):
        (tmp_path / "photos").mkdir()
        for number in range(3):
            pixels = np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
        config = ScenesConfig(photos=tmp_path / "photos", output=tmp_path / "out", count=2, size=40, most_photos=2)
        write_scenes(config)
        assert json.loads((tmp_path / "out" / "scenes.json").read_text())["photos"]
        with pytest.raises(ValueError, match="got photos"):
            write_scenes(ScenesConfig(output=tmp_path / "out", count=2, size=40, most_photos=2))

    def test_read(self, tmp_path):
        write_scenes(ScenesConfig(output=tmp_path, count=2, size=48, seed=4))
        pixels, instances = read_scene(list_scenes(tmp_path)[1])
        scene = draw_scene(np.random.default_rng([4, 1]), (48, 48))
        np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), scene.image)
        np.testing.assert_array_equal(instances.numpy(), scene.instances)

    def test_an_empty_folder_has_no_scenes(self, tmp_path):
        with pytest.raises(ValueError, match="scenes must be a folder that `trace-fast scenes` wrote"):
            list_scenes(tmp_path)

    def test_evaluation_reads_it(self, tmp_path):
        write_scenes(ScenesConfig(output=tmp_path, count=6, size=64))
        dataset = open_dataset(tmp_path)
        assert len(dataset.photos) == 6 and not dataset.problems
        assert sum(photo.contours().lines.sum() for photo in dataset.photos) > 0


class TestCommand:
    def test_draws(self, tmp_path):
        result = CliRunner().invoke(cli.app, ["scenes", "-o", str(tmp_path / "out"), "--count", "2", "--size", "40"])
        assert result.exit_code == 0, result.output
        assert len(list_scenes(tmp_path / "out")) == 2

    @pytest.mark.parametrize(
        ("options", "message"),
        [(["--size", "8"], "32"), (["--count", "0"], "1"), (["missing"], "photos must be a folder")],
        ids=["size", "count", "photos"],
    )
    def test_errors(self, tmp_path, options, message):
        result = CliRunner().invoke(cli.app, ["scenes", "-o", str(tmp_path / "out"), *options])
        assert result.exit_code == 2
        assert message in result.output


class TestParts:
    @pytest.mark.parametrize("name", TEXTURES)
    def test_textures(self, name):
        for number in range(4):
            random = np.random.default_rng(number)
            colors = make_colors(random, None)
            picture = make_texture(random, colors, (37, 53), name)
            assert picture.shape == (37, 53, 3) and picture.dtype == np.float32
            assert 0 <= picture.min() <= picture.max() <= 1

    @pytest.mark.parametrize("size", [(40, 90), (90, 90), (200, 230)], ids=str)
    def test_marks_have_no_seams(self, size):
        def add_ramp(canvas, side):
            for x in range(2 * side):
                canvas.line([x, 0, x, 2 * side], fill=(x * 255 // (2 * side),) * 3)

        for seed in range(5):
            picture = _tile(np.random.default_rng(seed), size, np.zeros(3), add_ramp)
            assert picture.shape == (*size, 3)
            assert np.abs(np.diff(picture, axis=1)).max() < 0.05

    @pytest.mark.parametrize("name", OUTLINES)
    def test_outlines(self, name):
        for number in range(8):
            _, parts = make_outline(np.random.default_rng(number), name)
            solid = [part for part in parts if part.role == "solid"]
            assert solid and all(np.isfinite(part.points).all() for part in parts)
            assert np.abs(solid[0].points).max() < 3

    def test_coverage_of_a_square(self):
        square = np.array([(2, 3), (6, 3), (6, 7), (2, 7)])
        coverage = rasterize(square, (9, 11))
        assert coverage[3:7, 2:6].min() > 0.8
        assert abs(coverage.sum() - 16) < 2.5

    def test_inflated_surfaces_are_high_in_the_middle(self):
        disk = (np.hypot(*np.mgrid[-30:31, -30:31]) < 25).astype(np.float32)
        heights = inflate(disk)
        assert heights.shape == disk.shape
        assert heights[30, 30] > 18 > heights[30, 8] > heights[30, 1]

    def test_light_from_the_left_brightens_the_left(self):
        disk = (np.hypot(*np.mgrid[-30:31, -30:31]) < 25).astype(np.float32)
        light = Light(np.array([-0.8, 0, 0.6], np.float32), 0.3, 0.1)
        surface = Surface(bulge=1, bumps=0, gloss=0, sharpness=1, opacity=1, distortion=0)
        picture = np.full((61, 61, 3), 0.5, np.float32)
        lit, _ = shade(np.random.default_rng(0), picture, inflate(disk), surface, light)
        assert lit[30, 15].mean() > lit[30, 45].mean() + 0.1

    @pytest.mark.parametrize("name", EFFECTS)
    def test_effects(self, name):
        picture = np.random.default_rng(0).random((33, 47, 3), np.float32)
        changed = EFFECTS[name][0](np.random.default_rng(1), picture)
        assert changed.shape == picture.shape and np.isfinite(changed).all()
        assert np.abs(changed - picture).max() > 1e-3
