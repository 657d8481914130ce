"Run an experiment notebook: run.py NOTEBOOK EXECUTED-COPY NAME=VALUE ...; parameters are checked before anything starts."
import sys
from papermill.exceptions import PapermillExecutionError
from lewel.cli import parse_option
from lewel.core import UserError
from lewel.experiments import run_notebook

if __name__ == "__main__":
    try: run_notebook(*sys.argv[1:3], **dict(parse_option(o) for o in sys.argv[3:]))
    except UserError as e: sys.exit(print(f"error: {e}", file=sys.stderr) or 2)
    except PapermillExecutionError as e: sys.exit(f"{sys.argv[1]} failed: {e.ename}: {e.evalue} (see {sys.argv[2]})")
