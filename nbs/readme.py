"Build README.md from index.ipynb: hidden cells, hidden inputs and prints left out, links made relative to the root."
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

def readme(
    index, # path of index.ipynb
)->str:
    "The text of README.md."
    nb = nbformat.read(index, 4)
    nb.cells = [c for c in nb.cells if not c.source.startswith(("#| hide\n", "#| default_exp"))]
    for c in nb.cells:
        if c.source.startswith("#| hide_input"):
            c.cell_type, c.source, outputs = "markdown", "", c.pop("outputs")
            c.source = outputs[0]["data"]["text/markdown"]
        elif c.cell_type == "code":         # what is printed on the way is of no use to a reader
            c.outputs = [o for o in c.outputs if o.output_type != "stream"]
    nb.metadata["language_info"] = dict(name="python")
    text, _ = MarkdownExporter().from_notebook_node(nb)
    return text.replace("](../", "](").strip() + "\n"

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    (here.parent/"README.md").write_text(readme(here/"index.ipynb"))
