"""The table of commands says what the commands say, and lists them without importing one."""

import inspect
import subprocess
import sys

import pytest

from quasar.commands import COMMANDS, PROGRAMS, load_command, program


@pytest.mark.parametrize("entry", COMMANDS, ids=lambda entry: entry.name)
def test_lines_in_the_help_are_the_commands_own(entry):
    loaded = load_command(entry)
    assert loaded.name == entry.name
    first = inspect.cleandoc(loaded.help).split("\n\n")[0]
    assert " ".join(first.split()) == entry.help


def test_programs_list_commands_without_importing_them():
    code = (
        "import sys\n"
        "from quasar.commands import PROGRAMS, program\n"
        "for name in PROGRAMS:\n"
        "    program(name).main(['--help'], standalone_mode=False)\n"
        "packages = {'export', 'runtime', 'evaluation', 'calibration', 'engines', 'plugins'}\n"
        "assert not packages & {name.split('.')[0] for name in sys.modules}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_program_has_commands():
    assert all(program(name).commands for name in PROGRAMS)
    assert {name for entry in COMMANDS for name in entry.programs} == set(PROGRAMS) - {"quasar"}
    assert set(program("quasar").commands) == {entry.name for entry in COMMANDS}


def test_a_name_that_is_wrong_gets_a_suggestion():
    done = subprocess.run([sys.executable, "-m", "runtime", "verfy"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "No such command 'verfy'. Did you mean 'verify'?" in done.stderr
