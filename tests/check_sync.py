"Fail if notebooks, library and README are out of step: export, clean and rebuild must change nothing. Files are put back as they were."
import subprocess, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
watched = lambda: [*root.glob("lewel/**/*.py"), *root.glob("nbs/*.ipynb"), root/"README.md"]

if __name__ == "__main__":
    before = {p: p.read_bytes() for p in watched()}
    for command in "nbdev-clean", "nbdev-export", "make --silent readme":
        subprocess.run(command.split(), cwd=root, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    changed = sorted(str(p.relative_to(root)) for p in {*before, *watched()} if not p.exists() or p.read_bytes() != before.get(p))
    for p, content in before.items():
        if str(p.relative_to(root)) in changed: p.write_bytes(content)
    if changed: sys.exit("out of step (run nbdev-export, nbdev-clean and make readme): " + ", ".join(changed))
    print(f"in step: {len(before)} files of notebooks, library and README")
