"""Datasets of the hub, or in a local folder, as documents, by the `datasets` library."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltaproduct.corpus.source import HashedSource, text_field
from deltaproduct.errors import UsageError, first_line


class HubSource(HashedSource):
    """The training split of a dataset that the `datasets` library finds, by a local folder or by name; streamed."""

    def __init__(self, name: str, share: float | None = None):
        super().__init__(share)
        path, _, config = name.partition(":")
        self._name = name
        self._rows = _load_dataset(path, config or None)
        self.total = _rows_of(self._rows)

    @property
    def _reads_all(self) -> bool:
        return False  # it may come over a network

    def description(self) -> dict[str, Any]:
        return {"source": "hf", "name": self._name, "documents": self.total} | self._held_out()

    def _texts(self) -> Iterator[tuple[str, int]]:
        rows = iter(self._rows)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as e:  # of whatever reads its files
                raise UsageError(f"The dataset {self._name} cannot be read on: {first_line(e)}") from e
            yield text_field(row, f"The dataset {self._name}"), 1


def _rows_of(dataset: Any) -> int | None:
    """How many rows a dataset says it has, which the library takes from its file as it is."""
    splits = getattr(dataset.info, "splits", None)
    count = getattr(splits.get("train"), "num_examples", None) if isinstance(splits, dict) else None
    return count if type(count) is int and count >= 0 else None


def _load_dataset(path: str, config: str | None) -> Any:
    try:
        import datasets
    except ImportError as e:
        raise UsageError("Sources of the hub need the datasets library: pip install 'deltaproduct[eval]'.") from e
    try:
        if (Path(path) / "dataset_info.json").is_file() or (Path(path) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(path)  # what save_to_disk wrote; memory-mapped
            return loaded["train"] if isinstance(loaded, datasets.DatasetDict) else loaded
        # Versions before 4 could run a script of the dataset's, and asked whether to.
        return datasets.load_dataset(path, config, split="train", streaming=True, trust_remote_code=False)
    except Exception as e:  # what damaged files make the library raise can be anything; a script, a RuntimeError
        raise UsageError(f"The dataset {path!r} cannot be loaded: {first_line(e)}") from e
