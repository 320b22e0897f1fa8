"""The recipe for Ray makes the store of one process."""

import importlib.util
from pathlib import Path

import pytest
from small_store import content

RECIPE = Path(__file__).resolve().parents[2] / "experiments" / "ray_harvest" / "run.py"


def test_ray_workers_are_ranks(tmp_path):
    ray = pytest.importorskip("ray", reason="no Ray: pip install 'ray[data]'")
    from interp.store.harvest import harvest_acts

    (tmp_path / "a.txt").write_text("Tom and Sue went to the park and saw a big red ball.\n\n" * 100)
    options = {"hooks": ["resid_post.1"], "source": f"text:{tmp_path / 'a.txt'}", "ctx": 64, "batch_size": 4}
    options["shard_mb"] = 0.25
    spec = importlib.util.spec_from_file_location("ray_recipe", RECIPE)
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    ray.init(num_cpus=2, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})
    try:
        assert recipe.harvest("tiny", 2, out=tmp_path / "two", **options).complete
        import torch

        torch.set_num_threads(1)
        harvest_acts("tiny", options.pop("source"), options.pop("hooks"), out=tmp_path / "one", **options)
    finally:
        ray.shutdown()
    assert content(tmp_path / "two") == content(tmp_path / "one")
