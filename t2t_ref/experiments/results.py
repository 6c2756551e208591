"""The files of long experiments: in this copy of the book, or fetched from its repository (chapters 11 to 16)."""

import os
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

FOLDERS = (Path("results"), Path("../results"))  # seen from the repository's root, and from notebooks/


def results_file(name: str, repository: str) -> Path:
    """Where results/NAME lies. Without a copy here, on Colab say, it is fetched once into results/.

    Args:
        repository: the address of the book's repository, as the set-up cell of every chapter has it

    Raises:
        ConnectionError: which says where to put the file, if it is neither here nor to be had
    """
    for folder in FOLDERS:
        if (folder / name).exists():
            return folder / name
    path = FOLDERS[0] / name
    path.parent.mkdir(parents=True, exist_ok=True)
    url = f"{repository.replace('github.com', 'raw.githubusercontent.com')}/main/results/{name}"
    try:
        with urlopen(url) as answer:
            content = answer.read()  # an error if the line breaks before the end
    except (OSError, HTTPException) as error:
        raise ConnectionError(f"{path} is not here, and {url} cannot be had ({error}); put the file there") from error
    draft = path.with_name(f"{path.name}.part")
    draft.write_bytes(content)
    os.replace(draft, path)
    return path
