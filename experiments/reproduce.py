"""Run the experiments of a scale, then write the page and print the tables.
Settings: settings.ini, or the environment; arguments go to Snakemake.

With LEWEL_DRY_RUN=1 only the plan is printed: every run with its command, its estimated cost, and the data that is missing.
With LEWEL_KEEP=1 results that came with the repository are kept and added to; else they are put aside and computed again."""
import os, re, signal, subprocess, sys
from dataclasses import replace
from pathlib import Path
from lewel.core import UserError, handling, read_failures
from lewel.experiments import (adopt, check_data, evaluation_groups, finished_jobs, forget_failures, only_one,
                               published_copy, put_aside, read_settings, recorded_minutes, write_page)
from lewel.results import compare_records, read_records

# arguments with which Snakemake runs no job
ASKING = re.compile(r"-[a-zA-Z]*n[a-zA-Z]*|-[hvlSD]|--(help|version|dry-?run|(detailed-)?summary|dag|(rule|file)graph|d3dag"
                    r"|lint|list.*|l[ciptu]|report(?!-after).*|unlock)")

def asked(name): return os.environ.get(name, "") not in ("", "0")

def snakemake(lock, *more):
    """Snakemake's exit code. Ctrl-C, SIGTERM and SIGHUP are passed on to it and its jobs, which save what they have;
    it ends when they have, and the code is 128 + signal."""
    command, came = ["snakemake", "--snakefile", "experiments/Snakefile", "--nolock", *more], []
    def stop(signum, frame):
        came.append(signum)
        os.kill(process.pid, signal.SIGTERM)          # Snakemake starts no more jobs; SIGINT it may have been told to ignore
        os.killpg(process.pid, signal.SIGINT)         # the jobs' shells wait for them
    with subprocess.Popen(command, pass_fds=[lock], process_group=0) as process:
        ends = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]      # nohup
        with handling(stop, *ends): code = process.wait()
    return 128 + came[0] if came and code else code

def main():
    settings, keep, arguments = read_settings(), asked("LEWEL_KEEP"), sys.argv[1:]
    results = Path("results")/settings.scale
    if asked("LEWEL_DRY_RUN"):
        from lewel.cost import placed, print_plan
        asked_for = placed(settings)
        return print_plan(settings, done=finished_jobs(results, asked_for) if keep else (),
                          minutes=recorded_minutes(results, replace(asked_for, ablation_seeds=max(1, settings.ablation_seeds))))
    evaluation_groups(settings); check_data(settings)
    published = published_copy(results)
    with only_one(results) as lock:
        if any(ASKING.fullmatch(argument.split("=")[0]) for argument in arguments):
            if keep and not (results/"marks").exists():
                raise UserError("Snakemake does not know yet what KEEP=1 takes over as done: KEEP=1 DRY_RUN=1 lists what is left")
            return snakemake(lock, *arguments)
        if keep:
            done = adopt(results, settings)
            if done: print(f"{len(done)} jobs are taken over as done, by their records")
            if done and any(Path(".snakemake/incomplete").glob("*")):     # what an earlier call left of jobs that are done now
                places = (f"{results}/marks/{mark}" for mark in done)
                if snakemake(lock, "--cores", "1", "--quiet", "all", "--cleanup-metadata", *places) > 128: return 130
        elif put_aside(results):
            print(f"the results that came with the repository are now in {published}; all is computed again "
                  f"(to have them back: rm -r {results} && mv {published} {results})")
        if without := [task for task in ("segmentation", "detection", "instance") if settings.scale not in getattr(settings, task)]:
            print(f"left out: {', '.join(without)}; settings.ini names no data for them at scale {settings.scale}", file=sys.stderr)
        for f in forget_failures(results, settings): print(f"trying again: {f['folder']} ({f['reason']})")
        code = snakemake(lock, "--keep-going", "--rerun-incomplete", "--rerun-triggers", "mtime", "input", "params",
                         "--quiet", "rules", "progress", "host", *arguments)
        if code > 128:
            print("stopped; what was saved is kept: the same command goes on from there", file=sys.stderr)
            return code
        page = write_page(results)
    for table in sorted((results/"tables").glob("*.md")): print("\n" + table.read_text())
    for kind in "tables", "figures", "runs", "evaluations", "ablations", "notebooks":
        print(f"{kind:12} {results/kind}/  ({len(list((results/kind).glob('*')))})")
    print(f"all on a page: {page}")
    same = compare_records(read_records(results), read_records(published))
    if len(same): print(f"\nthe same runs in {published}, this folder's numbers less those:\n{same.to_string(index=False)}")
    failures = read_failures(results)
    for f in failures: print(f"missing: {f['folder']}: {f['reason']}", file=sys.stderr)
    return code or bool(failures)

if __name__ == "__main__":
    try: sys.exit(main())
    except UserError as e: sys.exit(print(f"error: {e}", file=sys.stderr) or 2)
