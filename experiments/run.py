"""Run an experiment notebook; its parameters are checked before anything starts.

run.py NOTEBOOK EXECUTED-COPY NAME=VALUE ...                             a table or a figure
run.py NOTEBOOK EXECUTED-COPY MARK [--needs FOLDER] NAME=VALUE ...       a job: MARK is left when it is over, failed or not"""
import sys
from papermill.exceptions import PapermillExecutionError
from lewel.core import UserError, parse_option
from lewel.experiments import run_job, run_notebook

USAGE = "usage: run.py NOTEBOOK EXECUTED-COPY [MARK [--needs FOLDER]] NAME=VALUE ..."

def main(argv):
    places, parameters = [a for a in argv if "=" not in a and a != "--needs"], dict(parse_option(a) for a in argv if "=" in a)
    if len(places) != 4 if "--needs" in argv else len(places) not in (2, 3): raise UserError(USAGE)
    try: (run_notebook if len(places) == 2 else run_job)(*places, **parameters)
    except PapermillExecutionError as e: sys.exit(f"{places[0]} failed: {e.ename}: {e.evalue} (see {places[1]})")
    except KeyboardInterrupt: sys.exit(print(f"{places[0]}: interrupted", file=sys.stderr) or 130)

if __name__ == "__main__":
    try: main(sys.argv[1:])
    except UserError as e: sys.exit(print(f"error: {e}", file=sys.stderr) or 2)
