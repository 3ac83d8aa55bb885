"""Progress, and what commands write to stderr: a bar on a terminal, else lines; more with -v, less with -q."""

import io
import logging
import sys
import threading
import warnings

import pytest
from test_cli import call, make_photo, model  # noqa: F401

from trace_fast import progress
from trace_fast.cli import verbosity
from trace_fast.progress import LOGGER, Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Return a list whose only number is the time in seconds."""
    seconds = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds[0])
    return seconds


@pytest.fixture
def log(caplog):
    """Collect the messages of level INFO and above."""
    caplog.set_level(logging.INFO, "trace_fast")
    return caplog


class TestProgress:
    def test_a_line_every_half_a_minute(self, clock, log):
        with Progress("searching", "image", 500, initial=20) as bar:
            for _ in range(60):
                clock[0] += 1
                bar.update(2)
        assert log.messages == [
            "searching: 80 of 500 images, 00:30 since the start, about 03:30 left",
            "searching: 140 of 500 images, 01:00 since the start, about 03:00 left",
        ]

    def test_values_and_titles(self, clock, log):
        with Progress("", "image") as bar:
            bar.set_postfix(failed=3)
            clock[0] += 30
            bar.update(1200)
            bar.set_title("shard 2 of 9")
            clock[0] += 3600
            bar.update(0)
        assert log.messages == [
            "1,200 images, 00:30 since the start, failed=3",
            "shard 2 of 9: 1,200 images, 1:00:30 since the start, failed=3",
        ]

    def test_a_terminal_has_a_bar_and_no_lines(self, clock, log, monkeypatch):
        monkeypatch.setattr(sys, "stderr", Terminal())
        with Progress("searching", "image", 5) as bar:
            clock[0] += 100
            bar.update(5)
        assert "searching: 100%" in sys.stderr.getvalue() and "5/5" in sys.stderr.getvalue()
        assert not log.messages

    @pytest.mark.parametrize("stream", [io.StringIO, Terminal])
    @pytest.mark.parametrize("level", [logging.INFO, logging.ERROR])
    def test_hidden(self, clock, caplog, monkeypatch, stream, level):
        caplog.set_level(level, "trace_fast")
        monkeypatch.setattr(sys, "stderr", stream())
        with Progress("searching", "image", 5, hidden=level == logging.INFO) as bar:
            clock[0] += 100
            bar.update(5)
        assert sys.stderr.getvalue() == "" and not caplog.messages


class TestStderr:
    def test_levels(self, capsys):
        for level in (logging.DEBUG, logging.INFO, logging.ERROR):
            with verbosity.log_to_stderr(level):
                LOGGER.debug("loaded")
                LOGGER.info("half done")
                LOGGER.error("failed %d", 3)
        loaded, half, failed = (f"trace-fast: {text}\n" for text in ("loaded", "half done", "failed 3"))
        assert capsys.readouterr().err == loaded + half + failed + half + failed + failed

    def test_nothing_is_left_behind(self):
        before = LOGGER.level, LOGGER.handlers[:], warnings.showwarning
        with pytest.raises(KeyError), verbosity.log_to_stderr(logging.DEBUG):
            raise KeyError
        assert (LOGGER.level, LOGGER.handlers, warnings.showwarning) == before

    @pytest.mark.filterwarnings("default")
    def test_a_warning_is_one_line(self, capsys):
        with verbosity.log_to_stderr(logging.INFO):
            warnings.warn("the cache is damaged", stacklevel=1)
        assert capsys.readouterr().err == "trace-fast: the cache is damaged\n"

    def test_messages_of_threads_do_not_wait_for_a_bar(self, monkeypatch):
        """A thread that logs has the lock of the handler, and one that updates a bar that of all bars."""
        monkeypatch.setattr(sys, "stderr", Terminal())
        with verbosity.log_to_stderr(logging.INFO), Progress("searching", "image", 500) as bar:

            def work():
                for number in range(200):
                    bar.update()
                    LOGGER.error("%d", number)

            threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
            assert not any(thread.is_alive() for thread in threads)


class TestCommands:
    def test_quiet(self, call, tmp_path):  # noqa: F811
        make_photo(tmp_path / "in" / "a.png")
        (tmp_path / "in" / "notes.txt").write_text("no image")
        result = call("edges", "in", "-o", "out", "--quiet")
        assert (result.exit_code, result.output) == (0, "")
        assert (tmp_path / "out" / "a.png").is_file()
        (tmp_path / "in" / "b.png").write_text("no image")
        result = call("edges", "in", "-o", "out", "-q")
        assert (result.exit_code, result.stdout) == (1, "") and result.stderr.startswith("trace-fast: in/b.png: ")

    def test_verbose(self, call, tmp_path, model):  # noqa: F811
        make_photo(tmp_path / "a.png")
        (tmp_path / "b.png").write_text("no image")
        result = call("edges", "a.png", "b.png", "-o", "out", "-v")
        assert result.exit_code == 1
        assert f"trace-fast: loaded Tracer('{model}', size=(16, 24)" in result.stderr
        assert "trace-fast: b failed here:\nTraceback" in result.stderr
        result = call("edges", "a.png", "-o", "out", "--timestep", 3, "--verbose")
        assert result.exit_code == 2
        assert "trace-fast: the failure came from here:\nTraceback" in result.stderr

    def test_both(self, call):  # noqa: F811
        result = call("backends", "-v", "-q")
        assert result.exit_code == 2 and "give --verbose or --quiet, not both" in result.stderr

    def test_every_command_has_both(self, call):  # noqa: F811
        from trace_fast.cli import COMMANDS

        for name in COMMANDS:
            text = call(name, "--help").stdout
            assert "--verbose" in text and "--quiet" in text
