"Make every table and figure of the scales again, from the records alone and by the notebooks as they are now, and all that the README shows or quotes of them; fail on any difference, and on a dead link of their pages."
import runpy, sys
from pathlib import Path
from lewel.experiments import verify, verify_readme

if __name__ == "__main__":
    wrong = [text for scale in ("demo", "imagenette", "paper") if (Path("results")/scale/"notebooks").exists() for text in verify(Path("results")/scale)]
    wrong += verify_readme()
    if Path("README.md").read_text() != runpy.run_path("nbs/readme.py")["readme"]("nbs/index.ipynb"): wrong.append("README.md is not what nbs/index.ipynb says: make readme")
    print("\n".join(wrong) if wrong else "every table, figure, printed and quoted number follows from the records")
    sys.exit(bool(wrong))
