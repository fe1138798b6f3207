"""Pages read from files, which people edit: what is no page is refused by name."""

from pathlib import Path

import yaml
from huggingface_hub import ModelCard


def read_page(path: Path) -> ModelCard:
    """The page in a file.

    Args:
        path: The file, `README.md` of a repository.

    Raises:
        ValueError: If it is no text, or its metadata are none of a page.

    Example:
        >>> from pathlib import Path
        >>> _ = Path("README.md").write_text("---\\ntags: [\\n---\\n")
        >>> read_page(Path("README.md"))
        Traceback (most recent call last):
            ...
        ValueError: README.md is damaged: while parsing a flow node...
    """
    try:
        return ModelCard.load(path)
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}: mend it, or move it away") from error


__all__ = ["read_page"]
