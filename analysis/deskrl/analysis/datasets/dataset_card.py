"""Dataset card: the README.md by which Hugging Face finds the splits of an exported dataset."""

from __future__ import annotations

from collections.abc import Mapping

from deskrl.analysis.datasets.parquet_schema import COLUMNS, FORMAT_VERSION

_CARD = """\
---
task_categories:
- image-text-to-text
tags:
- computer-use
- reinforcement-learning
configs:
- config_name: default
  data_files:
{files}
---

# {name}

Episodes of the run `{name}`, exported by deskrl {version} (format version
{format_version}). Each row is one step of an episode.

| split | episodes | steps |
| --- | --- | --- |
{counts}

```python
from datasets import load_dataset

steps = load_dataset("PATH_OF_THIS_FOLDER", split="{split}")
steps[0]["screenshot"]
```

| column | content |
| --- | --- |
{columns}
"""


def dataset_card(name: str, version: str, splits: Mapping[str, tuple[int, int]]) -> str:
    """Return the card of a dataset.

    Args:
        name: name of the run.
        version: version of deskrl.
        splits: number of episodes and of steps by split; at least one split.
    """
    return _CARD.format(
        name=name,
        version=version,
        format_version=FORMAT_VERSION,
        files="\n".join(f"  - split: {split}\n    path: data/{split}-*" for split in splits),
        counts="\n".join(f"| {split} | {episodes} | {steps} |" for split, (episodes, steps) in splits.items()),
        split=next(iter(splits)),
        columns="\n".join(f"| `{column}` | {content} |" for column, (_, content) in COLUMNS.items()),
    )
