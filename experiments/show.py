"Print the tables of a scale and where its files are."
from pathlib import Path
from lewel.experiments import read_settings

if __name__ == "__main__":
    results = Path("results")/read_settings().scale
    for table in sorted((results/"tables").glob("*.md")): print("\n" + table.read_text())
    for kind in "tables", "figures", "runs", "evaluations", "notebooks": print(f"{kind:12} {results/kind}/  ({len(list((results/kind).glob('*')))})")
