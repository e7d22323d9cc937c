"""Running the command line inside the tests' own process."""

from deltaproduct.cli.main import main


def run(capsys, *arguments):
    """(status, standard output, standard error) of the program in this process."""
    status = 0
    try:
        main([str(a) for a in arguments])
    except SystemExit as e:
        status = e.code or 0
    out, err = capsys.readouterr()
    return status, out, err
