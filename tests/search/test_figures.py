"""The pictures in the folder of a search."""

from pathlib import Path

import numpy as np
from hintsearch.analysis.layer_distances import LayerDistances
from hintsearch.models.zoo import ModelSpec
from hintsearch.search.figures import layer_pictures
from hintsearch.search.layers import Layers, candidates_of

MATRIX = np.array([[0, 0.25], [0.25, 0]])


def layers(scored: bool) -> Layers:
    candidates = candidates_of(ModelSpec("resnet8", 10, 1), (1, 8, 8))[:2]
    scores = {"effective_rank": MATRIX[0]} if scored else {}
    paths = tuple(candidate.path for candidate in candidates)
    return Layers(candidates, LayerDistances(paths, {"r2_cca": MATRIX}, scores, 430))


def test_pictures_of_the_layers_are_drawn_once(tmp_path: Path) -> None:
    pictures = layer_pictures(tmp_path, layers(scored=True))
    assert [picture.name for picture in pictures] == ["layer-distances.png", "layer-scores.png"]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    for picture in pictures:
        picture.write_bytes(b"as it was")
    assert layer_pictures(tmp_path, layers(scored=True)) == pictures
    assert [picture.read_bytes() for picture in pictures] == [b"as it was"] * 2


def test_picture_that_is_missing_is_drawn(tmp_path: Path) -> None:
    distances, scores = layer_pictures(tmp_path, layers(scored=True))
    scores.unlink()
    assert layer_pictures(tmp_path, layers(scored=True)) == [distances, scores]
    assert scores.read_bytes().startswith(b"\x89PNG")


def test_layers_without_scores_have_one_picture(tmp_path: Path) -> None:
    assert [picture.name for picture in layer_pictures(tmp_path, layers(scored=False))] == ["layer-distances.png"]
