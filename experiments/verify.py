"Make every table and figure of the scales again, from the records alone, and fail on any difference; then compare the README's numbers with the published tables."
import sys
from pathlib import Path
from lewel.experiments import published_results, verify

if __name__ == "__main__":
    wrong = [text for scale in ("demo", "imagenette", "paper") if (Path("results")/scale/"notebooks").exists() for text in verify(Path("results")/scale)]
    readme = Path("README.md").read_text().splitlines()
    for table in sorted((published_results("results/demo")/"tables").glob("*.md")):
        shown = [line for line in table.read_text().splitlines() if line.startswith("|")]
        if shown[0] in readme: wrong += [f"README.md lacks a row of {table}: {line}" for line in shown if line not in readme]
    print("\n".join(wrong) if wrong else "every table, figure and printed number follows from the records")
    sys.exit(bool(wrong))
