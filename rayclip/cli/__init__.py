"""The command line `rayclip`: parse options, make one call, print a table. Heavy imports are inside the commands."""


def main() -> None:
    """Run the program `rayclip`."""
    from rayclip.cli.app import app
    from rayclip.cli.running import run

    run(app, "rayclip")
