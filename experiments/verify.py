"""Make every table and figure of the scales again, from the records alone and by the notebooks as they are now,
and all that the README shows or quotes of them; fail on any difference, on a dead link of their pages,
on a page that would be written differently now, and on a record whose id does not fit what it says."""
import runpy, sys
from pathlib import Path
from lewel.experiments import altered_pages, verify, verify_readme, wrong_ids

if __name__ == "__main__":
    kept = [place for scale in ("demo", "imagenette", "paper") if ((place := Path("results")/scale)/"notebooks").exists()]
    wrong = [text for place in kept for text in (*verify(place), *altered_pages(place))]
    wrong += wrong_ids("results") + verify_readme()
    if Path("README.md").read_text() != runpy.run_path("nbs/readme.py")["readme"]("nbs/index.ipynb"):
        wrong.append("README.md is not what nbs/index.ipynb says: make readme")
    print("\n".join(wrong) if wrong else "every table, figure, printed and quoted number follows from the records")
    sys.exit(bool(wrong))
