"""Options of a training run: check, docstring, command-line option and identity follow from one declaration."""

import doctest
import inspect
import json
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from trace_fast import DistillConfig, PretrainConfig, cli, decoder
from trace_fast.cli.options import take_options
from trace_fast.training import distillation, labels, mini, options, state
from trace_fast.training.options import check_options, document_options, option, to_json


@document_options
@dataclass(frozen=True, kw_only=True)
class Config:
    """A configuration.

    Raises:
        ValueError: an option is out of range.
    """

    output: Path = option(help="The folder.", fixed=False)
    rank: int = option(4, help="The rank.", least=1, most=9)
    rate: float | None = option(None, help="The rate.", least=0)
    kind: str | None = option(None, help="The kind.", choices=("one", "two"))
    size: tuple[int, int] | None = option(None, help="The size.")
    timestep: str | int | None = option(None, help="The timestep.")
    counts: dict[str, float] = option(dict, help="The counts.")
    skip_bad: bool = option(False, help="Skip them.", fixed=False)

    def __post_init__(self):
        check_options("test", self)


class TestChecks:
    @pytest.mark.parametrize(
        "values",
        [
            {},
            {"rank": 1, "rate": 0},
            {"rank": 9, "rate": 1e9, "kind": "two"},
            {"size": (3, 4), "timestep": "iep", "counts": {"a": 1}},
        ],
        ids=str,
    )
    def test_values_in_range(self, values):
        config = Config(output=Path(), **values)
        assert {name: getattr(config, name) for name in values} == values

    @pytest.mark.parametrize(
        ("values", "error", "message"),
        [
            ({"rank": 0}, ValueError, "test: rank must be at least 1, got 0"),
            ({"rank": 10}, ValueError, "test: rank must be from 1 to 9, got 10"),
            ({"rank": 2.0}, TypeError, "test: rank must be an int, got float"),
            ({"rank": None}, TypeError, "test: rank must be an int, got NoneType"),
            ({"rate": -1}, ValueError, "test: rate must be at least 0, got -1"),
            ({"rate": float("inf")}, ValueError, "test: rate must be finite, got inf"),
            ({"rate": float("nan")}, ValueError, "test: rate must be at least 0, got nan"),
            ({"rate": "fast"}, TypeError, "test: rate must be a number, got str"),
            ({"kind": "three"}, ValueError, "test: kind must be 'one' or 'two', got 'three'"),
        ],
        ids=str,
    )
    def test_values_out_of_range(self, values, error, message):
        with pytest.raises(error, match=message):
            Config(output=Path(), **values)


def test_the_docstring_lists_the_options():
    lines = inspect.getdoc(Config).splitlines()
    assert lines[:5] == ["A configuration.", "", "Attributes:", "    output: The folder.", "    rank: The rank."]
    assert lines[-3:] == ["", "Raises:", "    ValueError: an option is out of range."]


def test_the_identity_has_the_fixed_options():
    config = Config(output=Path("x"), size=(3, 4))
    values = json.loads(to_json(config, {"kind": "replaced"}))
    assert values == {
        "rank": 4,
        "rate": None,
        "kind": "replaced",
        "size": [3, 4],
        "timestep": None,
        "counts": {},
    }


class TestCommand:
    @pytest.fixture
    def call(self, tmp_path):
        """Run a command of the configuration, and return its result and the configuration."""
        configs = []

        @take_options(Config)
        def run(config: Config) -> None:
            """Do nothing."""
            configs.append(config)
            if config.rank == 5:
                raise ValueError("five is refused")

        app = typer.Typer()
        app.command("run")(run)

        def call(*words):
            configs.clear()
            return CliRunner().invoke(app, ["-o", str(tmp_path / "out"), *words]), configs

        return call

    def test_defaults_are_those_of_the_fields(self, call, tmp_path):
        result, configs = call()
        assert result.exit_code == 0, result.output
        assert configs == [Config(output=tmp_path / "out")]
        assert (tmp_path / "out").is_dir()

    def test_every_kind_of_value(self, call, tmp_path):
        words = "--rank 3 --rate 0.5 --kind two --size 30x40 --timestep 7 --counts a=1,b=2 --skip-bad"
        result, configs = call(*words.split())
        assert result.exit_code == 0, result.output
        expected = Config(
            output=tmp_path / "out",
            rank=3,
            rate=0.5,
            kind="two",
            size=(30, 40),
            timestep=7,
            counts={"a": 1, "b": 2},
            skip_bad=True,
        )
        assert configs == [expected]
        assert call("--timestep", "iep")[1][0].timestep == "iep"

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--rank", "0"], "--rank"),
            (["--rank", "10"], "--rank"),
            (["--kind", "three"], "--kind"),
            (["--no-skip-bad"], "No such option"),
            (["--size", "3"], "trace-fast: --size must be height and width in pixels, such as 512x768, got '3'"),
            (["--timestep", "x"], "trace-fast: --timestep must be iep or an integer from 0 to 999, got 'x'"),
            (["--counts", "a"], "trace-fast: --counts must be pairs such as columns=8,channels=4, got 'a'"),
            (["--counts", "a=b"], "trace-fast: --counts must be pairs such as columns=8,channels=4, got 'a=b'"),
            (["--rank", "5"], "trace-fast: five is refused"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else None,
    )
    def test_values_that_are_refused(self, call, words, message):
        result, _ = call(*words)
        assert result.exit_code == 2 and message in result.stderr

    def test_the_help_is_that_of_the_fields(self, call):
        result, _ = call("--help")
        assert "Do nothing." in result.stdout and "The rank." in result.stdout
        assert "1<=x<=9" in result.stdout and "default: 4" in result.stdout


@pytest.mark.parametrize(("command", "config"), [("distill", DistillConfig), ("pretrain", PretrainConfig)])
class TestConfigurations:
    def test_every_option_is_documented_in_sentences(self, command, config):
        for field in fields(config):
            text = field.metadata["help"]
            assert text[0].isupper() and text.endswith("."), field.name
        documented = inspect.getdoc(config).partition("Attributes:")[2]
        assert all(f"    {field.name}: " in documented for field in fields(config))

    def test_every_option_is_one_of_the_command(self, command, config):
        text = CliRunner().invoke(cli.app, [command, "--help"], terminal_width=200).stdout
        options = {f"--{field.name.replace('_', '-')}" for field in fields(config)} - {"--photos"}
        assert {option for option in options if option not in text} == set()


@pytest.mark.parametrize("module", [decoder, distillation, labels, mini, options, state], ids=lambda m: m.__name__)
def test_examples_run_as_they_are_written(module):
    output = []
    for test in doctest.DocTestFinder().find(module):
        # these two train for hours
        if test.examples and test.name.rpartition(".")[2] not in ("distill", "pretrain"):
            assert doctest.DocTestRunner().run(test, out=output.append).failed == 0, "".join(output)
