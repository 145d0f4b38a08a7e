"""The frame of the command line: what it says and the exit codes it gives."""

import subprocess
import sys

import pytest

from fadapt import __version__, cli


def test_help_lists_every_command_and_version_is_the_packages(capsys):
    assert cli.main(["--help"]) == 0
    assert cli.main([]) == 2  # nothing to do is an error, help all the same
    out = capsys.readouterr().out
    assert all(out.count(summary) == 2 for _, summary in cli.COMMANDS.values())
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fadapt {__version__}\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: fadapt {name}" in capsys.readouterr().out


def test_a_mistyped_command_or_flag_is_one_line_with_near_misses(capsys):
    assert cli.main(["swep"]) == 2
    assert capsys.readouterr().err == "fadapt: there is no command 'swep'. Near misses: 'sweep'.\n"
    with pytest.raises(SystemExit) as stop:
        cli.main(["sweep", "--sed", "1"])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "Near misses: '--seed'" in err
    assert err.count("\n") == 1


def test_the_module_runs_as_the_script_does():
    done = subprocess.run(
        [sys.executable, "-m", "fadapt", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"fadapt {__version__}\n")
