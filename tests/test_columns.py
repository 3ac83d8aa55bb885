"""trace_fast.BatchEdges: one schema and the same bytes in plain loops, pandas, datasets and Ray."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from trace_fast import BatchEdges
from trace_fast.cli import app

REASON = "needs {0}: pip install {0}"
pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'trace_fast[data]'")
OPTIONS = {"device": "cpu", "size": (16, 24)}
DAMAGED = {3, 11, 12}


def find_edges(**options):
    return BatchEdges("mini", **OPTIONS, **options)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Return the bytes of 14 photos by name, three of them damaged, and the files that the plain command writes."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for index in range(14):
        photo = Image.fromarray(random.integers(0, 256, (4, 6, 3), dtype=np.uint8))
        photo.resize((30 + index, 20), Image.Resampling.BICUBIC).save(folder / f"{index:02}.jpg")
    for index in DAMAGED:
        path = folder / f"{index:02}.jpg"
        path.write_bytes(path.read_bytes()[: 200 * (index % 2)])
    words = ["edges", str(folder), "-o", str(folder / "out"), "--device", "cpu", "--size", "16x24"]
    assert CliRunner().invoke(app, words).exit_code == 1
    files = {path.stem: path.read_bytes() for path in (folder / "out").glob("*.png")}
    return {path.stem: path.read_bytes() for path in sorted(folder.glob("*.jpg"))}, files


@pytest.fixture
def batch(photos):
    return {"key": list(photos[0]), "bytes": list(photos[0].values())}


def check(rows, files):
    """Require a row for each photo, with the file of the plain command or with an error."""
    assert [row["key"] for row in rows] == [f"{index:02}" for index in range(14)]
    assert {int(row["key"]) for row in rows if row["error"]} == DAMAGED
    for row in rows:
        assert (row["edges"] is None) == (row["error"] is not None)
        assert row["edges"] == files.get(row["key"])
        assert len(row["weights"]) == 64 and row["model"] == "mini"


class TestTables:
    @pytest.mark.parametrize("workers", [1, 3])
    def test_the_bytes_of_the_plain_command(self, batch, photos, workers):
        find = find_edges(workers=workers)
        table = find(batch)
        assert table.schema.equals(find.schema, check_metadata=True)
        check(table.to_pylist(), photos[1])

    def test_kinds_of_batches(self, batch, photos, tmp_path):
        expected = find_edges()(batch)
        assert find_edges()(pyarrow.table(batch)).equals(expected)
        arrays = {name: np.array(cells, dtype=object) for name, cells in batch.items()}
        assert find_edges()(arrays).equals(expected)
        paths = []
        for key, content in zip(*batch.values(), strict=True):
            paths.append(str(tmp_path / f"{key}.jpg"))
            (tmp_path / f"{key}.jpg").write_bytes(content)
        records = [{"bytes": None, "path": path} for path in paths]
        for cells in (paths, records):
            assert find_edges(image="image")({"image": cells})["edges"].equals(expected["edges"])

    def test_pandas(self, batch, photos):
        pandas = pytest.importorskip("pandas", reason=REASON.format("pandas"))
        frame = find_edges()(pandas.DataFrame(batch)).to_pandas()
        check(frame.astype(object).where(frame.notna(), None).to_dict("records"), photos[1])

    def test_errors_are_the_same_each_time(self, batch):
        errors = [find_edges()(batch)["error"].to_pylist() for _ in range(2)]
        assert errors[0] == errors[1] and "0x" not in str(errors)
        (error,) = find_edges()({"bytes": [Image.new("RGB", (20, 20))]})["error"].to_pylist()
        assert error.startswith("edges: image must be bytes, a path, or a record") and error.endswith("got Image")

    def test_full_memory_is_raised(self, batch, monkeypatch):
        from trace_fast.jobs.tasks import EdgesTask

        def fail(self, name, photo):
            raise MemoryError

        monkeypatch.setattr(EdgesTask, "compute", fail)
        with pytest.raises(MemoryError):
            find_edges()(batch)

    def test_no_column_of_images(self, batch):
        with pytest.raises(ValueError, match="got 'image' and columns key, bytes"):
            find_edges(image="image")(batch)

    def test_it_is_small_and_loads_where_it_runs(self, batch):
        find = find_edges()
        before = pickle.dumps(find)
        table = find(batch)
        assert len(before) < 4096 and pickle.dumps(find) == before
        assert pickle.loads(before)(batch).equals(table)

    def test_masks(self, batch):
        pytest.importorskip("pycocotools", reason="needs pycocotools: pip install 'trace_fast[eval]'")
        rows = find_edges(masks=True, top=3)(batch).to_pylist()
        assert rows[3]["masks"] is None and rows[3]["error"]
        (picture,) = {Image.open(io.BytesIO(row["labels"])).mode for row in rows if row["labels"]}
        assert picture == "P" and any(row["masks"] for row in rows)


@pytest.fixture(scope="module")
def results(photos, tmp_path_factory):
    """Write the results of batches of 40 images, of which three, none or all are damaged, to files of one folder."""
    import pyarrow.parquet

    folder, find = tmp_path_factory.mktemp("results"), find_edges()
    whole = [content for name, content in photos[0].items() if int(name) not in DAMAGED]
    for name, damaged in (("none", ()), ("some", (3, 11, 12)), ("all", range(40))):
        cells = [b"" if index in damaged else whole[index % len(whole)] for index in range(40)]
        table = find({"key": [f"{name} {index}" for index in range(40)], "bytes": cells})
        errors = {index for index, error in enumerate(table["error"].to_pylist()) if error is not None}
        assert errors == set(damaged)
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet")
    return folder


class TestReaders:
    """Files of which a column has no values are read with the others, as one table."""

    def check(self, rows):
        assert len(rows) == len({row["key"] for row in rows}) == 120
        assert sum(row["error"] is not None for row in rows) == 43
        assert all((row["error"] is None) == (row["edges"] is not None) for row in rows)

    def test_pyarrow(self, results):
        import pyarrow.dataset

        table = pyarrow.dataset.dataset(results).to_table()
        assert table.schema.field("error").type == pyarrow.string()
        self.check(table.to_pylist())

    def test_pandas(self, results):
        pandas = pytest.importorskip("pandas", reason=REASON.format("pandas"))
        frame = pandas.read_parquet(results)
        self.check(frame.astype(object).where(frame.notna(), None).to_dict("records"))

    @pytest.mark.slow
    def test_datasets(self, results, tmp_path):
        datasets = pytest.importorskip("datasets", reason=REASON.format("datasets"))
        files = [str(path) for path in sorted(results.iterdir())]
        data = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path))
        self.check(list(data))


@pytest.mark.slow
def test_datasets(batch, photos, tmp_path):
    datasets = pytest.importorskip("datasets", reason=REASON.format("datasets"))
    # with a name, since some releases cannot hash the types of pyarrow
    data = datasets.Dataset(pyarrow.table(batch), fingerprint="photos")
    for size in (4, 14):
        results = data.map(find_edges(), batched=True, batch_size=size, remove_columns=data.column_names)
        check(list(results), photos[1])


def test_importing_the_package_imports_no_engine():
    code = "import sys, trace_fast, trace_fast.cli, trace_fast.jobs.columns; print({'ray', 'pyarrow'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
