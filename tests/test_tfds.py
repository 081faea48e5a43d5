"""Datasets that TensorFlow Datasets has prepared, written here by its own writer."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import says
from tensorflow_datasets.core.dataset_info import DatasetIdentity

from sedd_jax import config as configuration
from sedd_jax.cli import prepare_command
from sedd_jax.configs import quickstart
from sedd_jax.data import make_corpus, open_records

TEXT = tfds.features.Text()
SPLITS = {
    "train": [{"text": f"document {i} é"} for i in range(30)],
    "validation": [{"text": "held out text"}],
    "test": [{"text": "test text"}],
}


def write(root: Path, name: str, splits=SPLITS, features=None, config=None, version="1.0.0"):
    folder = root / name / (config or "") / version
    folder.mkdir(parents=True)
    identity = DatasetIdentity(
        name=name,
        version=tfds.core.Version(version),
        data_dir=str(folder),
        module_name=__name__,
        config_name=config,
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=tfds.features.FeaturesDict(features or {"text": TEXT}),
        disable_shuffling=True,
    )
    writer = tfds.core.SequentialWriter(info, 8, file_format="array_record")
    writer.initialize_splits(list(splits))
    writer.add_examples(splits)
    writer.close_all()
    return folder


def test_a_dataset_is_read_with_its_own_splits_in_order(tmp_path):
    write(tmp_path, "toy")
    corpus = make_corpus("tfds:toy", data_dir=tmp_path)
    documents = {split: list(corpus.documents(split)) for split in corpus.streams}
    assert documents == {split: [row["text"] for row in rows] for split, rows in SPLITS.items()}
    pairs = list(corpus.pairs())
    assert [p for p in pairs if p[0] == "train"] == [("train", d) for d in documents["train"]]
    assert (corpus.progress.done, corpus.progress.total) == (32, 32)
    assert str(tmp_path) not in str(corpus.source)


def test_name_config_and_version_choose_and_the_content_is_the_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    other = {"train": [{"text": "second"}]}
    write(tmp_path, "toy", version="1.0.0")
    write(tmp_path, "toy", other, version="1.10.0")
    write(tmp_path, "toy2", other, config="small", version="1.10.0")
    newest = make_corpus("tfds:toy")
    assert list(newest.documents("train")) == ["second"]
    assert newest.source["version"] == "1.10.0"
    assert len(list(make_corpus("tfds:toy:1.0.0").documents("train"))) == 30
    configured = make_corpus("tfds:toy2/small")
    assert configured.source["dataset"] == "toy2/small/1.10.0"
    assert configured.source["files"] != newest.source["files"]  # the names of the shards
    folder = write(tmp_path / "again", "toy", {"train": [{"text": "thrice"}]}, version="1.10.0")
    again = make_corpus("tfds:toy", data_dir=folder.parents[1])
    assert again.source["files"] != newest.source["files"]


def test_the_feature_is_text_or_the_only_one_that_is_text(tmp_path):
    scalar = tfds.features.Scalar(np.int64)
    row = {"text": "t", "body": "b", "label": 3}
    features = {"text": TEXT, "body": TEXT, "label": scalar}
    write(tmp_path, "both", {"train": [row]}, features)
    write(tmp_path, "one", {"train": [{"body": "b", "label": 3}]}, {"body": TEXT, "label": scalar})
    pair = {"a": TEXT, "b": TEXT}
    write(tmp_path, "pair", {"train": [{"a": "x", "b": "y"}]}, pair)
    write(tmp_path, "none", {"train": [{"label": 3}]}, {"label": scalar})
    assert list(make_corpus("tfds:both", data_dir=tmp_path).documents("train")) == ["t"]
    assert list(make_corpus("tfds:one", data_dir=tmp_path).documents("train")) == ["b"]
    with says("'tfds:pair' has no feature 'text', and of type Text it has a, b; write"):
        make_corpus("tfds:pair", data_dir=tmp_path)
    with says("of type Text it has none"):
        make_corpus("tfds:none", data_dir=tmp_path)


@pytest.mark.parametrize("name", ["nope", "toy:9.9.9", "toy/c", "to-y", "toy/", ":1.0.0", "a/b/c"])
def test_what_is_not_prepared_is_one_line_with_the_command_that_prepares_it(tmp_path, name):
    write(tmp_path, "toy")
    with says(f"'{name}'", f"tfds build {name} --file_format=array_record --data_dir="):
        make_corpus(f"tfds:{name}", data_dir=tmp_path)


def test_configs_are_listed_and_a_damaged_dataset_is_named(tmp_path):
    write(tmp_path, "toy", config="small")
    with says("no dataset 'toy'", "which has small"):
        make_corpus("tfds:toy", data_dir=tmp_path)
    folder = write(tmp_path, "torn")
    shard = next(folder.glob("*train*00000*"))
    shard.write_bytes(shard.read_bytes()[:50])
    corpus = make_corpus("tfds:torn", data_dir=tmp_path)
    with says("cannot read split 'train'", "prepare the dataset again"):
        list(corpus.documents("train"))
    shard.unlink()
    with says("is not whole", "tfds build torn"):
        make_corpus("tfds:torn", data_dir=tmp_path)


def test_the_command_and_the_config_take_it(tmp_path, capsys):
    write(tmp_path, "toy")
    flags = [f"--data_dir={tmp_path}", "--tokenizer=characters", "--length=8"]
    assert prepare_command(["--dataset=tfds:toy", f"--out={tmp_path / 'r'}", *flags]) == 0
    records = open_records(tmp_path / "r")
    assert list(records.fingerprint["splits"]) == ["train", "validation", "test"]
    assert records.counts("train")["documents"] == 30
    assert "corpus tfds:toy, version 1.0.0" in capsys.readouterr().out
    config = configuration.with_values(quickstart.get_config(), {"data.corpus": "tfds:toy/c:1.*.*"})
    assert config.data.corpus == "tfds:toy/c:1.*.*"
    with says("tfds:", "tfds:NAME"):
        configuration.with_values(config, {"data.corpus": "tfds:"})
