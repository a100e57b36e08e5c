"""Entry point of `python -m benchmarks`."""

import sys

try:
    from benchmarks.cli import app
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] in ("benchmarks", "avalanche_gradproj"):
        raise
    print(f"error: {error.name} is not installed: pip install 'avalanche-gradproj[benchmarks]'", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
