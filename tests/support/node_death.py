"""A layer pass on two Ray nodes of which one is lost in the middle; prints JSON. A process of its own: one Ray each."""

import json
import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import ray
import torch
from hintsearch.analysis.layer_metrics import layer_distances, metric_names, what_they_read
from hintsearch.analysis.reading_plan import plan_columns, plan_reading
from hintsearch.distill.data import ImageSet
from hintsearch.models.candidates import list_candidates
from hintsearch.models.preprocessing import Preprocessing
from hintsearch.models.zoo import ModelSpec, build_model
from hintsearch.search.layer_actors import LayerTask, TappedNetwork, measure_layers
from hintsearch.search.networks import TrainedNetwork
from ray.cluster_utils import Cluster

IMAGES = 640


def main() -> None:
    torch.manual_seed(0)
    spec = ModelSpec("resnet8", 10, 1)
    network = build_model(spec)
    candidates = list_candidates(network, (1, 16, 16))
    weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    rng = np.random.default_rng(0)
    images = ImageSet(rng.integers(0, 256, (IMAGES, 1, 16, 16), dtype=np.uint8), rng.integers(0, 10, IMAGES))
    task = LayerTask(
        (TappedNetwork(TrainedNetwork(spec, weights), tuple(candidate.path for candidate in candidates)),),
        images,
        Preprocessing((0.5,), (0.25,)),
        plan_reading(IMAGES, 20),
        plan_columns([candidate.channels for candidate in candidates], 10, 20, 1e9, seed=0),
        what_they_read(metric_names()),
        None,
    )
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    cluster.wait_for_nodes()
    lost_at: list[int] = []

    def lose_a_node(done: int) -> None:
        if done >= IMAGES // 4 and not lost_at:
            lost_at.append(done)
            cluster.remove_node(second, allow_graceful=False)

    disturbed = measure_layers(task, 2, on_images=lose_a_node).measurement(candidates)
    cpus = ray.cluster_resources()["CPU"]
    undisturbed = measure_layers(task, 1).measurement(candidates)
    ours, theirs = (layer_distances(measured, metric_names()).distances for measured in (disturbed, undisturbed))
    equal = all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    print(json.dumps({"lost_at": lost_at, "cpus": cpus, "equal": equal}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
