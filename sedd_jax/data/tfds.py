"""Datasets that TensorFlow Datasets (TFDS) has prepared as array_record; TensorFlow is not needed.

TFDS is imported where it is used: it is slow to import.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sedd_jax.data.corpora import Corpus, Pairs, ReadingProgress, listing_sha256

PREFIX = "tfds:"
BATCH = 1024  # documents that are read at once


def open_tfds(name: str, data_dir: str | Path) -> Corpus:
    """Returns dataset `tfds:NAME[/CONFIG][:VERSION]` that lies in data_dir, with its own splits.

    A document is the feature `text`, or the only one of type Text. Nothing is downloaded:
    ValueError says how to prepare what is not there. The source holds the shards' sha256.
    """
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    dataset = name.removeprefix(PREFIX)
    command = f"tfds build {dataset} --file_format=array_record --data_dir={data_dir}"
    try:
        builder = builder_from_files(dataset, data_dir=str(data_dir))
    except (OSError, ValueError) as error:
        folder = Path(data_dir, dataset.partition(":")[0])
        inside = sorted(path.name for path in folder.glob("*")) if folder.is_dir() else []
        raise ValueError(
            f"no dataset {dataset!r}, as NAME[/CONFIG][:VERSION], in {str(data_dir)!r}"
            f"{', which has ' * bool(inside)}{', '.join(inside[:5])}; prepare it with: {command}"
        ) from error
    feature = _text_feature(name, builder.info.features)
    splits = {split: info for split, info in builder.info.splits.items() if info.num_examples}
    shards = sorted(Path(path) for info in splits.values() for path in info.filepaths)
    if not shards or not all(".array_record-" in f.name and f.is_file() for f in shards):
        raise ValueError(
            f"{name!r} in {str(builder.data_path)!r} is not whole, or no array_record; prepare it "
            f"with: {command}"
        )
    progress = ReadingProgress()

    def pairs() -> Pairs:
        progress.start(sum(info.num_examples for info in splits.values()))
        for split, stream in streams.items():
            for document in stream():
                progress.count()
                yield split, document

    streams = {
        split: functools.partial(_documents, builder, split, info.num_examples, feature)
        for split, info in splits.items()
    }
    source = {
        "corpus": name,
        "version": str(builder.version),
        "dataset": builder.info.full_name,
        "feature": feature,
        "files": {"*": listing_sha256([(shard.name, shard) for shard in shards])},
    }
    return Corpus(streams, source, one_pass=pairs, progress=progress)


def _text_feature(name: str, features: Any) -> str:
    from tensorflow_datasets.core.features import Text

    texts = sorted(key for key, feature in features.items() if isinstance(feature, Text))
    if "text" in texts:
        return "text"
    if len(texts) != 1:
        raise ValueError(
            f"{name!r} has no feature 'text', and of type Text it has {', '.join(texts) or 'none'};"
            " write the one you mean to .jsonl files and use corpus 'text'"
        )
    return texts[0]


def _documents(builder: Any, split: str, count: int, feature: str) -> Iterator[str]:
    try:
        source = builder.as_data_source(split)
        for start in range(0, count, BATCH):
            for example in source.__getitems__(range(start, min(start + BATCH, count))):
                yield example[feature].decode("utf-8")
    except (ValueError, IndexError, RuntimeError, OSError, NotImplementedError) as error:
        raise ValueError(
            f"cannot read split {split!r} of {str(builder.data_path)!r}: "
            f"{str(error).splitlines()[0]}; prepare the dataset again"
        ) from error
