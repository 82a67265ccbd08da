"""Every YAML lists exactly the keywords of its target, with their defaults, and builds it."""

import inspect
from pathlib import Path

import pytest
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from trainers.data.text import TextData, TextOptions
from trainers.data.vision import ImageOptions

CONFIGS = sorted((Path(__file__).parents[3] / "configs/data").glob("*.yaml"))
# Where a YAML says something else than the code, on purpose.
DIFFERENT = {
    "folder": {"extensions": [".txt", ".md", ".rst", ".py"]},
    "fashion_mnist": {"valid_images": 2000},
    "cifar10": {"valid_images": 2000},
}


def keywords(target):
    """Keyword -> default, with the options a source passes on."""
    found = {}
    for parameter in inspect.signature(target).parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD:
            assert parameter.kind is parameter.KEYWORD_ONLY
            found[parameter.name] = parameter.default
        elif "TextOptions" in str(parameter.annotation):
            defaults = inspect.signature(TextData).parameters
            found |= {key: defaults[key].default for key in TextOptions.__annotations__}
        else:
            assert "ImageOptions" in str(parameter.annotation)
            found |= dict(zip(ImageOptions.__annotations__, (64, 0, None), strict=True))
    return found


def load(path, **run):
    """The YAML as a part of a run's configuration."""
    return OmegaConf.create(run | {"data": OmegaConf.load(path)}).data


def test_all_are_here():
    language = {"stdlib", "planted", "enwiki", "wikitext2", "multidomain", "folder"}
    vision = {"planted_images", "digits", "fashion_mnist", "cifar10"}
    assert {path.stem for path in CONFIGS} == language | vision


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_keywords_and_defaults(path):
    config = load(path)
    expected = keywords(get_object(config._target_)) | DIFFERENT.get(path.stem, {})
    values = OmegaConf.to_container(config, resolve=True)
    del values["_target_"]
    if path.stem == "folder":
        expected["path"] = "???"  # the only one without a default
    assert values == expected


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_builds(path, root, tmp_path):
    config = load(path)
    small = {"length": 16, "valid_tokens": 4096, "max_bytes": 100_000, "batch_size": 3}
    config.update({key: value for key, value in small.items() if key in config})
    if "root" in config:
        config.root = str(root)
    if path.stem == "folder":
        (tmp_path / "a.txt").write_text("some text\n" * 5000)
        config.path = str(tmp_path)
    data = instantiate(config)
    batches = [*data.valid_batches(), *([] if path.stem == "wikitext2" else [data.train_batch(0)])]
    for batch in batches:
        rows = (3, 16) if data.task == "language" else (3,)
        assert batch.targets.shape == batch.mask.shape == batch.domains.shape == batch.documents.shape == rows
        assert batch.inputs.shape == (rows if data.task == "language" else (3, *data.image_shape))
        assert int(batch.targets.max()) < (data.vocab_size if data.task == "language" else data.num_classes)
        assert int(batch.domains.max()) < len(data.domains)
    assert len(data.fingerprint) == 64
    assert data.describe().startswith(path.stem)
    if path.stem != "wikitext2":
        assert 0 < data.baseline().loss < 6


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_runs_seed_orders_the_data_but_does_not_change_it(path):
    fixed = path.stem.startswith("planted")  # there it draws the sources, which a run must not change
    config = load(path, seed=7)
    assert config.get("seed", 7) == (0 if fixed else 7)


def test_an_unknown_key_is_refused():
    config = OmegaConf.create({"_target_": "trainers.data.planted.PlantedImages", "nois": 1.0})
    with pytest.raises(Exception, match="unexpected keyword argument 'nois'"):
        instantiate(config)
