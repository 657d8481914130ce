"""nbdev-test on every notebook, two at a time.

Each runs in a process of its own, forked from this one, which has the large libraries imported already: to import them takes longer than most of the tests."""
import multiprocessing, sys, warnings
from multiprocessing.connection import wait
from pathlib import Path
warnings.filterwarnings("ignore")
import fastai.learner, matplotlib.pyplot, seaborn, torch, torchvision.models.detection
from nbdev.test import nbdev_test

def check(path):
    "Run all cells of a notebook; errors go to standard error, and the process ends with another code than 0."
    torch.set_num_threads(1)
    nbdev_test(str(path), n_workers=0)

if __name__ == "__main__":
    waiting, running, failed = sorted((Path(__file__).parents[1]/"nbs").glob("*.ipynb")), [], []
    while waiting or running:
        while waiting and len(running) < 2:
            running.append(multiprocessing.get_context("fork").Process(target=check, args=(waiting[0],), name=waiting.pop(0).name))
            running[-1].start()
        wait([p.sentinel for p in running])
        for p in [p for p in running if not p.is_alive()]:
            running.remove(p); p.join()
            print(f"{p.name}: {'failed' if p.exitcode else 'passed'}", flush=True)
            if p.exitcode: failed.append(p.name)
    sys.exit(f"failed: {' '.join(failed)}" if failed else 0)
