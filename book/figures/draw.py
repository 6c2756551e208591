"""Write the diagrams of the pages (make figures). Chapters draw their own, in a cell."""

from pathlib import Path

from t2t_ref.figures import model_map

HERE = Path(__file__).parent

if __name__ == "__main__":
    (HERE / "model-map.svg").write_text(model_map())
